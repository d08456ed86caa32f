"""Linear attention without a causal mask: every query sees the one memory state of the whole sequence.

With S = sum_j k_j^T v_j, and dS = scale * sum_i q_i^T do_i plus the gradient of S as a result of its own,

    out_i = scale * q_i S                                                               (LASP-2, eq. 4)
    dq_i = scale * do_i S^T      dk_j = v_j dS^T      dv_j = k_j dS
"""

from __future__ import annotations

from torch import Tensor

from spcompile.kernels.scan import state_dtype

__all__ = ["apply", "apply_backward", "state"]


def state(k: Tensor, v: Tensor) -> Tensor:
    """Memory state ``[B, H, K, V]`` of all given tokens, in float32 (float64 for float64 inputs)."""
    wide = state_dtype(k.dtype)
    return k.to(wide).transpose(2, 3) @ v.to(wide)


def apply(q: Tensor, memory: Tensor, scale: float) -> Tensor:
    """``scale * q S``: ``[B, H, T, V]`` in q's dtype."""
    return (q.to(memory.dtype) @ (memory * scale)).to(q.dtype).contiguous()


def apply_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor, grad_memory: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from S (``memory``) and its gradient dS (``grad_memory``), each in its input's dtype."""
    wide = memory.dtype
    dq = grad.to(wide) @ (memory * scale).transpose(2, 3)
    dk = v.to(wide) @ grad_memory.transpose(2, 3)
    dv = k.to(wide) @ grad_memory
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()
