"""``linear_attention`` and ``affine_scan`` by themselves, against the token-by-token references."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spcompile.attention import reference
from spcompile.attention.variants import VARIANTS
from spcompile.kernels.linear.operands import Operands, Options
from tests.threads import close
from tests.variants import KINDS, cotangents, draw, gradients, options_of, references

spc = torch.ops.spcompile
F64 = torch.float64
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, so an entry that a kernel leaves unwritten shows."""
    mode = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(mode)


def compare(x: Operands, options: Options, bound: float = 1e-9) -> None:
    grads = cotangents(x)
    got = gradients(spc.linear_attention, x, options, grads)
    for found, wanted in zip(got, references(x, options, grads), strict=True):
        close(found, wanted, bound)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 200])
@every_kind
def test_every_variant(kind: str, length: int, reverse: bool) -> None:
    """Outputs, final state and the gradients of q, k, v, decay, beta and the initial state."""
    for initial in (False, True):
        x = draw(KINDS[kind], 2, 2, length, 4, 5, initial=initial)
        compare(x, options_of(KINDS[kind], reverse))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [7, 65, 200])
@every_kind
def test_chunks_that_are_traced(
    monkeypatch: pytest.MonkeyPatch, kind: str, length: int, reverse: bool
) -> None:
    """Of every kind, as on GPUs where no Triton kernel takes them."""
    monkeypatch.setattr("spcompile.kernels.linear.kernel.is_opaque", lambda device: False)
    compare(draw(KINDS[kind], 2, 2, length, 4, 5), options_of(KINDS[kind], reverse))


@every_kind
def test_tokens_next_to_each_other_in_memory(kind: str) -> None:
    """Of one head, so that no copy sets them right."""
    x = draw(KINDS[kind], 1, 1, 64, 4, 5)
    turned = (None if y is None else y.mT.contiguous().mT for y in x[:5])
    compare(x._replace(**dict(zip(x._fields[:5], turned, strict=True))), options_of(KINDS[kind]))


@pytest.mark.parametrize(("k", "v"), [(16, 16), (16, 48), (64, 32), (256, 64)])
@every_kind
def test_head_sizes(kind: str, k: int, v: int) -> None:
    compare(draw(KINDS[kind], 1, 1, 70, k, v), options_of(KINDS[kind], scale=k**-0.5))


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("decay", ["none", "constant", "scalar", "diagonal"])
def test_exclusive_queries_of_every_form(decay: str, delta: bool) -> None:
    """Also those that no variant of the table has."""
    form = next(
        v
        for v in VARIANTS.values()
        if (v.decay, v.delta) == (decay if decay != "constant" else "scalar", delta)
    )
    x = draw(form, 1, 2, 70, 4, 5)
    if decay == "constant":
        x = x._replace(log_decay=torch.full((1, 2, 1, 1), -0.1, dtype=F64))
    compare(x, Options(True, 0.3, True, False))


@every_kind
def test_gates_at_zero_and_one(kind: str) -> None:
    """Log decays of -inf (all is forgotten), 0 (nothing is) and beyond what exp can represent."""
    x = draw(KINDS[kind], 1, 2, 130, 4, 5)
    if x.log_decay is not None:
        picks = torch.tensor([-torch.inf, 0.0, -1e4, -1e-3, -0.5], dtype=F64)
        generator = torch.Generator().manual_seed(3)
        x = x._replace(log_decay=picks[torch.randint(0, 5, x.log_decay.shape, generator=generator)])
    if x.beta is not None:
        x = x._replace(beta=(x.beta > 0.5).to(F64))
    compare(x, options_of(KINDS[kind]))


def test_a_decay_of_any_broadcast_shape() -> None:
    for shape in ((1, 1, 1, 1), (1, 2, 1, 4), (2, 1, 70, 1), (1, 1, 70, 4)):
        x = draw(VARIANTS["gla"], 2, 2, 70, 4, 5)
        assert x.log_decay is not None
        compare(x._replace(log_decay=x.log_decay[tuple(slice(0, s) for s in shape)]), Options(True, 0.3))


@pytest.mark.parametrize("length", [1, 65])
def test_every_query_sees_all_tokens(length: int) -> None:
    x = draw(VARIANTS["linear_llama3"], 2, 2, length, 4, 5, initial=False)
    compare(x, Options(False, 0.3))


@pytest.mark.parametrize("index", [0, 1])
def test_only_one_result_is_used(index: int) -> None:
    x, options = draw(VARIANTS["gated_deltanet"], 1, 2, 70, 4, 5), options_of(VARIANTS["gated_deltanet"])
    leaves = [y.detach().requires_grad_() for y in x if y is not None]
    grads = []
    for function in (spc.linear_attention, reference.linear_attention):
        result = function(*leaves, *options)[index]
        grads.append(torch.autograd.grad(result, leaves, cotangents(x)[index], allow_unused=True))
    for a, b in zip(*grads, strict=True):
        close(a, torch.zeros_like(a) if b is None else b)


