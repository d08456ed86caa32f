"""Tokens of the neighbouring ranks: the positions just before and just behind a rank's own."""

from __future__ import annotations

import torch
from torch import Tensor

from spcompile import collectives
from spcompile.collectives import Group

__all__ = ["give_back", "neighbours"]


def neighbours(
    x: Tensor, dim: int, left: int, right: int, group: Group, rank: Tensor, fill: float | None = None
) -> Tensor:
    """The ``left`` positions before and the ``right`` behind this rank's block, ``dim`` of ``x``.

    One all-gather brings the edges of all ranks (the last ``left`` and the first ``right`` of each block, at
    most all of it), and each rank picks its neighbours' by its own index at run time, so that the code of all
    ranks is one. It may reach farther than a block.

    Args:
        left, right: how many positions before and behind the block, at least 0, not both.
        fill: what stands where no rank holds a position; None: something that some rank holds.
    Returns:
        left + right entries along ``dim``.
    """
    block, ranks, device = x.shape[dim], group.size, x.device
    last, first = min(left, block), min(right, block)
    sent = x
    if last + first < block:
        sent = torch.cat([x.narrow(dim, 0, first), x.narrow(dim, block - last, last)], dim)
    width = sent.shape[dim]
    edges = collectives.all_gather(sent, group).movedim(0, dim).flatten(dim, dim + 1)

    around = torch.cat([torch.arange(-left, 0, device=device), torch.arange(right, device=device) + block])
    position = around + rank * block
    owner = torch.div(position, block, rounding_mode="floor")
    inside = position - owner * block
    index = owner * width + torch.where(inside < first, inside, inside - block + width)
    picked = edges[(slice(None),) * dim + (index.clamp(0, ranks * width - 1),)]
    if fill is not None:
        held = ((position >= 0) & (position < ranks * block)).reshape(-1, *(1,) * (x.dim() - 1 - dim))
        picked = torch.where(held, picked, torch.full((), fill, dtype=x.dtype, device=device))
    return picked


def give_back(x: Tensor, left: int, right: int, group: Group, rank: Tensor) -> Tensor:
    """The adjoint of ``[left neighbours, own, right neighbours]`` along dim 0: each entry goes to its owner.

    One all-gather brings what every rank has for its neighbours. ``left`` and ``right`` are at most a block.
    """
    block = x.shape[0] - left - right
    sent = torch.cat([x.narrow(0, 0, left), x.narrow(0, left + block, right)])
    edges = collectives.all_gather(sent, group)
    own = x.narrow(0, left, block)
    if left:  # what the next rank has for my last positions
        after = edges[(rank + 1).clamp(max=group.size - 1).reshape(1)].squeeze(0).narrow(0, 0, left)
        after = torch.where(rank + 1 < group.size, after, 0.0)
        own = own + torch.cat([own.new_zeros(block - left, *x.shape[1:]), after])
    if right:  # what the rank before has for my first positions
        before = edges[(rank - 1).clamp(min=0).reshape(1)].squeeze(0).narrow(0, left, right)
        before = torch.where(rank > 0, before, 0.0)
        own = own + torch.cat([before, own.new_zeros(block - right, *x.shape[1:])])
    return own
