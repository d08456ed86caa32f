"""The delta rule on GPUs with one decay per token and head, or none, over segments.

With n, what the tokens write once they are corrected, a delta rule is linear attention with values n, and its
gradient that of linear attention with one more reading: each token's key reads the state before it, and the
gradient of that is -dv, dv = beta dn. With S the states of the forward and R the gradient of the state, which
walks back over the writes (q, do) and (k, -dv),

    dq_t = scale S_t do_t          dv_t = beta_t R_t^T k_t
    dk_t = R_t n_t - a_t S_{t-1} dv_t    dbeta_t = e_t . R_t^T k_t

where e are the errors, n = beta e, and R_t has the write of q_t. So ``delta.py`` finds n, and dv, and the
kernels over segments (``segment_ops.py``) do the rest. (R as two states, one for each kind of writes, would
round what cancels: without decays dk is then off by 1 % in bf16.) The decay's gradient is that of ``gate.py``
over both kinds of readings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spcompile.kernels.linear import delta_ops, segment_ops  # noqa: F401  (registers the operators)
from spcompile.kernels.linear.chain import Chain
from spcompile.kernels.linear.fused import gate_of, gradient_of_gate, gradient_of_state, refused
from spcompile.kernels.linear.operands import Operands, Options
from spcompile.kernels.triton.tiles import INCLUSIVE, SOURCE

__all__ = ["AGAIN", "Backward", "Forward", "refuses"]

ops = torch.ops.spcompile
AGAIN = frozenset({ops.delta_corrected.default})


def refuses(x: Operands, options: Options) -> str:
    """Why the kernels do not take such operands, for the report; empty if they do."""
    if options.exclusive:
        return "a query that sees the tokens before its own only"
    if x.log_decay is not None and x.log_decay.shape[3] != 1:
        return "a delta rule with a decay per key"
    return refused(x, 128)


class _How(NamedTuple):
    scale: float
    read: int
    reverse: bool


class _Walk:
    """One way through the tokens."""

    def __init__(self, source: Tensor | None, k: Tensor, v: Tensor, x: Operands, how: _How) -> None:
        assert x.beta is not None
        self.k, self.how = k, how
        systems = ops.delta_systems(k, x.beta, gate_of(x), how.read, how.reverse)
        self.given = source, k, v, systems, x.beta, gate_of(x)
        states, matrices = ops.delta_summaries(*self.given, *how)
        self.chain = Chain(k.shape[:2], states, matrices=matrices)

    def corrected(
        self, before: Tensor, errors: Tensor | None = None, *, trained: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See :func:`spcompile.kernels.linear.delta_ops.delta_corrected`."""
        return ops.delta_corrected(*self.given, before, errors, *self.how, trained)


def _forward_walk(x: Operands, options: Options) -> _Walk:
    return _Walk(None, x.k, x.v, x, _How(options.scale, INCLUSIVE.value, options.reverse))


class Forward:
    """See :class:`spcompile.kernels.linear.kernel.Forward`."""

    def __init__(self, x: Operands, options: Options) -> None:
        self.x, self.walk = x, _forward_walk(x, options)

    def total(self) -> tuple[Tensor, ...]:
        """What the tokens do to the state."""
        return self.walk.chain.total()

    def local(self) -> None:
        """Nothing: what the segments do together is told by the states before each of them."""

    def finish(self, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs, and the state after the last token."""
        x, walk = self.x, self.walk
        before, final = walk.chain.before(carry)
        n, _ = walk.corrected(before)
        scale, read, reverse = walk.how
        given = x.q, x.k, n, gate_of(x), before, None, None
        out, *_ = ops.segment_outputs(*given, scale, False, read, reverse, False, ())
        return out, final


class Backward:
    """See :class:`spcompile.kernels.linear.kernel.Backward`."""

    def __init__(self, x: Operands, options: Options, grad: Tensor, carry: Tensor | None) -> None:
        self.x, self.options, self.carry = x, options, carry
        self.grad = grad.to(x.q.dtype)
        how = _How(options.scale, SOURCE.value, not options.reverse)
        self.walk = _Walk(x.q, x.k, self.grad, x, how)

    def total(self) -> tuple[Tensor, ...]:
        """What the tokens do to the gradient of the state."""
        return self.walk.chain.total()

    def local(self) -> None:
        """What the forward wrote, and dq, which reads its states."""
        x, options = self.x, self.options
        forward = _forward_walk(x, options)
        forward.chain.exchanged = self.walk.chain.exchanged
        self.before, _ = forward.chain.before(self.carry)
        self.n, self.errors = forward.corrected(self.before, trained=True)
        how = options.scale, False, INCLUSIVE.value, options.reverse, False, ()
        gate, states = gate_of(x), self.before.mT
        other = x.q if gate is not None else None
        given = self.grad, self.n, x.k, gate, states
        self.dq, self.reads, _, self.kept = ops.segment_outputs(*given, other, None, *how)

    def finish(self, carry: Tensor | None) -> tuple[Tensor | None, ...]:
        """The other gradients, which read the gradient of the state."""
        x, gate, (scale, read, back) = self.x, gate_of(self.x), self.walk.how
        before, initial = self.walk.chain.before(carry)
        dv, dbeta = self.walk.corrected(before, self.errors)
        keys, kept = (None, None) if gate is None else (x.k, self.kept)
        of_keys = dv, self.n, x.k, gate, self.before.mT, keys, None
        plus, more_reads, *_ = ops.segment_outputs(*of_keys, -1.0, False, INCLUSIVE.value, not back, True, ())
        how = scale, True, read, back, False, (dv, x.k, plus)
        of_q = self.n, self.grad, x.q, gate, before.mT, keys, kept
        dk, writes, across, _ = ops.segment_outputs(*of_q, *how)
        decay = None
        if gate is not None:
            walk = INCLUSIVE.value, not back
            pairs = ops.segment_pairs(x.q, x.k, self.n, self.grad, gate, scale, *walk)
            pairs = pairs + ops.segment_pairs(x.k, x.k, self.n, dv, gate, -1.0, *walk)
            reads = self.reads + more_reads
            decay = gradient_of_gate(x, self.options, pairs, reads, writes, across)
        assert x.beta is not None
        dbeta = dbeta if self.options.reverse else dbeta.flip(1)
        dbeta = self.walk.chain.heads(dbeta).narrow(2, 0, x.k.shape[2]).unsqueeze(-1)
        dbeta = dbeta.sum_to_size(x.beta.shape).to(x.beta.dtype).contiguous()
        return self.dq, dk, dv, decay, dbeta, gradient_of_state(x, initial)
