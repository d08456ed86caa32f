"""Where a graph repeats itself: an unrolled loop is a periodic run of labels in the order of execution.

A label is all of a Value but its operands and its index literals, so the iterations of a loop have the same
labels. For a label that occurs m times in an iteration, the distance to its m-th next occurrence is the
period; so the periods are proposed by counting these distances, and a run is where label[i] == label[i + p].
Everything is linear in the number of Values, times the few periods that are tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from spcompile.passes.shadow import Value

__all__ = ["FEWEST", "Run", "index_arguments", "label", "runs"]

FEWEST = 4
"""Iterations that make a loop."""
_LAGS = 4
_PERIODS = 24
_SLACK = 64
_INDICES = {"select": ("index",), "slice": ("start", "end"), "getitem": ("index",)}


def index_arguments(v: Value) -> tuple[str, ...]:
    """The arguments that say which part of its operand `v` is: they may differ between iterations."""
    return _INDICES.get(v.name, ())


def label(v: Value) -> tuple:
    """What is alike in all iterations: the op, its literals but the indices, shape, dtype, grad mode."""
    skip = index_arguments(v)
    literals = tuple((k, _literal(x)) for k, x in v.args.items() if k not in skip)
    return (v.name, v.overload, v.shape, v.dtype, v.grad_mode, literals)


def _literal(x: Any) -> Any:
    if isinstance(x, Value):
        return (x.shape, x.dtype)
    if isinstance(x, (list, tuple)):
        return tuple(_literal(y) for y in x)
    if isinstance(x, float):
        return repr(x)  # nan is not equal to itself, and 0.0 is to -0.0
    return (type(x).__name__, str(x))


@dataclass(frozen=True)
class Run:
    """`steps` iterations of `period` Values each, from `values[start]` on."""

    start: int
    period: int
    steps: int

    @property
    def stop(self) -> int:
        return self.start + self.period * self.steps


def runs(values: list[Value]) -> Iterator[Run]:
    """Every maximal run, short periods first: an inner loop comes before the loop around it."""
    names: dict[tuple, int] = {}
    labels = [names.setdefault((label(v), id(v.node.graph if v.node else None)), len(names)) for v in values]
    found: list[Run] = []
    for period in _periods(labels):
        begin = None
        for i in range(len(labels) - period + 1):
            same = i + period < len(labels) and labels[i] == labels[i + period]
            if same and begin is None:
                begin = i
            elif not same and begin is not None:
                if i + period - begin >= FEWEST * period:
                    found.append(_aligned(values, begin, i + period, period))
                begin = None
    yield from found


def _periods(labels: list[int]) -> list[int]:
    places: dict[int, list[int]] = {}
    for i, name in enumerate(labels):
        places.setdefault(name, []).append(i)
    count: Counter[int] = Counter()
    for at in places.values():
        for lag in range(1, _LAGS + 1):
            count.update(y - x for x, y in zip(at, at[lag:], strict=False))
    likely = [p for p, n in count.most_common() if n >= FEWEST - 1]
    return sorted(likely[:_PERIODS])


def _aligned(values: list[Value], begin: int, end: int, period: int) -> Run:
    """Begin iterations where the fewest Values cross: code beside a loop may happen to look like its ends.

    Where a first iteration is unlike the others, so that the run begins within it, it is left out.
    """
    slack = (end - begin) % period
    steps = (end - begin) // period
    place = {id(v): i for i, v in enumerate(values[begin:end])}

    def crossing(shift: int) -> int:
        cut = shift + period
        used: Iterable[Value] = (o for v in values[begin + cut : begin + cut + period] for o in v.operands())
        return len({place[id(o)] for o in used if cut - period <= place.get(id(o), -1) < cut})

    shift = min(range(min(slack, _SLACK), -1, -1), key=crossing) if slack else 0
    return Run(begin + shift, period, steps)


