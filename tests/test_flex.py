"""Softmax attention by FlexAttention: what it is told, on CPU, by a stand-in that walks as its kernels do.

The stand-in looks at the blocks that the block mask lists and at no others, asks mask_mod in those listed as
visible in part alone, finds dq by the lists of rows and dk, dv by the lists of keys, and takes the
log-sum-exp as the kernels keep it, by base 2. ``tests/test_flex_code.py`` has the code that is compiled.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._higher_order_ops.flex_attention import flex_attention as operator
from torch._subclasses.fake_tensor import FakeTensorMode

from spcompile import _torch
from spcompile.attention import reference  # and the operators
from spcompile.kernels.softmax import blockwise, flex, flex_told, rows
from spcompile.kernels.softmax.operands import Operands, Options
from tests.proof import relative_error

# ---- PyTorch's kernels, walked by hand


def places(q: Tensor, k: Tensor) -> list[Tensor]:
    """b, h, i and j, each along its own dim."""
    sizes = (*q.shape[:3], k.shape[2])
    return [torch.arange(n).view([-1 if d == at else 1 for d in range(4)]) for at, n in enumerate(sizes)]


def listed(number: Tensor, index: Tensor, columns: int) -> Tensor:
    """The blocks that such lists have, bool."""
    assert number.dtype == index.dtype == torch.int32 and int(index.min()) >= 0 and int(index.max()) < columns
    there = torch.arange(index.shape[3]) < number.unsqueeze(-1)
    found = torch.zeros(*index.shape[:3], columns + 1, dtype=torch.bool)
    return found.scatter(3, torch.where(there, index, columns).long(), True)[..., :columns]


def by_entry(blocks: Tensor, like: Tensor) -> Tensor:
    wide = blocks.repeat_interleave(128, 2).repeat_interleave(128, 3)
    return wide[:, :, : like.shape[2], : like.shape[3]].expand(like.shape)


def repeated(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def walked(
    part: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor], x: Tensor, seen: Tensor, columns: int
) -> Tensor:
    """The scores of the blocks listed, -inf elsewhere."""
    in_part, all_of = (by_entry(listed(*lists, columns), x) for lists in (part, whole))
    assert not (in_part & all_of).any(), "looked at twice"
    return torch.where(all_of | (in_part & seen), x, -torch.inf)


def stand_in(
    q: Tensor, k: Tensor, v: Tensor, score_mod: Callable[..., Tensor], block_mask: Any, **how: Any
) -> tuple[Tensor, Any]:
    """``torch.nn.attention.flex_attention.flex_attention``."""
    assert how["enable_gqa"] and how["return_aux"].lse and set(how["kernel_options"]) == {"BACKEND"}
    assert block_mask.shape[2:] == (q.shape[2], k.shape[2]) and block_mask.BLOCK_SIZE == (128, 128)
    at, columns = places(q, k), block_mask.kv_indices.shape[3]
    x = score_mod(q @ repeated(k, q).mT * how["scale"], *at)
    lists = (block_mask.kv_num_blocks, block_mask.kv_indices)
    full = (block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    x = walked(lists, full, x, block_mask.mask_mod(*at).expand(x.shape), columns)
    lse = x.logsumexp(-1)
    p = torch.exp(x - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1))
    return p @ repeated(v, q), SimpleNamespace(lse=lse)


def stand_in_backward(*args: Any) -> tuple[Any, ...]:
    """``torch.ops.higher_order.flex_attention_backward``."""
    q, k, v, out, lse, grad, of_lse, score_mod, joint, mask, scale, how, buffers, more = args
    assert of_lse is None and {"OUTPUT_LOGSUMEXP", "WRITE_DQ"} < set(how) and buffers == more
    assert lse.is_contiguous()
    at, tables, mask_mod = places(q, k), mask[2:10], mask[-1]
    scores = q @ repeated(k, q).mT * scale
    x, seen = score_mod(scores, *at, *buffers), mask_mod(*at, *more).expand(scores.shape)
    by_rows = walked(tables[:2], tables[2:4], x, seen, tables[1].shape[3])
    turned = (y.transpose(2, 3) for y in (x, seen))
    by_keys = walked(tables[4:6], tables[6:8], *turned, tables[5].shape[3]).transpose(2, 3)
    lse = torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1)
    d = grad @ repeated(v, q).mT - (grad * out).sum(-1, keepdim=True)

    def of(x: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.exp2(x * math.log2(math.e) - lse)
        ds, *none = joint(scores, *at, p * d, *buffers)
        assert none == [None] * (4 + len(buffers))
        return p, ds * scale

    p, ds = of(by_keys)
    dk, dv = (y.unflatten(1, (k.shape[1], -1)).sum(2) for y in (ds.mT @ q, p.mT @ grad))
    return of(by_rows)[1] @ repeated(k, q), dk, dv, ()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs run as they are, and PyTorch's kernels are the stand-ins."""
    monkeypatch.setattr(flex, "_compiled", lambda kind: flex.programs(kind.options))
    monkeypatch.setattr(flex, "flex_attention", stand_in)
    monkeypatch.setattr(_torch, "flex_attention_backward", stand_in_backward)


