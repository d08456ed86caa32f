"""Time and peak memory against sequence length, and the exponents with which they grow."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from bench import cases
from bench.launch import KEPT, RETURNED, Report, WorkerError, launch, reason
from bench.options import Options, Row, Table

MODES = {"forward": False, "forward+backward": True}
BEFORE = ", before"
LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768)


@dataclass(frozen=True)
class Variant:
    """A way to run a case: `backend` of torch.compile (None: eager) on `ranks` processes."""

    label: str
    backend: str | None
    ranks: int = 1
    folder: str | None = None  # of the checkout whose backend it is; None: of this one

    @property
    def is_quadratic(self) -> bool:
        return self.backend != "spcompile"


EAGER = Variant("eager", None)
INDUCTOR = Variant("inductor", "inductor")
ALONE = Variant("spcompile P=1", "spcompile")
PAIR = Variant("spcompile P=2", "spcompile", ranks=2)


def compared(folder: str) -> tuple[Variant, ...]:
    """An earlier checkout beside this one, on two ranks."""
    return replace(PAIR, label=PAIR.label + BEFORE, folder=folder), PAIR


@dataclass(frozen=True)
class Growth:
    """A benchmark: every variant of a case at every length, side by side."""

    title: str
    case: str
    variants: tuple[Variant, ...]
    lengths: tuple[int, ...] = LENGTHS
    modes: tuple[str, ...] = field(default=tuple(MODES))

    def plan(self, options: Options) -> list[tuple[str, int, Variant]]:
        """What to measure, one length after the other, so that the variants of a length share its moment."""
        longest = min(options.max_seq, 4096) if options.quick else options.max_seq
        lengths = [t for t in self.lengths if t <= longest]
        variants = compared(options.before) if options.before else self.variants
        modes = self.modes[-1:] if options.before else self.modes
        return [(mode, t, variant) for mode in modes for t in lengths for variant in variants]

    def measure(self, step: tuple[str, int, Variant], options: Options) -> Row:
        mode, length, variant = step
        backward = MODES[mode]
        row: Row = {"variant": variant.label, "mode": mode, "T": length}
        square_bytes = self.square_bytes(length, backward)
        fits = square_bytes <= options.square_limit
        if variant.is_quadratic and not fits:
            return row | {"note": f"skipped: {square_bytes / 1e9:.0f} GB of T x T tensors"}
        work = {
            "case": self.case,
            "length": length,
            "backward": backward,
            "backend": options.backend if variant.backend == "spcompile" else variant.backend,
            "ranks": variant.ranks,
            "eager_fits": fits,
            "budget": options.budget,
        }

        def ask(env: dict[str, str], **more: bool) -> list[Report]:
            task = work | more
            return launch(
                "bench.worker", task, variant.ranks, options.threads, env=env, folder=variant.folder
            )

        try:
            got = ask(KEPT)
            if all("seconds" in rank for rank in got):
                peaks = ask(RETURNED, peak=True)
                got = [rank | peak for rank, peak in zip(got, peaks, strict=True)]
        except WorkerError as error:
            options.log(str(error))
            return row | {"note": "failed: " + reason(error)[:80]}
        return row | summary(got)

    def square_bytes(self, length: int, backward: bool) -> int:
        """Bytes of T x T tensors that eager holds at once; a short case tells, since they grow with T^2."""
        short = cases.CASES[self.case](64).square_elements[backward]
        return 4 * short * (length // 64) ** 2

    def tables(self, rows: list[Row]) -> list[Table]:
        """The measurements, the ratio to what they are held against, and the fitted exponents."""
        bases = {(r["variant"], r["mode"], r["T"]): r["seconds"] for r in rows if "seconds" in r}
        body = []
        for row in rows:
            if "seconds" not in row:
                body.append([row["mode"], row["T"], row["variant"], row["note"]])
                continue
            at = row["mode"], row["T"]
            base = bases.get(("eager", *at)) or bases.get((row["variant"] + BEFORE, *at))
            ratio = f"{base / row['seconds']:.1f}x" if base else ""
            numbers = [row["seconds"] * 1e3, ratio, row["bytes"] / 1e6, f"{row['error']:.0e}", row["first"]]
            body.append([row["mode"], row["T"], row["variant"], *numbers])
        heads = ["mode", "T", "variant", "ms", "faster", "peak MB", "error", "first call s"]
        return [(self.title, heads, body), self.exponents(rows)]

    def exponents(self, rows: list[Row]) -> Table:
        body = []
        for mode in dict.fromkeys(row["mode"] for row in rows):
            for label in labels(rows):
                mine = [r for r in rows if (r["variant"], r["mode"]) == (label, mode) and "seconds" in r]
                used = [r for r in mine if r["T"] >= 4096]
                used = used if len(used) >= 2 else mine
                if len(used) < 2:
                    continue
                lengths = [r["T"] for r in used]
                powers = [slope(lengths, [r[key] for r in used]) for key in ("seconds", "bytes")]
                body.append([mode, label, f"{lengths[0]}-{lengths[-1]}", *(f"T^{p:.2f}" for p in powers)])
        return ("growth, fitted", ["mode", "variant", "T", "time", "memory"], body)

    def plots(self, rows: list[Row]) -> list[tuple[str, str, dict[str, tuple[list[Any], list[Any]]]]]:
        """(title, y label, {line: (T, y)}) for each picture."""
        pictures = []
        for mode in dict.fromkeys(row["mode"] for row in rows):
            for key, label, unit in (("seconds", "ms", 1e3), ("bytes", "peak MB", 1e-6)):
                lines = {}
                for line in labels(rows):
                    mine = [r for r in rows if (r["variant"], r["mode"]) == (line, mode) and key in r]
                    lines[line] = ([r["T"] for r in mine], [r[key] * unit for r in mine])
                pictures.append((mode, label, lines))
        return pictures


def labels(rows: list[Row]) -> list[str]:
    """The variants that were measured, each once."""
    return list(dict.fromkeys(row["variant"] for row in rows))


def summary(got: list[dict[str, Any]]) -> Row:
    """One row from the ranks: the slowest, the largest, the worst."""
    worst = max(rank["error"] for rank in got)
    first = max(rank["first"] for rank in got)
    if any("seconds" not in rank for rank in got):
        return {"note": f"WRONG: error {worst:.1e}", "error": worst, "first": first}
    peak = max(rank["bytes"] for rank in got)
    seconds = max(rank["seconds"] for rank in got)
    return {"seconds": seconds, "bytes": peak, "error": worst, "first": first, "repeats": got[0]["repeats"]}


def slope(x: list[int], y: list[float]) -> float:
    """The p of the least-squares fit  y = c x^p."""
    log_x, log_y = [math.log(a) for a in x], [math.log(max(b, 1e-12)) for b in y]
    mean_x, mean_y = sum(log_x) / len(x), sum(log_y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in log_x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(log_x, log_y)) / spread
