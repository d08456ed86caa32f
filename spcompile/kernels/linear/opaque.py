"""Causal linear attention of every variant in chunks, as operators that Inductor calls as they are: on CPUs.

The same chunks as ``chunked.py``, whose text says what the steps are; here each is an operator
(``chunk_ops.py``), as on a GPU: Inductor need not compile what it contains, for each layer anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spcompile.kernels.linear import chain_ops, chunk_ops  # noqa: F401  (they register operators)
from spcompile.kernels.linear.chunked import chunk_length
from spcompile.kernels.linear.operands import Operands, Options

__all__ = ["Backward", "Forward"]

ops = torch.ops.spcompile


class _Walk:
    """The chunks from the first to the last, or back if ``later``, and what each does to the state."""

    def __init__(self, x: Operands, states: Tensor, transitions: Tensor, later: bool) -> None:
        self.batch, self.given = x.k.shape[:2], (states, transitions)
        self.how = x.beta is not None, later

    def heads(self, state: Tensor) -> Tensor:
        """``[N, ...]`` as ``[B, H, ...]``."""
        return state.reshape(*self.batch, *state.shape[1:])

    def total(self) -> tuple[Tensor, ...]:
        """What all chunks together do, ``[B, H, ...]``: (S), (sum of log decays, S) or (A, S)."""
        a, state = ops.chunk_total(*self.given, *self.how)
        return tuple(self.heads(y) for y in (a, state) if y.dim() > 1)

    def before(self, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """States ``[N, n, K, V]`` before each chunk, and the one ``[B, H, K, V]`` after the last."""
        start = None if carry is None else carry.flatten(0, 1)
        before, final = ops.chunk_chain(*self.given, start, *self.how)
        return before, self.heads(final)


class Forward:
    """See :class:`spcompile.kernels.linear.kernel.Forward`."""

    def __init__(self, x: Operands, options: Options) -> None:
        self.x, self.options, self.chunk = x, options, chunk_length(x)
        given = x.k, x.v, x.log_decay, x.beta, self.chunk, options.reverse
        states, self.transitions, self.written = ops.chunk_states(*given)
        self.walk = _Walk(x, states, self.transitions, later=False)

    def total(self) -> tuple[Tensor, ...]:
        """What this run of tokens does to the state."""
        return self.walk.total()

    def local(self) -> None:
        """What tokens read from their own chunk, and what they will read the state with."""
        x, options = self.x, self.options
        how = options.scale, self.chunk, options.exclusive, options.reverse
        self.intra, self.queries = ops.chunk_within(x.q, x.k, x.v, x.log_decay, self.written, *how)

    def finish(self, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs, and the state after the last token."""
        before, final = self.walk.before(carry)
        out = ops.chunk_outputs(self.intra, self.queries, before, self.x.q, self.options.reverse)
        return out, final


class Backward:
    """See :class:`spcompile.kernels.linear.kernel.Backward`."""

    def __init__(self, x: Operands, options: Options, grad: Tensor, carry: Tensor | None) -> None:
        self.x, self.options, self.grad, self.carry = x, options, grad, carry
        self.forward = Forward(x, options)
        self.forward.local()
        sources = ops.chunk_sources(self.forward.queries, grad, options.reverse)
        transitions = self.forward.transitions
        self.walk = _Walk(x, sources, transitions if x.beta is None else transitions.mT, later=True)

    def total(self) -> tuple[Tensor, ...]:
        """What this run of tokens does to the gradient of the state, from its last token to its first."""
        return self.walk.total()

    def local(self) -> None:
        """The gradients that need no later rank, with the states of the forward."""
        x, options, forward = self.x, self.options, self.forward
        self.before, _ = forward.walk.before(self.carry)
        how = options.scale, forward.chunk, options.exclusive, options.reverse
        given = self.grad, *x[:4], forward.written, self.before
        self.dq, *self.known = ops.chunk_within_backward(*given, *how)

    def finish(self, carry: Tensor | None) -> tuple[Tensor | None, ...]:
        """The other gradients, which read the gradient of the state."""
        x, forward = self.x, self.forward
        after, initial = self.walk.before(carry)
        given = *x[1:5], forward.written, self.before, after, *self.known
        grads = ops.chunk_states_backward(*given, forward.chunk, self.options.reverse)
        others = (None if y is None else grad for y, grad in zip(x[1:5], grads, strict=True))
        state = x.initial_state
        return self.dq, *others, None if state is None else initial.to(state.dtype).contiguous()
