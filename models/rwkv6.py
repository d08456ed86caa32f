"""RWKV-6, Finch (arXiv 2404.05892): a data-dependent decay for each channel, a bonus for the current token.

    o_t = r_t (S_{t-1} + Diag(u) k_t^T v_t)        S_t = Diag(w_t) S_{t-1} + k_t^T v_t
    w_t = exp(-exp(d(x_t)))

Every projection sees its own mixture of a token and the one before. Written token by token.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models import frame
from models.frame import CausalConfig, RMSNorm, merge_heads, split_heads


def rwkv6(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor) -> Tensor:
    """The recurrence above: r, k, log_decay [B, H, T, K], v [B, H, T, V], bonus u [H, K] -> [B, H, T, V]."""
    B, H, T, K = r.shape
    state = r.new_zeros(B, H, K, v.shape[-1])
    outs = []
    for t in range(T):
        now = k[:, :, t, :, None] * v[:, :, t, None, :]
        seen = state + bonus[:, :, None] * now
        outs.append((r[:, :, t, :, None] * seen).sum(-2))
        state = log_decay[:, :, t].exp()[..., None] * state + now
    return torch.stack(outs, dim=2)


class RWKV6(nn.Module):
    """Time mixing: token shift, a decay of low rank, a norm for each head, a swish gate."""

    def __init__(self, config: CausalConfig, layer: int):
        super().__init__()
        C, H, self.size = config.hidden, config.heads, config.head_size
        self.receptance, self.key, self.value, self.gate, self.out = (
            nn.Linear(C, C, bias=False) for _ in range(5)
        )
        self.mix = nn.Parameter(torch.linspace(0, 1, 5 * C).view(C, 5).t().contiguous())
        self.decay = nn.Parameter(torch.linspace(-6, -1, C))
        self.decay_down, self.decay_up = nn.Linear(C, 16, bias=False), nn.Linear(16, C, bias=False)
        self.bonus = nn.Parameter(torch.linspace(-0.5, 0.5, C).view(H, self.size))
        self.norm = RMSNorm(self.size, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, -1))
        r, k, v, g, w = (x + (before - x) * mix for mix in self.mix)
        decay = -torch.exp(self.decay + self.decay_up(torch.tanh(self.decay_down(w))))
        r, k, v, decay = (
            split_heads(y, self.size) for y in (self.receptance(r), self.key(k), self.value(v), decay)
        )
        out = rwkv6(r, k, v, decay, self.bonus)
        return self.out(merge_heads(self.norm(out)) * F.silu(self.gate(g)))


PRESETS = frame.presets(RWKV6, CausalConfig())
tiny = PRESETS["tiny"]
