"""Measure spcompile beside eager and Inductor; results go to bench/results/ as CSV and PNG."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tabulate import tabulate

from bench import output
from bench.launch import KEPT, RETURNED
from bench.options import Benchmark, Options, Row
from bench.registry import BENCHMARKS

RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="short lengths and timings, results/quick_*")
    parser.add_argument("--max-seq", type=int, default=32_768, help="longest sequence (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of each rank (default: the cores, shared evenly)")
    parser.add_argument("--square-gb", type=float, default=10, help="most T x T memory to try in eager")
    parser.add_argument("--backend", default="spcompile", help="to measure in spcompile's place")
    parser.add_argument("--static", action="store_true", help="kernels: as machine code, without a GPU")
    parser.add_argument(
        "--before",
        metavar="FOLDER",
        help="layer, model, variants: an earlier checkout beside this one on two ranks, alone",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    unknown = set(args.names) - BENCHMARKS.keys()
    if unknown:
        parser.error(
            f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}"
        )
    return args


def take(console: Console, name: str, benchmark: Benchmark, options: Options) -> list[Row]:
    """Take every step of a benchmark behind a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = []
    with Progress(*columns, console=console) as progress:
        steps = benchmark.plan(options)
        bar = progress.add_task(name, total=len(steps))
        for step in steps:
            row = benchmark.measure(step, options)
            rows.append(row)
            progress.advance(bar)
            words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
            console.print("  " + ", ".join(words), highlight=False, markup=False, soft_wrap=True)
    return rows


def save(args: argparse.Namespace, name: str, benchmark: Benchmark, rows: list[Row]) -> list[str]:
    """Write a benchmark's files; return their names."""
    stem = ("quick_" if args.quick else "") + name + ("_before" if args.before else "")
    given = ["FOLDER" if x == args.before else x for x in sys.argv[1:]]
    command = shlex.join(["python", "-m", "bench", *given])
    header = [
        benchmark.title,
        f"command: {command}",
        *([f"FOLDER: a checkout of {output.commit(args.before)}"] if args.before else []),
        f"machine: {output.machine()}",
        time.strftime("%Y-%m-%d"),
        "environment of every contender, for times: " + " ".join(f"{k}={v}" for k, v in KEPT.items()),
        "environment of every contender, for peaks: " + " ".join(f"{k}={v}" for k, v in RETURNED.items()),
    ]
    if args.backend != "spcompile":
        header.append(f"rows named spcompile were measured with backend {args.backend!r}")
    args.out.mkdir(parents=True, exist_ok=True)
    output.save_csv(args.out / f"{stem}.csv", rows, header)
    pictures = benchmark.plots(rows)
    if not pictures:
        return [f"{stem}.csv"]
    output.save_plot(args.out / f"{stem}.png", benchmark.title, pictures, f"{command}\n{output.machine()}")
    return [f"{stem}.csv", f"{stem}.png"]


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the workers end too
    console = Console(width=None if sys.stdout.isatty() else 120)
    free = output.available_bytes()
    limit = int(min(args.square_gb * 1e9, 0.7 * free) if free else args.square_gb * 1e9)
    budget = 0.5 if args.quick else 3.0
    options = Options(
        args.quick,
        args.max_seq,
        args.threads,
        budget,
        limit,
        args.backend,
        lambda text: print(text, file=sys.stderr),
        args.static,
        args.before,
    )
    console.print(output.machine(), highlight=False)
    wrong = False
    for name in args.names or BENCHMARKS:
        benchmark = BENCHMARKS[name]
        rows = take(console, name, benchmark, options)
        for title, heads, body in benchmark.tables(rows):
            print(f"\n{title}\n{tabulate(body, heads, floatfmt='.4g')}")
        print(f"\nwritten: {', '.join(save(args, name, benchmark, rows))} in {args.out.name}/\n")
        wrong |= any(row.get("note", "").startswith(("WRONG", "failed")) for row in rows)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
