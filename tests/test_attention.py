"""The softmax attention operators by themselves, opcheck included; linear ones: test_linear_attention.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile.attention import reference
from spcompile.errors import SpcompileError
from spcompile.kernels.softmax import blockwise
from spcompile.kernels.softmax.operands import Operands, Options

spc = torch.ops.spcompile
F64 = torch.float64


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, so an entry that a kernel leaves unwritten shows."""
    mode = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(mode)


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = F64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape in shapes]


def close(got: Tensor, want: Tensor, bound: float = 1e-9) -> None:
    """Equal to ``bound`` relative to the largest entry, or to 1e-6 (operands are of size 1) if that is more.

    A gradient that is zero in truth, as that of scores with one key, has no relative error.
    """
    assert got.shape == want.shape
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    got, want = (torch.where(x == -torch.inf, 0.0, x) for x in (got, want))
    assert got.isfinite().all()
    if want.numel():
        assert (got - want).abs().max() <= bound * want.abs().max().clamp_min(1e-6)


def gradients(function: Any, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


# ---- softmax ----


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keys", [1, 9, 12])
@pytest.mark.parametrize("sizes", [(4, 4), (4, 7), (7, 4)])
def test_softmax_attention(keys: int, sizes: tuple[int, int], causal: bool) -> None:
    kd, vd = sizes
    q, k, v, grad = draw((2, 4, 9, kd), (2, 2, keys, kd), (2, 2, keys, vd), (2, 4, 9, vd))
    got = gradients(lambda *x: spc.softmax_attention(*x, None, causal, 0.3)[0], grad, q, k, v)
    want = gradients(lambda *x: reference.softmax_attention(*x, None, causal, 0.3)[0], grad, q, k, v)
    for x, y in zip(got, want, strict=True):
        close(x, y)
    lse = spc.softmax_attention(q, k, v, None, causal, 0.3)[1]
    close(lse, reference.softmax_attention(q, k, v, None, causal, 0.3)[1])


@pytest.mark.parametrize("shape", [(9, 9), (1, 9), (2, 1, 1, 9), (2, 4, 9, 1), (1, 4, 9, 9), (2, 1, 9, 9)])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("causal", [True, False])
def test_softmax_masks_broadcast(shape: tuple[int, ...], kind: str, causal: bool) -> None:
    q, k, v, grad = draw((2, 4, 9, 4), (2, 2, 9, 4), (2, 2, 9, 4), (2, 4, 9, 4))
    (mask,) = draw(shape)
    mask = mask > -0.5 if kind == "bool" else mask
    got = gradients(lambda *x: spc.softmax_attention(*x, mask, causal, 0.3)[0], grad, q, k, v)
    want = gradients(lambda *x: reference.softmax_attention(*x, mask, causal, 0.3)[0], grad, q, k, v)
    for x, y in zip(got, want, strict=True):
        close(x, y)


@pytest.mark.parametrize("hide", [False, -torch.inf, -1e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_rows_that_see_nothing(hide: Any, dtype: torch.dtype) -> None:
    """As the mathematics of PyTorch's SDPA: 0 for False and -inf, what rounding leaves for large numbers."""
    q, k, v, grad = draw(*[(1, 2, 6, 4)] * 4, dtype=dtype)
    mask = torch.ones(6, 6, dtype=torch.bool) if hide is False else torch.zeros(6, 6, dtype=dtype)
    mask[2] = hide
    mask[4, :3] = hide

    def math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)

    got = gradients(lambda *x: spc.softmax_attention(*x, mask, False, 0.3)[0], grad, q, k, v)
    for x, y in zip(got, gradients(math, grad, q, k, v), strict=True):
        close(x, y, 1e-9 if dtype == F64 else 2e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("first_row", [0, 5])
def test_blockwise_is_the_fused_kernel(
    monkeypatch: pytest.MonkeyPatch, kind: str, causal: bool, first_row: int
) -> None:
    """The fallback of other devices, in blocks of two rows, against the reference on the whole sequence."""
    monkeypatch.setattr(blockwise, "_BUDGET", 2 * 2 * 4 * 14)
    monkeypatch.setattr(blockwise, "_FEW_ROWS", 1)
    q, k, v, grad = draw((2, 4, 14, 4), (2, 2, 14, 4), (2, 2, 14, 5), (2, 4, 14, 5))
    (mask,) = draw((2, 4, 14, 14))
    mask = {"none": None, "bool": mask > -0.5, "float": mask}[kind]
    grad[:, :, :first_row] = 0
    rows = None if mask is None else mask[:, :, first_row:]
    x, options = Operands(q[:, :, first_row:], k, v, rows), Options(causal, 0.3, first_row)
    out, lse = blockwise.forward(x, options)
    got = blockwise.backward(grad[:, :, first_row:], x, options)
    want = gradients(lambda *x: reference.softmax_attention(*x, mask, causal, 0.3)[0], grad, q, k, v)
    close(out, want[0][:, :, first_row:])
    close(lse, reference.softmax_attention(q, k, v, mask, causal, 0.3)[1][:, :, first_row:])
    for x, y in zip(got, (want[1][:, :, first_row:], *want[2:]), strict=True):
        close(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [True, False])
def test_softmax_attention_dtypes(dtype: torch.dtype, masked: bool) -> None:
    q, k, v, grad = draw(*[(1, 2, 50, 8)] * 4, dtype=dtype)
    mask = draw((50, 50), dtype=dtype)[0] if masked else None
    got = gradients(lambda *x: spc.softmax_attention(*x, mask, True, 0.3)[0], grad, q, k, v)
    wide = [x.double() for x in (grad, q, k, v)]
    exact = None if mask is None else mask.double()
    want = gradients(lambda *x: reference.softmax_attention(*x, exact, True, 0.3)[0], *wide)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == dtype
        # The fused kernel rounds probabilities to the input dtype before the product with the values.
        assert (x.double() - y).norm() / y.norm() <= max(2e-6, 2 * torch.finfo(dtype).eps)


# ---- operators ----


def strided(x: Tensor) -> Tensor:
    """The same values as a transposed view of [B, T, H, D], as models make them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", [lambda x: x, strided])
@pytest.mark.parametrize("masked", [True, False])
def test_softmax_opcheck(dtype: torch.dtype, view: Any, masked: bool) -> None:
    q, grad = (view(x) for x in draw(*[(1, 4, 9, 4)] * 2, dtype=dtype))
    k, v = (view(x) for x in draw(*[(1, 2, 9, 4)] * 2, dtype=dtype))
    mask = draw((9, 9))[0] > -0.5 if masked else None
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(spc.softmax_attention, (*leaves, mask, True, 0.3))
    out, lse = spc.softmax_attention(q, k, v, mask, True, 0.3)
    torch.library.opcheck(spc.softmax_attention_backward, (grad, q, k, v, mask, out, lse, True, 0.3))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_operators_under_other_backends(backend: str) -> None:
    q, k, v, grad = draw(*[(1, 2, 9, 4)] * 4)

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        linear = spc.linear_attention(q, k, v, None, None, None, True, 0.3)[0]
        return linear + spc.softmax_attention(q, k, v, None, True, 0.3)[0]

    torch.compiler.reset()
    got = gradients(torch.compile(both, backend=backend, fullgraph=True), grad, q, k, v)
    for x, y in zip(got, gradients(both, grad, q, k, v), strict=True):
        close(x, y)


def test_frozen_inputs_need_no_gradient() -> None:
    q, k, v = draw(*[(1, 2, 9, 4)] * 3)
    q.requires_grad_()
    linear, _ = spc.linear_attention(q, k, v, None, None, None, True, 1.0)
    softmax, _ = spc.softmax_attention(q, k, v, None, True, 1.0)
    (linear + softmax).sum().backward()
    assert q.grad is not None and k.grad is None


def test_a_learned_mask_is_refused() -> None:
    """Its gradient is not computed, and leaving it out in silence would be wrong."""
    q, k, v = draw(*[(1, 2, 9, 4)] * 3)
    with pytest.raises(SpcompileError, match="mask"):
        spc.softmax_attention(q, k, v, torch.zeros(9, 9, dtype=F64, requires_grad=True), True, 1.0)


def test_shapes_that_disagree_are_refused() -> None:
    q, k = draw((1, 2, 9, 4), (1, 2, 8, 4))
    with pytest.raises(ValueError, match=r"linear_attention.*\[1, 2, 9, 4\]"):
        spc.linear_attention(q, k, k, None, None, None, True, 1.0)
    with pytest.raises(ValueError, match="one dtype"):
        spc.softmax_attention(q, k, k.float(), None, True, 1.0)
    with pytest.raises(ValueError, match="key heads"):
        spc.softmax_attention(*draw((1, 3, 9, 4), *[(1, 2, 9, 4)] * 2), None, True, 1.0)
