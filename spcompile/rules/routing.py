"""Experts: tokens that a sort by expert puts in another order, on each rank its own (docs/design_notes.md).

A sort of the slots (a token has one for each expert that it is sent to) gives a ``Routed`` placement. Rows
taken in that order, the grouped products on them, and the way back are then each rank's own; what acts on
each entry by itself in between passes by its usual rule. That an index tensor is this order, its inverse, or
the ends of its groups is proved in ``passes/shard/routes.py`` and given to the rule as ``Call.known``: its
entries count the slots of all ranks, so a rank reads its own order in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spcompile.placement import Order, Partial, Placement, Replicate, Routed, Shard, Sharding, Unread
from spcompile.rules import indexing, reductions
from spcompile.rules.base import Call, Context, Factors, Rule, Side, Split

__all__ = [
    "Ends",
    "Places",
    "Rows",
    "gather",
    "grouped_mm",
    "grouped_mm_with_gradients",
    "histogram",
    "index",
    "index_put",
    "scatter_add",
    "sort",
]

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """Entry i along dim 0 is slot // per of the i-th slot in the order; along other dims all are the same."""

    order: Order
    per: int


@dataclass(frozen=True)
class Places:
    """The inverse: entry s along dim 0 is where the order puts slot s; along other dims all are the same."""

    order: Order


@dataclass(frozen=True)
class Ends:
    """Entry e is how many of ``ids`` are <= e: where the group of e ends once they are sorted."""

    ids: str


# ------------------------------------------------------------------------------------------------- sorts


@dataclass
class Sort:
    """A sort of slots by integers: each rank sorts those that it holds, padding last."""

    call: Call
    order: Order
    linear: tuple[frozenset[int], ...] = ()
    orders = True
    lazy = True

    def split(self, side: Side, index: int, shard: Sharding) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        if isinstance(shard, Routed):
            if side == "in" or shard.order != self.order:
                return None
            shard = shard.slots
        elif side == "out":
            return None
        if shard.start != 0:
            return None
        routed = Routed(self.order, shard)

        def emit(context: Context, operands: list[Tensor]) -> Any:
            (ids,) = operands
            padded = shard.padded(context.group.size)
            last = torch.iinfo(ids.dtype).min if _descending(self.call) else torch.iinfo(ids.dtype).max
            keys = context.where_valid(ids, shard, last) if padded else ids
            ascending, slots = self.call.run([keys])
            context.note_route(routed, ascending, slots)
            # What stands in padding may be used as an index, so it is an id that there is.
            values = ids[slots] if padded else ascending
            return values, context.flat_index(shard, ids.device)[slots]

        return Split((shard,), (routed, routed), (None,), emit)


def _descending(call: Call) -> bool:
    names = [a.name for a in call.op._schema.arguments]
    return bool(call.argument(names.index("descending"), "descending", False))


@dataclass
class Inverse:
    """What gives the places of an order: of use on a rank as an index only, which reads the rank's own."""

    call: Call
    linear: tuple[frozenset[int], ...] = ()
    lazy = True

    def split(self, side: Side, index: int, shard: Sharding) -> None:
        """See :class:`spcompile.rules.base.Rule`."""
        return


def sort(call: Call) -> Rule:
    """Along a dim that is needed whole, the others pass; slots are sorted by each rank for itself."""
    if isinstance(call.makes, Places):
        return Inverse(call)
    return Sort(call, call.makes) if isinstance(call.makes, Order) else reductions.rowwise(call)


# ---------------------------------------------------------------------------- rows by an order, and back


