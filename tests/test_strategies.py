"""Strategies on P ranks simulated by threads, against the token-by-token references in float64."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from spcompile import collectives
from spcompile.attention import ops, reference
from spcompile.collectives import Group, Sequence
from spcompile.strategies import LINEAR, SOFTMAX

RANKS = (1, 2, 3, 4, 8)
# Divisible by every P, by none, and fewer tokens than ranks; 200 has several chunks per rank.
LENGTHS = (24, 13, 5, 200)


class Ranks:
    """P threads that are the ranks: the collectives meet at a barrier, and rank 0's are recorded.

    ``log`` holds (collective, bytes that a rank receives), counting only what comes from other ranks.
    """

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self.log = size, []
        self._here = threading.local()
        self._barrier = threading.Barrier(size, timeout=30)
        self._slots: list[Any] = [None] * size
        monkeypatch.setattr(collectives, "rank", lambda group, device: torch.tensor(self._here.rank))
        monkeypatch.setattr(ops, "current_rank", lambda group: self._here.rank)
        monkeypatch.setattr(collectives, "start_all_gather", self._gather)
        monkeypatch.setattr(collectives, "finish", lambda started, shape: started.reshape(shape))
        monkeypatch.setattr(collectives, "all_reduce", self._reduce)
        monkeypatch.setattr(collectives, "reduce_scatter", self._scatter)

    def sequence(self, length: int) -> Sequence:
        return Sequence(Group(self.size, "simulated"), -(-length // self.size), length)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """``function(rank)`` on every rank."""

        def work(rank: int) -> Any:
            self._here.rank = rank
            try:
                return function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(work, rank) for rank in range(self.size)]
        errors = [f.exception() for f in futures if f.exception() is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [f.result() for f in futures]

    def _meet(self, x: Tensor) -> list[Tensor]:
        self._slots[self._here.rank] = x
        self._barrier.wait()
        everyone = list(self._slots)
        self._barrier.wait()
        return everyone

    def _note(self, name: str, entries: int, x: Tensor) -> None:
        if self._here.rank == 0:
            self.log.append((name, entries * x.numel() * x.element_size()))

    def _gather(self, x: Tensor, group: Group) -> Tensor:
        self._note("all_gather", self.size - 1, x)
        return torch.stack([y.reshape(-1) for y in self._meet(x)])

    def _reduce(self, x: Tensor, group: Group, op: str = "sum") -> Tensor:
        self._note("all_reduce", 1, x)
        return sum(self._meet(x))

    def _scatter(self, x: Tensor, group: Group) -> Tensor:
        self._note("reduce_scatter", self.size - 1, x[0])
        rank = self._here.rank
        return sum(y[rank] for y in self._meet(x))


def shards(x: Tensor, sequence: Sequence, dim: int = 2) -> list[Tensor]:
    """Each rank's tokens; what is not there is NaN, so that whatever it reaches shows."""
    size, block = sequence.group.size, sequence.block
    shape = list(x.shape)
    shape[dim] = size * block - sequence.length
    fill = True if x.dtype == torch.bool else float("nan")
    return list(torch.cat([x, x.new_full(shape, fill)], dim).split(block, dim))


def whole(parts: list[Tensor], sequence: Sequence, dim: int = 2) -> Tensor:
    return torch.cat(parts, dim).narrow(dim, 0, sequence.length)


