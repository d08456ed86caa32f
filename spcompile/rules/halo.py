"""Neighbouring tokens: the positions just before and just behind a rank's own."""

from __future__ import annotations

import torch
from torch import Tensor

from spcompile.neighbours import neighbours
from spcompile.rules.base import Context

__all__ = ["halo"]


def halo(context: Context, x: Tensor, dim: int, left: int, right: int, fill: float | None = None) -> Tensor:
    """``x``, whose ``dim`` holds this rank's block of positions, with its neighbours' positions around it.

    Args:
        left, right, fill: see :func:`spcompile.neighbours.neighbours`.
    Returns:
        ``x`` with left + block + right entries along ``dim``.
    """
    if left + right == 0:
        return x
    found = neighbours(x, dim, left, right, context.group, context.rank(x.device), fill)
    return torch.cat([found.narrow(dim, 0, left), x, found.narrow(dim, left, right)], dim)
