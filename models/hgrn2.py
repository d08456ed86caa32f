"""HGRN-2 (arXiv 2404.07904): gated recurrent layers with outer-product states; the key is one minus the gate.

    S_t = Diag(f_t) S_{t-1} + (1 - f_t)^T v_t        o_t = q_t S_t        f_t = b + (1 - b) sigmoid(g(x_t))

The lower bounds b, learned, grow with the depth, so that deep layers forget slowly: b of layer l is the sum
of a softmax over the layers before it. Written token by token, on log f as the authors' code is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models import frame
from models.frame import CausalConfig, RMSNorm, merge_heads, split_heads


def hgrn2(q: Tensor, log_forget: Tensor, v: Tensor) -> Tensor:
    """The recurrence above: q, log_forget [B, H, T, K], v [B, H, T, V] -> [B, H, T, V]."""
    B, H, T, K = q.shape
    state = torch.zeros(B, H, K, v.shape[-1], dtype=q.dtype, device=q.device)
    outs = []
    for t in range(T):
        f = log_forget[:, :, t, :, None].exp()
        state = f * state + (1 - f) * v[:, :, t, None, :]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state))
    return torch.stack(outs, dim=2)


class HGRN2(nn.Module):
    """silu of the queries; the output normed. `bounds` [layers, C] is one parameter of all layers."""

    def __init__(self, config: CausalConfig, layer: int, bounds: nn.Parameter):
        super().__init__()
        C, self.size, self.layer = config.hidden, config.head_size, layer
        self.query, self.forget, self.value, self.out = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.norm = RMSNorm(C, config.norm_eps)
        self.bounds = bounds

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shares = self.bounds.softmax(0)
        lower = shares[: self.layer].sum(0)
        forget = lower + (1 - lower) * torch.sigmoid(self.forget(x))
        q, f, v = (split_heads(y, self.size) for y in (F.silu(self.query(x)), forget.log(), self.value(x)))
        return self.out(self.norm(merge_heads(hgrn2(q, f, v))))


def tiny(**overrides: Any) -> frame.Model:
    """A model that trains on two cores; overrides are fields of `CausalConfig`."""
    config = CausalConfig(**overrides)
    bounds = nn.Parameter(torch.zeros(config.layers, config.hidden))
    return frame.Model(config, lambda config, layer: HGRN2(config, layer, bounds))


PRESETS = {"tiny": tiny}
