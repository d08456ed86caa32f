"""Adapters for functions without a decay: basic linear attention, polynomials of the scores (Based, Rebased).

A normaliser is a column of ones beside v: its output is the sum of the scores.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile.library.core import attend, heads_first, product, scale_of
from spcompile.library.packed import given_documents

__all__ = ["based", "linear", "performer", "performer_whole", "rebased"]


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    normalize: bool = False,
    reverse: bool = False,
    compute: torch.dtype | None = None,
    states: str = "kernel",
    cu_seqlens: Tensor | None = None,
) -> Any:
    """o_t = scale * q_t S_t, S_t = S_{t-1} + k_t^T v_t; if ``normalize``, o_t / (scale * q_t z_t + 1e-10),
    z_t = z_{t-1} + k_t.

    Args:
        q, k: [B, T, H, K]; v: [B, T, H, V].
        initial_state: [B, H, K, V], or a tuple of it and z [B, 1, H, K] if ``normalize``.
        compute: the dtype that the library computes in; None: that of q.
        states: which states it returns: its "kernel" gives z even where no state is asked for, its "loop"
            does not, "alone" is the output by itself.
        cu_seqlens: the ends of packed documents, see ``packed.given_documents``.
    """
    documents = given_documents(
        cu_seqlens, q, 1, output_final_state or normalize or initial_state is not None
    )
    if documents is False:
        return None
    dtype, scale = q.dtype, scale_of(scale, k)
    sums = None
    if normalize and isinstance(initial_state, tuple):
        initial_state, sums = initial_state
    if initial_state is not None and not isinstance(initial_state, Tensor):
        return None
    q, k, v = (x.transpose(1, 2).to(compute or dtype) for x in (q, k, v))
    if normalize:
        state = _with_column(initial_state, sums, k, v)
        found = attend(q, k, F.pad(v, (0, 1), value=1.0), initial_state=state, scale=scale, reverse=reverse)
    else:
        found = attend(
            q, k, v, initial_state=initial_state, scale=scale, reverse=reverse, documents=documents
        )
    if found is None:
        return None
    out, final = found
    if not normalize:
        out = out.transpose(1, 2).to(dtype)
        if states == "alone":
            return product(out)
        return out.contiguous(), final if output_final_state else None
    size = v.shape[3]
    out = (out[..., :size] / (out[..., size:] + 1e-10)).transpose(1, 2).to(dtype)
    if states == "alone":
        return out
    out = out.contiguous()
    memory, z = final[..., :size], final[..., size][:, None].to(k.dtype)
    if output_final_state:
        return out, (memory, z)
    return out, (None, z) if states == "kernel" else None


def _with_column(state: Tensor | None, sums: Tensor | None, k: Tensor, v: Tensor) -> Tensor | None:
    """[B, H, K, V] and z [B, 1, H, K] as one state [B, H, K, V + 1]."""
    if state is None and sums is None:
        return None
    shape = (k.shape[0], k.shape[1], k.shape[3])
    if state is None:
        state = k.new_zeros(*shape, v.shape[3])
    column = k.new_zeros(*shape, 1) if sums is None else sums.squeeze(1)[..., None]
    return torch.cat([state, column.to(state.dtype)], dim=-1)


def based(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    use_norm: bool = True,
    order: str = "bhtd",
    wide: bool = False,
) -> Any:
    """Scores 1 + s + s^2 / 2, s = scale * q k^T: the features [1, x, x x^T / sqrt(2)].

    ``wide``: autocast does not narrow the library's output.
    """
    out = _polynomial(q, k, v, scale, use_norm, order, 1e-6, _second_order)
    return out if wide or out is None else product(out)


def _second_order(x: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(x[..., :1]), x, _square(x) * 0.5**0.5], dim=-1)


def _square(x: Tensor) -> Tensor:
    return (x[..., :, None] * x[..., None, :]).flatten(-2)


def rebased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    use_scale: bool = True,
    use_norm: bool = True,
    order: str = "bhtd",
    eps: float = 1e-6,
    wide: bool = False,
) -> Any:
    """Scores s^2, s = scale * q k^T: the features x x^T. ``wide`` as in ``based``."""
    out = _polynomial(q, k, v, scale if use_scale else 1.0, use_norm, order, eps, _square)
    return out if wide or out is None else product(out)


def _polynomial(
    q: Tensor, k: Tensor, v: Tensor, scale: Any, normalize: bool, order: str, eps: float, features: Any
) -> Any:
    """Linear attention of ``features`` of scale * q and of k; o = scores v / (sum of the scores + eps)."""
    dtype = q.dtype
    q = q * scale_of(scale, q)
    q, k, v = (heads_first(x, order) for x in (q, k, v))
    v = F.pad(v, (0, 1), value=1.0) if normalize else v
    found = attend(features(q), features(k), v)
    if found is None:
        return None
    out = found[0]
    if normalize:
        out = out[..., :-1] / (out[..., -1:] + eps)
    return heads_first(out, order).to(dtype)


def performer(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Any:
    """o_t = q_t S_t / (q_t (z_t + eps)) for q, k [B, H, T, K] that are features already; v [B, H, T, V]."""
    if q.dim() != 4:
        return None
    found = attend(q, k, F.pad(v, (0, 1), value=1.0))
    if found is None:
        return None
    out = found[0]
    return product(out[..., :-1] / (out[..., -1:] + eps * q.sum(-1, keepdim=True)))


def performer_whole(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """``performer`` without an order: every query sees the state of all tokens, and there is no eps."""
    if q.dim() != 4 or not (q.dtype == k.dtype == v.dtype) or q.shape[:2] != k.shape[:2]:
        return None
    v = F.pad(v, (0, 1), value=1.0)
    out, _ = torch.ops.spcompile.linear_attention(q, k, v, None, None, None, False, 1.0)
    return product(out[..., :-1] / out[..., -1:])
