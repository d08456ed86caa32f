"""The delta rule with one decay per key (KDA): gradients of q, k and the decays, chunk by chunk.

With S the state before a chunk, R the gradient of that behind it, n what the chunk writes and dv, the
gradient of its values, the state is read twice, by queries and by keys (whose gradient is -dv), and written
once. The pair of a reader i and a writer j of a chunk weighs

    w_ij = scale do_i . n_j, j <= i, for the query i         u_ij = -dv_i . n_j, j < i, for the key i

    dq_i = scale D S do_i + sum_j w_ij D k_j
    dk_i = -D S dv_i + sum_j u_ij D k_j  +  D R n_i + sum_j (w_ji D q_j + u_ji D k_j)

and the log decay of each step and key has all such products that the step stands between (``gate.py``).

    readings    weights, and what comes from outside of the chunk
    pairs       what comes from pairs of the chunk, in blocks of 16 steps as ``diagonal.within``; and the sum
"""

from __future__ import annotations

import triton
import triton.language as tl

from spcompile.kernels.triton.delta_per_key import skipped
from spcompile.kernels.triton.diagonal import (
    BLOCK,
    _from_start,
    _later,
    _load,
    _past,
    _row,
    _shifted,
    _to_end,
)
from spcompile.kernels.triton.tiles import EXCLUSIVE, INCLUSIVE, offset, tile

__all__ = ["pairs", "readings"]


