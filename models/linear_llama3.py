"""Linear-Llama3: Llama 3 with some or all softmax attention replaced by linear attention.

The model of the LASP-2 paper (arXiv 2502.07563), in plain PyTorch: RMSNorm, SwiGLU, grouped-query attention,
rotary positions, and a layer pattern such as ``"LLLN"`` (L a linear layer, N a softmax one) repeated over
the depth. Linear attention is written as a textbook writes it, so the causal form is quadratic in the length:
that is what a compiler gets to see, not what it should run.

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

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu+1": lambda x: F.elu(x) + 1,  # positive, so a row sum of scores is a safe divisor
    "silu": F.silu,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class Config:
    """Shape and kind of a Linear-Llama3.

    Args:
        vocab: tokens in the vocabulary.
        layers, hidden, heads, kv_heads, mlp: depth, C, H, G and the width of the SwiGLU.
        pattern: one letter a layer, repeated: ``"L"`` pure linear, ``"LLLN"`` a 1/4 hybrid, ``"N"`` all
            softmax.
        causal: a language model; otherwise every token sees every token, as in a masked language model.
        feature_map: applied to the queries and keys of linear layers, a key of `FEATURE_MAPS`.
        normaliser: divide a linear layer's output by its row's sum of scores.
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
    feature_map: str = "elu+1"
    normaliser: bool = False
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
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {sorted(FEATURE_MAPS)}, got {self.feature_map!r}")
        if self.normaliser and self.feature_map != "elu+1":
            raise ValueError("normaliser=True needs the positive feature_map='elu+1': others may sum to 0")

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def kinds(self) -> str:
        """One letter for each layer: the pattern repeated over the depth."""
        return "".join(self.pattern[i % len(self.pattern)] for i in range(self.layers))


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


class Attention(nn.Module):
    """Grouped-query attention, linear or softmax by `kind`: x [B, T, C] -> [B, T, C]."""

    def __init__(self, config: Config, kind: str):
        super().__init__()
        self.config, self.kind = config, kind
        C, D = config.hidden, config.head_size
        self.query = nn.Linear(C, config.heads * D, bias=False)
        self.key = nn.Linear(C, config.kv_heads * D, bias=False)
        self.value = nn.Linear(C, config.kv_heads * D, bias=False)
        self.out = nn.Linear(config.heads * D, C, bias=False)
        if kind == "L":  # unnormalised sums grow with T: a norm for each head keeps the branch in range
            self.norm = RMSNorm(D, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        D = self.config.head_size
        q = self.query(x).view(B, T, -1, D).transpose(1, 2)
        k = self.key(x).view(B, T, -1, D).transpose(1, 2)
        v = self.value(x).view(B, T, -1, D).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = self.linear(q, k, v) if self.kind == "L" else self.softmax(q, k, v)
        return self.out(out.transpose(1, 2).reshape(B, T, -1))

    def linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = self.config.heads // self.config.kv_heads
        k, v = repeat_heads(k, groups), repeat_heads(v, groups)
        feature = FEATURE_MAPS[self.config.feature_map]
        attend = causal_linear_attention if self.config.causal else linear_attention
        return self.norm(attend(feature(q), feature(k), v, self.config.normaliser))

    def softmax(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.config.causal, enable_gqa=True)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config, kind: str):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config, kind)
        self.mlp_norm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class LinearLlama3(nn.Module):
    """The whole model: token ids in, logits or the loss out."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.kinds)
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Normal, std 0.02; ends of residual branches smaller, so that their sum stays in range (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_branch_end = name.endswith(("attention.out.weight", "mlp.down.weight"))
                scale = 1 / math.sqrt(2 * self.config.layers) if is_branch_end else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

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
