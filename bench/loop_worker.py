"""One cold training step of a third-party model, timed and compared with eager."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from bench.launch import processor_seconds, report, task
from tests.proof import eager, loss_of
from tests.zoo import FUNCTIONS, MODELS

# What tests/test_zoo.py asserts for code that computes in float32 inside.
BOUND = 2e-4


def measure(work: dict[str, Any]) -> dict[str, Any]:
    model, inputs = {**MODELS, **FUNCTIONS}[work["model"]](work["T"])
    expected = eager(model, inputs)
    function = torch.compile(model, backend=work["backend"])
    used, began = processor_seconds(), time.perf_counter()
    loss = loss_of(function(**inputs))
    loss.backward()
    spent = {"cpu": processor_seconds() - used, "seconds": time.perf_counter() - began}
    error = expected.error(loss.detach(), {n: p.grad for n, p in model.named_parameters()})
    if not error <= BOUND:
        return {"note": f"WRONG: error {error:.1e}", "error": error}
    return spent | {"error": error}


def main() -> None:
    work = task()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    report(**measure(work))


if __name__ == "__main__":
    main()
