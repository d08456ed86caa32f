"""What a call of ``spcompile::linear_attention`` is made of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Operands", "Options"]


class Operands(NamedTuple):
    """The tensors of ``spcompile::linear_attention``."""

    q: Tensor  # [B, H, T, K]
    k: Tensor  # [B, H, T, K]
    v: Tensor  # [B, H, T, V]
    log_decay: Tensor | None = None  # broadcastable to [B, H, T, K]
    beta: Tensor | None = None  # [B, H, T, 1]
    initial_state: Tensor | None = None  # [B, H, K, V]


class Options(NamedTuple):
    """The other arguments of ``spcompile::linear_attention``."""

    causal: bool
    scale: float
    exclusive: bool = False
    reverse: bool = False
