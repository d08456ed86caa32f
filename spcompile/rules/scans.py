"""Operators along a dim whose entries need a carry from the ranks before: scan factors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import spcompile.attention  # noqa: F401  (registers the operators)
from spcompile import collectives
from spcompile.collectives import Sequence
from spcompile.placement import Replicate, Shard
from spcompile.rules.base import Call, Context, Emit, Factors, Side, Split, along
from spcompile.strategies import linear

__all__ = ["Cumsum", "StateScan", "reverse_cumsum"]

aten, ops = torch.ops.aten, torch.ops.spcompile


@torch.library.custom_op("spcompile::reverse_cumsum", mutates_args=())
def _reverse_cumsum(x: Tensor, dim: int) -> Tensor:
    """out[t] = sum of x[s] over s >= t along ``dim``; passes only, it is written out by its rule."""
    return x.flip(dim).cumsum(dim).flip(dim)


@_reverse_cumsum.register_fake
def _(x: Tensor, dim: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


reverse_cumsum = torch.ops.spcompile.reverse_cumsum.default


@dataclass
class Cumsum:
    """cumsum: a rank's own sums plus the totals of all before them, which one all-gather brings.

    Padding is zero, so behind the last valid entry the sums repeat it. A reverse_cumsum begins at the end:
    its totals are those of what lies behind. Where the batch is merged into the dim, a rank holds a part of
    each sequence.
    """

    call: Call
    linear: tuple[frozenset[int], ...] = (frozenset({0}),)

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        dim = self.call.argument(1, "dim") % max(self.call.operands[0].dim(), 1)
        if shard.dim != dim:
            split = along(self.call, {dim}).split(side, index, shard)
            return None if split is None else replace(split, emit=self.whole_emit())
        if shard.start != 0:
            return None

        def emit(context: Context, operands: list[Tensor]) -> Any:
            (x,) = operands
            parts = x.unflatten(dim, (shard.outer, shard.block))
            own = self._run([parts], dim + 1)
            return (own + self._carry(context, own, dim)).flatten(dim, dim + 1)

        return Split((shard,), (shard,), (0.0,), emit)

    def _carry(self, context: Context, own: Tensor, dim: int) -> Tensor:
        """What comes before (or, backwards, behind) each of this rank's parts, [..., outer, 1, ...].

        ``own`` are the sums of the parts, [..., outer, block, ...]; a part's last is its total. The parts of
        all ranks stand in the order outer, rank.
        """
        ranks, (outer, block) = context.group.size, own.shape[dim : dim + 2]
        backwards = self.call.op is reverse_cumsum
        totals = own.select(dim + 1, 0 if backwards else block - 1)
        flat = collectives.all_gather(totals, context.group).movedim(0, dim + 1).flatten(dim, dim + 1)
        nothing = torch.zeros_like(flat.narrow(dim, 0, 1))
        if backwards:
            sums = torch.cat([flat.narrow(dim, 1, flat.shape[dim] - 1), nothing], dim)
            sums = sums.flip(dim).cumsum(dim, dtype=own.dtype).flip(dim)
        else:
            sums = torch.cat([nothing, flat.narrow(dim, 0, flat.shape[dim] - 1)], dim)
            sums = sums.cumsum(dim, dtype=own.dtype)
        mine = torch.arange(outer, device=own.device) * ranks + context.rank(own.device)
        return sums[(slice(None),) * dim + (mine,)].unsqueeze(dim + 1)

    def whole_emit(self) -> Emit:
        """The sums without a carry."""
        return lambda context, operands: self._run(operands, self.call.args[1])

    def _run(self, operands: list[Tensor], dim: int) -> Any:
        (x,) = operands
        if self.call.op is reverse_cumsum:
            return x.flip(dim).cumsum(dim).flip(dim)
        return x.cumsum(dim, **self.call.kwargs)


@dataclass
class StateScan:
    """affine_scan, max_scan: steps are sharded, summaries exchanged; other dims pass, but a matrix's."""

    call: Call
    linear: tuple[frozenset[int], ...] = ()

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        a, b, initial = self.call.args[:3]
        matrix = self._matrix
        names = tuple(f"d{i}" for i in range(b.dim()))
        state = (*names[:-3], *names[-2:])
        of_a = () if a is None else tuple(n if s != 1 else None for n, s in zip(names, a.shape, strict=True))
        if matrix:
            of_a = (*names[:-1], "whole")
        dims = [d for x, d in ((a, of_a), (b, names), (initial, state)) if x is not None]
        whole = frozenset({"whole", names[-2]} if matrix else ())
        steps = names[-3]

        def emit(split: Split) -> Emit:
            placed = split.outputs[0]
            return self._emit(placed if isinstance(placed, Shard) and placed.dim == b.dim() - 3 else None)

        ours = (dims if side == "in" else [names, state])[index][shard.dim] == steps
        if ours and (shard.start or shard.outer != 1):
            return None
        # The final state has no steps and is whole on every rank, so it is no sum.
        factors = Factors(self.call, tuple(dims), (names, state), whole, mixed=True, emit=emit)
        split = factors.split(side, index, shard)
        if split is None or isinstance(split.outputs[1], Shard):
            return split
        return Split(split.inputs, (split.outputs[0], Replicate()), (None,) * len(dims), split.emit)

    @property
    def _matrix(self) -> bool | None:
        """As :func:`spcompile.strategies.linear.scan` has it: None for a running maximum."""
        return self.call.args[3] if self.call.op is ops.affine_scan.default else None

    @property
    def _reverse(self) -> bool:
        return self.call.argument(3 if self._matrix is None else 4, "reverse", False)

    def whole_emit(self) -> Emit:
        """The lowering for one rank: no collective."""
        return self._emit(None)

    def _emit(self, shard: Shard | None) -> Emit:
        given = [x is not None for x in self.call.args[:3]]
        matrix, reverse = self._matrix, self._reverse

        def emit(context: Context, operands: list[Tensor]) -> Any:
            sequence = None if shard is None else Sequence(context.group, shard.block, shard.length)
            fresh = iter(operands)
            a, b, initial = (next(fresh) if there else None for there in given)
            assert b is not None
            start = context.linear
            return linear.scan(a, b, initial, matrix=matrix, reverse=reverse, sequence=sequence, start=start)

        return emit
