"""Mamba-2's state space duality (arXiv 2405.21060): a data-dependent decay for each token and head.

    S_t = exp(dt_t A) S_{t-1} + B_t^T (dt_t x_t)        y_t = C_t S_t + D x_t        A < 0, dt_t > 0

C, B and x are what queries, keys and values are elsewhere; all heads share C and B. Written as the paper's
"quadratic mode": a matrix L = exp(segsum(dt A)) masks C B^T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models import frame
from models.frame import CausalConfig, RMSNorm, ShortConvolution, merge_heads, split_heads


@dataclass(frozen=True)
class Config(CausalConfig):
    """The frame's, and

    Args:
        state: the size of a state for each channel, K.
        expand: how much wider than the hidden size the layer is inside.
        kernel: tokens that the short convolution sees.
    """

    state: int = 16
    expand: int = 2
    kernel: int = 4


def segsum(x: Tensor) -> Tensor:
    """x [..., T] -> [..., T, T]: sum of x_{s+1} ... x_t at row t and column s <= t, -inf above."""
    T = x.shape[-1]
    total = torch.cumsum(x, dim=-1)
    sums = total[..., :, None] - total[..., None, :]
    mask = torch.tril(torch.ones(T, T, device=x.device, dtype=torch.bool))
    return sums.masked_fill(~mask, -torch.inf)


def ssd(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """y = (exp(segsum(log_decay)) * (C B^T)) x.

    Args:
        x: [B, H, T, V], already times dt.
        log_decay: [B, H, T], dt A.
        B, C: [B, T, K], of all heads.
    Returns:
        [B, H, T, V]. Work and memory are quadratic in T.
    """
    L = torch.exp(segsum(log_decay))
    scores = (C @ B.transpose(-1, -2))[:, None]
    return (L * scores) @ x


class Mamba2(nn.Module):
    """One projection of everything, a short convolution of x, B and C, and a gated norm."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        hidden, H, self.state = config.hidden, config.heads, config.state
        self.inner = config.expand * hidden
        self.size = self.inner // H
        self.project = nn.Linear(hidden, 2 * self.inner + 2 * self.state + H, bias=False)
        self.convolution = ShortConvolution(self.inner + 2 * self.state, config.kernel)
        self.norm = RMSNorm(self.inner, config.norm_eps)
        self.out = nn.Linear(self.inner, hidden, bias=False)
        # softplus(dt_bias) is between 0.001 and 0.1, -A between 1 and 16: some heads forget soon, some late.
        dt = torch.exp(torch.linspace(math.log(0.001), math.log(0.1), H))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.log(torch.linspace(1, 16, H)))
        self.D = nn.Parameter(torch.ones(H))

    def forward(self, u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        inner, K = self.inner, self.state
        z, xBC, dt = self.project(u).split([inner, inner + 2 * K, self.dt_bias.shape[0]], dim=-1)
        x, B, C = self.convolution(xBC).split([inner, K, K], dim=-1)
        dt = F.softplus(dt + self.dt_bias).transpose(1, 2)
        A = -torch.exp(self.A_log)
        x = split_heads(x, self.size)
        y = ssd(x * dt[..., None], dt * A[:, None], B, C) + self.D[:, None, None] * x
        return self.out(self.norm(merge_heads(y) * F.silu(z)))


PRESETS = frame.presets(Mamba2, Config())
tiny = PRESETS["tiny"]
