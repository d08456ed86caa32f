"""The attention operators by themselves, opcheck included, and the algebra of states."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spcompile.attention import ALGEBRAS, reference
from spcompile.attention.algebra import StateAlgebra, Summary, fold, pack, summary_shapes, unpack
from spcompile.errors import SpcompileError
from spcompile.kernels.linear import chunked
from spcompile.kernels.softmax import blockwise

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


# ---- linear ----


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [0, 1, 7, 63, 64, 65, 500, 1100])
def test_linear_attention(length: int, causal: bool) -> None:
    """1100 tokens are 18 chunks: more than one group of the two-level sum."""
    q, k, v, grad = draw(*[(1, 2, length, 4)] * 2, *[(1, 2, length, 5)] * 2)
    got = gradients(lambda *x: spc.linear_attention(*x, causal, 0.3), grad, q, k, v)
    if length == 0:
        assert got[0].shape == v.shape
        return
    want = gradients(lambda *x: reference.linear_attention(*x, causal, 0.3), grad, q, k, v)
    for x, y in zip(got, want, strict=True):
        close(x, y)


def test_wide_heads_have_longer_chunks() -> None:
    q, k, v, grad = draw(*[(1, 1, 300, 256)] * 4)
    assert chunked.forward_start(q, k, v)[0].k.shape == (1, 3, 128, 256)
    got = gradients(lambda *x: spc.linear_attention(*x, True, 0.3), grad, q, k, v)
    want = gradients(lambda q, k, v: (q @ k.mT * 0.3).tril() @ v, grad, q, k, v)
    for x, y in zip(got, want, strict=True):
        close(x, y)


@pytest.mark.parametrize("causal", [True, False])
def test_linear_attention_is_the_quadratic_form(causal: bool) -> None:
    """What users write: scores times a mask times values."""
    q, k, v, grad = draw(*[(2, 2, 70, 4)] * 4)

    def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * 0.3
        return (scores.tril() if causal else scores) @ v

    got = gradients(lambda *x: spc.linear_attention(*x, causal, 0.3), grad, q, k, v)
    for x, y in zip(got, gradients(quadratic, grad, q, k, v), strict=True):
        close(x, y)


@pytest.mark.parametrize("chunks", [1, 2, 16, 17, 33, 300])
@pytest.mark.parametrize("reverse", [True, False])
def test_exclusive_sum(chunks: int, reverse: bool) -> None:
    (states,) = draw((2, chunks, 3, 4))
    order = states.flip(1) if reverse else states
    want = order.cumsum(1) - order
    close(chunked.exclusive_sum(states, reverse), want.flip(1) if reverse else want)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_attention_dtypes(dtype: torch.dtype, causal: bool) -> None:
    """RMS error against float64 on the same inputs: sums are float32, only the results are rounded."""
    q, k, v, grad = draw(*[(1, 2, 200, 8)] * 4, dtype=dtype)
    got = gradients(lambda *x: spc.linear_attention(*x, causal, 0.01), grad, q, k, v)
    wide = [x.double() for x in (grad, q, k, v)]
    want = gradients(lambda *x: reference.linear_attention(*x, causal, 0.01), *wide)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == dtype
        assert (x.double() - y).norm() / y.norm() <= max(1e-6, torch.finfo(dtype).eps)


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
    q, k, v, grad = draw((2, 4, 14, 4), (2, 2, 14, 4), (2, 2, 14, 5), (2, 4, 14, 5))
    (mask,) = draw((2, 4, 14, 14))
    mask = {"none": None, "bool": mask > -0.5, "float": mask}[kind]
    grad[:, :, :first_row] = 0
    rows = None if mask is None else mask[:, :, first_row:]
    out, lse = blockwise.forward(q[:, :, first_row:], k, v, rows, causal, 0.3, first_row)
    got = blockwise.backward(grad[:, :, first_row:], q[:, :, first_row:], k, v, rows, causal, 0.3, first_row)
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
@pytest.mark.parametrize("causal", [True, False])
def test_linear_opcheck(dtype: torch.dtype, view: Any, causal: bool) -> None:
    """Schema, autograd registration, and strides and dtypes of the fake; torch's own check."""
    q, k, v, grad = (view(x) for x in draw(*[(1, 2, 9, 4)] * 4, dtype=dtype))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(spc.linear_attention, (*leaves, causal, 0.3))
    torch.library.opcheck(spc.linear_attention_backward, (grad, q, k, v, causal, 0.3))


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
        return spc.linear_attention(q, k, v, True, 0.3) + spc.softmax_attention(q, k, v, None, True, 0.3)[0]

    torch.compiler.reset()
    got = gradients(torch.compile(both, backend=backend, fullgraph=True), grad, q, k, v)
    for x, y in zip(got, gradients(both, grad, q, k, v), strict=True):
        close(x, y)


