"""What the adapters share: layouts, dtypes and heads around the operator, the norms inside library calls."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import spcompile.attention  # noqa: F401  (registers the operator)
from spcompile.kernels.scan import state_dtype
from spcompile.library.packed import begins

__all__ = ["attend", "heads_first", "l2norm", "product", "scale_of"]


def scale_of(scale: Any, keys: Tensor) -> float:
    """The factor of the scores: K ** -0.5 unless given."""
    return keys.shape[-1] ** -0.5 if scale is None else scale


def heads_first(x: Tensor, order: str) -> Tensor:
    """[B, T, H, ...] or [B, H, T, ...] as [B, H, T, ...]."""
    return x.transpose(1, 2) if order == "bthd" else x


def product(x: Tensor) -> Tensor:
    """In the dtype that the library's product of matrices has here: autocast's where it is on."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def l2norm(x: Tensor, root: bool) -> Tensor:
    """x over its norm on the last dim, written as a division by the root or as a product with its inverse."""
    square = (x * x).sum(dim=-1, keepdim=True) + 1e-6
    return x / torch.sqrt(square) if root else x * torch.rsqrt(square)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float = 1.0,
    exclusive: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The operator for operands [B, H, T, ...] of one dtype, whose q, k may have fewer heads than v.

    Args:
        log_decay: broadcastable to [B, Hv, T, K]; beta: [B, Hv, T].
        initial_state: [B, Hv, K, V], or [B, Hv, V, K] if ``state_v_first``.
        documents: [B, T] or [1, T]: the state starts anew where a token is of another document than the one
            before it (behind it, if ``reverse``); there is no initial state then.
    Returns:
        out [B, Hv, T, V] and the final state in the layout of the initial one, float32 (float64 for float64);
        None where the operands are not such.
    """
    if not (q.dtype == k.dtype == v.dtype) or v.shape[1] % k.shape[1] or not isinstance(scale, (int, float)):
        return None
    if beta is not None:
        if beta.dim() != 3:
            return None
        beta = beta[..., None].to(state_dtype(q.dtype))
    groups = v.shape[1] // k.shape[1]
    if groups > 1:
        q, k = q.repeat_interleave(groups, dim=1), k.repeat_interleave(groups, dim=1)
    if documents is not None:
        if initial_state is not None:
            return None
        first = begins(documents)
        first = (F.pad(first[:, 1:], (0, 1)) if reverse else first)[:, None, :, None]
        # A decay of zero, exactly; what is seen before it is the other document's, too.
        log_decay = q.new_zeros(()) if log_decay is None else log_decay
        log_decay = torch.where(first, -torch.inf, log_decay.to(state_dtype(q.dtype)))
        q = q.masked_fill(first, 0.0) if exclusive else q
    if initial_state is not None:
        if initial_state.dim() != 4:
            return None
        initial_state = initial_state.mT if state_v_first else initial_state
        initial_state = initial_state.to(state_dtype(q.dtype))
        initial_state = initial_state.expand(q.shape[0], q.shape[1], k.shape[3], v.shape[3])
    out, final = torch.ops.spcompile.linear_attention(
        q, k, v, log_decay, beta, initial_state, True, float(scale), exclusive, reverse
    )
    return out, final.mT.contiguous() if state_v_first else final
