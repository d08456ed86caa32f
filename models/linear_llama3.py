"""Linear-Llama3: Llama 3 with some or all softmax attention replaced by linear attention.

The model of the LASP-2 paper (arXiv 2502.07563), in plain PyTorch: a layer pattern such as ``"LLLN"`` (L a
linear layer, N a softmax one) repeated over the depth, in the frame of `models.frame`. Linear attention is
written as a textbook writes it, so the causal form is quadratic in the length: that is what a compiler gets
to see, not what it should run.

Letters in comments: B batch, T tokens, C hidden size, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models import frame
from models.frame import RMSNorm, merge_heads, rotate, split_heads

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu+1": lambda x: F.elu(x) + 1,  # positive, so a row sum of scores is a safe divisor
    "silu": F.silu,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class Config(frame.Config):
    """Shape and kind of a Linear-Llama3: the frame's, and

    Args:
        feature_map: applied to the queries and keys of linear layers, a key of `FEATURE_MAPS`.
        normaliser: divide a linear layer's output by its row's sum of scores.
    """

    feature_map: str = "elu+1"
    normaliser: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {sorted(FEATURE_MAPS)}, got {self.feature_map!r}")
        if self.normaliser and self.feature_map != "elu+1":
            raise ValueError("normaliser=True needs the positive feature_map='elu+1': others may sum to 0")


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """[B, G, T, D] -> [B, G * groups, T, D]: each key/value head serves `groups` query heads in a row."""
    B, G, T, D = x.shape
    return x[:, :, None].expand(B, G, groups, T, D).reshape(B, G * groups, T, D)


def causal_linear_attention(q: Tensor, k: Tensor, v: Tensor, normaliser: bool, eps: float = 1e-6) -> Tensor:
    """o_t = sum_{s <= t} (q_t . k_s) v_s / sqrt(D), divided by the sum of those scores if `normaliser`.

    Args:
        q, k, v: [B, H, T, D], the feature map already applied.
    Returns:
        [B, H, T, D]. Work and memory are quadratic in T.
    """
    T, D = q.shape[-2:]
    scores = (q / math.sqrt(D)) @ k.transpose(-2, -1)
    mask = torch.tril(torch.ones(T, T, dtype=scores.dtype, device=scores.device))
    scores = scores * mask
    out = scores @ v
    if normaliser:
        out = out / (scores.sum(-1, keepdim=True) + eps)
    return out


def linear_attention(q: Tensor, k: Tensor, v: Tensor, normaliser: bool, eps: float = 1e-6) -> Tensor:
    """o = q (k^T v) / sqrt(D), divided by q . sum_s k_s / sqrt(D) if `normaliser`: all tokens see all.

    Arguments and result as for `causal_linear_attention`.
    """
    q = q / math.sqrt(q.shape[-1])
    out = q @ (k.transpose(-2, -1) @ v)
    if normaliser:
        out = out / (q @ k.sum(-2)[..., None] + eps)
    return out


class LinearAttention(nn.Module):
    """Grouped-query linear attention: x [B, T, C] -> [B, T, C]."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config = config
        C, D = config.hidden, config.head_size
        self.query = nn.Linear(C, config.heads * D, bias=False)
        self.key = nn.Linear(C, config.kv_heads * D, bias=False)
        self.value = nn.Linear(C, config.kv_heads * D, bias=False)
        self.out = nn.Linear(config.heads * D, C, bias=False)
        # Unnormalised sums grow with T: a norm for each head keeps the branch in range.
        self.norm = RMSNorm(D, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        D, groups = self.config.head_size, self.config.heads // self.config.kv_heads
        q, k, v = (split_heads(project(x), D) for project in (self.query, self.key, self.value))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = repeat_heads(k, groups), repeat_heads(v, groups)
        feature = FEATURE_MAPS[self.config.feature_map]
        attend = causal_linear_attention if self.config.causal else linear_attention
        return self.out(merge_heads(self.norm(attend(feature(q), feature(k), v, self.config.normaliser))))


class LinearLlama3(frame.Model):
    """The whole model: token ids in, logits or the loss out."""

    def __init__(self, config: Config):
        super().__init__(config, LinearAttention)


TINY = Config()
LLAMA_1B = Config(vocab=128_256, layers=16, hidden=2048, heads=16, kv_heads=8, mlp=8192, tie_embeddings=True)
LLAMA_8B = Config(vocab=128_256, layers=32, hidden=4096, heads=32, kv_heads=8, mlp=14_336)


def tiny(**overrides: Any) -> LinearLlama3:
    """A byte-level model of 0.85 M parameters that trains on two cores; overrides are fields of `Config`."""
    return LinearLlama3(replace(TINY, **overrides))


def llama_1b(**overrides: Any) -> LinearLlama3:
    """The paper's 1B model: 16 layers, 2048 hidden, 16 heads; 1.27 B parameters with its tied embedding."""
    return LinearLlama3(replace(LLAMA_1B, **overrides))


def llama_8b(**overrides: Any) -> LinearLlama3:
    """The shape of Llama 3 8B: 8.03 B parameters."""
    return LinearLlama3(replace(LLAMA_8B, **overrides))


PRESETS: dict[str, Callable[..., LinearLlama3]] = {"tiny": tiny, "1b": llama_1b, "8b": llama_8b}


def __getattr__(name: str) -> Any:
    """Let `models.linear_llama3:1b` be looked up like any function, though 1b is no identifier."""
    if name in PRESETS:
        return PRESETS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
