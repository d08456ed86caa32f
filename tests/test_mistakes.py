"""Each mistake of tests/mistakes.py is answered by an error of ours that says what to do."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from spcompile import hints
from spcompile.backend import spcompile as backend
from spcompile.config import Config
from spcompile.inductor import patches
from spcompile.simulate import simulated
from tests.mistakes import MISTAKES, Broken, Mistake, answer


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name)
def test_an_error_says_what_to_do(mistake: Mistake) -> None:
    text = answer(mistake)
    for words in mistake.says:
        assert words in text, text


def test_what_follows_a_graph_break_needs_no_such_argument() -> None:
    model, x = Broken().double(), torch.randn(2, 7, 4, dtype=torch.float64)
    found = torch.compile(model, backend=simulated(3, sequence_dims={"features": -2, "mask": 1}))(x)
    torch.testing.assert_close(found, model(x))
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="no argument 'feature'"):
        torch.compile(model, backend=simulated(3, sequence_dims={"feature": 1}))(x)


def test_one_token_after_many_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints, "_LONG", set())
    compiled = torch.compile(Broken().double(), backend=simulated(2, sequence_dims={"features": 1}))
    for length in (5, 1):
        x = torch.randn(2, length, 4, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), compiled._orig_mod(x))


def test_modes_and_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []

    def compile_fx(gm: torch.fx.GraphModule, inputs: object, config_patches: dict[str, object]) -> object:
        given.append(config_patches)
        # The backend gives the graph Dynamo's order back; what is compiled has the canonical one.
        return torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))

    monkeypatch.setattr("spcompile._torch.compile_fx", compile_fx)
    for arguments in (
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"mode": "max-autotune-no-cudagraphs", "inductor": {"coordinate-descent-tuning": False}}},
    ):
        torch._dynamo.reset()
        torch.compile(torch.nn.Linear(2, 2), backend=backend, **arguments)(torch.ones(1, 2))
    assert all(g["max_autotune"] and g["joint_custom_pre_pass"] is not None for g in given)
    assert given[0]["coordinate_descent_tuning"] and not given[-1]["coordinate_descent_tuning"]


def test_the_key_follows_the_options_and_not_their_order() -> None:
    one, two = (
        {"max_autotune": True, "epilogue_fusion": False},
        {"epilogue_fusion": False, "max_autotune": True},
    )
    assert Config.of({"inductor": one}).key() == Config.of({"inductor": two}).key() != Config().key()
    assert Config.of({"mode": "max-autotune"}).key() != Config().key()
    assert patches("default", {}) == patches(None, {}) == {}


def test_every_option_is_in_the_readme() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    for option in dataclasses.fields(Config):
        assert f"| `{option.name}` |" in text, f"README's table of options lacks {option.name}"
