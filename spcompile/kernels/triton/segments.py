"""Linear attention with one decay per token and head, or none, in two kernels over segments of a walk.

    summaries   what each segment does to the state: U_after = exp(sum of log decays) U_before + S
    outputs     from what the segments before do: chunk by chunk, with the state in registers
    pairs       what the gradient of a decay has from pairs of tokens of a chunk
    prologue    all of a backward that needs no state in one launch: both ways' summaries, and pairs

A segment is a run of chunks, as a rank is a run of segments. No chunk's state goes to memory (but where a
decay has a gradient), and segments run side by side, so that a few heads fill a GPU. The same two kernels are
the backward; with the roles of q, k and v

    forward   out of (q, k, v)      dq of (do, v, k)      dk of (v, do, q) and dv of (k, q, do), walking back

See ``tiles.py`` for walks and readings. Operands are bf16, fp16 or fp32, states fp32. Operands of a product
are rounded once: the state to bf16 where q is, else products read fp32 as TF32 (fp16, whose states may be
larger than fp16 holds) or as three TF32 (fp32).
"""

from __future__ import annotations

import triton
import triton.language as tl

from spcompile.kernels.triton.tiles import (
    EXCLUSIVE,
    INCLUSIVE,
    SOURCE,
    chunks,
    close,
    gates,
    offset,
    pairwise,
    place,
    start,
    tile,
    to_end,
)

__all__ = ["READS", "WRITES", "outputs", "pairs", "product", "prologue", "summaries"]

