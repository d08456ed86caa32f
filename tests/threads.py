"""P threads as the ranks of a strategy, and tensors cut into their shards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from spcompile import collectives
from spcompile.attention import softmax
from spcompile.collectives import Group, Sequence

__all__ = ["Ranks", "close", "operands", "reference_gradients", "shards", "whole"]


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
        monkeypatch.setattr(softmax, "current_rank", lambda group: self._here.rank)
        monkeypatch.setattr(collectives, "start_all_gather", self._gather)
        monkeypatch.setattr(collectives, "start_shift", self._shift)
        monkeypatch.setattr(collectives, "finish", lambda started, shape: started.reshape(shape))
        monkeypatch.setattr(collectives, "all_reduce", self._reduce)
        monkeypatch.setattr(collectives, "reduce_scatter", self._scatter)
        monkeypatch.setattr(collectives, "all_to_all", self._exchange)

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

    def _shift(self, x: Tensor, by: int, group: Group, after: Tensor | None = None) -> Tensor:
        self._note("shift", 1, x)
        return self._meet(x)[(self._here.rank - by) % self.size].reshape(-1)

    def _reduce(self, x: Tensor, group: Group, op: str = "sum") -> Tensor:
        self._note("all_reduce", 1, x)
        return sum(self._meet(x))

    def _exchange(self, x: Tensor, group: Group) -> Tensor:
        self._note("all_to_all", self.size - 1, x[0])
        return torch.stack([y[self._here.rank] for y in self._meet(x)])

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
