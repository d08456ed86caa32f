"""What a call of softmax attention is made of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Operands", "Options"]


class Operands(NamedTuple):
    """The tensors of ``spcompile::softmax_attention``; Hkv divides H."""

    q: Tensor  # [B, H, T, K]
    k: Tensor  # [B, Hkv, S, K]
    v: Tensor  # [B, Hkv, S, V]
    mask: Tensor | None = None  # bool (True = may see) or additive, broadcastable to [B, H, T, S]


class Options(NamedTuple):
    """The other arguments: row i of q sees key j, if causal, only where ``j <= first_row + i``."""

    causal: bool
    scale: float
    first_row: int = 0
