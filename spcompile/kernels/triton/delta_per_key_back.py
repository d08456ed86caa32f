"""The delta rule with one decay per key (KDA): gradients of q, k and the decays, chunk by chunk.

With S the state before a chunk, R the gradient of that behind it, n what the chunk writes and dv, the
gradient of its values, the state is read twice, by queries and by keys (whose gradient is -dv), and written
once. The pair of a reader i and a writer j of a chunk weighs

    w_ij = scale do_i . n_j, j <= i, for the query i         u_ij = -dv_i . n_j, j < i, for the key i

    dq_i = scale D S do_i + sum_j w_ij D k_j
    dk_i = -D S dv_i + sum_j u_ij D k_j  +  D R n_i + sum_j (w_ji D q_j + u_ji D k_j)

and the log decay of each step and key has all such products that the step stands between (``gate.py``).

    readings    weights, and what comes from outside of the chunk
    pairs       what comes from pairs of the chunk; and the sum

Between the halves of a chunk, and between two blocks of 16 steps of each, D is split where they meet: so no
exponent is positive, and the steps that such pairs pass are those behind the writers and up to the readers.
Within a block pairs are met row by row (``diagonal.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from spcompile.kernels.triton.delta_per_key import skipped
from spcompile.kernels.triton.per_key import decay_from_start, decay_to_end, load, sum_behind, sum_rows
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
    for begin in tl.range(0, V, BV, disable_licm=True):
        e = begin + tl.arange(0, BV)
        at = (head * n_chunks + chunk) * (K * V) + d[:, None] * V + e[None, :]
        whole = (d < K)[:, None] & (e < V)[None, :]
        before = tl.load(kept + at, mask=whole, other=0.0)
        behind = tl.load(kept_back + at, mask=whole, other=0.0)
        across += tl.sum(before.to(tl.float32) * behind.to(tl.float32), 1)
        values = load(written, step, True, e, V, T, N, V, REVERSE, WIDE)
        wrote = tl.dot(values, tl.trans(behind), wrote, input_precision=PRECISION)
        given = load(do, step, True, e, dt, T, N, V, REVERSE, WIDE)
        by_query = tl.dot(given, tl.trans(values), by_query, input_precision=PRECISION)
        asked = tl.dot(given, tl.trans(before), asked, input_precision=PRECISION)
        taken = load(dv, step, True, e, V, T, N, V, REVERSE, WIDE)
        by_key = tl.dot(taken, tl.trans(values), by_key, input_precision=PRECISION)
        read = tl.dot(taken, tl.trans(before), read, input_precision=PRECISION)
    at = (head * n_chunks * C + chunk * C + i)[:, None] * C + i[None, :]
    by_query = tl.where(i[:, None] >= i[None, :], by_query * scale, 0.0)  # an EXCLUSIVE one skips its own
    tl.store(of_queries + at, by_query.to(of_queries.dtype.element_ty))
    by_key = tl.where(i[:, None] > i[None, :], -by_key, 0.0)
    tl.store(of_keys + at, by_key.to(of_keys.dtype.element_ty))

    g += offset(head, H, gb, gh)
    made = head * T * K
    start, through = decay_from_start(g, first, d, gt, T, N, C, K, INCLUSIVE, REVERSE)
    read *= -start
    if READ == EXCLUSIVE:
        start, _ = decay_from_start(g, first, d, gt, T, N, C, K, READ, REVERSE)
    asked *= start * scale
    p, inside = tile(dq + made, step, d, K, T, N, K, REVERSE)
    tl.store(p, asked, mask=inside)
    end, _ = decay_to_end(g, first, d, gt, T, N, C, K, INCLUSIVE, REVERSE)
    wrote *= end
    p, inside = tile(dk + made, step, d, K, T, N, K, REVERSE)
    tl.store(p, read + wrote, mask=inside)
    asked *= load(q + offset(head, H, qb, qh), step, True, d, qt, T, N, K, REVERSE, True)
    keys = load(k + offset(head, H, kb, kh), step, True, d, kt, T, N, K, REVERSE, True)
    if READ == EXCLUSIVE:
        read = sum_behind(asked, C, False, False, 3 if WIDE else 2) + sum_behind(
            read * keys, C, True, False, 3 if WIDE else 2
        )
    else:
        read = sum_behind(asked + read * keys, C, True, False, 3 if WIDE else 2)
    wrote *= keys
    total = read + (across * tl.exp(through))[None, :]
    total += sum_behind(wrote, C, False, True, 3 if WIDE else 2)
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

    One program for half a chunk, two blocks of 16 steps.
    """
    pid = tl.program_id(0)
    second, pid = pid % 2 == 1, pid // 2
    chunk, n = pid % n_chunks, (pid // n_chunks).to(tl.int64)
    half: tl.constexpr = C // 2
    size: tl.constexpr = C // 4
    i, d = tl.arange(0, half), tl.arange(0, BK)
    chunk_first = chunk * C + skipped(T, N, C, REVERSE)
    own = tl.where(second, half, 0)
    first = chunk_first + own
    step = first + i
    q += offset(n, H, qb, qh)
    k += offset(n, H, kb, kh)
    g += offset(n, H, gb, gh)
    of_queries += (n * n_chunks + chunk) * (C * C)
    of_keys += (n * n_chunks + chunk) * (C * C)
    keys = load(k, step, True, d, kt, T, N, K, REVERSE, True)
    corner = own.to(tl.int64) * (C + 1)
    asked, to_k, of_gate = _by_rows(q, k, g, keys, of_queries + corner, of_keys + corner, first,
                                     d, qt, kt, gt, T, N, C, K, BK, READ, REVERSE)  # fmt: skip
    total = sum_rows(i[:, None] == i[None, :] + 1, of_gate, 3)  # of the last step of a block it is zero

    # From the first of the two blocks to the second.
    later = (i >= size)[:, None]
    logs = load(g, step, True, d, gt, T, N, K, REVERSE, True)
    start = tl.exp(_in_blocks(logs, False))
    before_q = start
    if READ == EXCLUSIVE:
        before_q = load(g, step - 1, (i % size > 0)[:, None], d, gt, T, N, K, REVERSE, True)
        before_q = tl.exp(_in_blocks(before_q, False))
    queries = load(q, step, True, d, qt, T, N, K, REVERSE, True)
    across = (i < size)[:, None] & (i >= size)[None, :]
    weight = tl.where(across, _mirrored(of_queries, own, own, C), 0.0)
    behind = tl.dot(weight, queries * before_q, input_precision=PRECISION)
    weight = tl.where(across, _mirrored(of_keys, own, own, C), 0.0)
    behind = tl.dot(weight, keys * start, behind, input_precision=PRECISION)
    end = load(g, step + 1, ((i + 1) % size > 0)[:, None], d, gt, T, N, K, REVERSE, True)
    end = tl.exp(_in_blocks(end, True))
    behind *= end
    past = keys * end
    across = later & (i < size)[None, :]
    weight = tl.where(across, _weights(of_queries, own, own, C), 0.0)
    from_q = tl.dot(weight, past, input_precision=PRECISION) * before_q
    weight = tl.where(across, _weights(of_keys, own, own, C), 0.0)
    from_k = tl.dot(weight, past, input_precision=PRECISION) * start
    asked += from_q
    from_k += behind
    to_k += from_k
    # Readers are in the second block alone, and writers in the first.
    if READ == EXCLUSIVE:
        total += sum_rows(later & (i[:, None] < i[None, :]), from_q * queries, 3)
        from_q *= 0.0
    behind_it = tl.where(later, i[:, None] <= i[None, :], i[:, None] > i[None, :])
    total += sum_rows(behind_it, from_q * queries + from_k * keys, 3)

    # From the first half to the second.
    other = chunk_first + half - own
    if second:
        end, _ = decay_to_end(g, other, d, gt, T, N, half, K, INCLUSIVE, REVERSE)
        past = load(k, other + i, True, d, kt, T, N, K, REVERSE, True) * end
        start, _ = decay_from_start(g, first, d, gt, T, N, half, K, INCLUSIVE, REVERSE)
        from_k = tl.dot(_weights(of_keys, half, 0, C), past, input_precision=PRECISION) * start
        if READ == EXCLUSIVE:
            start, _ = decay_from_start(g, first, d, gt, T, N, half, K, READ, REVERSE)
        from_q = tl.dot(_weights(of_queries, half, 0, C), past, input_precision=PRECISION) * start
        asked += from_q
        to_k += from_k
        if READ == EXCLUSIVE:
            total += sum_behind(from_q * queries, half, False, False, 3)
            summed = from_k * keys
        else:
            summed = from_q * queries + from_k * keys
    else:
        start, _ = decay_from_start(g, other, d, gt, T, N, half, K, INCLUSIVE, REVERSE)
        reading = load(k, other + i, True, d, kt, T, N, K, REVERSE, True) * start
        behind = tl.dot(_mirrored(of_keys, half, 0, C), reading, input_precision=PRECISION)
        if READ == EXCLUSIVE:
            start, _ = decay_from_start(g, other, d, gt, T, N, half, K, READ, REVERSE)
        asking = load(q, other + i, True, d, qt, T, N, K, REVERSE, True) * start
        behind = tl.dot(_mirrored(of_queries, half, 0, C), asking, behind, input_precision=PRECISION)
        end, _ = decay_to_end(g, first, d, gt, T, N, half, K, INCLUSIVE, REVERSE)
        behind *= end
        to_k += behind
        summed = behind * keys
    total += sum_rows(tl.where(second, i[:, None] <= i[None, :], i[:, None] > i[None, :]), summed, 3)

    p, inside = tile(plus_q + n * T * K, step, d, K, T, N, K, REVERSE)
    asked += tl.load(p, mask=inside, other=0.0)
    p, inside = tile(out_q + n * T * K, step, d, K, T, N, K, REVERSE)
    tl.store(p, asked.to(out_q.dtype.element_ty), mask=inside)
    p, inside = tile(plus_k + n * T * K, step, d, K, T, N, K, REVERSE)
    to_k += tl.load(p, mask=inside, other=0.0)
    p, inside = tile(out_k + n * T * K, step, d, K, T, N, K, REVERSE)
    tl.store(p, to_k.to(out_k.dtype.element_ty), mask=inside)
    p, inside = tile(plus_g + n * T * K, step, d, K, T, N, K, REVERSE)
    total += tl.load(p, mask=inside, other=0.0)
    p, inside = tile(dg + n * T * K, step, d, K, T, N, K, REVERSE)
    tl.store(p, total, mask=inside)


@triton.jit
def _by_rows(
    q, k, g, keys, of_queries, of_keys, first, d, qt, kt, gt, T, N,
    C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, READ: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What pairs of a block add to dq, to dk, and to dg of the step behind.

    ``[32, BK]`` each, of two blocks, of which row after row is met.
    """
    half: tl.constexpr = C // 2
    size: tl.constexpr = C // 4
    b, i = tl.arange(0, 2), tl.arange(0, size)
    at = (b * size)[:, None, None] * (C + 1) + i[None, :, None] * C + i[None, None, :]
    by_query = tl.load(of_queries + at).to(tl.float32)
    by_key = tl.load(of_keys + at).to(tl.float32)
    keys = tl.reshape(keys, (2, size, BK))
    asked = tl.zeros((2, size, BK), tl.float32)
    to_k, of_gate, decays = asked, asked, asked  # decays from each step to the row's reading
    for r in range(size):
        mine = (i == r)[None, :, None]
        rows = first + r + b * size
        seen = decays
        decay = tl.exp(load(g, rows, True, d, gt, T, N, K, REVERSE, True))[:, None, :]
        decays = tl.where(mine, 1.0, decays * decay)
        if READ == INCLUSIVE:
            seen = decays
        weight = tl.sum(tl.where(mine, by_query, 0.0), 1)[:, :, None]
        asked = tl.where(mine, tl.sum(weight * seen * keys, 1)[:, None, :], asked)
        both = weight * load(q, rows, True, d, qt, T, N, K, REVERSE, True)[:, None, :]
        if READ == EXCLUSIVE:
            to_k += both * seen
            of_gate += tl.where((i + 1 < r)[None, :, None], tl.cumsum(both * seen * keys, 1), 0.0)
            both = tl.zeros((2, size, BK), tl.float32)
        weight = tl.sum(tl.where(mine, by_key, 0.0), 1)[:, :, None]
        to_k += tl.where(mine, tl.sum(weight * decays * keys, 1)[:, None, :], 0.0)
        both += weight * load(k, rows, True, d, kt, T, N, K, REVERSE, True)[:, None, :]
        to_k += both * decays
        of_gate += tl.where((i < r)[None, :, None], tl.cumsum(both * decays * keys, 1), 0.0)
    return tl.reshape(asked, (half, BK)), tl.reshape(to_k, (half, BK)), tl.reshape(of_gate, (half, BK))


@triton.jit
def _in_blocks(logs, BACK: tl.constexpr):
    """Sums of rows up to each row of its block of 16, or if BACK from it on."""
    blocks = tl.reshape(logs, (logs.shape[0] // 16, 16, logs.shape[1]))
    return tl.reshape(tl.cumsum(blocks, 1, reverse=BACK), logs.shape)


@triton.jit
def _weights(x, b, c, C: tl.constexpr):
    """Half of the rows and columns of ``[C, C]``, from row b and column c on, float32."""
    i = tl.arange(0, C // 2)
    return tl.load(x + (b + i)[:, None] * C + c + i[None, :]).to(tl.float32)


@triton.jit
def _mirrored(x, b, c, C: tl.constexpr):
    """The same, transposed."""
    i = tl.arange(0, C // 2)
    return tl.load(x + (b + i)[None, :] * C + c + i[:, None]).to(tl.float32)
