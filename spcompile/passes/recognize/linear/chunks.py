"""Chunked linear attention: what a token sees of its own chunk plus what it sees of the chunks before.

    o[n, c] = sum_{c' <= c} (q[n, c] . k[n, c']) v[n, c']  +  q[n, c] sum_{m < n} sum_{c'} k[m, c']^T v[m, c']

Both are products of the same q, k and v; the first shares the chunk n, the second masks it. Together every
token (n, c) sees those up to itself, which is causal linear attention over tokens of two atoms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from spcompile.passes.recognize.algebra.dims import Atom, Dims, atoms_of, resolve
from spcompile.passes.recognize.algebra.products import Factor, Mask, Term, peel
from spcompile.passes.recognize.algebra.unfold import terms_of
from spcompile.passes.recognize.linear.form import Form
from spcompile.passes.recognize.linear.weights import ONE, ZERO, Side, Table, Weights
from spcompile.passes.recognize.proof.masks import indicator, triangle
from spcompile.passes.recognize.proof.prover import Prover
from spcompile.passes.shadow import Value

CAUSAL = Weights((Side(False, False, ZERO, ONE, ONE),))


def read(v: Value, prover: Prover) -> Form | None:
    """`v` as the sum of the two parts; None if it is none."""
    if v.name != "add" or v.args.get("alpha", 1) != 1:
        return None
    parts = [x for n in ("self", "other") if isinstance(x := v.args[n], Value) and x.shape == v.shape]
    if len(parts) != 2:
        return None
    for inter, intra in (parts, parts[::-1]):
        for out, before in _terms(inter):
            if (pair := _triangle(before, -1, prover)) is None:
                continue
            for inner, own in _terms(intra):
                form = _together(v, out, before, pair, inner, own, prover)
                if form is not None:
                    form.path += [Factor(inter, out), Factor(intra, inner)]
                    return form
    return None


def _terms(v: Value) -> Iterator[tuple[Dims, Term]]:
    """The readings as three factors and one mask."""
    for out, term in terms_of(v):
        if any(f.inverse for f in term.factors):
            continue
        for f in [] if term.masks else term.factors:  # a mask that multiplies
            rest = [g for g in term.factors if g is not f]
            if len(rest) == 3 and len(f.atoms) == 2:
                yield out, replace(term, factors=rest, masks=[Mask(f.dims, f.value)])
        if len(term.factors) == 3 and len(term.masks) == 1:
            yield out, term


def _triangle(term: Term, diagonal: int, prover: Prover) -> tuple[Atom, Atom] | None:
    """(i, j) if its mask is j <= i + diagonal, and sums over j alone."""
    (mask,) = term.masks
    rows = [a for a in atoms_of(mask.dims) if a not in term.summed]
    cols = [a for a in atoms_of(mask.dims) if a in term.summed]
    if len(rows) != 1 or len(cols) != 1:
        return None
    found = indicator(prover.keeps(mask, rows[0], cols[0]))
    wanted = triangle(rows[0], cols[0], diagonal)
    return (rows[0], cols[0]) if found is not None and found == (wanted, 1.0) else None


def _together(
    v: Value, out: Dims, before: Term, pair: tuple[Atom, Atom], inner: Dims, own: Term, prover: Prover
) -> Form | None:
    n, m = pair
    found = _triangle(own, 0, prover)
    if found is None or before.scale != own.scale or before.polynomial or own.polynomial:
        return None
    c2, d2 = found
    # The atoms of the one output are those of the other.
    same = dict(zip(atoms_of(inner), atoms_of(out), strict=False))
    if len(atoms_of(inner)) != len(atoms_of(out)) or any(a.size != b.size for a, b in same.items()):
        return None
    if n not in same.values() or c2 not in same:
        return None
    c = same[c2]
    q = _only(before, lambda f: n in f.atoms and m not in f.atoms)
    q2 = _only(own, lambda f: c2 in f.atoms and d2 not in f.atoms)
    if q is None or q2 is None or not {n, c} <= q.atoms or not _match(q2, q, same):
        return None
    chunks = {a: b for a, b in same.items() if b is not n}
    first = next(a for a, b in same.items() if b is n)
    for x in (f for f in before.factors if f is not q):
        named = chunks | {first: m}
        if not any(_match(y, x, named) for y in own.factors if y is not q2):
            return None
        same |= named
    return _form(v, out, before, own, q, (n, c), (m, named.get(d2)))


def _only(term: Term, test) -> Factor | None:
    found = [f for f in term.factors if test(f)]
    return found[0] if len(found) == 1 else None


def _match(a: Factor, b: Factor, same: dict[Atom, Atom]) -> bool:
    """Whether both are one Value; atoms that are not named yet are then the same."""
    (x, xs, _), (y, ys, _) = peel(a.value, a.dims), peel(b.value, b.dims)
    left, right = atoms_of(xs), atoms_of(ys)
    if x is not y or len(left) != len(right):
        return False
    named = dict(zip(left, right, strict=True))
    if any(p.size != r.size or same.get(p, r) is not r for p, r in named.items()):
        return False
    same |= named
    return True


def _form(
    v: Value,
    out: Dims,
    before: Term,
    own: Term,
    q: Factor,
    rows: tuple[Atom, Atom],
    cols: tuple[Atom, Atom | None],
) -> Form | None:
    """Causal linear attention over tokens (n, c); None if an atom has no role in it."""
    if cols[1] is None:
        return None
    t, s = (Atom(a.size * b.size, (a, b)) for a, b in (rows, cols))  # type: ignore[union-attr,arg-type]
    rest = [f for f in before.factors if f is not q]
    summed = set(resolve(before.summed))
    features = summed - set(cols)
    for k, val in (rest, rest[::-1]):
        values = (set(atoms_of(out)) & val.atoms) - q.atoms - k.atoms
        fits = features <= q.atoms & k.atoms and not features & val.atoms and set(cols) <= k.atoms & val.atoms
        if fits and features and t.size == s.size:
            return Form(
                v,
                out,
                q,
                k,
                val,
                t,
                s,
                tuple(a for a in atoms_of(k.dims) if a in features),
                tuple(a for a in atoms_of(out) if a in values),
                [],
                [],
                CAUSAL,
                Table(t, s),
                [],
                before.scale,
                [*before.path, *own.path],
                v.dtype,
            )
    return None
