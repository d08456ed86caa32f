"""Sizes that may be symbolic: one compilation serves many lengths.

A size of the graph is an ``int``, or a ``torch.SymInt`` where Dynamo made it symbolic. Passes compute with
both alike. Whatever Python decides on a symbolic one (a comparison, ``bool``, ``int``) is decided on the size
at hand and recorded as a guard by PyTorch, which Dynamo checks before each call: so a plan is right for every
length that it serves, and another length is compiled anew.

What only weighs costs or prints a size asks for its :func:`hint` and records nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor

from spcompile._torch import statically_known_true

__all__ = [
    "InputSizes",
    "Sized",
    "at",
    "bounds_of",
    "bytes_of",
    "ceil_div",
    "expression",
    "hint",
    "is_symbolic",
    "key",
    "surely",
]


def is_symbolic(size: Any) -> bool:
    """Whether ``size`` is an integer that is a function of the inputs' sizes (not one that is computed)."""
    return isinstance(size, SymInt) and size.node.has_hint()


def hint(size: Any) -> int:
    """The size at hand; records no guard, so nothing that must be right may depend on it."""
    return int(size.node.hint) if isinstance(size, SymInt) else int(size)


def bytes_of(x: Tensor) -> int:
    """The bytes of a tensor's entries, at the sizes at hand."""
    return prod(map(hint, x.shape)) * x.dtype.itemsize


def surely(condition: bool | torch.SymBool) -> bool:
    """Whether ``condition`` holds for every length that the graph may get; records no guard."""
    return statically_known_true(condition)


def ceil_div(size: int, by: int) -> int:
    """size / by, rounded up."""
    return (size + by - 1) // by


class _Key:
    """A symbolic size in a key of a dict: equal to one that is equal, which is recorded."""

    def __init__(self, size: SymInt) -> None:
        self.size = size

    def __hash__(self) -> int:
        return hash(hint(self.size))

    def __eq__(self, other: object) -> bool:
        return bool(self.size == (other.size if isinstance(other, _Key) else other))


def key(size: Any) -> Any:
    """``size`` as part of a key: a symbolic one has no hash of its own."""
    return _Key(size) if isinstance(size, SymInt) else size


class Sized:
    """A frozen dataclass, declared with ``eq=False``, whose fields may be symbolic sizes."""

    def _key(self) -> tuple[Any, ...]:
        return tuple(key(getattr(self, f.name)) for f in dataclasses.fields(self))  # type: ignore[arg-type]

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._key() == other._key()


def bounds_of(start: Any, stop: Any, step: int, size: Any) -> tuple[Any, Any, int]:
    """``slice(start, stop, step).indices(size)`` of a positive step; a last entry beyond all is the size."""

    def within(at: Any, missing: Any) -> Any:
        if at is None or (not is_symbolic(at) and at >= 2**62):
            return missing if at is None else size
        at = at + size if at < 0 else at
        return size if at > size else at if at > 0 else 0

    return within(start, 0), within(stop, size), step if step is not None else 1


# By how much more a length is tried: one, as many as ranks, as many as chunks or experts may ask for.
_STEPS = (1, 2, 64, 128, 1024)


def _serves_others(symbol: sympy.Symbol, size: SymInt, ranks: int) -> bool:
    """Whether some other value of ``symbol``, which is ``size``, fulfils all guards that are on it alone."""
    if not size.node.expr.is_Symbol:
        return False  # a number by now
    guards = [g.expr for g in size.node.shape_env.guards if g.expr.free_symbols == {symbol}]
    now = hint(size)
    others = [2 * now, 3 * now, *(now + step * by for step in _STEPS for by in (1, ranks))]
    return any(all(g.xreplace({symbol: sympy.Integer(n)}) == sympy.true for g in guards) for n in others)


def expression(size: Any) -> Any:
    """A symbolic size as an expression, which can be kept; numbers are themselves."""
    return size.node.expr if isinstance(size, SymInt) and not size.node.expr.is_Integer else int(size)


def at(size: Any, values: Mapping[sympy.Symbol, int]) -> int:
    """An :func:`expression` where the symbols have these values."""
    return int(size.xreplace(values)) if isinstance(size, sympy.Expr) else size


class InputSizes:
    """The symbols of a graph's sizes, read off what it is called with.

    Args:
        inputs: what the graph was traced with: tensors with symbolic sizes, and these sizes.
    """

    def __init__(self, inputs: Iterable[Any]) -> None:
        self._found: dict[sympy.Symbol, tuple[int, int | None]] = {}
        self._sizes: list[SymInt] = []
        for index, x in enumerate(inputs):
            for dim, size in enumerate(x.shape) if isinstance(x, Tensor) else [(None, x)]:
                if is_symbolic(size) and size.node.expr.is_Symbol and size.node.expr not in self._found:
                    self._found[size.node.expr] = index, dim
                    self._sizes.append(size)

    def __bool__(self) -> bool:
        return bool(self._found)

    def serve_others(self, ranks: int) -> bool:
        """Whether what was guarded meanwhile leaves a symbol another value, as far as a few trials show.

        It only tells what compiling with symbols is worth, so it need not be exact.
        """
        return any(
            _serves_others(symbol, size, ranks) for symbol, size in zip(self._found, self._sizes, strict=True)
        )

    def tell(self, symbols: Iterable[sympy.Symbol]) -> bool:
        """Whether all of these symbols are known in a call."""
        return all(symbol in self._found for symbol in symbols)

    def expression(self, size: Any) -> Any:
        """``size`` as an expression of what is known in a call; its number, with a guard, if it follows
        anything else (an input's strides)."""
        known = not isinstance(size, SymInt) or self.tell(size.node.expr.free_symbols)
        return expression(size) if known else int(size)

    def values(self, args: Sequence[Any]) -> dict[sympy.Symbol, int]:
        """What the symbols are in a call with ``args``."""
        return {
            symbol: int(args[index] if dim is None else args[index].shape[dim])
            for symbol, (index, dim) in self._found.items()
        }
