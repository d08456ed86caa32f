"""Time and peak memory of softmax attention under each kind of mask, on two ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.growth import EAGER, PAIR, Growth, Variant, compared
from bench.mask_cases import MASKS, PREFIX
from bench.options import Options, Row, Table


@dataclass(frozen=True)
class Masks:
    """A benchmark: a training step of each kind at one length, beside eager on one rank or a checkout before.

    That one needs this one's ``bench/worker.py`` and ``bench/mask_cases.py``.
    """

    title: str
    length: int = 8192
    variants: tuple[Variant, ...] = (EAGER, PAIR)

    def plan(self, options: Options) -> list[tuple[str, Variant]]:
        """The variants of a kind one after the other."""
        variants = compared(options.before) if options.before else self.variants
        return [(name, variant) for name in MASKS for variant in variants]

    def measure(self, step: tuple[str, Variant], options: Options) -> Row:
        name, variant = step
        length = min(options.max_seq, 2048 if options.quick else self.length)
        one = Growth(self.title, PREFIX + name, self.variants)
        return {"mask": name} | one.measure(("forward+backward", length, variant), options)

    def tables(self, rows: list[Row]) -> list[Table]:
        """The measurements, and what they are of the first variant's."""
        first = {r["mask"]: r for r in rows if "seconds" in r and r["variant"] != PAIR.label}
        body: list[list[Any]] = []
        for row in rows:
            head = [row["mask"], row["T"], row["variant"]]
            if "seconds" not in row:
                body.append([*head, row["note"]])
                continue
            base = first.get(row["mask"])
            ratios = [f"{row[k] / base[k]:.2f}x" if base else "" for k in ("seconds", "bytes")]
            numbers = [row["seconds"] * 1e3, ratios[0], row["bytes"] / 1e6, ratios[1], f"{row['error']:.0e}"]
            body.append([*head, *numbers])
        heads = ["mask", "T", "variant", "ms", "of the first", "peak MB", "of the first", "error"]
        return [(self.title, heads, body)]

    def plots(self, rows: list[Row]) -> list[Any]:
        return []
