"""Other people's models, shrunk and sharded: ``python -m tests.architectures [NAMES...]``.

Every architecture that transformers' table of causal language models lists and that can be made small by
the names of its sizes; or, by ``--builders``, the models of a Python file. Each runs in a process of its
own, a training step on simulated ranks, or with ``--real`` on a process a rank, all short of Inductor;
``--plan`` asks ``spcompile.explain`` for 2,048 tokens besides (with an empty ``--ranks`` for nothing else).
What is done is kept in a file, lines of JSON, and not done again; ``--table`` prints it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.progress import track
from tabulate import tabulate
from torch import nn

import spcompile
from spcompile.reports.tables import human
from spcompile.simulate import simulated
from tests.proof import Eager, eager, left_behind, loss_of
from tests.real_steps import error_on_ranks
from tests.small_models import architectures, built, of_file

__all__ = ["EXACT", "INSIDE", "check", "plan"]

# Theirs may compute norms, rotary embeddings, softmax or routers in float32, whatever the model's dtype.
EXACT, INSIDE = 1e-9, 2e-5
LENGTH, PLANNED = 97, 2048

# Their gated delta rule by chunks rounds the gradient of its gate to 2e-5 in float32, by tokens to 1e-7.
_LESS_EXACT = {"torch_chunk_gated_delta_rule": "torch_recurrent_gated_delta_rule"}


def reference(model: nn.Module, inputs: dict[str, Any]) -> Eager:
    """What eager leaves behind, by the more exact of the library's own ways."""
    module = sys.modules.get(type(model).__module__)  # a file of builders is none
    with contextlib.ExitStack() as patches:
        for name, by in _LESS_EXACT.items():
            if hasattr(module, name) and hasattr(module, by):
                exact = _by_tokens(getattr(module, by))
                patches.enter_context(mock.patch.object(module, name, exact))
        return _one_by_one(model, inputs)


