"""Linear attention with a decay per key, over segments of a walk (``segments.py``).

    summaries   what each segment does to the state
    prologue    those of both ways of a backward in one launch
    within      scores of the pairs of a chunk, and of a backward all that comes from those pairs
    outputs     from the state before each segment, with those scores: the forward, and dv walking back
    columns     from the transposed state, whose columns decay: dq, and dk walking back

With D the decay between two steps, one number per key, the pair (i, j) scores q_i D k_j. That is no product
of matrices where i and j are near: D can be split nowhere between them without a positive exponent. So a
chunk is blocks of 16 steps: within a block row after row, with the keys decayed as the state is; from block
to block split at the block's start, where both sides decay only. What is summed runs over exactly the steps
between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spcompile.kernels.triton.per_key import (
    BLOCK,
    decay_from_start,
    decay_to_end,
    load,
    load_row,
    past_keys,
    sum_behind,
    sum_rows,
)
from spcompile.kernels.triton.segments import READS, product
from spcompile.kernels.triton.tiles import (
    EXCLUSIVE,
    INCLUSIVE,
    SOURCE,
    chunks,
    close,
    offset,
    place,
    start,
    tile,
)

__all__ = ["columns", "outputs", "prologue", "summaries", "within"]


@triton.jit
def summaries(
    k, v, g, states, logs, scale,
    kb, kh, kt, vb, vh, vt, gb, gh, gt,
    H, T, n_segments, segment,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    READ: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``states [N, segments, K, V]`` and ``logs [N, segments, K]``; one program for BK x BV of a segment."""
    _summary(tl.program_id(0), k, v, g, states, logs, scale, kb, kh, kt, vb, vh, vt, gb, gh, gt,
             H, T, n_segments, segment, K, V, BK, BV, C, READ, REVERSE, WIDE, PRECISION)  # fmt: skip


