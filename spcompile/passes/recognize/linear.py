"""Linear attention, by its algebra: a product of three factors summed over tokens and features, maybe masked.

    out[b, i, e] = c sum_{j, d} M[i, j] q[b, i, d] k[b, j, d] v[b, j, e]

`products.unfold` brings every spelling to this form: masked quadratic scores, `q (k^T v)`, running sums of
`k^T v`, a three-operand einsum. Without v (a column of ones) it is a normaliser: `scores.sum(-1)`, `q .
cumsum(k)`, `q . k.sum()`. A numerator and the normalisers of the same q and k become one call, on `[v, 1]`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from spcompile.passes.recognize import masks
from spcompile.passes.recognize.common import (
    Site,
    check_one_place,
    check_private,
    is_activation,
    same_tokens,
    source_of,
)
from spcompile.passes.recognize.dims import Atom, Dims, atoms_of, name_dims, resolve
from spcompile.passes.recognize.edit import Editor, Operand, Refused, Writer
from spcompile.passes.recognize.products import Factor, Mask, Term, peel, product_of, unfold
from spcompile.passes.shadow import Shadow, Value


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
    causal: bool
    mask: str
    scale: float
    path: list[Factor]
    dtype: torch.dtype | None

    def batch(self) -> tuple[Atom, ...]:
        """In q's order, then what only k or v have."""
        named = {self.t, self.s, *self.features, *self.values}
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
        """Equal for two forms whose q and k are the same Values with the same roles."""
        part = {self.t: "T", self.s: "S"} | dict.fromkeys(self.features, "K")
        part |= {a: f"B{n}" for n, a in enumerate(self.batch())}
        roots = [peel(f.value, f.dims) for f in (self.q, self.k)]
        return (self.causal, *(((v, tuple((part[a], a.size) for a in atoms_of(d)))) for v, d, _ in roots))


# ---------------------------------------------------------------- reading one contraction


def terms_of(v: Value) -> Iterator[tuple[Dims, Term]]:
    """The ways to read `v` as a product: as it stands, or with one factor unfolded."""
    probe = product_of(v, name_dims(v.shape))
    if probe is None:
        return
    for n in range(-1, len(probe.factors)):
        out = name_dims(v.shape)  # fresh atoms: a reading may split them
        term = product_of(v, out)
        assert term is not None
        if n < 0:
            if len(term.factors) >= 3:
                yield out, term
            continue
        inner = unfold(term.factors[n].value, term.factors[n].dims)
        if inner is None:
            continue
        yield (
            out,
            Term(
                factors=[*term.factors[:n], *inner.factors, *term.factors[n + 1 :]],
                scale=term.scale * inner.scale,
                masks=inner.masks,
                summed=term.summed + inner.summed,
                path=term.path + inner.path,
            ),
        )


class Reader:
    """Classifies terms; holds what proofs need."""

    def __init__(self, prover: masks.Prover) -> None:
        self.prover = prover
        self.active: dict[Value, bool] = {}
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
        features, s = (r & aq & ak) - av, r & ak - aq
        rows = (o & aq) - ak - av
        values = (o & av) - aq - ak
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
        shape = self._mask(term, both, t, key)
        if shape is None:
            looks = (term.masks or both) and val is not None and self._plausible(q, k, val, key)
            return "its mask is not proved to be causal" if looks else None
        kind, constant = shape
        if kind == "all" and not self._plausible(q, k, val, key):
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
            kind == "causal",
            kind,
            term.scale * constant,
            term.path,
            dtype,
        )

    @staticmethod
    def _mask_like(f: Factor, r: set[Atom], s: set[Atom]) -> bool:
        """A factor that a normaliser may have beside q and k."""
        return not f.atoms & (r - s) or f.inverse

    def _mask(self, term: Term, both: list[Factor], t: Atom, s: Atom) -> tuple[str, float] | None:
        """The product of all masks: (kind, its constant); None if it isn't all or causal."""
        keep: masks.Pieces = [masks.Piece(1 - s.size, t.size - 1, True)]
        constant = 1.0
        for m in [*term.masks, *(Mask("value", f.dims, f.value) for f in both)]:
            if m.kind in ("tril", "triu"):
                places = tuple(resolve(d) for d in m.dims)
                if places != ((t,), (s,)):
                    return None
                pieces: masks.Pieces | None = self.prover.triangle(t, s, m.kind == "tril", m.diagonal)
            else:
                assert m.value is not None
                pieces = self.prover.pieces(m.value, m.dims, t, s)
                if pieces is not None and m.complement:
                    pieces = masks.mapped(lambda x: not x, pieces)
            read = masks.indicator(pieces)
            if read is None:
                return None
            keep, constant = masks.combine(lambda a, b: a and b, keep, read[0]), constant * read[1]
        if any(f.inverse for f in both):
            return None
        kind = masks.kind_of(keep)
        return (kind, constant) if kind in ("all", "causal") else None

    def _plausible(self, q: Factor, k: Factor, v: Factor | None, s: Atom) -> bool:
        """Without a mask: all three are activations, and what k and v are summed over are tokens."""
        operands = [q, k] if v is None else [q, k, v]
        if any(f.value.is_parameter or not is_activation(f.value, self.active) for f in operands):
            return False
        return v is None or same_tokens(k, v, s)


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


