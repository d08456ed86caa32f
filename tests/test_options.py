"""Bad input gets an error that names what and where, before any collective starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spcompile import SpcompileError
from spcompile.backend import ForcedGather, tell_gathers
from spcompile.config import Config
from spcompile.groups import sequence_group
from spcompile.passes.shard.localize import GatherNote
from spcompile.simulate import simulated


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sofmax": "ring"}, "did you mean 'softmax'"),
        ({"nonsense": 1}, "has no option 'nonsense'"),
        ({"linear": "carrier-pigeon"}, "must be one of 'auto', 'allgather'"),
        ({"on_gather": "shout"}, "must be one of 'warn', 'error', 'ignore'"),
        ({"ranks": 0}, "at least 1"),
    ],
)
def test_unknown_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SpcompileError, match=says):
        Config.of(options)


def test_an_unknown_option_reaches_the_user_of_torch_compile() -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="spcompile", options={"sofmax": "ring"})
    with pytest.raises(Exception, match="did you mean 'softmax'"):
        compiled(torch.ones(1, 2))


def test_ranks_that_are_not_there_cannot_train() -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="spcompile", options={"ranks": 64})
    with pytest.raises(Exception, match="explain"):
        compiled(torch.ones(1, 2))


def test_a_job_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SpcompileError, match="init_process_group"):
        sequence_group(Config())


class _NoRule(nn.Module):
    """An operator that no rule covers, on something sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids).median(1).values.sum()


def test_an_operator_without_a_rule_is_computed_whole_and_is_right() -> None:
    torch.manual_seed(0)
    model, ids = _NoRule().double(), torch.randint(0, 11, (2, 9))
    expected = model(ids)
    expected.backward()
    gradient = model.embedding.weight.grad
    model.zero_grad()
    found = torch.compile(model, backend=simulated(2))(ids)
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.embedding.weight.grad, gradient)


def test_a_forced_gather_warns_or_raises_with_the_users_line() -> None:
    note = GatherNote("median", "aten.median.dim", "no rule", 4096, "model.py:7 in forward: x.median(1)")
    with pytest.warns(ForcedGather, match=r"aten.median.dim.*4,096 bytes gathered; model.py:7"):
        tell_gathers([note], Config())
    with pytest.raises(SpcompileError, match=r"(?s)aten.median.dim.*model.py:7.*Remedy"):
        tell_gathers([note], Config(on_gather="error"))
    tell_gathers([note], Config(on_gather="ignore"))


def test_a_hint_names_the_sequence() -> None:
    """Without token ids and attention nothing tells the axis; the hint does, by the argument's name."""

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, features: Tensor) -> Tensor:
            return self.down(self.up(features).relu()).square().mean()

    model, x = Mlp().double(), torch.randn(2, 7, 4, dtype=torch.float64)
    found = torch.compile(model, backend=simulated(3, sequence_dims={"features": 1}, nan_padding=True))(x)
    torch.testing.assert_close(found, model(x))
