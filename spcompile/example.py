"""A small hybrid model to try things on, in plain PyTorch: textbook linear attention and softmax attention.

It knows nothing of spcompile, as a user's model would not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Block", "Model", "tiny"]


class Block(nn.Module):
    """Attention and an MLP, each added to its input: x [B, T, C] -> [B, T, C].

    Args:
        hidden: C.
        heads: of attention; each has C / heads entries.
        linear: linear attention, elu(q) + 1 times elu(k) + 1 under a causal mask; else softmax attention.
    """

    def __init__(self, hidden: int, heads: int, linear: bool) -> None:
        super().__init__()
        self.heads, self.linear = heads, linear
        self.norm, self.mlp_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.linear:
            scores = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1)
            attended = F.layer_norm(scores.tril() @ v, v.shape[-1:])
        else:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    """Token ids [B, T] in; logits [B, T, vocab] out, or the mean cross entropy where labels are given."""

    def __init__(self, pattern: str, vocab: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.vocab = vocab
        self.embedding = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, kind == "L") for kind in pattern)
        self.head = nn.Linear(hidden, vocab)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return logits if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def example_inputs(self, seq: int, batch: int = 1) -> dict[str, Tensor]:
        """The arguments of one training call."""
        ids = torch.randint(0, self.vocab, (batch, seq))
        return {"ids": ids, "labels": ids.clone()}


def tiny(pattern: str = "LLLN", vocab: int = 256, hidden: int = 64, heads: int = 4) -> Model:
    """A model of some 0.2 M parameters.

    Args:
        pattern: a letter for each layer, L for linear attention and N for softmax attention.
        vocab, hidden, heads: sizes; heads divides hidden.
    Raises:
        ValueError: another letter, or heads that do not divide hidden.
    """
    if not pattern or set(pattern) - {"L", "N"}:
        raise ValueError(f"pattern must be letters L and N, got {pattern!r}")
    if hidden % heads:
        raise ValueError(f"heads={heads} does not divide hidden={hidden}")
    return Model(pattern, vocab, hidden, heads)
