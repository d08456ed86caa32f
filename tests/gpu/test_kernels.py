"""The Triton kernels and FlexAttention on an NVIDIA GPU: ``python -m pytest tests/gpu``.

Elsewhere this is skipped whole.

The cases of ``tests/test_fused.py``, with the same tolerances, and a model by the backend itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from spcompile.kernels.choice import without_our_kernels

if not torch.cuda.is_available() or without_our_kernels(torch.device("cuda")):
    pytest.skip("needs an NVIDIA GPU and Triton", allow_module_level=True)

import models
from spcompile.kernels.softmax import blockwise, flex, rows
from spcompile.kernels.softmax.operands import Operands, Options
from tests import fused_worker
from tests.test_flex import KINDS, mask_of
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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softmax_that_flash_attention_refuses(dtype: torch.dtype, kind: str, causal: bool) -> None:
    """Rows of the middle of a sequence, by FlexAttention, against blocks of ATen operators in float64.

    Of three lengths, of which the last two have one program; and nothing asks the host to wait.
    """
    for t, s, first in ((300, 600, 200), (260, 520, 260), (384, 640, 256)):
        torch.manual_seed(t)
        q, k, v, grad = (torch.randn(2, h, n, 64, dtype=dtype) for h, n in ((4, t), (2, s), (2, s), (4, t)))
        x = Operands(q, k, v, mask_of(kind, (2, 4, t, s), torch.float32))
        options = Options(causal, 0.1, first)
        if dtype == torch.float32 or x.mask is not None:
            assert rows.name(x, options) == "PyTorch's FlexAttention"

        out, lse = flex.forward(x, options)
        flex.backward(grad, x, out, lse, options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            out, lse = flex.forward(x, options)
            got = [out, lse, *flex.backward(grad, x, out, lse, options)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        exact = Operands(*(y if y is None or y.dtype == torch.bool else y.double() for y in x))
        want = [*blockwise.forward(exact, options), *blockwise.backward(grad.double(), exact, options)]
        far = want[1] < -1e30
        assert torch.equal(far, got[1] < -1e30)
        got[1], want[1] = (torch.where(far, 0.0, y) for y in (got[1], want[1]))
        for a, b in zip(got, want, strict=True):
            bound = 1e-2 if a.dtype == torch.bfloat16 else 1e-5
            assert (a.double() - b).abs().max() < bound * b.abs().max().clamp_min(0.1)


def test_softmax_with_a_mask_in_a_cuda_graph() -> None:
    """What the warm-up compiled is recorded, and plays again with other operands."""
    q, k, v = (torch.randn(1, 2, 256, 64, dtype=torch.bfloat16) for _ in range(3))
    x, options = Operands(q, k, v, torch.rand(256, 256) < 0.5), Options(True, 0.1)
    flex.forward(x, options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flex.forward(x, options)
    q.normal_()
    graph.replay()
    want, wanted = flex.forward(x, options)
    assert torch.equal(out, want) and torch.equal(lse, wanted)


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
