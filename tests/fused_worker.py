"""The fused kernels of linear attention on CPU tensors, interpreted: ``python -m tests.fused_worker PART``.

One line of JSON: case -> relative errors of the results and all gradients against the token-by-token
recurrence in float64. A process of its own: kernels are interpreted or not from when they are decorated.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._pytree import tree_leaves

from spcompile.attention import reference
from spcompile.kernels.linear import chunked, fused, fused_delta, fused_diagonal, fused_kda, launch, pieces
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
DIAGONAL = ("constant per key", "mild per key", "strong per key")
KDA = tuple(f"{kind}, delta rule" for kind in DIAGONAL)
DELTA = ("delta rule", "mild, delta rule", "strong, delta rule", *KDA)
# Segments are made short: 500 tokens are four.
SEGMENT, LEAST = 128, launch._LEAST
SIZES = {"one token": (1, 16, 16), "two chunks": (65, 24, 16), "four segments": (500, 16, 40)}
USUAL = tuple(SIZES)
SIZES["wide"] = (260, 128, 16)  # of a matrix of 128 x 128 halves are read
SIZES["in pieces"] = (140, 273, 16)
SIZES["part of a chunk"] = (63, 24, 16)
# What takes longest: of one head.
SIZES["three segments"] = (300, 16, 40)
SIZES["large states"] = (130, 16, 24)  # which float16 does not hold
SIZES["canaries"] = (250, 16, 24)  # of fused_properties.py
ORDERS = {"": (False, False), "exclusive": (True, False), "reverse": (False, True), "both": (True, True)}
FUSED = ("linear_llama3", "retention", "simple_gla", "gla", "rwkv6", "deltanet", "gated_deltanet", "kda")
KERNELS = (fused, pieces, fused_diagonal, fused_delta, fused_kda)
NAMES = ("out", "final", "dq", "dk", "dv", "dlog_decay", "dbeta", "dinitial_state")


def cases() -> list[str]:
    """The names of all cases."""
    # Dtypes differ in how products are read alone, and segments not at all: not all need every order.
    orders = {"fp32": ORDERS, "bf16": ("",), "fp16": ("",)}
    found = [
        ", ".join((dtype, *case))
        for dtype, some in orders.items()
        for case in itertools.product(GATES, SIZES, some)
        if case[1] in USUAL and (case[1] != "four segments" or case[2] in ("", "both"))
    ]
    found += [f"fp32, {kind}, part of a chunk, " for kind in GATES]
    found += ["fp32, none, in pieces, ", "fp32, strong, in pieces, both", "bf16, mild, in pieces, "]
    found += [f"fp32, {kind}, {size}, " for kind in DIAGONAL for size in ("one token", "two chunks")]
    found += ["fp32, mild per key, three segments, ", "fp32, strong per key, three segments, both"]
    found += [f"fp32, mild per key, two chunks, {o}" for o in ("exclusive", "reverse", "both")]
    found += ["fp16, mild, large states, ", "fp16, mild per key, large states, "]
    found += [f"{dtype}, {kind}, two chunks, " for dtype in ("bf16", "fp16") for kind in DIAGONAL]
    # Those of a delta rule take longest.
    found += [f"fp32, {kind}, {size}, " for kind in DELTA[:3] for size in ("two chunks", "three segments")]
    found += ["fp32, delta rule, wide, ", "fp32, mild, delta rule, one token, "]
    found += [f"fp32, mild, delta rule, two chunks, {order}" for order in ("reverse", "exclusive")]
    found += [f"fp32, {kind}, two chunks, " for kind in KDA] + [f"fp32, {KDA[2]}, three segments, reverse"]
    found += [f"fp32, {kind}, one token, " for kind in KDA[:2]] + [f"fp32, {KDA[1]}, two chunks, both"]
    found += [f"bf16, {KDA[2]}, two chunks, ", f"fp16, {KDA[1]}, two chunks, "]
    narrow = ("bf16, delta rule", "bf16, mild, delta rule", "fp16, mild, delta rule")
    narrow += ("bf16, mild per key, delta rule",)
    return found + [f"{kind}, three segments, " for kind in narrow]


def gate_of(case: str) -> str:
    """Of GATES, DIAGONAL or DELTA."""
    _, *kinds, _, _ = case.split(", ")
    return ", ".join(kinds)


def parsed(case: str) -> tuple[torch.dtype, str, bool, tuple[int, int, int], Options]:
    """Dtype, gate, whether there is a delta rule, sizes and options of a case."""
    dtype, *kinds, size, order = case.split(", ")
    delta, (t, k, v) = "delta rule" in kinds, SIZES[size]
    kind = kinds[0] if kinds[0] in GATES + DIAGONAL else "none"
    # What a delta rule writes depends on all that it has written: with few keys, roundings add up.
    k = max(k, 64) if delta and t > 64 and (dtype != "fp32" or kind not in DIAGONAL[1:]) else k
    return DTYPES[dtype], kind, delta, (t, k, v), Options(True, 0.3, *ORDERS[order])


def draw_case(case: str) -> Operands:
    """The operands of a case."""
    dtype, kind, delta, (t, k, v), _ = parsed(case)
    torch.manual_seed(0)
    heads = 1 if ", three segments, " in case else 2
    q, keys, values = (torch.randn(1, heads, t, d) for d in (k, k, v))
    keys = F.normalize(keys, dim=-1) if delta else keys
    if ", large states, " in case:
        q, keys, values = q / 1e3, 100 * keys.abs(), 100 * values.abs()
    strength = torch.rand(1, heads, t, 1).to(dtype) if delta else None
    state = torch.randn(1, heads, k, v)
    decay = gate(kind, heads, t, k if "per key" in kind else 1)
    return Operands(*(x.to(dtype) for x in (q, keys, values)), decay, strength, state)


def kernel_for(x: Operands, exclusive: bool = False) -> ModuleType:
    """The fused kernel that takes such operands."""
    per_key = x.log_decay is not None and x.log_decay.shape[3] > 1
    if x.beta is not None:
        return fused_kda if per_key or exclusive else fused_delta
    return fused_diagonal if per_key else pieces if fused.refuses(x) else fused


def surrounded(x: Tensor) -> Tensor:
    """The same values between NaNs, as a view with tokens before heads, as models make them."""
    b, h, t, d = x.shape
    room = torch.full((b, t + 2, h, d + 3), torch.nan, dtype=x.dtype)
    room[:, 1:-1, :, 1:-2] = x.transpose(1, 2)
    return room[:, 1:-1, :, 1:-2].transpose(1, 2)


def gate(kind: str, heads: int, tokens: int, size: int = 1) -> Tensor | None:
    """Log decays of one head or two, for ``size`` keys."""
    if kind == "none":
        return None
    if kind.startswith("constant"):
        return -torch.linspace(0.05, 1.5, heads * size).reshape(1, heads, 1, size)
    g = -torch.rand(1, heads, tokens, size) * (0.1 if kind.startswith("mild") else 30)
    if kind.startswith("strong"):
        g[0, 0, tokens // 2, : (size + 1) // 2] = -torch.inf
        g[0, -1, ::3, size // 3 :] = -1e4
    return g


def each_token(x: Operands) -> Operands:
    """A constant decay as one for each token."""
    g = x.log_decay
    return x if g is None else x._replace(log_decay=g.expand(*x.k.shape[:3], g.shape[3]).clone())


def errors(case: str) -> dict[str, float]:
    """Of one case; of what is zero in the reference, the absolute one.

    A constant decay's gradient is a sum of numbers of either sign: its error is relative to their sizes'.
    """
    *_, options = parsed(case)
    x = draw_case(case)
    assert x.initial_state is not None
    grad, grad_final = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    if ", large states, " in case:
        grad, grad_final = grad / 1e3, grad_final / 1e6

    leaves = [None if y is None else y.double().requires_grad_() for y in each_token(x)]
    out, final = reference.linear_attention(*leaves, *options)
    given = [y for y in leaves if y is not None]
    pulled = iter(torch.autograd.grad([out, final], given, [grad.double(), grad_final.double()]))
    want = [out, final, *(None if y is None else next(pulled) for y in leaves)]

    apart = Operands(*(None if y is None else surrounded(y) for y in x[:5]), x.initial_state)
    kernel = kernel_for(x, options.exclusive)
    forward = kernel.Forward(apart, options)
    forward.local()
    got = [*forward.finish(apart.initial_state)]
    backward = kernel.Backward(apart, options, surrounded(grad), apart.initial_state)
    backward.local()
    got += backward.finish(grad_final)
    pairs = [(g, w) for g, w in zip(got, want, strict=True) if w is not None]
    names = [n for n, w in zip(NAMES, want, strict=True) if w is not None]
    found = {}
    for name, (g, w) in zip(names, pairs, strict=True):
        assert g is not None
        found[name] = relative(g, w)
    return found


def relative(got: Tensor, want: Tensor) -> float:
    """The error of ``got``, which may be the sum of ``want`` over the tokens."""
    want = want.detach()
    size = want.norm()
    if got.shape != want.shape:
        want, size = want.sum(2, keepdim=True), want.abs().sum(2).norm()
    assert got.shape == want.shape
    return float((got.double() - want).norm() / size.clamp_min(1e-3))


def totals(case: str) -> float:
    """How far the summaries of a run, forward and backward, are from those of the chunked kernel in float64.

    Decays as they are summed up, as logarithms.
    """
    *_, options = parsed(case)
    x = draw_case(case)
    grad, kernel = torch.randn_like(x.v), kernel_for(x, options.exclusive)
    ours = *kernel.Forward(x, options).total(), *kernel.Backward(x, options, grad, None).total()
    wide = Operands(*(None if y is None else y.double() for y in x))
    theirs = (
        chunked.Forward(wide, options).total() + chunked.Backward(wide, options, grad.double(), None).total()
    )
    # Of decays that leave nothing it does not matter how little.
    pairs = [
        (a, b) if a.shape[3] > 1 else (a.clamp(-90), b.clamp(-90)) for a, b in zip(ours, theirs, strict=True)
    ]
    return max(float((a.double() - b).norm() / b.norm().clamp_min(1e-3)) for a, b in pairs)


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
        kernels = {k: Kernel("fused", k.Forward, k.Backward) for k in KERNELS}
        patch.setattr(linear, "kernel_of", lambda x, options: kernels[kernel_for(x, options.exclusive)])
        # One launch at a time: the interpreter changes Triton's language while it runs a kernel.
        one = threading.Lock()
        patch.setattr(torch.cuda, "device_of", lambda x: one)
        for kind, (ranks, reverse) in itertools.product(FUSED, ((2, True), (3, False))):
            x, options = draw(KINDS[kind], 1, 1, 130, 16, 24), options_of(KINDS[kind], reverse)
            grads = cotangents(x)
            narrow = Operands(*(None if y is None else y.float() for y in x))
            got = sharded(Ranks(ranks, patch), narrow, options, (grads[0].float(), grads[1].float()))
            want = references(each_token(x), options, grads)
            error = max(map(relative, got, want))
            found[f"{kind}, {ranks} ranks, reverse={reverse}"] = error
    return found


COUNTED = ("no decay", "decay", "decay per key", "delta rule, decay", "delta rule, decay per key")


def counted(kind: str, heads: int, tokens: int, size: int) -> Operands:
    """bf16 operands of which something is counted. Without a decay a delta rule has the same kernels."""
    q, k, v = (torch.randn(1, heads, tokens, size).bfloat16() for _ in range(3))
    decay = beta = None
    if kind != "no decay":
        decay = -torch.rand(1, heads, tokens, size if "per key" in kind else 1)
        decay = decay.bfloat16() if "per key" in kind else decay
    if kind.startswith("delta"):
        k, beta = F.normalize(k, dim=-1), torch.rand(1, heads, tokens, 1)
    return Operands(q, k, v, decay, beta)


def ways(x: Operands) -> Iterator[str]:
    """Run the forward, then the backward, of one rank; says which way is done."""
    kernel = kernel_for(x)
    for way, more in (("forward", ()), ("backward", (torch.randn_like(x.v), None))):
        run = (kernel.Forward if way == "forward" else kernel.Backward)(x, Options(True, 0.3), *more)
        run.local()
        run.finish(None)
        yield way


def traffic() -> dict[str, dict[str, float]]:
    """Bytes that the kernels load and store, per token and head: two segments of each of few heads."""
    found: dict[str, float] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_LEAST", LEAST)
        for size, kind in itertools.product((64, 128), COUNTED):
            triton_interpreter.moved[0] = 0
            for way in ways(counted(kind, 1, 1024, size)):
                found[f"{way}, {size}, {kind}"] = triton_interpreter.moved[0] / 1024
                triton_interpreter.moved[0] = 0
    return {"bytes": found} | ledger()


# Few heads, of which segments make programs enough; and as many as programs are wanted.
HEADS = {"4 heads": (4, 32768), "128 heads": (128, 1024)}


def ledger() -> dict[str, dict[str, float]]:
    """What is launched for heads of 128: how often, operand bytes per token and head, programs at least."""
    found: dict[str, dict[str, float]] = {"launches": {}, "operands": {}, "programs": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_LEAST", LEAST)
        patch.setattr(triton_interpreter, "dry", [True])
        for (name, (heads, tokens)), kind in itertools.product(HEADS.items(), COUNTED):
            triton_interpreter.launches.clear()
            for way in ways(counted(kind, heads, tokens, 128)):
                done, case = [*triton_interpreter.launches], f"{way}, {name}, {kind}"
                found["launches"][case] = len(done)
                found["operands"][case] = sum(x.operands for x in done) / (heads * tokens)
                found["programs"][case] = min(x.programs for x in done)
                triton_interpreter.launches.clear()
    return found


@triton.jit
def product(x, y, z, narrow, PRECISION: tl.constexpr):
    """``z = x y^T`` of ``[16, 16]``, and x in the dtype of ``narrow``."""
    i, j = tl.arange(0, 16)[:, None] * 16, tl.arange(0, 16)[None, :]
    a, b = tl.load(x + i + j), tl.load(y + i + j)
    tl.store(z + i + j, tl.dot(a, tl.trans(b), input_precision=PRECISION))
    tl.store(narrow + i + j, a.to(narrow.dtype.element_ty))


def interpreter() -> dict[str, float]:
    """How far the interpreter is from what the hardware does."""
    torch.manual_seed(2)
    x, y = torch.randn(16, 16), torch.randn(16, 16)
    z, narrow = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    found = {}
    for precision in ("ieee", "tf32", "tf32x3"):
        product[(1,)](x, y, z, narrow, PRECISION=precision)
        found[precision] = float((z - x.double() @ y.double().mT).norm() / z.norm())
    rounded = [((a.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for a in (x, y)]
    product[(1,)](x, y, z, narrow, PRECISION="tf32")
    by_hand = rounded[0].double() @ rounded[1].double().mT
    found["tf32, rounded by hand"] = float((z - by_hand).norm() / z.norm())
    found["cast to bf16"] = float((narrow.float() - x.bfloat16().float()).abs().max())
    found["bias of the cast"] = float(((narrow.float() - x).sign() * x.sign()).mean())
    product[(1,)](x.bfloat16(), y.bfloat16(), z, narrow, PRECISION="tf32")
    found["bf16"] = float((z - x.bfloat16().double() @ y.bfloat16().double().mT).norm() / z.norm())
    return found


def opcheck(op: Any, args: tuple[Any, ...]) -> None:
    """An operator's schema and fake results, and that it writes all that it returns, padding too; raises."""
    torch.use_deterministic_algorithms(True)  # memory that is not written is NaN
    try:
        found = [i for i, x in enumerate(tree_leaves(op(*args))) if x.isnan().any()]
    finally:
        torch.use_deterministic_algorithms(False)
    assert not found, f"{op} does not write all of its results {found}"
    torch.library.opcheck(op, args)


