"""A window, a soft cap and sinks of softmax attention: kernels, operator, strategy against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import spcompile.attention as spc
from spcompile.attention import reference
from spcompile.kernels.softmax import blockwise, flash
from spcompile.kernels.softmax.operands import Operands, Options
from spcompile.strategies import SOFTMAX
from tests.threads import Ranks, close, operands, reference_gradients, shards, whole

F64 = torch.float64
# window, soft cap, sinks
KINDS: dict[str, tuple[int | None, float | None, bool]] = {
    "itself": (1, None, False),
    "window": (4, None, False),
    "longer than all": (300, None, False),
    "cap": (None, 2.0, False),
    "sinks": (None, None, True),
    "window and sinks": (3, None, True),
    "all": (5, 1.5, True),
}


def draw(length: int, keys: int, sinks: bool, dtype: torch.dtype = F64) -> list[Tensor]:
    """grad, q, k, v and, if there are any, sinks; grouped heads, and values wider than keys."""
    shapes: list[tuple[int, ...]] = [(2, 4, length, 6), (2, 4, length, 4), (2, 2, keys, 4), (2, 2, keys, 6)]
    return operands(*shapes, *[(4,)][: int(sinks)], dtype=dtype)


def options_of(kind: str, causal: bool) -> dict[str, Any]:
    window, cap, _ = KINDS[kind]
    return {"causal": causal, "scale": 0.3, "window": window, "soft_cap": cap}


def make_mask(name: str, length: int, keys: int) -> Tensor | None:
    if not name:
        return None
    shape = (2, 1, 1, keys) if name == "keys" else (2, 4, length, keys)
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    return keep if name != "float" else torch.where(keep, 0.5, -torch.inf).double()


def want(given: list[Tensor], mask: Tensor | None, named: dict[str, Any]) -> tuple[Tensor, ...]:
    """out, lse, gradients."""

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return reference.softmax_attention(q, k, v, mask, sinks=sinks, **named)

    out, *grads = reference_gradients(lambda *x: run(*x)[0], *given)
    return out, run(*given[1:])[1], *grads


def expect(got: Any, wanted: Any) -> None:
    """Equal to 1e-9 of the largest entry; to 1e-9 where that is 0, the scores' gradients of a single key."""
    for x, y in zip(got, wanted, strict=True):
        close(*(x, y) if y.abs().max() > 1e-12 else (x + 1, y + 1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "keys"), [(13, 13), (150, 150), (13, 5), (5, 13)])
@pytest.mark.parametrize("kind", KINDS)
def test_operator(kind: str, length: int, keys: int, causal: bool) -> None:
    given, named = draw(length, keys, KINDS[kind][2]), options_of(kind, causal)

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return spc.softmax_attention(q, k, v, None, sinks=sinks, **named)[0]

    out, *grads = reference_gradients(run, *given)
    lse = spc.softmax_attention(*given[1:4], None, sinks=[*given, None][4], **named)[1]
    expect((out, lse, *grads), want(given, None, named))


@pytest.mark.parametrize("first_row", [0, 9])
@pytest.mark.parametrize("mask", ["", "keys", "rows", "float"])
@pytest.mark.parametrize("kernel", ["blocks", "flash"])
@pytest.mark.parametrize("kind", ["window", "all", "cap"])
def test_kernels_at_a_later_row(
    monkeypatch: pytest.MonkeyPatch, kind: str, kernel: str, mask: str, first_row: int
) -> None:
    """Blocks of two rows; the flash kernel's of three."""
    monkeypatch.setattr(blockwise, "_BUDGET", 2 * 2 * 4 * 14)
    monkeypatch.setattr(blockwise, "_FEW_ROWS", 1)
    monkeypatch.setattr(flash, "_FEWEST_ROWS", 3)
    window, cap, sinks = KINDS[kind]
    if kernel == "flash":
        cap, sinks = None, False
    given, named = draw(14, 14, sinks), options_of(kind, True) | {"soft_cap": cap}
    grad, q, k, v, *more = given
    grad[:, :, :first_row] = 0
    data = make_mask(mask, 14, 14)
    rows = data[:, :, first_row:] if data is not None and data.shape[2] > 1 else data
    x = Operands(q[:, :, first_row:], k, v, rows, *more)
    options = Options(True, 0.3, first_row, window, cap)
    if kernel == "flash":
        out, lse = flash.forward(x, options)
        grads = flash.backward(grad[:, :, first_row:], x, out, lse, options)
    else:
        out, lse = blockwise.forward(x, options)
        grads = blockwise.backward(grad[:, :, first_row:], x, options)
    expected = want(given, data, named)
    expected = (*(y[:, :, first_row:] for y in expected[:3]), *expected[3:5])
    expect((out, lse, *grads), expected)


