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
from spcompile.attention.algebra import (
    AFFINE,
    BASIC,
    MATRIX,
    StateAlgebra,
    Summary,
    algebra_of,
    fold,
    pack,
    summary_shapes,
    unpack,
)
from spcompile.collectives import Group, Sequence, local_valid
from spcompile.kernels.linear import whole
from spcompile.kernels.linear.chunked import Backward, Forward, Operands, Options
from spcompile.kernels.scan import state_dtype
from spcompile.strategies.protocol import masked

__all__ = ["LinearAllGather", "SoftmaxAllGather"]


def _group(sequence: Sequence | None) -> Group | None:
    """The ranks to talk to, or None where this rank holds all there is."""
    return None if sequence is None or sequence.group.size == 1 else sequence.group


class _Exchange:
    """Summaries of all ranks on their way: started when made, combined by :meth:`carry`.

    ``known`` is the stack ``[P, ...]`` of the ranks' transitions A where each rank can compute it by itself:
    a constant decay over as many tokens as a rank has. Then only states travel.
    """

    def __init__(
        self,
        algebra: StateAlgebra,
        summary: Summary,
        group: Group,
        initial: Tensor | None,
        *,
        known: Tensor | None = None,
        later: bool = False,
    ) -> None:
        self.algebra, self.group, self.initial, self.known, self.later = algebra, group, initial, known, later
        self.sent = summary if known is None else summary[1:]
        packed = pack(self.sent)
        self.device, self.size = packed.device, packed.shape
        self.started = collectives.start_all_gather(packed, group)
        self.summaries: Summary | None = None

    def _arrived(self) -> Summary:
        if self.summaries is None:
            packed = collectives.finish(self.started, (self.group.size, *self.size))
            states = unpack(packed, summary_shapes(self.sent))
            self.summaries = states if self.known is None else (self.known, *states)
        return self.summaries

    def _folded(self, keep: Tensor) -> Tensor:
        whole = fold(self.algebra, self._arrived(), keep, reverse=self.later)
        return whole[-1] if self.initial is None else self.algebra.apply(whole, self.initial)

    def carry(self) -> Tensor:
        """The state before this rank's first step: that of the ranks before it (after it, if ``later``)."""
        ranks = torch.arange(self.group.size, device=self.device)
        mine = collectives.rank(self.group, self.device)
        return self._folded(ranks > mine if self.later else ranks < mine)

    def final(self) -> Tensor:
        """The state after the last step of all ranks."""
        return self._folded(torch.ones(self.group.size, dtype=torch.bool, device=self.device))


def _known_decay(log_decay: Tensor | None, x: Operands, sequence: Sequence) -> Tensor | None:
    """Sums of a constant log decay over each rank's tokens, ``[P, B, H, 1 or K, 1]``; None if it is none."""
    if log_decay is None or log_decay.shape[2] != 1 or sequence.block == 1 or x.beta is not None:
        return None  # (with one token per rank, a decay per token has the shape of a constant one)
    block, ranks = sequence.block, torch.arange(sequence.group.size, device=log_decay.device)
    tokens = (sequence.length - ranks * block).clamp(0, block).reshape(-1, 1, 1, 1, 1)
    log_decay = log_decay.expand(*x.k.shape[:2], 1, -1).mT.to(state_dtype(x.k.dtype))
    return torch.where(tokens > 0, tokens * log_decay, 0.0)  # 0 * -inf is no decay


def _tokens_only(x: Operands, sequence: Sequence | None) -> Operands:
    """The operands with padding that does nothing to the state: no key, no value, no decay."""
    if x.log_decay is not None:
        decay = x.log_decay.to(state_dtype(x.k.dtype))
        x = x._replace(log_decay=decay.expand(*x.k.shape[:3], decay.shape[3]))
    given = [y for y in x[:5] if y is not None]
    fresh = iter(masked(sequence, 2, *given))
    fields = ("q", "k", "v", "log_decay", "beta")
    return x._replace(**{name: next(fresh) for name, y in zip(fields, x, strict=False) if y is not None})


