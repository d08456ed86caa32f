"""The fused kernels of linear attention, run on a CPU by Triton's interpreter (``triton_interpreter.py``)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import TypeAlias

import pytest
import torch
from filelock import FileLock
from torch._subclasses.fake_tensor import FakeTensorMode

import spcompile.attention  # noqa: F401  (registers the operators)
from bench.kernels import OF_FLA
from spcompile.config import Config
from spcompile.kernels.choice import without_our_kernels, without_triton
from spcompile.kernels.linear import fused_delta, fused_kda
from spcompile.kernels.linear.kernel import kernel_of
from spcompile.kernels.linear.operands import Operands, Options
from tests import workers
from tests.fused_properties import KINDS as PROPERTIES
from tests.fused_worker import DELTA, DIAGONAL, GATES, KDA, gate_of
from tests.fused_worker import cases as every_case

# What one rounding of each operand leaves; fp32 has three TF32 products, and would show a plain one (1e-3).
TOLERANCE = {"fp32": 1e-6, "bf16": 4e-3, "fp16": 6e-4}
# A delta rule rounds twice on its way: what it reads and what it writes.
TOLERANCE_OF_DELTA = TOLERANCE | {"fp16": 1e-3}


WORKERS = {"properties": ("fused_properties",)}  # part -> what to run; others are parts of the one worker
pytestmark = pytest.mark.timeout(580)


Found: TypeAlias = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """What a part of the worker found; the first test process that asks runs it, for all others too."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    def ask(part: str) -> Found:
        kept = shared / f"{part}.json"
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                try:
                    command = WORKERS.get(part, ("fused_worker", part))
                    text = json.dumps(workers.found(*command, TRITON_INTERPRET="1"))
                except Exception as error:  # told to every test that asks, and not met anew by each
                    text = json.dumps({"failed": str(error)})
                kept.write_text(text)
        given = json.loads(kept.read_text())
        assert "failed" not in given, given["failed"]
        return given

    return ask


@pytest.mark.parametrize("gate", [*GATES, *DIAGONAL, *DELTA])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_results_and_gradients(found: Callable[[str], Found], dtype: str, gate: str) -> None:
    """Of every order and length; operands lie between NaNs and with tokens before heads."""
    delta = gate in DELTA
    part = "kda" if gate in KDA else "delta" if delta else "per key" if gate in DIAGONAL else "one decay"
    mine = [x for x in every_case() if x.startswith(dtype) and gate_of(x) == gate]
    cases = {case: found(part)[case] for case in mine}
    assert len(cases) >= (2 if dtype == "fp32" else 0 if delta else 1), mine
    for case, errors in cases.items():
        assert ("dlog_decay" in errors) == (gate not in ("none", "delta rule"))
        assert ("dbeta" in errors) == delta
        for name, error in errors.items():
            assert error < (TOLERANCE_OF_DELTA if delta else TOLERANCE)[dtype], (case, name, error)


def fake(dtype: torch.dtype, k: int, gate: int | None = None, beta: bool = False) -> Operands:
    """Operands on a GPU that is not there, and an initial state."""
    tokens = 600

    def new(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="cuda")

    more = None if gate is None else new(2, 3, tokens, gate), new(2, 3, tokens, 1) if beta else None
    qkv = (new(2, 3, tokens, size) for size in (k, k, 40))
    return Operands(*qkv, *more, torch.empty(2, 3, k, 40, device="cuda"))


