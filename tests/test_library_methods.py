"""A module's forward as a library call: its class has a method that is another one in Dynamo alone."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spcompile import library
from spcompile.library import registry
from spcompile.library.row import digest
from spcompile.library.table import TABLE
from tests.test_library_calls import targets
from tests.third_party import transformers_module

PATH = "transformers.models.minimax.modeling_minimax.MiniMaxLightningAttention.forward"


class Cache:
    """The state of each layer, as transformers keeps it."""

    def __init__(self, state: Tensor | None) -> None:
        self.state = state

    def get_linear_cache(self, layer: int) -> Tensor | None:
        return self.state

    def set_linear_cache(self, layer: int, state: Tensor) -> None:
        self.state = state


def layer(length: int = 20) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers_module("minimax", "configuration").MiniMaxConfig(
        hidden_size=16, num_attention_heads=4, head_dim=4, num_hidden_layers=4, block_size=8
    )
    torch.manual_seed(0)
    module = transformers_module("minimax").MiniMaxLightningAttention(config, 1)
    library.register()
    inputs = {"position_embeddings": None, "attention_mask": None}
    return module, {"hidden_states": torch.randn(2, length, 16), **inputs}


def compiled(function: Any, inputs: dict[str, Any]) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=True)(**inputs)[0]


def test_the_graph_does_not_grow() -> None:
    found = [targets(*layer(length)) for length in (16, 256)]
    assert found[0] == found[1]
    assert sum("affine_scan" in t for t in found[0]) == 1


def test_outside_dynamo_it_is_the_library_s() -> None:
    module, inputs = layer()
    own = type(module).forward.__wrapped__
    assert digest(own) in TABLE[PATH].sources
    expected = own(module, **inputs)
    for found, wanted in zip(module(**inputs), expected, strict=True):
        assert torch.equal(found, wanted)
    torch.testing.assert_close(compiled(module, inputs), expected[0])


@pytest.mark.parametrize("first", [False, True], ids=["wrapped after", "wrapped before"])
@pytest.mark.filterwarnings("ignore::spcompile.library.UnknownVersion")
def test_what_a_user_wraps_around_it_is_traced(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with the library's own parameters, and before it is looked at: it is another method."""
    module, inputs = layer()
    own = type(module).forward.__wrapped__ if first else type(module).forward

    @functools.wraps(own)
    def twice(
        self: Any,
        hidden_states: Any,
        position_embeddings: Any,
        attention_mask: Any,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        out, state = own(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        return 2 * out, state

    expected = 2 * module(**inputs)[0]
    monkeypatch.setattr(type(module), "forward", twice)
    monkeypatch.setattr(registry, "_KNOWN", [])  # this status is not for other tests to see
    library.register()
    torch.testing.assert_close(compiled(module, inputs), expected)


@pytest.mark.parametrize("filled", [False, True])
def test_a_cache(filled: bool) -> None:
    """An empty one gets the state; one that holds a state continues, in the library's own code."""
    module, inputs = layer(5)
    state = torch.randn(2, 4, 4, 4) if filled else None
    eager, ours = Cache(state), Cache(state)
    expected = module(**inputs, past_key_values=eager)[0]
    found = compiled(module, {**inputs, "past_key_values": ours})
    torch.testing.assert_close(found, expected)
    assert eager.state is not None and ours.state is not None
    torch.testing.assert_close(ours.state, eager.state)


def test_other_code_is_reported_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same parameters, but it computes something else."""
    row = TABLE[PATH]
    module: Any = types.ModuleType(row.module)
    method = f"def forward({row.signature}):\n        return hidden_states"
    exec(f"class MiniMaxLightningAttention:\n    {method}", vars(module))
    monkeypatch.setattr(registry, "_KNOWN", [])  # this status is not for other tests to see
    monkeypatch.setitem(sys.modules, row.module, module)
    own = module.MiniMaxLightningAttention.forward
    with pytest.warns(library.UnknownVersion, match="its code is not that of a version"):
        library.register()
    assert module.MiniMaxLightningAttention.forward is own
