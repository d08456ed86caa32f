"""What logits and a cache that nobody reads cost: memory and time of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.launch import RETURNED, WorkerError, launch, reason
from bench.options import Options, Row, Table

WAYS = ("the loss alone", "all, let go", "all, held", "all, at once")


@dataclass(frozen=True)
class Outputs:
    """A benchmark: an unmodified Hugging Face Llama on two ranks, by what its compiled forward returns.

    "let go" keeps only the loss of what is returned, "held" keeps all during the backward, "at once" gathers
    all before it is returned (``outputs="whole"``).
    """

    title: str
    ranks: int = 2
    layers: int = 4
    vocab: int = 32_000
    length: int = 4096

    def plan(self, options: Options) -> list[str]:
        return list(WAYS)

    def measure(self, way: str, options: Options) -> Row:
        length, layers = (512, 1) if options.quick else (self.length, self.layers)
        row: Row = {"returns": way, "T": length, "V": self.vocab, "layers": layers}
        work = row | {"ranks": self.ranks, "budget": options.budget, "backend": options.backend}
        try:
            got = launch("bench.outputs_worker", work, self.ranks, options.threads, env=RETURNED)
        except WorkerError as error:
            options.log(str(error))
            return row | {"note": "failed: " + reason(error)[:80]}
        return row | {k: max(rank[k] for rank in got) for k in ("seconds", "bytes", "error")}

    def tables(self, rows: list[Row]) -> list[Table]:
        first = next((r for r in rows if "seconds" in r), None)
        body: list[list[Any]] = []
        for row in rows:
            if first is None or "seconds" not in row:
                body.append([row["returns"], row["note"]])
                continue
            ratios = [f"{row[k] / first[k]:.2f}x" for k in ("seconds", "bytes")]
            mib = row["bytes"] / 2**20
            body.append([row["returns"], row["seconds"], ratios[0], mib, ratios[1], f"{row['error']:.0e}"])
        return [(self.title, ["returns", "s", "", "peak MiB", "", "error"], body)]

    def plots(self, rows: list[Row]) -> list[Any]:
        return []
