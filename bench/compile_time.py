"""How long a 16-layer model takes to compile, and the share of spcompile's passes in it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

from bench.growth import ALONE, INDUCTOR, PAIR, Variant
from bench.launch import WorkerError, launch, reason
from bench.options import Options, Row, Table


@dataclass(frozen=True)
class CompileTime:
    """A benchmark: cold compile time, forward and backward, caches off."""

    title: str
    layers: int = 16
    length: int = 512
    variants: tuple[Variant, ...] = (INDUCTOR, ALONE, PAIR)

    def plan(self, options: Options) -> list[Variant]:
        return list(self.variants)

    def measure(self, variant: Variant, options: Options) -> Row:
        row: Row = {"variant": variant.label, "layers": 4 if options.quick else self.layers, "T": self.length}
        backend = options.backend if variant.backend == "spcompile" else variant.backend
        work = {"layers": row["layers"], "length": self.length, "backend": backend, "ranks": variant.ranks}
        with tempfile.TemporaryDirectory() as cache:
            cold = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
            try:
                got = launch("bench.compile_worker", work, variant.ranks, options.threads, env=cold)
            except WorkerError as error:
                options.log(str(error))
                return row | {"note": "failed: " + reason(error)[:80]}
        slowest = max(got, key=lambda rank: rank["compile"])
        ours = sum(slowest["passes"].values())
        parts = {f"pass {name}": seconds for name, seconds in slowest["passes"].items()}
        return row | {"seconds": slowest["compile"], "ours": ours, "share": ours / slowest["compile"]} | parts

    def tables(self, rows: list[Row]) -> list[Table]:
        body: list[list[Any]] = []
        passes: list[list[Any]] = []
        for row in rows:
            head = [row["variant"], row["layers"], row["T"]]
            if "seconds" not in row:
                body.append([*head, row["note"]])
                continue
            body.append([*head, row["seconds"], row["ours"], f"{row['share']:.1%}"])
            parts = {key.removeprefix("pass "): s for key, s in row.items() if key.startswith("pass ")}
            passes += [[row["variant"], name, s, f"{s / row['seconds']:.1%}"] for name, s in parts.items()]
        tables: list[Table] = [
            (self.title, ["variant", "layers", "T", "compile s", "our passes s", "share"], body)
        ]
        if passes:
            tables.append(("by pass", ["variant", "pass", "s", "share"], passes))
        return tables

    def plots(self, rows: list[Row]) -> list[Any]:
        return []
