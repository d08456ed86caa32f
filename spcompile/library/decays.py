"""Adapters for functions with a decay, no delta rule: GLA, simple GLA, Retention, Lightning, RWKV-6."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spcompile.library.core import attend, heads_first, scale_of
from spcompile.library.packed import given_documents

__all__ = [
    "gated",
    "lightning",
    "parallel",
    "parallel_loop",
    "parallel_retention",
    "retention",
    "rwkv6",
]


def gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    order: str = "bthd",
    compute: torch.dtype | None = None,
    restore: bool = True,
    contiguous: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """o_t = scale * q_t S_t, S_t = exp(g_t) S_{t-1} + k_t^T v_t.

    Args:
        q, k: [B, T, H, K] (``order="bhtd"``: heads first); v: [B, T, Hv, V].
        g: log decay per token [B, T, Hv] or per channel [B, T, Hv, K]; g_gamma: per head [Hv].
        compute: the dtype that the library computes in; None: that of q.
        restore: out is in q's dtype again.
        contiguous: out is laid out as the library does it, contiguous or (a view) heads first.
        cu_seqlens: the ends of packed documents, see ``packed.given_documents``.
    Returns:
        out, [B, T, Hv, V] or heads first as v, and the final state or None.
    """
    if g is not None and g_gamma is not None:
        return None
    states = output_final_state or initial_state is not None
    documents = given_documents(cu_seqlens, q, 1 if order == "bthd" else 2, states)
    if documents is False:
        return None
    dtype, scale = q.dtype, scale_of(scale, k)
    q, k, v = (heads_first(x, order).to(compute or dtype) for x in (q, k, v))
    if g is not None:
        g = heads_first(g, order)
        g = g if compute is None else g.to(compute)
        g = g[..., None] if g.dim() == 3 else g
    elif g_gamma is not None:
        g = g_gamma.reshape(1, -1, 1, 1)
    found = attend(
        q,
        k,
        v,
        log_decay=g,
        initial_state=initial_state,
        scale=scale,
        reverse=reverse,
        state_v_first=state_v_first,
        documents=documents,
    )
    if found is None:
        return None
    out, final = heads_first(found[0], order), found[1]
    out = out.contiguous() if contiguous else out
    return out.to(dtype) if restore else out, final if output_final_state else None


def retention_decay(heads: int, like: Tensor) -> Tensor:
    """log(1 - 2^(-5 - h)) for each head."""
    return (1 - 2.0 ** (-5.0 - torch.arange(heads, dtype=torch.float, device=like.device))).log()


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    order: str = "bthd",
    compute: torch.dtype | None = None,
    alone: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """``gated`` with RetNet's decays; ``alone``: the library returns the output without a state."""
    found = gated(
        q,
        k,
        v,
        g_gamma=retention_decay(q.shape[2 if order == "bthd" else 1], q),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        state_v_first=state_v_first,
        order=order,
        compute=compute,
        cu_seqlens=cu_seqlens,
    )
    return found[0] if alone and found is not None else found


def lightning(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """``gated`` with Lightning attention's decays, which depend on the depth of the layer."""
    heads = q.shape[2]
    steps = torch.arange(heads, dtype=torch.float, device=q.device)
    return gated(
        q,
        k,
        v,
        g_gamma=-(8 / heads * (1 - layer_idx / num_layers)) * steps,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
    )


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """``gated``; in the place of the state the library returns the T x T weights, if asked for."""
    return gated(q, k, v, g=g, scale=scale, cu_seqlens=cu_seqlens)


def parallel_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None = None) -> Any:
    """``gated`` in float32 with the T x T weights, which nobody computes who does not use them."""
    found = gated(q, k, v, g=g, scale=scale, compute=torch.float32, restore=False, contiguous=False)
    if found is None:
        return None
    q, k, sums = q.transpose(1, 2).float(), k.transpose(1, 2).float(), g.transpose(1, 2).float().cumsum(-1)
    decay = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).tril().exp().tril()
    return found[0], q @ k.mT * scale_of(scale, k) * decay


def parallel_retention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, cu_seqlens: Tensor | None = None
) -> Any:
    return retention(q, k, v, scale=scale, cu_seqlens=cu_seqlens)


def rwkv6(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    reverse: bool = False,
    order: str = "bthd",
    compute: torch.dtype | None = None,
    alone: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """o_t = scale * q_t (S_{t-1} + u * k_t^T v_t), S_t = exp(w_t) S_{t-1} + k_t^T v_t.

    Args:
        q, k, w: [B, T, H, K] (``order="bhtd"``: heads first); v: [B, T, H, V]; u: [H, K], the bonus of the
            current token.
        compute, alone, cu_seqlens: as in ``gated`` and ``retention``.
    """
    dtype, scale = q.dtype, scale_of(scale, k)
    states = bool(output_final_state) or initial_state is not None
    documents = given_documents(cu_seqlens, q, 1 if order == "bthd" else 2, states)
    if documents is False:
        return None
    q, k, v = (heads_first(x, order).to(compute or dtype) for x in (q, k, v))
    w = heads_first(w, order)
    w = w if compute is None else w.to(compute)
    found = attend(
        q,
        k,
        v,
        log_decay=w,
        initial_state=initial_state,
        scale=scale,
        exclusive=True,
        reverse=reverse,
        documents=documents,
    )
    if found is None or k.shape[1] != v.shape[1]:
        return None
    bonus = (q * scale * u.to(q.dtype)[None, :, None, :] * k).sum(-1, keepdim=True)
    out = heads_first(found[0] + bonus * v, order).contiguous().to(dtype)
    return out if alone else (out, found[1] if output_final_state else None)