class LinearAllGather:
    """LASP-2, with every transition of the family."""

    def linear_forward(
        self, x: Operands, options: Options, sequence: Sequence | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :class:`~spcompile.strategies.protocol.LinearStrategy`."""
        group = _group(sequence)
        given, x = x, _tokens_only(x, sequence)
        if not options.causal:
            memory = _summed(whole.state(x.k, x.v), group)
            return whole.apply(x.q, memory, options.scale), memory, memory
        f = Forward(x, options)
        f.start()
        exchange = None
        if group is not None:
            assert sequence is not None
            known, start = _known_decay(given.log_decay, x, sequence), f.wide(x.initial_state)
            exchange = _Exchange(algebra_of(x), f.total(), group, start, known=known, later=options.reverse)
        f.local()
        carry = x.initial_state if exchange is None else exchange.carry()
        out, final = f.finish(carry)
        return out, final if exchange is None else exchange.final(), carry

    def linear_backward(
        self,
        grad: Tensor,
        grad_final: Tensor | None,
        x: Operands,
        options: Options,
        carry: Tensor | None,
        sequence: Sequence | None,
    ) -> tuple[Tensor | None, ...]:
        """See :class:`~spcompile.strategies.protocol.LinearStrategy`."""
        group = _group(sequence)
        given, x = x, _tokens_only(x, sequence)
        (grad,) = masked(sequence, 2, grad)
        if not options.causal:
            assert carry is not None
            grad_memory = _summed(whole.state(x.q, grad), group) * options.scale
            grad_memory = grad_memory if grad_final is None else grad_memory + grad_final
            return *whole.apply_backward(grad, *x[:3], carry, grad_memory, options.scale), None, None, None
        b = Backward(x, options)
        b.start(grad, carry)
        exchange = None
        if group is not None:
            assert sequence is not None
            known, start = _known_decay(given.log_decay, x, sequence), b.wide(grad_final)
            later = not options.reverse
            exchange = _Exchange(algebra_of(x), b.total(), group, start, known=known, later=later)
        b.local()
        grads = b.finish(grad_final if exchange is None else exchange.carry())
        dq, dk, dv, decay, beta, initial = grads
        if decay is not None:
            assert given.log_decay is not None
            (decay,) = masked(sequence, 2, decay)  # a gate that padding does not have gets no gradient
            decay = decay.sum_to_size(given.log_decay.shape).to(given.log_decay.dtype)
        if initial is not None and exchange is not None:
            initial = exchange.final().to(initial.dtype)
        return dq, dk, dv, decay, beta, initial

    def scan(
        self,
        a: Tensor | None,
        b: Tensor,
        initial: Tensor | None,
        *,
        matrix: bool,
        reverse: bool,
        sequence: Sequence | None,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`~spcompile.strategies.protocol.LinearStrategy`."""
        run = torch.ops.spcompile.affine_scan
        group = _group(sequence)
        if group is None:
            return run(a, b, initial, matrix, reverse)
        assert sequence is not None
        a, b = _steps_only(a, b, matrix, sequence)
        algebra, summary = _scanned(a, b, matrix, reverse)
        exchange = _Exchange(algebra, summary, group, initial, later=reverse)
        before, _ = run(a, b, exchange.carry(), matrix, reverse)
        return before, exchange.final()


def _scanned(a: Tensor | None, b: Tensor, matrix: bool, reverse: bool) -> tuple[StateAlgebra, Summary]:
    """What all steps together do to the state."""
    run = torch.ops.spcompile.affine_scan
    if a is None:
        return BASIC, (b.sum(-3),)
    if not matrix:
        return AFFINE, (a.prod(-3), run(a, b, None, False, reverse)[1])
    size, width = b.shape[-2:]
    eye = torch.eye(size, dtype=b.dtype, device=b.device).expand(*b.shape[:-3], size, size)
    start = torch.cat([torch.zeros_like(b[..., 0, :, :]), eye], -1)
    total = run(a, F.pad(b, (0, size)), start, True, reverse)[1]
    return MATRIX, (total[..., width:], total[..., :width])


def _steps_only(
    a: Tensor | None, b: Tensor, matrix: bool, sequence: Sequence
) -> tuple[Tensor | None, Tensor]:
    """The operands of a scan with padding that leaves the state as it is; a with its own step each."""
    if a is not None and a.shape[-3] == 1:
        a = a.expand(*a.shape[:-3], b.shape[-3], *a.shape[-2:])
    (b,) = masked(sequence, b.dim() - 3, b)
    if a is not None and sequence.padded:
        valid = local_valid(sequence, a.device).reshape(-1, 1, 1)
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) if matrix else a.new_ones(())
        a = torch.where(valid, a, eye)
    return a, b


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