@dataclass
class Along:
    """Rows of x taken, or values put into rows of x, at an index that is known: each rank by its own order.

    By ``Rows`` the rows of tokens are taken in the sort's order, or what is in that order is put (or added)
    to them. By ``Places`` it is the other way round. ``at`` is the operand that is the index; ``taken``: the
    result has the index's dim 0, else the last operand has it, and the result that of x.
    """

    call: Call
    usual: Any
    at: int
    taken: bool
    orders = True

    @property
    def linear(self) -> tuple[frozenset[int], ...]:
        """As without an order."""
        return self.usual.linear

    def split(self, side: Side, index: int, shard: Sharding) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        split = self._split(side, index, shard)
        if split is not None:
            return split
        return self.usual.split(side, index, shard) if isinstance(shard, Shard) or self.usual.orders else None

    def _split(self, side: Side, index: int, shard: Sharding) -> Split | None:
        if shard.dim != 0:
            return None
        known: Any = self.call.known[self.at]
        by_index = (side == "out") if self.taken else (side, index) == ("in", len(self.call.operands) - 1)
        if (side, index) == ("in", self.at):
            if not isinstance(known, Rows):
                return None
            by_index = True
        pair = _by_rows(known, shard, by_index) if isinstance(known, Rows) else _back(known, shard, by_index)
        if pair is None:
            return None
        rows, entries = pair  # the placements of x, and of what has the index's dim
        inputs: list[Placement] = [
            Unread() if i == self.at else entries for i in range(len(self.call.operands))
        ]
        inputs[0] = rows
        routed = entries if isinstance(entries, Routed) else rows
        assert isinstance(routed, Routed)
        out = entries if self.taken else rows
        return Split(tuple(inputs), (out,), (None,) * len(inputs), self._emit(known, routed))

    def _emit(self, known: Any, routed: Routed) -> Callable[[Context, list[Tensor]], Any]:
        like = self.call.operands[self.at]

        def emit(context: Context, operands: list[Tensor]) -> Any:
            index = context.route(routed, "places" if isinstance(known, Places) else "slots")
            if isinstance(known, Rows) and known.per != 1:
                index = torch.div(index, known.per, rounding_mode="floor")
            index = index.reshape(-1, *[1] * (like.dim() - 1)).expand(-1, *like.shape[1:])
            return self.call.run([*operands[: self.at], index, *operands[self.at + 1 :]])

        return emit


Pair = tuple[Sharding, Sharding]


