"""Lightning attention (TransNormer, MiniMax; arXiv 2401.04658, 2501.08313): a constant decay of each head.

    S_t = exp(-s) S_{t-1} + k_t^T v_t        o_t = q_t S_t

The slopes s are ALiBi's, 2^(-8 (h + 1) / H), smaller in deeper layers. Parallel form, quadratic in the
length.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models import frame
from models.frame import CausalConfig, RMSNorm, merge_heads, split_heads


def lightning(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """o_t = sum_{s <= t} exp(-slope (t - s)) (q_t . k_s) v_s, all [B, H, T, D]; slopes [H]."""
    T = q.shape[-2]
    row = torch.arange(T, device=q.device)[:, None]
    column = torch.arange(T, device=q.device)[None, :]
    decay = -slopes[:, None, None] * (row - column)
    decay = decay.masked_fill(column > row, float("-inf"))
    return (q @ k.transpose(-1, -2) * torch.exp(decay)) @ v


class Lightning(nn.Module):
    """silu of queries, keys and values; the output normed, then gated by a sigmoid."""

    slopes: Tensor

    def __init__(self, config: CausalConfig, layer: int):
        super().__init__()
        C, H, self.size = config.hidden, config.heads, config.head_size
        self.query, self.key, self.value, self.gate, self.out = (
            nn.Linear(C, C, bias=False) for _ in range(5)
        )
        self.norm = RMSNorm(C, config.norm_eps)
        alibi = 2.0 ** (-8 * torch.arange(1, H + 1, dtype=torch.float32) / H)
        self.register_buffer("slopes", alibi * (1 - layer / max(config.layers - 1, 1) + 1e-5))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            split_heads(F.silu(project(x)), self.size) for project in (self.query, self.key, self.value)
        )
        out = merge_heads(lightning(q, k, v, self.slopes.to(x.dtype)))
        return self.out(self.norm(out) * torch.sigmoid(self.gate(x)))


PRESETS = frame.presets(Lightning, CausalConfig())
tiny = PRESETS["tiny"]