def _by_tokens(function: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrence in the place of a function that also takes the length of a chunk."""

    def call(*args: Any, chunk_size: int = 64, **kwargs: Any) -> Any:
        given = {"initial_state": None, "output_final_state": False} | kwargs
        return function(*args, **given)

    return call


def _one_by_one(model: nn.Module, inputs: dict[str, Any]) -> Eager:
    """What eager leaves behind, with experts one by one."""
    config = getattr(model, "config", None)
    default = getattr(config, "_experts_implementation", None)
    if default is None:
        return eager(model, inputs)
    config._experts_implementation = "eager"
    try:
        return eager(model, inputs)
    finally:
        config._experts_implementation = default


def of_rounding(model: nn.Module, inputs: dict[str, Any], expected: Eager) -> float:
    """How much eager moves if its parameters change in the ninth digit (of what is float32 inside, the last).

    A gradient that is nothing but the rounding of others may differ by more than they do.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 1e-9 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    other = reference(model, inputs)
    return expected.error(other.loss, other.gradients | other.written)


def told(error: float, model: nn.Module, inputs: dict[str, Any], expected: Eager) -> dict[str, float]:
    """The error, and what there is to compare it with where it is larger than usual."""
    return {"error": error} | ({"eager": of_rounding(model, inputs, expected)} if error > INSIDE else {})


def check(name: str, ranks: int, builders: Path | None) -> dict[str, Any]:
    """The error of a training step on simulated ranks, and where the graph breaks."""
    torch.compiler.reset()
    model, inputs = built(name, LENGTH, builders)
    expected = reference(model, inputs)
    torch._dynamo.utils.counters.clear()
    loss = loss_of(torch.compile(model, backend=simulated(ranks, nan_padding=True))(**inputs))
    loss.backward()
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    error = expected.error(loss.detach(), left_behind(model, inputs))
    return told(error, model, inputs, expected) | {"breaks": breaks}


def check_real(name: str, ranks: int, builders: Path | None, timeout: float) -> dict[str, Any]:
    """The same on real ranks: the graph breaks are those of the simulated ones."""
    torch.compiler.reset()
    model, inputs = built(name, LENGTH, builders)
    expected = reference(model, inputs)
    error = error_on_ranks(model, inputs, expected, ranks, timeout)
    return told(error, model, inputs, expected)


def plan(name: str, builders: Path | None) -> dict[str, Any]:
    """What a step of 2,048 tokens would do on four ranks."""
    torch.compiler.reset()
    model, inputs = built(name, PLANNED, builders)
    model = model.float()
    seconds = {}
    for ranks in (1, 4):
        began = time.perf_counter()
        report = spcompile.explain(model, ranks=ranks)(**inputs)
        seconds[ranks] = time.perf_counter() - began
        torch.compiler.reset()
    sites = Counter(f"{s.kind}, {s.mask}" if s.mask else s.kind for s in report.sites if s.rewritten)
    left = Counter(f"{s.kind}: {s.reason}" for s in report.sites if not s.rewritten)
    gathered: Counter[str] = Counter()
    for g in report.gathers:
        gathered[g.op] += g.bytes
    alone, memory = report.alone, report.memory
    return {
        "sites": dict(sites),
        "left": dict(left),
        "gathers": dict(gathered),
        "saved": [alone.saved if alone else 0, memory.saved if memory else 0],
        "seconds": [seconds[1], seconds[4]],
    }


def merged(lines: list[str]) -> dict[str, dict[str, Any]]:
    """What is kept of each model, by name; of what was done twice the last."""
    rows: dict[str, dict[str, Any]] = {}
    for row in map(json.loads, lines):
        rows[row["name"]] = rows.get(row["name"], {}) | row
    return rows


def asked(args: argparse.Namespace) -> list[str]:
    """The keys of a row that has all that is asked for; a plan that failed is one."""
    return [f"P={p}, real" if args.real else f"P={p}" for p in args.ranks] + ["planned"] * args.plan


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All that is asked of one architecture; what stops it is told."""
    row: dict[str, Any] = {"name": name}
    builders = args.builders
    began = time.perf_counter()
    try:
        built(name, LENGTH, builders)
    except Exception as error:
        return row | {"note": f"not made small: {_line(error)}"}
    for p, key in zip(args.ranks, asked(args), strict=False):
        try:
            row[key] = check_real(name, p, builders, args.timeout) if args.real else check(name, p, builders)
        except Exception as error:
            row[key] = {"note": _line(error)}
    if args.plan:
        try:
            row |= plan(name, builders) | {"planned": ""}
        except Exception as error:
            row["planned"] = _line(error)
    return row | {"took": time.perf_counter() - began}


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:240]


def apart(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own, which may crash or take too long."""
    how = [sys.executable, "-m", "tests.architectures", "--one", name, "--ranks", *map(str, args.ranks)]
    how += ["--builders", str(args.builders)] if args.builders else []
    how += ["--timeout", str(args.timeout)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [*how, *["--plan"] * args.plan, *["--real"] * args.real],
            env=env,
            capture_output=True,
            text=True,
            timeout=args.timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "note": f"not done in {args.timeout} s"}
    lines = [line.removeprefix("ROW ") for line in done.stdout.splitlines() if line.startswith("ROW ")]
    found: dict[str, Any] = json.loads(lines[0]) if lines else {}
    return found or {"name": name, "note": f"ended with {done.returncode}: {done.stderr.strip()[-200:]}"}


def verdict(found: dict[str, Any]) -> str:
    """Of one number of ranks."""
    if "error" not in found:
        return str(found.get("note", ""))[:100]
    error, moves = found["error"], found.get("eager", 0.0)
    if error <= max(EXACT, INSIDE, moves):
        beside = f" (eager moves by {moves:.0e})" if error > INSIDE else ""
        return "exact" if error <= EXACT else f"{error:.0e}{beside}"
    return f"WRONG {error:.0e}"


def table(rows: list[dict[str, Any]]) -> str:
    """The architectures, one a line."""
    heads = ["model", "ranks", "graph breaks", "attention", "left", "gathered by 4 ranks"]
    heads += ["1 / 4 ranks save", "4 / 1 ranks plan"]
    body = []
    for row in sorted(rows, key=lambda row: row["name"]):
        found = {k: v for k, v in row.items() if k.startswith("P=")}
        said = row.get("note", "")[:100] or "; ".join(f"{p}: {verdict(x)}" for p, x in found.items())
        breaks = max((x["breaks"] for x in found.values() if "breaks" in x), default="")
        listed = ["; ".join(f"{n} {what}" for what, n in row.get(k, {}).items()) for k in ("sites", "left")]
        listed[0] = f"no plan: {row['planned'][:80]}" if row.get("planned") else listed[0]
        gathered = "; ".join(f"{what} {human(n)}" for what, n in row.get("gathers", {}).items())
        (alone, each), (one, four) = row.get("saved", (0, 0)), row.get("seconds", (0, 0))
        saves, longer = (f"{a / b:.1f}x" if b else "" for a, b in ((alone, each), (four, one)))
        body.append([row["name"], said, breaks, *listed, gathered, saves, longer])
    wide = tabulate(body, heads, tablefmt="github", disable_numparse=True)
    return re.sub(r"-{4,}", "---", re.sub(r" +\|", " |", wide))  # a page of it, not a screen


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("names", nargs="*", help="types of model, as transformers has them (default: all)")
    parser.add_argument("--builders", type=Path, help="a file of builders, in place of transformers' table")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--plan", action="store_true", help="also what 2,048 tokens on four ranks would do")
    parser.add_argument("--real", action="store_true", help="a process for each rank, on Gloo")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for each (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("architectures.jsonl"))
    parser.add_argument("--table", action="store_true", help="print what is kept, as Markdown, and end")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        sys.modules["fla"] = None  # type: ignore[assignment]  # whose kernels, where it is there, need a GPU
        print("ROW " + json.dumps(measured(args.one, args)), flush=True)
        return 0
    rows = merged(args.out.read_text().splitlines() if args.out.exists() else [])
    if args.table:
        print(table(list(rows.values())))
        return 0
    known = architectures() if args.builders is None else of_file(args.builders)
    kept = {n for n, row in rows.items() if "note" in row or all(key in row for key in asked(args))}
    todo = [name for name in args.names or known if name not in kept]
    with ThreadPoolExecutor(args.jobs) as pool, args.out.open("a") as out:
        done = as_completed([pool.submit(apart, name, args) for name in todo])
        for each in track(done, "architectures", total=len(todo)):
            row = each.result()
            rows[row["name"]] = rows.get(row["name"], {}) | row
            print(json.dumps(row), file=out, flush=True)
    wrong = [
        row["name"]
        for row in rows.values()
        if any("WRONG" in verdict(x) for k, x in row.items() if k.startswith("P="))
    ]
    print(f"{len(rows)} architectures; wrong: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
