"""How long models of every variant take to compile, beside Inductor on as many layers of the basic one."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

from bench.growth import ALONE, INDUCTOR, PAIR, Variant, compared
from bench.launch import WorkerError, launch, reason
from bench.options import Options, Row, Table
from spcompile.attention.variants import VARIANTS

BASIC = "linear_llama3"


@dataclass(frozen=True)
class VariantsCompile:
    """A benchmark: processor seconds to compile a training step, caches off, one thread; quick: one layer."""

    title: str
    layers: int = 4
    length: int = 512
    variants: tuple[Variant, ...] = (ALONE, PAIR)

    def plan(self, options: Options) -> list[tuple[str, Variant]]:
        """Inductor first; every step is the same work for every length, since lengths are not in it."""
        variants = compared(options.before) if options.before else self.variants
        return [(BASIC, INDUCTOR), *((name, variant) for name in VARIANTS for variant in variants)]

    def measure(self, step: tuple[str, Variant], options: Options) -> Row:
        name, variant = step
        backend = options.backend if variant.backend == "spcompile" else variant.backend
        layers = 1 if options.quick else self.layers
        row: Row = {"model": name, "variant": variant.label, "layers": layers, "T": self.length}
        with tempfile.TemporaryDirectory() as cache:
            cold = {
                "TORCHINDUCTOR_CACHE_DIR": cache,
                "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
            }
            work = row | {"backend": backend, "ranks": variant.ranks}
            try:
                got = launch("bench.variants_worker", work, variant.ranks, 1, env=cold, folder=variant.folder)
            except WorkerError as error:
                options.log(str(error))
                return row | {"note": "failed: " + reason(error)[:80]}
        return row | {key: max(rank[key] for rank in got) for key in ("seconds", "step")}

    def tables(self, rows: list[Row]) -> list[Table]:
        base = next((r["seconds"] for r in rows if r["variant"] == INDUCTOR.label and "seconds" in r), None)
        body: list[list[Any]] = []
        for row in rows:
            head = [row["model"], row["variant"], row["layers"]]
            if "seconds" not in row:
                body.append([*head, row["note"]])
                continue
            ratio = f"{row['seconds'] / base:.2f}x" if base else ""
            body.append([*head, row["seconds"], ratio, row["step"] * 1e3])
        heads = ["model", "variant", "layers", "processor s", "of Inductor's, basic", "step ms"]
        return [(self.title, heads, body)]

    def plots(self, rows: list[Row]) -> list[Any]:
        return []
