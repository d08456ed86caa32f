"""The fused kernels of linear attention on CPU tensors: ``TRITON_INTERPRET=1 python -m tests.fused_worker``.

One line of JSON: case -> relative errors of the results and all gradients against the token-by-token
recurrence in float64. A process of its own: kernels are interpreted or not from when they are decorated.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading

import pytest
import torch
from torch import Tensor

from spcompile.attention import reference
from spcompile.kernels.linear import chunked, fused
from spcompile.kernels.linear.kernel import Kernel
from spcompile.kernels.linear.operands import Operands, Options
from spcompile.kernels.scan import scan as loop
from spcompile.kernels.triton import scan
from spcompile.strategies import linear
from tests import triton_interpreter
from tests.test_linear_attention import SCANS, scan_operands
from tests.test_linear_strategies import sharded
from tests.threads import Ranks
from tests.variants import KINDS, cotangents, draw, options_of, references

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GATES = ("none", "constant", "mild", "strong")
SIZES = {"one token": (1, 16, 16), "two chunks": (65, 24, 16), "two segments": (530, 16, 40)}
ORDERS = {"": (False, False), "exclusive": (True, False), "reverse": (False, True), "both": (True, True)}
FUSED = ("linear_llama3", "retention", "simple_gla")
NAMES = ("out", "final", "dq", "dk", "dv", "dlog_decay", "dinitial_state")


def cases() -> list[str]:
    """The names of all cases."""
    # Dtypes differ in how products are read alone, and segments not at all: not all need every order.
    orders = {"fp32": ORDERS, "bf16": ("",), "fp16": ("",)}
    return [
        ", ".join((dtype, *case))
        for dtype, some in orders.items()
        for case in itertools.product(GATES, SIZES, some)
        if case[1] != "two segments" or case[2] in ("", "both")
    ]


def surrounded(x: Tensor) -> Tensor:
    """The same values between NaNs, as a view with tokens before heads, as models make them."""
    b, h, t, d = x.shape
    room = torch.full((b, t + 2, h, d + 3), torch.nan, dtype=x.dtype)
    room[:, 1:-1, :, 1:-2] = x.transpose(1, 2)
    return room[:, 1:-1, :, 1:-2].transpose(1, 2)


def gate(kind: str, tokens: int) -> Tensor | None:
    """Log decays of two heads."""
    if kind == "none":
        return None
    if kind == "constant":
        return torch.tensor([-0.05, -1.5]).reshape(1, 2, 1, 1)
    g = -torch.rand(1, 2, tokens, 1) * (0.1 if kind == "mild" else 30)
    if kind == "strong":
        g[0, 0, tokens // 2] = -torch.inf
        g[0, 1, ::3] = -1e4
    return g


def errors(case: str) -> dict[str, float]:
    """Of one case; of what is zero in the reference, the absolute one.

    That of a constant decay is a sum of numbers of either sign: its error is relative to that of their sizes.
    """
    dtype, kind, size, order = case.split(", ")
    t, k, v = SIZES[size]
    torch.manual_seed(0)
    x = Operands(*(torch.randn(1, 2, t, d).to(DTYPES[dtype]) for d in (k, k, v)), gate(kind, t))
    x = x._replace(initial_state=torch.randn(1, 2, k, v))
    grad, grad_final = torch.randn(1, 2, t, v).to(DTYPES[dtype]), torch.randn(1, 2, k, v)
    options = Options(True, 0.3, *ORDERS[order])

    leaves = [None if y is None else y.double() for y in x]
    if kind == "constant":
        leaves[3] = leaves[3].expand(1, 2, t, 1).clone()
    leaves = [None if y is None else y.requires_grad_() for y in leaves]
    out, final = reference.linear_attention(*leaves, *options)
    given = [y for y in leaves if y is not None]
    pulled = iter(torch.autograd.grad([out, final], given, [grad.double(), grad_final.double()]))
    want = [out, final, *(None if y is None else next(pulled) for y in leaves)]

    apart = Operands(*(None if y is None else surrounded(y) for y in x[:5]), x.initial_state)
    forward = fused.Forward(apart, options)
    forward.local()
    got = [*forward.finish(apart.initial_state)]
    backward = fused.Backward(apart, options, surrounded(grad), apart.initial_state)
    backward.local()
    got += backward.finish(grad_final)
    pairs = [(g, w) for g, w in zip(got, want, strict=True) if w is not None]
    names = [n for n, w in zip([*NAMES[:6], "", NAMES[6]], want, strict=True) if w is not None]
    found = {}
    for name, (g, w) in zip(names, pairs, strict=True):
        assert g is not None
        w, size_of = w.detach(), w.detach().norm()
        if name == "dlog_decay" and kind == "constant":
            w, size_of = w.sum(2, keepdim=True), w.abs().sum(2).norm()
        assert g.shape == w.shape
        found[name] = float((g.double() - w).norm() / size_of.clamp_min(1e-3))
    return found


def totals(case: str) -> float:
    """How far the summaries of a run, forward and backward, are from those of the chunked kernel."""
    _, kind, size, order = case.split(", ")
    t, k, v = SIZES[size]
    torch.manual_seed(1)
    x = Operands(*(torch.randn(1, 2, t, d) for d in (k, k, v)), gate(kind, t))
    options, grad = Options(True, 0.3, *ORDERS[order]), torch.randn(1, 2, t, v)
    ours = *fused.Forward(x, options).total(), *fused.Backward(x, options, grad, None).total()
    theirs = *chunked.Forward(x, options).total(), *chunked.Backward(x, options, grad, None).total()
    pairs = [(a, b) if a.shape[3] > 1 else (a.exp(), b.exp()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-3)) for a, b in pairs)


def scans() -> dict[str, float]:
    """How far the scan is from the loop over steps, of every kind of operands."""
    found = {}
    for name, reverse, dtype in itertools.product(SCANS, (False, True), (torch.float32, torch.float64)):
        a, b, initial, matrix = scan_operands(name, dtype)
        if not scan.supports(a, b, matrix):
            assert matrix and dtype == torch.float64
            continue
        for start in (None, initial):
            ours, theirs = scan.scan(a, b, start, matrix, reverse), loop(a, b, start, matrix, reverse)
            case = f"scan, {name}, {dtype}, reverse={reverse}, initial={start is not None}"
            found[case] = max(float((x - y).norm() / y.norm()) for x, y in zip(ours, theirs, strict=True))
    return found


def on_ranks() -> dict[str, float]:
    """The sharded operator over the fused kernel on simulated ranks, with NaN in the padding."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        kernel = Kernel("fused", fused.Forward, fused.Backward)
        patch.setattr(linear, "kernel_of", lambda x, options: kernel)
        # One launch at a time: the interpreter changes Triton's language while it runs a kernel.
        one = threading.Lock()
        patch.setattr(torch.cuda, "device_of", lambda x: one)
        for kind, (ranks, reverse) in itertools.product(FUSED, ((2, True), (3, False))):
            x, options = draw(KINDS[kind], 1, 2, 130, 16, 24), options_of(KINDS[kind], reverse)
            grads = cotangents(x)
            narrow = Operands(*(None if y is None else y.float() for y in x))
            got = sharded(Ranks(ranks, patch), narrow, options, (grads[0].float(), grads[1].float()))
            want = references(x, options, grads)
            error = max(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))
            found[f"{kind}, {ranks} ranks, reverse={reverse}"] = error
    return found


