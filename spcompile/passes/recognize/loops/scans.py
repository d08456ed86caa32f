"""States whose update is affine, as `spcompile::affine_scan`: elementwise, or by a matrix along some dims;
and running maxima, as `spcompile::max_scan`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spcompile.passes.recognize.algebra.dims import Atom, Dims, align, atoms_of, name_dims, resolve
from spcompile.passes.recognize.algebra.products import Factor, same_values
from spcompile.passes.recognize.edit import Refused
from spcompile.passes.recognize.loops.affine import Product, mixed
from spcompile.passes.recognize.loops.evaluate import Batch
from spcompile.passes.recognize.loops.families import Carry
from spcompile.passes.recognize.loops.layout import Item, Layout, permuted, shaped, spread
from spcompile.passes.shadow import Value

__all__ = ["scan"]

_LARGEST = 1024
"""Rows of a transition matrix beyond which a scan would cost more than the loop."""


def scan(
    layout: Layout, carries: Sequence[Carry], initial: list[Tensor | None], followed: bool
) -> list[tuple[Any, Tensor]]:
    """The states before each step, with the steps in front, and the last ones, of one or several states that
    depend on each other. `followed`: whether the former are needed.

    Raises:
        Refused: an update isn't affine in the states.
    """
    like = carries[0].family.like
    dims = name_dims(like.shape)
    states = {c.family.members[0]: n for n, c in enumerate(carries)}
    if any(c.family.like.shape != like.shape or c.family.like.dtype != like.dtype for c in carries):
        raise Refused("its states depend on each other and have several shapes")
    if len(carries) == 1 and len(list(_greatest_of(like))) > 1:
        return [_maximum(layout, carries[0], dims, initial[0])]
    terms = [layout.reader.expand(c.family.like, dims, set(states)) for c in carries]
    if len(carries) == 1 and all(t.state is None for t in terms[0]):
        return [_shifted(layout, carries[0], initial[0])]
    over = sorted({d for ts in terms for t in ts if t.state is not None for d in mixed(t.state, dims)})
    if len(carries) == 1 and not over and not followed and _accumulates(terms[0]):
        return [(None, _total(layout, terms[0], dims, initial[0]))]
    if len(carries) == 1 and not over:
        return [_elementwise(layout, terms[0], dims, initial[0])]
    return _Matrix(layout, dims, over, terms, states).solve(initial)


def _shifted(layout: Layout, carry: Carry, initial: Tensor | None) -> tuple[Batch, Tensor]:
    """A state that is all new in each step: the step before is the row before."""
    b = layout.evaluator.value(carry.family)
    x = b.x if b.batched else b.x.unsqueeze(0).expand(layout.evaluator.steps, *b.x.shape)
    back = layout.evaluator.reverse
    rows, final = (x[1:], x[0]) if back else (x[:-1], x[-1])
    if initial is None:  # a pad is realigned by a halo, where a concatenation is gathered
        pad = [0, 0] * (x.dim() - 1) + ([0, 1] if back else [1, 0])
        return Batch(torch.nn.functional.pad(rows, pad), True), final
    first = initial.unsqueeze(0).to(x.dtype)
    return Batch(torch.cat([rows, first] if back else [first, rows]), True), final


def _sum(layout: Layout, terms: Sequence[Product], groups: Sequence[tuple[Atom, ...]]) -> Batch | None:
    out: Batch | None = None
    for t in terms:
        x = layout.product(t, groups)
        if out is None:
            out = x
        else:  # one that is the same in all steps has no dim for them
            batched = x.batched or out.batched
            a, b = (y.x if y.batched or not batched else y.x.unsqueeze(0) for y in (out, x))
            out = Batch(a + b, batched)
    return out


def _run(
    a: Tensor | None, b: Tensor, initial: Tensor | None, matrix: bool, layout: Layout
) -> tuple[Tensor, Tensor]:
    out = torch.ops.spcompile.affine_scan(a, b, initial, matrix, layout.evaluator.reverse)
    return out[0], out[1]


def _elementwise(
    layout: Layout, terms: list[Product], dims: Dims, initial: Tensor | None
) -> tuple[Batch, Tensor]:
    linear = [t for t in terms if t.state is not None]
    constant = _sum(layout, [t for t in terms if t.state is None], dims)
    coefficient = _sum(layout, linear, dims)
    if coefficient is None:
        raise Refused("it forgets its state in each step")
    a = None if _accumulates(linear) else coefficient
    b = constant or Batch(torch.zeros((), **layout.options).expand(_sizes(dims)), False)
    return _by_elements(partial(_run, matrix=False, layout=layout), layout, dims, a, b, initial)


def _by_elements(
    run: Callable[[Tensor | None, Tensor, Tensor | None], tuple[Tensor, Tensor]],
    layout: Layout,
    dims: Dims,
    a: Batch | None,
    b: Batch,
    initial: Tensor | None,
) -> tuple[Batch, Tensor]:
    """`[*L, T, K, V]` with the state's last two dims as K and V; a and b have the state's dims."""
    shape, steps = _sizes(dims), layout.evaluator.steps
    pad = [1] * max(0, 2 - len(shape))
    places = len(shape) + len(pad) - 2

    def placed(x: Tensor) -> Tensor:
        return shaped(x, [*x.shape, *pad]).movedim(0, places)

    factor = None if a is None else placed(a.x if a.batched else a.x.unsqueeze(0))
    start = None if initial is None else shaped(initial.to(layout.dtype), [*shape, *pad])
    before, final = run(factor, placed(spread(b, shape, steps)), start)
    return Batch(shaped(before.movedim(places, 0), [steps, *shape]), True), shaped(final, shape)


def _sizes(dims: Dims) -> list[int]:
    return [math.prod(a.size for a in d) for d in dims]


def _maximum(layout: Layout, carry: Carry, dims: Dims, initial: Tensor | None) -> tuple[Batch, Tensor]:
    """S' = max(S + a, b): what a recurrence is stabilised by."""
    reader, old = layout.reader, carry.family.members[0]
    sides = list(_greatest_of(carry.family.like))
    passing = [x for x in sides if reader.depends(x)]
    if len(passing) != 1:
        raise Refused("its state goes through maximum")
    terms = reader.expand(passing[0], align(dims, passing[0].shape), {old})
    linear = [t for t in terms if t.state is not None]
    if not _accumulates(terms) or any(t.state is not None and mixed(t.state, dims) for t in linear):
        raise Refused("its state goes through maximum, and more than sums before")
    a = _sum(layout, [t for t in terms if t.state is None], dims)
    others = [
        layout.product(Product([Factor(x, align(dims, x.shape))]), dims) for x in sides if x is not passing[0]
    ]
    b, *more = others if all(x.batched for x in others) else [_stepped(x) for x in others]
    for x in more:
        b = Batch(torch.maximum(b.x, x.x), b.batched)
    if initial is None:  # a state of zeros, where the operator's own is -inf
        initial = torch.zeros(_sizes(dims), **layout.options)

    def run(added: Tensor | None, b: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        out = torch.ops.spcompile.max_scan(added, b, start, layout.evaluator.reverse)
        return out[0], out[1]

    return _by_elements(run, layout, dims, a, b, initial)


def _stepped(b: Batch) -> Batch:
    return b if b.batched else Batch(b.x.unsqueeze(0), True)


def _greatest_of(v: Value) -> Iterator[Value]:
    """What `v` is the greatest of; itself, if it is no maximum."""
    if (source := same_values(v)) is not None:
        yield from _greatest_of(source)
    elif v.name == "maximum":
        for side in (v.args["self"], v.args["other"]):
            yield from _greatest_of(side)
    else:
        yield v


def _accumulates(terms: Sequence[Product]) -> bool:
    """Whether the state is only added to."""
    linear = [t for t in terms if t.state is not None]
    return len(linear) == 1 and not linear[0].factors and linear[0].scale == 1.0 and not linear[0].summed


def _total(layout: Layout, terms: Sequence[Product], dims: Dims, initial: Tensor | None) -> Tensor:
    """The last state of one that is only added to: no order is needed, so no scan."""
    shape = [math.prod(a.size for a in d) for d in dims]
    constant = _sum(layout, [t for t in terms if t.state is None], dims)
    if constant is None:
        raise Refused("its state never changes")
    x = spread(constant, shape, layout.evaluator.steps).sum(0)
    return x if initial is None else x + initial.to(layout.dtype)


class _Matrix:
    """States chained by a matrix over the dims that are mixed, and over the states if they are several.

    Dims on which the matrix depends are batch dims, the others are columns.
    """

    def __init__(
        self, layout: Layout, dims: Dims, over: list[int], terms: list[list[Product]], states: dict
    ) -> None:
        self.layout, self.dims, self.terms, self.states = layout, dims, terms, states
        self.over = over
        self.inner = name_dims([math.prod(a.size for a in dims[d]) for d in over])
        used = {a for ts in terms for t in ts if t.state is not None for f in t.factors for a in f.atoms}
        rest = [d for d in range(len(dims)) if d not in over]
        self.batch = [d for d in rest if used & set(atoms_of((dims[d],)))]
        self.columns = [d for d in rest if d not in self.batch]
        self.size = math.prod(a.size for d in over for a in resolve(dims[d]))
        if self.size * len(terms) > _LARGEST:
            raise Refused("its state is mixed by too large a matrix")

    def _block(self, row: int, column: int) -> Tensor:
        """The matrix from one state to another, [T or 1, *batch, K, K]."""
        groups = [self.dims[d] for d in self.batch]
        out_group = tuple(a for d in self.over for a in resolve(self.dims[d]))
        in_group = tuple(a for d in self.inner for a in d)
        total: Tensor | None = None
        for t in self.terms[row]:
            if t.state is None or self.states[t.state.value] != column:
                continue
            items = [*map(self.layout.item, t.factors), *self._ends(t.state)]
            b = self.layout.contract(items, [*groups, out_group, in_group], t.summed, t.scale)
            x = spread(b, [*self._sizes(self.batch), self.size, self.size])
            total = x if total is None else total + x
        if total is None:
            return torch.zeros((), **self.layout.options).expand(
                1, *self._sizes(self.batch), self.size, self.size
            )
        return total

    def _sizes(self, which: Sequence[int]) -> list[int]:
        return [math.prod(a.size for a in self.dims[d]) for d in which]

    def _ends(self, state: Factor) -> list[Item]:
        """Deltas that join the dims that a term has of the state to the columns of the matrix."""
        out = []
        for n, d in enumerate(self.over):
            eye = torch.eye(math.prod(a.size for a in self.dims[d]), **self.layout.options)
            out.append(Item(Batch(eye, False), (state.dims[d], self.inner[n])))
        return out

    def solve(self, initial: list[Tensor | None]) -> list[tuple[Batch, Tensor]]:
        """Run the scan; (states before each step, last state) of each."""
        lay, count = self.layout, len(self.terms)
        steps = lay.evaluator.steps
        blocks = [[self._block(r, c) for c in range(count)] for r in range(count)]
        lead = max(x.shape[0] for row in blocks for x in row)
        rows = [torch.cat([x.expand(lead, *x.shape[1:]) for x in row], -1) for row in blocks]
        a = torch.cat(rows, -2).expand(steps, *self._sizes(self.batch), *[self.size * count] * 2)
        b = torch.cat([self._constant(ts) for ts in self.terms], -2)
        start = None
        if any(x is not None for x in initial):
            start = torch.cat([self._state(x) for x in initial], -2)
        places = len(self.batch)
        before, final = _run(a.movedim(0, places), b.movedim(0, places), start, True, lay)
        before = before.movedim(places, 0)
        out = []
        for n in range(count):
            cut = [x.narrow(-2, n * self.size, self.size) for x in (before, final)]
            out.append((Batch(self._back(cut[0], [steps]), True), self._back(cut[1], [])))
        return out

    @property
    def _order(self) -> list[int]:
        return [*self.batch, *self.over, *self.columns]

    def _merged(self) -> list[int]:
        return [*self._sizes(self.batch), self.size, math.prod(self._sizes(self.columns))]

    def _constant(self, terms: list[Product]) -> Tensor:
        """[T, *batch, K, V]."""
        groups = [self.dims[d] for d in self._order]
        constant = _sum(self.layout, [t for t in terms if t.state is None], groups)
        zero = Batch(torch.zeros((), **self.layout.options).expand(self._sizes(self._order)), False)
        steps = self.layout.evaluator.steps
        return shaped(spread(constant or zero, self._sizes(self._order), steps), [steps, *self._merged()])

    def _state(self, x: Tensor | None) -> Tensor:
        if x is None:
            return torch.zeros(self._merged(), **self.layout.options)
        return shaped(permuted(x.to(self.layout.dtype), self._order), self._merged())

    def _back(self, x: Tensor, lead: list[int]) -> Tensor:
        x = shaped(x, [*lead, *self._sizes(self._order)])
        back = [self._order.index(d) + len(lead) for d in range(len(self._order))]
        return permuted(x, [*range(len(lead)), *back])
