"""The frame that all example models share: Llama 3 with the token mixer of some layers left open.

RMSNorm, SwiGLU, grouped-query softmax attention with rotary positions, and a layer pattern such as
``"LLLN"`` (L a layer with the model's own mixer, N a softmax one) repeated over the depth.

Letters in comments: B batch, T tokens, C hidden size, H query heads, G key/value heads, D head size;
K and V are a mixer's sizes of a key and a value.
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


@dataclass(frozen=True)
class Config:
    """Shape of a model; a model whose mixer has settings of its own extends it.

    Args:
        vocab: tokens in the vocabulary.
        layers, hidden, heads, kv_heads, mlp: depth, C, H, G and the width of the SwiGLU. A mixer of the
            linear family has H heads of each kind.
        pattern: one letter a layer, repeated: ``"L"`` pure linear, ``"LLLN"`` a 1/4 hybrid, ``"N"`` all
            softmax.
        causal: a language model; otherwise every token sees every token, as in a masked language model.
        dropout: after the embedding and on each residual branch.
        tie_embeddings: the output projection is the embedding itself.
    """

    vocab: int = 256
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 384
    pattern: str = "LLLN"
    causal: bool = True
    dropout: float = 0.0
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if not self.pattern or set(self.pattern) - set("LN"):
            raise ValueError(f"pattern must be a string of L (linear) and N (softmax), got {self.pattern!r}")
        if self.hidden % self.heads or self.head_size % 2:
            raise ValueError(f"hidden={self.hidden} must give each of heads={self.heads} an even size")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def kinds(self) -> str:
        """One letter for each layer: the pattern repeated over the depth."""
        return "".join(self.pattern[i % len(self.pattern)] for i in range(self.layers))


@dataclass(frozen=True)
class CausalConfig(Config):
    """Of a model whose mixer has no form in which every token sees every token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.causal:
            raise ValueError("causal=False is not defined for this mixer: its memory runs forward in time")


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dim."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # at least float32, but never less than x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """y = down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.mlp, bias=False)
        self.up = nn.Linear(config.hidden, config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rotary_table(
    length: int, size: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D/2] of  t * theta^(-2i/D)  for position t and pair i."""
    wide = torch.promote_types(dtype, torch.float32)  # bfloat16 cannot count past 256
    position = torch.arange(length, dtype=wide, device=device)
    frequency = theta ** (-torch.arange(0, size, 2, dtype=wide, device=device) / size)
    angle = position[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) of x [B, heads, T, D] by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def split_heads(x: Tensor, size: int) -> Tensor:
    """[B, T, H * size] -> [B, H, T, size]."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H * D]."""
    return x.transpose(1, 2).flatten(2)


class ShortConvolution(nn.Module):
    """silu of a causal depthwise convolution: y_t = silu(sum_i w_i x_{t - k + 1 + i}), x [B, T, C]."""

    def __init__(self, channels: int, kernel: int = 4):
        super().__init__()
        self.convolution = nn.Conv1d(channels, channels, kernel, groups=channels, padding=kernel - 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x.transpose(1, 2))[..., : x.shape[1]]  # what saw the future is cut off
        return F.silu(y).transpose(1, 2)


class SoftmaxAttention(nn.Module):
    """Grouped-query softmax attention: x [B, T, C] -> [B, T, C]."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        C, D = config.hidden, config.head_size
        self.query = nn.Linear(C, config.heads * D, bias=False)
        self.key = nn.Linear(C, config.kv_heads * D, bias=False)
        self.value = nn.Linear(C, config.kv_heads * D, bias=False)
        self.out = nn.Linear(config.heads * D, C, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        D = self.config.head_size
        q, k, v = (split_heads(project(x), D) for project in (self.query, self.key, self.value))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.config.causal, enable_gqa=True)
        return self.out(merge_heads(out))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `attention` is the layer's mixer."""

    def __init__(self, config: Config, attention: nn.Module):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


Mixer = Callable[[Any, int], nn.Module]
"""Builds the mixer of layer i for a config: a module of (x [B, T, C], cos, sin [T, D/2]) -> [B, T, C], whose
last projection is called `out`."""


class Model(nn.Module):
    """The whole model: token ids in, logits or the loss out."""

    def __init__(self, config: Config, mixer: Mixer):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config, mixer(config, i) if kind == "L" else SoftmaxAttention(config))
            for i, kind in enumerate(config.kinds)
        )
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Normal, std 0.02; ends of residual branches smaller, so that their sum stays in range (GPT-2)."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                is_branch_end = name.endswith(("attention.out", "mlp.down"))
                scale = 1 / math.sqrt(2 * self.config.layers) if is_branch_end else 1.0
                nn.init.normal_(module.weight, std=0.02 * scale)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict a token at each position.

        Args:
            ids: int64 [B, T].
            labels: int64 [B, T], -100 where a position does not count. In a causal model position t predicts
                label t + 1, so `labels=ids` trains a language model; otherwise position t predicts label t.
        Returns:
            logits [B, T, vocab], or with labels the mean cross-entropy, a scalar.
        """
        x = self.dropout(self.embedding(ids))
        config = self.config
        cos, sin = rotary_table(ids.shape[1], config.head_size, config.rope_theta, x.dtype, x.device)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        if labels is None:
            return logits
        if config.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    def example_inputs(self, seq: int, batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
        """Random `ids` and `labels` [batch, seq] on the default device, as keyword arguments of `forward`."""
        if torch.get_default_device().type == "meta":
            ids = torch.zeros(batch, seq, dtype=torch.int64)
        else:
            generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
            ids = torch.randint(self.config.vocab, (batch, seq), generator=generator)
        return {"ids": ids, "labels": ids.clone()}


def presets(mixer: Mixer, config: Config) -> dict[str, Callable[..., Model]]:
    """The presets of a variant: ``"tiny"``, which trains on two cores. Overrides are fields of `config`."""

    def tiny(**overrides: Any) -> Model:
        return Model(replace(config, **overrides), mixer)

    return {"tiny": tiny}
