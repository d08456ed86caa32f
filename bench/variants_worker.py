"""Processor seconds that a model of one variant takes to compile: the first training step less a later one.

Models that are written token by token call the operator here, as the libraries' functions do: to trace a loop
takes Dynamo time that grows with the length, and says nothing of attention.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import models
from bench.launch import processor_seconds, report, task
from models import deltanet, gated_deltanet, gla, hgrn2, kda, rwkv6


def attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, scale: float, **how: bool
) -> Tensor:
    """The operator; ``beta`` is ``[B, H, T]``."""
    import spcompile.attention  # noqa: F401  (registers it)

    beta = None if beta is None else beta[..., None]
    return torch.ops.spcompile.linear_attention(q, k, v, log_decay, beta, None, True, scale, **how)[0]


def _gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    return attention(q, k, v, log_decay, None, q.shape[3] ** -0.5)


def _hgrn2(q: Tensor, log_forget: Tensor, v: Tensor) -> Tensor:
    return attention(q, 1 - log_forget.exp(), v, log_forget, None, 1.0)


def _rwkv6(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor) -> Tensor:
    own = (r * bonus[:, None] * k).sum(-1, keepdim=True) * v
    return attention(r, k, v, log_decay, None, 1.0, exclusive=True) + own


def _deltanet(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    return attention(q, k, v, None, beta, q.shape[3] ** -0.5)


def _gated_deltanet(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    return attention(q, k, v, log_decay[..., None], beta, q.shape[3] ** -0.5)


def _kda(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    return attention(q, k, v, log_decay, beta, q.shape[3] ** -0.5)


LOOPS = {
    "gla": (gla, "gla", _gla),
    "hgrn2": (hgrn2, "hgrn2", _hgrn2),
    "rwkv6": (rwkv6, "rwkv6", _rwkv6),
    "deltanet": (deltanet, "delta_rule", _deltanet),
    "gated_deltanet": (gated_deltanet, "gated_delta_rule", _gated_deltanet),
    "kda": (kda, "kda", _kda),
}
"""Variant -> where its loop over tokens stands, and what is the same as an operator."""


@contextlib.contextmanager
def without_loops() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module, name, function in LOOPS.values():
            stack.enter_context(mock.patch.object(module, name, function))
        yield


def build(name: str, layers: int) -> nn.Module:
    torch.manual_seed(0)
    return models.get(f"{name}:tiny", layers=layers, pattern="L")()


def step(function: Any, inputs: dict[str, Any]) -> float:
    """Processor seconds of a forward and a backward."""
    began = processor_seconds()
    function(**inputs).backward()
    return processor_seconds() - began


def measure(work: dict[str, Any]) -> dict[str, Any]:
    model = build(work["model"], work["layers"])
    inputs = model.example_inputs(work["T"])
    with without_loops():
        function = torch.compile(model, backend=work["backend"])
        first, *later = (step(function, inputs) for _ in range(6))
    again = statistics.median(later)
    return {"seconds": first - again, "step": again}


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
