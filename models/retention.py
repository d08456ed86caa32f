"""Retention (RetNet, arXiv 2307.08621): linear attention whose memory decays by a constant of each head.

    S_t = gamma S_{t-1} + k_t^T v_t        o_t = q_t S_t / sqrt(D)        gamma_h = 1 - 2^(-5 - h)

In its parallel form, quadratic in the length: scores times a mask gamma^(t - s).
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models import frame
from models.frame import CausalConfig, RMSNorm, merge_heads, rotate, split_heads


def retention(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    """o_t = sum_{s <= t} gamma^(t - s) (q_t . k_s) v_s / sqrt(D), all [B, H, T, D]; gamma [H]."""
    T, D = q.shape[-2:]
    position = torch.arange(T, device=q.device, dtype=q.dtype)
    distance = position[:, None] - position[None, :]
    decay = torch.where(distance >= 0, gamma[:, None, None] ** distance, 0.0)
    scores = (q / math.sqrt(D)) @ k.transpose(-1, -2)
    return (scores * decay) @ v


class Retention(nn.Module):
    """Multi-scale retention: rotary queries and keys, a norm for each head, a swish gate."""

    gamma: Tensor

    def __init__(self, config: CausalConfig, layer: int):
        super().__init__()
        C, self.size = config.hidden, config.head_size
        self.query, self.key, self.value, self.gate, self.out = (
            nn.Linear(C, C, bias=False) for _ in range(5)
        )
        self.norm = RMSNorm(self.size, config.norm_eps)
        head = torch.arange(config.heads, dtype=torch.float32)
        self.register_buffer("gamma", 1 - 2 ** (-5 - head))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (split_heads(project(x), self.size) for project in (self.query, self.key, self.value))
        out = retention(rotate(q, cos, sin), rotate(k, cos, sin), v, self.gamma.to(x.dtype))
        return self.out(merge_heads(self.norm(out)) * F.silu(self.gate(x)))


PRESETS = frame.presets(Retention, CausalConfig())
tiny = PRESETS["tiny"]
