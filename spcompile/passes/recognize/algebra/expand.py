"""One step back through the algebra: a Value as a sum of products of its operands.

    v[atoms] = sum_terms scale * sum_{summed} mask * prod_n factor_n[atoms]

Whoever reads products reads them here: `unfold` follows one factor to the contraction that made it, loops
follow all of them to the states that they carry.
"""

from __future__ import annotations

from collections.abc import Callable

from spcompile.passes.recognize.algebra.dims import Dims, align, back_through_view, name_dims, resolve
from spcompile.passes.recognize.algebra.products import (
    Factor,
    Mask,
    Term,
    einsum,
    is_zero,
    peel,
    same_values,
    scalar,
)
from spcompile.passes.shadow import Value

__all__ = ["expand", "product_of"]


def expand(v: Value, dims: Dims) -> list[Term] | None:
    """`v`, whose dims are named, as a sum of products of its operands; None if it is not seen to be one."""
    if (source := same_values(v)) is not None:
        return [Term([Factor(source, dims)])]
    if (back := back_through_view(v, dims)) is not None:
        return [Term([Factor(*back)])]
    reader = _READERS.get(v.name)
    return None if reader is None else reader(v, dims)


def product_of(v: Value, dims: Dims) -> Term | None:
    """Read `v` as one contraction: an einsum, or a sum of one factor or of a product written elementwise."""
    if v.name == "einsum":
        return einsum(v, dims)
    if v.name != "sum":
        return None
    (term,) = _sum(v, dims)
    at, at_dims, path = peel(term.factors[0].value, term.factors[0].dims)
    if at.name == "mul" and isinstance(at.args["other"], Value):
        term.factors = [Factor(x, align(at_dims, x.shape)) for x in (at.args["self"], at.args["other"])]
        term.path = [*path, Factor(at, at_dims)]
    return term


def _einsum(v: Value, dims: Dims) -> list[Term] | None:
    term = einsum(v, dims)
    return None if term is None else [term]


def _sum(v: Value, dims: Dims) -> list[Term]:
    rest = iter(dims)
    inner: list[tuple] = []
    summed: list = []
    for d, size in enumerate(v.args["self"].shape):
        if d not in v.args["dim"]:
            inner.append(next(rest))
            continue
        inner += name_dims((size,))
        summed += inner[-1]
        if v.args["keepdim"]:
            next(rest)
    return [Term([Factor(v.args["self"], tuple(inner))], summed=summed, contracted=True)]


def _product(v: Value, dims: Dims) -> list[Term] | None:
    """A product or a quotient; a number is a scale."""
    if v.args.get("rounding_mode"):
        return None
    term, (a, b) = Term([]), (v.args["self"], v.args["other"])
    for x, beside, inverse in ((a, b, False), (b, a, v.name == "div")):
        c = _number(x, beside, v)
        if c is None:
            term.factors.append(Factor(x, align(dims, x.shape), inverse))
        elif inverse and not c:
            return None
        else:
            term.scale *= 1.0 / c if inverse else c
    return [term]


def _number(x: object, beside: object, v: Value) -> float | None:
    """A number that the other operand, which has the result's shape, is multiplied with."""
    if not isinstance(x, Value):
        return float(x)  # type: ignore[arg-type]
    return scalar(x) if isinstance(beside, Value) and beside.shape == v.shape else None


def _add(v: Value, dims: Dims) -> list[Term]:
    terms = []
    for x, by in ((v.args["self"], 1.0), (v.args["other"], float(v.args.get("alpha", 1)))):
        if isinstance(x, Value):
            terms.append(Term([Factor(x, align(dims, x.shape))], by))
        else:
            terms.append(Term([], by * float(x)))
    return terms


def _copy(v: Value, dims: Dims) -> list[Term]:
    source = v.args["src"]
    return [Term([Factor(source, align(dims, source.shape))])]


def _cumsum(v: Value, dims: Dims) -> list[Term] | None:
    return running_sum(v, dims, 0)


def running_sum(v: Value, dims: Dims, diagonal: int) -> list[Term] | None:
    """y_i = sum_{j <= i + diagonal} x_j of the `cumsum` v: a causal mask over a fresh atom."""
    x, d = v.args["self"], v.args["dim"]
    if len(resolve(dims[d])) != 1:
        return None
    (fresh,) = name_dims((v.shape[d],))
    inner = dims[:d] + (fresh,) + dims[d + 1 :]
    mask = Mask((dims[d], fresh), diagonal=diagonal)
    return [Term([Factor(x, inner)], masks=[mask], summed=list(fresh), contracted=True)]


def _where(v: Value, dims: Dims) -> list[Term] | None:
    """where(m, x, 0), where(m, 0, x)."""
    m, a, b = (v.args[n] for n in ("condition", "self", "other"))
    for x, other, complement in ((a, b, False), (b, a, True)):
        if is_zero(other) and isinstance(x, Value) and x.shape == v.shape:
            return [Term([Factor(x, dims)], masks=[Mask(align(dims, m.shape), m, complement)])]
    return None


_READERS: dict[str, Callable[[Value, Dims], list[Term] | None]] = {
    "einsum": _einsum,
    "sum": _sum,
    "mul": _product,
    "div": _product,
    "add": _add,
    "copy": _copy,
    "cumsum": _cumsum,
    "where": _where,
}
