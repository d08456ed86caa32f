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
    """cumsum: a rank's own sums plus the totals of the ranks before it, which one all-gather brings.

    Padding is zero, so behind the last valid entry the sums repeat it. A reverse_cumsum begins at the end:
    its totals are those of the ranks behind.
    """

    call: Call
    linear: tuple[frozenset[int], ...] = (frozenset({0}),)

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        dim = self.call.argument(1, "dim") % max(self.call.operands[0].dim(), 1)
        if shard.dim != dim:
            split = along(self.call, {dim}).split(side, index, shard)
            return None if split is None else replace(split, emit=self.whole_emit())
        if shard.start != 0 or shard.outer != 1:
            return None

        backwards = self.call.op is reverse_cumsum

        def emit(context: Context, operands: list[Tensor]) -> Any:
            own = self._run(operands)
            if context.group.size == 1:
                return own
            total = own.narrow(dim, 0 if backwards else shard.block - 1, 1)
            totals = collectives.all_gather(total, context.group)
            ranks, rank = torch.arange(context.group.size, device=own.device), context.rank(own.device)
            counts = (ranks > rank if backwards else ranks < rank).reshape(-1, *(1,) * own.dim())
            return own + torch.where(counts, totals, torch.zeros_like(totals)).sum(0, dtype=own.dtype)

        return Split((shard,), (shard,), (0.0,), emit)

    def whole_emit(self) -> Emit:
        """The sums without a carry."""
        return lambda context, operands: self._run(operands)

    def _run(self, operands: list[Tensor]) -> Any:
        if self.call.op is not reverse_cumsum:
            return self.call.run(operands)
        (x,), dim = operands, self.call.args[1]
        return x.flip(dim).cumsum(dim).flip(dim)