def opchecks() -> None:
    """Of every operator."""
    x = [torch.randn(1, 2, 20, 16) for _ in range(4)]
    g, ops = -torch.rand(1, 2, 20, 1), torch.ops.spcompile
    zeros, kept = torch.zeros(2, 1, 16, 16), torch.zeros(2, 8, 16, 16)
    before, folded = (zeros, None, None, False), (zeros, torch.zeros(2, 1), zeros[:, 0], True)
    opcheck(ops.segment_summaries, (x[0], x[1], g, 0.3, 0, True))
    opcheck(ops.segment_prologue, (*x, g, 0.3, 0, True))
    opcheck(ops.segment_outputs, (*x[:3], g, *folded, x[3], None, 0.3, False, 0, False, False, (), True))
    opcheck(ops.segment_outputs, (*x[:3], g, *before, x[3], kept, 0.3, True, 2, True, False, x[1:], False))
    for less in (None, x[0]):
        opcheck(ops.segment_pairs, (*x, less, g, 0.3, 0, False))
    beta, wrong = torch.rand(1, 2, 20, 1), torch.randn(1, 2, 20, 16)
    opcheck(ops.delta_systems, (x[1], beta, g, False))
    source = (None, x[1], x[2], ops.delta_systems(x[1], beta, g, False), beta, g)
    opcheck(ops.delta_summaries, (*source, 0.3, False))
    opcheck(ops.delta_prologue, (*x, *source[3:], 0.3, False))
    matrices = (zeros, zeros, zeros[:, 0], True)
    opcheck(ops.delta_outputs, (x[0], *source[1:], *matrices, 0.3, False))
    opcheck(ops.delta_corrected, (*source, *matrices, None, 0.3, False))
    opcheck(ops.delta_corrected, (x[0], *source[1:], *before, wrong, 0.3, True))
    g = -torch.rand(1, 2, 20, 16)
    opcheck(ops.diagonal_summaries, (x[0], x[1], g, 0.3, 0, True))
    opcheck(ops.diagonal_prologue, (*x, g, 0.3, 0, True))
    for grad in (None, x[3]):
        opcheck(ops.diagonal_within, (*x[:3], grad, g, 0.3, 0, False))
    scores, folded = torch.zeros(2, 512, 64), (zeros, torch.zeros(2, 1, 16), zeros[:, 0], True)
    opcheck(ops.diagonal_outputs, (*x[:3], g, scores, *before, 0.3, True, 2, True, True))
    for states in (None, kept):
        opcheck(ops.diagonal_columns, (*x[:3], g, *folded, wrong, x[3], states, wrong, 0.3, 0, False))
    opcheck(ops.kda_prepared, (x[0], x[1], g, beta, 0.3, 1, True))
    prepared = ops.kda_prepared(x[0], x[1], g, beta, 0.3, 1, True)
    given, chunks = (*x[1:3], beta, prepared), torch.randn(2, 2, 16, 16)
    opcheck(ops.kda_summaries, (*given, True))
    opcheck(ops.kda_summaries_back, (*given, True))
    for trained in (False, True):
        opcheck(ops.kda_written, (*given, *matrices, True, trained))
    opcheck(ops.kda_corrected, (*given, *matrices, wrong, True))
    both = x[2], x[3], wrong, chunks, chunks
    opcheck(ops.kda_readings, (*x[:2], g, *both, 0.3, 1, True))
    opcheck(ops.kda_gradients, (*x[:2], g, ops.kda_readings(*x[:2], g, *both, 0.3, 1, True), 1, True))


def of_cases(gates: Sequence[str]) -> dict[str, dict[str, float]]:
    """The errors of all cases of some gates."""
    found = {case: errors(case) for case in cases() if gate_of(case) in gates}
    for case in found:
        if case.startswith("fp32"):
            found[case]["totals"] = totals(case)
    return found


def others() -> dict[str, dict[str, float]]:
    """All that is no case."""
    opchecks()
    return {"interpreter": interpreter(), "scan": scans(), "ranks": on_ranks()}


# Each takes a minute or two, and test processes run them side by side. `traffic` is also asked for by
# `python -m bench kernels`.
PARTS: dict[str, Callable[[], dict[str, dict[str, float]]]] = {
    "one decay": lambda: of_cases(GATES),
    "per key": lambda: of_cases(DIAGONAL),
    "delta": lambda: of_cases(DELTA[:3]),
    "kda": lambda: of_cases(KDA),
    "others": others,
    "traffic": traffic,
    "ledger": ledger,
}


def main() -> int:
    triton_interpreter.install()
    launch._LEAST = SEGMENT
    (part,) = sys.argv[1:]
    print("FOUND", json.dumps(PARTS[part]()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
