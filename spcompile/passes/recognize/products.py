"""Contractions in one form: a product of factors whose dims are named, summed over the atoms the output
lacks.

    out[atoms] = scale * sum_{summed} prod_n factor_n[atoms]

`product_of` reads one contraction (matmul, bmm, einsum, a sum of a product, ...). `unfold` goes further back
from one factor through whatever is linear in it (views, casts, scales, masks, running sums) to the
contraction that made it. So `(q k^T * M) v`, `q (k^T v)`, `q . cumsum(k)` and a three-operand einsum all end
in the same few factors.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from spcompile.passes.recognize.dims import Atom, Dims, align, atoms_of, back_through_view, name_dims, resolve
from spcompile.passes.shadow import Value

T = TypeVar("T")


@dataclass
class Factor:
    """A Value whose dims are named. `inverse`: it divides."""

    value: Value
    dims: Dims
    inverse: bool = False

    @property
    def atoms(self) -> set[Atom]:
        return set(atoms_of(self.dims))


@dataclass
class Mask:
    """A factor of zeros and a constant, known by its maker: entries where `keep` (or its complement) holds.

    kind "value": the Value itself (bool, or numbers) says; "tril"/"triu": by `diagonal` over the last two
    dims.
    """

    kind: str
    dims: Dims
    value: Value | None = None
    complement: bool = False
    diagonal: int = 0


@dataclass
class Term:
    """A product, and the Values walked through on the way to it."""

    factors: list[Factor]
    scale: float = 1.0
    masks: list[Mask] = field(default_factory=list)
    summed: list[Atom] = field(default_factory=list)
    path: list[Factor] = field(default_factory=list)
    polynomial: tuple[float, ...] | None = None
    """a_n, by power n, if it is sum_n a_n x^n of the product x of the first two factors."""
    pair: list[Factor] = field(default_factory=list)
    """Those two factors."""
    contracted: bool = False
    """Whether a contraction, sum or running sum was met: there was something to unfold."""


# ---------------------------------------------------------------- one contraction


def product_of(v: Value, dims: Dims) -> Term | None:
    """Read `v`, whose dims are named, as one contraction; None if it is none."""
    reader = _READERS.get(v.name)
    return reader(v, dims) if reader else None


def _matmul(v: Value, dims: Dims) -> Term | None:
    a = v.args["self"]
    b = next(v.args[n] for n in ("other", "mat2", "vec") if n in v.args)
    return _matrix_product(a, b, dims)


def _matrix_product(a: Value, b: Value, dims: Dims) -> Term | None:
    if not a.shape or not b.shape:
        return None
    inner = name_dims(a.shape[-1:])[0]
    row = () if len(a.shape) == 1 else (dims[-1] if len(b.shape) == 1 else dims[-2],)
    col = () if len(b.shape) == 1 else (dims[-1],)
    batch = dims[: len(dims) - len(row) - len(col)]
    la = align(batch, a.shape[:-2]) + row + (inner,)
    lb = align(batch, b.shape[:-2]) + (inner,) + col
    return Term([Factor(a, la), Factor(b, lb)], summed=list(inner), contracted=True)


def _baddbmm(v: Value, dims: Dims) -> Term | None:
    if v.args.get("beta", 1) != 0:
        return None
    term = _matrix_product(v.args["batch1"], v.args["batch2"], dims)
    if term is not None:
        term.scale = float(v.args.get("alpha", 1))
    return term


def _linear(v: Value, dims: Dims) -> Term | None:
    x, w = v.args["input"], v.args["weight"]
    if v.args.get("bias") is not None or len(w.shape) != 2:
        return None
    inner = name_dims(x.shape[-1:])[0]
    return Term(
        [Factor(x, dims[:-1] + (inner,)), Factor(w, (dims[-1], inner))], summed=list(inner), contracted=True
    )


def _einsum(v: Value, dims: Dims) -> Term | None:
    operands = list(v.args["tensors"])
    parsed = _parse_einsum(v.args["equation"], [len(o.shape) for o in operands])
    if parsed is None:
        return None
    inputs, output = parsed
    named = dict(zip(output, dims, strict=True))
    summed: list[Atom] = []
    for letters, o in zip(inputs, operands, strict=True):
        for c, size in zip(letters, o.shape, strict=True):
            if size != 1 and not named.get(c):
                if c in output:
                    return None
                named[c] = (Atom(size),)
                summed.append(named[c][0])
    factors = [
        Factor(o, tuple(named.get(c, ()) if s != 1 else () for c, s in zip(letters, o.shape, strict=True)))
        for letters, o in zip(inputs, operands, strict=True)
    ]
    return Term(factors, summed=summed, contracted=True)


def outer_product(v: Value, index: Sequence[T]) -> list[tuple[Value, tuple[T | int, ...]]] | None:
    """The operands of an einsum that sums nothing, each with the part of `v`'s index that is its own (0 in a
    dim of one)."""
    operands = list(v.args["tensors"])
    parsed = _parse_einsum(v.args["equation"], [len(o.shape) for o in operands])
    if parsed is None or any(c not in parsed[1] for letters in parsed[0] for c in letters):
        return None
    named = dict(zip(parsed[1], index, strict=True))
    return [
        (o, tuple(0 if s == 1 else named[c] for c, s in zip(letters, o.shape, strict=True)))
        for letters, o in zip(parsed[0], operands, strict=True)
    ]


def _parse_einsum(equation: str, ranks: list[int]) -> tuple[list[str], str] | None:
    """Letters of each operand and of the output, ellipses spelled out; None for a repeated letter (a
    diagonal)."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    spare = [c for c in string.ascii_letters if c not in equation]
    widths = [r - len(s.replace("...", "")) for s, r in zip(inputs, ranks, strict=True) if "..." in s]
    dots = "".join(spare[: max(widths, default=0)])

    def spell(s: str, rank: int) -> str:
        width = rank - len(s.replace("...", ""))
        return s.replace("...", dots[len(dots) - width :] if width else "")

    inputs = [spell(s, r) for s, r in zip(inputs, ranks, strict=True)]
    if arrow:
        output = right.replace("...", dots)
    else:
        every = "".join(inputs)
        output = dots + "".join(sorted(c for c in set(every) if every.count(c) == 1 and c not in dots))
    if any(len(set(s)) != len(s) for s in [*inputs, output]):
        return None
    return inputs, output


