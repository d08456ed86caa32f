"""One rank of one training run: eager alone, or a compiled model on all ranks."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist

import models
from bench.launch import report, task
from bench.memory import peak_bytes, reset_peak
from demo import text


def main() -> None:
    work = task()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if work["ranks"] > 1:
        dist.init_process_group("gloo")
    report(**train(work))
    if work["ranks"] > 1:
        dist.destroy_process_group()


def train(work: dict[str, Any]) -> dict[str, Any]:
    """Train and return losses, seconds a step, and memory; `backend` None is eager.

    Nothing here depends on the rank: each passes the whole batch and ends with the whole gradient, so that
    equal optimizers stay equal.
    """
    torch.manual_seed(work["seed"])
    model = models.get(work["model"], pattern=work["pattern"])().to(getattr(torch, work["dtype"]))
    steps = work["steps"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=work["lr"])
    windows = text.batches(text.read(work["text"]), work["length"], steps, work["seed"])
    run = model if work["backend"] is None else torch.compile(model, backend=work["backend"])
    held = reset_peak()

    losses, seconds = [], []
    for step, ids in enumerate(windows):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = work["lr"] * min(1.0, (step + 1) / work["warmup"])
        loss = run(ids, labels=ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
        if step == 0:  # compilation is over: from here on the peak is that of training
            compile_peak, held = peak_bytes(), reset_peak()
        report(step=step + 1, loss=losses[-1])
    return {
        "losses": losses,
        "seconds": seconds,
        "peak": peak_bytes(),
        "growth": peak_bytes() - held,
        "first_peak": compile_peak,
    }


if __name__ == "__main__":
    main()
