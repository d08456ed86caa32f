"""Operators along a dim whose entries need a carry from the ranks before: scan factors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spcompile import collectives
from spcompile.placement import Shard
from spcompile.rules.base import Call, Context, Emit, Side, Split, along

__all__ = ["Cumsum", "reverse_cumsum"]

aten = torch.ops.aten


@torch.library.custom_op("spcompile::reverse_cumsum", mutates_args=())
def _reverse_cumsum(x: Tensor, dim: int) -> Tensor:
    """out[t] = sum of x[s] over s >= t along ``dim``; passes only, it is written out by its rule."""
    return x.flip(dim).cumsum(dim).flip(dim)


@_reverse_cumsum.register_fake
def _(x: Tensor, dim: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


reverse_cumsum = torch.ops.spcompile.reverse_cumsum.default


@dataclass
class Cumsum:
    """cumsum: a rank's own sums plus the totals of all before them, which one all-gather brings.

    Padding is zero, so behind the last valid entry the sums repeat it. A reverse_cumsum begins at the end:
    its totals are those of what lies behind. Where the batch is merged into the dim, a rank holds a part of
    each sequence.
    """

    call: Call
    linear: tuple[frozenset[int], ...] = (frozenset({0}),)

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        dim = self.call.argument(1, "dim") % max(self.call.operands[0].dim(), 1)
        if shard.dim != dim:
            split = along(self.call, {dim}).split(side, index, shard)
            return None if split is None else replace(split, emit=self.whole_emit())
        if shard.start != 0:
            return None

        def emit(context: Context, operands: list[Tensor]) -> Any:
            (x,) = operands
            parts = x.unflatten(dim, (shard.outer, shard.block))
            own = self._run([parts], dim + 1)
            return (own + self._carry(context, own, dim)).flatten(dim, dim + 1)

        return Split((shard,), (shard,), (0.0,), emit)

    def _carry(self, context: Context, own: Tensor, dim: int) -> Tensor:
        """What comes before (or, backwards, behind) each of this rank's parts, [..., outer, 1, ...].

        ``own`` are the sums of the parts, [..., outer, block, ...]; a part's last is its total. The parts of
        all ranks stand in the order outer, rank.
        """
        ranks, (outer, block) = context.group.size, own.shape[dim : dim + 2]
        backwards = self.call.op is reverse_cumsum
        totals = own.select(dim + 1, 0 if backwards else block - 1)
        flat = collectives.all_gather(totals, context.group).movedim(0, dim + 1).flatten(dim, dim + 1)
        nothing = torch.zeros_like(flat.narrow(dim, 0, 1))
        if backwards:
            sums = torch.cat([flat.narrow(dim, 1, flat.shape[dim] - 1), nothing], dim)
            sums = sums.flip(dim).cumsum(dim, dtype=own.dtype).flip(dim)
        else:
            sums = torch.cat([nothing, flat.narrow(dim, 0, flat.shape[dim] - 1)], dim)
            sums = sums.cumsum(dim, dtype=own.dtype)
        mine = torch.arange(outer, device=own.device) * ranks + context.rank(own.device)
        return sums[(slice(None),) * dim + (mine,)].unsqueeze(dim + 1)

    def whole_emit(self) -> Emit:
        """The sums without a carry."""
        return lambda context, operands: self._run(operands, self.call.args[1])

    def _run(self, operands: list[Tensor], dim: int) -> Any:
        (x,) = operands
        if self.call.op is reverse_cumsum:
            return x.flip(dim).cumsum(dim).flip(dim)
        return x.cumsum(dim, **self.call.kwargs)
