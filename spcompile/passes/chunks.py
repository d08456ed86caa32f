"""The gradient of returned logits, in pieces of rows that are used up one after the other.

NOTE [Gradients in pieces]
The backward of a loss computes a gradient as large as the logits, for a few matrix products. Inductor writes
it over the logits, but it may not where they are returned as well: the user may read them. So where such a
tensor [*rows, V] is read row by row, up to products that contract rows or columns, these steps are done for
one piece of the rows after the other: with G_i the piece's gradient, H_i the piece's hidden states,

    dH_i = G_i @ W        put one below the other
    dW  += G_i^T @ H_i

Every value of a piece is written [n, k], or [n, 1] for one without columns, or it has no rows and is the same
for all pieces. What a piece reads comes through ``spcompile::rows``, which waits for the piece before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from spcompile import _torch, chunked, ports
from spcompile.emit import Emitter
from spcompile.rules.pointwise import is_pointwise

__all__ = ["LEAST_BYTES", "PIECES", "in_pieces"]

aten = torch.ops.aten

LEAST_BYTES = 16 * 2**20
"""Of smaller tensors the gradient is computed at once."""

PIECES = 8

_VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
}
_REDUCTIONS = {aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.any.dim}
_ALONG_ROWS = {aten.scatter.value, aten.scatter.src, aten.gather.default}
_CREATE = {aten.full.default}
_BROADCAST = {aten.expand.default, ports.ops.add_late.default}


def in_pieces(graph: fx.Graph, names: Iterable[frozenset[str]]) -> None:
    """Compute the gradients of large returned tensors in pieces, in place; see NOTE [Gradients in pieces].

    Args:
        graph: a forward's is left as it is.
        names: for each output that is a rank's part, of all nodes that are the same memory.
    """
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    if not any(n.name.startswith("tangents") for n in inputs):
        return
    for same in names:
        for node in inputs:
            if node.name in same and _is_large(node.meta["val"]):
                _unroll(graph, node)


def _is_large(x: Any) -> bool:
    if not isinstance(x, Tensor) or x.dim() < 2 or not all(isinstance(n, int) for n in x.shape):
        return False
    rows = x.numel() // max(1, x.shape[-1])
    return rows >= 2 * PIECES and x.is_contiguous() and x.numel() * x.element_size() >= LEAST_BYTES


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


# ---- what is read row by row ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    """A value from outside as a step reads it: aligned to ``shape``, of which the last ``tail`` dims (0 or 1)
    are columns. Without rows of its own it is ``free``."""

    node: fx.Node
    shape: tuple[int, ...]
    tail: int
    free: bool


class _Refused(Exception):
    """The graph is not of the kind that can be done in pieces."""


@dataclass
class _Steps:
    """The steps that are done piece by piece.

    Args:
        rows: R; the rows of every value.
        tails: of each value that is computed in pieces, how many of its last dims (0 or 1) are columns.
        cone: those of them that are computed from the tensor.
        reads: what each step reads.
        turned: transposed values of the cone.
        ends: what is computed from all rows.
    """

    rows: int
    tails: dict[fx.Node, int] = field(default_factory=dict)
    cone: set[fx.Node] = field(default_factory=set)
    reads: dict[fx.Node, dict[fx.Node, _Read]] = field(default_factory=dict)
    turned: dict[fx.Node, fx.Node] = field(default_factory=dict)
    ends: list[fx.Node] = field(default_factory=list)

    def tail_of(self, shape: tuple[Any, ...], columns: int) -> int | None:
        """How many of the last dims are columns, of a value with R rows of so many; None if it is not one."""
        if columns > 1:
            return 1 if shape and shape[-1] == columns and math.prod(shape[:-1]) == self.rows else None
        if math.prod(shape) != self.rows:
            return None
        return int(bool(shape) and shape[-1] == 1)

    def columns(self, node: fx.Node, tail: int) -> int:
        return _shape(node)[-1] if tail else 1

    def step(self, node: fx.Node, tail: int) -> dict[fx.Node, _Read] | None:
        """What ``node`` reads, if each row of it is computed from the same row of its operands."""
        operands = _tensors(node)
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            return None
        shape = _shape(node)
        sizes = [s for n in (node, *operands) for s in _shape(n)]
        if len(operands) < len(node.all_input_nodes) or not all(isinstance(s, int) for s in sizes):
            return None  # sizes that are known at run time only
        if len(shape) < tail or math.prod(shape[: len(shape) - tail]) != self.rows:
            return None
        if node.target in _VIEWS:
            return self._view(node, tail)
        if node.target in _REDUCTIONS:
            return self._reduction(node, tail)
        if node.target in _ALONG_ROWS:
            return self._along_rows(node, tail)
        if node.target in _CREATE:
            return {}
        if node.target in _BROADCAST or is_pointwise(node.target):
            return {n: self._aligned(n, shape, tail) for n in _tensors(node)}
        return None

    def _view(self, node: fx.Node, tail: int) -> dict[fx.Node, _Read] | None:
        (x,) = _tensors(node)
        found = self.tail_of(_shape(x), self.columns(node, tail))
        return None if found is None else {x: _Read(x, _shape(x), found, False)}

    def _reduction(self, node: fx.Node, tail: int) -> dict[fx.Node, _Read] | None:
        x, dims, keep = (*node.args, False)[:3] if len(node.args) > 1 else (None, None, False)
        if not isinstance(x, fx.Node) or tail != int(bool(keep)):
            return None
        last, dims = len(_shape(x)) - 1, dims if isinstance(dims, Sequence) else [dims]
        if list(dims) not in ([last], [-1]) or self.tail_of(_shape(x), _shape(x)[-1]) is None:
            return None
        return {x: _Read(x, _shape(x), 1, False)}

    def _along_rows(self, node: fx.Node, tail: int) -> dict[fx.Node, _Read] | None:
        dim, operands = node.args[1], _tensors(node)
        if tail != 1 or dim not in (-1, len(_shape(node)) - 1):
            return None
        if any(math.prod(_shape(x)[:-1]) != self.rows for x in operands):
            return None
        return {x: _Read(x, _shape(x), 1, False) for x in operands}

    def _aligned(self, node: fx.Node, shape: tuple[int, ...], tail: int) -> _Read:
        """``node`` broadcast to the rows of a result of ``shape``."""
        own = (1,) * (len(shape) - len(_shape(node))) + _shape(node)
        rows = len(shape) - tail
        if all(n == 1 for n in own[:rows]):
            return _Read(node, own, tail, True)
        return _Read(node, (*shape[:rows], *own[rows:]), tail, False)

    # ---- finding them

    def find(self, start: fx.Node) -> None:
        """Follow what is computed from ``start``, then what these steps read.

        Raises:
            _Refused: something else reads it.
        """
        self.cone.add(start)
        self.tails[start] = 1
        for node in start.graph.nodes:
            if any(n in self.cone or n in self.turned for n in node.all_input_nodes):
                self._follow(node)
        if not self.ends:
            raise _Refused("no products")
        for node in list(self.reads):
            self._pull(node)

    def _follow(self, node: fx.Node) -> None:
        mine = [n for n in node.all_input_nodes if n in self.cone]
        if _is_product(node) or _sums_rows(node):
            self._check_end(node)
            self.ends.append(node)
        elif len(mine) < len([n for n in node.all_input_nodes if n in self.cone or n in self.turned]):
            raise _Refused(f"{node} reads it transposed")
        elif node.target is aten.permute.default and len(_shape(mine[0])) == 2 and node.args[1] == [1, 0]:
            self.turned[node] = mine[0]
        elif not self._take(node, mine):
            raise _Refused(f"{node} is computed from it")

    def _take(self, node: fx.Node, mine: list[fx.Node]) -> bool:
        for tail in (1, 0):
            reads = self.step(node, tail)
            if reads is not None and all(self.inside(reads[n]) for n in mine):
                self.cone.add(node)
                self.tails[node], self.reads[node] = tail, reads
                return True
        return False

    def inside(self, read: _Read) -> bool:
        """Whether what is read is a value in pieces, as it is computed."""
        return not read.free and self.tails.get(read.node) == read.tail and _has_rows(read)

    def _check_end(self, node: fx.Node) -> None:
        if _sums_rows(node):
            whole = [node.args[0]]
            others: list[fx.Node] = []
        else:
            factors = _factors(node)
            whole = [self.turned.get(n, n) for n in factors if n in self.cone or n in self.turned]
            others = [n for n in node.all_input_nodes if n not in factors]
        if len(whole) != 1 or any(n in self.cone or n in self.turned for n in others):
            raise _Refused(f"{node} is not a product of it and something else")
        shape = _shape(whole[0])
        if self.tails[whole[0]] != 1 or math.prod(shape[:-1]) != self.rows:
            raise _Refused(f"{node} contracts something else")

    def _pull(self, node: fx.Node) -> None:
        """Take in what ``node`` reads and what is computed row by row too."""
        todo = [node]
        while todo:
            for read in self.reads[todo.pop()].values():
                if read.free or self.inside(read):
                    continue
                if read.node in self.cone:
                    raise _Refused(f"{read.node} is read in two ways")
                reads = self.step(read.node, read.tail) if _has_rows(read) else None
                if reads is not None and read.node not in self.tails:
                    self.tails[read.node], self.reads[read.node] = read.tail, reads
                    todo.append(read.node)
                elif not _has_rows(read) and read.tail and read.shape[-1] > 1:
                    raise _Refused(f"{read.node} would be written out for all rows")


def _has_rows(read: _Read) -> bool:
    """Whether what is read has all the rows itself, and is not broadcast to them."""
    return math.prod(_shape(read.node)) == math.prod(read.shape)


def _is_product(node: fx.Node) -> bool:
    if node.target is aten.mm.default:
        return True
    return node.target is aten.addmm.default and not node.kwargs  # else beta and alpha


def _factors(node: fx.Node) -> list[fx.Node]:
    return list(node.args[-2:])


def _sums_rows(node: fx.Node) -> bool:
    """Whether it is a sum over all dims but the last, as a bias' gradient is."""
    if node.target is not aten.sum.dim_IntList:
        return False
    dims = len(_shape(node.args[0]))
    return dims > 1 and sorted(d % dims for d in node.args[1]) == list(range(dims - 1))


