"""Models whose generated code is looked at: two layers, then softmax, in bf16."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, TOKENS = 256, 4, 4096


class Layer(nn.Module):
    """One attention with its residual."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.gates = nn.Linear(WIDTH, 2 * HEADS, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, HEADS, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        decay, beta = (y.transpose(1, 2).unsqueeze(-1) for y in self.gates(x).chunk(2, -1))
        y = self.attend(q, k, v, F.logsigmoid(decay.float()), beta.sigmoid())
        return x + self.out(y.transpose(1, 2).reshape(b, t, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        """As the kind says."""
        if self.kind == "softmax":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.kind == "plain":
            return (q @ k.mT).tril() @ v
        decay = F.logsigmoid(k.float()) if "per key" in self.kind else decay
        given = decay, beta if "delta" in self.kind else None, None, True, 1.0
        return torch.ops.spcompile.linear_attention(q, F.normalize(k, dim=-1), v, *given)[0]


class Model(nn.Module):
    """Layers and a loss."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, kinds))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.float().square().mean()


def made(*kinds: str) -> tuple[nn.Module, list[Tensor]]:
    return Model(*kinds).bfloat16(), [torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16)]


MODELS: dict[str, Callable[[], tuple[nn.Module, list[Tensor]]]] = {
    "plain and softmax": lambda: made("plain", "plain", "softmax"),
    "decay": lambda: made("decay", "decay"),
    "per key": lambda: made("per key", "per key"),
    "delta": lambda: made("delta", "delta"),
    "delta per key": lambda: made("delta per key", "delta per key"),
}
