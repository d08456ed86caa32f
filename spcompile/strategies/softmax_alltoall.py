"""Ulysses: an all-to-all gives each rank whole sequences of some heads, and another brings the rows back.

Between the two a rank has H / P heads of all tokens, so every mask is the whole sequence's, and causal work
is the same for all ranks. Query heads are filled up to a multiple of P, by zeros that cost their share of
time. Key heads that P does not divide are repeated, as little as will do.

Bytes received per rank, with P dividing both heads: forward (P-1)/P b B (H K + G (K + V)) w for what goes,
and (P-1)/P b B H (V w + 4) for rows and their log-sum-exp; backward those of the gradients, and rows again.
Cross attention, and a mask that differs by row, are gathered as in :mod:`.softmax_allgather`.

Source: DeepSpeed Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile import collectives
from spcompile.collectives import Group, Sequence
from spcompile.kernels.softmax.operands import Operands, Options
from spcompile.strategies.masking import shared
from spcompile.strategies.softmax_allgather import AllGather

__all__ = ["AllToAll"]


class AllToAll:
    """See :class:`spcompile.strategies.softmax.SoftmaxStrategy`; kv is all that came, ``[P, n]``: of rank p
    its tokens of this rank's heads of queries, keys and values."""

    @staticmethod
    def gather(
        x: Operands, options: Options, queries: Sequence | None, keys: Sequence | None
    ) -> Tensor | None:
        """Queries, keys and values in one collective."""
        heads = _Heads.of(x, queries, keys)
        if heads is None:
            return AllGather.gather(x, options, queries, keys)
        return heads.exchanged(heads.x.q, *(heads.repeated(y) for y in heads.x[1:3]))

    @staticmethod
    def grows(kv: Tensor) -> bool:
        """Only what was gathered."""
        return kv.dim() > 2

    @staticmethod
    def forward(
        x: Operands, options: Options, queries: Sequence | None, keys: Sequence | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Whole attention of this rank's heads, and each rank's rows of it."""
        heads = _Heads.of(x, queries, keys)
        if heads is None:
            return AllGather.forward(x, options, queries, keys)
        kv = AllToAll.gather(x, options, queries, keys)
        assert kv is not None
        shape, x = x.q.shape[:3], heads.x
        whole = heads.whole(x, kv)
        attention = torch.ops.spcompile.softmax_attention
        out, lse = attention(*whole[:4], options.causal, options.scale, *options[3:], *whole[4:])
        rows = torch.cat([out, _as_numbers(lse, out.dtype)], dim=3)
        (back,) = heads.returned(rows)
        out, lse = back[..., : x.v.shape[3]].contiguous(), _as_lse(back[..., x.v.shape[3] :], lse.dtype)
        return out.view(*shape, -1), lse.view(shape), kv

    @staticmethod
    def backward(
        grad: Tensor,
        x: Operands,
        out: Tensor,
        lse: Tensor,
        kv: Tensor | None,
        options: Options,
        queries: Sequence | None,
        keys: Sequence | None,
        *,
        relative: bool = False,
    ) -> tuple[Tensor, ...]:
        """Of this rank's heads, and each rank's rows of them; repeated key heads are summed."""
        heads = _Heads.of(x, queries, keys)
        if heads is None:
            return AllGather.backward(grad, x, out, lse, kv, options, queries, keys, relative=relative)
        assert kv is not None
        given, x = x, heads.x
        whole, values = heads.whole(x, kv), x.v.shape[3]
        rows = torch.cat([grad, out, _as_numbers(lse, out.dtype)], dim=3).reshape(*x.q.shape[:3], -1)
        (came,) = heads.arrived(heads.exchanged(rows), rows)
        grad, out = came[..., :values].contiguous(), came[..., values : 2 * values].contiguous()
        saved = (grad, *whole[:4], out, _as_lse(came[..., 2 * values :], lse.dtype))
        ops = torch.ops.spcompile
        attention = ops.softmax_attention_relative_backward if relative else ops.softmax_attention_backward
        grads = attention(*saved, options.causal, options.scale, *options[3:], *whole[4:])
        dq, dk, dv = heads.returned(*grads[:3])
        own = dq, heads.summed(dk, x.k), heads.summed(dv, x.v)
        shaped = (y.view(z.shape) for y, z in zip(own, given[:3], strict=True))
        return *shaped, *(heads.placed(y, given) for y in grads[3:])


def _together(x: Operands) -> Operands:
    """The batch as heads, where nothing else differs within it: ranks then share out all B H.

    Recognition folds groups of heads into the batch, so that it may have more of them than there are heads.
    """
    batch, mask = x.q.shape[0], x.mask
    if batch == 1 or any(y.shape[0] > 1 for y in x.ids) or (mask is not None and mask.dim() > 3):
        return x
    if mask is not None and mask.dim() == 3 and mask.shape[0] > 1:
        mask = mask.repeat(batch, 1, 1)
    relative = x.relative
    if relative is not None and relative.shape[0] > 1:
        relative = relative.repeat(batch, 1)
    sinks = None if x.sinks is None else x.sinks.repeat(batch)
    q, k, v = (y.reshape(1, -1, *y.shape[2:]) for y in x[:3])
    return x._replace(q=q, k=k, v=v, mask=mask, relative=relative, sinks=sinks)


def _as_numbers(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of a log-sum-exp as one or more numbers of another type, beside the rows that go with it."""
    return lse.unsqueeze(-1).view(dtype)


def _as_lse(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    return numbers.contiguous().view(dtype).squeeze(-1)


class _Heads:
    """Who has which heads of a call."""

    def __init__(self, x: Operands, sequence: Sequence, group: Group) -> None:
        self.sequence, self.group, self.x = sequence, group, _together(x)
        (self.of_queries, self.of_keys), ranks = (y.shape[1] for y in self.x[:2]), group.size
        grouped = self.of_queries // self.of_keys
        fits = (n for n in range(1, grouped + 1) if grouped % n == 0 and self.of_keys * n % ranks == 0)
        self.times = next(fits, grouped)
        """How often a key head is repeated."""

    @staticmethod
    def of(x: Operands, queries: Sequence | None, keys: Sequence | None) -> _Heads | None:
        """None where rows stay where they are: of another sequence than the keys, or with their own masks."""
        group = shared(queries, keys)
        # Of a single row, whether the mask is that row's or all rows' is not seen.
        rows = x.mask is not None and x.mask.dim() > 1 and (x.mask.shape[-2] > 1 or x.q.shape[2] == 1)
        return None if group is None or queries is None or rows else _Heads(x, queries, group)

    def each(self, heads: int) -> int:
        """Of so many heads, how many a rank has, those included that fill up."""
        return -(-heads // self.group.size)

    def repeated(self, x: Tensor) -> Tensor:
        """Keys or values as a rank's query heads need them."""
        return x if self.times == 1 else x.repeat_interleave(self.times, 1)

    def summed(self, x: Tensor, like: Tensor) -> Tensor:
        """The gradients of repeated heads."""
        return x if self.times == 1 else x.unflatten(1, like.shape[1:2] + (self.times,)).sum(2).to(like.dtype)

    def exchanged(self, *tensors: Tensor) -> Tensor:
        """Each rank's heads of this rank's tokens ``[B, heads, block, D]``, sent there: ``[P, n]``."""
        return collectives.all_to_all(torch.cat([self._by_rank(x, 1) for x in tensors], 1), self.group)

    def arrived(self, came: Tensor, *like: Tensor) -> list[Tensor]:
        """All tokens of this rank's heads, ``[B, heads, T, D]``, of what was sent as ``like``."""
        shapes = [(x.shape[0], self.each(x.shape[1]), x.shape[2], x.shape[3]) for x in like]
        parts = came.split([prod(s) for s in shapes], 1)
        whole = (p.reshape(-1, *s).permute(1, 2, 0, 3, 4) for p, s in zip(parts, shapes, strict=True))
        return [x.flatten(2, 3)[:, :, : self.sequence.length].contiguous() for x in whole]

    def returned(self, *tensors: Tensor) -> list[Tensor]:
        """This rank's tokens of all heads, of tensors of all tokens and this rank's heads."""
        block, padding = self.sequence.block, self.group.size * self.sequence.block - self.sequence.length
        padded = [F.pad(x, (0, 0, 0, padding)) for x in tensors]
        came = collectives.all_to_all(torch.cat([self._by_rank(x, 2) for x in padded], 1), self.group)
        shapes = [(x.shape[0], x.shape[1], block, x.shape[3]) for x in tensors]
        parts = came.split([prod(s) for s in shapes], 1)
        heads = (self.of_queries, *(self.of_keys * self.times,) * 2)
        rows = (p.reshape(-1, *s).movedim(0, 1).flatten(1, 2) for p, s in zip(parts, shapes, strict=True))
        return [x[:, :n].contiguous() for x, n in zip(rows, heads, strict=False)]

    def _by_rank(self, x: Tensor, dim: int) -> Tensor:
        """``[P, n]``: what each rank gets of a dim of heads, or of tokens."""
        size = self.each(x.shape[dim])
        fill = self.group.size * size - x.shape[dim]
        x = F.pad(x, (0, 0) * (3 - dim) + (0, fill)) if fill else x
        return x.unflatten(dim, (self.group.size, size)).movedim(dim, 0).flatten(1)

    def whole(self, x: Operands, kv: Tensor) -> Operands:
        """The operands of this rank's heads and all tokens."""
        q, k, v = self.arrived(kv, x.q, *(self.repeated(y) for y in x[1:3]))
        own = {"mask": self._own(x.mask, -3), "sinks": self._own(x.sinks, 0)}
        return x._replace(q=q, k=k, v=v, **own, relative=self._own(x.relative, 0))

    def _own(self, x: Tensor | None, dim: int) -> Tensor | None:
        """This rank's of a dim of query heads, or of one for all; where it has more, some that are there."""
        if x is None or x.dim() < -dim or x.shape[dim] == 1 != self.of_queries:
            return x
        size, rank = self.each(self.of_queries), collectives.rank(self.group, x.device)
        at = (rank * size + torch.arange(size, device=x.device)).clamp(max=self.of_queries - 1)
        return x.index_select(dim, at)

    def placed(self, gradient: Tensor, x: Operands) -> Tensor:
        """A term of the sum over ranks, of what only this rank's heads have a gradient of."""
        assert x.relative is not None
        if x.relative.shape[0] == 1:
            return gradient
        ranks = torch.arange(self.group.size, device=gradient.device)
        own = ranks == collectives.rank(self.group, gradient.device)
        places = torch.where(own[:, None, None], gradient, 0.0).flatten(0, 1)[: self.of_queries]
        return places.unflatten(0, (-1, x.relative.shape[0])).sum(0)
