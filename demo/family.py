"""Train every model of the family beside unsharded eager and compare: `python -m demo.family --help`.

In float64: some of these models (GLA, RWKV-6) multiply a rounding by 1e4 within twenty steps, eager
beside eager too, and float32 curves that part there say nothing about who is wrong.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

import models
from bench.launch import Report, WorkerError, launch
from bench.output import machine, save_csv
from demo import compare

FIELDS = ("model", "pattern", "first loss", "last loss", "largest difference", "compile seconds", "verdict")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.family", description=(__doc__ or "").split(":")[0])
    parser.add_argument("models", nargs="*", help="such as gla:tiny (default: the tiny ones of models/)")
    parser.add_argument("--steps", type=int, default=15, help="%(default)s")
    parser.add_argument("--length", type=int, default=96, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pattern", default="LN", help="L linear, N softmax layers (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64", help="%(default)s")
    parser.add_argument("--csv", type=Path, help="write the table there too")
    return parser.parse_args()


def train(args: argparse.Namespace, model: str) -> tuple[list[Report], list[Report]]:
    """Eager in one process, and spcompile on the ranks."""
    work: dict[str, Any] = {
        "model": model, "pattern": args.pattern, "length": args.length, "steps": args.steps,
        "seed": 0, "text": None, "lr": 5e-4, "warmup": 5, "dtype": args.dtype,
    }  # fmt: skip
    eager = launch("demo.worker", work | {"backend": None, "ranks": 1}, ranks=1)
    sharded = work | {"backend": "spcompile", "ranks": args.ranks}
    return eager, launch("demo.worker", sharded, ranks=args.ranks)


def row(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """One model's curves compared."""
    base = {"model": model, "pattern": args.pattern}
    try:
        eager, sharded = train(args, model)
    except WorkerError as error:
        return base | {"verdict": f"failed: {error}"}
    expected, found = eager[0]["losses"], [r["losses"] for r in sharded]
    return base | {
        "first loss": f"{expected[0]:.4f}",
        "last loss": f"{expected[-1]:.4f}",
        "largest difference": f"{max(abs(a - b) for a, b in zip(expected, found[0], strict=True)):.1e}",
        "compile seconds": f"{sharded[0]['seconds'][0]:.0f}",
        "verdict": compare.verdict(expected, found, args.dtype) or "equal",
    }


def main() -> int:
    args, console = arguments(), Console(width=None if sys.stdout.isatty() else 130)
    chosen = args.models or [name for name in models.names() if name.endswith(":tiny")]
    rows = [row(args, m) for m in track(chosen, "training", console=console)]
    title = f"{args.steps} steps of {args.length} tokens in {args.dtype} on {args.ranks} ranks beside eager"
    table = Table(*FIELDS, title=title)
    for r in rows:
        table.add_row(*(str(r.get(f, "")) for f in FIELDS))
    console.print(table, highlight=False)
    if args.csv:
        command = shlex.join(["python", "-m", "demo.family", *sys.argv[1:]])
        save_csv(args.csv, rows, [title, f"command: {command}", f"machine: {machine()}"])
    return int(any(r["verdict"] != "equal" for r in rows))


if __name__ == "__main__":
    sys.exit(main())
