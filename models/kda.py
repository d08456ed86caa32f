"""Kimi Delta Attention (arXiv 2510.26692): the delta rule on a memory that decays by channel.

    S_t = (I - b_t k_t^T k_t) Diag(a_t) S_{t-1} + b_t k_t^T v_t        o_t = q_t S_t / sqrt(D)
    log a_t = -exp(A) softplus(f(x_t) + dt), one for each key channel

Written token by token: decay, read what is held for the key, correct it.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models import frame
from models.frame import CausalConfig, RMSNorm, ShortConvolution, merge_heads, split_heads


def kda(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """The recurrence above: q, k, log_decay [B, H, T, K], v [B, H, T, V], beta [B, H, T] -> [B, H, T, V]."""
    B, H, T, K = q.shape
    q = q / math.sqrt(K)
    decay = log_decay.exp()
    state = q.new_zeros(B, H, K, v.shape[-1])
    outs = []
    for t in range(T):
        k_t = k[:, :, t, :, None]
        state = state * decay[:, :, t, :, None]
        correction = v[:, :, t, None, :] - (k_t * state).sum(-2, keepdim=True)
        state = state + k_t * (beta[:, :, t, None, None] * correction)
        outs.append((q[:, :, t, None, :] @ state)[:, :, 0])
    return torch.stack(outs, dim=2)


class KDA(nn.Module):
    """Gated DeltaNet's layer with a decay for each channel; gates of low rank, the output's a sigmoid."""

    def __init__(self, config: CausalConfig, layer: int):
        super().__init__()
        C, H, self.size = config.hidden, config.heads, config.head_size
        self.query, self.key, self.value, self.out = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.query_conv, self.key_conv, self.value_conv = (ShortConvolution(C) for _ in range(3))
        self.beta = nn.Linear(C, H, bias=False)
        self.decay, self.gate = (
            nn.Sequential(nn.Linear(C, self.size, bias=False), nn.Linear(self.size, C, bias=False))
            for _ in range(2)
        )
        dt = torch.exp(torch.linspace(math.log(0.001), math.log(0.1), C))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.A_log = nn.Parameter(torch.log(torch.linspace(1, 16, H)))
        self.norm = RMSNorm(self.size, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = split_heads(self.query_conv(self.query(x)), self.size)
        k = split_heads(self.key_conv(self.key(x)), self.size)
        v = split_heads(self.value_conv(self.value(x)), self.size)
        beta = torch.sigmoid(self.beta(x)).transpose(1, 2)
        speed = split_heads(F.softplus(self.decay(x) + self.dt_bias), self.size)
        log_decay = -self.A_log.exp()[:, None, None] * speed
        out = kda(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, log_decay, beta)
        return self.out(merge_heads(self.norm(out)) * torch.sigmoid(self.gate(x)))


PRESETS = frame.presets(KDA, CausalConfig())
tiny = PRESETS["tiny"]
