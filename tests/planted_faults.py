"""Faults planted in the fused kernels, one at a time: ``TRITON_INTERPRET=1 python -m tests.planted_faults``.

A fault that the cases of ``fused_worker.py`` do not see would show a hole in them. One line of JSON: fault ->
the largest error that the cases found (infinity: not a number, or an exception).
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

import spcompile.kernels.triton
from spcompile.kernels.linear import delta_ops, diagonal_ops, kda_ops, launch, segment_ops
from tests import fused_worker, triton_interpreter

END = "to_end(g, own, step, gt, T, N, C, READ, REVERSE)[:, None]"
DOT = "input_precision=PRECISION)"
PLAIN = ("fp32, mild, two chunks, ", "fp32, none, two chunks, ")
PER_KEY = ("fp32, mild per key, two chunks, ", "fp32, mild per key, two chunks, both")
DELTA = ("fp32, mild, delta rule, two chunks, ",)
SEGMENTS = "fp32, mild, four segments, "
DELTA_WIDE = "fp32, delta rule, wide, "
DELTA_SEGMENTS = ("fp32, delta rule, three segments, ",)
KDA = ("fp32, mild per key, delta rule, two chunks, ",)
KDA_SEGMENTS = ("fp32, strong per key, delta rule, three segments, reverse",)

KEYS, BACK = "delta_per_key", "delta_per_key_back"

# kernel -> (source file, what is there, what is put there), the first place where it stands.
FAULTS = {
    "tiles": [
        ("tiles", "inside = behind >= 0", "inside = behind > 0"),
        ("tiles", "(low[:, None] - past_low[None, :])", "0.0"),
        ("tiles", "g = tl.minimum(tl.maximum(g, -1000.0), 1000.0)", "g = g + 0.0"),
        ("tiles", "return tl.cumsum(high, 0, reverse=FLIP)", "return tl.cumsum(g, 0, reverse=FLIP)"),
        ("tiles", "past, past_low = _running(own, FLIP)", "past, past_low = high, low"),
        ("tiles", "(token < T)[:, None] & ", ""),
        ("tiles", "mask=inside & (token < T)", "mask=inside"),
        ("tiles", "reverse=not FLIP)", "reverse=FLIP)"),
        ("tiles", "(i > 0) if FLIP else (i + 1 < C)", "(i > 0) if FLIP else (i < C)"),
        ("tiles", "(N - T) // C * C", "(N - T) // C * C + C"),
    ],
    "start": [
        ("tiles", "state *= tl.exp(log)", "state *= 1.0"),
        ("tiles", "for earlier in range(which)", "for earlier in range(which - 1)"),
        ("tiles", "if carry is not None", "if carry is None"),
        ("tiles", "log = tl.load(logs + at)", "log = tl.load(logs + n * n_segments)"),
        ("tiles", "if which == n_segments - 1", "if which == 0"),
        ("tiles", "state += tl.load(p + entry", "state = tl.load(p + entry"),
    ],
    "start, per key": [
        ("tiles", "logs + at * K + dk", "logs + dk"),
        ("tiles", "logs + at * V + dv", "logs + dv"),
        ("tiles", "state *= tl.exp(log)", "state *= 1.0"),
        ("diagonal", "sn, ss, sk, sv, K, V, FOLD, 1)", "sn, ss, sk, sv, K, V, FOLD, None)"),
        ("diagonal", "sn, ss, sk, sv, K, V, FOLD, 0)", "sn, ss, sk, sv, K, V, FOLD, None)"),
        ("diagonal", "_summary(pid - walk, q, do, g, back, back_logs, scale",
         "_summary(pid - walk, q, do, g, back, back_logs, 1.0"),
    ],
    "prologue": [
        ("segments", "if pid < walk:", "if pid < walk - 1:"),
        ("segments", "elif pid < 2 * walk", "elif pid < 2 * walk - 1"),
        ("segments", "_summary(pid - walk, q, do, g, back, back_logs, scale",
         "_summary(pid - walk, q, do, g, back, back_logs, 1.0"),
        ("segments", "BV, C, GATED, BACK, not REVERSE", "BV, C, GATED, BACK, REVERSE"),
        ("segments", "BV, C, GATED, BACK, not REVERSE", "BV, C, GATED, READ, not REVERSE"),
        ("segments", "_pairs(pid - 2 * walk, q", "_pairs(pid - 2 * walk, k"),
    ],
    "summaries": [
        ("segments", "state *= tl.exp(here)", "state *= 1.0"),
        ("segments", "total += here", "total = here"),
        ("segments", "tl.store(p, state * scale", "tl.store(p, state"),
        ("segments", f"values = (values * {END}).to(values.dtype)", "values = values"),
        ("segments", f"values, state, {DOT}", 'values, state, input_precision="tf32")'),
        ("segments", "tl.range(begin, end, C", "tl.range(begin, end - C, C"),
    ],
    "outputs": [
        ("segments", "read *= tl.exp(tl.cumsum(mine, 0))[:, None]", "read *= 1.0"),
        ("segments", "elif not GATED:\n            scores = tl.where(i[:, None] >= ", "elif not GATED:\n"
         "            scores = tl.where(i[:, None] > "),
        ("segments", "state *= tl.exp(tl.sum(own, 0))", "state *= 1.0"),
        ("segments", f"values, read, {DOT}", 'values, read, input_precision="tf32")'),
        ("segments", "across * tl.exp(tl.sum(own, 0))", "across"),
        ("segments", "tl.sum(read * mates, 1)", "tl.sum(mates * mates, 1)"),
        ("segments", "read *= scale", "read *= 1.0"),
    ],
    "outputs, delta": [
        ("segments", "if STRICT or (READ", "if (READ"),
        ("segments", "taken = (-taken.to(tl.float32)).to(taken.dtype)", "taken = taken"),
        ("segments", "scores *= pairwise(mine, own, C, READ)\n            scores", "scores *= 1.0; scores"),
        ("segments", "read += tl.load(p, mask=inside, other=0.0)", "read += 0.0"),
        ("segments", f"taken = (taken * {END}).to(taken.dtype)", "taken = taken"),
        ("segments", "tl.dot(tl.trans(gone), taken, state", "tl.dot(tl.trans(keys), taken, state"),
    ],
    "pairs": [
        ("segments", "else (i[:, None] >= i[None, :])", "else (i[:, None] > i[None, :])"),
        ("segments", "each = ours * theirs * scale", "each = ours * theirs"),
        ("segments", "each *= pairwise(mine, own, C, READ)", "each *= 1.0"),
        ("segments", "(i[:, None] < i[None, :]).to(", "(i[:, None] <= i[None, :]).to("),
        ("segments", "static_range(3 if WIDE", "static_range(1 if WIDE"),
        ("segments", "tl.where(through, before_l, 0.0), 0)", "tl.where(through, before_l, 0.0), 1)"),
    ],
    "systems": [
        ("inverse", "lower * strengths[None, :]", "lower * strengths[:, None]"),
        ("inverse", "for r in range(1, 16)", "for r in range(1, 15)"),
        ("inverse", "within += tl.dot(square", "within -= tl.dot(square"),
        ("inverse", "within -= tl.dot(system", "within += tl.dot(system"),
        ("inverse", "lower *= pairwise(", "lower *= 0.0 + 0.0 * pairwise("),
        ("inverse", "row & blocks, within", "row, within"),
        ("inverse", f"within = tl.dot(within, lower, {DOT}", "within = lower"),
    ],
    "delta summaries": [
        ("delta", "state = tl.where(of_matrix &", "state = tl.where((column < 0) &"),
        ("delta", "other=0.0)\n        queries = keys", "other=0.0) * 0.0\n        queries = keys"),
        ("delta", "given, y * -strength[:, None]", "given, y * strength[:, None]"),
        ("delta", "state *= tl.exp(tl.sum(own, 0))", "state *= 1.0"),
        ("delta", "writes *= end[:, None]", "writes *= 1.0"),
        ("delta", f"queries), given, {DOT} * scale", f"queries), given, {DOT}"),
    ],
    "delta prologue": [
        ("delta", "pid < walk:", "pid < walk - 1:"),
        ("delta", "_summary(pid - walk, q, k, do", "_summary(pid - walk, k, k, do"),
        ("delta", "g, back, back_matrices, scale,\n    ", "g, back, back_matrices, 1.0,\n    "),
        ("delta", "SOURCE, not REVERSE, True", "SOURCE, REVERSE, True"),
        ("delta", "SOURCE, not REVERSE, True", "INCLUSIVE, not REVERSE, True"),
        ("delta", "INCLUSIVE, REVERSE, False", "SOURCE, REVERSE, False"),
    ],
    "delta outputs": [
        ("delta", "read = tl.dot(scores, writes.to", "read = tl.dot(scores, y.to"),
        ("delta", "writes = y * -strength[:, None]", "writes = -y"),
        ("delta", "for earlier in range(which)", "for earlier in range(which - 1)"),
        ("delta", "tl.load(p + HALF * of_column", "tl.load(p"),
        ("delta", "if carry is not None", "if carry is None"),
        ("delta", "tl.cumsum(mine, 0))[:, None]", "0.0 * mine)[:, None]"),
        ("delta", f"keys.dtype), read, {DOT} * scale", f"keys.dtype), read, {DOT}"),
    ],
    "per key, summaries": [
        ("diagonal", "keys = (keys * end).to(keys.dtype)\n        total", "total"),
        ("diagonal", "total += here", "total = here"),
        ("diagonal", "state *= tl.exp(here)[:, None]", "state *= 1.0"),
        ("diagonal", "PRECISION) * scale\n    at = n", "PRECISION)\n    at = n"),
        ("per_key", "(i + 1 < M)[:, None]", "(i + 2 < M)[:, None]"),
        ("per_key", "+ load_row(g, first, d", "+ 0 * load_row(g, first, d"),
    ],
    "per key, outputs": [
        ("diagonal", "queries = (queries * begun).to(queries.dtype)", "queries = queries"),
        ("diagonal", "read *= scale\n        if MIRRORED", "read *= 1.0\n        if MIRRORED"),
        ("diagonal", "C + (C - 1 - i)[:, None]", "C + i[:, None]"),
        ("diagonal", "weights, values, read", "weights, values, read * 0.0"),
        ("diagonal", "state *= tl.exp(through)[:, None]", "state *= 1.0"),
        ("diagonal", "PRECISION) * scale\n        else", "PRECISION)\n        else"),
    ],
    "columns": [
        ("diagonal", "* state, 0) * through", "* state, 0)"),
        ("diagonal", "read *= begun", "read *= 1.0"),
        ("diagonal", "(read + tl.load(added, mask=valid, other=0.0))", "(read)"),
        ("diagonal", "READ == INCLUSIVE, False, 3 if WIDE", "READ != INCLUSIVE, False, 3 if WIDE"),
        ("diagonal", "read += across[None, :]", "read += 0.0 * across[None, :]"),
        ("diagonal", "state *= through[None, :]", "state *= 1.0"),
        ("diagonal", "values = (values * end).to(values.dtype)", "values = values"),
        ("diagonal", "read += tl.load(p, mask=inside, other=0.0)", "read += 0.0"),
        ("per_key", "tl.range(PARTS", "tl.range(1"),
    ],
    "within": [
        ("diagonal", "tl.sum(decays * keys * query", "tl.sum(keys * query"),
        ("diagonal", "writes += weight * decays * query", "writes += weight * query"),
        ("diagonal", "EXCLUSIVE else 0) < r)", "EXCLUSIVE else 0) <= r)"),
        ("diagonal", "scores + (b - back) * BLOCK", "scores + (b - 1) * BLOCK"),
        ("diagonal", "before *= begun", "before *= 1.0"),
        ("diagonal", "behind *= end", "behind *= 1.0"),
        ("diagonal", "over *= tl.exp(through)", "over *= 0.0"),
        ("diagonal", "* later, 0)\n", ", 0)\n"),
        ("per_key", "* tl.exp(between)[None, :], through", ", through"),
        ("diagonal", "i[:, None] == i[None, :] + 1", "i[:, None] == i[None, :]"),
        ("diagonal", "False, True, 3) + over", "True, True, 3) + over"),
    ],
    "corrected": [
        ("delta", "(-writes if BACK else writes)", "writes"),
        ("delta", "tl.sum(y * wrong, 1)", "tl.sum(y * y, 1)"),
        ("delta", "tl.store(p, (-y)", "tl.store(p, y"),
        ("delta", "read -= given", "read += given"),
        ("delta", "given.dtype), given, read", "given.dtype), given, read * 0.0"),
        ("delta", "given = (given * end[:, None]).to(given.dtype)", "given = given"),
        ("delta", "[None, :] * C + i[:, None]", "[:, None] * C + i[None, :]"),
        ("delta", "first + (C - 1 - i) if BACK", "first + i if BACK"),
        ("delta", "tl.store(before + at * (K * V)", "tl.store(before + 0 * at"),
    ],
    "pairs, delta": [
        ("segments", "each -= ours * theirs", "each += ours * theirs"),
        ("segments", "product(k, k, step, step, kt, kt", "product(k, k, step, step, kt, 0 * kt"),
        ("segments", "product(less + offset(n, H, lb, lh)", "product(less"),
        ("segments", "each = ours * theirs * scale", "each = ours * theirs"),
        ("segments", "if less is not None:", "if less is None:"),
        ("segments", "k += offset(n, H, kb, kh)\n        ours", "ours"),
    ],
    "kda, prepared": [
        (KEYS, "skipped(T, N, C, REVERSE)\n    q +=", "0\n    q +="),
        (KEYS, "tl.where(mine, 1.0, decays * decay)", "tl.where(mine, 1.0, decays)"),
        (KEYS, "tl.where(i[:, None] > i[None, :], ours", "tl.where(i[:, None] >= i[None, :], ours"),
        (KEYS, "keys = load(k, step, True, d, kt, T, N, K", "keys = load(k, step, True, d, kt, T, N, BK"),
        (KEYS, "between += gone", "between = gone"),
        (KEYS, "precision=PRECISION), b, b - back, C)", "precision=PRECISION), b, 0, C)"),
        (KEYS, "start = tl.exp(between)[None, :]", "start = 1.0"),
        (KEYS, "behind += here", "behind = here"),
        (KEYS, "end * tl.exp(behind)[None, :]", "end"),
        (KEYS, "system * strengths[None, :], C", "system * strengths[:, None], C"),
        ("inverse", "for r in range(1, 16)", "for r in range(1, 15)"),
        (KEYS, "1.0, -inverse)", "1.0, inverse)"),
    ],
    "kda, summaries": [
        (KEYS, "state * decay[:, None], input", "state, input"),
        (KEYS, "(errors * strengths[:, None])", "(errors)"),
        (KEYS, "load(v, step, column < parts", "load(v, step, True"),
        (KEYS, "1.0, 0.0)\n    N = ", "0.0, 0.0)\n    N = "),
        (KEYS, "matrices + at * (K * K) + dk[:, None] * K + dv[None, :]",
         "matrices + at * (K * K) + dk[:, None] + dv[None, :] * K"),
        (KEYS, "errors = given - tl.dot", "errors = given + tl.dot"),
    ],
    "kda, summaries back": [
        (KEYS, "first = begin + (count - 1 - passed) * C", "first = begin + passed * C"),
        (KEYS, "_square(scores, row, C, True)", "_square(scores, row, C, False)"),
        (KEYS, "_square(adjoints, row, C, True)", "_square(adjoints, row, C, False)"),
        (KEYS, "(-writes).to(reading", "writes.to(reading"),
        (KEYS, "+ n_segments - 1 - which\n    p = states", "+ which\n    p = states"),
        (KEYS, "queries), given, state * decay[:, None]", "queries), given, state"),
        (KEYS, "weights, given, found,", "weights, given, found * 0.0,"),
    ],
    "kda, written": [
        (KEYS, "TRAINED:\n            at = kept + row // C", "TRAINED:\n            at = kept + 0 * row"),
        (KEYS, "errors += n.to(tl.int64) * T * V\n    whole", "errors += 0\n    whole"),
        (KEYS, "read = tl.dot(asking, state", "read = tl.dot(reading, state"),
        (KEYS, "tl.dot(weights, writes, read,", "tl.dot(weights, writes, read * 0.0,"),
        (KEYS, "_square(scores, row, C, False)", "_square(scores, row, C, True)"),
        (KEYS, "tl.store(p, wrong.to(", "tl.store(p, writes.to("),
    ],
    "kda, corrected": [
        (KEYS, "behind = n_segments - 1 - which", "behind = which"),
        (KEYS, "tl.sum(found * wrong, 1)", "tl.sum(grads * wrong, 1)"),
        (KEYS, "tl.store(p, grads.to(", "tl.store(p, found.to("),
        (KEYS, "token = N - 1 - step if REVERSE else step\n        tl.st", "token = step\n        tl.st"),
        (KEYS, "sums += (of_v * heads + n)", "sums += (0 * heads + n)"),
        (KEYS, "kept.dtype.element_ty), mask=whole)\n        asking",
         "kept.dtype.element_ty), mask=whole & (first < 0))\n        asking"),
    ],
    "kda, readings": [
        (BACK, "i[:, None] >= i[None, :], by_query", "i[:, None] > i[None, :], by_query"),
        (BACK, "tl.where(i[:, None] > i[None, :], -by_key", "tl.where(i[:, None] >= i[None, :], -by_key"),
        (BACK, "by_query * scale", "by_query"),
        (BACK, "asked *= start * scale", "asked *= scale"),
        (BACK, "wrote *= end", "wrote *= 1.0"),
        (BACK, "read *= -start", "read *= start"),
        (BACK, "tl.store(p, read + wrote", "tl.store(p, wrote"),
        (BACK, "across * tl.exp(through)", "across"),
        (BACK, "sum_behind(asked + read * keys, C, True", "sum_behind(asked + read * keys, C, False"),
        (BACK, "sum_behind(wrote, C, False, True", "sum_behind(wrote, C, True, True"),
        (BACK, "tl.sum(before.to(tl.float32) * behind", "tl.sum(before.to(tl.float32) * before"),
    ],
    "kda, exclusive": [
        (KEYS, "if READ == INCLUSIVE:\n                seen", "if READ != INCLUSIVE:\n                seen"),
        (KEYS, "if READ == EXCLUSIVE:\n            start", "if READ == INCLUSIVE:\n            start"),
        (BACK, "READ == EXCLUSIVE:\n        before_q", "READ == INCLUSIVE:\n        before_q"),
        (BACK, "later & (i[:, None] < i", "later & (i[:, None] <= i"),
        (BACK, "if READ == EXCLUSIVE:\n        start, _", "if READ == INCLUSIVE:\n        start, _"),
        (BACK, "sum_behind(asked, C, False, False", "sum_behind(asked, C, True, False"),
        (BACK, "if READ == INCLUSIVE:\n            seen", "if READ != INCLUSIVE:\n            seen"),
        (BACK, "to_k += both * seen", "to_k += both * decays"),
        (BACK, "(i + 1 < r)[None, :, None]", "(i < r)[None, :, None]"),
        (BACK, "READ == EXCLUSIVE:\n            start", "READ == INCLUSIVE:\n            start"),
        (BACK, "sum_behind(from_q * queries, half, False", "sum_behind(from_q * queries, half, True"),
    ],
    "kda, pairs": [
        (BACK, "tl.where(mine, 1.0, decays * decay)", "tl.where(mine, 1.0, decays)"),
        (BACK, "(i < r)[None, :, None]", "(i <= r)[None, :, None]"),
        (BACK, "to_k += both * decays", "to_k += both"),
        (BACK, "to_k += tl.where(mine", "to_k += 0.0 * tl.where(mine"),
        (BACK, "i[:, None] == i[None, :] + 1", "i[:, None] == i[None, :]"),
        (BACK, "corner = own.to(tl.int64) * (C + 1)", "corner = own.to(tl.int64) * C"),
        (BACK, "keys * start, behind", "keys, behind"),
        (BACK, "behind *= end\n    past", "past"),
        (BACK, "past = keys * end", "past = keys"),
        (BACK, "past, input_precision=PRECISION) * before_q", "past, input_precision=PRECISION)"),
        (BACK, "tl.where(later, i[:, None] <= i[None, :], i", "tl.where(later, i[:, None] < i[None, :], i"),
        (BACK, "T, N, K, REVERSE, True) * end", "T, N, K, REVERSE, True)"),
        (BACK, "_weights(of_keys, half, 0, C), past", "_weights(of_queries, half, 0, C), past"),
        (BACK, "tl.where(second, i[:, None] <= i", "tl.where(second, i[:, None] < i"),
        (BACK, "behind *= end\n        to_k", "to_k"),
        (BACK, "i[:, None] > i[None, :]), summed", "i[:, None] >= i[None, :]), summed"),
    ],
}  # fmt: skip


def planted(number: int, fault: tuple[str, str, str], folder: Path) -> None:
    """Let the operators use a copy of the kernels with a fault."""
    file, old, new = fault
    package, source = f"faulty{number}", Path(spcompile.kernels.triton.__file__).parent
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    for name in ("tiles", "segments", "inverse", "delta", "per_key", "diagonal", KEYS, BACK):
        text = (source / f"{name}.py").read_text()
        if name == file:
            assert old in text, fault
            text = text.replace(old, new, 1)
        text = text.replace("spcompile.kernels.triton.", f"{package}.")
        (folder / package / f"{name}.py").write_text(text)
    segment_ops.segments = importlib.import_module(f"{package}.segments")
    delta_ops.inverse = importlib.import_module(f"{package}.inverse")
    delta_ops.delta = importlib.import_module(f"{package}.delta")
    diagonal_ops.diagonal = importlib.import_module(f"{package}.diagonal")
    kda_ops.delta_per_key = importlib.import_module(f"{package}.{KEYS}")
    kda_ops.delta_per_key_back = importlib.import_module(f"{package}.{BACK}")


def worst(cases: tuple[str, ...]) -> float:
    """The largest error of some cases; they run in a process of their own, which a fault may crash."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_worst, args=(cases, theirs))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return math.inf
    finally:
        child.join()


