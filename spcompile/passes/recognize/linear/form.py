"""One contraction read as linear attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spcompile.passes.recognize.algebra.dims import Atom, Dims, atoms_of, resolve
from spcompile.passes.recognize.algebra.products import Factor, peel
from spcompile.passes.recognize.linear.weights import Table, Weights
from spcompile.passes.shadow import Value


@dataclass
class Form:
    """One contraction read as linear attention."""

    terminal: Value
    out: Dims
    q: Factor
    k: Factor
    v: Factor | None
    t: Atom
    s: Atom
    features: tuple[Atom, ...]
    values: tuple[Atom, ...]
    rows: list[Factor]
    """Factors of the output that are not summed over: they are applied after the op."""
    columns: list[Factor]
    """Factors per key: they go into v."""
    weights: Weights
    table: Table
    mixed: list[Factor]
    """What the weights were read from; `inverse` tells a mask from its complement."""
    scale: float
    path: list[Factor]
    dtype: torch.dtype | None
    polynomial: tuple[float, ...] | None = None
    """The scores' polynomial: a_n (q.k)^n, by power."""

    def batch(self) -> tuple[Atom, ...]:
        """In q's order, then what only k or v have."""
        named = set(resolve((self.t, self.s, *self.features, *self.values)))
        seen: dict[Atom, None] = {}
        for f in (self.q, self.k, self.v):
            for a in atoms_of(f.dims) if f is not None else ():
                if a not in named:
                    seen[a] = None
        return tuple(seen)

    def interior(self) -> list[Value]:
        return [f.value for f in self.path]

    def quadratic(self) -> list[Value]:
        """What has both rows and columns: the scores in all their stages."""
        return [f.value for f in self.path if {self.t, self.s} <= f.atoms]

    def signature(self) -> tuple:
        """Equal for two forms whose q, k and decays are the same Values with the same roles."""
        part = dict.fromkeys(resolve((self.t,)), "T") | dict.fromkeys(resolve((self.s,)), "S")
        part |= dict.fromkeys(self.features, "K")
        part |= {a: f"B{n}" for n, a in enumerate(self.batch())}
        roots = [peel(f.value, f.dims) for f in (self.q, self.k)]
        named: list[tuple] = [(v, tuple((part[a], a.size) for a in atoms_of(d))) for v, d, _ in roots]
        if self.weights.decays:
            named += [(f.value, f.inverse, tuple(part[a] for a in atoms_of(f.dims))) for f in self.mixed]
        return (self.weights.kind, self.polynomial, *named)

    @property
    def groups(self) -> tuple[tuple[Atom, ...], tuple[Atom, ...]]:
        """The batch as B and H."""
        batch = self.batch()
        return batch[:1], batch[1:]
