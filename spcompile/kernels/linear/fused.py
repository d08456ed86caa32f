"""Linear attention on GPUs with one decay per token and head, or none, in two fused kernels.

``kernels/triton/segments.py`` has the kernels; here they are operators, and the forward and the backward over
them (``kernel.py``). A run of tokens is cut into segments, inside which nothing but outputs goes to memory:

    made     summaries: what each segment does to the state; not where one segment is all there is
    total    what all of them together do
    local    the states before each segment, as far as this run makes them (``chain.py``): to read the
             operands once more would cost more than an exchange; in the backward dq, which needs no more
    finish   outputs, from the states before each segment or from what those before it do
"""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spcompile.kernels.linear import segment_ops  # noqa: F401  (registers the operators)
from spcompile.kernels.linear.chain import Before, Chain, Made
from spcompile.kernels.linear.gate import gradient
from spcompile.kernels.linear.launch import segment
from spcompile.kernels.linear.operands import Operands, Options
from spcompile.kernels.triton.tiles import EXCLUSIVE, INCLUSIVE, SOURCE

__all__ = ["Backward", "Forward", "gate_of", "gradient_of_gate", "gradient_of_state", "refused", "refuses"]


def refuses(x: Operands) -> str:
    """Why the kernels do not take such operands, for the report; empty if they do."""
    return refused(x, 256)


def refused(x: Operands, largest: int) -> str:
    """What no kernel over segments takes: other dtypes, keys of more than ``largest``."""
    if x.k.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{str(x.k.dtype).removeprefix('torch.')}, not bfloat16, float16 or float32"
    for name, size, most in (("keys", x.k.shape[3], largest), ("values", x.v.shape[3], 256)):
        if size > most:
            return f"{name} of {size} numbers, more than {most}"
    return ""


ops = torch.ops.spcompile
_NO = (None, None)