READS, WRITES = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def summaries(
    k, v, g, states, logs, scale,
    kb, kh, kt, vb, vh, vt, gb, gh, gt,
    H, T, n_segments, segment,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``states [N, segments, K, V]`` and ``logs [N, segments]``; one program for BK x BV of a segment."""
    _summary(tl.program_id(0), k, v, g, states, logs, scale, kb, kh, kt, vb, vh, vt, gb, gh, gt,
             H, T, n_segments, segment, K, V, BK, BV, C, GATED, READ, REVERSE, WIDE, PRECISION)  # fmt: skip


@triton.jit
def _summary(
    pid, k, v, g, states, logs, scale,
    kb, kh, kt, vb, vh, vt, gb, gh, gt,
    H, T, n_segments, segment,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(V, BV)
    part, which, n = place(pid, tl.cdiv(K, BK) * parts, n_segments)
    of_k, of_v = part // parts, part % parts
    dk, dv = of_k * BK + tl.arange(0, BK), of_v * BV + tl.arange(0, BV)
    k += offset(n, H, kb, kh)
    v += offset(n, H, vb, vh)
    if GATED:
        g += offset(n, H, gb, gh)
    state = tl.zeros((BK, BV), tl.float32)
    total = 0.0
    N = n_segments * segment
    begin, end = chunks(which, segment, T, N, C, REVERSE)
    for first in tl.range(begin, end, C, disable_licm=True):
        step = first + tl.arange(0, C)
        p, inside = tile(k, step, dk, kt, T, N, K, REVERSE)
        keys = tl.load(p, mask=inside, other=0.0)
        p, inside = tile(v, step, dv, vt, T, N, V, REVERSE)
        values = tl.load(p, mask=inside, other=0.0)
        if WIDE:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        if GATED:
            own = gates(g, step, True, gt, T, N, REVERSE)
            # On the values: the keys go from memory to the tensor core as they are.
            values = (values * to_end(g, own, step, gt, T, N, C, READ, REVERSE)[:, None]).to(values.dtype)
            here = tl.sum(own, 0)
            state *= tl.exp(here)
            total += here
        state = tl.dot(tl.trans(keys), values, state, input_precision=PRECISION)
    at = n.to(tl.int64) * n_segments + which
    p = states + at * (K * V) + dk[:, None] * V + dv[None, :]
    tl.store(p, state * scale, mask=(dk < K)[:, None] & (dv < V)[None, :])
    if GATED:
        if (of_k == 0) & (of_v == 0):
            tl.store(logs + at, total)


@triton.jit
def outputs(
    q, k, v, g, states, logs, carry, other, kept, out, final, inner, sums, less_k, less_v, plus, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, sn, ss, sk, sv, xb, xh, xt, ob, oh, ot,
    lb, lh, lt, mb, mh, mt,
    H, T, n_segments, segment, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    FOLD: tl.constexpr, SCALED: tl.constexpr, OF_GATE: tl.constexpr, GATED: tl.constexpr, READ: tl.constexpr,
    STRICT: tl.constexpr, LESS: tl.constexpr, REVERSE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out [B, H, T, V]``, and the state after the last segment; one program for BV of a segment's values.

    states, logs, carry, FOLD: what the state before a segment is made of, see ``tiles.start``.
    SCALED: the scale is in the states already, and what is written gets it; else what is read.
    OF_GATE: what the gradient of a decay is made of (``gate.py``), of the values that this program has:
        READS, when walking with the forward, or WRITES, walking back with ``kept``, states of the forward.
    STRICT: no step reads its own write. LESS: less_k^T less_v is taken from the state as well, and never read
        by its own step; ``plus``, which lies as ``out`` does, is added.
    """
    of_v, which, n = place(tl.program_id(0), tl.cdiv(V, BV), n_segments)
    dk, dv, i = tl.arange(0, BK), of_v * BV + tl.arange(0, BV), tl.arange(0, C)
    q += offset(n, H, qb, qh)
    k += offset(n, H, kb, kh)
    v += offset(n, H, vb, vh)
    out += offset(n, H, ob, oh)
    if GATED:
        g += offset(n, H, gb, gh)
    if LESS:
        less_k += offset(n, H, lb, lh)
        less_v += offset(n, H, mb, mh)
        plus += offset(n, H, ob, oh)
    if OF_GATE:
        other += offset(n, H, xb, xh)
        part = (of_v * heads + n).to(tl.int64)
    state = start(states, logs, carry, n, which, n_segments, dk, dv, sn, ss, sk, sv, K, V, FOLD, None)
    # Over the scale then, so that products are added as they are; but two kinds of writes must be alike.
    OVER: tl.constexpr = SCALED and not LESS
    if OVER:
        state *= 1.0 / scale
    N = n_segments * segment
    begin, end = chunks(which, segment, T, N, C, REVERSE)
    for first in tl.range(begin, end, C, disable_licm=True):
        step = first + i
        if GATED:
            own = gates(g, step, True, gt, T, N, REVERSE)
        if OF_GATE:  # before all else, while little is alive
            chunk = first // C if OF_GATE == READS else (N - C - first) // C
            at = kept + (n.to(tl.int64) * (N // C) + chunk) * (K * V) + dk[:, None] * V + dv[None, :]
            whole = (dk < K)[:, None] & (dv < V)[None, :]
            if OF_GATE == READS:
                if not STRICT:
                    tl.store(at, state.to(kept.dtype.element_ty), mask=whole)
            else:
                across = tl.sum(tl.load(at, mask=whole, other=0.0).to(tl.float32) * state)
                if OVER:
                    across *= scale
                tl.store(sums + (part * (N // C) + chunk), across * tl.exp(tl.sum(own, 0)))
        p, inside = tile(q, step, dk, qt, T, N, K, REVERSE)
        queries = tl.load(p, mask=inside, other=0.0)
        p, inside = tile(k, step, dk, kt, T, N, K, REVERSE)
        keys = tl.load(p, mask=inside, other=0.0)
        p, inside = tile(v, step, dv, vt, T, N, V, REVERSE)
        values = tl.load(p, mask=inside, other=0.0)
        if WIDE:
            queries, keys, values = queries.to(tl.float32), keys.to(tl.float32), values.to(tl.float32)
        # The state first: fewer values are alive at once than behind the scores.
        read = tl.dot(queries, state.to(queries.dtype), input_precision=PRECISION)
        if OVER or not SCALED:
            read *= scale
        if GATED:
            mine = own if READ == INCLUSIVE else gates(g, step - 1, i > 0, gt, T, N, REVERSE)
            read *= tl.exp(tl.cumsum(mine, 0))[:, None]
        if OF_GATE:
            p, inside = tile(other, step, dv, xt, T, N, V, REVERSE)
            mates = tl.load(p, mask=inside, other=0.0)
            tl.store(inner + part * N + step, tl.sum(read * mates, 1))
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if GATED:
            scores *= pairwise(mine, own, C, READ)
        if STRICT or (READ == EXCLUSIVE and not GATED):
            scores = tl.where(i[:, None] > i[None, :], scores, 0.0)
        elif not GATED:
            scores = tl.where(i[:, None] >= i[None, :], scores, 0.0)
        read = tl.dot(scores.to(values.dtype), values, read, input_precision=PRECISION)
        if GATED:
            values = (values * to_end(g, own, step, gt, T, N, C, READ, REVERSE)[:, None]).to(values.dtype)
            state *= tl.exp(tl.sum(own, 0))
        if SCALED and not OVER:
            state += tl.dot(tl.trans(keys), values, input_precision=PRECISION) * scale
        else:
            state = tl.dot(tl.trans(keys), values, state, input_precision=PRECISION)
        if LESS:  # behind all else, as its own tiles would not fit beside the others
            p, inside = tile(less_k, step, dk, lt, T, N, K, REVERSE)
            gone = tl.load(p, mask=inside, other=0.0)
            p, inside = tile(less_v, step, dv, mt, T, N, V, REVERSE)
            taken = tl.load(p, mask=inside, other=0.0)
            if WIDE:
                gone, taken = gone.to(tl.float32), taken.to(tl.float32)
            taken = (-taken.to(tl.float32)).to(taken.dtype)
            scores = tl.dot(queries, tl.trans(gone), input_precision=PRECISION)
            if GATED:
                scores *= pairwise(mine, own, C, READ)
            scores = tl.where(i[:, None] > i[None, :], scores, 0.0)
            read = tl.dot(scores.to(taken.dtype), taken, read, input_precision=PRECISION)
            p, inside = tile(plus, step, dv, ot, T, N, V, REVERSE)
            read += tl.load(p, mask=inside, other=0.0)
            if GATED:
                taken = (taken * to_end(g, own, step, gt, T, N, C, READ, REVERSE)[:, None]).to(taken.dtype)
            state = tl.dot(tl.trans(gone), taken, state, input_precision=PRECISION)
        p, inside = tile(out, step, dv, ot, T, N, V, REVERSE)
        tl.store(p, read.to(out.dtype.element_ty), mask=inside)
    close(final, state * scale if OVER else state, n, which, n_segments, dk, dv, K, V)


@triton.jit
def pairs(
    q, k, v, do, less, g, sums, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, db, dh, dt, lb, lh, lt, gb, gh, gt,
    H, T, N,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    READ: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``sums [B*H, N]``: of each step, the sum over the pairs of its chunk whose decay goes through it.

    A pair (i, j) gives ``scale * decay * (q_i . k_j) (do_i . v_j)``, and of a delta rule, whose keys read as
    well, ``- decay * (k_i . k_j) (less_i . v_j)``. One program for a chunk.
    """
    _pairs(tl.program_id(0), q, k, v, do, less, g, sums, scale,
           qb, qh, qt, kb, kh, kt, vb, vh, vt, db, dh, dt, lb, lh, lt, gb, gh, gt,
           H, T, N, K, V, BK, BV, C, READ, REVERSE, WIDE, PRECISION)  # fmt: skip


@triton.jit
def _pairs(
    pid, q, k, v, do, less, g, sums, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, db, dh, dt, lb, lh, lt, gb, gh, gt,
    H, T, N,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    READ: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, n = pid % (N // C) * C, pid // (N // C)
    i = tl.arange(0, C)
    step = first + i
    ours = product(q + offset(n, H, qb, qh), k + offset(n, H, kb, kh), step, step, qt, kt, T, N,
                   K, BK, C, REVERSE, WIDE, PRECISION)  # fmt: skip
    theirs = product(do + offset(n, H, db, dh), v + offset(n, H, vb, vh), step, step, dt, vt, T, N,
                     V, BV, C, REVERSE, WIDE, PRECISION)  # fmt: skip
    g += offset(n, H, gb, gh)
    own = gates(g, step, True, gt, T, N, REVERSE)
    mine = own if READ == INCLUSIVE else gates(g, step - 1, i > 0, gt, T, N, REVERSE)
    each = ours * theirs * scale
    if less is not None:
        k += offset(n, H, kb, kh)
        ours = product(k, k, step, step, kt, kt, T, N, K, BK, C, REVERSE, WIDE, PRECISION)
        theirs = product(less + offset(n, H, lb, lh), v + offset(n, H, vb, vh), step, step, lt, vt, T, N,
                         V, BV, C, REVERSE, WIDE, PRECISION)  # fmt: skip
        each -= ours * theirs
    each *= pairwise(mine, own, C, READ)
    # [i, l]: what step i reads from before step l; three bf16 numbers hold an fp32 one
    before = (i[:, None] < i[None, :]).to(tl.bfloat16)
    before_l = tl.zeros((C, C), tl.float32)
    for _ in tl.static_range(3 if WIDE else 2):
        part = each.to(tl.bfloat16)
        before_l = tl.dot(part, before, before_l)
        each -= part.to(tl.float32)
    through = (i[:, None] > i[None, :]) if READ == EXCLUSIVE else (i[:, None] >= i[None, :])
    tl.store(sums + n.to(tl.int64) * N + step.to(tl.int64), tl.sum(tl.where(through, before_l, 0.0), 0))


@triton.jit
def product(
    x, y, left, right, xt, yt, T, N,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``[C (left), C (right)]``: the products of x's rows of some steps with y's of others."""
    total = tl.zeros((C, C), tl.float32)
    for begin in range(0, D, BD):
        d = begin + tl.arange(0, BD)
        p, inside = tile(x, left, d, xt, T, N, D, REVERSE)
        a = tl.load(p, mask=inside, other=0.0)
        p, inside = tile(y, right, d, yt, T, N, D, REVERSE)
        b = tl.load(p, mask=inside, other=0.0)
        if WIDE:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def prologue(
    q, k, v, do, g, states, logs, back, back_logs, sums, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, db, dh, dt, gb, gh, gt,
    H, T, n_segments, segment, walk,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PK: tl.constexpr, PV: tl.constexpr, GATED: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the forward ``summaries`` of (k, v), of the backward those of (q, do), and if GATED ``pairs``.

    ``walk`` is the number of programs that one way has; PK and PV are the blocks of ``pairs``.
    """
    pid = tl.program_id(0)
    BACK: tl.constexpr = EXCLUSIVE if READ == EXCLUSIVE else SOURCE
    if pid < walk:
        _summary(pid, k, v, g, states, logs, 1.0, kb, kh, kt, vb, vh, vt, gb, gh, gt,
                 H, T, n_segments, segment,
                 K, V, BK, BV, C, GATED, READ, REVERSE, WIDE, PRECISION)  # fmt: skip
    elif pid < 2 * walk:
        _summary(pid - walk, q, do, g, back, back_logs, scale, qb, qh, qt, db, dh, dt, gb, gh, gt,
                 H, T, n_segments, segment,
                 K, V, BK, BV, C, GATED, BACK, not REVERSE, WIDE, PRECISION)  # fmt: skip
    else:
        if GATED:
            _pairs(pid - 2 * walk, q, k, v, do, None, g, sums, scale,
                   qb, qh, qt, kb, kh, kt, vb, vh, vt, db, dh, dt, 0, 0, 0, gb, gh, gt,
                   H, T, n_segments * segment, K, V, PK, PV, C, READ, REVERSE, WIDE, PRECISION)  # fmt: skip
