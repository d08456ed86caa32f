"""Library calls: each row of the table computes what the library's function computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from spcompile.library.registry import substitute
from spcompile.library.table import TABLE
from tests.library_samples import SAMPLES, Sample
from tests.third_party import fla_naive, load, transformers_function

# The functions compute in float32, and sum in another order.
TOLERANCE = 2e-5


def own(path: str) -> Any:
    """The library's function."""
    module, name = TABLE[path].module, TABLE[path].name
    if module.startswith("transformers."):
        return transformers_function(module.split(".")[2], name)
    if module.startswith("fla."):
        return fla_naive("/".join(module.split(".")[2:]), name)
    return getattr(load(module), name)


def run(function: Any, sample: Sample) -> tuple[list[Any], Any, dict[str, Tensor]]:
    """The outputs with their structure, and the gradients of a fixed combination of them."""
    leaves = {n: x.clone().requires_grad_() for n, x in sample.tensors.items()}
    flat, structure = tree_flatten(function(**leaves, **sample.rest))
    outs = [x for x in flat if isinstance(x, Tensor) and x.requires_grad]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outs]
    grads = torch.autograd.grad(outs, list(leaves.values()), weights)
    return flat, structure, dict(zip(leaves, grads, strict=True))


def layout(x: Tensor) -> list[int]:
    """The dims from the outermost to the innermost, of those that have a stride that matters."""
    return sorted((d for d in range(x.dim()) if x.shape[d] > 1), key=lambda d: -x.stride(d))


def refuses(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError(f"fell back for {sorted(kwargs)}")


@pytest.mark.parametrize("path", TABLE)
def test_a_row_computes_what_the_library_does(path: str) -> None:
    assert path in SAMPLES, f"{path} has no sample in tests/library_samples.py"
    for sample in SAMPLES[path]():
        found = run(substitute(TABLE[path], refuses), sample)
        expected = run(sample.reference or own(path), sample)
        assert found[1] == expected[1], (found[1], expected[1])
        outs = [(a, b) for a, b in zip(found[0], expected[0]) if isinstance(b, Tensor)]
        for a, b in [*outs, *((found[2][n], g) for n, g in expected[2].items())]:
            assert a.dtype == b.dtype and a.shape == b.shape
            scale = max(1.0, float(b.detach().abs().max()))
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * scale)
        if sample.reference is None:
            assert [layout(a) for a, _ in outs] == [layout(b) for _, b in outs]


# The memory states are float32 in the operator; some references keep theirs in bfloat16.
NARROW = {"float64": TOLERANCE, "bfloat16": 3e-2, "autocast": 3e-2}


@pytest.mark.parametrize("kind", NARROW)
def test_dtypes_are_those_of_the_library(kind: str) -> None:
    """Functions that cast to float32 do so here, those that give their input's dtype back do that, and a
    product of matrices has autocast's dtype."""
    dtype = torch.float32 if kind == "autocast" else getattr(torch, kind)
    compared = 0
    for path, row in TABLE.items():
        for sample in SAMPLES[path]():
            given = {n: x.to(dtype) for n, x in sample.tensors.items()} | sample.rest
            if sample.reference is not None:
                continue
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                try:
                    expected = tree_flatten(own(path)(**given))[0]
                except RuntimeError:
                    continue  # some references mix dtypes, which only float32 allows
                found = tree_flatten(substitute(row, refuses)(**given))[0]
            for a, b in zip(found, expected, strict=True):
                if isinstance(b, Tensor):
                    assert a.dtype == b.dtype, path
                    scale = max(1.0, float(b.detach().abs().max()))
                    error = float((a - b).detach().abs().max()) / scale
                    assert error <= NARROW[kind], (path, error)
            compared += 1
    assert compared > 30
