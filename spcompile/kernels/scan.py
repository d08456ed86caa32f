"""The affine recurrence S_t = a_t S_{t-1} + b_t, one step at a time, each step over all leading dims at once.

On NVIDIA GPUs that is one kernel (``kernels/triton/scan.py``).

It walks over chunks (a few per thousand tokens) inside linear attention and over tokens where a user's own
recurrence is scanned. The loop is inside an operator, so a graph has the same size for any number of steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spcompile.kernels.choice import without_our_kernels

__all__ = ["own_dtypes", "scan", "state_dtype"]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of memory states and of sums over tokens: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def own_dtypes(x: Tensor) -> Any:
    """An operator computes in its own dtypes, whatever autocast says where it is called."""
    return torch.autocast(x.device.type, enabled=False)


def scan(
    a: Tensor | None, b: Tensor, initial: Tensor | None, matrix: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """States before each step, and the one after the last.

    Args:
        a: None (1), or broadcastable to b (elementwise), or ``[*L, T, K, K]`` if ``matrix``.
        b: ``[*L, T, K, V]``; real or complex.
        initial: ``[*L, K, V]`` or None (zero).
        reverse: the last step comes first.
    Returns:
        before ``[*L, T, K, V]`` and final ``[*L, K, V]`` in b's dtype; the state itself is kept in float32 if
        b's dtype is narrower.
    """
    if without_our_kernels(b.device) is None:
        # Triton takes its time to load, and is not everywhere.
        from spcompile.kernels.triton import scan as fused

        if fused.supports(a, b, matrix):
            return fused.scan(a, b, initial, matrix, reverse)
    wide = b.dtype if b.dtype.is_complex else state_dtype(b.dtype)
    steps = b.shape[-3]
    shape = (*b.shape[:-3], *b.shape[-2:])
    state = b.new_zeros(shape, dtype=wide) if initial is None else initial.to(wide).expand(shape)
    before = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    if a is not None and not matrix:
        a = a.to(wide).expand(*b.shape[:-2], *a.shape[-2:])
    for t in reversed(range(steps)) if reverse else range(steps):
        before.select(-3, t).copy_(state)
        added = b.select(-3, t)
        if a is None:
            state = state + added
        elif matrix:
            state = torch.matmul(a.select(-3, t).to(wide), state) + added
        else:
            state = torch.addcmul(added.to(wide), a.select(-3, t), state)
    # A sum takes the strides of its terms; compiled code counts on those that the operator's fake promises.
    return before, state.to(b.dtype).clone(memory_format=torch.contiguous_format)
