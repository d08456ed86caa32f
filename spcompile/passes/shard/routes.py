"""What is known of index tensors: the orders of sorts, their inverses, and where their groups end.

One walk over the joint graph. Every claim is about the entries of the whole tensor, as eager has them, and is
proved from the operators that made it; what is not known has no claim, and no rule then relies on it
(``rules/routing.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from spcompile.placement import Order
from spcompile.rules.routing import Ends, Places, Rows

__all__ = ["Routes", "routes"]

aten, prims = torch.ops.aten, torch.ops.prims


@dataclass(frozen=True)
class _Numbered:
    """Entry i along dim 0 is i // per; along other dims all are the same."""

    per: int


@dataclass(frozen=True)
class _Ids:
    """Integers >= 0 and <= ``top`` (no tensor but their multiset counts: in any order, in any shape)."""

    name: str
    top: int | None = None


@dataclass(frozen=True)
class _Matches:
    """Along the last dim, which of 0 .. size - 1 an id is; ones and zeros."""

    ids: str


@dataclass(frozen=True)
class _Counts:
    """Entry e is how many of ``ids`` are e, for all ids up to the last entry."""

    ids: str


class Routes:
    """What is known of each node: ``known`` of its entries, ``ids`` of them as integers that are counted."""

    def __init__(self) -> None:
        self.known: dict[fx.Node, Any] = {}
        self.ids: dict[fx.Node, _Ids] = {}
        self.makes: dict[fx.Node, Any] = {}
        self.sorts: dict[Order, fx.Node] = {}

    def of(self, nodes: list[fx.Node]) -> tuple[Any, ...]:
        """What a rule may rely on, of each operand."""
        return tuple(self.known.get(n) for n in nodes)


def routes(graph: fx.Graph) -> Routes:
    """What is known in a functional ATen graph."""
    found = Routes()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        call = _CALLS.get(node.target)
        if call is not None and _plain(node):
            call(found, node)
        top = _bound(found, node)
        if top is not None:
            found.ids.setdefault(node, _Ids(node.name, top))
    return found


def _plain(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (Tensor, tuple, list)) or node.target is getitem


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def _argument(node: fx.Node, name: str, default: Any = None) -> Any:
    names = [a.name for a in node.target._schema.arguments]
    if name not in names:
        return default
    at = names.index(name)
    return node.args[at] if len(node.args) > at else node.kwargs.get(name, default)


# --------------------------------------------------------------------------------------- integers that count


def _bound(found: Routes, node: fx.Node) -> int | None:
    """The most that an entry can be, where all are integers >= 0; None if that is not known."""
    if node.target is getitem:
        source, at = node.args
        if source.target in (aten.topk.default, aten.sort.default, aten.sort.stable) and at == 1:
            return _size(source.args[0], _argument(source, "dim", -1))
        return None
    if node.target in (aten.argmax.default, aten.argmin.default) and _argument(node, "dim") is not None:
        return _size(node.args[0], _argument(node, "dim"))
    if node.target is prims.iota.default:
        start, step = node.kwargs.get("start", 0), node.kwargs.get("step", 1)
        fixed = all(type(x) is int for x in (start, step, node.args[0]))
        return start + step * node.args[0] if fixed and start >= 0 and step >= 0 else None
    if node.target in (aten.full.default, aten.scalar_tensor.default):
        value = node.args[-1]
        return value if type(value) is int and value >= 0 else None
    if node.target is aten.where.self:
        tops = [found.ids[x].top if x in found.ids else None for x in node.args[1:]]
        return max((t for t in tops if t is not None), default=0) if None not in tops else None
    return None


def _size(node: Any, dim: int) -> int | None:
    value = _value(node)
    size = value.shape[dim] if value.dim() else 1
    return size if isinstance(size, int) else None


def _same_ids(found: Routes, node: fx.Node) -> None:
    """The same entries, in another shape."""
    if node.args[0] in found.ids:
        found.ids[node] = found.ids[node.args[0]]


# What a dtype has exactly: all integers from 0 to this.
_EXACT = {
    torch.float64: 2**53,
    torch.float32: 2**24,
    torch.float16: 2**11,
    torch.bfloat16: 2**8,
    **{d: torch.iinfo(d).max for d in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)},
}


