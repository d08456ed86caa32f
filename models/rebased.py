"""ReBased (arXiv 2402.10644): Based with a learned quadratic kernel in the place of the Taylor expansion.

    o_t = sum_{s <= t} (f(q_t) . f(k_s))^2 v_s  /  sum_{s <= t} (f(q_t) . f(k_s))^2    f(x) = g norm(x) + b

which is linear attention with the feature map f(x) (x) f(x); g and b of queries and keys are learned apart.
Written on the scores, quadratic in the length.
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
        feature: the size of a query and a key, K: the state has K^2 rows.
    """

    feature: int = 8


def rebased(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """The formula above, f already applied: q, k [B, H, T, K], v [B, H, T, V] -> [B, H, T, V]."""
    T, K = q.shape[-2:]
    weights = (q @ k.transpose(-1, -2) / math.sqrt(K)) ** 2
    weights = weights * torch.tril(torch.ones(T, T, dtype=q.dtype, device=q.device))
    return (weights @ v) / (weights.sum(-1, keepdim=True) + eps)


class ReBased(nn.Module):
    """Queries and keys are projected to a few features and normed."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        C, H, self.feature, self.size = config.hidden, config.heads, config.feature, config.head_size
        self.query, self.key = (nn.Linear(C, H * self.feature, bias=False) for _ in range(2))
        self.value, self.out = (nn.Linear(C, C, bias=False) for _ in range(2))
        self.query_norm, self.key_norm = (nn.LayerNorm(self.feature) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.query_norm(split_heads(self.query(x), self.feature))
        k = self.key_norm(split_heads(self.key(x), self.feature))
        return self.out(merge_heads(rebased(q, k, split_heads(self.value(x), self.size))))


PRESETS = frame.presets(ReBased, Config())
tiny = PRESETS["tiny"]