def test_which_kernel_takes_a_call() -> None:
    """Any decay, and heads of up to 256, in up to 32 bits; ATen's chunks take the rest."""
    causal, bf16 = Options(True, 0.3), torch.bfloat16
    largest = "keys of 256 numbers, more than 128"
    with FakeTensorMode():
        fused = [fake(bf16, 64), fake(torch.float16, 256, 1), fake(torch.float32, 24, 1)]
        left = {
            "float64, not bfloat16, float16 or float32": fake(torch.float64, 64),
            "values of 257 numbers, more than 256": fake(bf16, 64)._replace(v=fake(bf16, 257).q),
            largest: fake(torch.float32, 256, 256),
        }
        assert {kernel_of(x, causal).name for x in fused} == {"Triton, segments"}
        assert kernel_of(fake(bf16, 273, 1), causal).name == "Triton, segments, keys in pieces"
        assert kernel_of(fake(bf16, 64, 1, beta=True), causal).name == "Triton, delta rule"
        assert kernel_of(fake(bf16, 256, 1, beta=True), causal)[::3] == ("ATen chunks", largest)
        assert kernel_of(fake(bf16, 256, 256), causal).name == "Triton, decay per key"
        kda = fake(bf16, 64, 64, beta=True)
        assert kernel_of(kda, causal).name == "Triton, delta rule, decay per key"
        assert kernel_of(fake(bf16, 256, 256, beta=True), causal)[::3] == ("ATen chunks", largest)
        for x in (kda, fake(bf16, 64, 1, beta=True), fake(bf16, 64, beta=True)):
            assert kernel_of(x, causal._replace(exclusive=True)).name == "Triton, delta rule, decay per key"
        for why, x in left.items():
            assert kernel_of(x, causal)[::3] == ("ATen chunks", why)
        assert kernel_of(fake(bf16, 64), Options(False, 0.3)).name == "one memory state"


def test_triton_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment; what was compiled with it is not served then."""
    key = Config().key()
    monkeypatch.setenv("SPCOMPILE_TRITON", "0")
    assert Config().key() != key
    with FakeTensorMode():
        kernel = kernel_of(fake(torch.bfloat16, 64), Options(True, 0.3))
        assert kernel[::3] == ("ATen chunks", "SPCOMPILE_TRITON=0")
        assert without_triton(torch.device("cuda")) == "SPCOMPILE_TRITON=0"


def test_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of less shared memory than an A100's: ATen's chunks. Tensor memory (sm_100) holds fewer of float32."""
    card = SimpleNamespace(name="NVIDIA L40S", shared_memory_per_block_optin=99 << 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    too_small = "NVIDIA L40S has 99 KiB of shared memory, and Triton kernels take up to 163"
    assert without_our_kernels(torch.device("cuda")) == too_small
    assert without_triton(torch.device("cuda")) is None  # Inductor's, which knows the card
    card.shared_memory_per_block_optin = 227 << 10
    assert without_our_kernels(torch.device("cuda")) is None
    for module in (fused_delta, fused_kda):
        monkeypatch.setattr(module, "target_of", lambda device: 100)
    with FakeTensorMode():
        for size, gate, most in ((128, 1, 64), (64, 64, 32)):
            name, *_, why = kernel_of(fake(torch.float32, size, gate, beta=True), Options(True, 0.3))[:4]
            assert (name, why) == ("ATen chunks", f"keys of {size} numbers, more than {most}")
            assert not kernel_of(fake(torch.float32, most, min(gate, most), beta=True), Options(True, 0.3))[3]
            assert not kernel_of(
                fake(torch.bfloat16, 128, gate if gate == 1 else 128, beta=True), Options(True, 0.3)
            )[3]


@pytest.mark.parametrize(
    ("size", "gate", "delta"),
    [(64, 1, False), (273, 1, False), (64, 64, False), (64, 1, True), (64, 64, True)],
)
def test_shapes_on_a_gpu(monkeypatch: pytest.MonkeyPatch, size: int, gate: int, delta: bool) -> None:
    """Forward and backward of fake tensors, as a graph for a GPU is traced."""
    # The binding of ``contiguous`` asks for the device before it sees that there is nothing to copy on it.
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x.clone(memory_format=torch.contiguous_format))
    with FakeTensorMode():
        x = fake(torch.bfloat16, size, gate, delta)
        kernel, options = kernel_of(x, Options(True, 0.3)), Options(True, 0.3)
        forward = kernel.forward(x, options)
        forward.local()
        out, final = forward.finish(x.initial_state)
        assert out.shape == x.v.shape and out.dtype == torch.bfloat16
        assert final.shape == (2, 3, size, 40) and final.dtype == torch.float32
        total = [(2, 3, 64, 64) if delta else (2, 3, gate, 1), (2, 3, size, 40)]
        assert [y.shape for y in forward.total()] == total
        backward = kernel.backward(x, options, out, x.initial_state)
        backward.local()
        for of, given in zip(backward.finish(final), x, strict=True):
            assert (of is None) == (given is None)
            assert given is None or (of.shape, of.dtype) == (given.shape, given.dtype)