def test_frozen_inputs_need_no_gradient() -> None:
    q, k, v = draw(*[(1, 2, 9, 4)] * 3)
    q.requires_grad_()
    linear = spc.linear_attention(q, k, v, True, 1.0)
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
        spc.linear_attention(q, k, k, True, 1.0)
    with pytest.raises(ValueError, match="one dtype"):
        spc.softmax_attention(q, k, k.float(), None, True, 1.0)
    with pytest.raises(ValueError, match="key heads"):
        spc.softmax_attention(*draw((1, 3, 9, 4), *[(1, 2, 9, 4)] * 2), None, True, 1.0)


# ---- algebra ----


def summaries(algebra: StateAlgebra, count: int, seed: int) -> Summary:
    """``count`` random summaries, stacked; only the basic algebra has operands (k, v) so far."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(count, 2, 5, d, generator=generator, dtype=F64) for d in (3, 4))
    return algebra.summarise(k, v)


def entry(stack: Summary, index: int) -> Summary:
    return tuple(x[index] for x in stack)


def same(a: Summary, b: Summary) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


every_algebra = pytest.mark.parametrize("algebra", ALGEBRAS.values(), ids=ALGEBRAS)
seeds = st.integers(0, 2**31)


@every_algebra
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_combine_is_associative_and_identity_neutral(algebra: StateAlgebra, seed: int) -> None:
    a, b, c = (entry(summaries(algebra, 3, seed), i) for i in range(3))
    same(algebra.combine(algebra.combine(c, b), a), algebra.combine(c, algebra.combine(b, a)))
    same(algebra.combine(a, algebra.identity(a)), a)
    same(algebra.combine(algebra.identity(a), a), a)


@every_algebra
@settings(max_examples=20, deadline=None)
@given(seed=seeds, cuts=st.lists(st.integers(0, 20), max_size=5))
def test_any_split_gives_the_whole(algebra: StateAlgebra, seed: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, 20, d, generator=generator, dtype=F64) for d in (3, 4))
    bounds = [0, *sorted(cuts), 20]
    total = algebra.identity(algebra.summarise(k, v))
    for start, stop in itertools.pairwise(bounds):
        total = algebra.combine(algebra.summarise(k[:, start:stop], v[:, start:stop]), total)
    same(total, algebra.summarise(k, v))


@every_algebra
@settings(max_examples=30, deadline=None)
@given(seed=seeds, count=st.integers(1, 9), rank=st.integers(0, 8), later=st.booleans())
def test_fold_is_the_chain(algebra: StateAlgebra, seed: int, count: int, rank: int, later: bool) -> None:
    """The fold over a runtime rank is the chain over that rank's predecessors (or successors)."""
    stack, rank = summaries(algebra, count, seed), rank % count
    ranks = torch.arange(count)
    got = fold(algebra, stack, ranks > rank if later else ranks < rank, reverse=later)
    chain = algebra.identity(entry(stack, 0))
    for r in range(count - 1, rank, -1) if later else range(rank):
        chain = algebra.combine(entry(stack, r), chain)
    same(got, chain)


@every_algebra
def test_pack_and_unpack(algebra: StateAlgebra) -> None:
    stack = summaries(algebra, 3, 0)
    packed = torch.stack([pack(entry(stack, r)) for r in range(3)])
    same(unpack(packed, summary_shapes(entry(stack, 0))), stack)


def test_fold_keeps_the_order() -> None:
    """A non-commutative algebra (matrix products, the delta rules' case) tells order and direction."""

    def combine(later: Summary, earlier: Summary) -> Summary:
        return later[0] @ earlier[0], later[0] @ earlier[1] + later[1]

    def identity(like: Summary) -> Summary:
        return torch.eye(3, dtype=F64).expand_as(like[0]), torch.zeros_like(like[1])

    matrices = StateAlgebra("matrices", lambda *x: x, combine, identity)
    stack = tuple(draw((7, 3, 3), (7, 3, 4)))
    ranks = torch.arange(7)
    chain = identity(entry(stack, 0))
    for r in range(5):
        chain = combine(entry(stack, r), chain)
    same(fold(matrices, stack, ranks < 5), chain)
    chain = identity(entry(stack, 0))
    for r in range(6, 2, -1):
        chain = combine(entry(stack, r), chain)
    same(fold(matrices, stack, ranks > 2, reverse=True), chain)
