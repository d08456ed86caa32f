"""Which steps around a gradient are done row by row; NOTE [Gradients in pieces] in ``passes.chunks``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from spcompile import ports
from spcompile.rules.pointwise import is_pointwise

__all__ = [
    "ALONG_ROWS",
    "CREATE",
    "LATE",
    "REDUCTIONS",
    "VIEWS",
    "Form",
    "Read",
    "Refused",
    "Steps",
    "factors",
    "has_rows",
    "is_added",
    "sums_rows",
]

aten = torch.ops.aten

VIEWS = {
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
REDUCTIONS = {aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.any.dim}
ALONG_ROWS = {aten.scatter.value, aten.scatter.src, aten.gather.default}
CREATE = {aten.full.default}
LATE = ports.ops.add_late.default
BROADCAST = {aten.expand.default, LATE}


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _same(node: fx.Node, dims: Any) -> bool:
    """Whether ``node`` is a matrix, and ``dims`` exchanges its dims."""
    return len(shape_of(node)) == 2 and list(dims) == [1, 0]


# ---- what is computed row by row ------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How rows lie in a value: [*rows, columns], or [columns, rows] if turned; one column may be left out."""

    columns: int
    turned: bool = False


@dataclass(frozen=True)
class Read:
    """What a step reads of ``node``, which is broadcast to ``shape``; without rows of its own if no form."""

    node: fx.Node
    shape: tuple[int, ...]
    form: Form | None


class Refused(Exception):
    """The graph is not of the kind that can be done in pieces."""


