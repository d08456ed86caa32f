"""Adapters for functions with the delta rule: DeltaNet, Gated DeltaNet, Kimi's delta attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile.library.core import attend, heads_first, l2norm, product, scale_of
from spcompile.library.packed import given_documents

__all__ = ["delta_rule"]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    order: str = "bthd",
    compute: torch.dtype | None = None,
    restore: str = "q",
    contiguous: bool = True,
    root: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """o_t = scale * q_t S_t, S_t = (I - beta_t k_t^T k_t) exp(g_t) S_{t-1} + beta_t k_t^T v_t.

    Args:
        q, k: [B, T, H, K] (``order="bhtd"``: heads first), normalized if ``use_qk_l2norm_in_kernel``;
        v: [B, T, Hv, V], Hv a multiple of H; beta: [B, T, Hv], through a sigmoid if asked for (None: 1).
        g: log decay per token [B, T, Hv] or per channel [B, T, Hv, K]; with ``use_gate_in_kernel`` what it
            is made from, with A_log, dt_bias and lower_bound.
        compute: the dtype that the library computes in; None: that of q.
        restore: out has the dtype of "q", of "v", of a "product" of matrices, or stays as computed ("").
        contiguous: out is laid out as the library does it, contiguous or (a view) heads first.
        root: how the norms are written.
        cu_seqlens: the ends of packed documents, see ``packed.given_documents``.
    Returns:
        out, [B, T, Hv, V] or heads first as v, and the final state or None.
    """
    states = output_final_state or initial_state is not None
    documents = given_documents(cu_seqlens, q, 1 if order == "bthd" else 2, states)
    if documents is False:
        return None
    if use_gate_in_kernel:
        if g is None or (A_log is None and lower_bound is None):
            return None
        g = _gate(g, A_log, dt_bias, lower_bound)
    dtype, scale = {"q": q.dtype, "v": v.dtype}.get(restore), scale_of(scale, k)
    q, k, v = (heads_first(x, order).to(compute or q.dtype) for x in (q, k, v))
    if use_qk_l2norm_in_kernel:
        wide = q.dtype if compute is not None else torch.float32
        q, k = (l2norm(x.to(wide), root).to(x.dtype) for x in (q, k))
    beta = torch.ones_like(v[..., 0]) if beta is None else heads_first(beta, order)
    beta = beta if compute is None else beta.to(compute)
    if use_beta_sigmoid_in_kernel:
        beta = torch.sigmoid(beta.float()) * (2.0 if allow_neg_eigval else 1.0)
    if g is not None:
        g = heads_first(g, order)
        g = g if compute is None else g.to(compute)
        g = g[..., None] if g.dim() == 3 else g
    found = attend(
        q,
        k,
        v,
        log_decay=g,
        beta=beta,
        initial_state=initial_state,
        scale=scale,
        state_v_first=state_v_first,
        documents=documents,
    )
    if found is None:
        return None
    out = heads_first(found[0], order)
    out = out.contiguous() if contiguous else out
    out = product(out) if restore == "product" else out
    return out if dtype is None else out.to(dtype), found[1] if output_final_state else None


def _gate(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """The log decay from what a layer projects: -exp(A_log) softplus(g + dt_bias), or, bounded from below,
    lower_bound * sigmoid(exp(A_log) (g + dt_bias)).

    Args:
        g: [B, T, H, K], or [B, T, H] for one decay per token; A_log: [H]; dt_bias: as many as g's last dims.
    """
    shape = g.shape[2:]
    g = g.float()
    if dt_bias is not None:
        g = g + dt_bias.float().reshape(shape)
    rate = None if A_log is None else A_log.float().exp().reshape(-1, *(1 for _ in shape[1:]))
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(g if rate is None else rate * g)
    assert rate is not None
    return -rate * F.softplus(g)
