"""Contractions in one form: a product of factors whose dims are named, summed over the atoms the output
lacks.

    out[atoms] = scale * sum_{summed} prod_n factor_n[atoms]

`product_of` reads one contraction (matmul, bmm, einsum, a sum of a product, ...); `unfold` goes further back.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from spcompile.passes.recognize.dims import Atom, Dims, align, atoms_of, back_through_view, name_dims
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


def is_zero(x: object) -> bool:
    if scalar(x) == 0:
        return True
    return isinstance(x, Value) and x.name in ("zeros", "zeros_like", "new_zeros")