# ---- low precision ----

# Float32: a state is a sum of as many terms as the decay lets live, added one chunk after another, so its
# error grows like eps * sqrt(chunks alive); with 1024 chunks and no decay at all that is 32 * 6e-8 = 2e-6,
# and gradients of decays are sums of products of two such states. bfloat16: operands are rounded alike on
# both sides; the results are rounded once, by up to 2^-9 = 2e-3 each.
_BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 4e-3}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", _BOUNDS)
@pytest.mark.parametrize("strength", [1e-5, 20.0], ids=["weak", "strong"])
@every_kind
def test_65536_tokens(kind: str, strength: float, dtype: torch.dtype) -> None:
    """Ratio of the RMS error to the RMS value, against the same operator in float64, which the tests above
    hold to the recurrence: 65,536 steps of a loop with gradients would take minutes.

    Strong decays underflow in products of a few tokens; weak ones keep half of the state over the sequence.
    """
    x = draw(KINDS[kind], 1, 1, 65536, 16, 16, strength=strength, dtype=dtype)
    grads, options = cotangents(x), options_of(KINDS[kind], scale=0.25)
    got = gradients(spc.linear_attention, x, options, grads)
    wide = Operands(*(None if y is None else y.double() for y in x))
    want = gradients(spc.linear_attention, wide, options, (grads[0].double(), grads[1].double()))
    for found, wanted in zip(got, want, strict=True):
        assert (found.double() - wanted).norm() <= _BOUNDS[dtype] * wanted.norm()


def test_long_float64_runs_are_the_recurrence() -> None:
    """What the yardstick above rests on: forward over 20,000 tokens against the loop."""
    for variant in KINDS.values():
        x = draw(variant, 1, 1, 20000, 4, 4, strength=1e-3)
        with torch.no_grad():
            got = spc.linear_attention(*x, *options_of(variant))
            want = reference.linear_attention(*x, *options_of(variant))
        for found, wanted in zip(got, want, strict=True):
            close(found, wanted)


# ---- operators ----


def strided(x: Tensor) -> Tensor:
    """The same values as a transposed view of [B, T, H, D], as models make them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_linear_opcheck(dtype: torch.dtype, kind: str) -> None:
    """Schema, autograd registration, and strides and dtypes of the fake; torch's own check."""
    x, options = draw(KINDS[kind], 1, 2, 9, 4, 5, dtype=dtype), options_of(KINDS[kind])
    x = Operands(*(None if y is None else strided(y) for y in x))
    leaves = [None if y is None else y.detach().requires_grad_() for y in x]
    torch.library.opcheck(spc.linear_attention, (*leaves, *options))
    _, final = spc.linear_attention(*x, *options)
    torch.library.opcheck(spc.linear_attention_backward, (*cotangents(x), *x, final, *options))


def test_the_backward_runs_under_a_dispatch_mode() -> None:
    """Where torch.func would fail: modes switch its keys off inside a kernel."""
    x, options = draw(VARIANTS["gla"], 1, 2, 9, 4, 5), options_of(VARIANTS["gla"])
    with FlopCounterMode(display=False):
        compare(x, options)


SCANS = {
    "sum": (None, (2, 9, 3, 4), False),
    "elementwise": ((2, 9, 3, 4), (2, 9, 3, 4), False),
    "broadcast": ((2, 9, 3, 1), (2, 9, 3, 4), False),
    "constant": ((1, 1, 3, 1), (2, 9, 3, 4), False),
    "matrix": ((2, 9, 3, 3), (2, 9, 3, 4), True),
}


MAXIMA = [name for name, (_, _, matrix) in SCANS.items() if not matrix]
"""Those that ``max_scan`` takes as well."""


def scan_operands(name: str, dtype: torch.dtype = F64) -> tuple[Tensor | None, Tensor, Tensor, bool]:
    shape, of_b, matrix = SCANS[name]
    torch.manual_seed(0)
    a = None if shape is None else torch.randn(shape, dtype=dtype)
    return a, torch.randn(of_b, dtype=dtype), torch.randn(of_b[0], *of_b[-2:], dtype=dtype), matrix