# ---- equal to blocks of ATen operators

KINDS = ("none", "bool", "bias", "per head", "padding", "minimum", "documents", "far", "column", "alibi")
PACKED = ("packed", "packed alike", "packed at random", "packed, bool", "packed, minimum", "packed, alibi")
CAPPED = ("capped", "capped, bool", "capped, far", "capped, per head", "sinks", "sinks, far", "sinks, bool")
PREFIXED = ("prefixed", "prefixed alike", "prefixed at random", "prefixed, minimum", "prefixed and packed")


def mask_of(kind: str, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor | None:
    """A mask of [B, H, T, S]; most have a row that sees nothing, or nothing but masked keys."""
    (b, h, t, s), least = sizes, torch.finfo(torch.float32).min
    if kind.startswith(("packed", "prefixed", "capped", "sinks")):
        kind = kind.partition(", ")[2] or "none"
    i, j = torch.arange(t)[:, None], torch.arange(s)
    if kind == "none":
        return None
    if kind == "bool":
        return (torch.rand(b, 1, t, s) < 0.3) & (i != t // 2)
    if kind == "per head":
        return torch.where(torch.rand(1, h, t, s) < 0.5, -torch.inf, torch.randn(1, h, t, s).to(dtype))
    if kind == "padding":
        return torch.where(torch.rand(b, 1, 1, s) < 0.3, -1e4, 0.0).to(dtype)
    if kind == "minimum":  # the last rows see nothing but masked keys, as libraries write padding on the left
        return torch.where((i > t - 3) | (torch.rand(b, 1, t, s) < 0.3), least, 0.0).to(dtype)
    if kind == "documents":
        return (i // 140 == j // 140) & (i % 5 != 3)
    if kind == "far":  # moderate, far and farthest
        return torch.randn(t, s).to(dtype) + torch.tensor([0.0, 3e3, -3e3, least / 4]).to(dtype)[i % 4]
    if kind == "column":
        return torch.randn(t, 1).to(dtype) * 200
    if kind == "alibi":
        return -(torch.arange(1, h + 1).view(-1, 1, 1) * (i - j).abs()).to(dtype) / 8
    return torch.randn(t, s).to(dtype)


def documents_of(kind: str, b: int, s: int) -> Tensor | None:
    """Numbers of the tokens' documents: ascending, of one number for all sequences, or in any order."""
    if "packed" not in kind:
        return None
    if kind == "packed at random":
        return torch.randint(-2, 3, (b, s))
    ids = (torch.rand(b, s) < 5 / s).cumsum(1)
    return ids[:1].int() if kind == "packed alike" else ids


def prefixes_of(kind: str, b: int, s: int) -> Tensor | None:
    """Numbers of tokens that see each other: a prefix, images of any length, or in any order."""
    if not kind.startswith("prefixed"):
        return None
    if kind == "prefixed at random":
        return torch.randint(-2, 2, (b, s))
    if kind == "prefixed late":
        return torch.where(torch.arange(s) < 131, -1, 0)[None]
    if kind == "prefixed alike":
        return torch.where(torch.arange(s) < 2 * s // 3, 0, -1)[None]
    ids = (torch.rand(b, s) < 5 / s).cumsum(1)
    return torch.where(ids % 2 == 0, ids, -1)


def drawn(kind: str, t: int, s: int, dtype: torch.dtype, heads: tuple[int, int] = (4, 2)) -> tuple[Any, ...]:
    """Operands and a gradient; tokens before heads in memory, values wider than keys."""
    torch.manual_seed(hash((t, s)) % 1000)
    (h, hkv), b = heads, 2
    sizes = (h, t, 4), (hkv, s, 4), (hkv, s, 6), (h, t, 6)
    q, k, v, grad = (torch.randn(b, n, m, d).to(dtype).transpose(1, 2) for m, n, d in sizes)
    mask, documents = mask_of(kind, (b, h, t, s), dtype), documents_of(kind, b, s)
    sinks = torch.randn(h).to(dtype) if kind.startswith("sinks") else None
    return Operands(q, k, v, mask, sinks, documents, None, prefixes_of(kind, b, s)), grad


def options_of(kind: str, *given: Any) -> Options:
    """Causal, scale, first row, window."""
    return Options(*given)._replace(soft_cap=0.7 if kind.startswith("capped") else None)


def errors(x: Operands, grad: Tensor, options: Options) -> list[float]:
    """Of out, lse, dq, dk, dv, against blocks of ATen operators."""
    out, lse = flex.forward(x, options)
    got = out, lse, *flex.backward(grad, x, out, lse, options)
    want = *blockwise.forward(x, options), *blockwise.backward(grad, x, options)
    assert torch.equal(got[1] == -torch.inf, want[1] == -torch.inf)
    assert all(y.is_contiguous() for y in got)
    far = want[1] < -1e30
    lse, wanted = (torch.where(far, 0.0, y) for y in (got[1], want[1]))
    known = zip((out, lse, *got[2:]), (want[0], wanted, *want[2:]), strict=True)
    return [relative_error(a, b, 0.1) for a, b in known]  # those of a row that sees one key are zero


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS + PACKED + PREFIXED + CAPPED)
@pytest.mark.usefixtures("on_cpu")
def test_every_kind_of_mask(kind: str, causal: bool, window: int | None) -> None:
    """Rows of the middle of a sequence against all of its keys."""
    x, grad = drawn(kind, 150, 300, torch.float64)
    assert max(errors(x, grad, options_of(kind, causal, 0.3, 131, window))) < 1e-11


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(KINDS + PACKED + PREFIXED + CAPPED),
    st.integers(1, 200),
    st.integers(1, 300),
    st.integers(0, 320),
    st.booleans(),
    st.none() | st.integers(1, 300),
    st.sampled_from([(1, 1), (4, 1), (4, 4), (6, 2)]),
    st.sampled_from([torch.float32, torch.float64]),
)
@pytest.mark.usefixtures("on_cpu")
def test_any_call(
    kind: str,
    t: int,
    s: int,
    first: int,
    causal: bool,
    window: int | None,
    heads: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    x, grad = drawn(kind, t, s, dtype, heads)
    limit = 1e-11 if dtype == torch.float64 else 4e-5
    assert max(errors(x, grad, options_of(kind, causal, 0.3, first, window))) < limit


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kind", ["none", "bool", "alibi", "packed", "prefixed"])
@pytest.mark.usefixtures("on_cpu")
def test_rows_of_ranks(kind: str, ranks: int) -> None:
    """The rows of all ranks are the whole, and their terms of dk and dv its gradients."""
    x, grad = drawn(kind, 290, 290, torch.float64)
    leaves = [y.clone().requires_grad_() for y in x[:3]]
    want = reference.softmax_attention(
        *leaves, x.mask, True, 0.3, documents=x.documents, prefixes=x.prefixes
    )[0]
    wants = torch.autograd.grad(want, leaves, grad)
    block, found = -(-290 // ranks), []
    for first in range(0, 290, block):
        own = slice(first, first + block)
        part = x._replace(q=x.q[:, :, own], mask=None if x.mask is None else x.mask[..., own, :])
        options = Options(True, 0.3, first)
        out, lse = flex.forward(part, options)
        found.append((out, *flex.backward(grad[:, :, own], part, out, lse, options)))
    outs, dqs, dks, dvs = zip(*found, strict=True)
    got = torch.cat(outs, 2), torch.cat(dqs, 2), sum(dks), sum(dvs)
    for a, b in zip(got, (want, *wants), strict=True):
        assert relative_error(a, b.detach()) < 1e-11


@pytest.mark.parametrize("kind", ["none", "bool", "minimum", "alibi", "packed", "prefixed", "capped, bool"])
def test_as_pytorch_defines_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's own operators, forward and backward, as PyTorch computes them without a GPU."""

    def dense(q: Tensor, k: Tensor, v: Tensor, score_mod: Any, block_mask: Any, **how: Any) -> Any:
        out, lse, _ = operator(q, k, v, score_mod, block_mask.as_tuple(), how["scale"], {})
        return out, SimpleNamespace(lse=lse * math.log(2))

    monkeypatch.setattr(flex, "_compiled", lambda kind: flex.programs(kind.options))
    monkeypatch.setattr(flex, "flex_attention", dense)
    x, grad = drawn(kind, 150, 200, torch.float64)
    assert max(errors(x, grad, options_of(kind, True, 0.3, 37))) < 1e-11


# ---- planted mistakes


def swapped(options: Options, given: flex_told.Given) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """``top`` is taken off the mask, not off the rounded sum."""
    mask_mod, score_mod = modifications(options, given)
    if given.mask is None or given.top is None:
        return mask_mod, score_mod
    entries = given.mask - given.top
    return mask_mod, lambda score, b, h, i, j: score + flex_told._entry(entries, b, h, i, j)


def unmasked(options: Options, given: flex_told.Given) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """A bool mask is left to the block mask."""
    return modifications(options, given._replace(mask=None) if given.top is None else given)


def undocumented(
    options: Options, given: flex_told.Given
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Documents are left to the block mask."""
    return modifications(options, given._replace(documents=None))


def without_prefixes(
    options: Options, given: flex_told.Given
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Prefixes are left to the block mask."""
    return modifications(options, given._replace(prefixes=None))


def uncapped(options: Options, given: flex_told.Given) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Scores go on as they are, and their gradients as if capped."""
    return modifications(options._replace(soft_cap=None), given)


told_meet, of_lse = flex_told._meet, flex._lse
modifications, blocks = flex.modifications, flex.blocks_of
flex_entry = flex_told._entry
distances, band = flex_told._distances, flex_told._band
MISTAKES: dict[str, tuple[str, str, Any]] = {
    "rank 0's rows": ("none", "_first", lambda x, options: torch.zeros((), dtype=torch.int32)),
    "a row does not see itself": (
        "none",
        "_band",
        lambda options: (1, None) if options.causal else (None, None),
    ),
    "one key too many": ("bool", "_band", lambda options: (-1, None) if options.causal else (None, None)),
    "blocks of another row": ("none", "_distances", lambda first, *a: distances(first - 128, *a)),
    "all blocks are whole": ("none", "blocks_of", lambda *a: (lambda n, i, m, j: (m, j, n, i))(*blocks(*a))),
    "top before the sum": ("minimum", "modifications", swapped),
    "a bool mask by blocks alone": ("bool", "modifications", unmasked),
    "lse - top for every row": ("minimum", "_MODERATE", math.inf),
    "moderate entries are hidden": ("alibi", "_HIDDEN", -2.0),
    "the first rows' documents": ("packed", "_own", lambda ids, given, rows: ids[:, :rows]),
    "documents by blocks alone": ("packed", "modifications", undocumented),
    "every block of documents is whole": (
        "packed",
        "_meet",
        lambda *given, **least: (meet := told_meet(*given, **least)[0], meet),
    ),
    "no soft cap": ("capped", "modifications", uncapped),
    "a sink in the first forward alone": (
        "sinks, far",
        "_lse",
        lambda call, q, k, v, lse, sinks, *more: of_lse(call, q, k, v, lse, None, *more),
    ),
    "the first rows' prefixes": ("prefixed late", "_own", lambda ids, given, rows: ids[:, :rows]),
    "prefixes by blocks alone": ("prefixed", "modifications", without_prefixes),
    "no block of prefixes is looked at": (
        "prefixed late",
        "_meet",
        lambda *given, **least: (torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)),
    ),
    "what is of no prefix is of one": ("prefixed", "_entry", lambda x, *at: flex_entry(x, *at).clamp(min=0)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.usefixtures("on_cpu")
def test_mistakes_are_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, name, wrong = MISTAKES[mistake]
    x, grad = drawn(kind, 150, 420 if kind == "prefixed late" else 300, torch.float64)
    monkeypatch.setattr(flex if hasattr(flex, name) else flex_told, name, wrong)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        assert max(errors(x, grad, options_of(kind, True, 0.3, 131))) < 1e-11


# ---- which calls, and how often they are compiled


def on_gpu(
    dtype: torch.dtype = torch.bfloat16, size: int = 64, mask: Any = None, tokens: int = 8
) -> Operands:
    q, k, v = (torch.empty(1, 2, tokens, size, dtype=dtype, device="cuda") for _ in range(3))
    return Operands(q, k, v, None if mask is None else torch.empty(tokens, tokens, dtype=mask, device="cuda"))


def test_which_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention first, then FlexAttention, then blocks; and why not, as the report says it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    how, flexible = Options(True, 0.3), "PyTorch's FlexAttention"
    with FakeTensorMode():
        assert rows.name(on_gpu(), how) == "PyTorch's flash attention"
        taken = [on_gpu(torch.float32), on_gpu(mask=torch.bool), on_gpu(torch.float32, 256, torch.float32)]
        assert {(rows.name(x, how), rows.refuses(x, how)) for x in taken} == {(flexible, "")}
        left = {
            "float64, not bfloat16 or float16; float64, not float32, bfloat16 or float16": on_gpu(
                torch.float64
            ),
            "a mask that is data; heads of 8 and 8 numbers, not 16 to 256": on_gpu(size=8, mask=torch.bool),
            "a mask that is data; a mask of more than 2^31 entries": on_gpu(mask=torch.bool, tokens=2**16),
            "no tokens": on_gpu(tokens=0),
        }
        for why, x in left.items():
            assert (rows.name(x, how), rows.refuses(x, how)) == ("ATen blocks", why)
        monkeypatch.setenv("SPCOMPILE_TRITON", "0")
        assert rows.refuses(taken[1], how) == "a mask that is data; SPCOMPILE_TRITON=0"
        monkeypatch.delenv("SPCOMPILE_TRITON")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert rows.name(taken[0], how) == "ATen blocks"
    assert rows.refuses(Operands(*(torch.ones(1, 1, 1, 1) for _ in range(3))), how) == ""


def test_a_call_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on in blocks, with one warning for its kind; out of memory is the caller's."""
    x, grad = drawn("bool", 20, 20, torch.float32)
    options, asked = Options(True, 0.3), []

    def failing(kind: Any) -> Any:
        asked.append(kind)
        raise fault

    monkeypatch.setattr(flex, "_compiled", failing)
    monkeypatch.setattr(flex, "_failed", {})
    monkeypatch.setattr(rows.flash, "refuses", lambda x, options: "a mask that is data")
    monkeypatch.setattr(flex, "without_triton", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flex, "_SMALLEST", 1)
    fault: Exception = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError):
        rows.forward(x, options)
    fault = RuntimeError("out of shared memory")
    with pytest.warns(UserWarning, match="goes on in blocks of ATen operators.*RuntimeError: out of shared"):
        out, lse = rows.forward(x, options)
    count = len(asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grads = rows.backward(grad, x, out, lse, options)
    assert len(asked) == count and flex.refuses(x, options) == "FlexAttention failed: RuntimeError"
    for a, b in zip(
        (out, lse, *grads), (*blockwise.forward(x, options), *blockwise.backward(grad, x, options))
    ):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_few_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward are compiled once, and once more for all other lengths: the first row is data."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(flex, "_compiled", functools.cache(flex._compiled.__wrapped__))
    for t, s, first in ((20, 40, 0), (20, 40, 20), (30, 60, 30), (36, 72, 36), (50, 100, 50)):
        x, grad = drawn("bias", t, s, torch.float32)
        assert max(errors(x, grad, Options(True, 0.3, first))) < 4e-5
    assert counter.frame_count == 4


@pytest.mark.slow
def test_compiled_within_a_compiled_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """From inside our operators, forward and backward, where these run in a graph of the user's."""
    asked = []

    def count(kind: Any) -> Any:
        asked.append(kind)
        return real(kind)

    outer = torch.compile(
        lambda *x: torch.ops.spcompile.softmax_attention(*x, True, 0.3)[0] * 2, backend="aot_eager"
    )
    real = functools.cache(flex._compiled.__wrapped__)
    monkeypatch.setattr(flex, "_compiled", count)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(rows.flash, "refuses", lambda x, options: "a mask that is data")
    monkeypatch.setattr(flex, "refuses", lambda x, options: "")
    x, grad = drawn("bool", 30, 30, torch.float64)
    leaves = [y.clone().requires_grad_() for y in x[:3]]
    got = outer(*leaves, x.mask)
    grads = torch.autograd.grad(got, leaves, grad)
    want = reference.softmax_attention(*leaves, x.mask, True, 0.3)[0] * 2
    wants = torch.autograd.grad(want, leaves, grad)
    for a, b in zip((got, *grads), (want, *wants), strict=True):
        assert relative_error(a.detach(), b.detach()) < 1e-11
    assert len(asked) == 2
