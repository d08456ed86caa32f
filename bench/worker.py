"""One measurement: one variant of one case at one length, in processes of its own."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from bench import cases, mask_cases  # noqa: F401  (adds its cases)
from bench.launch import report, task
from bench.memory import peak_growth

# Float32 against float32: sums of up to 32 K terms in another order, through layers and their gradients.
TOLERANCE = 1e-4


def serve(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """In a worker of one rank or more: do what it was launched for, and report it."""
    work = task()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if work["ranks"] > 1:
        dist.init_process_group("gloo")
    report(**measure(work))
    if work["ranks"] > 1:
        dist.destroy_process_group()


def measure(work: dict[str, Any]) -> dict[str, Any]:
    """Compile, check, then take the times of many runs; or, if a peak is asked for, the memory of one.

    Returns:
        bytes (peak growth over what the process held before) if a peak is asked for; otherwise error, first
        (seconds of the first call, which compiles), seconds (median) and repeats. With an error above
        tolerance nothing is measured.
    """
    case = cases.CASES[work["case"]](work["length"])
    backward = work["backward"]
    backend = work["backend"]
    function = case.module if backend is None else torch.compile(case.module, backend=backend)
    if work.get("peak"):  # of a function that another process has checked
        case.run(function, backward)
        return {"bytes": peak_growth(lambda: case.run(function, backward))}
    began = time.perf_counter()
    got = case.results(function, backward)
    first = time.perf_counter() - began

    if backend is not None and work["eager_fits"]:
        want = case.results(case.module, backward)
    else:
        want = cases.reference(work["case"], work["length"], backward)
    worst = cases.error(got, want)
    if not worst <= TOLERANCE:
        return {"error": worst, "first": first}
    del got, want

    def run() -> None:
        case.run(function, backward)

    times = clock(run, work["budget"], work["ranks"])
    return {
        "error": worst,
        "first": first,
        "seconds": statistics.median(times),
        "repeats": len(times),
    }


def clock(run: Callable[[], None], budget: float, ranks: int) -> list[float]:
    """Times of 3 to 50 runs, about `budget` seconds in all; ranks start each run together."""
    times: list[float] = []
    wanted = 3
    while len(times) < wanted:
        if ranks > 1:
            dist.barrier()
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
        if len(times) == 1:
            count = torch.tensor(min(50, max(3, int(budget / times[0]))))
            if ranks > 1:  # every rank must run equally often
                dist.broadcast(count, src=0)
            wanted = int(count)
    return times


if __name__ == "__main__":
    serve(measure)
