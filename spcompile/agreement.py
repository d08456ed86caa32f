"""Whether the ranks along the sequence are about to run one graph on one batch, before any collective starts.

Before each call every rank sends one row of numbers. All ranks decide from the same rows, so that they go on
or fail together; only where they fail do they send more, to say what differs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from spcompile._torch import FakeTensor, ShortenTraceback, hint
from spcompile.arguments import Argument, arguments_of
from spcompile.collectives import Group
from spcompile.config import Config
from spcompile.digest import digest
from spcompile.disagreement import Report, Sketch, Value, graph_lines, message, only_rounding, rounding
from spcompile.errors import SpcompileError
from spcompile.groups import fingerprint, gather_numbers, gather_objects
from spcompile.ports import is_local_part

__all__ = ["Agreement", "RanksDisagree", "before_reading", "gather_lengths"]

_COMPILES, _CALLS, _READS, _SHARDS = range(4)
# State is compared before a graph is compiled and at its call number 1, 2, 4, ... 1024, 2048, 3072, ...
_RARELY = 1024


class RanksDisagree(SpcompileError, ShortenTraceback):
    """The ranks along the sequence are about to run different things; raised on every one of them.

    Dynamo lets this type through as it is, so that a rank that compiles and one that calls raise the same.
    """

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)


def compared(argument: Argument, value: Any, config: Config) -> bool:
    """Whether this input must hold the same values on every rank along the sequence.

    This is the one place that leaves an input out: what a rank rightly has for itself.
    """
    if config.check != "values" or isinstance(value, FakeTensor) or is_local_part(value):
        return False
    # Parts of a DTensor or of another subclass are a matter of its own mesh.
    plain = type(value) in (Tensor, nn.Parameter)
    return plain and value.layout is torch.strided and value.device.type != "meta"


@dataclass
class Agreement:
    """What one graph compares.

    Args:
        key: a fingerprint of all that decides how the graph is compiled.
        lines: the graph's nodes, to be told where ranks differ.
        settings: name -> text of all else that the key is made of.
        calls: how many there were.
        told: whether a drift by rounding was told.
    """

    group: Group
    config: Config
    arguments: list[Argument]
    key: int
    lines: list[tuple[str, str]]
    settings: dict[str, str]
    calls: int = 0
    told: bool = False

    @classmethod
    def of(
        cls, gm: fx.GraphModule, inputs: Sequence[Any], group: Group, config: Config, settings: dict[str, str]
    ) -> Agreement:
        """The agreement of Dynamo's graph, traced for ``inputs``."""
        graph = "\n".join(m.code for m in gm.modules() if isinstance(m, fx.GraphModule))
        shapes = [_shape(x) for x in inputs if isinstance(x, Tensor)]
        settings = settings | {"options": config.key(), "torch": torch.__version__}
        key = fingerprint(graph, shapes, sorted(settings.items()))
        return cls(group, config, arguments_of(gm), key, graph_lines(gm), settings)

    def before_compiling(self, inputs: Sequence[Any]) -> None:
        """Compare the graphs, and the values that Dynamo traced with.

        Raises:
            RanksDisagree: on every rank.
        """
        if self.group.size > 1:
            self._exchange(_COMPILES, inputs, state=True)

    def before_calling(self, inputs: Sequence[Any]) -> None:
        """Compare what is about to run. A rank that compiles the same graph anew is waited for.

        Raises:
            RanksDisagree: on every rank.
        """
        if self.group.size == 1:
            return
        calls, self.calls = self.calls, self.calls + 1
        rarely = calls > 0 and (calls & (calls - 1) == 0 if calls < _RARELY else calls % _RARELY == 0)
        while not self._exchange(_CALLS, inputs, state=rarely):
            pass

    def _exchange(self, phase: int, inputs: Sequence[Any], state: bool) -> bool:
        """One exchange; returns whether all ranks are in the same phase."""
        mine = [phase, self.key, self._shapes(inputs), int(state)]
        values = [self._digest(inputs, own=True), self._digest(inputs, own=False) if state else None]
        rows = gather_numbers(self.group, mine, values)
        phases, keys, shapes, states, given, kept = (set(column) for column in zip(*rows))
        alike = len(keys) == 1 and len(shapes) == 1
        if len(phases) == 2 and alike:
            return False  # values are compared when all are about to call
        alike = alike and len(given) == 1
        if not alike or (states == {1} and len(kept) > 1):
            self._fail(inputs, drift=alike and phase == _CALLS)
        return True

    def _shapes(self, inputs: Sequence[Any]) -> int:
        """A fingerprint of what a call passes, but for the values of its tensors."""
        own = [x for a, x in zip(self.arguments, inputs, strict=True) if a.kind == "argument"]
        return fingerprint([_shape(x) if isinstance(x, Tensor) else _number(x) for x in own])

    def _digest(self, inputs: Sequence[Any], own: bool) -> Tensor | None:
        """One digest of what a call passes (``own``), or of what was there before."""
        total: Tensor | None = None
        for argument, x in zip(self.arguments, inputs, strict=True):
            if (argument.kind == "argument") is own and compared(argument, x, self.config):
                one = digest(x)
                total = one if total is None else total.to(one.device) * 3 + one
        return total

    def _fail(self, inputs: Sequence[Any], drift: bool) -> None:
        """Tell each other the details and raise; where only state has drifted, by rounding, tell it once."""
        values = [Value(a, *self._details(a, x)) for a, x in zip(self.arguments, inputs, strict=True)]
        report = Report(values, self.lines, self.settings, hash("spcompile"))
        reports = gather_objects(self.group, report)
        if not (drift and only_rounding(reports)):
            raise RanksDisagree(message(reports))
        if not self.told:
            warnings.warn(rounding(reports), stacklevel=5)
        self.told = True

    def _details(self, argument: Argument, x: Any) -> tuple[str, int | None, Sketch | None]:
        if not isinstance(x, Tensor):
            return _number(x), None, None
        if not compared(argument, x, self.config):
            return _shape(x), None, None
        floating = argument.kind != "argument" and x.is_floating_point()
        return _shape(x), int(digest(x)), Sketch.of(x) if floating else None


def before_reading(group: Group, what: str, key: int) -> None:
    """Check that every rank reads the same sharded tensor now, where others might call a compiled module.

    Raises:
        RanksDisagree: on every rank.
    """
    rows = gather_numbers(group, [_READS, key, 0, 0], [None, None])
    if any(row != rows[0] for row in rows):
        raise RanksDisagree(message(gather_objects(group, Report([], [], {}, hash("spcompile"), reads=what))))


def gather_lengths(group: Group, length: int, others: str) -> tuple[list[int], bool]:
    """How many tokens each rank has, and whether the ranks are alike in ``others``.

    Raises:
        RanksDisagree: on every rank, where some do something else.
    """
    rows = gather_numbers(group, [_SHARDS, length, fingerprint(others), 0], [None, None])
    if any(row[0] != _SHARDS for row in rows):
        what = "nothing yet, but call spcompile.shard"
        raise RanksDisagree(message(gather_objects(group, Report([], [], {}, hash("spcompile"), reads=what))))
    return [row[1] for row in rows], len({row[2] for row in rows}) == 1


def _shape(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{[*map(hint, x.shape)]}"


def _number(x: Any) -> str:
    """A number's text; for a size that Dynamo traces as a symbol, the one that it was traced with."""
    numbers = int | float | bool | torch.SymInt | torch.SymFloat
    return repr(hint(x)) if isinstance(x, numbers) else str(type(x))
