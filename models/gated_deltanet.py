"""Gated DeltaNet (arXiv 2412.06464): the delta rule on a memory that decays, by a scalar of each head.

    S_t = a_t (I - b_t k_t^T k_t) S_{t-1} + b_t k_t^T v_t        o_t = q_t S_t / sqrt(D)
    log a_t = -exp(A) softplus(w . x_t + dt)

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


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """The recurrence above: q, k [B, H, T, K], v [B, H, T, V], log_decay, beta [B, H, T] -> [B, H, T, V]."""
    B, H, T, K = q.shape
    q = q / math.sqrt(K)
    state = torch.zeros(B, H, K, v.shape[-1], dtype=q.dtype, device=q.device)
    out = torch.zeros_like(v)
    for t in range(T):
        state = state * log_decay[:, :, t, None, None].exp()
        held = torch.einsum("bhk,bhkv->bhv", k[:, :, t], state)
        correction = beta[:, :, t, None] * (v[:, :, t] - held)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, :, t], correction)
        out[:, :, t] = torch.einsum("bhk,bhkv->bhv", q[:, :, t], state)
    return out


class GatedDeltaNet(nn.Module):
    """DeltaNet's layer with a decay, and a swish gate on the output."""

    def __init__(self, config: CausalConfig, layer: int):
        super().__init__()
        C, H, self.size = config.hidden, config.heads, config.head_size
        self.query, self.key, self.value, self.gate, self.out = (
            nn.Linear(C, C, bias=False) for _ in range(5)
        )
        self.query_conv, self.key_conv, self.value_conv = (ShortConvolution(C) for _ in range(3))
        self.beta, self.decay = nn.Linear(C, H, bias=False), nn.Linear(C, H, bias=False)
        dt = torch.exp(torch.linspace(math.log(0.001), math.log(0.1), H))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.A_log = nn.Parameter(torch.log(torch.linspace(1, 16, H)))
        self.norm = RMSNorm(self.size, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = split_heads(self.query_conv(self.query(x)), self.size)
        k = split_heads(self.key_conv(self.key(x)), self.size)
        v = split_heads(self.value_conv(self.value(x)), self.size)
        beta = torch.sigmoid(self.beta(x)).transpose(1, 2)
        log_decay = -self.A_log.exp() * F.softplus(self.decay(x) + self.dt_bias)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        out = gated_delta_rule(q, k, v, log_decay.transpose(1, 2), beta)
        return self.out(merge_heads(self.norm(out)) * F.silu(self.gate(x)))


PRESETS = frame.presets(GatedDeltaNet, CausalConfig())
tiny = PRESETS["tiny"]
