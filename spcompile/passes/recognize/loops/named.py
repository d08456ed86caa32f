"""States that are the memory of linear attention: S' = (I - beta k^T k) D S + beta k^T v, read as q S.

The update's terms say which it is: one that passes S through (its factors are the decay), one without S (k, v
and beta), and for the delta rule one that contracts S. Which dims of S are keys is said by what reads it: the
dims that a query is contracted with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spcompile.passes.recognize.algebra.dims import Atom, Dims, atoms_of, name_dims, resolve
from spcompile.passes.recognize.algebra.products import Factor
from spcompile.passes.recognize.edit import Group, Refused
from spcompile.passes.recognize.loops.affine import Product, Reader, mixed
from spcompile.passes.recognize.loops.evaluate import Batch
from spcompile.passes.recognize.loops.families import Carry, Family, Invariant, Progress, Ref
from spcompile.passes.recognize.loops.layout import Item, Layout, permuted, shaped, spread

__all__ = ["attention"]


@dataclass
class Readout:
    """A family that only sees the state contracted with queries."""

    family: Family
    dims: Dims
    terms: list[Product]


def attention(
    layout: Layout, carry: Carry, initial: Tensor | None, roots: Sequence[Ref]
) -> tuple[dict[Family, Batch], Tensor]:
    """Every readout of the state that `roots` need, for all steps, and the last state.

    Raises:
        Refused: the recurrence, or what reads it, is no linear attention.
    """
    readouts = _Readouts(layout.reader, carry).find(roots)
    if not readouts:
        raise Refused("nothing reads its state")
    return _Memory(layout, carry, readouts).emit(initial)


class _Readouts:
    """The families, from the roots down, in which the state occurs only inside contractions."""

    def __init__(self, reader: Reader, carry: Carry) -> None:
        self.reader, self.carry = reader, carry
        self.old, self.new = carry.family.members[:2]
        self.found: dict[Family, Readout] = {}

    def find(self, roots: Iterable[Ref]) -> list[Readout]:
        """All of them; Refused where the state is used as a whole."""
        todo, seen = list(roots), set[Ref]()
        while todo:
            ref = todo.pop()
            if ref in seen or self.carry not in self.reader.carries(ref):
                continue
            seen.add(ref)
            if ref is self.carry or ref is self.carry.family or isinstance(ref, Carry):
                raise Refused("its state is used as a whole")
            assert isinstance(ref, Family)
            readout = self._read(ref)
            if readout is not None:
                self.found[ref] = readout
            else:
                todo += ref.operands()
        return list(self.found.values())

    def _read(self, family: Family) -> Readout | None:
        dims = name_dims(family.like.shape)
        try:
            terms = self.reader.expand(family.like, dims, {self.old, self.new})
        except Refused:
            return None
        for t in terms:
            if t.state is not None and not set(atoms_of(t.state.dims)) & set(resolve(t.summed)):
                return None
        return Readout(family, dims, [_apart(self.reader, t) for t in terms])


def _apart(reader: Reader, term: Product) -> Product:
    """The term with each factor taken apart as far as products go."""
    out = Product(state=term.state, summed=list(term.summed), scale=term.scale)
    for f in term.factors:
        pieces = [Product([f])] if f.inverse else reader.expand(f.value, f.dims, set(), split=True)
        out = out.times(pieces[0] if len(pieces) == 1 else Product([f]))
    return out


def _keys_of(readouts: Sequence[Readout]) -> list[int]:
    """The dims of the state that queries are contracted with."""
    found = set()
    for r in readouts:
        for t in r.terms:
            if t.state is not None:
                over = set(resolve(t.summed))
                found.add(tuple(d for d, g in enumerate(t.state.dims) if set(resolve(g)) & over))
    if len(found) != 1:
        raise Refused("its state is read in several ways")
    return list(found.pop())


class _Memory:
    """One state as linear attention's."""

    def __init__(self, layout: Layout, carry: Carry, readouts: list[Readout]) -> None:
        self.layout, self.carry, self.readouts = layout, carry, readouts
        reader = layout.reader
        self.dims = name_dims(carry.family.like.shape)
        terms = [
            _apart(reader, t) for t in reader.expand(carry.family.like, self.dims, {carry.family.members[0]})
        ]
        if any(a.parts for d in self.dims for a in d):
            raise Refused("a dim of its state is taken apart")
        self.key_dims = _keys_of(readouts)
        self.decay, self.delta, self.constant = self._sort(terms)
        self.names = _Names(reader)
        self.k = self._keys(self.constant.factors, self._key_atoms)
        self.beta: list[Factor] = []
        if self.delta is not None:
            self.beta = self._delta_rule()
        taken = [*map(id, self.k), *map(id, self._in_constant(self.beta))]
        self.v = [f for f in self.constant.factors if id(f) not in taken]
        self._roles()

    @property
    def _key_atoms(self) -> set[Atom]:
        return {a for d in self.key_dims for a in self.dims[d]}

    def _sort(self, terms: list[Product]) -> tuple[Product, Product | None, Product]:
        passing, mixing, constant = list[Product](), list[Product](), list[Product]()
        for t in terms:
            over = None if t.state is None else mixed(t.state, self.dims)
            (constant if over is None else mixing if over else passing).append(t)
            if over and not set(over) <= set(self.key_dims):
                raise Refused("its state is mixed along other dims than it is read")
        if len(passing) != 1 or len(mixing) > 1 or len(constant) != 1:
            raise Refused("its update is no linear attention's")
        return passing[0], mixing[0] if mixing else None, constant[0]

    def _keys(self, factors: Iterable[Factor], atoms: set[Atom]) -> list[Factor]:
        return [f for f in factors if f.atoms & atoms]

    # ---- the delta rule

    def _delta_rule(self) -> list[Factor]:
        """beta's factors in the mixing term: -beta * k_out * k_in * decay_in."""
        t = self.delta
        assert t is not None and t.state is not None
        inner: dict[Atom, Atom] = {}
        for d in self.key_dims:
            ours, theirs = resolve(self.dims[d]), resolve(t.state.dims[d])
            if len(theirs) != len(ours) or not set(theirs) <= set(resolve(t.summed)):
                raise Refused("its state is mixed in another way than the delta rule")
            inner |= dict(zip(theirs, ours, strict=True))
        if set(resolve(t.summed)) != set(inner):
            raise Refused("its state is mixed in another way than the delta rule")
        out = self._keys(t.factors, self._key_atoms)
        rest = [f for f in t.factors if f not in out]
        need = self.names.count(out) + self.names.count(self.decay.factors)
        beta = []
        for f in rest:
            name = self.names.of(f, inner)
            if need[name]:
                need[name] -= 1
            else:
                beta.append(f)
        if +need or any(f.atoms & set(inner) for f in beta):
            raise Refused("its state is mixed in another way than the delta rule")
        if self.names.count(out) != self.names.count(self.k) or self.constant.summed:
            raise Refused("it writes another key than it erases")
        return beta

    def _in_constant(self, factors: list[Factor]) -> list[Factor]:
        """The same factors in the constant term."""
        need = self.names.count(factors)
        found = []
        for f in self.constant.factors:
            name = self.names.of(f)
            if need[name]:
                need[name] -= 1
                found.append(f)
        if +need:
            raise Refused("it writes with another strength than it erases")
        return found

    # ---- the layout [B, H, T, K] and [B, H, T, V]

    def _roles(self) -> None:
        """Which dims of the state are heads: those that keys, queries or decays depend on."""
        used = {a for f in (*self.k, *self.decay.factors, *self.beta) for a in f.atoms}
        for r in self.readouts:
            for t in r.terms:
                if t.state is not None:
                    ours = self._ours(t.state)
                    keys = {a for d in self.key_dims for a in resolve(t.state.dims[d])}
                    used |= {ours[a] for f in t.factors if f.atoms & keys for a in f.atoms if a in ours}
        rest = [d for d in range(len(self.dims)) if d not in self.key_dims]
        self.heads = [d for d in rest if used & set(self.dims[d])]
        self.values = [d for d in rest if d not in self.heads]
        over = resolve(self.constant.summed)
        if any(set(over) & f.atoms for f in self.k) and any(set(over) & f.atoms for f in self.v):
            raise Refused("it writes more than one key per step")

    def _ours(self, state: Factor) -> dict[Atom, Atom]:
        """From the names that a readout gives the state's dims to ours."""
        out: dict[Atom, Atom] = {}
        for d, group in enumerate(state.dims):
            theirs, ours = resolve(group), self.dims[d]
            if len(theirs) != len(ours) or len(theirs) > 1:
                raise Refused("a dim of its state is taken apart")
            out |= dict(zip(theirs, ours, strict=True))
        return out

    def _group(self, dims: Sequence[int], rename: dict[Atom, Atom] | None = None) -> Group:
        back = {o: t for t, o in (rename or {}).items()}
        return tuple(back.get(a, a) for d in dims for a in self.dims[d])

    def _groups(self, last: Sequence[int], rename: dict[Atom, Atom] | None = None) -> list[Group]:
        return [self._group(g, rename) for g in (self.heads[:1], self.heads[1:], last)]

    def _sized(self, groups: Sequence[Group]) -> list[int]:
        return [math.prod(a.size for a in g) for g in groups]

    def _arranged(self, term: Product, groups: list[Group]) -> Tensor:
        """[B, H, T, D]."""
        b = self.layout.product(term, groups)
        return spread(b, self._sized(groups), self.layout.evaluator.steps).permute(1, 2, 0, 3)

    # ---- emission

    def emit(self, initial: Tensor | None) -> tuple[dict[Family, Batch], Tensor]:
        """Call the op for each query."""
        log = self._log_decay()
        over = resolve(self.constant.summed)
        of_k = [a for a in over if any(a in f.atoms for f in self.k)]
        of_v = [a for a in over if a not in of_k]
        k = self._arranged(Product(self.k, summed=of_k), self._groups(self.key_dims))
        written = Product(self.v, summed=of_v, scale=self.constant.scale)
        beta = None
        if self.delta is not None:
            strength = -self.delta.scale / self.decay.scale
            beta = self._arranged(Product(self.beta, scale=strength), self._groups([]))
            written.scale /= strength
        v = self._arranged(written, self._groups(self.values))
        start = None if initial is None else self._state(initial)
        final: Tensor | None = None
        out: dict[Family, Batch] = {}
        for r in self.readouts:
            total: Tensor | None = None
            for t in r.terms:
                if t.state is None:
                    part = self.layout.product(t, list(r.dims))
                else:
                    part, final = self._query(r, t, (k, v, log, beta, start))
                shape = r.family.like.shape
                x = spread(part, shape, self.layout.evaluator.steps)
                total = x if total is None else total + x
            assert total is not None
            out[r.family] = Batch(total.to(r.family.like.dtype), True)
        assert final is not None
        return out, self._from_state(final)

    def _query(self, r: Readout, t: Product, operands: tuple) -> tuple[Batch, Tensor]:
        assert t.state is not None
        k, v, log, beta, start = operands
        ours = self._ours(t.state)
        keys = {a for d in self.key_dims for a in resolve(t.state.dims[d])}
        queries = [f for f in t.factors if f.atoms & keys]
        over = set(resolve(t.summed))
        if any((over - keys) & f.atoms for f in queries) or over - keys:
            raise Refused("its state is summed over more than the keys")
        q = self._arranged(Product(queries), self._groups(self.key_dims, ours))
        exclusive = t.state.value is self.carry.family.members[0]
        options = (True, float(t.scale), exclusive, self.layout.evaluator.reverse)
        y, final = torch.ops.spcompile.linear_attention(q, k, v, log, beta, start, *options)
        steps = self.layout.evaluator.steps
        named = [a for g in self._groups(self.values, ours) for a in g]
        y = shaped(y.permute(2, 0, 1, 3), [steps, *(a.size for a in named)])
        item = Item(Batch(y, True), tuple((a,) for a in named))
        after = [f for f in t.factors if not f.atoms & keys]
        return self.layout.product(Product(after), list(r.dims), [item]), final

    def _log_decay(self) -> Tensor | None:
        t, lay = self.decay, self.layout
        if t.scale <= 0 or t.scale > 1:
            raise Refused("its decay is not shown to be positive")
        groups = self._groups(self.key_dims)
        total: Tensor | None = None
        for f in t.factors:
            log = lay.evaluator.log(lay.reader.ref(f.value))
            wide = torch.promote_types(lay.dtype, torch.float32)
            item = Item(Batch(-log.x.to(wide) if f.inverse else log.x.to(wide), log.batched), f.dims)
            b = lay.contract([item], groups)
            x = (b.x if b.batched else b.x.unsqueeze(0)).permute(1, 2, 0, 3)
            total = x if total is None else total + x
        if resolve(t.summed):
            raise Refused("its decay is a sum")
        if t.scale != 1:
            number = torch.full((1, 1, 1, 1), math.log(t.scale), **lay.options)
            total = number if total is None else total + number
        return total

    def _state(self, x: Tensor) -> Tensor:
        """From the state's own dims to [B, H, K, V]."""
        order = [*self.heads, *self.key_dims, *self.values]
        sizes = [*self._sized(self._groups(self.key_dims)), *self._sized([self._group(self.values)])]
        return shaped(permuted(x, order), sizes)

    def _from_state(self, x: Tensor) -> Tensor:
        like = self.carry.family.like
        order = [*self.heads, *self.key_dims, *self.values]
        x = shaped(x, [like.shape[d] for d in order])
        return permuted(x, [order.index(d) for d in range(len(order))]).to(self.layout.dtype)