@dataclass
class Steps:
    """The steps that are done piece by piece.

    Args:
        rows: R; the rows of every value.
        forms: of each value that is computed in pieces.
        reads: what each of them reads.
        cone: those of them that are computed from the gradient.
        ends: what is computed from all rows of these.
    """

    rows: int
    forms: dict[fx.Node, Form] = field(default_factory=dict)
    reads: dict[fx.Node, dict[fx.Node, Read]] = field(default_factory=dict)
    cone: set[fx.Node] = field(default_factory=set)
    ends: list[fx.Node] = field(default_factory=list)

    # ---- one step

    def step(self, node: fx.Node, form: Form) -> dict[fx.Node, Read] | None:
        """What ``node`` reads, if each row of it is computed from the same row of its operands."""
        operands = node.all_input_nodes
        values = [n.meta.get("val") for n in (node, *operands)]
        if node.op != "call_function" or not all(isinstance(x, Tensor) for x in values):
            return None
        shape = shape_of(node)
        if not all(isinstance(s, int) for n in (node, *operands) for s in shape_of(n)):
            return None
        if not self._is_of(shape, form):
            return None
        if node.target in VIEWS:
            return self._view(node, form)
        if node.target is aten.permute.default:
            return self._permute(node, form)
        if node.target in REDUCTIONS:
            return self._reduction(node, form)
        if node.target in ALONG_ROWS:
            return self._along_rows(node, form)
        if node.target in CREATE:
            return {}
        if node.target in BROADCAST or is_pointwise(node.target):
            return {n: self._aligned(n, shape, form) for n in operands}
        return None

    def _is_of(self, shape: tuple[int, ...], form: Form) -> bool:
        if form.columns == 1:
            return math.prod(shape) == self.rows
        if form.turned:
            return shape == (form.columns, self.rows)
        return bool(shape) and shape[-1] == form.columns and math.prod(shape[:-1]) == self.rows

    def _view(self, node: fx.Node, form: Form) -> dict[fx.Node, Read] | None:
        (x,) = node.all_input_nodes
        return {x: Read(x, shape_of(x), form)} if self._is_of(shape_of(x), form) else None

    def _permute(self, node: fx.Node, form: Form) -> dict[fx.Node, Read] | None:
        x = node.args[0]
        if not _same(x, node.args[1]) or (form.columns == 1 and 1 not in shape_of(x)):
            return None
        turned = form if form.columns == 1 else Form(form.columns, not form.turned)
        return {x: Read(x, shape_of(x), turned)}

    def _reduction(self, node: fx.Node, form: Form) -> dict[fx.Node, Read] | None:
        if len(node.args) < 2 or form.columns > 1:
            return None
        x, dims = node.args[:2]
        last, dims = len(shape_of(x)) - 1, dims if isinstance(dims, Sequence) else [dims]
        read = Read(x, shape_of(x), Form(shape_of(x)[-1]))
        return {x: read} if list(dims) in ([last], [-1]) else None

    def _along_rows(self, node: fx.Node, form: Form) -> dict[fx.Node, Read] | None:
        operands, last = node.all_input_nodes, len(shape_of(node)) - 1
        if node.args[1] not in (-1, last) or form.turned:
            return None
        if any(len(shape_of(x)) != last + 1 or math.prod(shape_of(x)[:-1]) != self.rows for x in operands):
            return None
        return {x: Read(x, shape_of(x), Form(shape_of(x)[-1])) for x in operands}

    def _aligned(self, node: fx.Node, shape: tuple[int, ...], form: Form) -> Read:
        """``node`` broadcast to the rows of a result of ``shape``."""
        own = (1,) * (len(shape) - len(shape_of(node))) + shape_of(node)
        if form.columns == 1:
            return Read(node, shape, None if math.prod(own) == 1 else form)
        if form.turned:
            turned = own[0] > 1
            return Read(node, own, None if own[1] == 1 else Form(own[0], turned))
        free = math.prod(own[:-1]) == 1
        return Read(node, own if free else (*shape[:-1], own[-1]), None if free else Form(own[-1]))

    # ---- all of them

    @staticmethod
    def around(start: fx.Node) -> Steps:
        """What is computed from ``start``, and what this reads.

        Raises:
            Refused: something else is computed from it.
        """
        form = Form(shape_of(start)[-1])
        steps = Steps(math.prod(shape_of(start)[:-1]))
        steps._take(start, [form])
        for node in start.graph.nodes:
            if any(n in steps.cone for n in node.all_input_nodes):
                steps._follow(node)
        if not steps.ends:
            raise Refused("nothing is computed from it")
        for node in list(steps.reads):
            steps._pull(node)
        steps._check_letters(start.graph)
        return steps

    def _take(self, node: fx.Node, forms: Sequence[Form]) -> None:
        mine = [n for n in node.all_input_nodes if n in self.cone]
        for form in forms:
            reads = self.step(node, form)
            if reads is not None and all(self.inside(reads[n]) for n in mine):
                self.cone.add(node)
                self.forms[node], self.reads[node] = form, reads
                return
        raise Refused(f"{node} is computed from it")

    def _follow(self, node: fx.Node) -> None:
        if isinstance(node.meta.get("val"), Tensor) and self._is_end(node):
            self.ends.append(node)
            return
        shape = shape_of(node) if isinstance(node.meta.get("val"), Tensor) else ()
        self._take(node, [Form(1), *(f for s in shape[-1:] for f in (Form(s), Form(shape[0], True)))])

    def inside(self, read: Read) -> bool:
        """Whether what is read is a value in pieces, as it is computed."""
        known = self.forms.get(read.node)
        return known is not None and known == read.form and has_rows(read)

    def _is_end(self, node: fx.Node) -> bool:
        """Whether it is a product of a value in pieces and something else, or its sum over all rows.

        Raises:
            Refused: it is a product of two of them.
        """
        mine = [n for n in node.all_input_nodes if n in self.cone]
        if sums_rows(node):
            return self.forms[mine[0]] == Form(shape_of(mine[0])[-1])
        if not _is_product(node):
            return False
        times = [n for n in node.args if n in self.cone]
        if len(times) != 1 or times[0] not in factors(node):
            raise Refused(f"{node} is not a product of it and something else")
        return self.forms[mine[0]].columns > 1

    def _pull(self, node: fx.Node) -> None:
        """Take in what ``node`` reads and what is computed row by row too."""
        todo = [node]
        while todo:
            for read in self.reads[todo.pop()].values():
                if read.form is None or self.inside(read):
                    continue
                if read.node in self.cone:
                    raise Refused(f"{read.node} is read in two ways")
                reads = self.step(read.node, read.form) if has_rows(read) else None
                if reads is not None and read.node not in self.forms:
                    self.forms[read.node], self.reads[read.node] = read.form, reads
                    todo.append(read.node)
                elif not has_rows(read) and read.form.columns > 1:
                    raise Refused(f"{read.node} would be written out for all rows")

    def _check_letters(self, graph: fx.Graph) -> None:
        """A letter is taken once: a step that is kept beside its pieces may read none."""
        gone = set(self.ends)
        for node in reversed(graph.nodes):
            if node in self.reads and all(user in gone for user in node.users):
                gone.add(node)
            elif node in self.reads and node.target is LATE:
                raise Refused(f"{node} is needed outside too")


def has_rows(read: Read) -> bool:
    """Whether what is read has all the rows itself, and is not broadcast to them."""
    return math.prod(shape_of(read.node)) == math.prod(read.shape)


def _is_product(node: fx.Node) -> bool:
    if node.target is aten.mm.default:
        return True
    return node.target is aten.addmm.default and not node.kwargs  # else beta and alpha


def factors(node: fx.Node) -> list[fx.Node]:
    return list(node.args[-2:]) if _is_product(node) else []


def sums_rows(node: fx.Node) -> bool:
    """Whether it is a sum over all dims but the last, as a bias' gradient is."""
    if node.target is not aten.sum.dim_IntList:
        return False
    dims = len(shape_of(node.args[0]))
    return dims > 1 and sorted(d % dims for d in node.args[1]) == list(range(dims - 1))


def is_added(end: fx.Node) -> bool:
    """Whether something is added to a product, which perhaps comes after the others are used."""
    return end.target is aten.addmm.default
