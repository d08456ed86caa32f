"""Linear attention, by its algebra: a product of three factors summed over tokens and features, maybe masked.

    out[b, i, e] = c sum_{j, d} M[b, i, j] q[b, i, d] k[b, j, d] v[b, j, e]

`algebra.unfold` brings every spelling to this form: masked quadratic scores, `q (k^T v)`, running sums of
`k^T v`, a three-operand einsum. M is a mask, or decays, as `weights` proves. Without v (a column of
ones) it is a normaliser: `scores.sum(-1)`, `q . cumsum(k)`, `q . k.sum()`. A numerator and the normalisers of
the same q, k and M become one call, on `[v, 1]`. `emit` writes the call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from operator import mul

from spcompile.passes.recognize.algebra.dims import Atom, Dims, atoms_of, resolve
from spcompile.passes.recognize.algebra.polynomials import affordable
from spcompile.passes.recognize.algebra.products import Factor, Mask, Term, peel
from spcompile.passes.recognize.algebra.unfold import terms_of
from spcompile.passes.recognize.common import check_one_place, check_private, is_activation, same_tokens
from spcompile.passes.recognize.edit import Editor, Refused
from spcompile.passes.recognize.linear import chunks
from spcompile.passes.recognize.linear.emit import emit
from spcompile.passes.recognize.linear.form import Form
from spcompile.passes.recognize.linear.weights import ONE, ZERO, Table, Weights
from spcompile.passes.recognize.proof.masks import Span, Spans, combine, mapped
from spcompile.passes.recognize.proof.prover import Prover
from spcompile.passes.shadow import Shadow, Value
from spcompile.passes.sites import Site
from spcompile.source import source_of


class Reader:
    """Classifies terms; holds what proofs need."""

    def __init__(self, prover: Prover) -> None:
        self.prover = prover
        self.active: dict[Value, bool] = {}
        self.tables: dict[tuple[Atom, Atom], Table] = {}
        self.unproved: Value | None = None

    def read(self, v: Value) -> Form | str | None:
        """`v` as linear attention; a reason, if it is one whose mask isn't proved; None if it isn't."""
        reason: str | None = None
        for out, term in terms_of(v):
            for form in self.forms(v, out, term):
                if isinstance(form, Form):
                    return form
                reason = form
        return reason

    def forms(self, v: Value, out: Dims, term: Term) -> Iterator[Form | str]:
        plain = [f for f in term.factors if not f.inverse]
        if len(plain) > 6:
            return
        picks = [
            *itertools.permutations(plain, 3),
            *((q, k, None) for q, k in itertools.permutations(plain, 2)),
        ]
        ranked = []
        for q, k, val in picks:
            form = self.form(v, out, term, q, k, val)
            if isinstance(form, Form):
                ranked.append(form)
            elif form is not None:
                yield form
        yield from sorted(ranked, key=_conventional)

    def form(
        self, v: Value, out: Dims, term: Term, q: Factor, k: Factor, val: Factor | None
    ) -> Form | str | None:
        o, r = set(atoms_of(out)), set(resolve(term.summed))
        aq, ak, av = q.atoms, k.atoms, val.atoms if val is not None else set()
        if term.polynomial and not (q in term.pair and k in term.pair):
            return None
        features, s = (r & aq & ak) - av, r & ak - aq
        rows = (o & aq) - ak - av
        mixed = _mixed(term, (q, k, val), s)
        values = (o & av) - aq - ak - mixed
        if r != features | s or len(s) != 1 or not features or not rows or (val is not None and not s <= av):
            return None
        if val is None and any(
            not self._mask_like(f, r, s) for f in term.factors if f is not q and f is not k
        ):
            return None
        (key,) = s
        t = _row_atom(q, rows, term, key)
        rest = [f for f in term.factors if f is not q and f is not k and f is not val]
        after = [f for f in rest if not f.atoms & r]
        columns = [f for f in rest if f.atoms & r and f.atoms <= s | (o & (ak | av)) - values]
        both = [f for f in rest if f not in after and f not in columns]
        if (o - values - rows - {t}) - (aq | ak | av) - set().union(*(f.atoms for f in after), set()):
            return None
        if any(f.atoms & features for f in both) or any(features & set(atoms_of(m.dims)) for m in term.masks):
            return None
        size = math.prod(a.size for a in features)
        if term.polynomial and not affordable(size, term.polynomial, key.size):
            return "the features of its polynomial are more than its tokens"
        weights = self._weights(term, both, t, key)
        if weights is None:
            looks = (term.masks or both) and val is not None and self._plausible(q, k, val, key)
            return "its mask is not proved to be causal, nor to be a decay" if looks else None
        if not weights.sides and not self._plausible(q, k, val, key):
            return None
        ordered = tuple(a for a in atoms_of(k.dims) if a in features)
        dtype = term.path[-1].value.dtype if term.path else v.dtype
        return Form(
            v,
            out,
            q,
            k,
            val,
            t,
            key,
            ordered,
            tuple(a for a in atoms_of(out) if a in values),
            after,
            columns,
            weights,
            self.tables[t, key],
            [*(Factor(m.value, m.dims, m.complement) for m in term.masks if m.value is not None), *both],
            term.scale * weights.scale,
            term.path,
            dtype,
            term.polynomial,
        )

    @staticmethod
    def _mask_like(f: Factor, r: set[Atom], s: set[Atom]) -> bool:
        """A factor that a normaliser may have beside q and k."""
        return not f.atoms & (r - s) or f.inverse

    def _weights(self, term: Term, both: list[Factor], t: Atom, s: Atom) -> Weights | None:
        """The product of all masks and decays; None if it isn't proved to be one that a state can carry."""
        table = self.tables.setdefault((t, s), Table(t, s))
        product = [Span(1 - s.size, t.size - 1, ONE)]
        found: list[Mask | Factor] = [*term.masks, *both]
        for m in found:
            spans = self._spans(table, m, t, s)
            if spans is None:
                return None
            product = combine(mul, product, spans)
        return table.read(product)

    def _spans(self, table: Table, m: Mask | Factor, t: Atom, s: Atom) -> Spans | None:
        """A mask or a factor, by intervals of i - j."""
        if isinstance(m, Factor):
            return table.spans(m.value, m.dims, m.inverse)
        spans = self.prover.keeps(m, t, s)
        if spans is None:
            return None
        return mapped(lambda kept: ONE if kept else ZERO, spans)

    def plausible(self, form: Form) -> bool:
        """Whether its operands are activations."""
        operands = [f for f in (form.q, form.k, form.v) if f is not None]
        return all(not f.value.is_parameter and is_activation(f.value, self.active) for f in operands)

    def _plausible(self, q: Factor, k: Factor, v: Factor | None, s: Atom) -> bool:
        """Without a mask: all three are activations, and what k and v are summed over are tokens."""
        operands = [q, k] if v is None else [q, k, v]
        if any(f.value.is_parameter or not is_activation(f.value, self.active) for f in operands):
            return False
        return v is None or same_tokens(k, v, s)