@triton.jit
def readings(
    q, k, g, written, do, dv, kept, kept_back, of_queries, of_keys, dq, dk, dg, scale,
    qb, qh, qt, kb, kh, kt, gb, gh, gt, db, dh, dt,
    H, T, N, n_chunks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    READ: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``of_queries, of_keys [N, steps, C]``, the weights; ``dq, dk, dg [N, T, K]`` float32, from outside.

    ``written, dv [N, T, V]``; ``kept, kept_back [N, chunks, K, V]``: S and R. One program for a chunk.
    """
    pid = tl.program_id(0)
    chunk, head = pid % n_chunks, (pid // n_chunks).to(tl.int64)
    i, d = tl.arange(0, C), tl.arange(0, BK)
    first = chunk * C + skipped(T, N, C, REVERSE)
    step = first + i
    written += head * T * V
    dv += head * T * V
    do += offset(head, H, db, dh)
    by_query = tl.zeros((C, C), tl.float32)
    by_key = tl.zeros((C, C), tl.float32)
    asked = tl.zeros((C, BK), tl.float32)
    read = tl.zeros((C, BK), tl.float32)
    wrote = tl.zeros((C, BK), tl.float32)
    across = tl.zeros((BK,), tl.float32)
    for begin in range(0, V, BV):
        e = begin + tl.arange(0, BV)
        at = (head * n_chunks + chunk) * (K * V) + d[:, None] * V + e[None, :]
        whole = (d < K)[:, None] & (e < V)[None, :]
        before = tl.load(kept + at, mask=whole, other=0.0)
        behind = tl.load(kept_back + at, mask=whole, other=0.0)
        across += tl.sum(before.to(tl.float32) * behind.to(tl.float32), 1)
        values = _load(written, step, True, e, V, T, N, V, REVERSE, WIDE)
        wrote = tl.dot(values, tl.trans(behind), wrote, input_precision=PRECISION)
        given = _load(do, step, True, e, dt, T, N, V, REVERSE, WIDE)
        by_query = tl.dot(given, tl.trans(values), by_query, input_precision=PRECISION)
        asked = tl.dot(given, tl.trans(before), asked, input_precision=PRECISION)
        taken = _load(dv, step, True, e, V, T, N, V, REVERSE, WIDE)
        by_key = tl.dot(taken, tl.trans(values), by_key, input_precision=PRECISION)
        read = tl.dot(taken, tl.trans(before), read, input_precision=PRECISION)
    at = (head * n_chunks * C + chunk * C + i)[:, None] * C + i[None, :]
    gap = 0 if READ == INCLUSIVE else 1
    by_query = tl.where(i[:, None] >= i[None, :] + gap, by_query * scale, 0.0)
    tl.store(of_queries + at, by_query.to(of_queries.dtype.element_ty))
    by_key = tl.where(i[:, None] > i[None, :], -by_key, 0.0)
    tl.store(of_keys + at, by_key.to(of_keys.dtype.element_ty))

    g += offset(head, H, gb, gh)
    made = head * T * K
    start, through = _from_start(g, first, d, gt, T, N, C, K, INCLUSIVE, REVERSE)
    read *= -start
    if READ == EXCLUSIVE:
        start, _ = _from_start(g, first, d, gt, T, N, C, K, READ, REVERSE)
    asked *= start * scale
    p, inside = tile(dq + made, step, d, K, T, N, K, REVERSE)
    tl.store(p, asked, mask=inside)
    end, _ = _to_end(g, first, d, gt, T, N, C, K, INCLUSIVE, REVERSE)
    wrote *= end
    p, inside = tile(dk + made, step, d, K, T, N, K, REVERSE)
    tl.store(p, read + wrote, mask=inside)
    asked *= _load(q + offset(head, H, qb, qh), step, True, d, qt, T, N, K, REVERSE, True)
    keys = _load(k + offset(head, H, kb, kh), step, True, d, kt, T, N, K, REVERSE, True)
    if READ == EXCLUSIVE:
        read = _later(asked, C, False, False, 3 if WIDE else 2) + _later(
            read * keys, C, True, False, 3 if WIDE else 2
        )
    else:
        read = _later(asked + read * keys, C, True, False, 3 if WIDE else 2)
    wrote *= keys
    total = read + (across * tl.exp(through))[None, :]
    total += _later(wrote, C, False, True, 3 if WIDE else 2)
    p, inside = tile(dg + made, step, d, K, T, N, K, REVERSE)
    tl.store(p, total, mask=inside)


@triton.jit
def pairs(
    q, k, g, of_queries, of_keys, plus_q, plus_k, plus_g, out_q, out_k, dg,
    qb, qh, qt, kb, kh, kt, gb, gh, gt,
    H, T, N, n_chunks,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    READ: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out_q, out_k, dg [N, T, K]``: ``plus_*``, which lie alike, and what pairs of a chunk add to them.

    One program for 16 steps.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = C // 16
    b, pid = pid % blocks, pid // blocks
    chunk, n = pid % n_chunks, (pid // n_chunks).to(tl.int64)
    i, d = tl.arange(0, BLOCK), tl.arange(0, BK)
    first = chunk * C + skipped(T, N, C, REVERSE) + b * BLOCK
    step = first + i
    q += offset(n, H, qb, qh)
    k += offset(n, H, kb, kh)
    g += offset(n, H, gb, gh)
    of_queries += (n * n_chunks + chunk) * (C * C)
    of_keys += (n * n_chunks + chunk) * (C * C)
    keys = _load(k, step, True, d, kt, T, N, K, REVERSE, True)
    by_query, by_key = _weights(of_queries, b, b, C), _weights(of_keys, b, b, C)
    asked = tl.zeros((BLOCK, BK), tl.float32)
    read, wrote, of_gate = asked, asked, asked
    decays = tl.zeros((BLOCK, BK), tl.float32)  # from each step of the block to the row's reading
    for r in range(BLOCK):
        mine = (i == r)[:, None]
        seen = decays
        decays = tl.where(mine, 1.0, decays * tl.exp(_row(g, first + r, d, gt, T, N, K, REVERSE))[None, :])
        if READ == INCLUSIVE:
            seen = decays
        weight = tl.sum(tl.where(mine, by_query, 0.0), 0)[:, None]
        asked = tl.where(mine, tl.sum(weight * seen * keys, 0)[None, :], asked)
        both = weight * _row(q, first + r, d, qt, T, N, K, REVERSE)[None, :]
        if READ == EXCLUSIVE:
            wrote += both * seen
            of_gate += tl.where((i + 1 < r)[:, None], tl.cumsum(both * seen * keys, 0), 0.0)
            both = tl.zeros((BLOCK, BK), tl.float32)
        weight = tl.sum(tl.where(mine, by_key, 0.0), 0)[:, None]
        read = tl.where(mine, tl.sum(weight * decays * keys, 0)[None, :], read)
        both += weight * _row(k, first + r, d, kt, T, N, K, REVERSE)[None, :]
        wrote += both * decays
        of_gate += tl.where((i < r)[:, None], tl.cumsum(both * decays * keys, 0), 0.0)

    start, through = _from_start(g, first, d, gt, T, N, BLOCK, K, INCLUSIVE, REVERSE)
    from_q = tl.zeros((BLOCK, BK), tl.float32)
    from_k = tl.zeros((BLOCK, BK), tl.float32)
    between = tl.zeros((BK,), tl.float32)
    for back in range(1, b + 1):
        past, here = _past(k, g, first - back * BLOCK, d, between, kt, gt, T, N, K, INCLUSIVE, REVERSE)
        between += here
        weight = _weights(of_queries, b, b - back, C)
        from_q = tl.dot(weight, past, from_q, input_precision=PRECISION)
        from_k = tl.dot(_weights(of_keys, b, b - back, C), past, from_k, input_precision=PRECISION)
    from_k *= start
    if READ == EXCLUSIVE:
        start, _ = _from_start(g, first, d, gt, T, N, BLOCK, K, READ, REVERSE)
    from_q *= start
    behind = tl.zeros((BLOCK, BK), tl.float32)
    over = tl.zeros((BK,), tl.float32)  # of pairs on either side of the block
    between = tl.zeros((BK,), tl.float32)
    for ahead in range(1, blocks - b):
        later = first + ahead * BLOCK
        from_start, here = _from_start(g, later, d, gt, T, N, BLOCK, K, INCLUSIVE, REVERSE)
        gap = tl.exp(between)[None, :]
        between += here
        reading = _load(k, later + i, True, d, kt, T, N, K, REVERSE, True) * from_start * gap
        if READ == EXCLUSIVE:
            from_start, _ = _from_start(g, later, d, gt, T, N, BLOCK, K, READ, REVERSE)
        asking = _load(q, later + i, True, d, qt, T, N, K, REVERSE, True) * from_start * gap
        c = b + ahead
        behind = tl.dot(_mirrored(of_queries, c, b, C), asking, behind, input_precision=PRECISION)
        behind = tl.dot(_mirrored(of_keys, c, b, C), reading, behind, input_precision=PRECISION)
        gone = tl.zeros((BK,), tl.float32)
        for back in range(1, b + 1):
            past, here = _past(k, g, first - back * BLOCK, d, gone, kt, gt, T, N, K, INCLUSIVE, REVERSE)
            gone += here
            weight = _weights(of_queries, c, b - back, C)
            over += tl.sum(tl.dot(weight, past, input_precision=PRECISION) * asking, 0)
            weight = _weights(of_keys, c, b - back, C)
            over += tl.sum(tl.dot(weight, past, input_precision=PRECISION) * reading, 0)
    over *= tl.exp(through)
    end, _ = _to_end(g, first, d, gt, T, N, BLOCK, K, INCLUSIVE, REVERSE)
    behind *= end

    p, inside = tile(plus_q + n * T * K, step, d, K, T, N, K, REVERSE)
    total = tl.load(p, mask=inside, other=0.0) + asked + from_q
    p, inside = tile(out_q + n * T * K, step, d, K, T, N, K, REVERSE)
    tl.store(p, total.to(out_q.dtype.element_ty), mask=inside)
    p, inside = tile(plus_k + n * T * K, step, d, K, T, N, K, REVERSE)
    total = tl.load(p, mask=inside, other=0.0) + read + wrote + from_k + behind
    p, inside = tile(out_k + n * T * K, step, d, K, T, N, K, REVERSE)
    tl.store(p, total.to(out_k.dtype.element_ty), mask=inside)
    queries = _load(q, step, True, d, qt, T, N, K, REVERSE, True)
    # Rows of of_gate are those of the step behind.
    if READ == EXCLUSIVE:
        total = _later(from_q * queries, BLOCK, False, False, 3) + _later(
            from_k * keys, BLOCK, True, False, 3
        )
    else:
        total = _later(from_q * queries + from_k * keys, BLOCK, True, False, 3)
    total += _later(behind * keys, BLOCK, False, True, 3) + over[None, :] + _shifted(of_gate)
    p, inside = tile(plus_g + n * T * K, step, d, K, T, N, K, REVERSE)
    total += tl.load(p, mask=inside, other=0.0)
    p, inside = tile(dg + n * T * K, step, d, K, T, N, K, REVERSE)
    tl.store(p, total, mask=inside)


@triton.jit
def _weights(x, b, c, C: tl.constexpr):
    """The block at row b and column c of ``[C, C]``, float32."""
    i = tl.arange(0, BLOCK)
    return tl.load(x + (b * BLOCK + i)[:, None] * C + c * BLOCK + i[None, :]).to(tl.float32)


@triton.jit
def _mirrored(x, b, c, C: tl.constexpr):
    """The same, transposed."""
    i = tl.arange(0, BLOCK)
    return tl.load(x + (b * BLOCK + i)[None, :] * C + c * BLOCK + i[:, None]).to(tl.float32)
