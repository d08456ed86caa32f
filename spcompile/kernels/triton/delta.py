"""The delta rule with one decay per token and head, or none, over segments of a walk (``segments.py``).

Either walk corrects what it writes by what it reads: with U the state and a decayed reading D k U of it,

    forward    y = X (D k U - v)                   U' = a U - (k D_to_end)^T (beta y)
    backward   y = X^ (D k U + (k q^T . D) do)     U' = a U - (k D_to_end)^T (beta y) + (q D_to_end)^T do

X = (I + L beta)^-1 with L = strictly lower (k k^T . D), and X^ the same of L^T, as the way back sees it. Both
are known by Z = X L (``inverse.py``), without another inverse: X r = r - Z (beta r), X^ r = r - Z^T (beta r).
Forward, -y is the error of each prediction, and the tokens write n = -beta y; backward, walking back, y is
the gradient of n, and beta y that of v. So a walk is the same either way: a *source* (q, do) is what the
backward has in place of values.

    summaries   what each segment does to the state: a matrix, from the columns of the identity, and a state
    prologue    those of both ways of a backward in one launch
    outputs     the forward, from what the segments before do
    corrected   n, or the gradient of v, and the state before each segment

What reads the states that n makes for the gradients is ``segments.outputs``, as without a delta rule.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spcompile.kernels.triton.tiles import (
    INCLUSIVE,
    SOURCE,
    chunks,
    close,
    gates,
    offset,
    pairwise,
    place,
    tile,
    to_end,
)

__all__ = ["corrected", "outputs", "prologue", "start", "summaries"]


@triton.jit
def _solved(
    state, keys, queries, given, beta, system, mine, scale,
    C: tl.constexpr, GATED: tl.constexpr, READ: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of a chunk; ``beta [C]``."""
    read = tl.dot(keys, state.to(keys.dtype), input_precision=PRECISION)
    if GATED:
        read *= tl.exp(tl.cumsum(mine, 0, reverse=BACK))[:, None]
    if BACK:
        scores = _scores(keys, queries, mine, C, GATED, READ, BACK, PRECISION)
        read = tl.dot((scores * scale).to(given.dtype), given, read, input_precision=PRECISION)
    else:
        read -= given
    # Loaded here: before the scores it would take registers that they need.
    z = tl.load(system).to(tl.float32)
    return tl.dot(z, read * -beta[:, None], read, input_precision=PRECISION)


