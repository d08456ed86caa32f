"""From one placement to another: the collective, or the local slice, that it takes.

Each function is PyTorch code on local tensors; the caller traces it into the graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile import collectives
from spcompile.placement import Partial, Placement, Replicate, Shard, local_shape, same_blocks
from spcompile.rules.base import Context
from spcompile.rules.halo import halo
from spcompile.sizes import hint

__all__ = ["is_shift", "joined", "redistribute", "shifted", "split_dim", "surrounded"]


def redistribute(
    context: Context, x: Tensor, have: Placement, want: Placement, shape: tuple[int, ...]
) -> Tensor:
    """``x``, the local tensor under ``have``, made the one under ``want``; ``shape`` is the global one."""
    if have == want:
        return x
    if isinstance(have, Shard):
        if isinstance(want, Shard) and is_shift(have, want, context.group.size):
            reach = max(want.start - have.start, 0), max(have.start - want.start, 0)
            around = surrounded(context, x, have, want, shape, reach)
            return shifted(around, have, want, reach[0])
        return redistribute(context, _gather(context, x, have), Replicate(), want, shape)
    if isinstance(have, Partial):
        ranks = context.group.size
        if (
            isinstance(want, Shard)
            and have.op == "sum"
            and want.holds_all(ranks)
            and not _is_short(want, ranks)
        ):
            return _reduce_scatter(context, x, want)
        return redistribute(context, _summed(context, x, have.op), Replicate(), want, shape)
    if isinstance(want, Partial):
        assert want.op == "sum", "only a sum has a neutral term"
        return torch.where(context.rank(x.device) == 0, x, x.new_zeros(()))
    assert isinstance(want, Shard)
    return _slice(context, x, want, shape)


def split_dim(x: Tensor, shard: Shard, sequence: int) -> Tensor:
    """View the sharded dim as [outer, sequence]."""
    return x.reshape(*x.shape[: shard.dim], shard.outer, sequence, *x.shape[shard.dim + 1 :])


def _merge(x: Tensor, shard: Shard) -> Tensor:
    """Undo :func:`split_dim`; a tensor without entries has its sizes too."""
    both = x.shape[shard.dim] * x.shape[shard.dim + 1]
    return x.reshape(*x.shape[: shard.dim], both, *x.shape[shard.dim + 2 :])


def _gather(context: Context, x: Tensor, have: Shard) -> Tensor:
    """The whole tensor: one all-gather, the ranks' blocks side by side, padding cut off.

    Of a short one each rank sends what it holds in its place among zeros.
    """
    assert have.holds_all(context.group.size), have
    if _is_short(have, context.group.size):
        at = torch.arange(have.length, device=x.device) + have.start - context.rank(x.device) * have.block
        held, at = (at >= 0) & (at < have.block), at.clamp(0, have.block - 1)
        entries = split_dim(x, have, have.block)[(slice(None),) * (have.dim + 1) + (at,)]
        held = held.reshape(-1, *[1] * (entries.dim() - have.dim - 2))
        return _merge(_summed(context, torch.where(held, entries, entries.new_zeros(())), "sum"), have)
    return joined(collectives.all_gather(split_dim(x, have, have.block), context.group), have)


def joined(blocks: Tensor, have: Shard) -> Tensor:
    """The whole tensor of the ranks' parts, [P, ..., outer, block, ...]."""
    ranks, at = blocks.shape[0], have.dim + 1  # [P, ..., outer, block, ...] -> [..., outer, P, block, ...]
    whole = blocks.movedim(0, at).flatten(at, at + 1)
    whole = whole.narrow(at, have.start, have.length) if have.padded(ranks) else whole
    return _merge(whole, have)


def _slice(context: Context, x: Tensor, want: Shard, shape: tuple[int, ...]) -> Tensor:
    """This rank's positions of a whole tensor; padding repeats the nearest valid entry."""
    index = context.clamped_index(want, x.device)
    parts = split_dim(x, want, want.length)
    return _merge(parts[(slice(None),) * (want.dim + 1) + (index,)], want).reshape(local_shape(shape, want))


def _summed(context: Context, x: Tensor, op: str) -> Tensor:
    """The whole tensor of terms."""
    sent = x.to(torch.uint8) if x.dtype == torch.bool else x  # c10d has no bool
    return collectives.all_reduce(sent, context.group, op).to(x.dtype)


def is_shift(have: Shard, want: Shard, ranks: int) -> bool:
    """Whether a halo brings it: the same entries in blocks of the same length, not a few from far away."""
    far = abs(have.start - want.start) > hint(have.block) and have.holds_all(ranks)
    return same_blocks(have, want) and not (far and _is_short(have, ranks))


def _is_short(shard: Shard, ranks: int) -> bool:
    """Whether most of what the ranks hold is padding: a sum of the entries, on every rank, sends less."""
    return hint(4 * shard.length) <= hint(ranks * shard.block)


def _reduce_scatter(context: Context, x: Tensor, want: Shard) -> Tensor:
    """The sum of the ranks' terms, of which each rank gets its positions."""
    ranks, at = context.group.size, want.dim + 1
    parts = split_dim(x, want, want.length)
    before, after = want.start, ranks * want.block - want.start - want.length
    if before or after:
        parts = F.pad(parts, [0, 0] * (parts.dim() - 1 - at) + [before, after])
    parts = parts.unflatten(at, (ranks, want.block)).movedim(at, 0)
    return _merge(collectives.reduce_scatter(parts, context.group), want)


def surrounded(
    context: Context, x: Tensor, have: Shard, want: Shard, shape: tuple[int, ...], reach: tuple[int, int]
) -> Tensor:
    """``x`` and, along its sharded dim, the ``reach`` positions of the ranks before and behind; for
    :func:`shifted`. The other arguments are those of :func:`redistribute`."""
    return halo(context, split_dim(x, have, have.block), have.dim + 1, *reach)


def shifted(around: Tensor, have: Shard, want: Shard, left: int) -> Tensor:
    """Entry i moves from position have.start + i to want.start + i; ``left`` positions were put before."""
    start = left + have.start - want.start
    return _merge(around.narrow(have.dim + 1, start, have.block), have)
