"""All that training steps leave behind is eager's: buffers, parameters and written arguments too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from spcompile import _torch, simulate
from spcompile.passes import recognize
from spcompile.passes.shadow import build as shadow_build
from spcompile.passes.shard.localize import Localizer
from spcompile.simulate import simulated
from tests import left_samples
from tests.left_samples import SAMPLES, batch, steps
from tests.proof import relative_error


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative error of all that is left."""
    assert found.keys() == expected.keys()
    numbers = {n: x for n, x in expected.items() if x.numel()}
    return max(relative_error(found[n].double(), x.double(), 1e-6) for n, x in numbers.items())


@pytest.mark.parametrize("name", SAMPLES)
def test_steps_leave_what_eager_leaves(name: str) -> None:
    assert worst(steps(name, simulated(3)), steps(name)) <= 1e-9


@pytest.mark.parametrize("kind", left_samples.OPTIMIZERS)
def test_a_compiled_optimizer_steps_and_sends_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It has no sequence: every rank does the whole step."""
    texts: list[str] = []
    shard = simulate.shard_joint_graph

    def keep(graph: Any, *args: Any) -> Any:
        result = shard(graph, *args)
        texts.append(str(graph))
        return result

    monkeypatch.setattr(simulate, "shard_joint_graph", keep)
    found = left_samples.optimizer_steps(kind, simulated(3))
    assert worst(found, left_samples.optimizer_steps(kind)) <= 1e-9
    assert texts and all("copy_" in t and "_c10d" not in t for t in texts)


def test_a_number_that_changes_compiles_twice() -> None:
    compiles: list[int] = []
    found = steps("numbers", simulated(3), compiles)
    assert len(compiles) == 2 and worst(found, steps("numbers", None, [])) <= 1e-9


def test_verify_misses_a_write_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is planted: the last write of the local graph is taken out again."""
    write = Localizer._write

    def broken(self: Localizer) -> None:
        write(self)
        lost = self.last_writes[-1].meta["spcompile_copy"]
        self.emitter.emitted.remove(lost)
        self.graph.erase_node(lost)

    monkeypatch.setattr(Localizer, "_write", broken)
    with pytest.raises(Exception, match=r"copy_.* on primals_\d+ is not there as often as it was"):
        steps("counter", simulated(2))


@pytest.mark.parametrize(
    ("place", "name"), [("linear", "recognize"), ("softmax", "match"), ("loops", "recognize")]
)
def test_a_failure_inside_recognition_leaves_the_graph_as_it_was(
    monkeypatch: pytest.MonkeyPatch, place: str, name: str
) -> None:
    """Also after edits were made: linear attention is looked for when softmax attention is rewritten."""
    texts: list[list[str]] = []

    def broken(*args: Any) -> Any:
        raise RuntimeError("planted")

    def backend(gm: Any, inputs: Any) -> Any:
        before = str(gm.graph)
        sites = recognize.recognize(gm)
        texts.append([before, str(gm.graph), *(s.reason for s in sites if not s.rewritten)])
        return gm

    monkeypatch.setattr(getattr(recognize, place), name, broken)
    torch._dynamo.reset()
    torch.compile(left_samples.model("counter"), backend=backend)(batch())
    ((before, after, reason),) = texts
    assert before == after and "scaled_dot_product" in after
    assert "recognition failed" in reason and "RuntimeError: planted" in reason


def test_a_failed_shadow_leaves_no_state_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a level of functorch, nor autocast, nor another grad mode."""

    def body(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            y = x @ x
            return y.sin() + 1

    absorb = shadow_build.Builder.absorb

    def broken(self: Any, aten: Any, node: Any) -> None:
        assert "sin" not in str(aten.target), "planted"
        absorb(self, aten, node)

    states: list[tuple[Any, ...]] = []

    def state() -> tuple[Any, ...]:
        return _torch.transform_depth(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()

    def backend(gm: Any, inputs: Any) -> Any:
        before = state()
        (site,) = recognize.recognize(gm)
        states.append((before, state(), site.reason))
        return gm

    monkeypatch.setattr(shadow_build.Builder, "absorb", broken)
    torch._dynamo.reset()
    torch.compile(body, backend=backend)(torch.ones(3, 3))
    ((before, after, reason),) = states
    assert before == after and "planted" in reason
