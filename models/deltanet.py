"""DeltaNet (arXiv 2406.06484): a memory that corrects what it holds for a key rather than add to it.

    S_t = S_{t-1} + b_t k_t^T (v_t - k_t S_{t-1})        o_t = q_t S_t / sqrt(D)        |k_t| = 1, 0 < b_t < 1

Written token by token.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models import frame
from models.frame import CausalConfig, RMSNorm, ShortConvolution, merge_heads, split_heads


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The recurrence above: q, k [B, H, T, K], v [B, H, T, V], beta [B, H, T] -> [B, H, T, V]."""
    B, H, T, K = q.shape
    q = q / math.sqrt(K)
    state = q.new_zeros(B, H, K, v.shape[-1])
    outs = []
    for t in range(T):
        k_t, v_t = k[:, :, t], v[:, :, t]
        held = (k_t[..., None] * state).sum(-2)
        correction = (v_t - held) * beta[:, :, t, None]
        state = state + k_t[..., None] * correction[..., None, :]
        outs.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(outs, dim=2)


class DeltaNet(nn.Module):
    """Short convolutions on queries, keys and values; q and k of length one; a norm for each head."""

    def __init__(self, config: CausalConfig, layer: int):
        super().__init__()
        C, self.size = config.hidden, config.head_size
        self.query, self.key, self.value, self.out = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.query_conv, self.key_conv, self.value_conv = (ShortConvolution(C) for _ in range(3))
        self.beta = nn.Linear(C, config.heads, bias=False)
        self.norm = RMSNorm(self.size, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = split_heads(self.query_conv(self.query(x)), self.size)
        k = split_heads(self.key_conv(self.key(x)), self.size)
        v = split_heads(self.value_conv(self.value(x)), self.size)
        beta = torch.sigmoid(self.beta(x)).transpose(1, 2)
        out = delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta)
        return self.out(merge_heads(self.norm(out)))


PRESETS = frame.presets(DeltaNet, CausalConfig())
tiny = PRESETS["tiny"]