def _worst(cases: tuple[str, ...], answer: Any) -> None:
    found = 0.0
    for case, function in itertools.product(cases, (fused_worker.errors, _totals)):
        try:
            errors = function(case)
        except Exception:
            errors = {"": math.inf}
        found = max(found, *(math.inf if math.isnan(e) else e for e in errors.values()))
        if found > 1e-4:  # caught
            break
    answer.send(found)


def _totals(case: str) -> dict[str, float]:
    return {"total": fused_worker.totals(case)}


# kernel -> cases that run it, where ``PLAIN`` are not enough.
CASES = {
    "tiles": (*PLAIN, "fp32, mild, two chunks, reverse", "fp32, strong, two chunks, exclusive"),
    "start": (SEGMENTS,),
    "start, per key": ("fp32, mild per key, three segments, ",),
    "prologue": (SEGMENTS,),
    "systems": DELTA,
    "corrected": (*DELTA, *DELTA_SEGMENTS),
    "outputs, delta": DELTA,
    "pairs, delta": DELTA,
    "delta summaries": (*DELTA, *DELTA_SEGMENTS),
    "delta prologue": ("fp32, mild, delta rule, three segments, ",),
    "delta outputs": (*DELTA, *DELTA_SEGMENTS, DELTA_WIDE),
    "per key, summaries": PER_KEY,
    "per key, outputs": PER_KEY,
    "columns": PER_KEY,
    "within": PER_KEY,
    "kda, exclusive": (f"{KDA[0]}both",),
    **dict.fromkeys(("kda, written", "kda, readings", "kda, pairs"), (f"{KDA[0]}reverse",)),
    **dict.fromkeys(
        ("kda, prepared", "kda, summaries", "kda, summaries back", "kda, corrected"),
        (f"{KDA[0]}reverse", *KDA_SEGMENTS),
    ),
}


def main() -> int:
    triton_interpreter.install()
    launch._LEAST = fused_worker.SEGMENT
    found: dict[str, float] = {}
    only = sys.argv[1:] or [*FAULTS]
    every = [(kernel, fault) for kernel in only for fault in FAULTS[kernel]]
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        for number, (kernel, fault) in enumerate(tqdm(every, desc="faults")):
            planted(number, fault, Path(folder))
            found[f"{kernel}: {fault[1]} -> {fault[2]}"] = worst(CASES.get(kernel, PLAIN))
    print("FOUND", json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
