"""What compiling other people's loops over chunks costs at 256 and at 4,096 tokens."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

from bench.launch import WorkerError, launch, reason
from bench.options import Options, Row, Table


@dataclass(frozen=True)
class CompileGrowth:
    """A benchmark: processor seconds of a cold first training step, caches off, one thread.

    Eager unrolls these loops, and so would Dynamo: the graph, and the time, would grow with the length. The
    models are those of tests/zoo.py.
    """

    title: str
    models: tuple[str, ...] = ("qwen3_5", "minimax", "fla_simple_gla_chunk")
    lengths: tuple[int, ...] = (256, 4096)

    def plan(self, options: Options) -> list[tuple[str, int]]:
        models = self.models[:1] if options.quick else self.models
        return [(model, length) for model in models for length in self.lengths]

    def measure(self, step: tuple[str, int], options: Options) -> Row:
        model, length = step
        row: Row = {"model": model, "T": length}
        with tempfile.TemporaryDirectory() as cache:
            cold = {
                "TORCHINDUCTOR_CACHE_DIR": cache,
                "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
            }
            try:
                (got,) = launch("bench.loop_worker", row | {"backend": options.backend}, 1, 1, env=cold)
            except WorkerError as error:
                options.log(str(error))
                return row | {"note": "failed: " + reason(error)[:80]}
        return row | got

    def tables(self, rows: list[Row]) -> list[Table]:
        first = {r["model"]: r["cpu"] for r in reversed(rows) if "cpu" in r}
        body = []
        for row in rows:
            head = [row["model"], row["T"]]
            if "cpu" not in row:
                body.append([*head, row["note"]])
                continue
            change = f"{row['cpu'] / first[row['model']] - 1:+.0%}"
            body.append([*head, row["cpu"], row["seconds"], change, f"{row['error']:.0e}"])
        return [(self.title, ["model", "T", "processor s", "s", "of the first", "error"], body)]

    def plots(self, rows: list[Row]) -> list[Any]:
        return []
