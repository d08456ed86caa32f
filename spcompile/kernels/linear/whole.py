"""Linear attention without a causal mask: every query sees the one memory state of the whole sequence.

With S = sum_j k_j^T v_j, and dS = scale * sum_i q_i^T do_i plus the gradient of S as a result of its own,

    out_i = scale * q_i S                                                               (LASP-2, eq. 4)
    dq_i = scale * do_i S^T      dk_j = v_j dS^T      dv_j = k_j dS
"""

from __future__ import annotations

from torch import Tensor

from spcompile.kernels.linear.operands import Operands, Options
from spcompile.kernels.scan import state_dtype

__all__ = ["Backward", "Forward"]


def _state(k: Tensor, v: Tensor) -> Tensor:
    """Memory state ``[B, H, K, V]`` of all given tokens, in float32 (float64 for float64 inputs)."""
    wide = state_dtype(k.dtype)
    return k.to(wide).mT @ v.to(wide)


class Forward:
    """See :class:`spcompile.kernels.linear.kernel.Forward`."""

    def __init__(self, x: Operands, options: Options) -> None:
        self.x, self.scale = x, options.scale

    def total(self) -> tuple[Tensor, ...]:
        """The memory state of the tokens given."""
        return (_state(self.x.k, self.x.v),)

    def local(self) -> None:
        """Nothing."""

    def finish(self, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs from the memory state of all tokens, which is the final one too."""
        assert carry is not None
        q = self.x.q
        return (q.to(carry.dtype) @ (carry * self.scale)).to(q.dtype).contiguous(), carry


class Backward:
    """See :class:`spcompile.kernels.linear.kernel.Backward`."""

    def __init__(self, x: Operands, options: Options, grad: Tensor, carry: Tensor | None) -> None:
        assert carry is not None
        self.x, self.scale, self.grad, self.memory = x, options.scale, grad, carry

    def total(self) -> tuple[Tensor, ...]:
        """The gradient of the memory state, from the outputs given."""
        return (_state(self.x.q, self.grad) * self.scale,)

    def local(self) -> None:
        """Nothing."""

    def finish(self, carry: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients from that of the memory state of all tokens."""
        assert carry is not None
        q, k, v = self.x[:3]
        wide = self.memory.dtype
        dq = self.grad.to(wide) @ (self.memory * self.scale).mT
        dk, dv = v.to(wide) @ carry.mT, k.to(wide) @ carry
        grads = (d.to(x.dtype).contiguous() for d, x in zip((dq, dk, dv), (q, k, v), strict=True))
        return *grads, None, None, None
