"""What the kernels share: tiles of strided operands, and decays as sums over exactly the tokens between.

A *walk* is the order in which tokens are met: that of time, or back from the last. Step w is token w, or
N - 1 - w with N the tokens T rounded up to whole segments, so that both ways have the same chunks. Three
readings of the state are told apart; with U the state and own the step's k^T v:

    INCLUSIVE   U = a U + own, then read        the forward of linear attention
    EXCLUSIVE   read, then U = a U + own        that of an exclusive one; either backward of it
    SOURCE      U = U + own, read, then U = a U   the backward of an inclusive one, which walks the other way

so the decay from step j to a later step i runs over j < l <= i, j < l < i and j <= l < i.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["EXCLUSIVE", "INCLUSIVE", "SOURCE", "chunks", "gates", "offset", "pairwise", "tile", "to_end"]

INCLUSIVE, EXCLUSIVE, SOURCE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def offset(n, heads, of_batch, of_head):
    """Where batch entry and head ``n`` begin; 64 bits wide."""
    n = n.to(tl.int64)
    return (n // heads) * of_batch + (n % heads) * of_head


@triton.jit
def tile(x, step, d, of_token, T, N, D: tl.constexpr, REVERSE: tl.constexpr):
    """Pointers ``[steps, d]``, and which of them are inside."""
    token = N - 1 - step if REVERSE else step
    pointers = x + token.to(tl.int64)[:, None] * of_token + d[None, :]
    return pointers, (token < T)[:, None] & (d < D)[None, :]


@triton.jit
def gates(g, step, inside, of_token, T, N, REVERSE: tl.constexpr):
    """Log decays of steps; 0 where they are not ``inside``."""
    token = N - 1 - step if REVERSE else step
    return tl.load(g + token.to(tl.int64) * of_token, mask=inside & (token < T), other=0.0).to(tl.float32)


@triton.jit
def chunks(which, segment, T, N, C: tl.constexpr, REVERSE: tl.constexpr):
    """The first step of a segment, and the one behind its last; chunks of padding are left out."""
    first, last = which * segment, which * segment + segment
    if REVERSE:
        return tl.maximum(first, (N - T) // C * C), last
    else:
        return first, tl.minimum(last, T)


@triton.jit
def pairwise(g, C: tl.constexpr, READ: tl.constexpr):
    """``[C (i), C (j)]``: the decay from step j to step i of a chunk, 0 where i does not read j.

    ``g``: the log decay of step i where the reading is inclusive, else that of the step before it (0 at the
    first), so that the sums run over exactly the steps between.
    """
    i = tl.arange(0, C)
    gap = 1 if READ == EXCLUSIVE else 0
    sums = tl.cumsum(tl.where(i[:, None] > i[None, :] + gap, g[:, None], 0.0), 0)
    return tl.where(i[:, None] >= i[None, :] + gap, tl.exp(sums), 0.0)


@triton.jit
def to_end(g, own, step, of_token, T, N, C: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr):
    """``[C]``: the decay from each step of a chunk to the chunk's end."""
    if READ == SOURCE:
        later = own
    else:
        later = gates(g, step + 1, tl.arange(0, C) + 1 < C, of_token, T, N, REVERSE)
    return tl.exp(tl.cumsum(later, 0, reverse=True))
