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
    """A benchmark: processes (of each rank) after each other that share a fresh cache."""

    title: str
    length: int = 256
    variants: tuple[Variant, ...] = (INDUCTOR, ALONE, PAIR)
    repeats: int = 3
    """Second starts, of which the cheapest counts: what else the machine does costs processor time too."""

    def plan(self, options: Options) -> list[tuple[str, Variant]]:
        kinds = list(MODELS)[:1] if options.quick else list(MODELS)
        return [(kind, variant) for kind in kinds for variant in self.variants]

    def measure(self, step: tuple[str, Variant], options: Options) -> Row:
        kind, variant = step
        row: Row = {"kind": kind, "model": MODELS[kind], "variant": variant.label, "T": self.length}
        backend = options.backend if variant.backend == "spcompile" else variant.backend
        ranks = variant.ranks
        work = {"kind": kind, "length": self.length, "backend": backend, "ranks": ranks}
        repeats = 1 if options.quick else self.repeats
        with tempfile.TemporaryDirectory() as cache:
            # An installed package has its modules compiled; the first start compiles them here.
            env = {"TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONDONTWRITEBYTECODE": ""}
            try:
                first, *later = (
                    launch("bench.warm_worker", work, ranks, 1, env=env) for _ in range(1 + repeats)
                )
            except WorkerError as error:
                options.log(str(error))
                return row | {"note": "failed: " + reason(error)[:80]}
        second = min(later, key=lambda start: max(r["seconds"] for r in start))
        row |= {"first": max(r["seconds"] for r in first), "second": max(r["seconds"] for r in second)}
        row |= {name: max(r[name] for r in second) for name in ("process", "recognition")}
        row["hits"] = min(r["hits"] for start in later for r in start)
        if any([r["told"] for r in first] != [r["told"] for r in start] for start in later):
            row["note"] = "WRONG: a second start tells something else"
        return row

    def tables(self, rows: list[Row]) -> list[Table]:
        body: list[list[Any]] = []
        alone = {r["kind"]: r for r in rows if r["variant"] == INDUCTOR.label and "second" in r}
        for row in rows:
            head = [row["model"], row["variant"]]
            if "second" not in row:
                body.append([*head, row["note"]])
                continue
            base = alone.get(row["kind"])
            step, process = (f"{row[n] / base[n]:.2f}x" if base else "" for n in ("second", "process"))
            hit = row.get("note", "hit" if row["hits"] else "no hit")
            body.append(
                [*head, row["first"], row["second"], step, row["process"], process, row["recognition"], hit]
            )
        heads = ["model", "variant", "first", "second", "of Inductor's", "its process", "of Inductor's"]
        return [(self.title, [*heads, "recognition", "second"], body)]

    def plots(self, rows: list[Row]) -> list[Any]:
        return []