@triton.jit
def _scores(
    queries, keys, mine,
    C: tl.constexpr, GATED: tl.constexpr, READ: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``[C, C]``: what each step reads of itself and of those before it."""
    i = tl.arange(0, C)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if GATED:
        return scores * pairwise(mine, mine, C, READ, BACK)
    else:
        return tl.where((i[:, None] <= i[None, :]) if BACK else (i[:, None] >= i[None, :]), scores, 0.0)


@triton.jit
def _after(
    state, keys, queries, given, writes, g, step, gt, T, N, scale, C: tl.constexpr,
    GATED: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr,
    BACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after a chunk that writes ``writes``."""
    if GATED:
        own = gates(g, step, True, gt, T, N, REVERSE)
        end = to_end(g, own, step, gt, T, N, C, READ, REVERSE, BACK)
        state *= tl.exp(tl.sum(own, 0))
        writes *= end[:, None]
    state = tl.dot(tl.trans(keys), writes.to(keys.dtype), state, input_precision=PRECISION)
    if BACK:
        if GATED:
            given = (given * end[:, None]).to(given.dtype)
        state += tl.dot(tl.trans(queries), given, input_precision=PRECISION) * scale
    return state


@triton.jit
def _system(systems, n, step, N, C: tl.constexpr, BACK: tl.constexpr):
    """Pointers ``[C, C]`` of a chunk's Z; walking back, of its transpose."""
    i = tl.arange(0, C)
    systems += n.to(tl.int64) * N * C
    if BACK:
        return systems + (N - 1 - step).to(tl.int64)[None, :] * C + i[:, None]
    else:
        return systems + step.to(tl.int64)[:, None] * C + i[None, :]


@triton.jit
def _steps(first, C: tl.constexpr, BACK: tl.constexpr):
    """The steps of a chunk; walking back from the last one on, so that they lie as the forward's do."""
    i = tl.arange(0, C)
    return first + (C - 1 - i) if BACK else first + i


@triton.jit
def _gates_of(
    g, step, gt, T, N,
    C: tl.constexpr, GATED: tl.constexpr, REVERSE: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Log decays of the readings of a chunk."""
    i = tl.arange(0, C)
    if not GATED:
        return i
    elif BACK:
        return gates(g, step - 1, i + 1 < C, gt, T, N, REVERSE)
    else:
        return gates(g, step, True, gt, T, N, REVERSE)


@triton.jit
def summaries(
    q, k, v, systems, beta, g, states, matrices, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, bb, bh, bt, gb, gh, gt,
    H, T, n_segments, segment,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, REVERSE: tl.constexpr, BACK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``states [N, segments, K, V]`` and ``matrices [N, segments, K, K]``: U' = matrix U + state.

    BACK: of (q, v), v the gradient of the outputs, walking back. One program for BV columns of either of a
    segment; those of the matrix start as the identity's.
    """
    READ: tl.constexpr = SOURCE if BACK else INCLUSIVE
    _summary(tl.program_id(0), q, k, v, systems, beta, g, states, matrices, scale,
             qb, qh, qt, kb, kh, kt, vb, vh, vt, bb, bh, bt, gb, gh, gt, H, T, n_segments, segment,
             K, V, BK, BV, C, GATED, READ, REVERSE, BACK, WIDE, PRECISION)  # fmt: skip


@triton.jit
def prologue(
    q, k, v, do, systems, beta, g, states, matrices, back, back_matrices, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, db, dh, dt, bb, bh, bt, gb, gh, gt,
    H, T, n_segments, segment, walk,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``summaries`` of the forward, and of the way back; ``walk`` programs have either."""
    pid = tl.program_id(0)
    if pid < walk:
        _summary(pid, k, k, v, systems, beta, g, states, matrices, scale,
                 kb, kh, kt, kb, kh, kt, vb, vh, vt, bb, bh, bt, gb, gh, gt, H, T, n_segments, segment,
                 K, V, BK, BV, C, GATED, INCLUSIVE, REVERSE, False, WIDE, PRECISION)  # fmt: skip
    else:
        _summary(pid - walk, q, k, do, systems, beta, g, back, back_matrices, scale,
                 qb, qh, qt, kb, kh, kt, db, dh, dt, bb, bh, bt, gb, gh, gt, H, T, n_segments, segment,
                 K, V, BK, BV, C, GATED, SOURCE, not REVERSE, True, WIDE, PRECISION)  # fmt: skip


@triton.jit
def _summary(
    pid, q, k, v, systems, beta, g, states, matrices, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, bb, bh, bt, gb, gh, gt,
    H, T, n_segments, segment,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr, BACK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = (V + BV - 1) // BV
    columns: tl.constexpr = parts + (K + BV - 1) // BV
    column, which, n = place(pid, columns, n_segments)
    of_matrix = column >= parts
    dk = tl.arange(0, BK)
    dv = tl.where(of_matrix, column - parts, column) * BV + tl.arange(0, BV)
    q += offset(n, H, qb, qh)
    k += offset(n, H, kb, kh)
    v += offset(n, H, vb, vh)
    beta += offset(n, H, bb, bh)
    if GATED:
        g += offset(n, H, gb, gh)
    state = tl.where(of_matrix & (dk[:, None] == dv[None, :]), 1.0, 0.0)
    N = n_segments * segment
    begin, last = chunks(which, segment, T, N, C, REVERSE)
    for first in tl.range(begin, last, C, disable_licm=True):
        step = _steps(first, C, BACK)
        p, inside = tile(k, step, dk, kt, T, N, K, REVERSE)
        keys = tl.load(p, mask=inside, other=0.0)
        p, inside = tile(v, step, dv, vt, T, N, V, REVERSE)
        given = tl.load(p, mask=inside & (column < parts), other=0.0)
        queries = keys
        if BACK:
            p, inside = tile(q, step, dk, qt, T, N, K, REVERSE)
            queries = tl.load(p, mask=inside, other=0.0)
        if WIDE:
            queries, keys, given = queries.to(tl.float32), keys.to(tl.float32), given.to(tl.float32)
        mine = _gates_of(g, step, gt, T, N, C, GATED, REVERSE, BACK)
        strength = gates(beta, step, True, bt, T, N, REVERSE)
        system = _system(systems, n, step, N, C, BACK)
        y = _solved(
            state, keys, queries, given, strength, system, mine, scale, C, GATED, READ, BACK, PRECISION
        )
        state = _after(state, keys, queries, given, y * -strength[:, None], g, step, gt, T, N, scale,
                       C, GATED, READ, REVERSE, BACK, PRECISION)  # fmt: skip
    at = n.to(tl.int64) * n_segments + which
    if of_matrix:
        p = matrices + at * (K * K) + dk[:, None] * K + dv[None, :]
        tl.store(p, state, mask=(dk < K)[:, None] & (dv < K)[None, :])
    else:
        p = states + at * (K * V) + dk[:, None] * V + dv[None, :]
        tl.store(p, state, mask=(dk < K)[:, None] & (dv < V)[None, :])


@triton.jit
def _mapped(
    matrix, x, plus, row, of_row, of_column,
    K: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """``matrix x + plus``, matrix ``[K, K]``; by two halves of its columns, as registers hold no more."""
    BK: tl.constexpr = x.shape[0]
    if BK < 128:
        p = matrix + row[:, None] * of_row + row[None, :] * of_column
        factor = tl.load(p, mask=(row < K)[:, None] & (row < K)[None, :], other=0.0)
        return tl.dot(factor, x, plus, input_precision=EXACT)
    else:
        HALF: tl.constexpr = BK // 2
        upper, lower = tl.split(tl.permute(tl.reshape(x, (2, HALF, x.shape[1])), (1, 2, 0)))
        column = tl.arange(0, HALF)
        p = matrix + row[:, None] * of_row + column[None, :] * of_column
        factor = tl.load(p, mask=(row < K)[:, None] & (column < K)[None, :], other=0.0)
        plus = tl.dot(factor, upper, plus, input_precision=EXACT)
        valid = (row < K)[:, None] & (column + HALF < K)[None, :]
        factor = tl.load(p + HALF * of_column, mask=valid, other=0.0)
        return tl.dot(factor, lower, plus, input_precision=EXACT)


@triton.jit
def start(
    states, matrices, carry, before, n, which, n_segments, dk, dv,
    K: tl.constexpr, V: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
    TURNED: tl.constexpr = False,
):  # fmt: skip
    """``[dk, dv]``: the state before a segment (``tiles.start``); ``before`` gets it, None: nobody asked.

    TURNED: the matrices are those of the walk the other way, from the last segment on and transposed.
    """
    EXACT: tl.constexpr = "ieee" if PRECISION == "ieee" else "tf32x3"  # matrices are float32 in any case
    n = n.to(tl.int64)
    entry = dk[:, None] * V + dv[None, :]
    inside = (dk < K)[:, None] & (dv < V)[None, :]
    at = n * n_segments + which
    if not FOLD:
        state = tl.load(states + at * (K * V) + entry, mask=inside, other=0.0)
    else:
        state = tl.zeros(entry.shape, tl.float32)
        if carry is not None:
            state = tl.load(carry + n * (K * V) + entry, mask=inside, other=0.0)
        if states is not None:
            for earlier in range(which):
                there = n * n_segments + tl.cast(earlier, tl.int64)
                made = tl.load(states + there * (K * V) + entry, mask=inside, other=0.0)
                if TURNED:
                    there = n * n_segments + (n_segments - 1 - tl.cast(earlier, tl.int64))
                    state = _mapped(matrices + there * (K * K), state, made, dk, 1, K, K, EXACT)
                else:
                    state = _mapped(matrices + there * (K * K), state, made, dk, K, 1, K, EXACT)
    if before is not None:
        tl.store(before + at * (K * V) + entry, state, mask=inside)
    return state


@triton.jit
def outputs(
    q, k, v, systems, beta, g, states, matrices, carry, out, final, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, bb, bh, bt, gb, gh, gt,
    H, T, n_segments, segment,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    FOLD: tl.constexpr, GATED: tl.constexpr, REVERSE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out [B, H, T, V]`` contiguous, and the state after the last segment.

    One program for BV of a segment's values.
    """
    of_v, which, n = place(tl.program_id(0), tl.cdiv(V, BV), n_segments)
    i, dk, dv = tl.arange(0, C), tl.arange(0, BK), of_v * BV + tl.arange(0, BV)
    state = start(states, matrices, carry, None, n, which, n_segments, dk, dv, K, V, FOLD, PRECISION)
    q += offset(n, H, qb, qh)
    k += offset(n, H, kb, kh)
    v += offset(n, H, vb, vh)
    beta += offset(n, H, bb, bh)
    if GATED:
        g += offset(n, H, gb, gh)
    N = n_segments * segment
    out += n.to(tl.int64) * T * V
    begin, last = chunks(which, segment, T, N, C, REVERSE)
    for first in tl.range(begin, last, C, disable_licm=True):
        step = first + i
        p, inside = tile(k, step, dk, kt, T, N, K, REVERSE)
        keys = tl.load(p, mask=inside, other=0.0)
        p, inside = tile(v, step, dv, vt, T, N, V, REVERSE)
        given = tl.load(p, mask=inside, other=0.0)
        if WIDE:
            keys, given = keys.to(tl.float32), given.to(tl.float32)
        p, inside = tile(q, step, dk, qt, T, N, K, REVERSE)
        queries = tl.load(p, mask=inside, other=0.0)
        if WIDE:
            queries = queries.to(tl.float32)
        mine = _gates_of(g, step, gt, T, N, C, GATED, REVERSE, False)
        read = tl.dot(queries, state.to(queries.dtype), input_precision=PRECISION)
        if GATED:
            read *= tl.exp(tl.cumsum(mine, 0))[:, None]
        strength = gates(beta, step, True, bt, T, N, REVERSE)
        system = _system(systems, n, step, N, C, False)
        y = _solved(state, keys, keys, given, strength, system, mine, scale,
                    C, GATED, INCLUSIVE, False, PRECISION)  # fmt: skip
        writes = y * -strength[:, None]
        scores = _scores(queries, keys, mine, C, GATED, INCLUSIVE, False, PRECISION).to(keys.dtype)
        read = tl.dot(scores, writes.to(keys.dtype), read, input_precision=PRECISION) * scale
        p, inside = tile(out, step, dv, V, T, N, V, REVERSE)
        tl.store(p, read.to(out.dtype.element_ty), mask=inside)
        state = _after(state, keys, keys, given, writes, g, step, gt, T, N, scale,
                       C, GATED, INCLUSIVE, REVERSE, False, PRECISION)  # fmt: skip
    close(final, state, n, which, n_segments, dk, dv, K, V)


@triton.jit
def corrected(
    q, k, v, systems, beta, g, states, matrices, carry, before, out, errors, sums, final, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, bb, bh, bt, gb, gh, gt,
    H, T, n_segments, segment, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    FOLD: tl.constexpr, GATED: tl.constexpr, REVERSE: tl.constexpr, BACK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out [B, H, T, V]`` contiguous: what is written, n; or walking BACK the gradient of v.

    errors: as ``out``, those of the predictions, written by the walk of the forward and read by the one back,
        which gives ``sums [parts, N, steps]``, the gradients of beta, of the values that a program has.
    before: gets the state before each segment, if asked for. One program for BV of a segment's values.
    """
    READ: tl.constexpr = SOURCE if BACK else INCLUSIVE
    of_v, which, n = place(tl.program_id(0), tl.cdiv(V, BV), n_segments)
    dk, dv = tl.arange(0, BK), of_v * BV + tl.arange(0, BV)
    state = start(states, matrices, carry, before, n, which, n_segments, dk, dv, K, V, FOLD, PRECISION)
    k += offset(n, H, kb, kh)
    v += offset(n, H, vb, vh)
    beta += offset(n, H, bb, bh)
    if BACK:
        q += offset(n, H, qb, qh)
    if GATED:
        g += offset(n, H, gb, gh)
    N = n_segments * segment
    out += n.to(tl.int64) * T * V
    errors += n.to(tl.int64) * T * V
    begin, last = chunks(which, segment, T, N, C, REVERSE)
    for first in tl.range(begin, last, C, disable_licm=True):
        step = _steps(first, C, BACK)
        p, inside = tile(k, step, dk, kt, T, N, K, REVERSE)
        keys = tl.load(p, mask=inside, other=0.0)
        queries = keys
        if BACK:
            p, inside = tile(q, step, dk, qt, T, N, K, REVERSE)
            queries = tl.load(p, mask=inside, other=0.0)
        p, inside = tile(v, step, dv, vt, T, N, V, REVERSE)
        given = tl.load(p, mask=inside, other=0.0)
        if WIDE:
            queries, keys, given = queries.to(tl.float32), keys.to(tl.float32), given.to(tl.float32)
        mine = _gates_of(g, step, gt, T, N, C, GATED, REVERSE, BACK)
        strength = gates(beta, step, True, bt, T, N, REVERSE)
        system = _system(systems, n, step, N, C, BACK)
        y = _solved(
            state, keys, queries, given, strength, system, mine, scale, C, GATED, READ, BACK, PRECISION
        )
        writes = y * -strength[:, None]
        p, inside = tile(out, step, dv, V, T, N, V, REVERSE)
        tl.store(p, (-writes if BACK else writes).to(out.dtype.element_ty), mask=inside)
        p, inside = tile(errors, step, dv, V, T, N, V, REVERSE)
        if BACK:
            wrong = tl.load(p, mask=inside, other=0.0).to(tl.float32)
            at = (of_v * heads + n).to(tl.int64) * N + step.to(tl.int64)
            tl.store(sums + at, tl.sum(y * wrong, 1))
        else:
            tl.store(p, (-y).to(errors.dtype.element_ty), mask=inside)
        state = _after(state, keys, queries, given, writes, g, step, gt, T, N, scale,
                       C, GATED, READ, REVERSE, BACK, PRECISION)  # fmt: skip
    close(final, state, n, which, n_segments, dk, dv, K, V)
