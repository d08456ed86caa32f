"""Adapters for recurrences whose decay belongs to an entry of the state: HGRN and Mamba's selective scan."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import spcompile.attention  # noqa: F401  (registers the operator)

__all__ = ["hgrn", "selective_scan"]


def hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    state: torch.dtype | None = None,
) -> Any:
    """h_t = exp(g_t) h_{t-1} + x_t for x, g [B, T, D] and an initial state [B, D], in float32.

    Args:
        state: the dtype of the final state; None: float32.
    Returns:
        all h [B, T, D] in x's dtype, and the last one or None.
    """
    dtype = x.dtype
    x, decay = x.float()[..., None], g.float().exp()[..., None]
    if initial_state is not None:
        initial_state = initial_state.float().expand(x.shape[0], x.shape[2])[..., None]
    before, final = torch.ops.spcompile.affine_scan(decay, x, initial_state, False)
    out = (decay * before + x).squeeze(-1).to(dtype)
    return out, final.squeeze(-1) if output_final_state else None


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    kernel: bool = False,
) -> Any:
    """Mamba: S_t = exp(delta_t A) S_{t-1} + delta_t u_t B_t, y_t = S_t C_t + D u_t, times silu(z).

    Args:
        u, delta, z: [B, I, T]; A: [I, N]; B, C: [B, N, T]; D, delta_bias: [I].
        kernel: the dtypes of the library's kernel (float32 inside, y as u) and not of its fallback.
    Returns:
        y [B, I, T] and, if asked for, the last state [B, I, N].
    """
    if A.is_complex() or A.dim() != 2 or B.dim() != 3 or C.dim() != 3:
        return None
    dtype = u.dtype
    if kernel:
        u, delta, A, B, C = (x.float() for x in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype)[..., None]
    if delta_softplus:
        delta = F.softplus(delta)
    # The state is [I, N] for each token, tokens before it: [B, T, I, N].
    delta, inputs, B, C = (x.transpose(1, 2) for x in (delta, u, B, C))
    decay = torch.exp(A * delta[..., None])
    added = delta[..., None] * B[:, :, None].float() * inputs[..., None].float()
    wide = torch.promote_types(decay.dtype, added.dtype)
    decay, added = decay.to(wide), added.to(wide)
    before, final = torch.ops.spcompile.affine_scan(decay, added, None, False)
    after = (decay * before + added).to(u.dtype)
    out = (after @ C[..., None]).squeeze(-1).transpose(1, 2).contiguous()
    if D is not None:
        out = out + u * D[None, :, None]
    if z is not None:
        out = out * F.silu(z)
    out = out.to(dtype) if kernel else out
    return (out, final) if return_last_state else out