def _by_rows(known: Rows, shard: Sharding, by_index: bool) -> Pair | None:
    """Tokens, and their slots in the order."""
    per = known.per
    if not by_index:
        if not isinstance(shard, Shard) or shard.start != 0:
            return None
        return shard, Routed(known.order, replace(shard, length=shard.length * per, block=shard.block * per))
    if not isinstance(shard, Routed) or shard.order != known.order:
        return None
    slots = shard.slots
    if slots.length % per or slots.block % per:
        return None
    return replace(slots, length=slots.length // per, block=slots.block // per), shard


def _back(known: Places, shard: Sharding, by_index: bool) -> Pair | None:
    """What is in the order, and the slots that it is of."""
    if isinstance(shard, Routed):
        return (shard, shard.slots) if not by_index and shard.order == known.order else None
    return (Routed(known.order, shard), shard) if by_index and shard.start == 0 else None


def _along(call: Call, usual: Rule | None, at: int, taken: bool) -> Rule | None:
    """The rule by a known index along dim 0, or the usual one."""
    known, x, index = call.known[at], call.operands[0], call.operands[at]
    if usual is None or not isinstance(known, Rows | Places):
        return usual
    per = known.per if isinstance(known, Rows) else 1
    return Along(call, usual, at, taken) if x.shape[0] * per == index.shape[0] else usual


def index(call: Call) -> Rule | None:
    """See :func:`spcompile.rules.indexing.index`; rows at a known index stay on their rank."""
    alone = len(call.args[1]) == 1 and call.operands[1].dim() == 1
    usual = indexing.index(call)
    return _along(call, usual, 1, taken=True) if alone else usual


def gather(call: Call) -> Rule | None:
    """See :func:`spcompile.rules.indexing.gather`; rows at a known index stay on their rank."""
    x, at = call.operands
    rows = x.dim() > 0 and call.args[1] % x.dim() == 0 and x.shape[1:] == at.shape[1:]
    usual = indexing.gather(call)
    return _along(call, usual, 1, taken=True) if rows else usual


def index_put(call: Call) -> Rule | None:
    """See :func:`spcompile.rules.indexing.index_put`; rows at a known index stay on their rank."""
    if isinstance(call.makes, Places):
        return Inverse(call)
    usual, (x, *_, values) = indexing.index_put(call), call.operands
    adds = call.op is not aten.index_put.default or bool(call.argument(3, "accumulate", False))
    if len(call.operands) != 3 or len(call.args[1]) != 1 or call.operands[1].dim() != 1:
        return usual
    rows = values.dim() == x.dim() and values.shape[1:] == x.shape[1:]
    rows = rows and values.shape[0] == call.operands[1].shape[0]
    known = call.known[1]
    once = adds or isinstance(known, Places) or (isinstance(known, Rows) and known.per == 1)
    return _along(call, usual, 1, taken=False) if rows and once else usual


def scatter_add(call: Call) -> Rule | None:
    """See :func:`spcompile.rules.indexing.scatter_add`; rows at a known index stay on their rank."""
    x, at, values = call.operands
    rows = x.dim() > 0 and call.args[1] % x.dim() == 0 and x.shape[1:] == at.shape[1:]
    usual = indexing.scatter_add(call)
    return _along(call, usual, 1, taken=False) if rows and at.shape == values.shape else usual


def scatter(call: Call) -> Rule:
    """See :func:`spcompile.rules.indexing.scatter`; it may write the places of an order."""
    return Inverse(call) if isinstance(call.makes, Places) else indexing.scatter(call)


# ------------------------------------------------------------------------------------ counts, and products


def histogram(call: Call) -> Factors | None:
    """histc between given ends: all entries are counted; what is below the least is not, as padding."""
    (x,) = call.operands
    low, high = call.argument(2, "min", 0), call.argument(3, "max", 0)
    if not low < high:
        return None  # the ends are those of the entries
    dims = tuple(f"d{i}" for i in range(x.dim()))
    return Factors(call, (dims,), (("bin",),), frozenset({"bin"}), fill=low - 1)


@dataclass
class Grouped:
    """Products of rows with the matrix of their group, where the groups are those of the rows' order.

    ``rows`` is the dim of each operand, then of each result, that is in groups; None of one that has none: a
    result without is a sum over rows. ``ends`` is the operand with the groups' ends; a rank has its own.
    """

    call: Call
    rows: tuple[tuple[int | None, ...], tuple[int | None, ...]]
    ends: int
    linear: tuple[frozenset[int], ...] = ()
    orders = True

    def split(self, side: Side, index: int, shard: Sharding) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        ends = self.call.known[self.ends]
        if not isinstance(shard, Routed) or not isinstance(ends, Ends) or shard.order.ids != ends.ids:
            return None
        if self.rows[side == "out"][index] != shard.dim:
            return None
        inputs, outputs = self.rows
        wants: list[Placement] = [Replicate() if dim is None else shard.at(dim) for dim in inputs]
        wants[self.ends] = Unread()
        gets = tuple(Partial("sum") if dim is None else shard.at(dim) for dim in outputs)

        def emit(context: Context, operands: list[Tensor]) -> Any:
            return self.call.run(
                [*operands[: self.ends], self._own(context, shard), *operands[self.ends + 1 :]]
            )

        return Split(tuple(wants), gets, (None,) * len(wants), emit)

    def _own(self, context: Context, routed: Routed) -> Tensor:
        """The ends of this rank's groups: of padding nothing, which is behind them all."""
        like, ids = self.call.operands[self.ends], context.route(routed, "ids")
        groups = torch.arange(like.shape[0], device=ids.device, dtype=ids.dtype)
        return torch.searchsorted(ids, groups, right=True).to(like.dtype)


def grouped_mm(call: Call) -> Grouped | None:
    """_grouped_mm(left, right, ends): rows of the left, columns of the right, or what is summed, in groups.

    With a bias it is computed whole.
    """
    if len(call.operands) != 3:
        return None  # a bias, or no groups
    dims = tuple(x.dim() for x in call.operands[:2])
    rows = {(2, 3): ((0, None), 0), (3, 2): ((None, 1), 1), (2, 2): ((1, 0), None)}.get(dims)
    return None if rows is None else Grouped(call, ((*rows[0], None), (rows[1],)), ends=2)


def grouped_mm_with_gradients(call: Call) -> Grouped:
    """From rows, matrices, ends and the gradient of the product: those of the rows and of the matrices."""
    return Grouped(call, ((0, None, None, 0), (0, None)), ends=2)
