"""Further back than one contraction: through whatever is linear in a factor (views, casts, scales, masks,
running sums), or a polynomial of it, to the contraction that made it.

So `(q k^T * M) v`, `q (k^T v)`, `q . cumsum(k)` and a three-operand einsum all end in the same few factors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from spcompile.passes.recognize.algebra.dims import Dims, name_dims
from spcompile.passes.recognize.algebra.expand import expand, product_of, running_sum
from spcompile.passes.recognize.algebra.polynomials import between, polynomial
from spcompile.passes.recognize.algebra.products import Factor, Term, is_zero, same_values, scalar
from spcompile.passes.shadow import Value


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
                polynomial=inner.polynomial,
                pair=inner.factors[:2] if inner.polynomial else [],
            ),
        )


def unfold(v: Value, dims: Dims) -> Term | None:
    """Go back from `v` through linear steps to the contraction that made it; None if none is met."""
    term = _polynomial(v, dims)
    if term is None:
        term = product_of(v, dims)
        if term is None or len(term.factors) == 1:  # a sum: what it sums may be a contraction itself
            term = _through(v, dims)
    if term is not None:
        term.path = [Factor(v, dims), *term.path]
    return term


def _polynomial(v: Value, dims: Dims) -> Term | None:
    """A polynomial of scores q.k."""
    found = polynomial(v)
    if found is None:
        return None
    base, a = found
    term = unfold(base, dims)
    if term is None or term.polynomial or len(term.factors) != 2 or any(f.inverse for f in term.factors):
        return None
    # A mask inside stays one outside if it is 0 or 1 and the polynomial takes 0 to 0.
    if any(m.value is not None and m.value.dtype != torch.bool for m in term.masks) or (term.masks and a[0]):
        return None
    term.polynomial = tuple(x * term.scale**n for n, x in enumerate(a))
    term.scale = 1.0
    term.path = [*(Factor(x, dims) for x in between(v, base)), *term.path]
    return term


def _through(v: Value, dims: Dims) -> Term | None:
    """By one product of its operands, and what the first of them unfolds to that does."""
    before = shifted_sum(v)
    terms = expand(v, dims) if before is None else running_sum(before, dims, -1)
    if terms is None or len(terms) != 1:
        return None
    (step,) = terms
    for n, f in enumerate(step.factors):
        inner = None if f.inverse else unfold(f.value, f.dims)
        if inner is not None:
            inner.factors += step.factors[:n] + step.factors[n + 1 :]
            inner.scale *= step.scale
            inner.masks += step.masks
            inner.summed += step.summed
            return inner
    return step if step.contracted else None


# ---------------------------------------------------------------- running sums that leave out the last entry


def shifted_sum(v: Value) -> Value | None:
    """The `cumsum` c of which `v` is 0, c_0, c_1, ... along its dim, in any of the usual spellings."""
    if v.name == "cat" and len(v.args["tensors"]) == 2:
        return _after_a_zero(v)
    if v.name == "slice":
        return _padded_then_cut(v)
    if v.name in ("pad", "constant_pad_nd"):
        return _cut_then_padded(v)
    if v.name == "add" and v.args.get("alpha", 1) == -1:  # cumsum(x) - x
        c, x = (peeled(v.args[n]) for n in ("self", "other"))
        same = c is not None and c.name == "cumsum" and peeled(c.args["self"]) is x
        return c if same and c.shape == v.shape else None  # type: ignore[union-attr]
    return None


def peeled(v: object) -> Value | None:
    """What a Value is a copy or a cast of."""
    while isinstance(v, Value) and (source := same_values(v)) is not None:
        v = source
    return v if isinstance(v, Value) else None


def _running_sum(v: object, d: int) -> Value | None:
    c = peeled(v)
    return c if c is not None and c.name == "cumsum" and c.args["dim"] == d else None


def _without_last(v: object, d: int) -> Value | None:
    """x of x[..., :-1, ...]."""
    v = peeled(v)
    if v is None or v.name != "slice" or v.args["dim"] != d:
        return None
    source = v.args["self"]
    ends = v.args["start"] == 0 and v.args["step"] == 1 and v.shape[d] == source.shape[d] - 1
    return source if ends else None


def _after_a_zero(v: Value) -> Value | None:
    zero, rest = v.args["tensors"]
    d = v.args["dim"]
    if not is_zero(zero) or zero.shape[d] != 1:
        return None
    return _running_sum(_without_last(rest, d), d)


def _one_in_front(v: object) -> tuple[Value, int] | None:
    """(x, d) where `v` is x with one zero in front along d."""
    v = peeled(v)
    if v is None or v.name not in ("pad", "constant_pad_nd"):
        return None
    if v.args.get("mode", "constant") != "constant" or scalar(v.args.get("value") or 0) != 0:
        return None
    pad = list(v.args["pad"])
    places = [n for n, x in enumerate(pad) if x]
    if len(places) != 1 or places[0] % 2 or pad[places[0]] != 1:
        return None
    return v.args["self"], len(v.shape) - 1 - places[0] // 2


def _padded_then_cut(v: Value) -> Value | None:
    d = v.args["dim"]
    found = _one_in_front(_without_last(v, d))
    return _running_sum(found[0], d) if found is not None and found[1] == d else None


def _cut_then_padded(v: Value) -> Value | None:
    found = _one_in_front(v)
    return _running_sum(_without_last(found[0], found[1]), found[1]) if found is not None else None
