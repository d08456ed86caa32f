"""Packed documents in library calls: which document a token is of, where one begins, short convolutions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile.kernels.scan import state_dtype

__all__ = ["begins", "causal_convolution", "convolved", "documents_of", "fla_convolution"]


def documents_of(cu_seqlens: Tensor, length: int) -> Tensor:
    """The document of each token, [1, T], from the ends of all, ``[0, n_1, n_1 + n_2, ..., T]``."""
    tokens = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(tokens, cu_seqlens, right=True)[None]


def begins(documents: Tensor) -> Tensor:
    """Whether a token is of another document than the one before it, bool like ``documents`` [B, T]."""
    return F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None) -> Tensor:
    """y_t = bias + sum_l weight_{W-1-l} x_{t-l}, over the tokens t - l of t's document.

    Args:
        x: [B, D, T]; weight: [D, W]; bias: [D]; documents: [B, T] or [1, T] integers, or None: one for all.
    """
    (channels, width), length = weight.shape, x.shape[2]
    if documents is None:
        return F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=channels)[..., :length]
    wide = x.to(state_dtype(x.dtype))
    weight = weight.to(wide.dtype)[None, :, :, None]
    out = weight[:, :, -1] * wide
    for lag in range(1, min(width, length)):
        same = F.pad(documents[:, lag:] == documents[:, :-lag], (lag, 0))[:, None]
        out = out + weight[:, :, -1 - lag] * torch.where(same, F.pad(wide[..., :-lag], (lag, 0)), 0.0)
    out = out if bias is None else out + bias.to(wide.dtype)[:, None]
    return out.to(x.dtype)


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """:func:`convolved` in the dtype of x, and silu; ``seq_idx``: [B, T] or None."""
    if activation not in (None, "silu", "swish") or x.dim() != 3 or weight.dim() != 2:
        return None
    bias = None if bias is None else bias.to(x.dtype)
    out = convolved(x, weight.to(x.dtype), bias, seq_idx)
    return out if activation is None else F.silu(out)


def fla_convolution(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """``causal_convolution`` of x [B, T, D], plus the residual; and no state."""
    if weight is None or x.dim() != 3 or (cu_seqlens is not None and x.shape[0] != 1):
        return None
    documents = None if cu_seqlens is None else documents_of(cu_seqlens, x.shape[1])
    out = causal_convolution(x.transpose(1, 2), weight, bias, documents, activation)
    if out is None:
        return None
    out = out.transpose(1, 2).contiguous()
    return (out if residual is None else out + residual), None
