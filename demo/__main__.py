"""Train a hybrid model on two ranks beside unsharded eager, and compare: `python -m demo --help`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.launch import Report, WorkerError, cores, launch
from demo import compare, text

OUT = Path(__file__).parent / "out"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--length", type=int, default=2048, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pattern", default="LLLN", help="L linear, N softmax layers (default: %(default)s)")
    parser.add_argument("--model", default="linear_llama3:tiny")
    parser.add_argument("--text", help="a file to train on (default: the standard library's sources)")
    parser.add_argument("--backend", default="spcompile", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the plot and the numbers")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first one compiles and is not timed")
    try:
        text.batches(text.read(args.text), args.length, 1, args.seed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return args


def task(args: argparse.Namespace, **fields: Any) -> dict[str, Any]:
    """What both runs have in common, and `fields`."""
    names = ("model", "pattern", "length", "steps", "seed", "text")
    shared = {name: getattr(args, name) for name in names}
    # At 3e-3 the loss spikes, and a spike multiplies float32's rounding a thousandfold in a few steps.
    # A demo of equality trains where training is stable.
    return shared | {"lr": 5e-4, "warmup": 20, "dtype": "float32"} | fields


def train(console: Console, label: str, work: dict[str, Any]) -> list[Report]:
    """Run one training on its ranks behind a progress bar and return what each rank measured."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(label, total=work["steps"], loss="...")

        def show(rank: int, fields: Report) -> None:
            if rank == 0 and "step" in fields:
                progress.update(bar, completed=fields["step"], loss=f"{fields['loss']:.4f}")
                if (
                    not console.is_terminal and fields["step"] % 25 == 0
                ):  # a log shows no bar: say it in lines
                    console.print(f"{label}: step {fields['step']}  loss {fields['loss']:.4f}")

        return launch("demo.worker", work, ranks=work["ranks"], on_report=show)


def print_report(console: Console, args: argparse.Namespace) -> None:
    """What spcompile found, rewrote and communicates in the model that was trained."""
    if args.backend != "spcompile":
        return
    import models
    import spcompile  # late: it needs nothing that the workers do, and the runs come first

    model = models.get(args.model, pattern=args.pattern)()
    ids = text.batches(text.read(args.text), args.length, 1, args.seed)[0]
    console.rule("what spcompile did")
    report = spcompile.explain(model, ranks=args.ranks)(ids, labels=ids)
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)


def print_losses(console: Console, eager: list[float], sharded: list[float]) -> None:
    table = Table("step", "eager", "sharded", "difference", title="loss", title_justify="left")
    last = len(eager) - 1
    for step in sorted({0, 1, 2, 5, 10, *range(25, last, 25), last} & set(range(last + 1))):
        difference = f"{sharded[step] - eager[step]:+.1e}"
        table.add_row(str(step + 1), f"{eager[step]:.6f}", f"{sharded[step]:.6f}", difference)
    console.print(table)


def print_costs(console: Console, args: argparse.Namespace, runs: dict[str, list[Report]]) -> None:
    columns = ("run", "rank", "threads", "tokens/s", "first step", "peak memory", "of it for training")
    table = Table(*columns, title="speed and memory", title_justify="left")
    for label, ranks in runs.items():
        for rank, got in enumerate(ranks):
            steady = sorted(got["seconds"][1:])
            speed = args.length / steady[len(steady) // 2]
            table.add_row(
                label,
                str(rank),
                str(max(1, cores() // len(ranks))),
                f"{speed:,.0f}",
                f"{got['seconds'][0]:.1f} s",
                f"{got['peak'] / 1e6:,.0f} MB",
                f"{got['growth'] / 1e6:,.0f} MB",
            )
    console.print(table)
    console.print("tokens/s: of the whole sequence, from the median step. The first step compiles.\n")


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the workers end too
    console = Console(width=None if sys.stdout.isatty() else 110)
    began = time.monotonic()
    sharded_name = f"{args.backend} on {args.ranks} ranks"
    console.print(
        f"{args.model}, pattern {args.pattern}, {args.steps} steps of {args.length} tokens, "
        f"seed {args.seed}, on {args.text or 'the sources of the standard library'}"
    )
    try:
        eager = train(console, "eager, one process", task(args, backend=None, ranks=1))
        sharded = train(console, sharded_name, task(args, backend=args.backend, ranks=args.ranks))
    except WorkerError as error:
        console.print(f"[bold red]the demo failed:[/] {error}", highlight=False)
        return 1
    print_report(console, args)
    print_losses(console, eager[0]["losses"], sharded[0]["losses"])
    print_costs(console, args, {"eager": eager, sharded_name: sharded})
    losses = [got["losses"] for got in sharded]
    picture = compare.save(args.out, eager[0]["losses"], losses[0], sharded_name)
    console.print(f"curves: {picture.name} in {args.out.name}/; {time.monotonic() - began:.0f} s in all")
    complaint = compare.verdict(eager[0]["losses"], losses)
    if complaint:
        console.print(f"[bold red]NOT EQUAL:[/] {complaint}", highlight=False)
        return 1
    console.print(f"[bold green]equal:[/] {compare.praise(eager[0]['losses'], losses[0])}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
