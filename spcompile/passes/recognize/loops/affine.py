"""The body's arithmetic as sums of products, in which the carried state occurs at most once per product.

    out[atoms] = sum_terms scale * sum_{summed} state[atoms] * prod_n factor_n[atoms]

Reading a Value this way *is* the proof that it is affine in the state, op by op: an op that isn't known, or a
product of two things that depend on the state, is `Refused`. Dims are named by atoms (see `algebra.dims`),
so a term says which dims of the state pass through and which are mixed by a contraction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from spcompile.passes.recognize.algebra.dims import Atom, Dims, atoms_of
from spcompile.passes.recognize.algebra.expand import expand
from spcompile.passes.recognize.algebra.products import Factor, Term
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
        terms = self._expanded(v, dims)
        if terms is None or any(t.masks for t in terms):
            return None
        out = []
        for t in terms:
            products = [Product(scale=t.scale, summed=list(t.summed))]
            for f in t.factors:
                if f.inverse and self.depends(f.value):
                    return None
                by = [Product([f])] if f.inverse else self.expand(f.value, f.dims, states, split)
                products = [x.times(y) for x in products for y in by]
            out += products
        return out

    def _expanded(self, v: Value, dims: Dims) -> list[Term] | None:
        """One step back."""
        if self.depends(v):
            found = selections(v, dims)
            if found is not None:
                return found
        elif v.name == "add":
            return None  # a sum is one factor where it does not depend on the state
        if v.name == "sum" and v.dtype is not None and v.dtype != v.args["self"].dtype:
            return None
        return expand(v, dims)


def mixed(state: Factor, dims: Dims) -> list[int]:
    """The dims of the state that do not pass straight through to the result."""
    pairs = enumerate(zip(state.dims, dims, strict=True))
    return [d for d, (x, y) in pairs if atoms_of((x,)) != atoms_of((y,))]
