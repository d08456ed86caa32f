"""Entries of a source, one after the other, where a mask says: the images in a text.

out[t] = source[n(t)] where mask[t], n(t) how many entries are True before t in the order of all entries, else
x[t]. The source is whole, so that a rank reads what falls into its own block; how many entries come before
that, one small all-gather of counts tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from spcompile import collectives
from spcompile.placement import Partial, Placement, Replicate, Shard
from spcompile.rules.base import Call, Context, Side, Split

__all__ = ["MaskedScatter", "MaskedScatterBackward"]


def _places(context: Context, mask: Tensor, shard: Shard) -> Tensor:
    """Where in the source each entry of this rank's block is read; 0 where the mask is False.

    What the source does not have is beyond its end, and stays an error.
    """
    ranks, before = context.group.size, prod(mask.shape[: shard.dim])
    parts = mask.reshape(before * shard.outer, -1)
    own = parts.cumsum(1)
    counts = collectives.all_gather(own[:, -1], context.group).T.flatten()  # in the order of the entries
    mine = torch.arange(len(own), device=mask.device) * ranks + context.rank(mask.device)
    carry = (counts.cumsum(0) - counts)[mine].unsqueeze(1)
    return torch.where(parts, own + carry - 1, 0).view(mask.shape)


def _cut(call: Call, shard: Any) -> bool:
    """Whether a mask of the tensor's own shape is cut where entries keep their order."""
    x, mask = call.operands[:2]
    return isinstance(shard, Shard) and shard.start == 0 and mask.shape == x.shape and x.numel() > 0


@dataclass
class MaskedScatter:
    """masked_scatter(x, mask, source)."""

    call: Call
    linear: tuple[frozenset[int], ...] = ()

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        if not _cut(self.call, shard) or (side == "in" and index == 2):
            return None

        def emit(context: Context, operands: list[Tensor]) -> Any:
            x, mask, source = operands
            return torch.where(mask, source.reshape(-1)[_places(context, mask, shard)], x)

        return Split((shard, shard, Replicate()), (shard,), (None, 0.0, None), emit)


@dataclass
class MaskedScatterBackward:
    """masked_scatter_backward(gradient, mask, sizes): the source's; of a rank's block a term of it."""

    call: Call
    linear: tuple[frozenset[int], ...] = (frozenset({0}),)

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        if side == "out" or not _cut(self.call, shard):
            return None
        sizes = list(self.call.outputs[0].shape)

        def emit(context: Context, operands: list[Tensor]) -> Any:
            grad, mask = operands
            given = torch.where(mask, grad, 0.0).flatten()
            flat = grad.new_zeros(prod(sizes))
            return flat.index_add(0, _places(context, mask, shard).flatten(), given).view(sizes)

        outputs: tuple[Placement, ...] = (Partial("sum"),)
        return Split((shard, shard), outputs, (0.0, 0.0), emit)