class _Walk:
    """One way through the tokens: with k and v what is written, and how it is read."""

    def __init__(
        self, k: Tensor, v: Tensor, gate: Tensor | None, read: int, reverse: bool, scale: float = 1.0
    ) -> None:
        self.k, self.v, self.gate, self.read, self.reverse = k, v, gate, read, reverse
        self.scale, self.made = scale, self.summaries
        self.chain = Chain(k.shape[:2], segment(k.shape[2], k.shape[0] * k.shape[1])[0], lambda: self.made())

    def summaries(self) -> Made:
        """What each segment does to the state, by a launch of its own."""
        return self.known(
            *ops.segment_summaries(self.k, self.v, self.gate, self.scale, self.read, self.reverse)
        )

    def known(self, states: Tensor, logs: Tensor) -> Made:
        """What each segment does to the state."""
        return Made(states, None if self.gate is None else logs)

    def of(self, k: Tensor, v: Tensor) -> _Walk:
        """The same way with something else written; the states must be given to it."""
        other = copy(self)
        other.k, other.v = k, v
        return other

    def outputs(
        self,
        q: Tensor,
        before: Before,
        scale: float,
        *,
        scaled: bool = False,
        of_gate: tuple[Any, Any] = _NO,
        last: bool = False,
        wide: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What every step reads; ``of_gate`` are ``other`` and ``kept`` of :func:`segment_outputs`."""
        how = *of_gate, scale, scaled, self.read, self.reverse, False, (), last, wide
        return ops.segment_outputs(q, self.k, self.v, self.gate, *before, *how)


class Forward:
    """See :class:`spcompile.kernels.linear.kernel.Forward`; of a ``term`` the outputs are float32."""

    def __init__(self, x: Operands, options: Options, term: bool = False) -> None:
        self.x, self.options, self.term = x, options, term
        self.walk = _Walk(x.k, x.v, gate_of(x), _reading(options), options.reverse)

    def total(self) -> tuple[Tensor, ...]:
        """What the tokens do to the state."""
        return self.walk.chain.total()

    def local(self) -> None:
        """The states before each segment, as far as this run makes them."""
        self.walk.chain.local()

    def finish(self, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs, and the state after the last token."""
        w = self.walk
        before = w.chain.before(carry)
        out, *_, final = w.outputs(self.x.q, before, self.options.scale, last=True, wide=self.term)
        return out, w.chain.heads(final)


class Backward:
    """See :class:`spcompile.kernels.linear.kernel.Backward`: a walk for each of dq, dk and dv.

    Of a ``term`` dv and the gradient of the decay are float32.
    """

    def __init__(
        self, x: Operands, options: Options, grad: Tensor, carry: Tensor | None, term: bool = False
    ) -> None:
        self.x, self.options, self.carry, self.term = x, options, carry, term
        self.grad = grad.to(x.q.dtype)
        gate, read, reverse = gate_of(x), _reading(options), options.reverse
        back = EXCLUSIVE.value if options.exclusive else SOURCE.value
        self.forward = _Walk(x.k, x.v, gate, read, reverse)
        self.walk = _Walk(x.q, self.grad, gate, back, not reverse, options.scale)

    def _together(self) -> Tensor:
        """Where nothing is exchanged what both ways and the pairs make is one launch; else what is sent comes
        first, and the rest hides the exchange. Returns the pairs."""
        x, w, scale = self.x, self.forward, self.options.scale
        how = w.gate, scale, w.read, w.reverse
        if w.chain.exchanged or w.chain.alone:
            return x.q if w.gate is None else ops.segment_pairs(*x[:3], self.grad, None, *how)
        *made, pairs = ops.segment_prologue(*x[:3], self.grad, *how)
        w.made, self.walk.made = (partial(w.known, *made[i : i + 2]) for i in (0, 2))
        return pairs

    def total(self) -> tuple[Tensor, ...]:
        """What the tokens do to the gradient of the state."""
        return self.walk.chain.total()

    def local(self) -> None:
        """dq, which reads the states of the forward."""
        self.walk.chain.local()
        x, w = self.x, self.forward
        w.chain.exchanged = self.walk.chain.exchanged
        self.pairs = self._together()
        before = w.chain.before(self.carry)
        of_gate = _NO if w.gate is None else (x.q, None)
        back = w.of(x.v, x.k).outputs(self.grad, before.mT, self.options.scale, of_gate=of_gate)
        self.dq, self.reads, _, self.kept, _ = back

    def finish(self, carry: Tensor | None) -> tuple[Tensor | None, ...]:
        """The other gradients, which read the gradient of the state."""
        x, w, scale = self.x, self.walk, self.options.scale
        before = w.chain.before(carry)
        asked = x.initial_state is not None
        dv, *_, initial = w.outputs(x.k, before, scale, scaled=True, last=asked, wide=self.term)
        of_gate = _NO if x.log_decay is None else (x.k, self.kept)
        back = w.of(self.grad, x.q).outputs(x.v, before.mT, scale, scaled=True, of_gate=of_gate)
        dk, writes, across, *_ = back
        decay = None
        if x.log_decay is not None:
            decay = gradient_of_gate(x, self.options, self.pairs, self.reads, writes, across)
        return self.dq, dk, dv, decay, None, gradient_of_state(x, initial)


def gradient_of_state(x: Operands, initial: Tensor) -> Tensor | None:
    """The gradient ``initial`` of the state before all tokens, as that of the operand."""
    state = x.initial_state
    return None if state is None else initial.reshape(state.shape).to(state.dtype).contiguous()


def gate_of(x: Operands) -> Tensor | None:
    """The log decay of each token, ``[B, H, T, 1]``."""
    return None if x.log_decay is None else x.log_decay.float().expand(*x.k.shape[:3], 1)


def gradient_of_gate(
    x: Operands, options: Options, pairs: Tensor, reads: Tensor, writes: Tensor, across: Tensor
) -> Tensor:
    """The gradient of ``x.log_decay`` from what the two walks have found, each in its order (``gate.py``)."""
    assert x.log_decay is not None
    reads, writes, across = (x.sum(0) for x in (reads, writes, across))
    decay = gradient(pairs, reads, writes.flip(1), across, options.exclusive)
    decay = decay.flip(1) if options.reverse else decay
    decay = decay.reshape(*x.k.shape[:2], -1).narrow(2, 0, x.k.shape[2]).unsqueeze(-1)
    return decay.sum_to_size(x.log_decay.shape).to(x.log_decay.dtype).contiguous()


def _reading(options: Options) -> int:
    return EXCLUSIVE.value if options.exclusive else INCLUSIVE.value