def test_the_interpreter_rounds_as_hardware_does(found: Callable[[str], Found]) -> None:
    """Else it would prove nothing: Triton's own multiplies bf16's bits, truncates, and has no TF32."""
    errors = found("others")["interpreter"]
    assert max(errors[name] for name in ("ieee", "tf32x3", "bf16", "tf32, rounded by hand")) < 1e-6
    assert 1e-4 < errors["tf32"] < 1e-3
    assert errors["cast to bf16"] == 0.0 and abs(errors["bias of the cast"]) < 0.2


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_every_planted_fault_is_caught() -> None:
    """Six and more for each kernel: five to twenty minutes, as the machine is busy."""
    for fault, error in workers.found("planted_faults", timeout=3550, TRITON_INTERPRET="1").items():
        assert error > 10 * TOLERANCE["fp32"], fault


@pytest.mark.parametrize("kind", PROPERTIES)
def test_properties(found: Callable[[str], Found], kind: str) -> None:
    """To the bit: two runs, and earlier outputs whatever comes later. Segments agree; nothing but the results
    is written, and all of these."""
    properties = found("properties")[kind]
    assert properties.keys() == {"two runs", "later tokens", "two segments", "four segments", "written"}
    for name, error in properties.items():
        assert error < (1e-6 if "segments" in name else 1e-300), name


def test_scans(found: Callable[[str], Found]) -> None:
    """Sums, factors of every shape, matrices; both ways."""
    scans = found("others")["scan"]
    assert len(scans) == 36
    for case, error in scans.items():
        assert error < (1e-14 if "float64" in case else 1e-6), case


def test_on_ranks(found: Callable[[str], Found]) -> None:
    """The sharded operator is the same over these kernels; the summaries of eight variants cross."""
    ranks = found("others")["ranks"]
    assert len(ranks) == 16
    for case, error in ranks.items():
        assert error < 1e-6, case


# Where ours are not below three quarters of theirs.
ABOVE = {
    "backward, 64, decay": 0.8,
    "backward, 64, decay per key": 0.9,
    "forward, 64, delta rule, decay": 0.9,
    "backward, 64, delta rule, decay": 1.55,
    "forward, 128, delta rule, decay": 1.0,
    "backward, 128, delta rule, decay": 1.6,
    "backward, 64, delta rule, decay per key": 0.9,
    "backward, 128, delta rule, decay per key": 0.9,
}


# Launches of one rank, forward and backward, with heads so few that they are cut into segments; operand bytes
# per token and head (of heads of 128) at most; and what was asked for where that is less.
LEDGER = {
    "no decay": ((2, 4), (1700, 4420), (None, 3700)),
    "decay": ((2, 4), (1700, 6000), (None, 3700)),
    "decay per key": ((3, 5), (3500, 13130), (None, 8000)),
    "delta rule, decay": ((3, 8), (2500, 11950), (None, 7000)),
    "delta rule, decay per key": ((3, 7), (4650, 17170), (None, 11000)),
}


# Launches that are for summaries alone, where that is not one: pairs share it, or either way has its own.
SUMMARIES = {("backward", "decay"): 0, ("backward", "delta rule, decay per key"): 2}


def test_ledger(found: Callable[[str], Found]) -> None:
    """What is launched, with how many bytes of operands, and by how many programs."""
    ledger = found("ledger")
    for case, count in ledger["launches"].items():
        way, heads, kind = case.split(", ", 2)
        launches, operands, _ = (of[way == "backward"] for of in LEDGER[kind])
        # Where heads are programs enough nothing is cut, and no summaries are made.
        assert count == launches - (SUMMARIES.get((way, kind), 1) if heads == "128 heads" else 0), case
        assert ledger["operands"][case] <= operands, case
        assert ledger["programs"][case] >= 132, case


@pytest.mark.sweep
def test_bytes_moved(found: Callable[[str], Found]) -> None:
    """Less than three quarters of flash-linear-attention's, but for what ``ABOVE`` names."""
    moved = found("traffic")["bytes"]
    assert moved.keys() == OF_FLA.keys()
    for case, size in moved.items():
        print(f"{case}: {size:.0f} bytes, {size / OF_FLA[case][0]:.2f} of flash-linear-attention's")
        assert size < OF_FLA[case][0] * ABOVE.get(case, 0.75), case
