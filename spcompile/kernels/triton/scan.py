"""The affine recurrence S_t = a_t S_{t-1} + b_t on a GPU: the state in registers, one launch for all steps.

A program has a block of the state's columns, and of its rows where a is no matrix: these do not meet. Reading
and writing b once is all that it does, so nothing but memory bounds it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spcompile.kernels.linear.launch import precise, target_of

__all__ = ["scan", "supports"]

# How a multiplies the state.
_NOT, _ENTRIES, _MATRIX = 0, 1, 2
# Of a matrix and a block of the state, both in shared memory: 128 x 128 and 128 x 32 in fp32.
_LARGEST = 128


def supports(a: Tensor | None, b: Tensor, matrix: bool) -> bool:
    """Whether the kernel takes such operands: real ones, and matrices that fit into shared memory."""
    kinds = (torch.float32, torch.bfloat16, torch.float16, *(() if matrix else (torch.float64,)))
    small = not matrix or b.shape[-2] <= _LARGEST
    return b.dtype in kinds and (a is None or not a.is_complex()) and small and b.numel() > 0


def launch(matrix: bool, rows: int) -> dict[str, int]:
    """Warps and stages of the kernel; matrices of more than 64 rows spill half a kilobyte with others."""
    return {"num_warps": 8, "num_stages": 1} if matrix and rows > 64 else {"num_warps": 4, "num_stages": 3}


@triton.jit
def _scan(
    a, b, initial, before, final, al, at, ak, av, T,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HOW: tl.constexpr, INITIAL: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    of_v, pid = pid % tl.cdiv(V, BV), pid // tl.cdiv(V, BV)
    of_k, pid = pid % tl.cdiv(K, BK), pid // tl.cdiv(K, BK)
    n = pid.to(tl.int64)
    k, v = of_k * BK + tl.arange(0, BK), of_v * BV + tl.arange(0, BV)
    inside = (k < K)[:, None] & (v < V)[None, :]
    entry = k[:, None] * V + v[None, :]
    state = tl.zeros((BK, BV), WIDE)
    if INITIAL:
        state = tl.load(initial + n * (K * V) + entry, mask=inside, other=0.0).to(WIDE)
    of_row = k.to(tl.int64)[:, None] * ak
    for i in tl.range(T, disable_licm=True):  # see ``tiles.py``
        step = tl.cast(T - 1 - i if REVERSE else i, tl.int64)
        here = (n * T + step) * (K * V) + entry
        tl.store(before + here, state.to(before.dtype.element_ty), mask=inside)
        if HOW == 1:
            p = a + (n * al + step * at) + of_row + v.to(tl.int64)[None, :] * av
            state *= tl.load(p, mask=inside, other=0.0).to(WIDE)
        if HOW == 2:
            j = tl.arange(0, BK)
            p = a + (n * al + step * at) + of_row + j.to(tl.int64)[None, :] * av
            factor = tl.load(p, mask=(k < K)[:, None] & (j < K)[None, :], other=0.0).to(WIDE)
            state = tl.dot(factor, state, input_precision=PRECISION)
        state += tl.load(b + here, mask=inside, other=0.0).to(WIDE)
    tl.store(final + n * (K * V) + entry, state.to(final.dtype.element_ty), mask=inside)


def scan(
    a: Tensor | None, b: Tensor, initial: Tensor | None, matrix: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`spcompile.kernels.scan.scan`."""
    (steps, k, v), leading = b.shape[-3:], b.shape[:-3]
    b = b.contiguous()
    before = torch.empty_like(b)
    final = b.new_empty(*leading, k, v)
    block_k = max(16, triton.next_power_of_2(k)) if matrix else min(32, triton.next_power_of_2(k))
    block_v = max(16, min(32, triton.next_power_of_2(v)))
    how, strides = _NOT, (0, 0, 0, 0)
    if a is not None:
        how = _MATRIX if matrix else _ENTRIES
        a = a.expand(*leading, *a.shape[-3:]).reshape(-1, *a.shape[-3:])
        strides = a.expand(-1, steps, k, k if matrix else v).stride()
    wide = tl.float64 if b.dtype == torch.float64 else tl.float32
    programs = b[..., 0, 0, 0].numel() * triton.cdiv(k, block_k) * triton.cdiv(v, block_v)
    with torch.cuda.device_of(b):
        _scan[(programs,)](
            a, b, None if initial is None else initial.contiguous(), before, final, *strides, steps,
            K=k, V=v, BK=block_k, BV=block_v,
            HOW=how, INITIAL=initial is not None, REVERSE=reverse, WIDE=wide,
            PRECISION=precise(target_of(b.device)),
            **launch(matrix, block_k),
        )  # fmt: skip
    return before, final
