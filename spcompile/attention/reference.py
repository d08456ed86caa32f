"""What the attention operators mean, one token at a time in plain PyTorch. Slow; tests run them in
float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["affine_scan", "linear_attention", "max_scan", "softmax_attention"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    causal: bool,
    scale: float,
    exclusive: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t^T k_t) D_t S_{t-1} + beta_t k_t^T v_t (else D_t S_{t-1} + k_t^T v_t),
    D_t = Diag(exp(log_decay_t)), and o_t = scale * q_t S_t (exclusive: S_{t-1}; not causal: S_T).

    Args:
        q, k: ``[B, H, T, K]``; v: ``[B, H, T, V]``; the others as in ``spcompile::linear_attention``.
    Returns:
        out ``[B, H, T, V]`` and the state after the last token ``[B, H, K, V]``.
    """
    b, h, t, size = k.shape
    state = k.new_zeros(b, h, size, v.shape[3]) if initial_state is None else initial_state
    decay = k.new_ones(b, h, t, 1) if log_decay is None else log_decay.exp().expand(b, h, t, -1)
    seen: dict[int, Tensor] = {}
    for i in reversed(range(t)) if reverse else range(t):
        key, value = k[:, :, i, :, None], v[:, :, i, None, :]
        moved = state * decay[:, :, i, :, None]
        if beta is not None:
            value = beta[:, :, i, :, None] * (value - key.mT @ moved)
        after = moved + key * value
        seen[i] = state if exclusive else after
        state = after
    outs = [q[:, :, i, None] @ (seen[i] if causal else state) * scale for i in range(q.shape[2])]
    return torch.cat(outs, dim=2), state


def affine_scan(
    a: Tensor | None, b: Tensor, initial_state: Tensor | None, matrix: bool, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + b_t (elementwise, or a matrix from the left) along dim -3: the states before each
    step, and the last."""
    state = torch.zeros_like(b[..., 0, :, :]) if initial_state is None else initial_state
    seen: dict[int, Tensor] = {}
    a = a if a is None or matrix else a.expand(b.shape)
    for t in reversed(range(b.shape[-3])) if reverse else range(b.shape[-3]):
        seen[t] = state
        if a is not None:
            state = a[..., t, :, :] @ state if matrix else a[..., t, :, :] * state
        state = state + b[..., t, :, :]
    return torch.stack([seen[t] for t in range(b.shape[-3])], dim=-3), state


def max_scan(
    a: Tensor | None, b: Tensor, initial_state: Tensor | None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """S_t = max(S_{t-1} + a_t, b_t) along dim -3: the states before each step, and the last."""
    start = torch.full_like(b[..., 0, :, :], -torch.inf)
    state = start if initial_state is None else initial_state
    seen: dict[int, Tensor] = {}
    a = torch.zeros_like(b) if a is None else a.expand(b.shape)
    for t in reversed(range(b.shape[-3])) if reverse else range(b.shape[-3]):
        seen[t] = state
        state = torch.maximum(state + a[..., t, :, :], b[..., t, :, :])
    return torch.stack([seen[t] for t in range(b.shape[-3])], dim=-3), state


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    documents: Tensor | None = None,
    relative: Tensor | None = None,
    prefixes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One query at a time: softmax of its scores over the keys it may see, times their values.

    Args:
        q: ``[B, H, T, K]``; k: ``[B, Hkv, S, K]``; v: ``[B, Hkv, S, V]``; head h uses key head ``h // (H //
            Hkv)``.
        mask: None, bool (True = may see) or additive, broadcastable to ``[B, H, T, S]``.
        causal: query i sees key j only if ``j <= i``.
        window: and only if ``|i - j| < window``.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``, before the mask.
        prefixes: ``[B, S]`` or ``[1, S]``: it sees keys of its own number >= 0 whatever these two say.
        documents: ``[B, S]`` or ``[1, S]``: and only if ``documents_i == documents_j``.
        relative: ``[H or 1, 2 L - 1]``: entry ``L - 1 + i - j`` is added to s_ij, behind the soft cap.
        sinks: ``[H]``, one more logit in each row of a head, whose weight is dropped.
    Returns:
        out ``[B, H, T, V]`` and the natural log of the sum of exponentials ``[B, H, T]``. A query that may
        see no key (of -inf or False) has out 0, and lse -inf or the sink.
    """
    b, h, t, _ = q.shape
    s = k.shape[2]
    k, v = (x.repeat_interleave(h // x.shape[1], dim=1) for x in (k, v))
    outs, sums = [], []
    for i in range(t):
        scores = (q[:, :, i, None] * k).sum(-1) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if relative is not None:
            scores = scores + relative[:, relative.shape[1] // 2 + i - torch.arange(s)]
        if mask is not None:
            row = mask.expand(b, h, t, s)[:, :, i]
            scores = scores.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else scores + row
        far = torch.zeros(1, s, dtype=torch.bool)
        if causal:
            far = far | (torch.arange(s) > i)
        if window is not None:
            far = far | ((torch.arange(s) - i).abs() >= window)
        if prefixes is not None:
            far = far & ~((prefixes == prefixes[:, i, None]) & (prefixes >= 0))
        scores = scores.masked_fill(far[:, None], -torch.inf)
        if documents is not None:
            scores = scores.masked_fill((documents != documents[:, i, None])[:, None], -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.expand(b, h)[..., None]], dim=-1)
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
        outs.append((weights[..., :s, None] * v).sum(2))
        sums.append(torch.logsumexp(scores, dim=-1))
    return torch.stack(outs, dim=2), torch.stack(sums, dim=2)
