"""Based (arXiv 2402.18668): linear attention with the second-order Taylor expansion of softmax's exponential.

    o_t = sum_{s <= t} p(q_t . k_s / sqrt(K)) v_s / sum_{s <= t} p(q_t . k_s / sqrt(K))
    p(x) = 1 + x + x^2 / 2

which is linear attention with the feature map [1, x, x (x) x / sqrt 2] of small queries and keys. p is at
least 1/2, so that the divisor is safe. Written on the scores, quadratic in the length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from models import frame
from models.frame import CausalConfig, merge_heads, split_heads


@dataclass(frozen=True)
class Config(CausalConfig):
    """The frame's, and

    Args:
        feature: the size of a query and a key, K: the state has 1 + K + K^2 rows.
    """

    feature: int = 8


def based(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula above: q, k [B, H, T, K], v [B, H, T, V] -> [B, H, T, V]. Quadratic in T."""
    T, K = q.shape[-2:]
    scores = q @ k.transpose(-1, -2) / math.sqrt(K)
    weights = 1 + scores + scores**2 / 2
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    weights = weights.masked_fill(~causal, 0)
    return (weights @ v) / weights.sum(-1, keepdim=True)


class Based(nn.Module):
    """Queries and keys are projected to a few features."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        C, H, self.feature, self.size = config.hidden, config.heads, config.feature, config.head_size
        self.query, self.key = (nn.Linear(C, H * self.feature, bias=False) for _ in range(2))
        self.value, self.out = (nn.Linear(C, C, bias=False) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = split_heads(self.query(x), self.feature), split_heads(self.key(x), self.feature)
        return self.out(merge_heads(based(q, k, split_heads(self.value(x), self.size))))


PRESETS = frame.presets(Based, Config())
tiny = PRESETS["tiny"]