@pytest.mark.parametrize("dtype", [F64, torch.complex128])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", SCANS)
def test_affine_scan(name: str, reverse: bool, dtype: torch.dtype) -> None:
    a, b, initial, matrix = scan_operands(name, dtype)
    leaves = [None if x is None else x.requires_grad_() for x in (a, b, initial)]
    given = [x for x in leaves if x is not None]
    got = spc.affine_scan(*leaves, matrix, reverse)
    want = reference.affine_scan(*leaves, matrix, reverse)
    grads = [torch.randn_like(x) for x in got]
    for x, y in zip(got, want, strict=True):
        close(x.detach(), y.detach())
    for x, y in zip(
        torch.autograd.grad(got, given, grads), torch.autograd.grad(want, given, grads), strict=True
    ):
        close(x, y)


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", MAXIMA)
def test_max_scan(name: str, reverse: bool, start: bool, dtype: torch.dtype) -> None:
    """In bfloat16 the states are computed in float32, and rounded once."""
    a, b, initial, _ = scan_operands(name)
    initial = initial if start else None
    given = [x.requires_grad_() for x in (a, b, initial) if x is not None]
    want = reference.max_scan(a, b, initial, reverse)
    if dtype != F64:
        a, b, initial = (None if x is None else x.to(dtype) for x in (a, b, initial))
        want = reference.max_scan(*(None if x is None else x.float() for x in (a, b, initial)), reverse)
    got = spc.max_scan(a, b, initial, reverse)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == dtype and x.is_contiguous()
        torch.testing.assert_close(x, y.to(dtype), rtol=0 if dtype == F64 else 2**-8, atol=1e-12)
    if dtype == F64:
        grads = [torch.where(y.isinf(), 0.0, torch.randn_like(y)) for y in want]
        pairs = (torch.autograd.grad(z, given, grads) for z in (got, want))
        for x, y in zip(*pairs, strict=True):
            close(x, y)


def test_equals_share_the_gradient_of_a_maximum() -> None:
    x = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=F64).reshape(1, 4, 1, 1)
    found = []
    for scan in (spc.max_scan, reference.max_scan):
        b = x.clone().requires_grad_()
        before, final = scan(None, b, torch.ones(1, 1, 1, dtype=F64))
        found.append(torch.autograd.grad(before.sum() + final.sum(), b)[0])
    assert found[0].unique().numel() > 2
    assert torch.equal(*found)


@pytest.mark.parametrize("name", MAXIMA)
def test_max_scan_opcheck(name: str) -> None:
    a, b, initial, _ = scan_operands(name)
    torch.library.opcheck(
        spc.max_scan, tuple(None if x is None else x.requires_grad_() for x in (a, b, initial))
    )


@pytest.mark.parametrize("name", SCANS)
def test_scan_opcheck(name: str) -> None:
    *tensors, matrix = scan_operands(name)
    leaves = [None if x is None else x.requires_grad_() for x in tensors]
    torch.library.opcheck(spc.affine_scan, (*leaves, matrix))


def test_states_are_contiguous_whatever_the_operands_are() -> None:
    """As the fake promises: a triangular solve gives its results column by column."""
    for name in SCANS:
        a, b, initial, matrix = scan_operands(name)
        for result in spc.affine_scan(a, b.mT.contiguous().mT, initial.mT.contiguous().mT, matrix):
            assert result.is_contiguous()


@pytest.mark.parametrize("kind", ["linear_llama3", "gated_deltanet", "gla"])
def test_variants_under_inductor(kind: str) -> None:
    x, options = draw(KINDS[kind] if kind in KINDS else VARIANTS[kind], 1, 2, 70, 4, 5), Options(True, 0.3)
    torch.compiler.reset()
    run = torch.compile(lambda *y: spc.linear_attention(*y, *options), fullgraph=True)
    leaves = [None if y is None else y.detach().requires_grad_() for y in x]
    out, final = run(*leaves)
    given = [y for y in leaves if y is not None]
    got = (out.detach(), final.detach(), *torch.autograd.grad((out, final), given, cotangents(x)))
    for a, b in zip(got, references(x, options, cotangents(x)), strict=True):
        close(a, b)


def test_what_disagrees_is_refused() -> None:
    q, k = torch.ones(1, 2, 9, 4), torch.ones(1, 2, 8, 4)
    call = spc.linear_attention
    with pytest.raises(ValueError, match=r"linear_attention.*\[1, 2, 9, 4\]"):
        call(q, k, k, None, None, None, True, 1.0)
    with pytest.raises(ValueError, match=r"log_decay \[1, 2, 8, 1\]"):
        call(q, q, q, torch.zeros(1, 2, 8, 1), None, None, True, 1.0)
    with pytest.raises(ValueError, match="beta"):
        call(q, q, q, None, torch.zeros(1, 2, 9, 4), None, True, 1.0)
    with pytest.raises(ValueError, match="initial_state"):
        call(q, q, q, None, None, torch.zeros(1, 2, 3, 4), True, 1.0)
    with pytest.raises(ValueError, match="only a causal one"):
        call(q, q, q, torch.zeros(1, 2, 1, 1), None, None, False, 1.0)
    with pytest.raises(ValueError, match="does not broadcast"):
        spc.affine_scan(torch.ones(2, 9, 3, 5), torch.ones(2, 9, 3, 4), None, False)
    with pytest.raises(ValueError, match=r"max_scan.*does not broadcast"):
        spc.max_scan(torch.ones(2, 9, 3, 5), torch.ones(2, 9, 3, 4), None)
    with pytest.raises(ValueError, match=r"max_scan.*int64"):
        spc.max_scan(None, torch.ones(2, 9, 3, 4, dtype=torch.int64), None)
    with pytest.raises(ValueError, match="initial_state"):
        spc.max_scan(None, torch.ones(2, 9, 3, 4), torch.ones(2, 4, 3))
