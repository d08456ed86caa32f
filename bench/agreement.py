"""What comparing the ranks' inputs before each call costs, beside the step that it guards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.launch import WorkerError, launch, reason
from bench.options import Options, Row, Table


@dataclass(frozen=True)
class AgreementCost:
    """A benchmark: a training step on two ranks, and the parts of it that are the exchange and the digest.

    Ranks start each step together; the exchange still holds what one of them waits for the other, which is no
    cost of it: the first collective of the step would wait as long. "Its own work" is processor time.
    """

    title: str
    length: int = 4096
    checks: tuple[str, ...] = ("values", "shapes")

    def plan(self, options: Options) -> list[str]:
        return list(self.checks)

    def measure(self, check: str, options: Options) -> Row:
        length = 512 if options.quick else self.length
        row: Row = {"check": check, "T": length}
        try:
            got = launch("bench.agreement_worker", row | {"backend": options.backend}, 2, options.threads)
        except WorkerError as error:
            options.log(str(error))
            return row | {"note": "failed: " + reason(error)[:80]}
        return row | {key: max(rank[key] for rank in got) for key in ("step", "exchange", "own", "digest")}

    def tables(self, rows: list[Row]) -> list[Table]:
        body: list[list[Any]] = []
        for row in rows:
            if "step" not in row:
                body.append([row["check"], row["T"], row["note"]])
                continue
            parts = [row["exchange"], row["own"], row["digest"]]
            shares = [f"{part / row['step']:.2%}" for part in parts]
            body.append([row["check"], row["T"], row["step"] * 1e3, *(p * 1e3 for p in parts), *shares])
        names = ["exchange", "its own work", "digest"]
        heads = ["check", "T", "step ms", *(f"{name} ms" for name in names), *names]
        return [(self.title, heads, body)]

    def plots(self, rows: list[Row]) -> list[Any]:
        return []