def _sum(v: Value, dims: Dims) -> Term | None:
    """A sum over dims, of one factor or of a product written elementwise."""
    if v.overload not in ("dim_IntList", "dim_int", ""):
        return None
    source, rank = v.args["self"], len(v.args["self"].shape)
    over = v.args.get("dim")
    over = (
        list(range(rank)) if over is None or over == [] else [over] if isinstance(over, int) else list(over)
    )
    over = [d % rank for d in over]
    keep = v.args.get("keepdim", False)
    rest = iter(dims)
    inner: list[tuple[Atom, ...]] = []
    summed: list[Atom] = []
    for d, size in enumerate(source.shape):
        if d in over:
            inner.append(name_dims((size,))[0])
            summed.extend(inner[-1])
            if keep:
                next(rest)
        else:
            inner.append(next(rest))
    term = Term([Factor(source, tuple(inner))], summed=summed, contracted=True)
    at, at_dims, path = peel(source, tuple(inner))
    if at.name == "mul" and isinstance(at.args.get("other"), Value):
        a, b = at.args["self"], at.args["other"]
        term.factors = [Factor(a, align(at_dims, a.shape)), Factor(b, align(at_dims, b.shape))]
        term.path = [*path, Factor(at, at_dims)]
    return term


_READERS: dict[str, Callable[[Value, Dims], Term | None]] = {
    "matmul": _matmul, "bmm": _matmul, "mm": _matmul, "mv": _matmul, "baddbmm": _baddbmm, "linear": _linear,
    "einsum": _einsum, "sum": _sum,
}  # fmt: skip


# ---------------------------------------------------------------- steps that change nothing but dims and
# dtype


def same_values(v: Value) -> Value | None:
    """The operand of a call that returns its input's values in its input's shape: copies, casts, inert
    dropout."""
    source = v.args.get("self", v.args.get("input"))
    if not isinstance(source, Value) or source.shape != v.shape:
        return None
    if v.name in (
        "clone",
        "contiguous",
        "alias",
        "lift_fresh_copy",
        "_to_copy",
        "to",
        "type_as",
        "float",
        "half",
    ):
        ok = (
            v.dtype is not None
            and source.dtype is not None
            and v.dtype.is_floating_point
            and (source.dtype.is_floating_point)
        )
        return source if ok else None
    if v.name in ("dropout", "native_dropout", "alpha_dropout") and (
        v.args.get("p") == 0 or v.args.get("train") is False
    ):
        return source
    return None


def peel(v: Value, dims: Dims) -> tuple[Value, Dims, list[Factor]]:
    """Walk back through views, copies and casts; the Values passed, from the start (which may be the end)."""
    path: list[Factor] = []
    while True:
        if (source := same_values(v)) is not None:
            path.append(Factor(v, dims))
            v = source
        elif (back := back_through_view(v, dims)) is not None:
            path.append(Factor(v, dims))
            v, dims = back
        else:
            return v, dims, path


