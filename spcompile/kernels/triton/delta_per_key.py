"""The delta rule with one decay per key (KDA), over segments: what is written, and the gradients of that.

With U the state before a chunk, D the decay between two steps, one number per key, and A the strictly lower
(k k^T . D) of the chunk, the prediction of each step is D k U and what those before it in the chunk wrote:

    e = X (v - D k U)                     n = beta e             X = (I + A beta)^-1
    o = D q U + scores n                  U' = D U + (D k)^T n

and walking back, with R the gradient of the state behind the chunk and do that of the outputs,

    dn = Y (D k R + scores^T do)          dv = beta dn           Y = (I + A^T beta)^-1
    dbeta = e . dn                        R' = D R + (D q)^T do - (D k)^T dv

    prepared        what needs no state: X, Y, scores, and q and k decayed to either end of the chunk
    summaries       what each segment does to the state: a matrix, from columns of the identity, and a state
    summaries_back  and to its gradient: a state; the matrix is the other one transposed
    written         from the state before each segment: the outputs; or n, e and the states before chunks
    corrected       from the gradient behind each segment: dv, dbeta, and the gradients behind chunks

A key is decayed from the chunk's start where it reads and to its end where it writes, and walking back the
other way round: both ways read the same tensors. So no walk looks at a gate, and either goes by the steps of
the forward. Queries may be EXCLUSIVE (``tiles.py``), while keys read behind the decay of their own step. Sums
run over exactly the steps between, and no exponent is positive (``per_key.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from spcompile.kernels.triton.delta import start
from spcompile.kernels.triton.inverse import inverse_of
from spcompile.kernels.triton.per_key import (
    BLOCK,
    decay_from_start,
    decay_to_end,
    load,
    load_row,
    past_keys,
)
from spcompile.kernels.triton.tiles import EXCLUSIVE, INCLUSIVE, chunks, close, gates, offset, tile

__all__ = ["corrected", "prepared", "skipped", "summaries", "summaries_back", "written"]


@triton.jit
def skipped(T, N, C: tl.constexpr, REVERSE: tl.constexpr):
    """Steps of chunks of padding before the first that has tokens."""
    return (N - T) // C * C if REVERSE else 0


@triton.jit
def prepared(
    q, k, g, beta, scores, systems, adjoints, queries, readers, writers, through, scale,
    qb, qh, qt, kb, kh, kt, gb, gh, gt, bb, bh, bt,
    H, T, N, n_chunks,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    READ: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``scores``, ``systems`` (X) and ``adjoints`` (Y^T), ``[N, steps, C]``; one program for a chunk.

    ``queries``, ``readers``, ``writers [N, T, K]``: scale q and k, decayed from the chunk's start, and k to
    its end. ``through [N, chunks, K]``: the decay of a chunk.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = C // 16  # as a number of Python, which the interpreter needs
    chunk, n = pid % n_chunks, pid // n_chunks
    i, d = tl.arange(0, BLOCK), tl.arange(0, BK)
    first = chunk * C + skipped(T, N, C, REVERSE)
    q += offset(n, H, qb, qh)
    k += offset(n, H, kb, kh)
    g += offset(n, H, gb, gh)
    row = n.to(tl.int64) * n_chunks * C + chunk * C
    made = n.to(tl.int64) * T * K
    system = tl.zeros((C, C), tl.float32)
    behind = tl.zeros((BK,), tl.float32)
    for last in range(blocks):
        b = blocks - 1 - last
        begin = first + b * BLOCK
        step = begin + i
        at = scores + (row + b * BLOCK + i)[:, None] * C + i[None, :]
        keys = load(k, step, True, d, kt, T, N, K, REVERSE, True)
        own = tl.zeros((BLOCK, BLOCK), tl.float32)
        ours = own
        decays = tl.zeros((BLOCK, BK), tl.float32)  # from each step of the block to the row's reading
        for r in range(BLOCK):
            mine = (i == r)[:, None]
            decay = tl.exp(load_row(g, begin + r, d, gt, T, N, K, REVERSE))[None, :]
            seen = decays
            decays = tl.where(mine, 1.0, decays * decay)
            if READ == INCLUSIVE:
                seen = decays
            query = load_row(q, begin + r, d, qt, T, N, K, REVERSE)[None, :]
            own = tl.where(mine, tl.sum(seen * keys * query, 1)[None, :], own)
            key = load_row(k, begin + r, d, kt, T, N, K, REVERSE)[None, :]
            ours = tl.where(mine, tl.sum(decays * keys * key, 1)[None, :], ours)
        tl.store(at + b * BLOCK, (own * scale).to(scores.dtype.element_ty))
        system += _placed(tl.where(i[:, None] > i[None, :], ours, 0.0), b, b, C)
        for c in range(b + 1, blocks):
            tl.store(at + c * BLOCK, tl.zeros((BLOCK, BLOCK), scores.dtype.element_ty))

        start, here = decay_from_start(g, begin, d, gt, T, N, BLOCK, K, INCLUSIVE, REVERSE)
        key = keys * start
        if READ == EXCLUSIVE:
            start, _ = decay_from_start(g, begin, d, gt, T, N, BLOCK, K, READ, REVERSE)
        reading = load(q, step, True, d, qt, T, N, K, REVERSE, True) * start * scale
        between = tl.zeros((BK,), tl.float32)
        for back in range(1, b + 1):
            past, gone = past_keys(
                k, g, begin - back * BLOCK, d, between, kt, gt, T, N, K, INCLUSIVE, REVERSE
            )
            between += gone
            pairs = tl.dot(reading, tl.trans(past), input_precision=PRECISION)
            tl.store(at + (b - back) * BLOCK, pairs.to(scores.dtype.element_ty))
            system += _placed(tl.dot(key, tl.trans(past), input_precision=PRECISION), b, b - back, C)
        start = tl.exp(between)[None, :]
        end, _ = decay_to_end(g, begin, d, gt, T, N, BLOCK, K, INCLUSIVE, REVERSE)
        p, inside = tile(queries + made, step, d, K, T, N, K, REVERSE)
        tl.store(p, (reading * start).to(queries.dtype.element_ty), mask=inside)
        p, inside = tile(readers + made, step, d, K, T, N, K, REVERSE)
        tl.store(p, (key * start).to(readers.dtype.element_ty), mask=inside)
        p, inside = tile(writers + made, step, d, K, T, N, K, REVERSE)
        tl.store(p, (keys * end * tl.exp(behind)[None, :]).to(writers.dtype.element_ty), mask=inside)
        behind += here
    tl.store(through + (n.to(tl.int64) * n_chunks + chunk) * K + d, tl.exp(behind), mask=d < K)

    i = tl.arange(0, C)
    strengths = gates(beta + offset(n, H, bb, bh), first + i, True, bt, T, N, REVERSE)
    inverse = inverse_of(system * strengths[None, :], C, PRECISION)
    at = (row + i)[:, None] * C + i[None, :]
    tl.store(systems + at, inverse.to(systems.dtype.element_ty))
    # (I + beta A)^-1 = I - beta X A
    inverse = tl.dot(inverse, system, input_precision=PRECISION) * strengths[:, None]
    inverse = tl.where(i[:, None] == i[None, :], 1.0, -inverse)
    tl.store(adjoints + at, inverse.to(adjoints.dtype.element_ty))


@triton.jit
def _placed(x, b, c, C: tl.constexpr):
    """``[C, C]``: the block x at row b and column c of blocks, and zeros."""
    blocks: tl.constexpr = C // 16
    size: tl.constexpr = 16
    i = tl.arange(0, C) // size
    whole = tl.reshape(tl.broadcast_to(x[None, :, None, :], (blocks, size, blocks, size)), (C, C))
    return tl.where((i == b)[:, None] & (i == c)[None, :], whole, 0.0)


@triton.jit
def _square(x, row, C: tl.constexpr, MIRRORED: tl.constexpr):
    """``[C, C]`` of a chunk, whose first row is ``row``; transposed if MIRRORED."""
    i = tl.arange(0, C)
    down, across = (1, C) if MIRRORED else (C, 1)
    return tl.load(x + row * C + i[:, None] * down + i[None, :] * across)


@triton.jit
def _forward(
    state, reading, writing, given, systems, row, strengths, decay,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The errors of the predictions of a chunk, what it writes, and the state after it."""
    errors = given - tl.dot(reading, state.to(reading.dtype), input_precision=PRECISION)
    errors = tl.dot(_square(systems, row, C, False).to(tl.float32), errors, input_precision=PRECISION)
    writes = (errors * strengths[:, None]).to(writing.dtype)
    state = tl.dot(tl.trans(writing), writes, state * decay[:, None], input_precision=PRECISION)
    return errors, writes, state