def _cast(found: Routes, node: fx.Node) -> None:
    source, dtype = node.args[0], _value(node).dtype
    ids = found.ids.get(source)
    if ids is not None and ids.top is not None and ids.top <= _EXACT.get(dtype, -1):
        found.ids[node] = ids
    known = found.known.get(source)
    counts = isinstance(known, (_Matches, _Counts, Ends)) and _EXACT.get(dtype, 0) >= 2**24
    if counts or (isinstance(known, (Rows, Places, _Numbered)) and dtype in (torch.int32, torch.int64)):
        found.known[node] = known


# ------------------------------------------------------------------------------------------- numbers of slots


def _iota(found: Routes, node: fx.Node) -> None:
    if (node.kwargs.get("start", 0), node.kwargs.get("step", 1)) == (0, 1):
        found.known[node] = _Numbered(1)


def _reshaped(found: Routes, node: fx.Node) -> None:
    _same_ids(found, node)
    source = node.args[0]
    known, before, after = found.known.get(source), _value(source), _value(node)
    # Dim 0 stays, what is behind it is ones.
    if isinstance(known, (Rows, Places, _Numbered)) and after.dim() and before.dim():
        if after.shape[0] == before.shape[0] and after.numel() == before.numel() == before.shape[0]:
            found.known[node] = known
    elif isinstance(known, _Repeated) and after.dim() == 1:
        found.known[node] = _Numbered(known.times)


@dataclass(frozen=True)
class _Repeated:
    """[N, times], entry i along dim 0 is i."""

    times: int


def _expand(found: Routes, node: fx.Node) -> None:
    source = node.args[0]
    known, before, after = found.known.get(source), _value(source), _value(node)
    if not isinstance(known, (Rows, Places, _Numbered)) or before.dim() != after.dim():
        return
    if before.shape[0] == after.shape[0]:
        wide = after.dim() == 2 and isinstance(after.shape[1], int) and known == _Numbered(1)
        found.known[node] = _Repeated(after.shape[1]) if wide else known


def _copied(found: Routes, node: fx.Node) -> None:
    _same_ids(found, node)
    if node.args[0] in found.known:
        found.known[node] = found.known[node.args[0]]


def _floor(found: Routes, node: fx.Node) -> None:
    """slot // k, of slots in an order or in their own."""
    source, by = node.args[:2]
    if node.target is aten.div.Tensor_mode and node.kwargs.get("rounding_mode") not in ("floor", "trunc"):
        return
    known = found.known.get(source)
    if type(by) is int and by > 0 and isinstance(known, (Rows, _Numbered)):
        if not _value(node).dtype.is_floating_point:
            per = known.per * by
            found.known[node] = Rows(known.order, per) if isinstance(known, Rows) else _Numbered(per)


# ----------------------------------------------------------------------------------- sorts and their inverses


def _sort(found: Routes, node: fx.Node) -> None:
    source, value = node.args[0], _value(node.args[0])
    if value.dim() != 1 or value.dtype == torch.bool or value.dtype.is_floating_point or value.is_complex():
        return
    known, ascending = found.known.get(source), not _argument(node, "descending", False)
    if isinstance(known, Rows) and known.per == 1 and ascending:
        found.makes[node] = Places(known.order)
        return
    ids = found.ids.get(source)
    order = Order(node.name, ids.name if ids is not None and ascending else None)
    found.makes[node], found.sorts[order] = order, node


def _output(found: Routes, node: fx.Node) -> None:
    made = found.makes.get(node.args[0])
    if made is None:
        return
    if node.args[1] == 1:
        found.known[node] = Rows(made, 1) if isinstance(made, Order) else made
    else:
        _same_ids_of(found, node, node.args[0].args[0])


def _same_ids_of(found: Routes, node: fx.Node, source: fx.Node) -> None:
    if source in found.ids:
        found.ids[node] = found.ids[source]


def _taken(found: Routes, node: fx.Node) -> None:
    """Numbers of tokens, or ids, in an order: index and gather along dim 0."""
    source, index = _source_and_index(node)
    rows = found.known.get(index) if index is not None else None
    whole = index is not None and _value(source).shape[0] == _value(index).shape[0]
    if not isinstance(rows, Rows) or rows.per != 1 or not whole or _value(node).dim() != 1:
        return
    known = found.known.get(source)
    if isinstance(known, _Numbered):
        found.known[node] = Rows(rows.order, known.per)
    _same_ids_of(found, node, source)


def _source_and_index(node: fx.Node) -> tuple[Any, Any]:
    """What is read (or written) along its only dim, and at which indices."""
    if _value(node.args[0]).dim() != 1:
        return node.args[0], None
    if node.target in (aten.index.Tensor, aten.index_put.default):
        at = node.args[1]
        return node.args[0], at[0] if len(at) == 1 else None
    return node.args[0], node.args[2]


