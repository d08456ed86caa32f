"""Operators that sum, maximise or sort along dims."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spcompile import collectives
from spcompile.placement import Partial, Routed, Shard, Sharding
from spcompile.rules.base import Call, Context, Dims, Emit, Factors, Side, Split, along

__all__ = ["REDUCED_BY", "Variance", "mean", "reduction", "rowwise"]

aten = torch.ops.aten

# By what the terms of several ranks are combined; None: the reduced dims are needed whole.
REDUCED_BY: dict[Any, str | None] = {
    aten.sum.default: "sum",
    aten.sum.dim_IntList: "sum",
    aten.mean.default: "sum",
    aten.mean.dim: "sum",
    aten.amax.default: "max",
    aten.amin.default: "min",
    aten.prod.default: "product",
    aten.prod.dim_int: "product",
    aten.max.default: "max",
    aten.min.default: "min",
    aten.any.default: "max",
    aten.any.dim: "max",
    aten.any.dims: "max",
    aten.all.default: "min",
    aten.all.dim: "min",
    aten.all.dims: "min",
    aten.var_mean.correction: None,
    aten.var.correction: None,
    aten.max.dim: None,
    aten.min.dim: None,
    aten.argmax.default: None,
    aten.argmin.default: None,
}


def reduction(call: Call) -> Factors:
    """The dims named are reduced, the others pass."""
    (x,) = call.operands
    reduced, dims = _reduced_dims(call), tuple(f"d{i}" for i in range(x.dim()))
    keepdim = call.outputs[0].dim() == x.dim() and x.dim() > 0
    kept: Dims = tuple(None if i in reduced else d for i, d in enumerate(dims) if keepdim or i not in reduced)
    by = REDUCED_BY[call.op]
    whole = frozenset(dims[i] for i in reduced) if by is None else frozenset()
    linear = (frozenset({0}),) if by == "sum" and not _narrows(call) else ()
    return Factors(call, (dims,), tuple(kept for _ in call.outputs), whole, by, linear, fill=_fill(call, by))


def _reduced_dims(call: Call) -> set[int]:
    rank = call.operands[0].dim()
    if call.op._overloadname == "default" and call.op not in (aten.amax.default, aten.amin.default):
        named = call.argument(1, "dim") if call.op in (aten.argmax.default, aten.argmin.default) else None
    else:
        named = call.argument(1, "dim")
    if named is None or (isinstance(named, (list, tuple)) and not named):
        return set(range(rank))
    return {d % rank for d in ([named] if isinstance(named, int) else named)}


def _fill(call: Call, by: str | None) -> float | None:
    """What padding holds, where the neutral element isn't the usual one: an integer has no infinity."""
    dtype = call.operands[0].dtype
    if by not in ("max", "min"):
        return None
    if dtype == torch.bool or call.outputs[0].dtype == torch.bool:
        return 0 if by == "max" else 1
    if dtype.is_floating_point:
        return None
    return torch.iinfo(dtype).min if by == "max" else torch.iinfo(dtype).max


def _narrows(call: Call) -> bool:
    return not call.operands[0].dtype.is_floating_point or not call.outputs[0].dtype.is_floating_point


def mean(call: Call) -> Factors:
    """A mean is a sum over the whole count: the mean over a shard would count a shard's tokens."""
    rule = reduction(call)
    (x,), (out,) = call.operands, call.outputs
    count = math.prod(x.shape[d] for d in _reduced_dims(call))
    dims = sorted(_reduced_dims(call))

    def emit(split: Split) -> Emit:
        if not isinstance(split.outputs[0], Partial):
            return lambda context, operands: call.run(operands)

        def divided(context: Context, operands: list[Tensor]) -> Tensor:
            keepdim = out.dim() == x.dim() and x.dim() > 0
            return torch.sum(operands[0], dims, keepdim, dtype=out.dtype) / count

        return divided

    rule.emit, rule.anywhere = emit, True
    return rule


@dataclass
class Variance:
    """var, var_mean: over the sequence, the sum of squared distances from the mean of all ranks' tokens.

    The mean is all-reduced first: a difference of mean squares would cancel.
    """

    call: Call
    linear: tuple[frozenset[int], ...] = ()
    orders = True

    def split(self, side: Side, index: int, shard: Sharding) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        if side == "out" or shard.dim not in _reduced_dims(self.call):
            return reduction(self.call).split(side, index, shard)
        if isinstance(shard, Routed) or self.call.operands[0].is_complex():
            return None
        terms = tuple(Partial("sum") for _ in self.call.outputs)
        # Padding is as far from the mean as what fills it, so it is the squares that must be masked.
        return Split((shard,), terms, (None,), lambda context, ops: self._terms(context, ops[0], shard))

    def _terms(self, context: Context, x: Tensor, shard: Shard) -> Any:
        dims, padded = sorted(_reduced_dims(self.call)), shard.padded(context.group.size)
        count = math.prod(self.call.operands[0].shape[d] for d in dims)
        correction = self.call.kwargs.get("correction")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        valid = context.where_valid(wide, shard, 0.0) if padded else wide
        mean = valid.sum(dims, keepdim=True) / count
        squares = (wide - collectives.all_reduce(mean, context.group)).square()
        squares = context.where_valid(squares, shard, 0.0) if padded else squares
        var = squares.sum(dims, keepdim=True) / max(count - (1 if correction is None else correction), 0)
        outs = [out.reshape(like.shape).to(x.dtype) for out, like in zip((var, mean), self.call.outputs)]
        return outs if len(outs) > 1 else outs[0]


def rowwise(call: Call) -> Factors:
    """Sorts, scans and the like along one dim: it is needed whole, the others pass."""
    names = [a.name for a in call.op._schema.arguments]
    return along(call, {call.argument(names.index("dim"), "dim", -1)})