@triton.jit
def _backward(
    state, queries, reading, writing, given, scores, adjoints, row, strengths, decay,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of what a chunk writes and of its values, and that of the state before it."""
    found = tl.dot(writing, state.to(writing.dtype), input_precision=PRECISION)
    weights = _square(scores, row, C, True).to(given.dtype)
    found = tl.dot(weights, given, found, input_precision=PRECISION)
    found = tl.dot(_square(adjoints, row, C, True).to(tl.float32), found, input_precision=PRECISION)
    writes = found * strengths[:, None]
    state = tl.dot(tl.trans(queries), given, state * decay[:, None], input_precision=PRECISION)
    state = tl.dot(tl.trans(reading), (-writes).to(reading.dtype), state, input_precision=PRECISION)
    return found, writes, state


@triton.jit
def summaries(
    readers, writers, v, systems, beta, through, states, matrices,
    vb, vh, vt, bb, bh, bt,
    H, T, n_chunks, n_segments, segment,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
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
    v += offset(n, H, vb, vh)
    beta += offset(n, H, bb, bh)
    readers += n.to(tl.int64) * T * K
    writers += n.to(tl.int64) * T * K
    state = tl.where(of_matrix & (dk[:, None] == dv[None, :]), 1.0, 0.0)
    N = n_segments * segment
    skip = skipped(T, N, C, REVERSE)
    begin, last = chunks(which, segment, T, N, C, REVERSE)
    for first in tl.range(begin, last, C, disable_licm=True):
        step, row = first + i, n.to(tl.int64) * n_chunks * C + first - skip
        reading = load(readers, step, True, dk, K, T, N, K, REVERSE, WIDE)
        writing = load(writers, step, True, dk, K, T, N, K, REVERSE, WIDE)
        given = load(v, step, column < parts, dv, vt, T, N, V, REVERSE, WIDE)
        strengths = gates(beta, step, True, bt, T, N, REVERSE)
        decay = tl.load(through + row // C * K + dk, mask=dk < K, other=0.0)
        _, _, state = _forward(state, reading, writing, given, systems, row, strengths, decay, C, PRECISION)
    at = n.to(tl.int64) * n_segments + which
    if of_matrix:
        p = matrices + at * (K * K) + dk[:, None] * K + dv[None, :]
        tl.store(p, state, mask=(dk < K)[:, None] & (dv < K)[None, :])
    else:
        p = states + at * (K * V) + dk[:, None] * V + dv[None, :]
        tl.store(p, state, mask=(dk < K)[:, None] & (dv < V)[None, :])


@triton.jit
def summaries_back(
    queries, readers, writers, do, scores, adjoints, beta, through, states,
    db, dh, dt, bb, bh, bt,
    H, T, n_chunks, n_segments, segment,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``states [N, segments, K, V]``, from the last segment on; one program for BV columns of one."""
    pid = tl.program_id(0)
    of_v, pid = pid % tl.cdiv(V, BV), pid // tl.cdiv(V, BV)
    which, n = pid % n_segments, pid // n_segments
    i, dk, dv = tl.arange(0, C), tl.arange(0, BK), of_v * BV + tl.arange(0, BV)
    do += offset(n, H, db, dh)
    beta += offset(n, H, bb, bh)
    queries += n.to(tl.int64) * T * K
    readers += n.to(tl.int64) * T * K
    writers += n.to(tl.int64) * T * K
    state = tl.zeros((BK, BV), tl.float32)
    N = n_segments * segment
    skip = skipped(T, N, C, REVERSE)
    begin, last = chunks(which, segment, T, N, C, REVERSE)
    count = tl.cdiv(last - begin, C)
    for passed in tl.range(count, disable_licm=True):
        first = begin + (count - 1 - passed) * C
        step, row = first + i, n.to(tl.int64) * n_chunks * C + first - skip
        asking = load(queries, step, True, dk, K, T, N, K, REVERSE, WIDE)
        reading = load(readers, step, True, dk, K, T, N, K, REVERSE, WIDE)
        writing = load(writers, step, True, dk, K, T, N, K, REVERSE, WIDE)
        given = load(do, step, True, dv, dt, T, N, V, REVERSE, WIDE)
        strengths = gates(beta, step, True, bt, T, N, REVERSE)
        decay = tl.load(through + row // C * K + dk, mask=dk < K, other=0.0)
        _, _, state = _backward(state, asking, reading, writing, given, scores, adjoints, row, strengths,
                                decay, C, PRECISION)  # fmt: skip
    at = n.to(tl.int64) * n_segments + n_segments - 1 - which
    p = states + at * (K * V) + dk[:, None] * V + dv[None, :]
    tl.store(p, state, mask=(dk < K)[:, None] & (dv < V)[None, :])


@triton.jit
def written(
    queries, readers, writers, v, scores, systems, beta, through,
    states, matrices, carry, out, errors, kept, final,
    vb, vh, vt, bb, bh, bt,
    H, T, n_chunks, n_segments, segment,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    FOLD: tl.constexpr, REVERSE: tl.constexpr, TRAINED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the state before each segment (``delta.start``); one program for BV of a segment's values.

    ``out [N, T, V]``: the outputs; or if TRAINED what is written, with ``errors``, which lie alike, and
    ``kept [N, chunks, K, V]``, the states before chunks.
    """
    pid = tl.program_id(0)
    of_v, pid = pid % tl.cdiv(V, BV), pid // tl.cdiv(V, BV)
    which, n = pid % n_segments, pid // n_segments
    i, dk, dv = tl.arange(0, C), tl.arange(0, BK), of_v * BV + tl.arange(0, BV)
    v += offset(n, H, vb, vh)
    beta += offset(n, H, bb, bh)
    queries += n.to(tl.int64) * T * K
    readers += n.to(tl.int64) * T * K
    writers += n.to(tl.int64) * T * K
    out += n.to(tl.int64) * T * V
    errors += n.to(tl.int64) * T * V
    whole = (dk < K)[:, None] & (dv < V)[None, :]
    state = start(states, matrices, carry, None, n, which, n_segments, dk, dv, K, V, FOLD, PRECISION)
    N = n_segments * segment
    skip = skipped(T, N, C, REVERSE)
    begin, last = chunks(which, segment, T, N, C, REVERSE)
    for first in tl.range(begin, last, C, disable_licm=True):
        step, row = first + i, n.to(tl.int64) * n_chunks * C + first - skip
        if TRAINED:
            at = kept + row // C * (K * V) + dk[:, None] * V + dv[None, :]
            tl.store(at, state.to(kept.dtype.element_ty), mask=whole)
        reading = load(readers, step, True, dk, K, T, N, K, REVERSE, WIDE)
        writing = load(writers, step, True, dk, K, T, N, K, REVERSE, WIDE)
        given = load(v, step, True, dv, vt, T, N, V, REVERSE, WIDE)
        strengths = gates(beta, step, True, bt, T, N, REVERSE)
        decay = tl.load(through + row // C * K + dk, mask=dk < K, other=0.0)
        read = tl.zeros((C, BV), tl.float32)
        if not TRAINED:
            asking = load(queries, step, True, dk, K, T, N, K, REVERSE, WIDE)
            read = tl.dot(asking, state.to(asking.dtype), input_precision=PRECISION)
        wrong, writes, state = _forward(state, reading, writing, given, systems, row, strengths, decay,
                                        C, PRECISION)  # fmt: skip
        p, inside = tile(out, step, dv, V, T, N, V, REVERSE)
        if TRAINED:
            tl.store(p, writes.to(out.dtype.element_ty), mask=inside)
            p, inside = tile(errors, step, dv, V, T, N, V, REVERSE)
            tl.store(p, wrong.to(errors.dtype.element_ty), mask=inside)
        else:
            weights = _square(scores, row, C, False).to(writes.dtype)
            read = tl.dot(weights, writes, read, input_precision=PRECISION)
            tl.store(p, read.to(out.dtype.element_ty), mask=inside)
    close(final, state, n, which, n_segments, dk, dv, K, V)


@triton.jit
def corrected(
    queries, readers, writers, do, scores, adjoints, beta, through,
    states, matrices, carry, errors, out, sums, kept, final,
    db, dh, dt, bb, bh, bt,
    H, T, n_chunks, n_segments, segment, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    FOLD: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The way back from the gradient behind each segment (``delta.start``), which begins with the last one.

    ``out [N, T, V]``: the gradients of values; ``sums [parts, N, T]``: those of beta, of the values that a
    program has; ``kept [N, chunks, K, V]``: those of the states behind chunks, in the forward's order.
    One program for BV of a segment's values.
    """
    pid = tl.program_id(0)
    of_v, pid = pid % tl.cdiv(V, BV), pid // tl.cdiv(V, BV)
    which, n = pid % n_segments, pid // n_segments
    i, dk, dv = tl.arange(0, C), tl.arange(0, BK), of_v * BV + tl.arange(0, BV)
    do += offset(n, H, db, dh)
    beta += offset(n, H, bb, bh)
    queries += n.to(tl.int64) * T * K
    readers += n.to(tl.int64) * T * K
    writers += n.to(tl.int64) * T * K
    out += n.to(tl.int64) * T * V
    errors += n.to(tl.int64) * T * V
    sums += (of_v * heads + n).to(tl.int64) * T
    whole = (dk < K)[:, None] & (dv < V)[None, :]
    behind = n_segments - 1 - which
    state = start(states, matrices, carry, None, n, behind, n_segments, dk, dv, K, V, FOLD, PRECISION, True)
    N = n_segments * segment
    skip = skipped(T, N, C, REVERSE)
    begin, last = chunks(which, segment, T, N, C, REVERSE)
    count = tl.cdiv(last - begin, C)
    for passed in tl.range(count, disable_licm=True):
        first = begin + (count - 1 - passed) * C
        step, row = first + i, n.to(tl.int64) * n_chunks * C + first - skip
        at = kept + row // C * (K * V) + dk[:, None] * V + dv[None, :]
        tl.store(at, state.to(kept.dtype.element_ty), mask=whole)
        asking = load(queries, step, True, dk, K, T, N, K, REVERSE, WIDE)
        reading = load(readers, step, True, dk, K, T, N, K, REVERSE, WIDE)
        writing = load(writers, step, True, dk, K, T, N, K, REVERSE, WIDE)
        given = load(do, step, True, dv, dt, T, N, V, REVERSE, WIDE)
        strengths = gates(beta, step, True, bt, T, N, REVERSE)
        decay = tl.load(through + row // C * K + dk, mask=dk < K, other=0.0)
        found, grads, state = _backward(state, asking, reading, writing, given, scores, adjoints, row,
                                        strengths, decay, C, PRECISION)  # fmt: skip
        p, inside = tile(out, step, dv, V, T, N, V, REVERSE)
        tl.store(p, grads.to(out.dtype.element_ty), mask=inside)
        p, inside = tile(errors, step, dv, V, T, N, V, REVERSE)
        wrong = tl.load(p, mask=inside, other=0.0).to(tl.float32)
        token = N - 1 - step if REVERSE else step
        tl.store(sums + token, tl.sum(found * wrong, 1), mask=token < T)
    close(final, state, n, behind, n_segments, dk, dv, K, V)
