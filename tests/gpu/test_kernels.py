"""The Triton kernels on an NVIDIA GPU: ``python -m pytest tests/gpu``. Elsewhere this is skipped whole.

The cases of ``tests/test_fused.py``, with the same tolerances, and a model by the backend itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from spcompile.kernels.choice import without_triton

if not torch.cuda.is_available() or without_triton(torch.device("cuda")):
    pytest.skip("needs an NVIDIA GPU and Triton", allow_module_level=True)

import models
from tests import fused_worker
from tests.test_fused import TOLERANCE, TOLERANCE_OF_DELTA


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(before)


@pytest.mark.parametrize("case", fused_worker.cases())
def test_results_and_gradients(case: str) -> None:
    dtype = case.split(", ")[0]
    tolerance = (TOLERANCE_OF_DELTA if "delta rule" in case else TOLERANCE)[dtype]
    for name, error in fused_worker.errors(case).items():
        assert error < tolerance, name


def test_scans() -> None:
    for case, error in fused_worker.scans().items():
        assert error < (1e-6 if "float32" in case else 1e-14), case


@pytest.mark.parametrize(
    "name", ["linear_llama3:tiny", "retention:tiny", "gla:tiny", "gated_deltanet:tiny", "kda:tiny"]
)
def test_a_model_trains_as_eager(name: str) -> None:
    """In float32 beside eager in float64, through Inductor."""
    net = models.get(name)().cuda()
    inputs = {key: x.cuda() for key, x in net.example_inputs(130).items()}
    wide = models.get(name)().cuda().double()
    wide.load_state_dict(net.state_dict())
    compiled = torch.compile(net, backend="spcompile")
    losses = []
    for call in (compiled, wide):
        out = call(**inputs)
        loss = out if isinstance(out, torch.Tensor) else out[0]
        loss.backward()
        losses.append(loss.double())
    assert (losses[0] - losses[1]).abs() < 1e-5 * losses[1].abs()
    for (key, a), b in zip(net.named_parameters(), wide.parameters(), strict=True):
        assert (a.grad.double() - b.grad).norm() <= 1e-4 * b.grad.norm().clamp_min(1e-6), key