def recognize(shadow: Shadow, editor: Editor, prover: masks.Prover) -> list[tuple[int, Site]]:
    """Rewrite every linear attention; (time, Site) of what was seen."""
    reader, sites = Reader(prover), []
    groups: dict[tuple, list[Form]] = {}
    for v in [v for v in shadow.values if v.live and v.node is not None and v.dtype is not None]:
        if not v.dtype.is_floating_point:  # type: ignore[union-attr]
            continue
        form = reader.read(v)
        if isinstance(form, str):
            sites.append((v.time, Site("linear", "general", False, form, source_of(v.node), _name(v))))
        elif form is not None:
            groups.setdefault(form.signature(), []).append(form)
    taken: set[Value] = set()
    for forms in groups.values():
        sites += _rewrite_group(forms, editor, taken)
    return sites


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
        source, name = source_of(form.terminal.node), _name(form.terminal)
        try:
            allowed = {v for f in forms for v in (*f.interior(), f.terminal)}
            for f in (form, *mates):
                check_private(f.quadratic(), allowed, "scores")
                check_one_place(f.interior(), f.terminal)
            if mates and _home(form) != {x for m in mates for x in _home(m)}:
                mates = []
            call = _emit(form, mates, editor)
        except Refused as why:
            sites.append((form.terminal.time, Site("linear", form.mask, False, str(why), source, name)))
            continue
        taken.update([form.terminal, *(m.terminal for m in mates)])
        sites.append((form.terminal.time, Site("linear", form.mask, True, "", source, call.name)))
    return sites


def _home(form: Form) -> set:
    assert form.terminal.node is not None
    return {form.terminal.node.graph}


# ---------------------------------------------------------------- emission


def _emit(form: Form, mates: list[Form], editor: Editor) -> fx.Node:
    """One `linear_attention` for the numerator and its normalisers; the op's node."""
    node = editor.node_of(form.terminal)
    others = [(m, editor.node_of(m.terminal)) for m in mates]
    first = _first([node, *(n for _, n in others)])
    try:
        q, k, v = (editor.operand(f, first) for f in (form.q, form.k, form.v) if f is not None)
    except Refused:
        if not mates:
            raise
        return _emit(form, [], editor)  # v is made after the normaliser is used
    for f in form.rows:  # all lookups that may refuse come before the first edit
        editor.operand(f, node)
    for m, n in others:
        for f in m.rows:
            editor.operand(f, n)
    w = editor.writer(first)
    groups = _groups(form)
    dtype = form.dtype if form.dtype is not None and form.dtype.is_floating_point else form.terminal.dtype
    values = _values(w, editor, form, v, groups)
    width = w.shape(values)[-1]
    if mates:
        ones = w.call(torch.ones_like, w.call(torch.narrow, values, -1, 0, 1))
        values = w.call(torch.cat, [values, ones], -1)
    q4 = w.to(w.arrange(q, (groups[0], groups[1], (form.t,), form.features)), dtype)
    k4 = w.to(w.arrange(k, (groups[0], groups[1], (form.s,), form.features)), dtype)
    op = torch.ops.spcompile.linear_attention.default
    node_of_call = w.call(op, q4, k4, w.to(values, dtype), None, None, None, form.causal, float(form.scale))
    call = w.call(operator.getitem, node_of_call, 0)
    out = w.call(torch.narrow, call, -1, 0, width) if mates else call
    finished = [(form, node, out, 1.0)]
    for m, n in others:
        den = w.call(torch.narrow, call, -1, width, 1)
        finished.append((m, n, den, m.scale / form.scale))
    for done, n, x, factor in finished:
        _finish(done, n, x, factor, _groups(done), editor)
    return call


def _first(nodes: list[fx.Node]) -> fx.Node:
    order = {n: i for i, n in enumerate(nodes[0].graph.nodes)}
    return min(nodes, key=lambda n: order[n])


def _groups(form: Form) -> tuple[tuple[Atom, ...], tuple[Atom, ...]]:
    batch = form.batch()
    return batch[:1], batch[1:]


def _values(w: Writer, editor: Editor, form: Form, v: Operand, groups: tuple) -> fx.Node:
    """v as [B, H, S, V], times the factors per key."""
    out = w.arrange(v, (*groups, (form.s,), form.values))
    for c in form.columns:
        x = w.arrange(editor.operand(c, w.before), (*groups, (form.s,), ()), expand=False)
        out = w.call(torch.div if c.inverse else torch.mul, out, x)
    return out


def _finish(form: Form, node: fx.Node, x: fx.Node, factor: float, groups: tuple, editor: Editor) -> None:
    """Bring the op's output to the dims of what it replaces, times the factors per row, and replace it."""
    w = editor.writer(node)
    if factor != 1.0:
        x = w.call(torch.mul, x, factor)
    target = (*groups, (form.t,), form.values)
    for f in form.rows:
        r = w.arrange(editor.operand(f, node), target, expand=False)
        x = w.call(torch.div if f.inverse else torch.mul, x, r)
    x = w.scatter(x, target, form.out, form.terminal.shape)
    fresh = editor.written_later(node)
    editor.replace(node, w.like(x, node, fresh=fresh or x.target in (operator.getitem, torch.narrow)))