@pytest.mark.parametrize("kernel", [flash, blockwise])
def test_work_is_length_times_window(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    """No mask and no block of scores is rows x keys; all together are less than three windows a row."""
    length, window, sizes = 2048, 128, []
    real = Options.visible

    def spy(self: Options, start: int, stop: int, first: int, end: int, device: Any = "cpu") -> Any:
        sizes.append((stop - start) * (end - first))
        return real(self, start, stop, first, end, device)

    monkeypatch.setattr(Options, "visible", spy)
    kernel.forward(Operands(*operands(*[(1, 1, length, 4)] * 3)), Options(True, 0.3, window=window))
    assert max(sizes) <= 2 * window * window and sum(sizes) <= 3 * length * window


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["window", "window and sinks", "all"])
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    given, named = draw(50, 50, KINDS[kind][2], dtype), options_of(kind, True)

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return spc.softmax_attention(q, k, v, None, sinks=sinks, **named)[0]

    got = reference_gradients(run, *given)
    out, _, *grads = want([x.double() for x in given], None, named)
    for x, y in zip(got, (out, *grads), strict=True):
        assert x.dtype == dtype
        # The fused kernel rounds probabilities to the input dtype before the product with the values.
        assert (x.double() - y).norm() / y.norm() <= max(2e-6, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    window, cap, sinks = KINDS[kind]
    grad, *given = draw(9, 9, sinks)
    q, k, v, *more = (x.requires_grad_() for x in given)
    torch.library.opcheck(spc.softmax_attention, (q, k, v, None, True, 0.3, window, cap, *more))
    out, lse = (x.detach() for x in spc.softmax_attention(q, k, v, None, True, 0.3, window, cap, *more))
    saved = grad, *(x.detach() for x in (q, k, v)), None, out, lse
    rest = [x.detach() for x in more]
    torch.library.opcheck(spc.softmax_attention_backward, (*saved, True, 0.3, window, cap, *rest))


def test_what_is_refused() -> None:
    q, sinks = operands((1, 2, 9, 4), (3,))
    with pytest.raises(ValueError, match="sinks"):
        spc.softmax_attention(q, q, q, None, True, 1.0, sinks=sinks)
    with pytest.raises(ValueError, match="window of 0"):
        spc.softmax_attention(q, q, q, None, True, 1.0, window=0)
    with pytest.raises(ValueError, match="soft cap"):
        spc.softmax_attention(q, q, q, None, True, 1.0, soft_cap=0.0)


# ---- packed documents ----

DOCUMENTS = {
    "ascending": [[0] * 5 + [1] * 2 + [2] * 17, [0] * 11 + [4] * 13],
    "alike": [[0] * 8 + [1] * 1 + [2] * 8 + [3] * 7],
    "in any order": [[1, 0, 0, 1, 1, 2] * 4, [-3] * 12 + [0, 1] * 6],
}


def documents(kind: str, length: int) -> Tensor:
    """Of 24 tokens or fewer."""
    return torch.tensor(DOCUMENTS[kind])[:, :length]


@pytest.mark.parametrize("kernel", ["operator", "blocks"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents(
    monkeypatch: pytest.MonkeyPatch, kind: str, causal: bool, window: int | None, kernel: str
) -> None:
    """Also in blocks of a few rows, each kernel."""
    for module in (flash, blockwise):
        monkeypatch.setattr(module, "_ROWS_OF_DOCUMENTS", 3)
    monkeypatch.setattr(flash, "_FEWEST_ROWS", 3)
    ids, given = documents(kind, 24), draw(24, 24, True)
    named = {
        "causal": causal,
        "scale": 0.3,
        "window": window,
        "soft_cap": 1.5 if kernel == "blocks" else None,
    }

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        return spc.softmax_attention(*x[:3], None, sinks=x[3], documents=ids, **named)

    out, *grads = reference_gradients(lambda *x: run(*x)[0], *given)
    expect((out, run(*given[1:])[1], *grads), want(given, None, named | {"documents": ids}))


@pytest.mark.parametrize("kernel", [flash, blockwise])
def test_work_is_that_of_each_document(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    """Of eight documents one after another a block of rows meets two at most."""
    length, sizes = 2048, []
    real = Operands.visible

    def spy(self: Operands, options: Options, start: int, stop: int, first: int, end: int) -> Any:
        sizes.append((stop - start) * (end - first))
        return real(self, options, start, stop, first, end)

    monkeypatch.setattr(Operands, "visible", spy)
    ids = (torch.arange(length) // (length // 8))[None]
    kernel.forward(Operands(*operands(*[(1, 1, length, 4)] * 3), None, None, ids), Options(False, 0.3))
    assert sum(sizes) <= length * length / 8


def test_documents_that_are_refused() -> None:
    (q,) = operands((2, 2, 9, 4))
    for ids, said in ((torch.zeros(2, 8).int(), "expected"), (torch.zeros(2, 9), "expected integers")):
        with pytest.raises(ValueError, match=said):
            spc.softmax_attention(q, q, q, None, True, 1.0, documents=ids)
    with pytest.raises(ValueError, match="as many queries as keys"):
        spc.softmax_attention(q[:, :, :3], q, q, None, False, 1.0, documents=torch.zeros(1, 9).int())


# ---- on ranks ----


def on_ranks(
    ranks: Ranks,
    given: list[Any],
    mask: Tensor | None,
    options: Options,
    keep: bool = True,
    way: str = "allgather",
) -> list[Tensor]:
    """out, lse, dq, dk, dv; what a rank has behind the sequence is NaN."""
    strategy, sequence = SOFTMAX[way].load(), ranks.sequence(given[1].shape[2])
    grads, queries, keys, values = (shards(x, sequence) for x in given[:4])
    masks = [mask] * ranks.size
    if mask is not None and mask.shape[2] > 1:
        masks = shards(mask, sequence)
    how = options, sequence, sequence

    def work(rank: int) -> tuple[Tensor, ...]:
        x = Operands(queries[rank], keys[rank], values[rank], masks[rank], *given[4:])
        out, lse, kv = strategy.forward(x, *how)
        kv = kv if keep else strategy.gather(x, *how)
        return out, lse, *strategy.backward(grads[rank], x, out, lse, kv, *how)

    return [whole(list(x), sequence) for x in zip(*ranks.run(work), strict=True)]


@pytest.mark.parametrize("way", SOFTMAX)
@pytest.mark.parametrize("mask", ["", "keys", "rows"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [24, 13, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sharded(
    monkeypatch: pytest.MonkeyPatch, size: int, length: int, causal: bool, mask: str, way: str
) -> None:
    """Windows shorter than a shard (edges), as long and longer (all keys), with caps and sinks."""
    data = make_mask(mask, length, length)
    for window in (1, 2, 4, 7, 40):
        for cap, sinks in ((None, False), (1.5, True)):
            given = draw(length, length, sinks)
            named = {"causal": causal, "scale": 0.3, "window": window, "soft_cap": cap}
            options = Options(causal, 0.3, window=window, soft_cap=cap)
            got = on_ranks(Ranks(size, monkeypatch), given, data, options, way=way)
            expect(got, want(given, data, named)[:5])


@pytest.mark.parametrize("way", SOFTMAX)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [24, 13, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sharded_documents(
    monkeypatch: pytest.MonkeyPatch, size: int, length: int, causal: bool, window: int | None, way: str
) -> None:
    """Borders inside, on and across shards."""
    for kind in DOCUMENTS:
        given, ids = draw(length, length, False), documents(kind, length)
        named = {"causal": causal, "scale": 0.3, "window": window}
        got = on_ranks(
            Ranks(size, monkeypatch), [*given, None, ids], None, Options(window=window, **how(named)), way=way
        )
        expect(got, want(given, None, named | {"documents": ids})[:5])


def how(named: dict[str, Any]) -> dict[str, Any]:
    return {name: named[name] for name in ("causal", "scale")}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_sends_edges(monkeypatch: pytest.MonkeyPatch, causal: bool, keep: bool) -> None:
    """Forward the neighbours' last window - 1 keys and values (and first, if not causal), backward their
    gradients; a window that reaches over a shard gathers all."""
    size, length, kd, vd = 3, 24, 4, 6
    given = draw(length, length, False)
    for window, tokens in ((4, 3 * (1 if causal else 2)), (1, 0), (10, 8)):
        ranks = Ranks(size, monkeypatch)
        on_ranks(ranks, given, None, Options(causal, 0.3, window=window), keep)
        moved = (size - 1) * 2 * 2 * tokens * (kd + vd) * 8
        back = ("reduce_scatter" if window == 10 else "all_gather", moved)
        wanted = [("all_gather", moved)] * (1 if keep else 2) + [back]
        assert ranks.log == (wanted if tokens else [])
