"""The benchmark of kernels, where there is no GPU: what it measures, and that a wrong answer is not timed."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux alone")

from bench import device, growth, kernels, output, variants
from bench.kernels import OF_FLA, Step
from bench.options import Options
from bench.registry import BENCHMARKS
from spcompile.attention.variants import VARIANTS
from tests.fused_worker import COUNTED, HEADS


def options(said: list[str], static: bool = False) -> Options:
    return Options(True, 1024, 1, 0.0, 0, "spcompile", said.append, static)


@pytest.mark.parametrize("call", device.plan(options([])), ids=str)
def test_calls_are_checked_and_timed(call: device.Call) -> None:
    """On the CPU and of small sizes: what is not seen here is the GPU's clock."""
    small = call._replace(tokens=100, size=16, heads=2) if call.size else call._replace(tokens=64)
    row = device.measure(small, options([]), "cpu")
    assert row["forward ms"] > 0 and "note" not in row
    assert ("both ms" in row) == ("error" in row) == bool(call.size)


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = device._ours

    def wrong(q: torch.Tensor, *others: Any) -> torch.Tensor:
        return right(q, *others) * (1.01 if q.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(device, "_ours", wrong)
    row = device.measure(device.Call("decay", 16, 2, 100), options([]), "cpu")
    assert row["note"].startswith("WRONG") and row["error"] > 5e-3 and "forward ms" not in row


def test_without_a_gpu_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is said; a kernel that does not compile is a row that says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said: list[str] = []
    static = BENCHMARKS["kernels"]
    steps = static.plan(options(said))
    assert "no GPU here" in said[0] and steps == static.plan(options([], static=True))
    assert [x for x in steps if isinstance(x, str)] == list(OF_FLA)
    made = static.measure(Step("pairs", 64, "bfloat16", 90), options(said))
    assert made["registers"] and made["blocks"] and made["wide"] and made["stack"] == 0
    failed = static.measure(Step("pairs", 64, "float64", 90), options(said))
    assert failed["note"].startswith("failed") and "float64" in said[-1]
    (table,) = static.tables([made, failed])
    assert table[1][0] == "kernel" and len(table[2]) == 2


def test_every_count_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names that the worker gives them: it takes minutes, and is asked last."""
    ways = ("forward", "backward")
    moved = {f"{way}, {size}, {kind}": 1.0 for way in ways for size in (64, 128) for kind in COUNTED}
    once = {f"{way}, {name}, {kind}": 2.0 for way in ways for name in HEADS for kind in COUNTED}
    found = {"bytes": moved, "launches": once, "operands": once, "programs": once}
    monkeypatch.setattr(kernels, "_traffic", lambda: found)
    rows = [BENCHMARKS["kernels"].measure(case, options([])) for case in OF_FLA]
    assert all(row["bytes"] == 1 for row in rows)
    assert [row["launches"] for row in rows if row["heads of"] == "128"] == [2] * 10
    (table,) = BENCHMARKS["kernels"].tables(rows)
    assert len(table[2]) == len(OF_FLA)


def test_an_earlier_checkout_is_measured_beside_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two ranks, each in its own folder, and the table says how much faster this one is."""
    asked: list[Any] = []

    def launch(*work: Any, folder: str | None = None, **_: Any) -> list[dict[str, Any]]:
        asked.append((work[1]["ranks"], folder))
        seconds = 2.0 if folder else 1.0
        return [{"seconds": seconds, "step": 0.1, "error": 0.0, "first": 3.0, "bytes": 1, "repeats": 1}] * 2

    monkeypatch.setattr(growth, "launch", launch)
    monkeypatch.setattr(variants, "launch", launch)
    chosen = Options(True, 1024, 1, 0.0, 0, "spcompile", print, before="earlier")
    layer = BENCHMARKS["layer"]
    rows = [layer.measure(step, chosen) for step in layer.plan(chosen)]
    assert asked == [(2, "earlier")] * 2 + [(2, None)] * 2
    (_, heads, body), _ = layer.tables(rows)
    assert [row[heads.index("faster")] for row in body] == ["", "2.0x"]
    assert len(layer.plots(rows)[0][2]) == 2
    assert output.commit(os.devnull) == "null"  # what is no checkout keeps its name

    asked.clear()
    plan = BENCHMARKS["variants"].plan(chosen)
    for step in plan:
        BENCHMARKS["variants"].measure(step, chosen)
    assert asked == [(1, None), *[(2, "earlier"), (2, None)] * len(VARIANTS)]
