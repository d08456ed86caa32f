"""The gradient of returned logits, in pieces of rows that are used up one after the other.

NOTE [Gradients in pieces]
The backward of a loss computes a gradient as large as the logits, for a few matrix products. Inductor writes
it over the logits, but it may not where they are returned as well: the user may read them. Such a gradient is
known by ``add_late`` (NOTE [Ports]). Where it is computed row by row, [*rows, K], and goes row by row into
products that contract rows or columns, these steps are done for one piece of the rows after the other: with
G_i the gradient's piece, H_i that of the hidden states, W the head's weight,

    dH_i = G_i @ W        put one below the other
    dW  += G_i^T @ H_i

Every value of a piece is written [n, k], with k = 1 for one without columns, or it has no rows and is the
same for all pieces. What a piece reads comes through ``spcompile::rows``, which waits for the piece before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
_LATE = ports.ops.add_late.default
_BROADCAST = {aten.expand.default, _LATE}


def in_pieces(graph: fx.Graph) -> None:
    """Compute the gradients of large returned tensors in pieces, in place; see NOTE [Gradients in pieces]."""
    for node in list(graph.nodes):
        if node.target is _LATE and _is_large(node.meta["val"]):
            try:
                steps = _Steps.around(node)
                _Writer(graph, steps).write()
            except _Refused:
                continue


def _is_large(x: Tensor) -> bool:
    if x.dim() < 2 or not all(isinstance(n, int) for n in x.shape) or x.shape[-1] < 2:
        return False
    return x.numel() >= 2 * PIECES * x.shape[-1] and x.numel() * x.element_size() >= LEAST_BYTES


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _same(node: fx.Node, dims: Any) -> bool:
    """Whether ``node`` is a matrix, and ``dims`` exchanges its dims."""
    return len(_shape(node)) == 2 and list(dims) == [1, 0]


# ---- what is computed row by row ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """How rows lie in a value: [*rows, columns], or [columns, rows] if turned; one column may be left out."""

    columns: int
    turned: bool = False


@dataclass(frozen=True)
class _Read:
    """What a step reads of ``node``, which is broadcast to ``shape``; without rows of its own if no form."""

    node: fx.Node
    shape: tuple[int, ...]
    form: _Form | None


class _Refused(Exception):
    """The graph is not of the kind that can be done in pieces."""


@dataclass
class _Steps:
    """The steps that are done piece by piece.

    Args:
        rows: R; the rows of every value.
        forms: of each value that is computed in pieces.
        reads: what each of them reads.
        cone: those of them that are computed from the gradient.
        ends: what is computed from all rows of these.
    """

    rows: int
    forms: dict[fx.Node, _Form] = field(default_factory=dict)
    reads: dict[fx.Node, dict[fx.Node, _Read]] = field(default_factory=dict)
    cone: set[fx.Node] = field(default_factory=set)
    ends: list[fx.Node] = field(default_factory=list)

    # ---- one step

    def step(self, node: fx.Node, form: _Form) -> dict[fx.Node, _Read] | None:
        """What ``node`` reads, if each row of it is computed from the same row of its operands."""
        operands = node.all_input_nodes
        values = [n.meta.get("val") for n in (node, *operands)]
        if node.op != "call_function" or not all(isinstance(x, Tensor) for x in values):
            return None
        shape = _shape(node)
        if not all(isinstance(s, int) for n in (node, *operands) for s in _shape(n)):
            return None
        if not self._is_of(shape, form):
            return None
        if node.target in _VIEWS:
            return self._view(node, form)
        if node.target is aten.permute.default:
            return self._permute(node, form)
        if node.target in _REDUCTIONS:
            return self._reduction(node, form)
        if node.target in _ALONG_ROWS:
            return self._along_rows(node, form)
        if node.target in _CREATE:
            return {}
        if node.target in _BROADCAST or is_pointwise(node.target):
            return {n: self._aligned(n, shape, form) for n in operands}
        return None

    def _is_of(self, shape: tuple[int, ...], form: _Form) -> bool:
        if form.columns == 1:
            return math.prod(shape) == self.rows
        if form.turned:
            return shape == (form.columns, self.rows)
        return bool(shape) and shape[-1] == form.columns and math.prod(shape[:-1]) == self.rows

    def _view(self, node: fx.Node, form: _Form) -> dict[fx.Node, _Read] | None:
        (x,) = node.all_input_nodes
        return {x: _Read(x, _shape(x), form)} if self._is_of(_shape(x), form) else None

    def _permute(self, node: fx.Node, form: _Form) -> dict[fx.Node, _Read] | None:
        x = node.args[0]
        if not _same(x, node.args[1]) or (form.columns == 1 and 1 not in _shape(x)):
            return None
        turned = form if form.columns == 1 else _Form(form.columns, not form.turned)
        return {x: _Read(x, _shape(x), turned)}

    def _reduction(self, node: fx.Node, form: _Form) -> dict[fx.Node, _Read] | None:
        if len(node.args) < 2 or form.columns > 1:
            return None
        x, dims = node.args[:2]
        last, dims = len(_shape(x)) - 1, dims if isinstance(dims, Sequence) else [dims]
        read = _Read(x, _shape(x), _Form(_shape(x)[-1]))
        return {x: read} if list(dims) in ([last], [-1]) else None

    def _along_rows(self, node: fx.Node, form: _Form) -> dict[fx.Node, _Read] | None:
        operands, last = node.all_input_nodes, len(_shape(node)) - 1
        if node.args[1] not in (-1, last) or form.turned:
            return None
        reads = {x: _Read(x, _shape(x), _Form(_shape(x)[-1])) for x in operands if len(_shape(x)) == last + 1}
        fits = len(reads) == len(operands) and all(self._is_of(r.shape, r.form) for r in reads.values())
        return reads if fits else None

    def _aligned(self, node: fx.Node, shape: tuple[int, ...], form: _Form) -> _Read:
        """``node`` broadcast to the rows of a result of ``shape``."""
        own = (1,) * (len(shape) - len(_shape(node))) + _shape(node)
        if form.columns == 1:
            return _Read(node, shape, None if math.prod(own) == 1 else form)
        if form.turned:
            turned = own[0] > 1
            return _Read(node, own, None if own[1] == 1 else _Form(own[0], turned))
        free = math.prod(own[:-1]) == 1
        return _Read(node, own if free else (*shape[:-1], own[-1]), None if free else _Form(own[-1]))

    # ---- all of them

    @staticmethod
    def around(start: fx.Node) -> _Steps:
        """What is computed from ``start``, and what this reads.

        Raises:
            _Refused: something else is computed from it.
        """
        form = _Form(_shape(start)[-1])
        steps = _Steps(math.prod(_shape(start)[:-1]))
        steps._take(start, [form])
        for node in start.graph.nodes:
            if any(n in steps.cone for n in node.all_input_nodes):
                steps._follow(node)
        if not steps.ends:
            raise _Refused("nothing is computed from it")
        for node in list(steps.reads):
            steps._pull(node)
        return steps

    def _take(self, node: fx.Node, forms: Sequence[_Form]) -> None:
        mine = [n for n in node.all_input_nodes if n in self.cone]
        for form in forms:
            reads = self.step(node, form)
            if reads is not None and all(self.inside(reads[n]) for n in mine):
                self.cone.add(node)
                self.forms[node], self.reads[node] = form, reads
                return
        raise _Refused(f"{node} is computed from it")

    def _follow(self, node: fx.Node) -> None:
        if isinstance(node.meta.get("val"), Tensor) and self._is_end(node):
            self.ends.append(node)
            return
        shape = _shape(node) if isinstance(node.meta.get("val"), Tensor) else ()
        self._take(node, [_Form(1), *(f for s in shape[-1:] for f in (_Form(s), _Form(shape[0], True)))])

    def inside(self, read: _Read) -> bool:
        """Whether what is read is a value in pieces, as it is computed."""
        known = self.forms.get(read.node)
        return known is not None and known == read.form and _has_rows(read)

    def _is_end(self, node: fx.Node) -> bool:
        """Whether it is a product of a value in pieces and something else, or its sum over all rows.

        Raises:
            _Refused: it is a product of two of them.
        """
        mine = [n for n in node.all_input_nodes if n in self.cone]
        if _sums_rows(node):
            return self.forms[mine[0]] == _Form(_shape(mine[0])[-1])
        if not _is_product(node):
            return False
        if len(mine) != 1 or mine[0] not in _factors(node) or node.args[-2] is node.args[-1]:
            raise _Refused(f"{node} is not a product of it and something else")
        return self.forms[mine[0]].columns > 1

    def _pull(self, node: fx.Node) -> None:
        """Take in what ``node`` reads and what is computed row by row too."""
        todo = [node]
        while todo:
            for read in self.reads[todo.pop()].values():
                if read.form is None or self.inside(read):
                    continue
                if read.node in self.cone:
                    raise _Refused(f"{read.node} is read in two ways")
                reads = self.step(read.node, read.form) if _has_rows(read) else None
                if reads is not None and read.node not in self.forms:
                    self.forms[read.node], self.reads[read.node] = read.form, reads
                    todo.append(read.node)
                elif not _has_rows(read) and read.form.columns > 1:
                    raise _Refused(f"{read.node} would be written out for all rows")


def _has_rows(read: _Read) -> bool:
    """Whether what is read has all the rows itself, and is not broadcast to them."""
    return math.prod(_shape(read.node)) == math.prod(read.shape)


def _is_product(node: fx.Node) -> bool:
    if node.target is aten.mm.default:
        return True
    return node.target is aten.addmm.default and not node.kwargs  # else beta and alpha


def _factors(node: fx.Node) -> list[fx.Node]:
    return list(node.args[-2:]) if _is_product(node) else []


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


class _Writer:
    """Writes the pieces before the first node that needs a result of them."""

    def __init__(self, graph: fx.Graph, steps: _Steps) -> None:
        self.graph, self.steps = graph, steps
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.region = sorted(steps.reads, key=self.order.__getitem__)
        fake_mode = _torch.detect_fake_mode([self.region[0].meta["val"]])
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
        for node in reversed(self.region):
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
            todo += [r.node for r in reads.values() if not steps.inside(r)]
        for end in steps.ends:
            todo += [n for n in _factors(end) if n not in steps.cone]
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
        """What is the same for all pieces, [k] or []."""
        columns = math.prod(read.shape) if math.prod(_shape(read.node)) > 1 else 1
        return self._given(read.node).reshape([columns] if columns > 1 else [])

    def _tall(self, read: _Read, form: _Form) -> Tensor:
        """All rows of what the pieces read, [R, k]."""
        x = self._given(read.node)
        if not _has_rows(read):
            x = x.expand(read.shape)
        if form.turned:
            x = x.permute(1, 0)
        return x.reshape(self.steps.rows, form.columns)

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
        if self.steps.inside(read):
            return self.piece[read.node]
        key = read.node, read.form, _has_rows(read) or read.shape
        if key not in self.outside:
            self.outside[key] = self._free(read) if read.form is None else self._tall(read, read.form)
        if read.form is None:
            return self.outside[key]
        if key not in self.piece:
            self.piece[key] = chunked.rows(self.outside[key], self.first, self.stop, self.after)
        return self.piece[key]

    def _step(self, node: fx.Node) -> Tensor:
        reads, shape = self.steps.reads[node], [self.stop - self.first, self.steps.forms[node].columns]
        operands = {n: self._value(read) for n, read in reads.items()}
        args, kwargs = tree_map(
            lambda x: operands.get(x, x) if isinstance(x, fx.Node) else x, (node.args, node.kwargs)
        )
        if node.target in _VIEWS or node.target in (aten.permute.default, aten.expand.default):
            made = args[0]
        elif node.target in _REDUCTIONS:
            made = node.target(args[0], [1] if isinstance(args[1], Sequence) else 1, True, **kwargs)
        elif node.target in _ALONG_ROWS:
            made = node.target(args[0], 1, *args[2:], **kwargs)
        elif node.target in _CREATE:
            made = node.target(shape, *args[1:], **kwargs)
        elif node.target is _LATE:
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
            term = self.piece[end.args[0]].sum([0], dtype=precise)
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
        if a in self.steps.cone:
            return None if self.steps.forms[a].turned else 0
        return 1 if self.steps.forms[b].turned else None

    def _factor(self, node: fx.Node, dim: int, summed: bool) -> Tensor:
        """This piece of a factor, which is contracted along ``dim``: of its rows, if these are summed."""
        if node in self.steps.cone:
            piece = self.piece[node]
            return piece.permute(1, 0) if self.steps.forms[node].turned else piece
        x = self._given(node)
        return x.narrow(dim, self.first, self.stop - self.first) if summed else x

    def _finish(self, end: fx.Node, results: list[Tensor]) -> Tensor:
        dim, value = self._joined(end), end.meta["val"]
        made = results[0] if dim is None else torch.cat(results, dim)
        if made.shape != value.shape:
            made = made.reshape(value.shape)
        if made.dtype != value.dtype:
            made = made.to(value.dtype)
        return self._given(end.args[0]) + made if _is_added(end) else made
