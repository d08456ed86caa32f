"""The delta rule with a decay per key (KDA) on GPUs, over segments (``kernels/triton/delta_per_key.py``).

Exclusive ones are taken with any decay, which then is one per key, or 0.

    made     all of the chunks that needs no state, and what each segment does to the state
    total    what all of them together do; walking back its matrices are those of the forward, transposed
    finish   forward the states before each segment, and outputs; what is written goes nowhere else

The backward finds in ``local`` what the forward has written and its states before chunks, and in ``finish``
walks back, with the gradients of the states behind chunks; all else then is chunks side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spcompile.kernels.linear import kda_ops  # noqa: F401  (registers the operators)
from spcompile.kernels.linear.chain import Before, Chain, Made
from spcompile.kernels.linear.fused import gradient_of_state, refused
from spcompile.kernels.linear.launch import has_tensor_memory, segment, target_of
from spcompile.kernels.linear.operands import Operands, Options
from spcompile.kernels.triton.tiles import EXCLUSIVE, INCLUSIVE

__all__ = ["AGAIN", "Backward", "Forward", "refuses"]

ops = torch.ops.spcompile
AGAIN = frozenset({ops.kda_prepared.default, ops.kda_written.default})


def refuses(x: Operands) -> str:
    """Why the kernels do not take such operands, for the report; empty if they do."""
    # Of more than 32 in float32 the products of `readings` do not fit into tensor memory.
    full = x.k.dtype == torch.float32 and has_tensor_memory(target_of(x.k.device))
    return refused(x, 32 if full else 128)


def chain(x: Operands, made: Callable[[], Made]) -> Chain:
    """The segments of the tokens."""
    return Chain(x.k.shape[:2], segment(x.k.shape[2], x.k.shape[0] * x.k.shape[1])[0], made)


class _Walk:
    """The forward's way through the tokens."""

    def __init__(self, x: Operands, options: Options) -> None:
        assert x.beta is not None
        self.reverse, read = options.reverse, EXCLUSIVE if options.exclusive else INCLUSIVE
        self.how = read.value, self.reverse
        gate = x.k.new_zeros(1, 1, 1, 1, dtype=torch.float32) if x.log_decay is None else x.log_decay
        gate = gate if gate.dtype.itemsize <= 4 else gate.float()
        self.gate = gate.expand(x.k.shape)
        self.prepared = ops.kda_prepared(x.q, x.k, self.gate, x.beta, options.scale, *self.how)
        self.of = x.k, x.v, x.beta, self.prepared
        self.chain = chain(x, self.summaries)

    def summaries(self) -> Made:
        """What each segment does to the state."""
        states, matrices = ops.kda_summaries(*self.of, self.reverse)
        return Made(states, matrices=matrices)

    def written(self, before: Before, *, trained: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :func:`spcompile.kernels.linear.kda_ops.kda_written`."""
        return ops.kda_written(*self.of, *before, self.reverse, trained)


class Forward:
    """See :class:`spcompile.kernels.linear.kernel.Forward`."""

    def __init__(self, x: Operands, options: Options) -> None:
        self.walk = _Walk(x, options)

    def total(self) -> tuple[Tensor, ...]:
        """What the tokens do to the state."""
        return self.walk.chain.total()

    def local(self) -> None:
        """Nothing: what the segments do together is told by the states before each of them."""

    def finish(self, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs, and the state after the last token."""
        walk = self.walk
        out, *_, final = walk.written(walk.chain.before(carry), trained=False)
        return out, walk.chain.heads(final)


class Backward:
    """See :class:`spcompile.kernels.linear.kernel.Backward`."""

    def __init__(self, x: Operands, options: Options, grad: Tensor, carry: Tensor | None) -> None:
        self.x, self.options, self.carry = x, options, carry
        self.walk = walk = _Walk(x, options)
        self.of = x.k, grad.to(x.q.dtype), x.beta, walk.prepared
        self.chain = chain(x, self._made)

    def _made(self) -> Made:
        states = ops.kda_summaries_back(*self.of, self.options.reverse)
        matrices = self.walk.chain.made.matrices
        assert matrices is not None
        return Made(states, matrices=matrices, turned=True)

    def total(self) -> tuple[Tensor, ...]:
        """What the tokens do to the gradient of the state."""
        return self.chain.total()

    def local(self) -> None:
        """What the forward wrote, and its states."""
        self.walk.chain.exchanged = self.chain.exchanged
        before = self.walk.chain.before(self.carry)
        self.n, self.errors, self.states, _ = self.walk.written(before, trained=True)

    def finish(self, carry: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients."""
        x, walk, reverse = self.x, self.walk, self.options.reverse
        behind = self.chain.before(carry)
        dv, dbeta, grads, initial = ops.kda_corrected(*self.of, *behind, self.errors, reverse)
        given = x.q, x.k, walk.gate
        both = self.n, self.of[1], dv, self.states, grads
        parts = ops.kda_readings(*given, *both, self.options.scale, *walk.how)
        dq, dk, decay = ops.kda_gradients(*given, parts, *walk.how)
        if x.log_decay is None:
            decay = None
        else:
            decay = decay.sum_to_size(x.log_decay.shape).to(x.log_decay.dtype).contiguous()
        assert x.beta is not None
        dbeta = self.chain.heads(dbeta).unsqueeze(-1)
        dbeta = dbeta.sum_to_size(x.beta.shape).to(x.beta.dtype).contiguous()
        return dq, dk, dv, decay, dbeta, gradient_of_state(x, initial)
