"""A user's own part of a tensor: one that a rank gives (:func:`shard`), one that it takes (:func:`local`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spcompile import collectives
from spcompile.agreement import gather_lengths
from spcompile.config import Config
from spcompile.errors import SpcompileError
from spcompile.groups import sequence_group
from spcompile.passes.shard.communicate import split_dim
from spcompile.placement import Shard
from spcompile.ports import Layout
from spcompile.sharded import Letter, Part, ShardedTensor

__all__ = ["local", "shard"]


def shard(x: Tensor, dim: int = 1, mesh: Any = None) -> Tensor:
    """The tensor of which every rank passes its own tokens: ranks side by side along ``dim``, in rank order.

    What is returned has the shape of the whole and goes into a compiled module as this rank's part; no rank
    ever holds the whole, unless it is read. Every rank must call this.

    Args:
        x: this rank's tokens. All ranks have equally many, but that the last ones may have fewer, or none.
        dim: the sequence.
        mesh: the ranks along the sequence, as the option of that name; default: all ranks of the job.
    Raises:
        SpcompileError: on every rank, where shapes do not fit together.
    """
    group = sequence_group(Config(mesh=mesh))
    if group.size == 1:
        return x
    dim %= x.dim()
    others = f"{[n for d, n in enumerate(x.shape) if d != dim]} {x.dtype} {dim}"
    lengths, alike = gather_lengths(group, x.shape[dim], others)
    total, block = sum(lengths), max(*lengths, 1)
    fitting = [max(0, min(block, total - rank * block)) for rank in range(group.size)]
    if not alike or lengths != fitting:
        raise SpcompileError(
            f"spcompile.shard: the ranks pass {lengths} tokens along dim {dim}, this one a tensor of shape "
            f"{list(x.shape)}. They must be alike in all other dims and in dtype, and have equally many "
            "tokens, but that the last ones may have fewer. Remedy: torch.chunk(tokens, ranks, dim)[rank]."
        )
    shape = (*x.shape[:dim], total, *x.shape[dim + 1 :])
    layout = Layout(Shard(dim, total, block), shape, torch.empty(shape, device="meta").stride(), group)
    return _Given.apply(x, layout)


def local(x: Tensor) -> Tensor:
    """This rank's own tokens of ``x``, a tensor that a compiled module returned; ``x`` itself if it is whole.

    Rank r has tokens [r b, (r + 1) b) of the whole, as far as there are so many. A loss of them is this
    rank's part of a loss: gradients are those of the sum over ranks. It may share memory with ``x``, as
    ``DTensor.to_local`` does.
    """
    return _Local.apply(x) if isinstance(x, ShardedTensor) else x


def _tokens(layout: Layout) -> int:
    """How many of the positions that this rank holds are tokens."""
    rank = 0 if layout.group.name == "explained" else collectives.current_rank(layout.group.name)
    return max(0, min(layout.shard.block, layout.shard.length - rank * layout.shard.block))


def _cut(part: Tensor, layout: Layout) -> Tensor:
    """The tokens of a part, without padding."""
    s, tokens = layout.shard, _tokens(layout)
    return _cut_view(part, layout).reshape(*part.shape[: s.dim], s.outer * tokens, *part.shape[s.dim + 1 :])


def _padded(tokens: Tensor, layout: Layout) -> Tensor:
    """A part of these tokens; padding repeats the last of them, so that an index stays in bounds."""
    s, count = layout.shard, _tokens(layout)
    if count == s.block:
        return tokens
    shape = (*tokens.shape[: s.dim], s.outer * s.block, *tokens.shape[s.dim + 1 :])
    if count == 0:
        return tokens.new_zeros(shape)
    index = torch.arange(s.block, device=tokens.device).clamp(max=count - 1)
    return split_dim(tokens, s, count).index_select(s.dim + 1, index).reshape(shape)


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return ShardedTensor(Part(_padded(x.detach(), layout), layout))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _cut(Letter(gradient).part(ctx.layout.shard, ctx.layout.group), ctx.layout), None


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: ShardedTensor) -> Tensor:
        ctx.layout = x._part.layout
        # Not a copy where the part has no padding: logits may be most of the memory that there is.
        return _cut(x.local_part(), ctx.layout).contiguous().detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        s, layout = ctx.layout.shard, ctx.layout
        shape = (*gradient.shape[: s.dim], s.outer * s.block, *gradient.shape[s.dim + 1 :])
        padded = gradient.new_zeros(shape)
        _cut_view(padded, layout).copy_(split_dim(gradient, s, _tokens(layout)))
        return ShardedTensor(Part(padded, layout))


def _cut_view(part: Tensor, layout: Layout) -> Tensor:
    s = layout.shard
    return split_dim(part, s, s.block).narrow(s.dim + 1, 0, _tokens(layout))
