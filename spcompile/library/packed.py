"""Packed documents in library calls: which document a token is of, where one begins, short convolutions."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile.kernels.scan import state_dtype

__all__ = ["begins", "causal_convolution", "documents_of", "fla_convolution", "given_documents"]


def documents_of(cu_seqlens: Tensor, length: int) -> Tensor:
    """The document of each token, [1, T], from the ends of all, ``[0, n_1, n_1 + n_2, ..., T]``."""
    tokens = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(tokens, cu_seqlens, right=True)[None]


def given_documents(
    cu_seqlens: Tensor | None, tokens: Tensor, dim: int, states: bool
) -> Tensor | Literal[False] | None:
    """Fla's packed documents as ``core.attend`` takes them: None if there are none, False if it can't.

    Args:
        cu_seqlens: [N + 1], the ends of the documents of the one sequence ``tokens``, along ``dim``.
        states: whether there is an initial state or the last is asked for; of either each document has one.
    """
    if cu_seqlens is None:
        return None
    return False if states or tokens.shape[0] != 1 else documents_of(cu_seqlens, tokens.shape[dim])


def begins(documents: Tensor) -> Tensor:
    """Whether a token is of another document than the one before it, bool like ``documents`` [B, T]."""
    return F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None) -> Tensor:
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
    """The convolution in the dtype of x, and silu; ``seq_idx``: [B, T] or None."""
    if activation not in (None, "silu", "swish") or x.dim() != 3 or weight.dim() != 2:
        return None
    bias = None if bias is None else bias.to(x.dtype)
    out = _convolved(x, weight.to(x.dtype), bias, seq_idx)
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
