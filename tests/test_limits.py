"""Dynamo's recompile limit: said, or an error; and what inference compiles is not taken from training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spcompile import SpcompileError, _torch
from spcompile.limits import Unsharded
from spcompile.simulate import simulated

LIMIT = 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).tanh()).log_softmax(-1).mean()


@pytest.fixture(autouse=True)
def few_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    with _torch.dynamo_config.patch(recompile_limit=LIMIT):
        yield
    torch._dynamo.reset()


def compiled(**options: Any) -> Callable[[int], Tensor]:
    run = torch.compile(Model(), backend=simulated(2, **options), dynamic=False)
    return lambda tokens: run(torch.arange(tokens).reshape(1, -1) % 11)


def warned(run: Callable[[int], Tensor], tokens: int) -> list[Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tokens)
    return [w.message for w in caught if w.category is Unsharded]


def test_what_is_not_sharded_is_said_once() -> None:
    run = compiled()
    assert not any(warned(run, tokens) for tokens in (4, 5))
    (message,) = warned(run, 6)
    text = str(message)
    assert "recompile_limit" in text and "2 graphs" in text and "test_limits.py" in text and "Remedy" in text
    assert not warned(run, 7)


def test_an_option_makes_it_an_error_at_every_call() -> None:
    run = compiled(on_limit="error")
    for tokens in (4, 5):
        run(tokens)
    for tokens in (6, 7, 6):
        with pytest.raises(SpcompileError, match="recompile_limit"):
            run(tokens)
    run(5)  # what is compiled still runs


def test_inference_leaves_training_its_graphs() -> None:
    run, seen = compiled(), []
    with torch.no_grad():
        for tokens in range(4, 10):
            seen += warned(run, tokens)
    assert len(seen) == 1 and "inference" in str(seen[0])
    before = _torch.counters["stats"]["unique_graphs"]
    for tokens in range(20, 20 + LIMIT):
        assert not warned(run, tokens)
    assert _torch.counters["stats"]["unique_graphs"] == before + LIMIT
    assert len(warned(run, 30)) == 1


def test_calls_that_were_not_compiled_do_not_count() -> None:
    run = compiled()
    with _torch.dynamo_config.patch(accumulated_recompile_limit=6):
        with torch.no_grad():
            for tokens in range(4, 14):
                warned(run, tokens)
        assert not warned(run, 20)


def test_another_backend_is_left_alone() -> None:
    run = torch.compile(Model(), backend="eager", dynamic=False)
    assert not any(warned(lambda t: run(torch.arange(t)), tokens) for tokens in range(4, 8))


def test_a_failure_that_dynamo_takes_for_a_graph_break_is_said(monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise _torch.fallbacks[0](torch.ops.aten._local_scalar_dense.default)

    monkeypatch.setattr("spcompile.simulate.shard_joint_graph", fail)
    (message,) = warned(compiled(), 3)
    assert "runs it eagerly" in str(message) and "test_limits.py" in str(message)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="runs it eagerly"):
        compiled(on_limit="error")(3)
