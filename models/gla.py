"""Gated linear attention (arXiv 2312.06635): a data-dependent decay for each token and key channel.

    S_t = Diag(a_t) S_{t-1} + k_t^T v_t        o_t = q_t S_t / sqrt(D)
    log a_t = logsigmoid(g(x_t)) / 16

Written token by token, as the recurrence reads.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models import frame
from models.frame import CausalConfig, RMSNorm, merge_heads, split_heads


def gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The recurrence above: q, k, log_decay [B, H, T, K], v [B, H, T, V] -> [B, H, T, V]."""
    B, H, T, K = q.shape
    q = q / math.sqrt(K)
    state = q.new_zeros(B, H, K, v.shape[-1])
    outs = []
    for t in range(T):
        state = log_decay[:, :, t, :, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append((q[:, :, t, None, :] @ state).squeeze(2))
    return torch.stack(outs, dim=2)


class GLA(nn.Module):
    """The gate g has rank 16; a norm for each head, and a swish gate on the output."""

    def __init__(self, config: CausalConfig, layer: int):
        super().__init__()
        C, self.size = config.hidden, config.head_size
        self.query, self.key, self.value, self.gate, self.out = (
            nn.Linear(C, C, bias=False) for _ in range(5)
        )
        self.decay = nn.Sequential(nn.Linear(C, 16, bias=False), nn.Linear(16, C))
        self.norm = RMSNorm(self.size, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v, g = (
            split_heads(project(x), self.size) for project in (self.query, self.key, self.value, self.decay)
        )
        out = gla(q, k, v, F.logsigmoid(g) / 16)
        return self.out(merge_heads(self.norm(out)) * F.silu(self.gate(x)))


PRESETS = frame.presets(GLA, CausalConfig())
tiny = PRESETS["tiny"]
