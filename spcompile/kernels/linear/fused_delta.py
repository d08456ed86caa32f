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

from functools import partial

import torch
from torch import Tensor

from spcompile.kernels.linear import delta_ops, segment_ops  # noqa: F401  (registers the operators)
from spcompile.kernels.linear.chain import Before, Chain, Made
from spcompile.kernels.linear.fused import gate_of, gradient_of_gate, gradient_of_state, refused
from spcompile.kernels.linear.launch import has_tensor_memory, segment, target_of
from spcompile.kernels.linear.operands import Operands, Options
from spcompile.kernels.triton.tiles import INCLUSIVE, SOURCE

__all__ = ["AGAIN", "Backward", "Forward", "refuses"]

ops = torch.ops.spcompile
AGAIN = frozenset({ops.delta_corrected.default})


def refuses(x: Operands) -> str:
    """Why the kernels do not take such operands, for the report; empty if they do."""
    # What more than 64 in float32 write on the way back does not fit into tensor memory.
    full = x.k.dtype == torch.float32 and has_tensor_memory(target_of(x.k.device))
    return refused(x, 64 if full else 128)


class _Walk:
    """One way through the tokens: with a source, the way back."""

    def __init__(
        self, source: Tensor | None, k: Tensor, v: Tensor, x: Operands, options: Options, systems: Tensor
    ) -> None:
        self.given = source, k, v, systems, x.beta, gate_of(x)
        self.how = options.scale, options.reverse == (source is None)
        self.made = self.summaries
        self.chain = Chain(k.shape[:2], segment(k.shape[2], k.shape[0] * k.shape[1])[0], lambda: self.made())

    def summaries(self) -> Made:
        """What each segment does to the state, by a launch of its own."""
        return self.known(*ops.delta_summaries(*self.given, *self.how))

    def known(self, states: Tensor, matrices: Tensor) -> Made:
        """What each segment does to the state."""
        return Made(states, matrices=matrices)

    def corrected(
        self, carry: Tensor | None, errors: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Before, Tensor]:
        """See :func:`spcompile.kernels.linear.delta_ops.delta_corrected`; the states before the segments are
        there then."""
        before = self.chain.before(carry)
        out, second, states, last = ops.delta_corrected(*self.given, *before, errors, *self.how)
        if before.fold and before.states is not None:
            before = Before(states, None, None, False)
        return out, second, before, last


def _systems(x: Operands, options: Options) -> Tensor:
    return ops.delta_systems(x.k, x.beta, gate_of(x), options.reverse)


class Forward:
    """See :class:`spcompile.kernels.linear.kernel.Forward`."""

    def __init__(self, x: Operands, options: Options) -> None:
        self.x = x
        self.walk = _Walk(None, x.k, x.v, x, options, _systems(x, options))

    def total(self) -> tuple[Tensor, ...]:
        """What the tokens do to the state."""
        return self.walk.chain.total()

    def local(self) -> None:
        """Nothing: what the segments do together is told by the states before each of them."""

    def finish(self, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs, and the state after the last token."""
        walk = self.walk
        given = self.x.q, *walk.given[1:], *walk.chain.before(carry)
        out, final = ops.delta_outputs(*given, *walk.how)
        return out, walk.chain.heads(final)


class Backward:
    """See :class:`spcompile.kernels.linear.kernel.Backward`."""

    def __init__(self, x: Operands, options: Options, grad: Tensor, carry: Tensor | None) -> None:
        self.x, self.options, self.carry = x, options, carry
        self.grad = grad.to(x.q.dtype)
        systems = _systems(x, options)
        self.forward = _Walk(None, x.k, x.v, x, options, systems)
        self.walk = _Walk(x.q, x.k, self.grad, x, options, systems)

    def total(self) -> tuple[Tensor, ...]:
        """What the tokens do to the gradient of the state."""
        return self.walk.chain.total()

    def local(self) -> None:
        """What the forward wrote, and dq, which reads its states."""
        x, options, forward = self.x, self.options, self.forward
        forward.chain.exchanged = self.walk.chain.exchanged
        if not (forward.chain.exchanged or forward.chain.alone):
            both = ops.delta_prologue(x.q, x.k, x.v, self.grad, *forward.given[3:], *forward.how)
            forward.made, self.walk.made = (partial(forward.known, *both[i : i + 2]) for i in (0, 2))
        self.n, self.errors, self.before, _ = forward.corrected(self.carry)
        how = options.scale, False, INCLUSIVE.value, options.reverse, False, (), False
        gate = gate_of(x)
        other = x.q if gate is not None else None
        given = self.grad, self.n, x.k, gate, *self.before.mT
        self.dq, self.reads, _, self.kept, _ = ops.segment_outputs(*given, other, None, *how)

    def finish(self, carry: Tensor | None) -> tuple[Tensor | None, ...]:
        """The other gradients, which read the gradient of the state."""
        x, gate, (scale, back) = self.x, gate_of(self.x), self.walk.how
        dv, dbeta, before, initial = self.walk.corrected(carry, self.errors)
        keys, kept = (None, None) if gate is None else (x.k, self.kept)
        of_keys = dv, self.n, x.k, gate, *self.before.mT, keys, None
        how = -1.0, False, INCLUSIVE.value, not back, True, (), False
        plus, more_reads, *_ = ops.segment_outputs(*of_keys, *how)
        of_q = self.n, self.grad, x.q, gate, *before.mT, keys, kept
        of_walk = scale, True, SOURCE.value, back, False, (dv, x.k, plus), False
        dk, writes, across, *_ = ops.segment_outputs(*of_q, *of_walk)
        decay = None
        if gate is not None:
            given = x.q, x.k, self.n, self.grad, dv, gate
            pairs = ops.segment_pairs(*given, scale, INCLUSIVE.value, not back)
            reads = self.reads + more_reads
            decay = gradient_of_gate(x, self.options, pairs, reads, writes, across)
        assert x.beta is not None
        dbeta = dbeta.sum(0)
        dbeta = dbeta if self.options.reverse else dbeta.flip(1)
        dbeta = self.walk.chain.heads(dbeta).narrow(2, 0, x.k.shape[2]).unsqueeze(-1)
        dbeta = dbeta.sum_to_size(x.beta.shape).to(x.beta.dtype).contiguous()
        return self.dq, dk, dv, decay, dbeta, gradient_of_state(x, initial)
