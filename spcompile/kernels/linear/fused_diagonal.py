"""Linear attention on GPUs with a decay per key, over segments (``kernels/triton/diagonal.py``).

As ``fused.py``, but that the scores of a chunk are no product of matrices: they are made by themselves,
before the carry is there, so that an exchange hides behind them. With S the states of the forward and R the
gradient of the state, where D decays keys,

    dq_t = scale D S^T do_t + pairs        dk_t = D R v_t + pairs        dv_t = R^T (D k_t) + (scores^T do)_t

the pairs being those of a chunk. The decay's gradient is that of ``gate.py``, for each key by itself.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from spcompile.kernels.linear import diagonal_ops  # noqa: F401  (registers the operators)
from spcompile.kernels.linear.chain import Chain, Made
from spcompile.kernels.linear.fused import gradient_of_state, refused
from spcompile.kernels.linear.launch import segment
from spcompile.kernels.linear.operands import Operands, Options
from spcompile.kernels.triton.tiles import EXCLUSIVE, INCLUSIVE, SOURCE

__all__ = ["Backward", "Forward", "refuses"]

ops = torch.ops.spcompile


def refuses(x: Operands) -> str:
    """Why the kernels do not take such operands, for the report; empty if they do."""
    # A chunk of larger keys in float32 does not fit into the shared memory of an A100.
    return refused(x, 128 if x.k.dtype == torch.float32 else 256)


class _Walk:
    """One way through the tokens: with k and v what is written, and how it is read."""

    def __init__(self, k: Tensor, v: Tensor, gate: Tensor, scale: float, read: int, reverse: bool) -> None:
        self.given, self.how, self.made = (k, v, gate, scale, read, reverse), (read, reverse), self.summaries
        self.chain = Chain(k.shape[:2], segment(k.shape[2], k.shape[0] * k.shape[1])[0], lambda: self.made())

    def summaries(self) -> Made:
        """What each segment does to the state, by a launch of its own."""
        return Made(*ops.diagonal_summaries(*self.given))


def _gate(x: Operands) -> Tensor:
    """The log decay of each token and key."""
    assert x.log_decay is not None
    gate = x.log_decay if x.log_decay.dtype.itemsize <= 4 else x.log_decay.float()
    return gate.expand(x.k.shape)


def _forward_walk(x: Operands, options: Options) -> _Walk:
    read = EXCLUSIVE.value if options.exclusive else INCLUSIVE.value
    return _Walk(x.k, x.v, _gate(x), 1.0, read, options.reverse)


class Forward:
    """See :class:`spcompile.kernels.linear.kernel.Forward`."""

    def __init__(self, x: Operands, options: Options) -> None:
        self.x, self.options = x, options
        self.walk = _forward_walk(x, options)

    def total(self) -> tuple[Tensor, ...]:
        """What the tokens do to the state."""
        return self.walk.chain.total()

    def local(self) -> None:
        """The scores, and the states before each segment as far as this run makes them."""
        x, walk = self.x, self.walk
        walk.chain.local()
        self.scores, *_ = ops.diagonal_within(*x[:3], None, _gate(x), self.options.scale, *walk.how)

    def finish(self, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs, and the state after the last token."""
        x, walk = self.x, self.walk
        given = *x[:3], _gate(x), self.scores, *walk.chain.before(carry)
        out, final = ops.diagonal_outputs(*given, self.options.scale, False, *walk.how, False)
        return out, walk.chain.heads(final)


class Backward:
    """See :class:`spcompile.kernels.linear.kernel.Backward`."""

    def __init__(self, x: Operands, options: Options, grad: Tensor, carry: Tensor | None) -> None:
        self.x, self.options, self.carry = x, options, carry
        self.grad = grad.to(x.q.dtype)
        read = EXCLUSIVE.value if options.exclusive else SOURCE.value
        self.walk = _Walk(x.q, self.grad, _gate(x), options.scale, read, not options.reverse)

    def total(self) -> tuple[Tensor, ...]:
        """What the tokens do to the gradient of the state."""
        return self.walk.chain.total()

    def local(self) -> None:
        """What pairs of a chunk add to the gradients, and dq, which reads the states of the forward."""
        self.walk.chain.local()
        x, gate, scale = self.x, _gate(self.x), self.options.scale
        forward = _forward_walk(x, self.options)
        forward.chain.exchanged = self.walk.chain.exchanged
        if not (forward.chain.exchanged or forward.chain.alone):
            both = ops.diagonal_prologue(*x[:3], self.grad, gate, scale, *forward.how)
            forward.made, self.walk.made = (partial(Made, *both[i : i + 2]) for i in (0, 2))
        before = forward.chain.before(self.carry)
        within = ops.diagonal_within(*x[:3], self.grad, gate, scale, *forward.how)
        self.scores, dq, self.of_keys, decay = within
        given = self.grad, x.v, x.k, gate, *before.mT, dq, x.q, None, decay
        self.dq, self.decay, self.kept = ops.diagonal_columns(*given, scale, *forward.how)

    def finish(self, carry: Tensor | None) -> tuple[Tensor | None, ...]:
        """The other gradients, which read the gradient of the state."""
        x, gate, scale, how = self.x, _gate(self.x), self.options.scale, self.walk.how
        before = self.walk.chain.before(carry)
        given = x.k, x.q, self.grad, gate, self.scores, *before
        dv, initial = ops.diagonal_outputs(*given, scale, True, *how, True)
        keys = self.of_keys, x.k, self.kept, self.decay
        dk, decay, _ = ops.diagonal_columns(x.v, self.grad, x.q, gate, *before.mT, *keys, scale, *how)
        assert x.log_decay is not None
        decay = decay.sum_to_size(x.log_decay.shape).to(x.log_decay.dtype).contiguous()
        return self.dq, dk, dv, decay, None, gradient_of_state(x, initial)
