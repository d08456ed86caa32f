"""Faults planted in the fused kernels, one at a time: ``TRITON_INTERPRET=1 python -m tests.planted_faults``.

A fault that the cases of ``fused_worker.py`` do not see would show a hole in them. One line of JSON: fault ->
the largest error that the cases found (infinity: not a number, or an exception).
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

import spcompile.kernels.triton
from spcompile.kernels.linear import delta_ops, diagonal_ops, launch, segment_ops
from tests import fused_worker, triton_interpreter

END = "to_end(g, own, step, gt, T, N, C, READ, REVERSE)[:, None]"
DOT = "input_precision=PRECISION)"
PLAIN = ("fp32, mild, two chunks, ", "fp32, none, two chunks, ")
PER_KEY = ("fp32, mild per key, two chunks, ", "fp32, mild per key, two chunks, both")
DELTA = ("fp32, mild, delta rule, two chunks, ",)
SEGMENTS = "fp32, mild, five segments, "
DELTA_WIDE = "fp32, delta rule, wide, "
DELTA_SEGMENTS = ("fp32, delta rule, five segments, ",)

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
        ("segments", "for first in range(begin, end, C)", "for first in range(begin, end - C, C)"),
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
        ("delta", "lower * strengths[None, :]", "lower * strengths[:, None]"),
        ("delta", "for r in range(1, 16)", "for r in range(1, 15)"),
        ("delta", "within += tl.dot(square", "within -= tl.dot(square"),
        ("delta", "within -= tl.dot(system", "within += tl.dot(system"),
        ("delta", "lower *= pairwise(", "lower *= 0.0 + 0.0 * pairwise("),
        ("delta", "row & blocks, within", "row, within"),
        ("delta", f"within = tl.dot(within, lower, {DOT}", "within = lower"),
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
        ("delta", "tl.load(p + HALF", "tl.load(p"),
        ("delta", "if carry is not None", "if carry is None"),
        ("delta", "tl.cumsum(mine, 0))[:, None]", "0.0 * mine)[:, None]"),
        ("delta", f"keys.dtype), read, {DOT} * scale", f"keys.dtype), read, {DOT}"),
    ],
    "per key, summaries": [
        ("diagonal", "keys = (keys * end).to(keys.dtype)\n        total", "total"),
        ("diagonal", "total += here", "total = here"),
        ("diagonal", "state * tl.exp(here)[:, None]", "state"),
        ("diagonal", "tl.store(p, state * scale", "tl.store(p, state"),
        ("diagonal", "(i + 1 < M)[:, None]", "(i + 2 < M)[:, None]"),
        ("diagonal", "+ _row(g, first, d", "+ 0 * _row(g, first, d"),
    ],
    "per key, outputs": [
        ("diagonal", "queries = (queries * begun).to(queries.dtype)", "queries = queries"),
        ("diagonal", "read *= scale\n        if MIRRORED", "if MIRRORED"),
        ("diagonal", "C + (C - 1 - i)[:, None]", "C + i[:, None]"),
        ("diagonal", "weights, values, read", "weights, values, read * 0.0"),
        ("diagonal", "state *= tl.exp(through)[:, None]", "state *= 1.0"),
        ("diagonal", "state * scale if SCALED else state", "state"),
    ],
    "columns": [
        ("diagonal", "* state, 0) * through", "* state, 0)"),
        ("diagonal", "read *= begun", "read *= 1.0"),
        ("diagonal", "(read + tl.load(added, mask=valid, other=0.0))", "(read)"),
        ("diagonal", "READ == INCLUSIVE, False, 3 if WIDE", "READ != INCLUSIVE, False, 3 if WIDE"),
        ("diagonal", "False, 3 if WIDE else 2) + across[None, :]", "False, 3 if WIDE else 2)"),
        ("diagonal", "state *= through[None, :]", "state *= 1.0"),
        ("diagonal", "values = (values * end).to(values.dtype)", "values = values"),
        ("diagonal", "read += tl.load(p, mask=inside, other=0.0)", "read += 0.0"),
        ("diagonal", "tl.static_range(PARTS)", "tl.static_range(1)"),
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
        ("diagonal", "* tl.exp(between)[None, :], through", ", through"),
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
}  # fmt: skip


def planted(number: int, fault: tuple[str, str, str], folder: Path) -> None:
    """Let the operators use a copy of the kernels with a fault."""
    file, old, new = fault
    package, source = f"faulty{number}", Path(spcompile.kernels.triton.__file__).parent
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    for name in ("tiles", "segments", "delta", "diagonal"):
        text = (source / f"{name}.py").read_text()
        if name == file:
            assert old in text, fault
            text = text.replace(old, new, 1)
        text = text.replace("spcompile.kernels.triton.", f"{package}.")
        (folder / package / f"{name}.py").write_text(text)
    segment_ops.segments = importlib.import_module(f"{package}.segments")
    delta_ops.delta = importlib.import_module(f"{package}.delta")
    diagonal_ops.diagonal = importlib.import_module(f"{package}.diagonal")


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
    for case in cases:
        try:
            errors = fused_worker.errors(case) | {"total": fused_worker.totals(case)}
        except Exception:
            errors = {"": math.inf}
        found = max(found, *(math.inf if math.isnan(e) else e for e in errors.values()))
    answer.send(found)


# kernel -> cases that run it, where ``PLAIN`` are not enough.
CASES = {
    "tiles": (*PLAIN, "fp32, mild, two chunks, reverse", "fp32, strong, two chunks, exclusive"),
    "start": (SEGMENTS,),
    "start, per key": ("fp32, mild per key, five segments, ",),
    "prologue": (SEGMENTS,),
    "systems": DELTA,
    "corrected": (*DELTA, *DELTA_SEGMENTS),
    "outputs, delta": DELTA,
    "pairs, delta": DELTA,
    "delta summaries": (*DELTA, *DELTA_SEGMENTS),
    "delta prologue": ("fp32, mild, delta rule, five segments, ",),
    "delta outputs": (*DELTA, *DELTA_SEGMENTS, DELTA_WIDE),
    "per key, summaries": PER_KEY,
    "per key, outputs": PER_KEY,
    "columns": PER_KEY,
    "within": PER_KEY,
}


def main() -> int:
    triton_interpreter.install()
    launch._LEAST = fused_worker.SEGMENT
    found: dict[str, float] = {}
    every = [(kernel, fault) for kernel, faults in FAULTS.items() for fault in faults]
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        for number, (kernel, fault) in enumerate(tqdm(every, desc="faults")):
            planted(number, fault, Path(folder))
            found[f"{kernel}: {fault[1]} -> {fault[2]}"] = worst(CASES.get(kernel, PLAIN))
    print("FOUND", json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
