"""The brute-force checker of rules in a sort's order: real tensors, put in order and cut by plain indexing.

It shares no code with the rules; padding is NaN, or what the split asks for.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from rule_checker import REDUCE, WrongRule, _outs, _same, cut, terms_of
from torch import Tensor

from spcompile import collectives
from spcompile.placement import Order, Partial, Placement, Routed, Shard, Unread
from spcompile.rules import Call, Context, Split

__all__ = ["Sorted", "check_split"]


class Sorted:
    """A sort of ``ids``, whole and on each of some ranks, which have the slots that ``slots`` gives them."""

    def __init__(self, ids: Tensor, slots: Shard, ranks: int, descending: bool = False) -> None:
        self.ids, self.slots, self.ranks = ids, slots, ranks
        self.routed = Routed(Order("sort", "ids"), slots)
        self.order = ids.argsort(stable=True, descending=descending)
        numbers = torch.arange(ids.shape[0])
        last = -(10**6) if descending else 10**6
        self.held = [cut(numbers, slots, r) for r in range(ranks)]  # padding: the nearest slot
        self.valid = [cut(numbers, slots, r, -1) >= 0 for r in range(ranks)]
        keys = [torch.where(v, ids[h], last) for v, h in zip(self.valid, self.held, strict=True)]
        self.own = [k.argsort(stable=True, descending=descending) for k in keys]
        self.keys = [k[o] for k, o in zip(keys, self.own, strict=True)]

    def entries(self, rank: int) -> tuple[Tensor, Tensor]:
        """Of each entry that a rank has in order: its place in the order of all, and whether it is valid."""
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(self.order))
        return places[self.held[rank]][self.own[rank]], self.valid[rank][self.own[rank]]

    def cut(self, x: Tensor, dim: int, rank: int, fill: float | None) -> Tensor:
        """A rank's part of ``x``, which is in the order of all."""
        places, valid = self.entries(rank)
        part = x.index_select(dim, places)
        fill = torch.nan if fill is None and x.is_floating_point() else fill
        shape = [-1 if d == dim else 1 for d in range(x.dim())]
        return part if fill is None else torch.where(valid.reshape(shape), part, fill).to(x.dtype)

    def context(self) -> Context:
        """One that knows the rank's order; inside a simulated rank."""
        rank, context = collectives._simulated_rank[-1], Context(collectives.Group(self.ranks, "checked"))
        context.note_route(self.routed, self.keys[rank], self.own[rank])
        return context


def _locals(x: Tensor, placement: Placement, sort: Sorted, fill: float | None) -> list[Any]:
    ranks = range(sort.ranks)
    if isinstance(placement, Routed):
        parts = [sort.cut(x, placement.dim, r, fill) for r in ranks]
        # A kernel may ask that columns stay next to each other, where they are so in the whole.
        return [p.t().contiguous().t() for p in parts] if x.dim() == 2 and x.stride(0) == 1 else parts
    if isinstance(placement, Shard):
        return [cut(x, placement, r, fill) for r in ranks]
    if isinstance(placement, Partial):
        return terms_of(x, sort.ranks)
    return [None if isinstance(placement, Unread) else x for _ in ranks]


def _wrong(xs: list[Tensor], placement: Placement, whole: Tensor, sort: Sorted, tolerance: float) -> str:
    if isinstance(placement, Partial):
        total = reduce(REDUCE[placement.op], xs)
        return "" if _same(total, whole, tolerance) else f"the terms are {total}, not {whole}"
    for rank, x in enumerate(xs):
        want = _locals(whole, placement, sort, None)[rank]
        dim = placement.dim if isinstance(placement, (Shard, Routed)) else 0
        if isinstance(placement, Routed):
            keep = sort.entries(rank)[1]
        elif isinstance(placement, Shard):
            keep = cut(torch.arange(whole.shape[dim]), placement.at(0), rank, -1) >= 0
        else:
            keep = torch.ones(whole.shape[0], dtype=torch.bool) if whole.dim() else torch.tensor(True)
        at = torch.nonzero(keep).reshape(-1)
        got, want = (x, want) if not whole.dim() else (x.index_select(dim, at), want.index_select(dim, at))
        if not _same(got, want, tolerance):
            return f"rank {rank} under {placement}: {got}, not {want}"
    return ""


def check_split(call: Call, split: Split, sort: Sorted, tolerance: float = 1e-12) -> None:
    """Run a split on every rank and compare with the whole.

    Raises:
        WrongRule: says what differs.
    """
    given = zip(call.operands, split.inputs, split.fills, strict=True)
    operands = [_locals(x, p, sort, fill) for x, p, fill in given]
    results = []
    for rank in range(sort.ranks):
        collectives._simulated_rank.append(rank)
        try:
            results.append(_outs(split.emit(sort.context(), [x[rank] for x in operands])))
        finally:
            collectives._simulated_rank.pop()
    for i, (xs, placement, whole) in enumerate(zip(zip(*results), split.outputs, call.outputs, strict=True)):
        if whole is not None:
            wrong = _wrong(list(xs), placement, whole, sort, tolerance)
            if wrong:
                raise WrongRule(f"{call.op}, {split.inputs} -> {split.outputs}, output {i}: {wrong}")
