"""Polynomials of scores: 1 + s + s^2 / 2 (Based), s^2 (Rebased), by code.

A polynomial of a product q.k is the product of longer features, sum_n a_n (q.k)^n = phi(q).phi'(k) with
[1, x, x (x) x], so it is linear attention again, as long as there are not too many features.
"""

from __future__ import annotations

from spcompile.passes.recognize.algebra.products import same_values, scalar, scaled
from spcompile.passes.shadow import Value

DEGREE = 2
_FEW = 1024

Coefficients = tuple[float, ...]
"""By power, from 0."""
Known = dict[Value, tuple[Value, Coefficients]]
_DEEP = 16  # steps back: more than any polynomial of scores has


def polynomial(v: Value) -> tuple[Value, Coefficients] | None:
    """(s, a) where `v` is sum_n a_n s^n of one Value s elementwise, n <= 2; None if it is only c s."""
    base, a = _read(v, {})
    return (base, a) if any(x for n, x in enumerate(a) if n != 1) else None


def between(v: Value, base: Value) -> list[Value]:
    """What was computed on the way from the base to the polynomial, itself left out."""
    found: dict[Value, None] = {}
    known: Known = {}
    todo = [x for x in v.operands() if x is not base]
    while todo:
        x = todo.pop()
        if x not in found and x.shape == v.shape and _read(x, known)[0] is base:
            found[x] = None
            todo += [y for y in x.operands() if y is not base]
    return list(found)


def features(size: int, a: Coefficients) -> int:
    """How many features a polynomial of `size` features has."""
    return sum(size**n for n, x in enumerate(a) if x)


def affordable(size: int, a: Coefficients, tokens: int) -> bool:
    """Whether a state of these features costs less than scores of all pairs: a token's work is F V with the
    state, tokens (K + V) without. Few features are always fine."""
    return features(size, a) <= max(_FEW, tokens)


def _read(v: Value, known: Known, depth: int = 0) -> tuple[Value, Coefficients]:
    """`v` as a polynomial of one Value, which at last is itself."""
    if v not in known:
        found = _step(v, known, depth + 1) if depth < _DEEP else None
        known[v] = found or (v, (0.0, 1.0))
    return known[v]


def _step(v: Value, known: Known, depth: int) -> tuple[Value, Coefficients] | None:
    if (source := same_values(v)) is not None:
        return _read(source, known, depth)
    if (found := scaled(v)) is not None:
        base, a = _read(found[0], known, depth)
        return base, tuple(found[1] * x for x in a)
    if v.name == "pow" and scalar(v.args["exponent"]) == 2:
        x = v.args["self"]
        if not isinstance(x, Value) or x.shape != v.shape:
            return None
        p = _read(x, known, depth)
        return _times(p, p)
    if v.name in ("mul", "add"):
        return _of_two(v, known, depth)
    return None


def _of_two(v: Value, known: Known, depth: int) -> tuple[Value, Coefficients] | None:
    """A sum or a product of polynomials of one Value, or of one and a number."""
    x, y = v.args["self"], v.args["other"]
    if any(isinstance(z, Value) and scalar(z) is None and z.shape != v.shape for z in (x, y)):
        return None
    parts = [None if scalar(z) is not None else _read(z, known, depth) for z in (x, y)]
    base = next((p[0] for p in parts if p is not None), None)
    if base is None:
        return None
    left, right = (
        p if p is not None else (base, (float(scalar(z) or 0.0),)) for p, z in zip(parts, (x, y), strict=True)
    )
    if left[0] is not right[0]:
        return None
    if v.name == "mul":
        return _times(left, right)
    sign = float(v.args.get("alpha", 1))
    n = max(len(left[1]), len(right[1]))
    a, b = (p + (0.0,) * (n - len(p)) for p in (left[1], right[1]))
    return base, tuple(x + sign * y for x, y in zip(a, b, strict=True))


def _times(
    x: tuple[Value, Coefficients], y: tuple[Value, Coefficients]
) -> tuple[Value, Coefficients] | None:
    if x[0] is not y[0]:
        return None
    out = [0.0] * (len(x[1]) + len(y[1]) - 1)
    for n, a in enumerate(x[1]):
        for m, b in enumerate(y[1]):
            out[n + m] += a * b
    while out and not out[-1]:
        out.pop()
    return (x[0], tuple(out)) if len(out) <= DEGREE + 1 else None