def scalar(x: object) -> float | None:
    """A Python number, or a tensor that is one by construction."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    if isinstance(x, Value) and x.name == "literal":
        return float(x.args["value"])
    if isinstance(x, Value) and x.name in (
        "to",
        "_to_copy",
        "expand",
        "clone",
        "lift_fresh_copy",
        "view",
        "detach",
    ):
        return scalar(x.args["self"]) if x.dtype is not None and x.dtype.is_floating_point else None
    if isinstance(x, Value) and x.name in ("full", "scalar_tensor") and x.shape == ():
        return scalar(x.args.get("fill_value", x.args.get("s")))
    return None


def scaled(v: Value) -> tuple[Value, float] | None:
    """The operand and the constant of `x * c`, `c * x`, `x / c`, `-x`."""
    a, b = v.args.get("self"), v.args.get("other")
    if v.name == "neg" and isinstance(a, Value):
        return a, -1.0
    if v.name not in ("mul", "multiply", "div", "divide", "true_divide") or v.args.get("rounding_mode"):
        return None
    c = scalar(b)
    if c is not None and isinstance(a, Value) and a.shape == v.shape:
        if v.name in ("mul", "multiply"):
            return a, c
        return (a, 1.0 / c) if c else None
    c = scalar(a)
    if c is not None and isinstance(b, Value) and b.shape == v.shape and v.name in ("mul", "multiply"):
        return b, c
    return None


# ---------------------------------------------------------------- whatever is linear in one factor


def unfold(v: Value, dims: Dims) -> Term | None:
    """Go back from `v` through linear steps to the contraction that made it; None if none is met."""
    at, at_dims, path = peel(v, dims)
    term = _unfold_step(at, at_dims)
    if term is not None:
        term.path = [*path, Factor(at, at_dims), *term.path]
    return term


def _unfold_polynomial(v: Value, dims: Dims) -> Term | None:
    """A polynomial of scores q.k."""
    from spcompile.passes.recognize.polynomials import between, polynomial

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


def _unfold_step(v: Value, dims: Dims) -> Term | None:
    if (term := _unfold_polynomial(v, dims)) is not None:
        return term
    if (product := product_of(v, dims)) is not None:
        if len(product.factors) == 1:  # a sum: what it sums may be a contraction itself
            deeper = unfold(product.factors[0].value, product.factors[0].dims)
            if deeper is not None:
                deeper.summed += product.summed
                return deeper
        return product
    if (sc := scaled(v)) is not None:
        term = unfold(sc[0], dims)
        if term is not None:
            term.scale *= sc[1]
        return term
    if v.name in ("mul", "multiply", "div", "divide", "true_divide"):
        return _unfold_product(v, dims)
    if v.name == "cumsum":
        return _unfold_cumsum(v, dims)
    return _unfold_mask(v, dims)


def _unfold_product(v: Value, dims: Dims) -> Term | None:
    a, b = v.args["self"], v.args["other"]
    if not isinstance(a, Value) or not isinstance(b, Value) or v.args.get("rounding_mode"):
        return None
    division = v.name not in ("mul", "multiply")
    for spine, other in ((a, b), (b, a)):
        if division and spine is b:
            return None
        term = unfold(spine, align(dims, spine.shape))
        if term is not None:
            term.factors.append(Factor(other, align(dims, other.shape), inverse=division))
            return term
    return None


def _unfold_cumsum(v: Value, dims: Dims) -> Term | None:
    """y_i = sum_{j <= i} x_j: a causal mask over a fresh atom."""
    x, d = v.args["self"], v.args["dim"] % len(dims)
    if len(resolve(dims[d])) != 1:
        return None
    fresh = name_dims((v.shape[d],))[0]
    inner = dims[:d] + (fresh,) + dims[d + 1 :]
    term = unfold(x, inner) or Term([Factor(x, inner)], contracted=True)
    term.masks.append(Mask("tril", (dims[d], fresh)))
    term.summed += list(fresh)
    return term


def _unfold_mask(v: Value, dims: Dims) -> Term | None:
    """masked_fill(x, m, 0), where(m, x, 0), where(m, 0, x), tril(x), triu(x)."""
    x, mask = v.args.get("self"), None
    if v.name == "masked_fill" and scalar(v.args["value"]) == 0:
        m = v.args["mask"]
        mask = Mask("value", align(dims, m.shape), m, complement=True)
    elif v.name == "where" and v.overload != "default":
        m, a, b = v.args["condition"], v.args["self"], v.args["other"]
        if is_zero(b):
            x, mask = a, Mask("value", align(dims, m.shape), m)
        elif is_zero(a):
            x, mask = b, Mask("value", align(dims, m.shape), m, complement=True)
    elif v.name in ("tril", "triu"):
        mask = Mask(v.name, dims[-2:], diagonal=v.args.get("diagonal", 0))
    if mask is None or not isinstance(x, Value) or x.shape != v.shape:
        return None
    term = unfold(x, dims)
    if term is not None:
        term.masks.append(mask)
    return term


def is_zero(x: object) -> bool:
    if scalar(x) == 0:
        return True
    return isinstance(x, Value) and x.name in ("zeros", "zeros_like", "new_zeros")
