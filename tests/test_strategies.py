"""The softmax strategies on P ranks simulated by threads, against the token-by-token reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spcompile.attention import reference
from spcompile.kernels.softmax.operands import Operands, Options
from spcompile.strategies import SOFTMAX
from tests.threads import Ranks, close, operands, reference_gradients, shards, whole

RANKS = (1, 2, 3, 4, 8)
every_way = pytest.mark.parametrize("way", SOFTMAX)


def sharded_softmax(
    ranks: Ranks,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    keep: bool = True,
    kv_whole: bool = False,
    way: str = "allgather",
) -> tuple[Tensor, ...]:
    strategy = SOFTMAX[way].load()
    rows, columns = ranks.sequence(q.shape[2]), ranks.sequence(k.shape[2])
    grads, queries = shards(grad, rows), shards(q, rows)
    keys, values = ([x] * ranks.size if kv_whole else shards(x, columns) for x in (k, v))
    masks = [mask] * ranks.size if mask is None or mask.shape[-2] == 1 else shards(mask, rows, mask.dim() - 2)
    of_keys = None if kv_whole else columns
    how = Options(causal, 0.3), rows, of_keys

    def work(rank: int) -> tuple[Tensor, ...]:
        x = Operands(queries[rank], keys[rank], values[rank], masks[rank])
        out, lse, kv = strategy.forward(x, *how)
        kv = kv if keep else strategy.gather(x, *how)
        return out, lse, *strategy.backward(grads[rank], x, out, lse, kv, *how)

    out, lse, dq, dk, dv = (list(x) for x in zip(*ranks.run(work), strict=True))
    if kv_whole:
        return whole(out, rows), whole(lse, rows), whole(dq, rows), sum(dk), sum(dv)
    return whole(out, rows), whole(lse, rows), whole(dq, rows), whole(dk, columns), whole(dv, columns)


def expect_softmax(
    got: tuple[Tensor, ...], grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool
) -> None:
    want = reference_gradients(
        lambda *x: reference.softmax_attention(*x, mask, causal, 0.3)[0], grad, q, k, v
    )
    close(got[1], reference.softmax_attention(q, k, v, mask, causal, 0.3)[1])
    for x, y in zip((got[0], *got[2:]), want, strict=True):
        close(x, y)


@every_way
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [24, 13, 5])
@pytest.mark.parametrize("size", RANKS)
def test_softmax_is_exact(
    monkeypatch: pytest.MonkeyPatch, size: int, length: int, causal: bool, way: str
) -> None:
    """With grouped key heads, and values wider than keys."""
    q, k, v, grad = operands((2, 4, length, 4), (2, 2, length, 4), (2, 2, length, 6), (2, 4, length, 6))
    got = sharded_softmax(Ranks(size, monkeypatch), grad, q, k, v, causal=causal, way=way)
    expect_softmax(got, grad, q, k, v, None, causal)


def make_mask(kind: str, length: int, keys: int) -> Tensor:
    torch.manual_seed(1)
    shape = {"rows": (length, keys), "heads": (2, 4, length, keys), "keys": (2, 1, 1, keys)}
    name, _, dtype = kind.partition("-")
    if dtype == "bool":
        return torch.rand(shape[name]) < 0.6
    if dtype == "inf":
        return torch.where(torch.rand(shape[name]) < 0.3, -torch.inf, 0.0).double()
    if dtype == "min":  # the third row sees no key, as HF writes it: its weights are uniform
        mask = torch.zeros(shape[name], dtype=torch.float64)
        mask[..., 2:3, :] = torch.finfo(torch.float32).min
        return mask
    return torch.randn(shape[name], dtype=torch.float64)


MASKS = (
    "rows-float", "rows-bool", "rows-inf", "rows-min", "heads-float", "heads-bool", "keys-bool", "keys-float",
)  # fmt: skip


@every_way
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", [1, 3])
def test_softmax_masks(monkeypatch: pytest.MonkeyPatch, size: int, kind: str, causal: bool, way: str) -> None:
    q, k, v, grad = operands((2, 4, 13, 4), (2, 2, 13, 4), (2, 2, 13, 4), (2, 4, 13, 4))
    mask = make_mask(kind, 13, 13)
    got = sharded_softmax(Ranks(size, monkeypatch), grad, q, k, v, mask, causal, way=way)
    expect_softmax(got, grad, q, k, v, mask, causal)


@every_way
@pytest.mark.parametrize("kv_whole", [True, False])
@pytest.mark.parametrize("keys", [7, 20])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["", "rows-bool", "causal"])
def test_cross_attention(
    monkeypatch: pytest.MonkeyPatch, size: int, keys: int, kind: str, kv_whole: bool, way: str
) -> None:
    """Keys and values on another sequence, or whole on every rank (then dk and dv are terms of a sum)."""
    q, k, v, grad = operands((1, 2, 13, 4), (1, 1, keys, 4), (1, 1, keys, 4), (1, 2, 13, 4))
    causal = kind == "causal"
    mask = make_mask(kind, 13, keys) if kind and not causal else None
    got = sharded_softmax(Ranks(size, monkeypatch), grad, q, k, v, mask, causal, kv_whole=kv_whole, way=way)
    expect_softmax(got, grad, q, k, v, mask, causal)


@pytest.mark.parametrize("keep", [True, False])
def test_softmax_collectives(monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    """One packed all-gather forward (one more if it was not kept) and one reduce-scatter backward."""
    size, b, heads, length, kd, vd = 3, 2, 2, 13, 4, 6
    q, k, v, grad = operands(
        (b, 4, length, kd), (b, heads, length, kd), (b, heads, length, vd), (b, 4, length, vd)
    )
    ranks = Ranks(size, monkeypatch)
    got = sharded_softmax(ranks, grad, q, k, v, causal=True, keep=keep)
    expect_softmax(got, grad, q, k, v, None, True)
    moved = (size - 1) * b * heads * 5 * (kd + vd) * 8
    assert ranks.log == [("all_gather", moved)] * (1 if keep else 2) + [("reduce_scatter", moved)]


@pytest.mark.parametrize("window", [None, 2, 6, 7])
def test_ring(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """As many steps as a causal row sees ranks; gradients walk with their keys, and home in one step more."""
    size, b, heads, length, kd, vd = 4, 2, 2, 19, 4, 6
    shapes = (b, 4, length, kd), (b, heads, length, kd), (b, heads, length, vd), (b, 4, length, vd)
    sequence = (ranks := Ranks(size, monkeypatch)).sequence(length)
    q, k, v, grad = (shards(x, sequence) for x in operands(*shapes))
    how, strategy = (Options(True, 0.3, window=window), sequence, sequence), SOFTMAX["ring"].load()

    def work(rank: int) -> tuple[Tensor, ...]:
        x = Operands(q[rank], k[rank], v[rank])
        out, lse, kv = strategy.forward(x, *how)
        assert kv is None
        return strategy.backward(grad[rank], x, out, lse, kv, *how)

    ranks.run(work)
    steps, moved = {None: 3, 2: 1, 6: 1, 7: 2}[window], b * heads * 5 * (kd + vd) * 8
    assert ranks.log == [("shift", moved)] * (steps + 2 * steps + 1)


@pytest.mark.parametrize("keep", [True, False])
def test_all_to_all(monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    """Heads that ranks share out: there, and the rows back; backward rows there, and gradients back."""
    size, b, h, heads, length, kd, vd = 2, 2, 4, 2, 13, 4, 6
    q, k, v, grad = operands(
        (b, h, length, kd), (b, heads, length, kd), (b, heads, length, vd), (b, h, length, vd)
    )
    ranks = Ranks(size, monkeypatch)
    got = sharded_softmax(ranks, grad, q, k, v, causal=True, keep=keep, way="alltoall")
    expect_softmax(got, grad, q, k, v, None, True)
    received = b * 7 * 8 * (size - 1) // size  # of one number a token
    there, back = (received * (h * kd + heads * (kd + vd)), received * h * (vd + 1))
    rows = received * h * (2 * vd + 1)
    moved = [there, back, *[there] * (not keep), rows, there]
    assert ranks.log == [("all_to_all", n) for n in moved]


def test_whole_queries_sharded_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank computes all queries: the gradients of keys are whole already and must not be summed."""
    q, k, v, grad = operands((1, 2, 6, 4), (1, 2, 13, 4), (1, 2, 13, 4), (1, 2, 6, 4))
    ranks = Ranks(3, monkeypatch)
    columns = ranks.sequence(13)
    keys, values = shards(k, columns), shards(v, columns)
    strategy, how = SOFTMAX["allgather"].load(), (Options(False, 0.3), None, columns)

    def work(rank: int) -> tuple[Tensor, ...]:
        x = Operands(q, keys[rank], values[rank])
        out, lse, kv = strategy.forward(x, *how)
        return out, lse, *strategy.backward(grad, x, out, lse, kv, *how)

    out, lse, dq, dk, dv = zip(*ranks.run(work), strict=True)
    got = (out[1], lse[1], dq[1], whole(list(dk), columns), whole(list(dv), columns))
    expect_softmax(got, grad, q, k, v, None, False)


