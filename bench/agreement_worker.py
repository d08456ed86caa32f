"""One rank of a training step, with the time that it spends on the exchange before the call."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from bench import cases
from bench.launch import report, task

STEPS = 24


def main() -> None:
    work = task()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    report(**measure(work))
    dist.destroy_process_group()


def measure(work: dict[str, Any]) -> dict[str, float]:
    """Medians of seconds: a step, the exchange in it, its own processor's time, the digest of the inputs."""
    from spcompile.agreement import Agreement
    from spcompile.digest import digest

    spent: list[float] = []
    own: list[float] = []
    Agreement.before_calling = clocked(Agreement.before_calling, spent, own)  # type: ignore[method-assign]
    case = cases.model(work["T"])
    function = torch.compile(case.module, backend=work["backend"], options={"check": work["check"]})
    steps, digests = [], []
    for _ in range(2 + STEPS):
        dist.barrier()
        began = time.perf_counter()
        case.run(function, backward=True)
        steps.append(time.perf_counter() - began)
        began = time.perf_counter()
        for x in case.inputs.values():
            digest(x)
        digests.append(time.perf_counter() - began)
    names = {"step": steps, "exchange": spent, "own": own, "digest": digests}
    return {name: statistics.median(times[2:]) for name, times in names.items()}


def clocked(function: Callable[..., Any], spent: list[float], own: list[float]) -> Callable[..., Any]:
    """``function``, with the seconds of each call appended to ``spent``, and its processor's to ``own``."""

    def call(*args: Any) -> Any:
        began, worked = time.perf_counter(), time.process_time()
        result = function(*args)
        spent.append(time.perf_counter() - began)
        own.append(time.process_time() - worked)
        return result

    return call


if __name__ == "__main__":
    main()
