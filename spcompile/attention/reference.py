"""What the attention operators mean, one token at a time in plain PyTorch. Slow; tests run them in
float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear_attention", "softmax_attention"]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """The recurrence S_t = S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t (or q_t S_T if not causal).

    Args:
        q, k: ``[B, H, T, K]``; v: ``[B, H, T, V]``.
    Returns:
        ``[B, H, T, V]``.
    """
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    states = []
    for t in range(q.shape[2]):
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        states.append(state)
    outs = [q[:, :, t, None] @ (states[t] if causal else state) * scale for t in range(q.shape[2])]
    return torch.cat(outs, dim=2)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """One query at a time: softmax of its scores over the keys it may see, times their values.

    Args:
        q: ``[B, H, T, K]``; k: ``[B, Hkv, S, K]``; v: ``[B, Hkv, S, V]``; head h uses key head ``h // (H //
            Hkv)``.
        mask: None, bool (True = may see) or additive, broadcastable to ``[B, H, T, S]``.
        causal: query i sees key j only if ``j <= i``.
    Returns:
        out ``[B, H, T, V]`` and the natural log of the sum of exponentials ``[B, H, T]``. A query that may
        see no key (of -inf or False) has out 0 and lse -inf.
    """
    b, h, t, _ = q.shape
    s = k.shape[2]
    k, v = (x.repeat_interleave(h // x.shape[1], dim=1) for x in (k, v))
    outs, sums = [], []
    for i in range(t):
        scores = (q[:, :, i, None] * k).sum(-1) * scale
        if mask is not None:
            row = mask.expand(b, h, t, s)[:, :, i]
            scores = scores.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else scores + row
        if causal:
            scores = scores.masked_fill(torch.arange(s) > i, -torch.inf)
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
        outs.append((weights[..., None] * v).sum(2))
        sums.append(torch.logsumexp(scores, dim=-1))
    return torch.stack(outs, dim=2), torch.stack(sums, dim=2)
