"""Adapters for Mamba: the selective scan (Mamba-1), SSD (Mamba-2), and Mamba-2's fused layer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile.library.core import attend, product
from spcompile.library.packed import causal_convolution

__all__ = ["fused_ssd", "selective_scan", "ssd"]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    restore: bool = False,
    seq_idx: Tensor | None = None,
) -> Any:
    """Mamba-2: S_t = exp(dt_t A) S_{t-1} + B_t^T (dt_t x_t), y_t = C_t S_t + D x_t (times silu(z)).

    Args:
        x: [B, T, H, P]; dt: [B, T, H], through softplus and the limits here; A: [H]; B, C: [B, T, G, N] with
            H / G heads per group; D: [H], or [H, P] in the kernel; dt_bias: [H].
        initial_states: [B, H, P, N].
        restore: y is in x's dtype again (the library's kernel), not float32 (its fallback).
        seq_idx: [B, T], the document of each token; the final state is the last one's.
    Returns:
        y [B, T, H, P] and, if asked for, the final states [B, H, P, N].
    """
    if A.dim() != 1 or (D is not None and D.dim() > 1 + restore) or A.is_complex():
        return None
    dtype = x.dtype
    dt = dt.float() if restore else dt
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1]).float()
    x = x.float()
    k, q, v = (y.transpose(1, 2) for y in (B.float(), C.float(), x * dt[..., None]))
    log_decay = (A.float() * dt).transpose(1, 2)[..., None]
    given = {"log_decay": log_decay, "initial_state": initial_states, "documents": seq_idx}
    found = attend(q, k, v, **given, state_v_first=True)
    if found is None:
        return None
    out = found[0].transpose(1, 2).contiguous()
    if D is not None:
        out = out + (D[..., None] if D.dim() == 1 else D) * x
    if z is not None:
        out = out * F.silu(z.float())
    out = out.to(dtype) if restore else out
    final = found[1] if restore else product(found[1])
    return (out, final) if return_final_states else out


def fused_ssd(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    initial_states: Tensor | None,
    dt_limit: tuple[float, float],
    return_final_states: bool,
    activation: str | None,
    rmsnorm_weight: Tensor | None,
    rmsnorm_eps: float,
    outproj_weight: Tensor | None,
    outproj_bias: Tensor | None,
    headdim: int | None,
    ngroups: int,
    norm_before_gate: bool,
    seq_idx: Tensor | None = None,
) -> Any:
    """A Mamba-2 layer after its first projection: a short convolution, ``ssd``, a gated norm, a projection.

    Args:
        zxbcdt: [B, T, I + (I + 2 G N) + H], I = H P: the gate z, the convolution's inputs x, B, C, and dt.
        conv1d_weight: [I + 2 G N, width]; rmsnorm_weight: [I]; outproj_weight: [out, I].
    Returns:
        [B, T, out] and, if asked for, the final states [B, H, P, N].
    """
    heads = D.shape[0]
    size = D.shape[1] if D.dim() == 2 else headdim
    if size is None or activation not in (None, "silu", "swish"):
        return None
    inner, channels = heads * size, conv1d_weight.shape[0]
    if zxbcdt.shape[-1] != inner + channels + heads:
        return None  # an MLP is fused in, too
    z, mixed, dt = zxbcdt.split([inner, channels, heads], dim=-1)
    mixed = causal_convolution(mixed.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation)
    mixed = mixed.transpose(1, 2)
    x, B, C = mixed.split([inner, (channels - inner) // 2, (channels - inner) // 2], dim=-1)
    B, C = (y.unflatten(-1, (ngroups, -1)) for y in (B, C))
    found = ssd(
        x.unflatten(-1, (heads, size)),
        dt,
        A,
        B,
        C,
        D,
        z.unflatten(-1, (heads, size)) if rmsnorm_weight is None else None,
        dt_bias,
        initial_states,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
        restore=True,
        seq_idx=seq_idx,
    )
    if found is None:
        return None
    out = found[0].flatten(-2)
    if rmsnorm_weight is not None:
        out = _gated_norm(out, z, rmsnorm_weight, rmsnorm_eps, ngroups, norm_before_gate)
    if outproj_weight is not None:
        out = F.linear(out, outproj_weight, outproj_bias)
    return (out, found[1]) if return_final_states else out


def _gated_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, before: bool) -> Tensor:
    """The norm of each group of x by its root mean square, times silu(z) before or after; in float32."""
    wide, gate = x.float(), F.silu(z.float())
    wide = wide if before else wide * gate
    parts = wide.unflatten(-1, (groups, -1))
    parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    wide = parts.flatten(-2) * weight.float()
    return (wide * gate if before else wide).to(x.dtype)


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
    # The kernel's backward takes no notice of what becomes of the last state.
    final = final.detach() if kernel else final
    return (out, final) if return_last_state else out