@every_way
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_softmax_low_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bound: float, way: str
) -> None:
    q, k, v, grad = operands(*[(1, 2, 100, 16)] * 4, dtype=dtype)
    got = sharded_softmax(Ranks(3, monkeypatch), grad, q, k, v, causal=True, way=way)
    want = reference_gradients(
        lambda *x: reference.softmax_attention(*x, None, True, 0.3)[0],
        *(x.double() for x in (grad, q, k, v)),
    )
    for x, y in zip((got[0], *got[2:]), want, strict=True):
        assert x.dtype == dtype
        assert (x.double() - y).norm() / y.norm() <= bound


def test_ranks_work_for_their_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank r's kernel calls cover r * block past keys and the block's own triangle, and nothing later."""
    from spcompile.kernels.softmax import flash

    seen: dict[int, set[tuple[int, int, bool]]] = {}
    real = flash._parts

    def spy(x: Operands, options: Options) -> list[tuple[int, int, bool]]:
        parts = real(x, options)
        seen.setdefault(options.first_row, set()).update(parts)
        return parts

    monkeypatch.setattr(flash, "_parts", spy)
    q, k, v, grad = operands(*[(1, 1, 13, 4)] * 4)
    sharded_softmax(Ranks(3, monkeypatch), grad, q, k, v, causal=True)
    assert seen == {
        0: {(0, 5, True)},
        5: {(0, 5, False), (5, 10, True)},
        10: {(0, 10, False), (10, 13, True)},
    }
