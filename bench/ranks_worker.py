"""One way across the ranks: checked against eager at a short length, then timed, or its peak taken."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

import models
import spcompile
from bench.memory import peak_growth
from bench.worker import clock, serve

SHAPE = {"vocab": 256, "hidden": 128, "heads": 4, "kv_heads": 4, "mlp": 256}
CHECKED = 256


def measure(work: dict[str, Any]) -> dict[str, Any]:
    """error, seconds and sent (bytes received by a rank in a step); or bytes, where a peak is asked for."""
    torch.manual_seed(0)
    pattern = work["pattern"]
    model = models.get("linear_llama3:tiny", **SHAPE, pattern=pattern, layers=len(pattern))()
    options = {kind: work[kind] for kind in ("linear", "softmax") if work[kind]}
    inputs = model.example_inputs(seq=work["T"], batch=1)

    def run(given: dict[str, Any] = inputs) -> torch.Tensor:
        model.zero_grad()
        loss: torch.Tensor = compiled(**given)
        loss.backward()
        return loss.detach()

    compiled = torch.compile(model, backend=work["backend"], options=options)
    if work.get("peak"):
        run()
        return {"bytes": peak_growth(run)}
    error = check(model, run)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=work["backend"], options=options)
    run()
    times = clock(run, work["budget"], work["ranks"])
    torch.compiler.reset()
    plan = spcompile.explain(model, ranks=work["ranks"], **options)(**inputs)
    sent = sum(row.count * row.bytes for row in plan.collectives)
    return {"error": error, "seconds": statistics.median(times), "sent": sent}


def check(model: nn.Module, run: Any) -> float:
    """The relative error of the loss and of every gradient against eager, at a short length."""
    inputs = model.example_inputs(seq=CHECKED, batch=1)
    loss = run(inputs)
    found = [loss, *(p.grad for p in model.parameters())]
    model.zero_grad()
    loss = model(**inputs)
    loss.backward()
    expected = [loss.detach(), *(p.grad for p in model.parameters())]
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


if __name__ == "__main__":
    serve(measure)
