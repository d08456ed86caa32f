"""Processor seconds of one training step in a new process, and what the user is told.

Nothing of spcompile is imported before the step: torch.compile imports it when it looks the backend up, and
that is a part of what a start costs.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import models
from bench.launch import processor_seconds, report, task
from tests import huggingface, zoo


def build(kind: str, length: int) -> tuple[nn.Module, dict[str, Any]]:
    if kind == "softmax":
        model, inputs = huggingface.build("llama", length)
        return model.float(), inputs
    if kind == "library":
        return zoo.MODELS["qwen3_5"](length)
    torch.manual_seed(0)
    model = models.get("linear_llama3:tiny", layers=2, pattern="LN")()
    return model, model.example_inputs(length)


def loss(result: Any) -> Tensor:
    """What the model returns, or the loss in it."""
    return result if isinstance(result, Tensor) else result.loss


def measure(work: dict[str, Any]) -> dict[str, Any]:
    """The first step's processor seconds, of them the recognition's, and the warnings and the report."""
    model, inputs = build(work["kind"], work["length"])
    assert "spcompile" not in sys.modules
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        used = processor_seconds()
        loss(torch.compile(model, backend=work["backend"])(**inputs)).backward()
        used = processor_seconds() - used
    told: list[Any] = [str(w.message) for w in caught if "spcompile" in str(w.message)]
    recognition = 0.0
    if work["backend"] == "spcompile":
        from spcompile.reports.report import last

        found = last().to_dict()
        recognition = found.pop("pass_seconds")["recognize"]
        told.append(found)
    hits = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
    whole = processor_seconds()
    return {"seconds": used, "process": whole, "recognition": recognition, "hits": hits, "told": told}


def main() -> None:
    work = task()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if work["ranks"] > 1:
        dist.init_process_group("gloo")
    report(**measure(work))
    if work["ranks"] > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
