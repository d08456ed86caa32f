"""The body's arithmetic as sums of products, in which the carried state occurs at most once per product.

    out[atoms] = sum_terms scale * sum_{summed} state[atoms] * prod_n factor_n[atoms]

Reading a Value this way *is* the proof that it is affine in the state, op by op: an op that isn't known, or a
product of two things that depend on the state, is `Refused`. Dims are named by atoms (see `algebra.dims`),
so a term says which dims of the state pass through and which are mixed by a contraction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from spcompile.passes.recognize.algebra.dims import Atom, Dims, align, atoms_of, back_through_view
from spcompile.passes.recognize.algebra.products import Factor, product_of, same_values, scalar, summed_dims
from spcompile.passes.recognize.edit import Refused
from spcompile.passes.recognize.loops.families import Carry, Family, Invariant, Loop, Ref
from spcompile.passes.recognize.loops.selections import selections
from spcompile.passes.shadow import Value

__all__ = ["Product", "Reader", "mixed"]

_MOST = 64


@dataclass
class Product:
    """One term; `state` is the state that it is linear in, with its dims, or None."""

    factors: list[Factor] = field(default_factory=list)
    state: Factor | None = None
    summed: list[Atom] = field(default_factory=list)
    scale: float = 1.0

    def times(self, other: Product) -> Product:
        if self.state is not None and other.state is not None:
            raise Refused("its state is not updated linearly")
        return Product(
            self.factors + other.factors,
            self.state or other.state,
            self.summed + other.summed,
            self.scale * other.scale,
        )

    def scaled(self, by: float) -> Product:
        return Product(self.factors, self.state, self.summed, self.scale * by)


class Reader:
    """Reads Values of the second step of a loop (whose Refs `loop.by_value` has) as sums of products."""

    def __init__(self, loop: Loop, known: Callable[[Ref], bool]) -> None:
        self.loop = loop
        self.known = known
        """Whether a ref is computed already: it no longer counts as depending on the state."""
        self.memo: dict[Ref, frozenset[Carry]] = {}

    def ref(self, v: Value) -> Ref:
        """What a Value of the second step stands for."""
        if v in self.loop.ambiguous:
            raise Refused("one value has several roles in its steps")
        return self.loop.by_value.get(v) or Invariant(v)

    def carries(self, ref: Ref) -> frozenset[Carry]:
        """The carried states that it is computed from."""
        if isinstance(ref, Invariant) or self.known(ref):
            return frozenset()
        if isinstance(ref, Carry):
            return frozenset([ref])
        if ref not in self.memo:
            self.memo[ref] = frozenset[Carry]().union(*(self.carries(o) for o in ref.operands()))
        return self.memo[ref]

    def depends(self, v: Value) -> bool:
        return bool(self.carries(self.ref(v)))

    def expand(self, v: Value, dims: Dims, states: set[Value], split: bool = False) -> list[Product]:
        """`v` as a sum of products.

        Args:
            v: a Value of the second step.
            dims: names of its dims.
            states: Values that are the states to be linear in: they are not looked into.
            split: take what does not depend on the state apart as well, as far as products go.
        Raises:
            Refused: it isn't affine in the states, or not seen to be.
        """
        if v in states:
            return [Product(state=Factor(v, dims))]
        depends = self.depends(v)
        if depends and isinstance(self.ref(v), Carry):
            raise Refused("its states depend on each other")
        if not depends and (not split or not isinstance(self.ref(v), Family)):
            return [Product([Factor(v, dims)])]  # the operands of an invariant are not of the second step
        try:
            terms = self._step(v, dims, states, split)
        except Refused:
            if depends:
                raise
            terms = None
        if terms is None:
            if depends:
                raise Refused(f"its state goes through {v.name}")
            return [Product([Factor(v, dims)])]
        if len(terms) > _MOST:
            raise Refused("its state has too many terms")
        return terms

    def _step(self, v: Value, dims: Dims, states: set[Value], split: bool) -> list[Product] | None:
        def at(x: Value, d: Dims) -> list[Product]:
            return self.expand(x, d, states, split)

        if (source := same_values(v)) is not None:
            return at(source, dims)
        if (back := back_through_view(v, dims)) is not None:
            return at(*back)
        a, b = v.args.get("self"), v.args.get("other")
        if v.name == "mul" or (v.name == "div" and not v.args.get("rounding_mode")):
            return self._product(v, dims, at)
        if v.name == "add":
            if not self.depends(v):
                return None  # a sum is one factor where it does not depend on the state
            by = float(v.args.get("alpha", 1))
            return self._term(a, dims, at) + [t.scaled(by) for t in self._term(b, dims, at)]
        if v.name == "copy":
            return at(v.args["src"], align(dims, v.args["src"].shape))
        if v.name == "sum" and (v.dtype is None or v.dtype == v.args["self"].dtype):
            return self._sum(v, dims, at)
        if self.depends(v) and (found := selections(v, dims)) is not None:
            out = [
                x.times(Product(list(factors), summed=list(summed)))
                for source, inner, factors, summed in found
                for x in at(source, inner)
            ]
            return out or None
        term = product_of(v, dims)
        if term is None or v.name == "sum":
            return None
        out = [Product(scale=term.scale, summed=list(term.summed))]
        for f in term.factors:
            out = [x.times(y) for x in out for y in at(f.value, f.dims)]
        return out

    def _term(self, x: Any, dims: Dims, at: Callable[[Value, Dims], list[Product]]) -> list[Product]:
        if isinstance(x, Value):
            return at(x, align(dims, x.shape))
        return [Product(scale=float(x))]

    def _product(
        self, v: Value, dims: Dims, at: Callable[[Value, Dims], list[Product]]
    ) -> list[Product] | None:
        a, b = v.args["self"], v.args["other"]
        left = self._term(a, dims, at)
        if v.name == "div":
            c = scalar(b)
            if c is not None:
                return [t.scaled(1.0 / c) for t in left] if c else None
            if self.depends(b):
                return None
            right = [Product([Factor(b, align(dims, b.shape), inverse=True)])]
        else:
            right = self._term(b, dims, at)
        return [x.times(y) for x in left for y in right]

    def _sum(self, v: Value, dims: Dims, at: Callable[[Value, Dims], list[Product]]) -> list[Product]:
        inner, summed = summed_dims(v, dims)
        return [Product(t.factors, t.state, t.summed + summed, t.scale) for t in at(v.args["self"], inner)]


def mixed(state: Factor, dims: Dims) -> list[int]:
    """The dims of the state that do not pass straight through to the result."""
    pairs = enumerate(zip(state.dims, dims, strict=True))
    return [d for d, (x, y) in pairs if atoms_of((x,)) != atoms_of((y,))]
