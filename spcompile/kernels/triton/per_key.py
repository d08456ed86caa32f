"""What kernels with a decay per key share: decays between the steps of a block, and sums over its rows.

A block is ``BLOCK`` steps, or a chunk. A decay is split at an end of one, so that no exponent is positive,
and is a sum over exactly the steps between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spcompile.kernels.triton.tiles import INCLUSIVE, SOURCE, tile

__all__ = [
    "BLOCK",
    "decay_from_start",
    "decay_to_end",
    "load",
    "load_row",
    "past_keys",
    "sum_behind",
    "sum_rows",
]

BLOCK = tl.constexpr(16)


@triton.jit
def load(
    x, step, inside, d, of_token, T, N,
    D: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``[steps, d]``, 0 where steps are not ``inside``."""
    p, valid = tile(x, step, d, of_token, T, N, D, REVERSE)
    found = tl.load(p, mask=valid & inside, other=0.0)
    return found.to(tl.float32) if WIDE else found


@triton.jit
def load_row(x, step, d, of_token, T, N, D: tl.constexpr, REVERSE: tl.constexpr):
    """``[d]``: one step, float32."""
    token = N - 1 - step if REVERSE else step
    valid = (d < D) & (token < T)
    return tl.load(x + token.to(tl.int64) * of_token + d, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def decay_from_start(
    g, first, d, gt, T, N, M: tl.constexpr,
    D: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The decay from the start of M steps to each step's reading, and the log of that of all of them."""
    i = tl.arange(0, M)
    if READ == INCLUSIVE:
        logs = load(g, first + i, True, d, gt, T, N, D, REVERSE, True)
        through = tl.sum(logs, 0)
    else:
        logs = load(g, first + i - 1, (i > 0)[:, None], d, gt, T, N, D, REVERSE, True)
        through = tl.sum(logs, 0) + load_row(g, first + M - 1, d, gt, T, N, D, REVERSE)
    return tl.exp(tl.cumsum(logs, 0)), through


@triton.jit
def decay_to_end(
    g, first, d, gt, T, N, M: tl.constexpr,
    D: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The decay from each step's write to the end of M steps, and the log of that of all of them."""
    i = tl.arange(0, M)
    if READ == SOURCE:
        logs = load(g, first + i, True, d, gt, T, N, D, REVERSE, True)
        through = tl.sum(logs, 0)
    else:
        logs = load(g, first + i + 1, (i + 1 < M)[:, None], d, gt, T, N, D, REVERSE, True)
        through = tl.sum(logs, 0) + load_row(g, first, d, gt, T, N, D, REVERSE)
    return tl.exp(tl.cumsum(logs, 0, reverse=True)), through


@triton.jit
def sum_behind(
    x,
    M: tl.constexpr, OWN: tl.constexpr, EARLIER: tl.constexpr, PARTS: tl.constexpr,
    WALK: tl.constexpr = False,
):  # fmt: skip
    """The sum of the rows behind each row (before it if EARLIER; with its own if OWN).

    By products with ones, as no row is to be subtracted again: three bf16 numbers hold an fp32 one.
    """
    i = tl.arange(0, M)
    gap = 0 if OWN else 1
    ones = (i[:, None] >= i[None, :] + gap) if EARLIER else (i[:, None] + gap <= i[None, :])
    return sum_rows(ones, x, PARTS, WALK)


@triton.jit
def sum_rows(ones, x, PARTS: tl.constexpr, WALK: tl.constexpr = False):
    """The sum of the rows that ``ones`` has for each row.

    WALK: within a walk, whose loads a loop in it would keep from being under way early. Elsewhere it is a
    loop, unless of few rows: that takes less to compile, and of products that follow from each other both
    groups of warps would hold all columns.
    """
    UNROLLED: tl.constexpr = WALK or x.shape[0] < 32
    total = tl.zeros(x.shape, tl.float32)
    for _ in tl.range(PARTS, loop_unroll_factor=PARTS if UNROLLED else 1):
        part = x.to(tl.bfloat16)
        total = tl.dot(ones.to(tl.bfloat16), part, total)
        x -= part.to(tl.float32)
    return total


@triton.jit
def past_keys(
    k, g, first, d, between, kt, gt, T, N,
    K: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Keys of a block, decayed to its end and by what is ``between``; and the log of its decay."""
    keys = load(k, first + tl.arange(0, BLOCK), True, d, kt, T, N, K, REVERSE, True)
    end, through = decay_to_end(g, first, d, gt, T, N, BLOCK, K, READ, REVERSE)
    return keys * end * tl.exp(between)[None, :], through