class _Names:
    """Equal names for factors that are equal by construction."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.memo: dict[Ref, int] = {}
        self.seen: dict[tuple, int] = {}

    def count(self, factors: Iterable[Factor]) -> Counter[tuple]:
        return Counter(self.of(f) for f in factors)

    def of(self, f: Factor, rename: dict[Atom, Atom] | None = None) -> tuple:
        rename = rename or {}
        dims = tuple(tuple(id(rename.get(a, a)) for a in atoms_of((d,))) for d in f.dims)
        return (self._ref(self.reader.ref(f.value)), f.inverse, dims)

    def _ref(self, ref: Ref) -> int:
        if ref not in self.memo:
            self.memo[ref] = self.seen.setdefault(self._key(ref), len(self.seen))
        return self.memo[ref]

    def _key(self, ref: Ref) -> tuple:
        if isinstance(ref, Invariant):
            return ("invariant", id(ref.value))
        if isinstance(ref, Carry):
            return ("carry", id(ref))
        like = ref.like
        args = tuple((k, self._tree(x)) for k, x in ref.args.items())
        return (like.name, like.overload, like.shape, str(like.dtype), args)

    def _tree(self, x: object) -> object:
        if isinstance(x, (Family, Carry, Invariant)):
            return ("ref", self._ref(x))
        if isinstance(x, (list, tuple)):
            return tuple(self._tree(y) for y in x)
        return x if isinstance(x, Progress) else (type(x).__name__, repr(x))
