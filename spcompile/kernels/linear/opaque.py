"""Causal linear attention of every variant in chunks, as operators that Inductor calls as they are: on CPUs.

The same chunks as ``chunked.py``, whose text says what the steps are; here each is an operator
(``chunk_ops.py``), as on a GPU: Inductor need not compile what it contains, for each layer anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spcompile.kernels.linear import chunk_ops  # noqa: F401  (registers the operators)
from spcompile.kernels.linear.chain import Chain
from spcompile.kernels.linear.chunked import chunk_length
from spcompile.kernels.linear.operands import Operands, Options

__all__ = ["Backward", "Forward"]

ops = torch.ops.spcompile


class Forward:
    """See :class:`spcompile.kernels.linear.kernel.Forward`."""

    def __init__(self, x: Operands, options: Options) -> None:
        self.x, self.options, self.chunk = x, options, chunk_length(x)
        given = x.k, x.v, x.log_decay, x.beta, self.chunk, options.reverse
        states, self.transitions, self.written = ops.chunk_states(*given)
        self.chain = self.through(states, self.transitions, later=False)

    def through(self, states: Tensor, transitions: Tensor, later: bool) -> Chain:
        """The chain of the chunks, from the last to the first if ``later``."""
        x = self.x
        logs = None if x.log_decay is None or x.beta is not None else transitions
        matrices = None if x.beta is None else transitions
        return Chain(x.k.shape[:2], states, logs, matrices, reverse=later)

    def total(self) -> tuple[Tensor, ...]:
        """What this run of tokens does to the state."""
        return self.chain.total()

    def local(self) -> None:
        """What tokens read from their own chunk, and the states as far as this run makes them."""
        self.chain.local()
        x, options = self.x, self.options
        how = options.scale, self.chunk, options.exclusive, options.reverse
        self.intra, self.queries = ops.chunk_within(x.q, x.k, x.v, x.log_decay, self.written, *how)

    def finish(self, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs, and the state after the last token."""
        before, final = self.chain.before(carry)
        out = ops.chunk_outputs(self.intra, self.queries, before, self.x.q, self.options.reverse)
        return out, final


class Backward:
    """See :class:`spcompile.kernels.linear.kernel.Backward`."""

    def __init__(self, x: Operands, options: Options, grad: Tensor, carry: Tensor | None) -> None:
        self.x, self.options, self.grad, self.carry = x, options, grad, carry
        self.forward = Forward(x, options)
        self.forward.local()
        sources = ops.chunk_sources(self.forward.queries, grad, options.reverse)
        back = self.forward.transitions if x.beta is None else self.forward.transitions.mT
        self.chain = self.forward.through(sources, back, later=True)

    def total(self) -> tuple[Tensor, ...]:
        """What this run of tokens does to the gradient of the state, from its last token to its first."""
        return self.chain.total()

    def local(self) -> None:
        """The gradients that need no later rank, with the states of the forward."""
        self.chain.local()
        x, options, forward = self.x, self.options, self.forward
        forward.chain.exchanged = self.chain.exchanged
        self.before, _ = forward.chain.before(self.carry)
        how = options.scale, forward.chunk, options.exclusive, options.reverse
        given = self.grad, *x[:4], forward.written, self.before
        self.dq, *self.known = ops.chunk_within_backward(*given, *how)

    def finish(self, carry: Tensor | None) -> tuple[Tensor | None, ...]:
        """The other gradients, which read the gradient of the state."""
        x, forward = self.x, self.forward
        after, initial = self.chain.before(carry)
        given = *x[1:5], forward.written, self.before, after, *self.known
        grads = ops.chunk_states_backward(*given, forward.chunk, self.options.reverse)
        others = (None if y is None else grad for y, grad in zip(x[1:5], grads, strict=True))
        state = x.initial_state
        return self.dq, *others, None if state is None else initial.to(state.dtype).contiguous()
