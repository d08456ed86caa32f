"""Contractions in one form: a product of factors whose dims are named, summed over the atoms the output
lacks.

    out[atoms] = scale * sum_{summed} prod_n factor_n[atoms]

`expand` reads a Value as one or several of them; `unfold` goes further back.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from spcompile.passes.recognize.algebra.dims import Atom, Dims, atoms_of, back_through_view
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
    """A factor of zeros and a constant.

    The Value, bool or numbers, says where; without one it is the entries (i, j) with j <= i + diagonal.
    """

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


def einsum(v: Value, dims: Dims) -> Term | None:
    """An einsum whose output's dims are named; None for a repeated letter (a diagonal)."""
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
    if parsed is None:
        return None
    for letters, o in zip(parsed[0], operands, strict=True):
        if any(s != 1 and c not in parsed[1] for c, s in zip(letters, o.shape, strict=True)):
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


# ---------------------------------------------------------------- steps that change nothing but dims and
# dtype


def same_values(v: Value) -> Value | None:
    """The operand of a copy, or of a cast from floats to floats."""
    if v.name not in ("clone", "_to_copy"):
        return None
    source: Value = v.args["self"]
    dtypes = v.dtype, source.dtype
    return source if all(x is not None and x.is_floating_point for x in dtypes) else None


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
    if not isinstance(x, Value):
        return None
    if x.name == "literal":
        return float(x.args["value"])
    if x.name in ("_to_copy", "expand", "clone", "reshape", "detach"):
        return scalar(x.args["self"]) if x.dtype is not None and x.dtype.is_floating_point else None
    return None


def scaled(v: Value) -> tuple[Value, float] | None:
    """The operand and the constant of `x * c`, `c * x`, `x / c`."""
    if v.name not in ("mul", "div") or v.args.get("rounding_mode"):
        return None
    a, b = v.args["self"], v.args["other"]
    c = scalar(b)
    if c is not None and isinstance(a, Value) and a.shape == v.shape:
        if v.name == "mul":
            return a, c
        return (a, 1.0 / c) if c else None
    c = scalar(a)
    if c is not None and isinstance(b, Value) and b.shape == v.shape and v.name == "mul":
        return b, c
    return None


def is_zero(x: object) -> bool:
    return scalar(x) == 0 or (isinstance(x, Value) and x.name == "full" and scalar(x.args["fill_value"]) == 0)
