"""What a second start costs: processor seconds of a first step, compiler caches empty and then filled."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

from bench.growth import ALONE, INDUCTOR, PAIR, Variant
from bench.launch import WorkerError, launch, reason
from bench.options import Options, Row, Table

MODELS = {
    "softmax": "transformers' Llama",
    "linear": "linear_llama3:tiny",
    "library": "transformers' Qwen3.5",
}


@dataclass(frozen=True)
class WarmStart:
    """A benchmark: two processes (of each rank) after each other that share a fresh cache."""

    title: str
    length: int = 256
    variants: tuple[Variant, ...] = (INDUCTOR, ALONE, PAIR)

    def plan(self, options: Options) -> list[tuple[str, Variant]]:
        kinds = list(MODELS)[:1] if options.quick else list(MODELS)
        return [(kind, variant) for kind in kinds for variant in self.variants]

    def measure(self, step: tuple[str, Variant], options: Options) -> Row:
        kind, variant = step
        row: Row = {"kind": kind, "model": MODELS[kind], "variant": variant.label, "T": self.length}
        backend = options.backend if variant.backend == "spcompile" else variant.backend
        ranks = variant.ranks
        work = {"kind": kind, "length": self.length, "backend": backend, "ranks": ranks}
        with tempfile.TemporaryDirectory() as cache:
            env = {"TORCHINDUCTOR_CACHE_DIR": cache}
            try:
                first, second = (launch("bench.warm_worker", work, ranks, 1, env=env) for _ in range(2))
            except WorkerError as error:
                options.log(str(error))
                return row | {"note": "failed: " + reason(error)[:80]}
        row |= {"first": max(r["seconds"] for r in first), "second": max(r["seconds"] for r in second)}
        row["recognition"] = max(r["recognition"] for r in second)
        row["hits"] = min(r["hits"] for r in second)
        if [r["told"] for r in first] != [r["told"] for r in second]:
            row["note"] = "WRONG: the second start tells something else"
        return row

    def tables(self, rows: list[Row]) -> list[Table]:
        body: list[list[Any]] = []
        alone = {r["kind"]: r["second"] for r in rows if r["variant"] == INDUCTOR.label and "second" in r}
        for row in rows:
            head = [row["model"], row["variant"]]
            if "second" not in row:
                body.append([*head, row["note"]])
                continue
            share = f"{row['second'] / alone[row['kind']]:.2f}x" if row["kind"] in alone else ""
            hit = "hit" if row["hits"] else "no hit"
            body.append([*head, row["first"], row["second"], share, row["recognition"], row.get("note", hit)])
        titles = ["model", "variant", "first", "second", "of Inductor's", "recognition", "second"]
        return [(self.title, titles, body)]

    def plots(self, rows: list[Row]) -> list[Any]:
        return []
