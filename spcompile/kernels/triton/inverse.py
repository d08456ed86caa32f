"""The triangular systems of a delta rule: what the chunks of a walk solve, whatever state they begin with.

Within a chunk each step corrects what those before it have written: (I + M) y = r, M strictly lower.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spcompile.kernels.triton.tiles import INCLUSIVE, gates, offset, pairwise, tile

__all__ = ["inverse_of", "systems"]


@triton.jit
def systems(
    k, beta, g, systems,
    kb, kh, kt, bb, bh, bt, gb, gh, gt,
    H, T, n_chunks,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, GATED: tl.constexpr, REVERSE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``systems [N, steps, C]``: Z of each chunk; one program for a chunk."""
    pid = tl.program_id(0)
    chunk, n = pid % n_chunks, pid // n_chunks
    N = n_chunks * C
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    step = chunk * C + i
    at = systems + (n.to(tl.int64) * N + step.to(tl.int64))[:, None] * C + i[None, :]
    if (chunk * C + C <= N - T) if REVERSE else (chunk * C >= T):
        tl.store(at, tl.zeros((C, C), systems.dtype.element_ty))  # padding, which no walk reads
        return
    p, inside = tile(k + offset(n, H, kb, kh), step, dk, kt, T, N, K, REVERSE)
    keys = tl.load(p, mask=inside, other=0.0)
    if WIDE:
        keys = keys.to(tl.float32)
    lower = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    if GATED:
        mine = gates(g + offset(n, H, gb, gh), step, True, gt, T, N, REVERSE)
        lower *= pairwise(mine, mine, C, INCLUSIVE)
    lower = tl.where(i[:, None] > i[None, :], lower, 0.0)
    strengths = gates(beta + offset(n, H, bb, bh), step, True, bt, T, N, REVERSE)
    system = lower * strengths[None, :]
    within = inverse_of(system, C, PRECISION)
    within = tl.dot(within, lower, input_precision=PRECISION)
    tl.store(at, within.to(systems.dtype.element_ty))


@triton.jit
def inverse_of(system, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + system)^-1 of a strictly lower ``[C, C]``.

    Blocks of 16 steps are solved by substitution, which loses nothing; the blocks against each other by
    (I + M)^-1 = (I - M) (I + M^2), as M has four blocks below its diagonal and its fourth power is zero.
    """
    i = tl.arange(0, C)
    blocks = (i // 16)[:, None] == (i // 16)[None, :]
    small = tl.where(blocks, system, 0.0)
    within = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for r in range(1, 16):  # row r of every block at once
        row = (i % 16 == r)[:, None]
        known = tl.sum(tl.where(row, small, 0.0), 0)
        known = tl.sum(known[:, None] * within, 0)
        within = tl.where(row & blocks, within - known[None, :], within)
    system = tl.where(blocks, 0.0, system)
    system = tl.dot(within, system, input_precision=PRECISION)
    square = tl.dot(system, system, input_precision=PRECISION)
    within += tl.dot(square, within, input_precision=PRECISION)
    within -= tl.dot(system, within, input_precision=PRECISION)
    return within