def _is_added(end: fx.Node) -> bool:
    """Whether something is added to a product, which perhaps comes after the others are used."""
    return end.target is aten.addmm.default


def _precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which pieces are added up."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


# ---- writing them ---------------------------------------------------------------------------------------


def _unroll(graph: fx.Graph, start: fx.Node) -> None:
    steps = _Steps(start.meta["val"].numel() // start.meta["val"].shape[-1])
    try:
        steps.find(start)
        _Writer(graph, steps, start).write()
    except _Refused:
        return


class _Writer:
    """Writes the pieces before the first node that needs a result of them."""

    def __init__(self, graph: fx.Graph, steps: _Steps, start: fx.Node) -> None:
        self.graph, self.steps, self.start = graph, steps, start
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.region = sorted((n for n in steps.tails if n in steps.reads), key=self.order.__getitem__)
        fake_mode = _torch.detect_fake_mode([start.meta["val"]])
        self.emitter = Emitter(graph, fake_mode, _torch.select_decomp_table())
        self.outside: dict[Any, Tensor] = {}

    def write(self) -> None:
        point, ends = self._make_room(), self.steps.ends
        with self.graph.inserting_before(point), self.emitter.serving(ends[0]):
            results = self.emitter.run(self._pieces)
        for end in ends:
            with self.graph.inserting_before(end if _is_added(end) else point), self.emitter.serving(end):
                made = self.emitter.run(self._finish, end, results[end])
            end.replace_all_uses_with(self.emitter.node_of(made))
        for end in ends:
            self.graph.erase_node(end)
        for node in [*reversed(self.steps.turned), *reversed(self.region)]:
            if not node.users:
                self.graph.erase_node(node)

    def _make_room(self) -> fx.Node:
        """The node before which the pieces are written; what they read is moved there if it comes later.

        Raises:
            _Refused: they read what is computed from their results.
        """
        steps, todo = self.steps, []
        needed = [n for end in steps.ends for n in ([end] if _is_added(end) else end.users)]
        point = min(needed, key=self.order.__getitem__)
        for reads in steps.reads.values():
            todo += [r.node for r in reads.values() if not steps.inside(r) or r.node is self.start]
        for end in steps.ends:
            todo += [n for n in _factors(end) if n not in steps.cone and n not in steps.turned]
        moved: set[fx.Node] = set()
        while todo:
            node = todo.pop()
            if node in steps.ends:
                raise _Refused(f"{node} is read, and computed from it")
            if node not in moved and self.order[node] >= self.order[point]:
                moved.add(node)
                todo += node.all_input_nodes
        for node in sorted(moved, key=self.order.__getitem__):
            point.prepend(node)
        return point

    # ---- values

    def _given(self, node: fx.Node) -> Tensor:
        """The value of a node that is not computed in pieces."""
        if node not in self.outside:
            self.outside[node] = self.emitter.bind(self.emitter.fresh(node.meta["val"]), node)
        return self.outside[node]

    def _free(self, read: _Read) -> Tensor:
        return self._given(read.node).reshape(read.shape[-1:] if read.tail else ())

    def _tall(self, read: _Read) -> Tensor:
        """All rows of what the pieces read, [R, k]."""
        x = self._given(read.node)
        if not _has_rows(read):
            x = x.expand(read.shape)
        return x.reshape(self.steps.rows, read.shape[-1] if read.tail else 1)

    # ---- a piece

    def _pieces(self) -> dict[fx.Node, list[Tensor]]:
        rows, ends = self.steps.rows, self.steps.ends
        size = -(-rows // PIECES)
        results: dict[fx.Node, list[Tensor]] = {end: [] for end in ends}
        for first in range(0, rows, size):
            self.first, self.stop = first, min(first + size, rows)
            self.after = [results[end][-1] for end in ends if results[end]]
            self.piece: dict[Any, Tensor] = {}
            for node in self.region:
                self.piece[node] = self._step(node)
            for end in ends:
                self._add(end, results[end])
        return results

    def _value(self, read: _Read) -> Tensor:
        if self.steps.inside(read) and read.node is not self.start:
            return self.piece[read.node]
        key = read.node, read.free or _has_rows(read) or read.shape, read.tail
        if key not in self.outside:
            self.outside[key] = self._free(read) if read.free else self._tall(read)
        if read.free:
            return self.outside[key]
        if key not in self.piece:
            self.piece[key] = chunked.rows(self.outside[key], self.first, self.stop, self.after)
        return self.piece[key]

    def _step(self, node: fx.Node) -> Tensor:
        reads, tail = self.steps.reads[node], self.steps.tails[node]
        shape = [self.stop - self.first, self.steps.columns(node, tail)]
        operands = {n: self._value(read) for n, read in reads.items()}
        args, kwargs = tree_map(
            lambda x: operands.get(x, x) if isinstance(x, fx.Node) else x, (node.args, node.kwargs)
        )
        if node.target in _VIEWS or node.target is aten.expand.default:
            made = args[0]
        elif node.target in _REDUCTIONS:
            made = node.target(args[0], [1] if isinstance(args[1], Sequence) else 1, True, **kwargs)
        elif node.target in _ALONG_ROWS:
            made = node.target(args[0], 1, *args[2:], **kwargs)
        elif node.target in _CREATE:
            made = node.target(shape, *args[1:], **kwargs)
        elif node.target is ports.ops.add_late.default:
            x, *rest = args[:4]
            made = ports.add_late(x.expand(shape), *rest, self.first, self.stop < self.steps.rows)
        else:
            made = node.target(*args, **kwargs)
        return made if list(made.shape) == shape else made.expand(shape)

    # ---- what is computed from all rows

    def _add(self, end: fx.Node, so_far: list[Tensor]) -> None:
        """Add a piece to a result: to the list of its pieces, or to their sum."""
        precise = _precise(end.meta["val"].dtype)
        if _sums_rows(end):
            term = self._of_piece(end.args[0]).sum([0], dtype=precise)
            so_far[:] = [so_far[0] + term] if so_far else [term]
            return
        joined = self._joined(end)
        a, b = (self._factor(n, dim, joined is None) for dim, n in ((1, end.args[-2]), (0, end.args[-1])))
        if joined is not None:
            so_far.append(torch.mm(a, b))
        elif so_far:
            so_far[:] = [chunked.add_product(so_far[0], a, b)]
        else:
            so_far[:] = [torch.mm(a, b).to(precise)]

    def _joined(self, end: fx.Node) -> int | None:
        """The dim along which a result's pieces are put together; None if they are added up."""
        if _sums_rows(end):
            return None
        a, b = _factors(end)
        return 0 if a in self.steps.cone else 1 if b in self.steps.turned else None

    def _factor(self, node: fx.Node, dim: int, summed: bool) -> Tensor:
        """This piece of a factor, which is contracted along ``dim``: of its rows, if these are summed."""
        if node in self.steps.cone:
            return self._of_piece(node)
        if node in self.steps.turned:
            return self._of_piece(self.steps.turned[node]).permute(1, 0)
        x = self._given(node)
        return x.narrow(dim, self.first, self.stop - self.first) if summed else x

    def _of_piece(self, node: fx.Node) -> Tensor:
        return self._value(_Read(node, _shape(node), self.steps.tails[node], False))

    def _finish(self, end: fx.Node, results: list[Tensor]) -> Tensor:
        dim, value = self._joined(end), end.meta["val"]
        made = results[0] if dim is None else torch.cat(results, dim)
        if made.shape != value.shape:
            made = made.reshape(value.shape)
        if made.dtype != value.dtype:
            made = made.to(value.dtype)
        return self._given(end.args[0]) + made if _is_added(end) else made
