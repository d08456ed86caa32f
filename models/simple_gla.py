"""Simple gated linear attention (fla's simple GLA): one data-dependent decay for each token and head.

    S_t = a_t S_{t-1} + k_t^T v_t        o_t = q_t S_t / sqrt(D)        log a_t = logsigmoid(w . x_t) / 16

In its parallel form, quadratic in the length: the decay from s to t is the exponential of the difference of
cumulative sums of log a.
"""

from __future__ import annotations

import math

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models import frame
from models.frame import CausalConfig, RMSNorm, merge_heads, split_heads


def simple_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """o_t = sum_{s <= t} a_{s+1} ... a_t (q_t . k_s) v_s / sqrt(D), all [B, H, T, D]; log_decay [B, H, T]."""
    total = log_decay.cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (scores * decay) @ v


class SimpleGLA(nn.Module):
    """A norm for each head, and a swish gate."""

    def __init__(self, config: CausalConfig, layer: int):
        super().__init__()
        C, self.size = config.hidden, config.head_size
        self.query, self.key, self.value, self.gate, self.out = (
            nn.Linear(C, C, bias=False) for _ in range(5)
        )
        self.decay = nn.Linear(C, config.heads)
        self.norm = RMSNorm(self.size, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (split_heads(project(x), self.size) for project in (self.query, self.key, self.value))
        log_decay = F.logsigmoid(self.decay(x)).transpose(1, 2) / 16
        out = simple_gla(q, k, v, log_decay)
        return self.out(merge_heads(self.norm(out)) * F.silu(self.gate(x)))


PRESETS = frame.presets(SimpleGLA, CausalConfig())
tiny = PRESETS["tiny"]