def _put(found: Routes, node: fx.Node) -> None:
    """Where an order puts each slot: the numbers of places, put at the slots; or ones, added up by id."""
    target, index = _source_and_index(node)
    if index is None:
        return
    adds = node.target is aten.scatter_add.default or _argument(node, "accumulate", False) is True
    values = node.args[2 if node.target is aten.index_put.default else 3]
    size = _value(target).shape[0]
    if adds:
        base, ids = _constant(target), found.ids.get(index)
        if base == 0 and _constant(values) == 1 and ids is not None and ids.top is not None:
            if _value(index).shape == _value(values).shape and _EXACT.get(_value(node).dtype, 0) >= 2**24:
                found.known[node] = _Counts(ids.name)
        return
    rows = found.known.get(index)
    if isinstance(rows, Rows) and rows.per == 1 and size == _value(index).shape[0]:
        if found.known.get(values) == _Numbered(1) and _value(values).shape == _value(index).shape:
            found.makes[node] = found.known[node] = Places(rows.order)


def _constant(node: Any) -> Any:
    """The number that all entries are, if that is so."""
    while isinstance(node, fx.Node) and node.target in (aten.expand.default, aten.alias.default):
        node = node.args[0]
    return node.args[1] if isinstance(node, fx.Node) and node.target is aten.full.default else None


# ------------------------------------------------------------------------------------------ counts and ends

# So many bins hold one integer each: i * n / (n - 1) is rounded to no other whole number.
_BINS = 1024


def _histogram(found: Routes, node: fx.Node) -> None:
    """histc with a bin for each integer: it counts ids up to the last bin's."""
    source = node.args[0]
    bins, low, high = (_argument(node, n, d) for n, d in (("bins", 100), ("min", 0), ("max", 0)))
    ids, dtype = found.ids.get(source), _value(source).dtype
    wide = not dtype.is_floating_point or dtype in (torch.float32, torch.float64)
    if ids is not None and wide and low == 0 and high == bins - 1 and 1 < bins <= _BINS:
        found.known[node] = _Counts(ids.name)


def _equal(found: Routes, node: fx.Node) -> None:
    """ids[..., None] == arange(size)."""
    for ids, numbers in (node.args[:2], node.args[1::-1]):
        if not isinstance(ids, fx.Node) or not isinstance(numbers, fx.Node) or ids not in found.ids:
            continue
        left, right = _value(ids), _value(numbers)
        alone = right.dim() == 1 and found.known.get(numbers) == _Numbered(1)
        if alone and left.dim() > 1 and left.shape[-1] == 1:
            found.known[node] = _Matches(found.ids[ids].name)


def _sum(found: Routes, node: fx.Node) -> None:
    """A sum over all dims but the last of which ids match: how often each does."""
    source, value = node.args[0], _value(node)
    known = found.known.get(source)
    if isinstance(known, _Matches) and _EXACT.get(value.dtype, 0) >= 2**24:
        rank = _value(source).dim()
        if value.dim() == 1 and {d % rank for d in node.args[1]} == set(range(rank - 1)):
            found.known[node] = _Counts(known.ids)


def _running(found: Routes, node: fx.Node) -> None:
    known = found.known.get(node.args[0])
    if isinstance(known, _Counts) and _EXACT.get(_value(node).dtype, 0) >= 2**24:
        found.known[node] = Ends(known.ids)


_CALLS: dict[Any, Callable[[Routes, fx.Node], None]] = {
    prims.iota.default: _iota,
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten.reshape.default), _reshaped),
    **dict.fromkeys((aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims), _reshaped),
    aten.permute.default: _same_ids,
    aten.expand.default: _expand,
    **dict.fromkeys((aten.clone.default, aten.alias.default), _copied),
    prims.convert_element_type.default: _cast,
    **dict.fromkeys((aten.div.Tensor_mode, aten.floor_divide.default), _floor),
    **dict.fromkeys((aten.sort.default, aten.sort.stable), _sort),
    getitem: _output,
    **dict.fromkeys((aten.index.Tensor, aten.gather.default), _taken),
    **dict.fromkeys((aten.index_put.default, aten.scatter.src, aten.scatter_add.default), _put),
    aten.histc.default: _histogram,
    aten.eq.Tensor: _equal,
    aten.sum.dim_IntList: _sum,
    aten.cumsum.default: _running,
}
