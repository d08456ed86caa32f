"""The adapter for HGRN, a recurrence of entries: no keys, no queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import spcompile.attention  # noqa: F401  (registers the operator)
from spcompile.library.packed import begins, given_documents

__all__ = ["hgrn"]


def hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    state: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """h_t = exp(g_t) h_{t-1} + x_t for x, g [B, T, D] and an initial state [B, D], in float32.

    Args:
        state: the dtype of the final state; None: float32.
        cu_seqlens: the ends of packed documents, see ``packed.given_documents``.
    Returns:
        all h [B, T, D] in x's dtype, and the last one or None.
    """
    documents = given_documents(cu_seqlens, x, 1, bool(output_final_state) or initial_state is not None)
    if documents is False:
        return None
    dtype = x.dtype
    x, decay = x.float()[..., None], g.float().exp()[..., None]
    if documents is not None:
        decay = decay.masked_fill(begins(documents)[..., None, None], 0.0)
    if initial_state is not None:
        initial_state = initial_state.float().expand(x.shape[0], x.shape[2])[..., None]
    before, final = torch.ops.spcompile.affine_scan(decay, x, initial_state, False)
    out = (decay * before + x).squeeze(-1).to(dtype)
    return out, final.squeeze(-1) if output_final_state else None
