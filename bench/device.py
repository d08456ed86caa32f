"""Linear attention timed on a GPU: checked first, beside flash-linear-attention where that is installed."""

from __future__ import annotations

import importlib
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import spcompile.attention  # noqa: F401  (registers the operators)
from bench.options import Options, Row

__all__ = ["Call", "measure", "plan"]

# Relative error (norm) that one rounding of bf16 operands may leave, against the same call in float64.
TOLERANCE = 5e-3
# Operands that take turns, so that none lies in the cache from the call before.
TURNS = 4


Operands = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class Call(NamedTuple):
    """What is timed: a variant of linear attention, or a ceiling (``"copy"``, ``"matmul"``)."""

    variant: str
    size: int
    heads: int
    tokens: int


def plan(options: Options) -> list[Call]:
    tokens = 2048 if options.quick else 16_384
    calls = [Call("copy", 0, 0, 1 << 28), Call("matmul", 0, 0, 8192)]
    for variant in (
        "no decay",
        "decay",
        "decay per key",
        "delta rule",
        "delta rule, decay",
        "delta rule, decay per key",
    ):
        calls += [Call(variant, size, heads, tokens) for size in (64, 128) for heads in (4, 32)]
    return calls


def measure(call: Call, options: Options, device: str = "cuda") -> Row:
    """Milliseconds of a forward, and of forward and backward; a wrong answer is not timed."""
    row: Row = {"call": call.variant, "heads": call.heads, "heads of": call.size, "T": call.tokens}
    if not call.size:
        run, work, unit = _ceiling(call, device)
        seconds = _time(run, options.budget, device)
        return row | {"forward ms": seconds * 1e3, unit: work / seconds}
    inputs = [_operands(call, device, seed) for seed in range(TURNS)]
    ways = {"": _ours}
    if device == "cuda" and (theirs := _fla(call.variant)):
        ways["fla "] = theirs
    for who, function in ways.items():
        row[f"{who}error"] = error = _error(function, inputs[0])
        if not error <= TOLERANCE:
            row["note"] = f"WRONG: {who}not timed"
            continue
        for way, backward in (("forward", False), ("both", True)):
            seconds = _time(_turning(function, inputs, backward), options.budget, device)
            row[f"{who}{way} ms"] = seconds * 1e3
    return row


def _turning(function: Callable[..., Tensor], inputs: list[Operands], backward: bool) -> Callable[[], None]:
    """A run of the next operands."""
    turns = itertools.cycle(inputs)

    def run() -> None:
        x = next(turns)
        with torch.set_grad_enabled(backward):
            out = function(*x)
        if backward:
            torch.autograd.grad(out, [y for y in x if y is not None], x[2])  # a gradient of the shape of v

    return run


def _operands(call: Call, device: str, seed: int) -> Operands:
    """q, k, v ``[1, H, T, D]``, log decay and beta, leaves in bf16."""
    torch.manual_seed(seed)
    shape = (1, call.heads, call.tokens)
    q, k, v = (torch.randn(*shape, call.size, device=device) for _ in range(3))
    g = b = None
    if "decay" in call.variant and call.variant != "no decay":
        size = call.size if "per key" in call.variant else 1
        g = F.logsigmoid(torch.randn(*shape, size, device=device) + 3).requires_grad_()
    if "delta" in call.variant:
        k, b = F.normalize(k, dim=-1), torch.rand(*shape, 1, device=device).bfloat16().requires_grad_()
    q, k, v = (x.bfloat16().requires_grad_() for x in (q, k, v))
    return q, k, v, g, b


def _ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, b: Tensor | None) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1])
    return torch.ops.spcompile.linear_attention(q, k, v, g, b, None, True, scale)[0]


def _error(function: Callable[..., Tensor], x: Operands) -> float:
    """The largest of outputs and gradients, against ours in float64, which no fused kernel takes."""
    found = []
    for run, dtype in ((function, None), (_ours, torch.float64)):
        given = [None if y is None else y.detach().to(dtype or y.dtype).requires_grad_() for y in x]
        out = run(*given)
        leaves = [y for y in given if y is not None]
        found.append([out.detach(), *torch.autograd.grad(out, leaves, x[2].detach().to(out.dtype))])
    pairs = zip(*found, strict=True)
    return max(float((a.double() - b).norm() / b.norm().clamp_min(1e-6)) for a, b in pairs)


# variant -> module and function of flash-linear-attention, which take tokens before heads
_OF_FLA = {
    "no decay": ("linear_attn", "chunk_linear_attn"),
    "decay": ("simple_gla", "chunk_simple_gla"),
    "decay per key": ("gla", "chunk_gla"),
    "delta rule": ("delta_rule", "chunk_delta_rule"),
    "delta rule, decay": ("gated_delta_rule", "chunk_gated_delta_rule"),
    "delta rule, decay per key": ("kda", "chunk_kda"),
}


def _fla(variant: str) -> Callable[..., Tensor] | None:
    """flash-linear-attention's of the same variant, where it is installed."""
    module, name = _OF_FLA[variant]
    try:
        function = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    except ImportError:
        return None
    more = {"normalize": False} if variant == "no decay" else {}

    def run(*x: Tensor | None) -> Tensor:
        given = [y.transpose(1, 2) for y in x if y is not None]
        given = given[:3] + [y if y.shape[-1] > 1 else y.squeeze(-1) for y in given[3:]]
        return function(*given, **more)[0].transpose(1, 2)

    return run


def _ceiling(call: Call, device: str) -> tuple[Callable[[], object], float, str]:
    """What to run, its work, and the name of work per second: a copy's bytes, a product's operations."""
    if call.variant == "copy":
        x, y = (torch.empty(call.tokens, device=device, dtype=torch.bfloat16) for _ in range(2))
        return lambda: y.copy_(x), 2 * x.nbytes / 1e12, "TB/s"
    x, y = (torch.randn(call.tokens, call.tokens, device=device).bfloat16() for _ in range(2))
    return lambda: x @ y, 2 * call.tokens**3 / 1e12, "TFLOP/s"


def _time(run: Callable[[], object], budget: float, device: str) -> float:
    """Median seconds of a run: by events on a GPU, with nothing waiting between them."""
    for _ in range(TURNS):
        run()
    seconds: list[float] = []
    until = time.perf_counter() + budget
    while len(seconds) < 5 or (time.perf_counter() < until and len(seconds) < 100):
        if device == "cpu":
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)