def traffic() -> dict[str, float]:
    """Bytes that the kernels move, per token and head, of bf16 operands."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spcompile.kernels.scan.scan", scan.scan)
        for size, gated in itertools.product((64, 128), (False, True)):
            x = Operands(*(torch.randn(1, 1, 1024, size).bfloat16() for _ in range(3)))
            x = x._replace(log_decay=-torch.rand(1, 1, 1024, 1)) if gated else x
            for name, steps in (("forward", fused.Forward), ("backward", fused.Backward)):
                triton_interpreter.moved[0] = 0
                run = steps(x, Options(True, 0.3), *((x.v, None) if name == "backward" else ()))
                run.local()
                run.finish(None)
                case = f"{name}, {size}, {'decay' if gated else 'no decay'}"
                found[case] = triton_interpreter.moved[0] / 1024
    return found


def main() -> int:
    triton_interpreter.install()
    found: dict[str, dict[str, float]] = {case: errors(case) for case in cases()}
    for case in found:
        if case.startswith("fp32"):
            found[case]["totals"] = totals(case)
    x = [torch.randn(1, 2, 65, 16) for _ in range(4)]
    g, ops = -torch.rand(1, 2, 65, 1), torch.ops.spcompile
    before = torch.zeros(2, 1, 16, 16)
    torch.library.opcheck(ops.segment_summaries, (x[0], x[1], g, 0.3, 0, True))
    torch.library.opcheck(ops.segment_outputs, (*x[:3], g, before, x[3], None, 0.3, False, 0, False))
    kept = torch.zeros(2, 8, 16, 16)
    torch.library.opcheck(ops.segment_outputs, (*x[:3], g, before, x[3], kept, 0.3, True, 2, True))
    torch.library.opcheck(ops.segment_pairs, (*x, g, 0.3, 0, False))
    found["scan"] = scans()
    found["ranks"] = on_ranks()
    found["bytes"] = traffic()
    print("FOUND", json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
