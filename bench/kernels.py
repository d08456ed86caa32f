"""The Triton kernels: their machine code, launches and bytes, which need no GPU; on a GPU their times."""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

from bench import device
from bench.launch import processor_seconds
from bench.options import Options, Row, Table
from tests import workers

TARGETS: tuple[int | str, ...] = (80, 90, 100, "gfx942")
# Bytes per token and head of flash-linear-attention 0.6.0, counted likewise at T = 256, and its launches.
OF_FLA = {
    "forward, 64, no decay": (1280, 2),
    "backward, 64, no decay": (4096, 4),
    "forward, 64, decay": (1308, 3),
    "backward, 64, decay": (4161, 5),
    "forward, 64, decay per key": (4830, 5),
    "backward, 64, decay per key": (10740, 6),
    "forward, 64, delta rule, decay": (2416, 5),
    "backward, 64, delta rule, decay": (6334, 7),
    "forward, 64, delta rule, decay per key": (7912, 6),
    "backward, 64, delta rule, decay per key": (13326, 7),
    "forward, 128, no decay": (4096, 2),
    "backward, 128, no decay": (14849, 4),
    "forward, 128, decay": (4173, 3),
    "backward, 128, decay": (15034, 5),
    "forward, 128, decay per key": (11790, 5),
    "backward, 128, decay per key": (30488, 6),
    "forward, 128, delta rule, decay": (6136, 5),
    "backward, 128, delta rule, decay": (17503, 7),
    "forward, 128, delta rule, decay per key": (16816, 6),
    "backward, 128, delta rule, decay per key": (30900, 7),
}


class Step(NamedTuple):
    """A kernel for one target."""

    kernel: str
    size: int
    dtype: str
    target: int | str


# The first column of a row says what it is; titles of those that are not machine code.
_TITLES = {
    "call": "linear attention on a GPU, bf16, with flash-linear-attention's",
    "variant": "bytes per token and head that the kernels move, bf16, T = 1024, with fla's; launches, "
    "operand bytes and least programs of a launch, 4 heads, T = 32,768",
}


@dataclass(frozen=True)
class Kernels:
    """A benchmark: on a GPU each variant checked and timed (``bench/device.py``); without one, or with
    ``--static``, each kernel compiled for each target, and what the interpreter counts."""

    title: str

    def plan(self, options: Options) -> list[Step | str | device.Call]:
        import torch

        from bench.machine_code import SCANS, VARIANTS

        if not options.static and torch.cuda.is_available():
            return [*device.plan(options)]
        if not options.static:
            options.log("no GPU here: nothing is timed, kernels are compiled alone, as by --static")
        sizes, targets = ((128,), (90,)) if options.quick else ((64, 128, 256), TARGETS)
        steps = [
            Step(name, size, "bfloat16", target)
            for target in targets
            for size in sizes
            for name in VARIANTS
            if size <= (128 if "delta" in name else 256)
        ]
        if not options.quick:
            steps += [Step(name, 128, "float32", 90) for name in VARIANTS]
        steps += [Step(name, 128, "float32", target) for target in targets for name in SCANS]
        return [*steps, *OF_FLA]

    def measure(self, step: Step | str | device.Call, options: Options) -> Row:
        if isinstance(step, device.Call):
            return device.measure(step, options)
        if isinstance(step, str):
            return _counted(step)
        import torch

        from bench.machine_code import SCANS, VARIANTS, compiled, compiled_scan, described

        target = step.target if isinstance(step.target, str) else f"sm_{step.target}"
        row: Row = {"kernel": step.kernel, "heads of": step.size, "dtype": step.dtype, "target": target}
        # A warm cache would hide that nothing compiles.
        with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
            began = processor_seconds()  # of Triton and of ptxas, whatever else the machine does
            try:
                if step.kernel in SCANS:
                    made = compiled_scan(step.kernel, step.target)
                else:
                    dtype = getattr(torch, step.dtype)
                    made = compiled(VARIANTS[step.kernel], step.size, dtype, step.target)
                seconds = processor_seconds() - began
                return row | {"seconds": seconds} | described(made, step.target)._asdict()
            except Exception as error:  # of the compiler or of ptxas: a row says which kernel
                options.log(f"{row}: {error}")
                return row | {"note": f"failed: {type(error).__name__}"}

    def tables(self, rows: list[Row]) -> list[Table]:
        # Rows of one kind have one table: times, machine code of each target, counts.
        kinds: dict[str, list[Row]] = {}
        for row in rows:
            of_target = f"machine code for {row.get('target')}, Triton {_version()}"
            kinds.setdefault(_TITLES.get(next(iter(row)), of_target), []).append(row)
        tables: list[Table] = []
        for title, mine in kinds.items():
            heads = [key for key in dict.fromkeys(key for row in mine for key in row) if key != "target"]
            tables.append((title, heads, [[row.get(key, "") for key in heads] for row in mine]))
        return tables

    def plots(self, rows: list[Row]) -> list[Any]:
        return []


def _version() -> str:
    import triton

    return triton.__version__


def _counted(case: str) -> Row:
    way, size, variant = case.split(", ", 2)
    found, (theirs, launches) = _traffic(), OF_FLA[case]
    row: Row = {"variant": variant, "heads of": size, "way": way, "bytes": found["bytes"][case]}
    row |= {"of fla": theirs, "ratio": found["bytes"][case] / theirs}
    if size != "128":
        return row
    ledger = f"{way}, 4 heads, {variant}"  # at 32 thousand tokens
    counted = {"launches": int(found["launches"][ledger]), "fla's": launches}
    return row | counted | {"operand bytes": found["operands"][ledger], "programs": found["programs"][ledger]}


@functools.cache
def _traffic() -> dict[str, dict[str, float]]:
    """Counted by Triton's interpreter, which is chosen when kernels are decorated: another process."""
    return workers.found("fused_worker", "traffic", TRITON_INTERPRET="1")