def _mixed(term: Term, operands: tuple[Factor | None, ...], s: set[Atom]) -> set[Atom]:
    """Atoms of the masks and decays of keys: a head that has its own decay is no column of v."""
    found = [f.atoms for f in term.factors if f not in operands]
    found += [set(atoms_of(m.dims)) for m in term.masks]
    return set().union(*(atoms for atoms in found if atoms & s)) - s


def _row_atom(q: Factor, rows: set[Atom], term: Term, s: Atom) -> Atom:
    """The tokens among the dims that only q has: masked together with the keys, as long as them, or the
    last."""
    ordered = [a for a in atoms_of(q.dims) if a in rows]
    seen = [m.dims for m in term.masks] + [f.dims for f in term.factors if f is not q]
    masked = [a for a in ordered if any({a, s} <= set(atoms_of(d)) for d in seen)]
    same = [a for a in ordered if a.size == s.size]
    return (masked or same or ordered)[-1]


def _conventional(form: Form) -> tuple:
    """Smaller for the reading that a textbook would give: tokens before features in each operand's own
    layout."""
    disorder = 0
    for f, token, features in ((form.q, form.t, form.features), (form.k, form.s, form.features)):
        _, dims, _ = peel(f.value, f.dims)
        atoms = atoms_of(dims)
        disorder += sum(
            atoms.index(token) > atoms.index(a) for a in features if a in atoms and token in atoms
        )
    if form.v is not None:
        _, dims, _ = peel(form.v.value, form.v.dims)
        atoms = atoms_of(dims)
        disorder += sum(
            atoms.index(form.s) > atoms.index(a) for a in form.values if a in atoms and form.s in atoms
        )
    return (form.v is None, disorder, form.t.size != form.s.size)


# ---------------------------------------------------------------- the whole graph


def recognize(shadow: Shadow, editor: Editor, prover: Prover) -> list[tuple[int, Site]]:
    """Rewrite every linear attention; (time, Site) of what was seen."""
    reader, sites = Reader(prover), []
    groups: dict[tuple, list[Form]] = {}
    taken: set[Value] = set()
    for v in _candidates(shadow):
        joined = chunks.read(v, prover)
        if joined is not None and reader.plausible(joined):
            sites += _rewrite_group([joined], editor, taken)
            taken.update(joined.interior() if joined.terminal in taken else ())
    for v in [v for v in _candidates(shadow) if v not in taken]:
        form = reader.read(v)
        if isinstance(form, str):
            sites.append((v.time, Site("linear", "general", False, form, source_of(v.node), _name(v))))
        elif form is not None:
            groups.setdefault(form.signature(), []).append(form)
    for forms in groups.values():
        sites += _rewrite_group(forms, editor, taken)
    return sites


def _candidates(shadow: Shadow) -> list[Value]:
    held = [v for v in shadow.values if v.live and v.node is not None and not v.derived]
    found = [v for v in held if v.dtype is not None]
    return [v for v in found if v.dtype.is_floating_point]  # type: ignore[union-attr]


def _name(v: Value) -> str:
    assert v.node is not None
    return v.node.name


def _rewrite_group(forms: list[Form], editor: Editor, taken: set[Value]) -> list[tuple[int, Site]]:
    """Forms that share q and k: each numerator takes one call, the first takes the normalisers along."""
    forms = [f for f in forms if f.terminal not in taken and f.terminal.node not in editor.replaced]
    numerators = [f for f in forms if f.v is not None]
    normalisers = [f for f in forms if f.v is None]
    sites: list[tuple[int, Site]] = []
    for n, form in enumerate(numerators):
        mates = [m for m in normalisers if not n and not m.columns and not form.columns]
        source, name, kind = source_of(form.terminal.node), _name(form.terminal), form.weights.kind
        try:
            allowed = {v for f in forms for v in (*f.interior(), f.terminal)}
            for f in (form, *mates):
                check_private(f.quadratic(), allowed, "scores")
                check_one_place(f.interior(), f.terminal)
            if mates and _home(form) != {x for m in mates for x in _home(m)}:
                mates = []
            call = emit(form, mates, editor)
        except Refused as why:
            sites.append((form.terminal.time, Site("linear", kind, False, str(why), source, name)))
            continue
        taken.update([form.terminal, *(m.terminal for m in mates)])
        sites.append((form.terminal.time, Site("linear", kind, True, "", source, call.name)))
    return sites


def _home(form: Form) -> set:
    assert form.terminal.node is not None
    return {form.terminal.node.graph}
