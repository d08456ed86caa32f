"""Operators along a dim whose entries need a carry from the ranks before: scan factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spcompile import collectives
from spcompile.placement import Shard
from spcompile.rules.base import Call, Context, Side, Split, along

__all__ = ["Cumsum"]

aten = torch.ops.aten


@dataclass
class Cumsum:
    """cumsum: a rank's own sums plus the totals of the ranks before it, which one all-gather brings.

    Padding is zero, so behind the last valid entry the sums repeat it.
    """

    call: Call
    linear: tuple[frozenset[int], ...] = (frozenset({0}),)

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        dim = self.call.argument(1, "dim") % max(self.call.operands[0].dim(), 1)
        if shard.dim != dim:
            return along(self.call, {dim}).split(side, index, shard)
        if shard.start != 0 or shard.outer * shard.inner != 1:
            return None

        def emit(context: Context, operands: list[Tensor]) -> Any:
            own = self.call.run(operands)
            if context.group.size == 1:
                return own
            totals = collectives.all_gather(own.narrow(dim, shard.block - 1, 1), context.group)
            ranks = torch.arange(context.group.size, device=own.device)
            before = (ranks < context.rank(own.device)).reshape(-1, *(1,) * own.dim())
            return own + torch.where(before, totals, torch.zeros_like(totals)).sum(0, dtype=own.dtype)

        return Split((shard,), (shard,), (0.0,), emit)
