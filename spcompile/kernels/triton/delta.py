"""The delta rule with one decay per token and head, or none, over segments of a walk (``segments.py``).

Either walk corrects what it writes by what it reads: with U the state and a decayed reading D k U of it,

    forward    y = X (D k U - v)                   U' = a U - (k D_to_end)^T (beta y)
    backward   y = X (D k U + (k q^T . D) do)      U' = a U - (k D_to_end)^T (beta y) + (q D_to_end)^T do

X = (I + strictly lower (k k^T . D) beta)^-1. Forward, -y is the error of each prediction, and the tokens
write n = -beta y; backward, walking back, y is the gradient of n, and beta y that of v. So a walk is the
same either way: a *source* (q, do) is what the backward has in place of values.

    systems     X of each chunk
    summaries   what each segment does to the state: a matrix, from the columns of the identity, and a state
    corrected   from the state before each segment: n, or the gradient of v

What reads the states that n makes is ``segments.outputs``, as without a delta rule.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spcompile.kernels.triton.tiles import INCLUSIVE, chunks, gates, offset, pairwise, tile, to_end

__all__ = ["corrected", "summaries", "systems"]


@triton.jit
def systems(
    k, beta, g, inverses,
    kb, kh, kt, bb, bh, bt, gb, gh, gt,
    H, T, n_chunks,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``inverses [N, steps, C]``: X of each chunk; one program for a chunk.

    Blocks of 16 steps are solved by substitution, which loses nothing; the blocks against each other by
    (I + M)^-1 = (I - M) (I + M^2), as M has four blocks below its diagonal and its fourth power is zero.
    """
    pid = tl.program_id(0)
    chunk, n = pid % n_chunks, pid // n_chunks
    N = n_chunks * C
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    step = chunk * C + i
    at = inverses + (n.to(tl.int64) * N + step.to(tl.int64))[:, None] * C + i[None, :]
    if (chunk * C + C <= N - T) if REVERSE else (chunk * C >= T):
        tl.store(at, tl.zeros((C, C), inverses.dtype.element_ty))  # padding, which no walk reads
        return
    p, inside = tile(k + offset(n, H, kb, kh), step, dk, kt, T, N, K, REVERSE)
    keys = tl.load(p, mask=inside, other=0.0)
    if WIDE:
        keys = keys.to(tl.float32)
    system = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    if GATED:
        g += offset(n, H, gb, gh)
        mine = gates(g, step, True, gt, T, N, REVERSE)
        if READ != INCLUSIVE:
            mine = gates(g, step - 1, i > 0, gt, T, N, REVERSE)
        system *= pairwise(mine, C, READ)
    strengths = gates(beta + offset(n, H, bb, bh), step, True, bt, T, N, REVERSE)
    system = tl.where(i[:, None] > i[None, :], system * strengths[None, :], 0.0)

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
    tl.store(at, within.to(inverses.dtype.element_ty))


