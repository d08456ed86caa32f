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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from spcompile import _torch, chunked, ports
from spcompile.emit import Emitter
from spcompile.passes.row_steps import (
    ALONG_ROWS,
    CREATE,
    LATE,
    REDUCTIONS,
    VIEWS,
    Form,
    Read,
    Refused,
    Steps,
    factors,
    has_rows,
    is_added,
    sums_rows,
)

__all__ = ["LEAST_BYTES", "PIECES", "in_pieces"]

aten = torch.ops.aten

LEAST_BYTES = 16 * 2**20
"""Of smaller tensors the gradient is computed at once."""

PIECES = 8


def in_pieces(graph: fx.Graph) -> None:
    """Compute the gradients of large returned tensors in pieces, in place; see NOTE [Gradients in pieces]."""
    for node in list(graph.nodes):
        if node.target is LATE and _is_large(node.meta["val"]):
            try:
                steps = Steps.around(node)
                _Writer(graph, steps).write()
            except Refused:
                continue


def _is_large(x: Tensor) -> bool:
    if x.dim() < 2 or not all(isinstance(n, int) for n in x.shape) or x.shape[-1] < 2:
        return False
    return x.numel() >= 2 * PIECES * x.shape[-1] and x.numel() * x.element_size() >= LEAST_BYTES


def _precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which pieces are added up."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


class _Writer:
    """Writes the pieces before the first node that needs a result of them."""

    def __init__(self, graph: fx.Graph, steps: Steps) -> None:
        self.graph, self.steps = graph, steps
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.region = sorted(steps.reads, key=self.order.__getitem__)
        fake_mode = _torch.detect_fake_mode([self.region[0].meta["val"]])
        self.emitter = Emitter(graph, fake_mode, _torch.select_decomp_table())
        self.outside: dict[Any, Tensor] = {}
        self.first = self.stop = 0  # the rows of the piece that is written
        self.piece: dict[Any, Tensor] = {}  # its values
        self.after: list[Tensor] = []  # what it waits for

    def write(self) -> None:
        point, ends = self._make_room(), self.steps.ends
        with self.graph.inserting_before(point), self.emitter.serving(ends[0]):
            results = self.emitter.run(self._pieces)
        for end in ends:
            with self.graph.inserting_before(end if is_added(end) else point), self.emitter.serving(end):
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
            Refused: they read what is computed from their results.
        """
        steps, todo = self.steps, []
        needed = [n for end in steps.ends for n in ([end] if is_added(end) else end.users)]
        point = min(needed, key=self.order.__getitem__)
        for reads in steps.reads.values():
            todo += [r.node for r in reads.values() if not steps.inside(r)]
        for end in steps.ends:
            todo += [n for n in factors(end) if n not in steps.cone]
        moved: set[fx.Node] = set()
        while todo:
            node = todo.pop()
            if node in steps.ends:
                raise Refused(f"{node} is read, and computed from it")
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

    def _free(self, read: Read) -> Tensor:
        """What is the same for all pieces, [k] or []."""
        x = self._given(read.node)
        return x.reshape([x.numel()] if x.numel() > 1 else [])

    def _tall(self, read: Read, form: Form) -> Tensor:
        """All rows of what the pieces read, [R, k]."""
        x = self._given(read.node)
        if not has_rows(read):
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
            self.piece = {}
            for node in self.region:
                self.piece[node] = self._step(node)
            for end in ends:
                self._add(end, results[end])
        return results

    def _value(self, read: Read) -> Tensor:
        if self.steps.inside(read):
            return self.piece[read.node]
        key = read.node, read.form, has_rows(read) or read.shape
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
        if node.target in VIEWS or node.target in (aten.permute.default, aten.expand.default):
            made = args[0]
        elif node.target in REDUCTIONS:
            made = node.target(args[0], [1] if isinstance(args[1], Sequence) else 1, True, **kwargs)
        elif node.target in ALONG_ROWS:
            made = node.target(args[0], 1, *args[2:], **kwargs)
        elif node.target in CREATE:
            made = node.target(shape, *args[1:], **kwargs)
        elif node.target is LATE:
            x, *rest = args[:4]
            made = ports.add_late(x.expand(shape), *rest, self.first, self.stop < self.steps.rows)
        else:
            made = node.target(*args, **kwargs)
        return made if list(made.shape) == shape else made.expand(shape)

    # ---- what is computed from all rows

    def _add(self, end: fx.Node, so_far: list[Tensor]) -> None:
        """Add a piece to a result: to the list of its pieces, or to their sum."""
        precise = _precise(end.meta["val"].dtype)
        if sums_rows(end):
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
        if sums_rows(end):
            return None
        a, b = factors(end)
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
        return self._given(end.args[0]) + made if is_added(end) else made
