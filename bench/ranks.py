"""Every way across the ranks, side by side: time, bytes and memory of a training step of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.launch import KEPT, RETURNED, WorkerError, launch, reason
from bench.options import Options, Row, Table
from spcompile.strategies import LINEAR, SOFTMAX

Step = tuple[str, int, int, str, str]
"""Model, tokens, ranks, and the ways of linear and of softmax attention."""

PATTERNS = {"linear": "LLLL", "hybrid": "LLLN", "softmax": "NNNN"}
TOLERANCE = 1e-4  # float32 against float32, as in bench/worker.py


@dataclass(frozen=True)
class Ranks:
    """A benchmark: Linear-Llama3 pure, a quarter of it softmax layers, and all of it; Gloo on loopback.

    One rank with all cores comes first. Ranks share the cores evenly, so that 2 and more of them have less
    each. Every way is checked against eager at a short length, in the processes that take the time.
    """

    title: str
    ranks: tuple[int, ...] = (2,)
    lengths: tuple[int, ...] = (8192,)
    models: tuple[str, ...] = tuple(PATTERNS)

    def plan(self, options: Options) -> list[Step]:
        lengths = [512] if options.quick else [n for n in self.lengths if n <= options.max_seq]
        return [
            (model, length, ranks, *ways)
            for model in self.models
            for length in lengths
            for ranks in (1, *self.ranks)
            for ways in _ways(model, ranks)
        ]

    def measure(self, step: Step, options: Options) -> Row:
        model, length, ranks, linear, softmax = step
        row: Row = {"model": model, "T": length, "ranks": ranks, "linear": linear, "softmax": softmax}
        work = row | {"pattern": PATTERNS[model], "budget": options.budget, "backend": options.backend}
        try:
            times = launch("bench.ranks_worker", work, ranks, options.threads, env=KEPT)
            peaks = launch("bench.ranks_worker", work | {"peak": True}, ranks, options.threads, env=RETURNED)
        except WorkerError as error:
            options.log(str(error))
            return row | {"note": "failed: " + reason(error)[:80]}
        worst = max(rank["error"] for rank in times)
        if not worst <= TOLERANCE:
            return row | {"note": f"WRONG by {worst:.1e}"}
        found = {"seconds": max(rank["seconds"] for rank in times), "sent": times[0]["sent"], "error": worst}
        return row | found | {"bytes": max(rank["bytes"] for rank in peaks)}

    def tables(self, rows: list[Row]) -> list[Table]:
        """The measurements, and the time as part of the first way's on as many ranks."""
        first: dict[tuple[Any, ...], Row] = {}
        body: list[list[Any]] = []
        for row in rows:
            head = [row[k] for k in ("model", "T", "ranks", "linear", "softmax")]
            if "seconds" not in row:
                body.append([*head, row["note"]])
                continue
            base = first.setdefault(tuple(head[:3]), row)
            ratio = f"{row['seconds'] / base['seconds']:.2f}x"
            body.append([*head, row["seconds"], ratio, row["sent"] / 2**20, row["bytes"] / 2**20])
        heads = ["model", "T", "ranks", "linear", "softmax", "s", "of the first", "MiB received", "peak MiB"]
        return [(self.title, heads, body)]

    def plots(self, rows: list[Row]) -> list[Any]:
        """Seconds by length: a picture for each model and number of ranks, a line for each way."""
        pictures: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
        for row in (r for r in rows if "seconds" in r):
            way = " / ".join(x for x in (row["linear"], row["softmax"]) if x) or "one rank"
            lines = pictures.setdefault(f"{row['model']}, P={row['ranks']}", {})
            at, seconds = lines.setdefault(way, ([], []))
            at.append(row["T"])
            seconds.append(row["seconds"])
        return [(title, "s", lines) for title, lines in pictures.items()]


def _ways(model: str, ranks: int) -> list[tuple[str, str]]:
    """Of each kind of attention that the model has every way; of both, each with the other's first."""
    if ranks == 1:
        return [("", "")]
    linear = list(LINEAR) if "L" in PATTERNS[model] else [""]
    softmax = list(SOFTMAX) if "N" in PATTERNS[model] else [""]
    return [*((way, softmax[0]) for way in linear), *((linear[0], way) for way in softmax[1:])]