@triton.jit
def prologue(
    q, k, v, do, g, states, logs, back, back_logs, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, db, dh, dt, gb, gh, gt,
    H, T, n_segments, segment, walk,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    READ: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``summaries`` of the forward's (k, v) and of the way back's (q, do); ``walk`` programs have either."""
    pid = tl.program_id(0)
    BACK: tl.constexpr = EXCLUSIVE if READ == EXCLUSIVE else SOURCE
    if pid < walk:
        _summary(pid, k, v, g, states, logs, 1.0, kb, kh, kt, vb, vh, vt, gb, gh, gt,
                 H, T, n_segments, segment, K, V, BK, BV, C, READ, REVERSE, WIDE, PRECISION)  # fmt: skip
    else:
        _summary(pid - walk, q, do, g, back, back_logs, scale, qb, qh, qt, db, dh, dt, gb, gh, gt,
                 H, T, n_segments, segment, K, V, BK, BV, C, BACK, not REVERSE, WIDE, PRECISION)  # fmt: skip


@triton.jit
def _summary(
    pid, k, v, g, states, logs, scale,
    kb, kh, kt, vb, vh, vt, gb, gh, gt,
    H, T, n_segments, segment,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    READ: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(V, BV)
    part, which, n = place(pid, tl.cdiv(K, BK) * parts, n_segments)
    of_k, of_v = part // parts, part % parts
    dk, dv = of_k * BK + tl.arange(0, BK), of_v * BV + tl.arange(0, BV)
    k += offset(n, H, kb, kh)
    v += offset(n, H, vb, vh)
    g += offset(n, H, gb, gh)
    state = tl.zeros((BK, BV), tl.float32)
    total = tl.zeros((BK,), tl.float32)
    N = n_segments * segment
    begin, last = chunks(which, segment, T, N, C, REVERSE)
    for first in tl.range(begin, last, C, disable_licm=True):
        step = first + tl.arange(0, C)
        keys = load(k, step, True, dk, kt, T, N, K, REVERSE, WIDE)
        values = load(v, step, True, dv, vt, T, N, V, REVERSE, WIDE)
        end, here = decay_to_end(g, first, dk, gt, T, N, C, K, READ, REVERSE)
        keys = (keys * end).to(keys.dtype)
        total += here
        state *= tl.exp(here)[:, None]
        state += tl.dot(tl.trans(keys), values, input_precision=PRECISION) * scale
    at = n.to(tl.int64) * n_segments + which
    p = states + at * (K * V) + dk[:, None] * V + dv[None, :]
    tl.store(p, state, mask=(dk < K)[:, None] & (dv < V)[None, :])
    tl.store(logs + at * K + dk, total, mask=(dk < K) & (of_v == 0))


@triton.jit
def outputs(
    q, k, v, g, scores, states, logs, carry, out, final, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, sn, ss, sk, sv, ob, oh, ot,
    H, T, n_segments, segment,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    FOLD: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr, MIRRORED: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out [B, H, T, V]``, and the state after the last segment; one program for BV of a segment's values.

    states, logs, carry, FOLD: what the state before a segment is made of, see ``tiles.start``.
    ``scores [N, steps, C]`` of the pairs of each chunk, the scale in them. MIRRORED: of the walk the other
    way.
    SCALED: the scale is in the states already, and what is written gets it; else what is read.
    """
    of_v, which, n = place(tl.program_id(0), tl.cdiv(V, BV), n_segments)
    dk, dv, i = tl.arange(0, BK), of_v * BV + tl.arange(0, BV), tl.arange(0, C)
    q += offset(n, H, qb, qh)
    k += offset(n, H, kb, kh)
    v += offset(n, H, vb, vh)
    g += offset(n, H, gb, gh)
    out += offset(n, H, ob, oh)
    N = n_segments * segment
    scores += n.to(tl.int64) * N * C
    state = start(states, logs, carry, n, which, n_segments, dk, dv, sn, ss, sk, sv, K, V, FOLD, 0)
    begin, last = chunks(which, segment, T, N, C, REVERSE)
    for first in tl.range(begin, last, C, disable_licm=True):
        step = first + i
        queries = load(q, step, True, dk, qt, T, N, K, REVERSE, WIDE)
        begun, through = decay_from_start(g, first, dk, gt, T, N, C, K, READ, REVERSE)
        queries = (queries * begun).to(queries.dtype)
        read = tl.dot(queries, state.to(queries.dtype), input_precision=PRECISION)
        if not SCALED:
            read *= scale
        if MIRRORED:  # the reader there is the writer here
            at = (N - 1 - step).to(tl.int64)[None, :] * C + (C - 1 - i)[:, None]
        else:
            at = step.to(tl.int64)[:, None] * C + i[None, :]
        values = load(v, step, True, dv, vt, T, N, V, REVERSE, WIDE)
        weights = tl.load(scores + at).to(values.dtype)
        read = tl.dot(weights, values, read, input_precision=PRECISION)
        p, inside = tile(out, step, dv, ot, T, N, V, REVERSE)
        tl.store(p, read.to(out.dtype.element_ty), mask=inside)
        keys = load(k, step, True, dk, kt, T, N, K, REVERSE, WIDE)
        end, _ = decay_to_end(g, first, dk, gt, T, N, C, K, READ, REVERSE)
        keys = (keys * end).to(keys.dtype)
        state *= tl.exp(through)[:, None]
        if SCALED:
            state += tl.dot(tl.trans(keys), values, input_precision=PRECISION) * scale
        else:
            state = tl.dot(tl.trans(keys), values, state, input_precision=PRECISION)
    close(final, state, n, which, n_segments, dk, dv, K, V)


@triton.jit
def columns(
    q, k, v, g, states, logs, carry, plus, mate, kept, given, of_gate, out, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, sn, ss, sk, sv, mb, mh, mt, ob, oh, ot,
    H, T, n_segments, segment,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    FOLD: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr, ROLE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out [B, H, T, V]`` from a state of which the columns decay; one program for BV of them.

    states, logs, carry, FOLD: what the state before a segment is made of, see ``tiles.start``.
    plus, given, of_gate: lie as ``out`` does, float32. ``plus`` is added to what is read; ``of_gate`` is
    ``given`` and what the gradient of the decay has from outside of a chunk (``gate.py``), by ROLE:
        READS: its readings, and ``kept`` gets the states before chunks;
        WRITES: walking back with ``kept``, its writes, and the products of the states. The scale is then in
            the states already.
    """
    of_v, which, n = place(tl.program_id(0), tl.cdiv(V, BV), n_segments)
    dk, dv, i = tl.arange(0, BK), of_v * BV + tl.arange(0, BV), tl.arange(0, C)
    q += offset(n, H, qb, qh)
    k += offset(n, H, kb, kh)
    v += offset(n, H, vb, vh)
    g += offset(n, H, gb, gh)
    mate += offset(n, H, mb, mh)
    lies = offset(n, H, ob, oh)
    whole = (dk < K)[:, None] & (dv < V)[None, :]
    state = start(states, logs, carry, n, which, n_segments, dk, dv, sn, ss, sk, sv, K, V, FOLD, 1)
    N = n_segments * segment
    begin, last = chunks(which, segment, T, N, C, REVERSE)
    for first in tl.range(begin, last, C, disable_licm=True):
        step = first + i
        begun, through = decay_from_start(g, first, dv, gt, T, N, C, V, READ, REVERSE)
        through = tl.exp(through)
        chunk = first // C if ROLE == READS else (N - C - first) // C
        at = kept + (n.to(tl.int64) * (N // C) + chunk) * (K * V) + dk[:, None] * V + dv[None, :]
        if ROLE == READS:
            tl.store(at, state.to(kept.dtype.element_ty), mask=whole)
        queries = load(q, step, True, dk, qt, T, N, K, REVERSE, WIDE)
        read = tl.dot(queries, state.to(queries.dtype), input_precision=PRECISION)
        read *= begun
        if ROLE == READS:
            read *= scale
        p, inside = tile(out + lies, step, dv, ot, T, N, V, REVERSE)
        added, valid = tile(plus + lies, step, dv, ot, T, N, V, REVERSE)
        tl.store(p, (read + tl.load(added, mask=valid, other=0.0)).to(out.dtype.element_ty), mask=inside)
        read *= load(mate, step, True, dv, mt, T, N, V, REVERSE, True)
        read = sum_behind(read, C, READ == INCLUSIVE, False, 3 if WIDE else 2, WALK=True)
        if ROLE != READS:  # behind the sums, whose registers it would take
            across = tl.sum(tl.load(at, mask=whole, other=0.0).to(tl.float32) * state, 0) * through
            read += across[None, :]
        p, inside = tile(given + lies, step, dv, ot, T, N, V, REVERSE)
        read += tl.load(p, mask=inside, other=0.0)
        p, inside = tile(of_gate + lies, step, dv, ot, T, N, V, REVERSE)
        tl.store(p, read, mask=inside)
        keys = load(k, step, True, dk, kt, T, N, K, REVERSE, WIDE)
        values = load(v, step, True, dv, vt, T, N, V, REVERSE, WIDE)
        end, _ = decay_to_end(g, first, dv, gt, T, N, C, V, READ, REVERSE)
        values = (values * end).to(values.dtype)
        state *= through[None, :]
        if ROLE == READS:
            state = tl.dot(tl.trans(keys), values, state, input_precision=PRECISION)
        else:
            state += tl.dot(tl.trans(keys), values, input_precision=PRECISION) * scale


@triton.jit
def within(
    q, k, v, do, g, scores, dq, dk, dg, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, db, dh, dt, gb, gh, gt, ob, oh, ot,
    H, T, n_chunks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    READ: tl.constexpr, REVERSE: tl.constexpr, GRADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``scores [N, steps, C]``: ``scale q_i D k_j`` of each pair of a chunk; one program for 16 rows of them.

    GRADS: ``dq, dk, dg [B, H, T, K]``, float32, too: what the pairs of a chunk add to these gradients. A pair
    (i, j) is ``scale (do_i . v_j)`` times q_i D k_j per key, and the log decay of each step between has it.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = C // 16  # as a number of Python, which the interpreter needs
    b, pid = pid % blocks, pid // blocks
    chunk, n = pid % n_chunks, pid // n_chunks
    i, d, N = tl.arange(0, BLOCK), tl.arange(0, BK), n_chunks * C
    first = chunk * C + b * BLOCK
    step = first + i
    q += offset(n, H, qb, qh)
    k += offset(n, H, kb, kh)
    g += offset(n, H, gb, gh)
    scores += (n.to(tl.int64) * N + step.to(tl.int64))[:, None] * C
    if (first + BLOCK <= N - T) if REVERSE else (first >= T):
        for c in range(blocks):  # padding, which no pair with a token has
            tl.store(scores + c * BLOCK + i[None, :], tl.zeros((BLOCK, BLOCK), scores.dtype.element_ty))
        return
    keys = load(k, step, True, d, kt, T, N, K, REVERSE, True)
    own = tl.zeros((BLOCK, BLOCK), tl.float32)
    weights = own
    reads = tl.zeros((BLOCK, BK), tl.float32)
    writes, of_gate = reads, reads
    if GRADS:
        v += offset(n, H, vb, vh)
        do += offset(n, H, db, dh)
        weights = product(do, v, step, step, dt, vt, T, N, V, BV, BLOCK, REVERSE, True, PRECISION) * scale
    decays = tl.zeros((BLOCK, BK), tl.float32)  # from each step of the block to the row's reading
    for r in range(BLOCK):
        mine = (i == r)[:, None]
        query = load_row(q, first + r, d, qt, T, N, K, REVERSE)[None, :]
        decay = tl.exp(load_row(g, first + r, d, gt, T, N, K, REVERSE))[None, :]
        if READ == INCLUSIVE:
            decays = tl.where(mine, 1.0, decays * decay)
        own = tl.where(mine, tl.sum(decays * keys * query, 1)[None, :], own)
        if GRADS:
            weight = tl.sum(tl.where(mine, weights, 0.0), 0)[:, None]
            writes += weight * decays * query
            sums = tl.cumsum(weight * decays * keys, 0)
            reads = tl.where(mine, tl.sum(weight * decays * keys, 0)[None, :], reads)
            of_gate += tl.where((i + (1 if READ == EXCLUSIVE else 0) < r)[:, None], sums * query, 0.0)
        if READ == EXCLUSIVE:
            decays = tl.where(mine, 1.0, decays * decay)
    tl.store(scores + b * BLOCK + i[None, :], (own * scale).to(scores.dtype.element_ty))
    for c in range(b + 1, blocks):
        tl.store(scores + c * BLOCK + i[None, :], tl.zeros((BLOCK, BLOCK), scores.dtype.element_ty))

    begun, through = decay_from_start(g, first, d, gt, T, N, BLOCK, K, READ, REVERSE)
    queries = load(q, step, True, d, qt, T, N, K, REVERSE, True)
    before = tl.zeros((BLOCK, BK), tl.float32)
    between = tl.zeros((BK,), tl.float32)
    for back in range(1, b + 1):
        past, here = past_keys(k, g, first - back * BLOCK, d, between, kt, gt, T, N, K, READ, REVERSE)
        between += here
        pairs = tl.dot(queries * begun, tl.trans(past), input_precision=PRECISION) * scale
        tl.store(scores + (b - back) * BLOCK + i[None, :], pairs.to(scores.dtype.element_ty))
        if GRADS:
            j = step - back * BLOCK
            pairs = product(do, v, step, j, dt, vt, T, N, V, BV, BLOCK, REVERSE, True, PRECISION) * scale
            before = tl.dot(pairs, past, before, input_precision=PRECISION)
    if GRADS:
        before *= begun
        behind = tl.zeros((BLOCK, BK), tl.float32)
        over = tl.zeros((BK,), tl.float32)  # of pairs on either side of the block
        between = tl.zeros((BK,), tl.float32)
        for ahead in range(1, blocks - b):
            j = step + ahead * BLOCK
            later = load(q, j, True, d, qt, T, N, K, REVERSE, True) * tl.exp(between)[None, :]
            begun, here = decay_from_start(g, first + ahead * BLOCK, d, gt, T, N, BLOCK, K, READ, REVERSE)
            later *= begun
            between += here
            pairs = product(v, do, step, j, vt, dt, T, N, V, BV, BLOCK, REVERSE, True, PRECISION) * scale
            behind = tl.dot(pairs, later, behind, input_precision=PRECISION)
            gone = tl.zeros((BK,), tl.float32)
            for back in range(1, b + 1):
                past, here = past_keys(k, g, first - back * BLOCK, d, gone, kt, gt, T, N, K, READ, REVERSE)
                gone += here
                before_b = step - back * BLOCK
                pairs = product(do, v, j, before_b, dt, vt, T, N, V, BV, BLOCK, REVERSE, True, PRECISION)
                pairs *= scale
                over += tl.sum(tl.dot(pairs, past, input_precision=PRECISION) * later, 0)
        over *= tl.exp(through)
        end, _ = decay_to_end(g, first, d, gt, T, N, BLOCK, K, READ, REVERSE)
        behind *= end
        lies = offset(n, H, ob, oh)
        p, inside = tile(dq + lies, step, d, ot, T, N, K, REVERSE)
        tl.store(p, reads + before, mask=inside)
        p, inside = tile(dk + lies, step, d, ot, T, N, K, REVERSE)
        tl.store(p, writes + behind, mask=inside)
        # Rows of of_gate are those of the step behind.
        total = sum_behind(before * queries, BLOCK, READ == INCLUSIVE, False, 3)
        total += sum_behind(behind * keys, BLOCK, False, True, 3) + over[None, :]
        p, inside = tile(dg + lies, step, d, ot, T, N, K, REVERSE)
        tl.store(p, total + _shifted(of_gate), mask=inside)


@triton.jit
def _shifted(x):
    """Each row one later, a zero at the first."""
    i = tl.arange(0, BLOCK)
    return sum_rows(i[:, None] == i[None, :] + 1, x, 3)
