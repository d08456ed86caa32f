"""Operators that make tensors from nothing: constants, ranges and random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spcompile import collectives
from spcompile._torch import inductor_random, inductor_seed
from spcompile.placement import Replicate, Shard, local_shape
from spcompile.rules.base import Call, Context, Emit, Factors, Side, Split

__all__ = ["DRAW_STRIDE", "OneDraw", "Random", "full", "iota", "like", "random", "shared_seed"]

aten, prims = torch.ops.aten, torch.ops.prims


def _own_factors(call: Call) -> tuple[str, ...]:
    return tuple(f"d{i}" for i in range(call.outputs[0].dim()))


def full(call: Call) -> Factors:
    """A constant: any dim may be sharded."""

    def emit(split: Split) -> Emit:
        shape = list(local_shape(tuple(call.outputs[0].shape), split.outputs[0]))
        return lambda context, operands: call.op(shape, *call.args[1:], **call.kwargs)

    beyond = call.argument(1, "fill_value")
    return Factors(call, (), (_own_factors(call),), emit=emit, beyond=beyond, anywhere=True)


def like(call: Call) -> Factors:
    """new_empty_strided: memory of the operand's shape, of which nothing is said; no entry of it is read."""
    (x,), (out,) = call.operands, call.outputs
    dims = _own_factors(call)
    same = tuple(x.shape) == tuple(out.shape)

    def emit(split: Split) -> Emit:
        shape = local_shape(tuple(out.shape), split.outputs[0])
        return lambda context, operands: operands[0].new_empty(shape, dtype=out.dtype, device=out.device)

    return Factors(call, (dims if same else (None,) * x.dim(),), (dims,), emit=emit, anywhere=True)


def iota(call: Call) -> Factors:
    """start + step * index: a rank computes the indices it holds; padding repeats the nearest valid one."""
    start, step = call.kwargs.get("start", 0), call.kwargs.get("step", 1)

    def emit(split: Split) -> Emit:
        (shard,) = split.outputs
        assert isinstance(shard, Shard)

        def values(context: Context, operands: list[Tensor]) -> Tensor:
            index = context.flat_index(shard, call.kwargs["device"])
            return (start + step * index).to(call.kwargs["dtype"])

        return values

    return Factors(call, (), (_own_factors(call),), emit=emit)


# Distances between the streams of ranks and of draws, odd and large so that no two meet.
_RANK_STRIDE = 0x9E3779B97F4A7C15 >> 1
DRAW_STRIDE = 0xBF58476D1CE4E5B9 >> 2


@dataclass
class Random:
    """rand, randn: a sharded tensor draws other numbers on each rank, a whole one the same on all.

    Every graph draws one seed, which rank 0 gives to all: the ranks' own generators need not agree.
    """

    call: Call
    mode: str
    linear: tuple[frozenset[int], ...] = ()

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        return Split((), (shard,), (), self._draw(shard))

    def whole_emit(self) -> Emit:
        """The same numbers on every rank."""
        return self._draw(Replicate())

    def _draw(self, placement: Shard | Replicate) -> Emit:
        out = self.call.outputs[0]
        shape = local_shape(tuple(out.shape), placement)

        def draw(context: Context, operands: list[Tensor]) -> Tensor:
            seed = context.next_seed(out.device)
            if isinstance(placement, Shard):
                seed = seed + context.rank(out.device) * _RANK_STRIDE
            return inductor_random(shape, seed, self.mode).to(out.dtype)

        return draw


@dataclass
class OneDraw:
    """Any other operator that draws: it is drawn whole, and every rank takes what rank 0 has drawn."""

    call: Call
    linear: tuple[frozenset[int], ...] = ()

    def split(self, side: Side, index: int, shard: Shard) -> None:
        """See :class:`spcompile.rules.base.Rule`."""
        return

    def whole_emit(self) -> Emit:
        """Rank 0's result."""

        def of_rank_zero(context: Context, x: Tensor) -> Tensor:
            mine = context.rank(x.device) == 0
            sent = x.to(torch.uint8) if x.dtype == torch.bool else x
            return collectives.all_reduce(torch.where(mine, sent, torch.zeros_like(sent)), context.group).to(
                x.dtype
            )

        def draw(context: Context, operands: list[Tensor]) -> Any:
            drawn = self.call.run(operands)
            if isinstance(drawn, Tensor):
                return of_rank_zero(context, drawn)
            return tuple(of_rank_zero(context, x) for x in drawn)

        return draw


def random(mode: str) -> Callable[[Call], Random]:
    """The rule maker for a distribution that Inductor draws: "rand" or "randn"."""
    return lambda call: Random(call, mode)


def shared_seed(group: collectives.Group, device: torch.device) -> Tensor:
    """One seed per graph and call, rank 0's, 0-dim int64."""
    return collectives.all_gather(inductor_seed(device).reshape(1), group)[0, 0]
