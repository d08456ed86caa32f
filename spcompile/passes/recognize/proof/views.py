"""Views of masks: which entry of the operand an entry of the result is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy

from spcompile.passes.recognize.algebra.picks import picks
from spcompile.passes.shadow import Value

Index = tuple[sympy.Expr, ...]


def reshape_view(v: Value, index: Index) -> Index | None:
    """Dims of size one come and go; any other change of shape is not followed."""
    source = v.args["self"].shape
    if [s for s in source if s != 1] != [s for s in v.shape if s != 1]:
        return None
    rest = iter([e for e, s in zip(index, v.shape, strict=True) if s != 1])
    return tuple(sympy.Integer(0) if s == 1 else next(rest) for s in source)


def expand_view(v: Value, index: Index) -> Index:
    return expand_index(v.args["self"].shape, index)


def expand_index(shape: Sequence[int], index: Index) -> Index:
    """The index into an operand of `shape` that was broadcast, from the right."""
    tail = index[len(index) - len(shape) :]
    return tuple(sympy.Integer(0) if s == 1 else e for e, s in zip(tail, shape, strict=True))


def permuted(v: Value, index: Index) -> Index:
    at = dict(zip(v.args["dims"], index, strict=True))
    return tuple(at[d] for d in range(len(index)))


def picked(v: Value, index: Index) -> Index | None:
    """Of one operand, along one dim."""
    found = picks(v)
    return None if found is None else tuple(sympy.expand(e) for e in found[0].index(index))


REMAPS: dict[str, Callable[[Value, Index], Index | None]] = {
    "reshape": reshape_view,
    "expand": expand_view,
    "permute": permuted,
    **dict.fromkeys(("slice", "select", "flip"), picked),
}
"""Views, by op name: the index of the operand's entry."""
