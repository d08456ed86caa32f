"""What the kernels share: tiles of strided operands, and decays as sums over exactly the tokens between.

A *walk* is the order in which tokens are met: that of time, or back from the last. Step w is token w, or
N - 1 - w with N the tokens T rounded up to whole segments, so that both ways have the same chunks. Three
readings of the state are told apart; with U the state and own the step's k^T v:

    INCLUSIVE   U = a U + own, then read        the forward of linear attention
    EXCLUSIVE   read, then U = a U + own        that of an exclusive one; either backward of it
    SOURCE      U = U + own, read, then U = a U   the backward of an inclusive one, which walks the other way

so the decay from step j to a later step i runs over j < l <= i, j < l < i and j <= l < i.

The loop of a walk is ``tl.range(..., disable_licm=True)``: what is the same in all chunks, as addresses are,
is computed again in each. Held over the loop it takes 130 of the 255 registers of a thread, and others spill.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "EXCLUSIVE",
    "INCLUSIVE",
    "SOURCE",
    "chunks",
    "close",
    "gates",
    "offset",
    "pairwise",
    "place",
    "start",
    "tile",
    "to_end",
]

INCLUSIVE, EXCLUSIVE, SOURCE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def place(pid, parts, n_segments):
    """Which part, segment, and batch entry and head a program has: neighbours share a segment's operands."""
    of_part, pid = pid % parts, pid // parts
    return of_part, pid % n_segments, pid // n_segments


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
def _running(g, FLIP: tl.constexpr):
    """Sums up to each step in two parts, whose differences are as exact as sums of what lies between.

    The high part is of multiples of 1/128, at most 64,000 in size: those have at most 23 bits, and all their
    sums are exact. The low part is of numbers of at most 1/256. A decay of e^-1000 is as good as one of more.
    """
    g = tl.minimum(tl.maximum(g, -1000.0), 1000.0)
    high = tl.floor(g * 128.0 + 0.5) * (1.0 / 128.0)
    return tl.cumsum(high, 0, reverse=FLIP), tl.cumsum(g - high, 0, reverse=FLIP)


@triton.jit
def pairwise(g, own, C: tl.constexpr, READ: tl.constexpr, FLIP: tl.constexpr = False):
    """``[C (i), C (j)]``: the decay from step j to step i of a chunk, 0 where i does not read j.

    ``g``: the log decay of step i where the reading is inclusive, else that of the step before it (0 at the
    first); ``own``: that of step i, read where the reading is exclusive. FLIP: rows and columns are the steps
    from the last one on.
    """
    i = tl.arange(0, C)
    behind = (i[None, :] - i[:, None]) if FLIP else (i[:, None] - i[None, :])
    high, low = _running(g, FLIP)
    if READ == EXCLUSIVE:
        past, past_low = _running(own, FLIP)
        inside = behind > 0
    else:
        past, past_low = high, low
        inside = behind >= 0
    sums = (high[:, None] - past[None, :]) + (low[:, None] - past_low[None, :])
    return tl.where(inside, tl.exp(sums), 0.0)


@triton.jit
def to_end(
    g, own, step, of_token, T, N,
    C: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr, FLIP: tl.constexpr = False,
):  # fmt: skip
    """``[C]``: the decay from each step of a chunk to the chunk's end; FLIP: from the last step on."""
    if READ == SOURCE:
        later = own
    else:
        i = tl.arange(0, C)
        later = gates(g, step + 1, (i > 0) if FLIP else (i + 1 < C), of_token, T, N, REVERSE)
    return tl.exp(tl.cumsum(later, 0, reverse=not FLIP))


@triton.jit
def start(
    states, logs, carry, n, which, n_segments, dk, dv, sn, ss, sk, sv,
    K: tl.constexpr, V: tl.constexpr, FOLD: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """``[dk, dv]``: the state before a segment.

    FOLD: made of what the segments before it do, ``states`` and ``logs``, from ``carry`` (each may be None:
    0); else it is there, ``states``. A carry lies as one of the states does. AXIS: along which dim the logs
    of a segment lie, 0 or 1; None: there is one of each.
    """
    entry = dk.to(tl.int64)[:, None] * sk + dv.to(tl.int64)[None, :] * sv
    inside = (dk < K)[:, None] & (dv < V)[None, :]
    n = n.to(tl.int64)
    if not FOLD:
        state = tl.load(states + (n * sn + which.to(tl.int64) * ss) + entry, mask=inside, other=0.0)
    else:
        state = tl.zeros(entry.shape, tl.float32)
        if carry is not None:
            state = tl.load(carry + n * (K * V) + entry, mask=inside, other=0.0)
        if states is not None:
            for earlier in range(which):
                at = n * n_segments + tl.cast(earlier, tl.int64)
                if logs is not None:
                    if AXIS == 0:
                        log = tl.load(logs + at * K + dk, mask=dk < K, other=0.0)[:, None]
                    elif AXIS == 1:
                        log = tl.load(logs + at * V + dv, mask=dv < V, other=0.0)[None, :]
                    else:
                        log = tl.load(logs + at)
                    state *= tl.exp(log)
                p = states + (n * sn + tl.cast(earlier, tl.int64) * ss)
                state += tl.load(p + entry, mask=inside, other=0.0)
    return state


@triton.jit
def close(final, state, n, which, n_segments, dk, dv, K: tl.constexpr, V: tl.constexpr):
    """Store ``final [N, K, V]``, the state after the last segment; None: nobody asked."""
    if final is not None:
        if which == n_segments - 1:
            p = final + n.to(tl.int64) * (K * V) + dk[:, None] * V + dv[None, :]
            tl.store(p, state, mask=(dk < K)[:, None] & (dv < V)[None, :])
