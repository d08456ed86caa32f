"""Compile time of a deep model, and the part of it that spcompile's own passes take."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from bench import cases
from bench.launch import report, task


def main() -> None:
    work = task()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if work["ranks"] > 1:
        dist.init_process_group("gloo")
    report(**measure(work))
    if work["ranks"] > 1:
        dist.destroy_process_group()


def measure(work: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the first forward+backward less those of a later one, and each pass's part of them."""
    case = cases.model(work["length"], layers=work["layers"])
    function = torch.compile(case.module, backend=work["backend"])
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        case.run(function, backward=True)
        seconds.append(time.perf_counter() - began)
    passes: dict[str, float] = {}
    if work["backend"] == "spcompile":
        from spcompile.reports.report import pass_seconds

        passes = {name: float(value) for name, value in pass_seconds().items()}
    return {"compile": seconds[0] - statistics.median(seconds[1:]), "passes": passes}


if __name__ == "__main__":
    main()
