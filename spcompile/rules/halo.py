"""Neighbouring tokens: the positions just before and just behind a rank's own."""

from __future__ import annotations

import torch
from torch import Tensor

from spcompile import collectives
from spcompile.rules.base import Context

__all__ = ["halo"]


def halo(context: Context, x: Tensor, dim: int, left: int, right: int, fill: float | None = None) -> Tensor:
    """``x``, whose ``dim`` holds this rank's block of positions, with its neighbours' positions around it.

    One all-gather brings the edges of all ranks (the last ``left`` and the first ``right`` of each block, at
    most all of it), and each rank picks its neighbours' by its own index at run time, so that the code of all
    ranks is one. A halo may be wider than a block.

    Args:
        left, right: how many positions before and behind the block, at least 0.
        fill: what stands where no rank holds a position; None: something that some rank holds.
    Returns:
        ``x`` with left + block + right entries along ``dim``.
    """
    if left + right == 0:
        return x
    block, ranks, device = x.shape[dim], context.group.size, x.device
    last, first = min(left, block), min(right, block)
    sent = x
    if last + first < block:
        sent = torch.cat([x.narrow(dim, 0, first), x.narrow(dim, block - last, last)], dim)
    width = sent.shape[dim]
    edges = collectives.all_gather(sent, context.group).movedim(0, dim).flatten(dim, dim + 1)

    around = torch.cat([torch.arange(-left, 0, device=device), torch.arange(right, device=device) + block])
    position = around + context.rank(device) * block
    owner = torch.div(position, block, rounding_mode="floor")
    inside = position - owner * block
    index = owner * width + torch.where(inside < first, inside, inside - block + width)
    picked = edges[(slice(None),) * dim + (index.clamp(0, ranks * width - 1),)]
    if fill is not None:
        held = ((position >= 0) & (position < ranks * block)).reshape(-1, *(1,) * (x.dim() - 1 - dim))
        picked = torch.where(held, picked, torch.full((), fill, dtype=x.dtype, device=device))
    return torch.cat([picked.narrow(dim, 0, left), x, picked.narrow(dim, left, right)], dim)