@triton.jit
def _solved(
    state, keys, queries, given, inverse, mine, scale,
    C: tl.constexpr, GATED: tl.constexpr, READ: tl.constexpr, SOURCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of a chunk."""
    read = tl.dot(keys, state.to(keys.dtype), input_precision=PRECISION)
    if GATED:
        read *= tl.exp(tl.cumsum(mine, 0))[:, None]
    if SOURCE:
        scores = _scores(keys, queries, mine, scale, C, GATED, READ, PRECISION)
        read = tl.dot(scores.to(given.dtype), given, read, input_precision=PRECISION)
    else:
        read -= given
    # Loaded here: before the scores it would take registers that they need.
    return tl.dot(tl.load(inverse).to(tl.float32), read, input_precision=PRECISION)


@triton.jit
def _scores(
    queries, keys, mine, scale,
    C: tl.constexpr, GATED: tl.constexpr, READ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``[C, C]``: what each step reads of itself and of those before it."""
    i = tl.arange(0, C)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    if GATED:
        return scores * pairwise(mine, C, READ)
    else:
        return tl.where(i[:, None] >= i[None, :], scores, 0.0)


@triton.jit
def _after(
    state, keys, queries, given, writes, g, step, gt, T, N, scale, C: tl.constexpr,
    GATED: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr,
    SOURCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after a chunk that writes ``writes``."""
    if GATED:
        own = gates(g, step, True, gt, T, N, REVERSE)
        end = to_end(g, own, step, gt, T, N, C, READ, REVERSE)
        state *= tl.exp(tl.sum(own, 0))
        writes *= end[:, None]
    state = tl.dot(tl.trans(keys), writes.to(keys.dtype), state, input_precision=PRECISION)
    if SOURCE:
        if GATED:
            given = (given * end[:, None]).to(given.dtype)
        state += tl.dot(tl.trans(queries), given, input_precision=PRECISION) * scale
    return state


@triton.jit
def summaries(
    q, k, v, inverses, beta, g, states, matrices, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, bb, bh, bt, gb, gh, gt,
    H, T, n_segments, segment,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr, SOURCE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``states [N, segments, K, V]`` and ``matrices [N, segments, K, K]``: U' = matrix U + state.

    One program for BV columns of either of a segment; those of the matrix start as the identity's.
    """
    pid = tl.program_id(0)
    parts: tl.constexpr = (V + BV - 1) // BV
    columns: tl.constexpr = parts + (K + BV - 1) // BV
    column, pid = pid % columns, pid // columns
    which, n = pid % n_segments, pid // n_segments
    of_matrix = column >= parts
    i, dk = tl.arange(0, C), tl.arange(0, BK)
    dv = tl.where(of_matrix, column - parts, column) * BV + tl.arange(0, BV)
    q += offset(n, H, qb, qh)
    k += offset(n, H, kb, kh)
    v += offset(n, H, vb, vh)
    beta += offset(n, H, bb, bh)
    if GATED:
        g += offset(n, H, gb, gh)
    state = tl.where(of_matrix & (dk[:, None] == dv[None, :]), 1.0, 0.0)
    N = n_segments * segment
    inverses += n.to(tl.int64) * N * C
    begin, last = chunks(which, segment, T, N, C, REVERSE)
    for first in range(begin, last, C):
        step = first + i
        p, inside = tile(k, step, dk, kt, T, N, K, REVERSE)
        keys = tl.load(p, mask=inside, other=0.0)
        p, inside = tile(v, step, dv, vt, T, N, V, REVERSE)
        given = tl.load(p, mask=inside & (column < parts), other=0.0)
        queries = keys
        if SOURCE:
            p, inside = tile(q, step, dk, qt, T, N, K, REVERSE)
            queries = tl.load(p, mask=inside, other=0.0)
        if WIDE:
            queries, keys, given = queries.to(tl.float32), keys.to(tl.float32), given.to(tl.float32)
        mine = _gates_of(g, step, gt, T, N, C, GATED, READ, REVERSE)
        inverse = inverses + step.to(tl.int64)[:, None] * C + i[None, :]
        y = _solved(state, keys, queries, given, inverse, mine, scale, C, GATED, READ, SOURCE, PRECISION)
        writes = y * -gates(beta, step, True, bt, T, N, REVERSE)[:, None]
        state = _after(state, keys, queries, given, writes, g, step, gt, T, N, scale,
                       C, GATED, READ, REVERSE, SOURCE, PRECISION)  # fmt: skip
    at = n.to(tl.int64) * n_segments + which
    if of_matrix:
        p = matrices + at * (K * K) + dk[:, None] * K + dv[None, :]
        tl.store(p, state, mask=(dk < K)[:, None] & (dv < K)[None, :])
    else:
        p = states + at * (K * V) + dk[:, None] * V + dv[None, :]
        tl.store(p, state, mask=(dk < K)[:, None] & (dv < V)[None, :])


@triton.jit
def _gates_of(
    g, step, gt, T, N,
    C: tl.constexpr, GATED: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Log decays of the readings of a chunk."""
    i = tl.arange(0, C)
    if not GATED:
        return i
    elif READ == INCLUSIVE:
        return gates(g, step, True, gt, T, N, REVERSE)
    else:
        return gates(g, step - 1, i > 0, gt, T, N, REVERSE)


@triton.jit
def corrected(
    q, k, v, inverses, beta, g, before, out, errors, sums, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, bb, bh, bt, gb, gh, gt, sn, ss, sk, sv,
    H, T, n_segments, segment, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr, SOURCE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out [B, H, T, V]`` contiguous: what is written, n; or with a source the gradient of v.

    errors: as ``out``; None, or written by a walk without a source and read by one with it, which then gives
        ``sums [parts, N, steps]``, the gradients of beta, of the values that a program has.
    One program for BV of a segment's values.
    """
    pid = tl.program_id(0)
    of_v, pid = pid % tl.cdiv(V, BV), pid // tl.cdiv(V, BV)
    which, n = pid % n_segments, pid // n_segments
    i, dk, dv = tl.arange(0, C), tl.arange(0, BK), of_v * BV + tl.arange(0, BV)
    k += offset(n, H, kb, kh)
    v += offset(n, H, vb, vh)
    beta += offset(n, H, bb, bh)
    if SOURCE:
        q += offset(n, H, qb, qh)
    if GATED:
        g += offset(n, H, gb, gh)
    N = n_segments * segment
    inverses += n.to(tl.int64) * N * C
    out += n.to(tl.int64) * T * V
    if errors is not None:
        errors += n.to(tl.int64) * T * V
    start = before + n.to(tl.int64) * sn + which.to(tl.int64) * ss
    start += dk.to(tl.int64)[:, None] * sk + dv.to(tl.int64)[None, :] * sv
    state = tl.load(start, mask=(dk < K)[:, None] & (dv < V)[None, :], other=0.0)
    begin, last = chunks(which, segment, T, N, C, REVERSE)
    for first in range(begin, last, C):
        step = first + i
        p, inside = tile(k, step, dk, kt, T, N, K, REVERSE)
        keys = tl.load(p, mask=inside, other=0.0)
        queries = keys
        if SOURCE:
            p, inside = tile(q, step, dk, qt, T, N, K, REVERSE)
            queries = tl.load(p, mask=inside, other=0.0)
        p, inside = tile(v, step, dv, vt, T, N, V, REVERSE)
        given = tl.load(p, mask=inside, other=0.0)
        if WIDE:
            queries, keys, given = queries.to(tl.float32), keys.to(tl.float32), given.to(tl.float32)
        mine = _gates_of(g, step, gt, T, N, C, GATED, READ, REVERSE)
        inverse = inverses + step.to(tl.int64)[:, None] * C + i[None, :]
        y = _solved(state, keys, queries, given, inverse, mine, scale, C, GATED, READ, SOURCE, PRECISION)
        writes = y * -gates(beta, step, True, bt, T, N, REVERSE)[:, None]
        p, inside = tile(out, step, dv, V, T, N, V, REVERSE)
        tl.store(p, (-writes if SOURCE else writes).to(out.dtype.element_ty), mask=inside)
        if errors is not None:
            p, inside = tile(errors, step, dv, V, T, N, V, REVERSE)
            if SOURCE:
                wrong = tl.load(p, mask=inside, other=0.0).to(tl.float32)
                at = (of_v * heads + n).to(tl.int64) * N + step.to(tl.int64)
                tl.store(sums + at, tl.sum(y * wrong, 1))
            else:
                tl.store(p, (-y).to(errors.dtype.element_ty), mask=inside)
        state = _after(state, keys, queries, given, writes, g, step, gt, T, N, scale,
                       C, GATED, READ, REVERSE, SOURCE, PRECISION)  # fmt: skip
