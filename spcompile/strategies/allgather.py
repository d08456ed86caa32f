"""LASP-2 and LASP-2H: one all-gather of memory states, or of keys and values, in place of a chain of sends.

Linear, causal: summary -> gather -> combine -> apply. Each rank gathers all ranks' summaries, in the
forward those of ``k^T v`` and in the backward those of ``q^T do``, and composes the ones before (after) it;
the intra-chunk work needs no other rank and stands between the start of the gather and its wait. Bytes
received per rank and direction: (P-1) * B * H * K * V * 4, whatever the length of the sequence. Not causal:
one all-reduce each way.

Softmax: one all-gather of packed keys and values, one reduce-scatter of their packed gradients.

Source: LASP-2, arXiv 2502.07563, algorithms 1-4 and section 3.4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile import collectives
from spcompile.attention.algebra import BASIC, StateAlgebra, Summary, fold, pack, summary_shapes, unpack
from spcompile.collectives import Group, Sequence
from spcompile.kernels.linear import chunked, whole
from spcompile.strategies.protocol import masked

__all__ = ["LinearAllGather", "SoftmaxAllGather"]


def _group(sequence: Sequence | None) -> Group | None:
    """The ranks to talk to, or None where this rank holds all there is."""
    return None if sequence is None or sequence.group.size == 1 else sequence.group


class _Exchange:
    """Summaries of all ranks on their way: started when made, combined by :meth:`others`."""

    def __init__(self, algebra: StateAlgebra, summary: Summary, group: Group | None) -> None:
        self.algebra, self.summary, self.group = algebra, summary, group
        if group is not None:
            self.packed = pack(summary)
            self.started = collectives.start_all_gather(self.packed, group)

    def others(self, later: bool) -> Summary | None:
        """The composed summary of the ranks before this one (after it, time reversed, if ``later``)."""
        if self.group is None:
            return None
        size, device = self.group.size, self.packed.device
        packed = collectives.finish(self.started, (size, *self.packed.shape))
        ranks, mine = torch.arange(size, device=device), collectives.rank(self.group, device)
        keep = ranks > mine if later else ranks < mine
        return fold(self.algebra, unpack(packed, summary_shapes(self.summary)), keep, reverse=later)


class LinearAllGather:
    """LASP-2."""

    def linear_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, sequence: Sequence | None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`~spcompile.strategies.protocol.LinearStrategy`."""
        k, v = masked(sequence, 2, k, v)
        group = _group(sequence)
        if not causal:
            memory = _summed(whole.state(k, v), group)
            return whole.apply(q, memory, scale), memory
        f, summary = chunked.forward_start(q, k, v)
        exchange = _Exchange(BASIC, (summary,), group)
        intra, before = chunked.forward_local(f, scale)
        carry = exchange.others(later=False)
        state = None if carry is None else carry[-1]
        out = chunked.forward_finish(f, intra, before, state, scale, q)
        return out, torch.zeros_like(summary) if state is None else state

    def linear_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        carry: Tensor | None,
        *,
        causal: bool,
        scale: float,
        sequence: Sequence | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~spcompile.strategies.protocol.LinearStrategy`."""
        grad, q, k, v = masked(sequence, 2, grad, q, k, v)
        group = _group(sequence)
        if not causal:
            memory = _summed(whole.state(k, v), group) if carry is None else carry
            return whole.apply_backward(grad, q, k, v, memory, _summed(whole.state(q, grad), group), scale)
        b, summary = chunked.backward_start(grad, q, k, v)
        exchange = _Exchange(BASIC, (summary,), group)
        if carry is None and group is not None:
            again = _Exchange(BASIC, (whole.state(k, v),), group).others(later=False)
            assert again is not None
            carry = again[-1]
        dq, dk, dv, after = chunked.backward_local(b, carry if group is not None else None, scale)
        later = exchange.others(later=True)
        dk, dv = chunked.backward_finish(b, dk, dv, after, None if later is None else later[-1], scale)
        return chunked.unchunked(dq, q), chunked.unchunked(dk, k), chunked.unchunked(dv, v)


def _summed(state: Tensor, group: Group | None) -> Tensor:
    return state if group is None else collectives.all_reduce(state, group)


class SoftmaxAllGather:
    """LASP-2H."""

    def softmax_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        causal: bool,
        scale: float,
        q_sequence: Sequence | None,
        kv_sequence: Sequence | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :class:`~spcompile.strategies.protocol.SoftmaxStrategy`; kv is ``[P*block, B, Hkv, K+V]``."""
        kv = _gather_kv(k, v, kv_sequence)
        if kv is not None:
            k, v = _unpack_kv(kv, kv_sequence, k.shape[3])
        group = _group(q_sequence)
        if causal and group is not None:
            assert q_sequence is not None
            args = (q, k, v, mask, scale, group.name, q_sequence.block)
            out, lse = torch.ops.spcompile.local_softmax_attention(*args)
        else:
            out, lse = torch.ops.spcompile.softmax_attention(q, k, v, mask, causal, scale)
        return out, lse, kv

    def softmax_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        out: Tensor,
        lse: Tensor,
        kv: Tensor | None,
        *,
        causal: bool,
        scale: float,
        q_sequence: Sequence | None,
        kv_sequence: Sequence | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~spcompile.strategies.protocol.SoftmaxStrategy`."""
        kv = _gather_kv(k, v, kv_sequence) if kv is None else kv
        size = k.shape[3]
        if kv is not None:
            k, v = _unpack_kv(kv, kv_sequence, size)
        grad, q, out = masked(q_sequence, 2, grad, q, out)
        (lse,) = masked(q_sequence, 2, lse)
        if mask is not None and mask.is_floating_point() and mask.dim() > 1 and mask.shape[-2] > 1:
            (mask,) = masked(q_sequence, mask.dim() - 2, mask)
        group = _group(q_sequence)
        saved = (grad, q, k, v, mask, out, lse)
        if causal and group is not None:
            assert q_sequence is not None
            args = (*saved, scale, group.name, q_sequence.block)
            dq, dk, dv = torch.ops.spcompile.local_softmax_attention_backward(*args)
        else:
            dq, dk, dv = torch.ops.spcompile.softmax_attention_backward(*saved, causal, scale)
        if kv is None:
            return dq, dk, dv
        assert kv_sequence is not None
        dk, dv = _scatter_kv(dk, dv, kv_sequence, summed=group is not None)
        return dq, dk, dv


def _gather_kv(k: Tensor, v: Tensor, sequence: Sequence | None) -> Tensor | None:
    """All ranks' keys and values, packed ``[P*block, B, Hkv, K+V]``; None where they are whole already.

    Tokens come first, so that what the ranks send lies in the sequence's order and no copy follows the
    gather.
    """
    group = _group(sequence)
    if group is None:
        return None
    packed = torch.cat([k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)], dim=3)
    return collectives.all_gather(packed, group).reshape(-1, *packed.shape[1:])


def _unpack_kv(kv: Tensor, sequence: Sequence | None, size: int) -> tuple[Tensor, Tensor]:
    """Views ``[B, Hkv, length, *]`` of the keys and the values, without the padding."""
    assert sequence is not None
    whole_kv = kv[: sequence.length].permute(1, 2, 0, 3)
    return whole_kv[..., :size], whole_kv[..., size:]


def _scatter_kv(dk: Tensor, dv: Tensor, sequence: Sequence, summed: bool) -> tuple[Tensor, Tensor]:
    """This rank's tokens of the gradients of all keys and values, ``[B, Hkv, block, *]``; padding is zero.

    ``summed``: each rank holds the term of its own queries, to be summed; otherwise (every rank computed all
    queries) each holds the whole gradient and takes its part.
    """
    packed = torch.cat([dk.permute(2, 0, 1, 3), dv.permute(2, 0, 1, 3)], dim=3)
    packed = F.pad(packed, (0, 0, 0, 0, 0, 0, 0, sequence.group.size * sequence.block - sequence.length))
    if summed:
        blocks = packed.reshape(sequence.group.size, sequence.block, *packed.shape[1:])
        own = collectives.reduce_scatter(blocks, sequence.group)
    else:
        own = packed[collectives.local_positions(sequence, packed.device)]
    own = own.permute(1, 2, 0, 3)
    return own[..., : dk.shape[3]].contiguous(), own[..., dk.shape[3] :].contiguous()