def close(got: Tensor, want: Tensor, bound: float = 1e-9) -> None:
    """Equal to ``bound`` relative to the largest entry."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    got, want = (torch.where(x == -torch.inf, 0.0, x) for x in (got, want))
    assert got.isfinite().all()
    assert (got - want).abs().max() <= bound * want.abs().max()


def operands(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def reference_gradients(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def sharded_linear(
    ranks: Ranks, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, keep: bool = True
) -> tuple[Tensor, ...]:
    strategy, sequence = LINEAR["allgather"], ranks.sequence(q.shape[2])
    parts = [shards(x, sequence) for x in (grad, q, k, v)]
    options: dict[str, Any] = dict(causal=causal, scale=0.3, sequence=sequence)

    def work(rank: int) -> tuple[Tensor, ...]:
        g, q, k, v = (p[rank] for p in parts)
        out, carry = strategy.linear_forward(q, k, v, **options)
        return out, *strategy.linear_backward(g, q, k, v, carry if keep else None, **options)

    return tuple(whole(list(p), sequence) for p in zip(*ranks.run(work), strict=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("size", RANKS)
def test_linear_is_exact(monkeypatch: pytest.MonkeyPatch, size: int, length: int, causal: bool) -> None:
    q, k, v, grad = operands((2, 3, length, 4), (2, 3, length, 4), (2, 3, length, 6), (2, 3, length, 6))
    got = sharded_linear(Ranks(size, monkeypatch), grad, q, k, v, causal)
    want = reference_gradients(lambda *x: reference.linear_attention(*x, causal, 0.3), grad, q, k, v)
    for x, y in zip(got, want, strict=True):
        close(x, y)


@pytest.mark.parametrize("causal", [True, False])
def test_linear_backward_without_carry(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    q, k, v, grad = operands(*[(1, 2, 13, 4)] * 4)
    kept = sharded_linear(Ranks(3, monkeypatch), grad, q, k, v, causal)
    again = sharded_linear(Ranks(3, monkeypatch), grad, q, k, v, causal, keep=False)
    for x, y in zip(kept, again, strict=True):
        close(x, y)


def test_linear_without_sequence_has_no_collectives() -> None:
    q, k, v, grad = operands(*[(1, 2, 70, 4)] * 4)
    options: dict[str, Any] = dict(causal=True, scale=0.3, sequence=None)
    out, carry = LINEAR["allgather"].linear_forward(q, k, v, **options)
    got = (out, *LINEAR["allgather"].linear_backward(grad, q, k, v, carry, **options))
    want = reference_gradients(lambda *x: reference.linear_attention(*x, True, 0.3), grad, q, k, v)
    for x, y in zip(got, want, strict=True):
        close(x, y)


@pytest.mark.parametrize("length", [64, 1000])
@pytest.mark.parametrize("size", [2, 4])
def test_linear_collectives(monkeypatch: pytest.MonkeyPatch, size: int, length: int) -> None:
    """One all-gather each way of (P-1) B H K V 4 bytes whatever the length and the inputs' dtype."""
    b, h, kd, vd = 2, 3, 4, 6
    shapes = (b, h, length, kd), (b, h, length, kd), (b, h, length, vd), (b, h, length, vd)
    q, k, v, grad = operands(*shapes, dtype=torch.bfloat16)
    ranks = Ranks(size, monkeypatch)
    sharded_linear(ranks, grad, q, k, v, causal=True)
    assert ranks.log == [("all_gather", (size - 1) * b * h * kd * vd * 4)] * 2
    ranks = Ranks(size, monkeypatch)
    sharded_linear(ranks, grad, q, k, v, causal=False)
    assert ranks.log == [("all_reduce", b * h * kd * vd * 4)] * 2


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_linear_low_precision(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bound: float) -> None:
    """Ratio of the RMS error to the RMS value; bfloat16 itself rounds by up to 2^-9 = 2e-3."""
    q, k, v, grad = operands(*[(1, 2, 300, 16)] * 4, dtype=dtype)
    got = sharded_linear(Ranks(3, monkeypatch), grad, q, k, v, causal=True)
    want = reference_gradients(
        lambda *x: reference.linear_attention(*x, True, 0.3), *(x.double() for x in (grad, q, k, v))
    )
    for x, y in zip(got, want, strict=True):
        assert x.dtype == dtype
        assert (x.double() - y).norm() / y.norm() <= bound


# ---- softmax ----


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
) -> tuple[Tensor, ...]:
    strategy = SOFTMAX["allgather"]
    rows, columns = ranks.sequence(q.shape[2]), ranks.sequence(k.shape[2])
    grads, queries = shards(grad, rows), shards(q, rows)
    keys, values = ([x] * ranks.size if kv_whole else shards(x, columns) for x in (k, v))
    masks = [mask] * ranks.size if mask is None or mask.shape[-2] == 1 else shards(mask, rows, mask.dim() - 2)
    options: dict[str, Any] = dict(
        causal=causal, scale=0.3, q_sequence=rows, kv_sequence=None if kv_whole else columns
    )

    def work(rank: int) -> tuple[Tensor, ...]:
        q, k, v, mask = queries[rank], keys[rank], values[rank], masks[rank]
        out, lse, kv = strategy.softmax_forward(q, k, v, mask, **options)
        kv = kv if keep else None
        return out, lse, *strategy.softmax_backward(grads[rank], q, k, v, mask, out, lse, kv, **options)

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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [24, 13, 5])
@pytest.mark.parametrize("size", RANKS)
def test_softmax_is_exact(monkeypatch: pytest.MonkeyPatch, size: int, length: int, causal: bool) -> None:
    """With grouped key heads, and values wider than keys."""
    q, k, v, grad = operands((2, 4, length, 4), (2, 2, length, 4), (2, 2, length, 6), (2, 4, length, 6))
    got = sharded_softmax(Ranks(size, monkeypatch), grad, q, k, v, causal=causal)
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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", [1, 3])
def test_softmax_masks(monkeypatch: pytest.MonkeyPatch, size: int, kind: str, causal: bool) -> None:
    q, k, v, grad = operands((2, 4, 13, 4), (2, 2, 13, 4), (2, 2, 13, 4), (2, 4, 13, 4))
    mask = make_mask(kind, 13, 13)
    got = sharded_softmax(Ranks(size, monkeypatch), grad, q, k, v, mask, causal)
    expect_softmax(got, grad, q, k, v, mask, causal)


