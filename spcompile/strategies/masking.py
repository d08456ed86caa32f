"""Padding, and the ranks that hold a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from spcompile.collectives import Group, Sequence, local_valid

__all__ = ["masked", "others", "shared"]


def others(sequence: Sequence | None) -> Group | None:
    """The ranks to talk to, or None where this rank holds all there is."""
    return None if sequence is None or sequence.group.size == 1 else sequence.group


def shared(queries: Sequence | None, keys: Sequence | None) -> Group | None:
    """The ranks that hold queries and keys of the same tokens; None where there are none, or others do."""
    group = others(queries)
    if group is None or queries is None or keys is None:
        return None
    return group if (queries.block, queries.length) == (keys.block, keys.length) else None


def masked(sequence: Sequence | None, dim: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with zeros where dim ``dim`` holds padding, by ``where`` so that NaN goes too.

    In a sum over tokens every operand must be masked: masking one lets 0 * NaN through.
    """
    if sequence is None or not sequence.padded:
        return tensors
    valid = local_valid(sequence, tensors[0].device)
    return tuple(torch.where(valid.reshape(-1, *[1] * (x.dim() - 1 - dim)), x, 0.0) for x in tensors)