@pytest.mark.parametrize("kv_whole", [True, False])
@pytest.mark.parametrize("keys", [7, 20])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["", "rows-bool", "causal"])
def test_cross_attention(
    monkeypatch: pytest.MonkeyPatch, size: int, keys: int, kind: str, kv_whole: bool
) -> None:
    """Keys and values on another sequence, or whole on every rank (then dk and dv are terms of a sum)."""
    q, k, v, grad = operands((1, 2, 13, 4), (1, 1, keys, 4), (1, 1, keys, 4), (1, 2, 13, 4))
    causal = kind == "causal"
    mask = make_mask(kind, 13, keys) if kind and not causal else None
    got = sharded_softmax(Ranks(size, monkeypatch), grad, q, k, v, mask, causal, kv_whole=kv_whole)
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


def test_whole_queries_sharded_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank computes all queries: the gradients of keys are whole already and must not be summed."""
    q, k, v, grad = operands((1, 2, 6, 4), (1, 2, 13, 4), (1, 2, 13, 4), (1, 2, 6, 4))
    ranks = Ranks(3, monkeypatch)
    columns = ranks.sequence(13)
    keys, values = shards(k, columns), shards(v, columns)
    options: dict[str, Any] = dict(causal=False, scale=0.3, q_sequence=None, kv_sequence=columns)

    def work(rank: int) -> tuple[Tensor, ...]:
        args = (q, keys[rank], values[rank], None)
        out, lse, kv = SOFTMAX["allgather"].softmax_forward(*args, **options)
        return out, lse, *SOFTMAX["allgather"].softmax_backward(grad, *args, out, lse, kv, **options)

    out, lse, dq, dk, dv = zip(*ranks.run(work), strict=True)
    got = (out[1], lse[1], dq[1], whole(list(dk), columns), whole(list(dv), columns))
    expect_softmax(got, grad, q, k, v, None, False)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_softmax_low_precision(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bound: float) -> None:
    q, k, v, grad = operands(*[(1, 2, 100, 16)] * 4, dtype=dtype)
    got = sharded_softmax(Ranks(3, monkeypatch), grad, q, k, v, causal=True)
    want = reference_gradients(
        lambda *x: reference.softmax_attention(*x, None, True, 0.3)[0],
        *(x.double() for x in (grad, q, k, v)),
    )
    for x, y in zip((got[0], *got[2:]), want, strict=True):
        assert x.dtype == dtype
        assert (x.double() - y).norm() / y.norm() <= bound


def test_ranks_work_for_their_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank r's kernel calls cover r * block past keys and the block's own triangle, and nothing later."""
    from spcompile.kernels.softmax import fused_cpu

    seen: dict[int, set[tuple[int, int, bool]]] = {}
    real = fused_cpu._parts

    def spy(keys: int, rows: int, causal: bool, first_row: int) -> list[tuple[int, int, bool]]:
        parts = real(keys, rows, causal, first_row)
        seen.setdefault(first_row, set()).update(parts)
        return parts

    monkeypatch.setattr(fused_cpu, "_parts", spy)
    q, k, v, grad = operands(*[(1, 1, 13, 4)] * 4)
    sharded_softmax(Ranks(3, monkeypatch), grad, q, k, v, causal=True)
    assert seen == {
        0: {(0, 5, True)},
        5: {(0, 5, False), (5, 10, True)},
        10: {(0, 10, False), (10, 13, True)},
    }
