"""What each op does to a mask's symbolic value: a function from index expressions to a typed expression.

`evaluate(value)` gives f(ctx, index): Bool (a sympy Boolean) for bool tensors, otherwise a sympy number or a
`masks.Choice` of numbers. An op that is not in the table, and any number that its dtype may not hold exactly, is data:
an uninterpreted function of its indices, of which nothing is known but that it equals itself.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from sympy.logic.boolalg import Boolean

from spcompile.passes.recognize.dims import Dims
from spcompile.passes.recognize.masks import Choice, Context, choose, exact, is_bool, lift, rounded
from spcompile.passes.shadow import Value

Index = tuple[sympy.Expr, ...]
Function = Callable[[Context, Index], object]
Memo = dict[Value, object]
_TOO_LARGE = 64  # leaves of a Choice: more than any hand-written mask has


def evaluate(v: Value, memo: Memo) -> Function:
    """The symbolic function of `v`, memoised per Value; its results, per index, in the Context."""
    if v not in memo:
        memo[v] = _remember(v, _build(v, memo))
    return memo[v]  # type: ignore[return-value]


def _remember(v: Value, f: Function) -> Function:
    def call(ctx: Context, index: Index) -> object:
        key = (v, index)
        if key not in ctx.known:
            ctx.known[key] = _kept(ctx, v, index, f(ctx, index))
        return ctx.known[key]

    return call


def _kept(ctx: Context, v: Value, index: Index, out: object) -> object:
    """`out` if it is of the right type, and exact in v's dtype; else data."""
    if v.dtype == torch.bool:
        return out if is_bool(out) else _data(ctx, v, index)
    leaves = _leaves(out)
    if out is None or len(leaves) > _TOO_LARGE or any(is_bool(x) for x in leaves):
        return _data(ctx, v, index)
    if not all(x.is_Number or (x.is_Symbol and x.name[0] == "y") or exact(ctx, x, v.dtype) for x in leaves):
        return _data(ctx, v, index)
    return lift(lambda x: rounded(x, v.dtype) if x.is_Number and x is not sympy.nan else x, out)


def _leaves(x: object) -> list:
    return _leaves(x.then) + _leaves(x.other) if isinstance(x, Choice) else [x]


def _data(ctx: Context, v: Value, index: Index) -> sympy.Basic:
    return ctx.data((v, index), v.dtype == torch.bool)


def _build(v: Value, memo: Memo) -> Function:
    maker = _OPS.get(v.name)
    made = maker(v, memo) if maker and v.dtype is not None and not v.dtype.is_complex else None
    return made or (lambda ctx, index: _data(ctx, v, index))


def _operand(x: object, memo: Memo, rank: int) -> Function | None:
    """An argument as a function of the output's index: a number, or a Value broadcast from the right."""
    if isinstance(x, (bool, int, float)):
        const = sympy.S(x) if isinstance(x, bool) else _number(x)
        return lambda ctx, index: const
    if not isinstance(x, Value):
        return None
    f = evaluate(x, memo)

    def broadcast(ctx: Context, index: Index) -> object:
        tail = index[len(index) - len(x.shape) :]
        return f(ctx, tuple(sympy.Integer(0) if s == 1 else e for e, s in zip(tail, x.shape, strict=True)))

    return broadcast


def _number(x: float) -> sympy.Expr:
    return sympy.Integer(x) if isinstance(x, int) else rounded(x, torch.float64)


def as_number(x: object) -> object:
    return choose(x, sympy.Integer(1), sympy.Integer(0)) if is_bool(x) else x


def as_bool(ctx: Context, x: object) -> Boolean:
    if is_bool(x):
        return x
    return sympy.Not(lift(lambda e: _equal(ctx, e, sympy.Integer(0)), x))


def _equal(ctx: Context, a: sympy.Expr, b: sympy.Expr) -> Boolean:
    return sympy.And(_at_least(ctx, a, b), _at_least(ctx, b, a))


def _at_least(ctx: Context, a: sympy.Expr, b: sympy.Expr) -> Boolean:
    if a.is_Number and b.is_Number:  # infinities included
        return sympy.true if a >= b else sympy.false
    if a.is_infinite or b.is_infinite:
        # An index or an integer is finite; data may be anything.
        return ctx.data(("order", a, b), True)
    return ctx.at_least_zero(a - b)


# ---------------------------------------------------------------- elementwise


def _elementwise(f: Callable[..., object], *names: str) -> Callable[[Value, Memo], Function | None]:
    def maker(v: Value, memo: Memo) -> Function | None:
        parts = [_operand(v.args.get(n), memo, len(v.shape)) for n in names]
        if any(p is None for p in parts) or v.args.get("alpha", 1) != 1 or v.args.get("rounding_mode"):
            return None
        return lambda ctx, index: f(ctx, *(p(ctx, index) for p in parts))  # type: ignore[misc]

    return maker


def _arithmetic(f: Callable[[sympy.Expr, sympy.Expr], sympy.Expr]) -> Callable:
    return lambda ctx, *xs: lift(lambda *e: sympy.expand(f(*e)), *(as_number(x) for x in xs))


def _compare(f: Callable[[Context, sympy.Expr, sympy.Expr], Boolean]) -> Callable:
    return lambda ctx, a, b: lift(lambda x, y: _no_nan(f, ctx, x, y), as_number(a), as_number(b))


def _no_nan(f: Callable, ctx: Context, x: sympy.Expr, y: sympy.Expr) -> Boolean:
    return ctx.data(("nan", x, y), True) if sympy.nan in (x, y) else f(ctx, x, y)


def _logical(f: Callable[..., Boolean]) -> Callable:
    return lambda ctx, *xs: f(*(as_bool(ctx, x) for x in xs))


def _bitwise(f: Callable[..., Boolean]) -> Callable:
    """On bools the logic; on integers it is not followed."""

    def apply(ctx: Context, *xs: object) -> object:
        if all(is_bool(x) for x in xs):
            return f(*xs)
        return None

    return apply


def _where(ctx: Context, c: object, a: object, b: object) -> object:
    test = as_bool(ctx, c)
    if all(is_bool(x) for x in (a, b)):
        return sympy.Or(sympy.And(test, a), sympy.And(sympy.Not(test), b))
    return choose(test, as_number(a), as_number(b))


def _max(ctx: Context, a: sympy.Expr, b: sympy.Expr) -> object:
    return choose(_at_least(ctx, a, b), a, b)


def _clamp(v: Value, memo: Memo) -> Function | None:
    x = _operand(v.args["self"], memo, len(v.shape))
    lo, hi = (v.args.get(n) if v.name == "clamp" else None for n in ("min", "max"))
    if v.name == "clamp_min":
        lo = v.args["min"]
    if v.name == "clamp_max":
        hi = v.args["max"]
    if x is None or any(b is not None and not isinstance(b, (int, float)) for b in (lo, hi)):
        return None

    def f(ctx: Context, index: Index) -> object:
        out = as_number(x(ctx, index))
        if lo is not None:
            out = lift(lambda e: _max(ctx, e, _number(lo)), out)
        if hi is not None:
            out = lift(lambda e: choose(_at_least(ctx, _number(hi), e), e, _number(hi)), out)
        return out

    return f


def _cast(v: Value, memo: Memo) -> Function:
    f = evaluate(v.args["self"], memo)
    source = v.args["self"].dtype

    def cast(ctx: Context, index: Index) -> object:
        x = f(ctx, index)
        if v.dtype == torch.bool:
            return as_bool(ctx, x)
        if source is not None and source.is_floating_point and not v.dtype.is_floating_point:  # type: ignore[union-attr]
            if any(not e.is_Integer and not exact(ctx, e, source) for e in _leaves(x)):
                return None  # truncation
        return as_number(x)

    return cast


def _floordiv(ctx: Context, a: sympy.Expr, n: sympy.Expr) -> sympy.Expr:
    lo, hi = ctx.interval(a)
    if abs(lo) == float("inf") or abs(hi) == float("inf"):
        return ctx.data(("div", a, n), False)
    return sympy.Integer(lo // int(n)) if lo // int(n) == hi // int(n) else ctx.data(("div", a, n), False, lo // int(n), hi // int(n))


def _division(remainder: bool) -> Callable[[Value, Memo], Function | None]:
    def maker(v: Value, memo: Memo) -> Function | None:
        n = v.args["other"]
        floor = remainder or v.name == "floor_divide" or v.args.get("rounding_mode") == "floor"
        if not isinstance(n, int) or n <= 0 or not floor or v.dtype.is_floating_point:  # type: ignore[union-attr]
            return None
        f, number = evaluate(v.args["self"], memo), sympy.Integer(n)

        def one(ctx: Context, e: sympy.Expr) -> sympy.Expr:
            q = _floordiv(ctx, e, number)
            return sympy.expand(e - number * q) if remainder else q

        return lambda ctx, index: lift(lambda e: one(ctx, e), as_number(f(ctx, index)))

    return maker


# ---------------------------------------------------------------- creation


def _full(number: object) -> Callable[[Value, Memo], Function | None]:
    def maker(v: Value, memo: Memo) -> Function | None:
        x = v.args.get("fill_value", v.args.get("value", v.args.get("s"))) if number is None else number
        part = _operand(x, memo, 0)
        if part is None or (isinstance(x, Value) and x.shape != ()):
            return None
        to_bool = v.dtype == torch.bool
        return lambda ctx, index: as_bool(ctx, part(ctx, ())) if to_bool else as_number(part(ctx, ()))

    return maker


def _arange(v: Value, memo: Memo) -> Function | None:
    start, step = v.args.get("start", 0), v.args.get("step", 1)
    if not all(isinstance(x, int) or float(x).is_integer() for x in (start, step)):
        return None
    return lambda ctx, index: sympy.expand(int(start) + int(step) * index[0])


def _triangle(lower: bool) -> Callable[[Value, Memo], Function]:
    def maker(v: Value, memo: Memo) -> Function:
        f, k = evaluate(v.args["self"], memo), v.args.get("diagonal", 0)

        def g(ctx: Context, index: Index) -> object:
            e = index[-2] + k - index[-1]
            keep = ctx.at_least_zero(e if lower else -e)
            x = f(ctx, index)
            return sympy.And(keep, x) if v.dtype == torch.bool else choose(keep, x, sympy.Integer(0))

        return g

    return maker


def _eye(v: Value, memo: Memo) -> Function:
    def f(ctx: Context, index: Index) -> object:
        same = _equal(ctx, index[0], index[1])
        return same if v.dtype == torch.bool else as_number(same)

    return f


def _cumsum(v: Value, memo: Memo) -> Function | None:
    """Of a tensor that is constant along the dim: c (i + 1)."""
    source = v.args["self"]
    d, f = v.args["dim"] % len(v.shape), evaluate(source, memo)

    def g(ctx: Context, index: Index) -> object:
        probe = ctx.index(v.shape[d])
        x = as_number(f(ctx, (*index[:d], probe, *index[d + 1 :])))
        if not isinstance(x, sympy.Expr) or not x.is_Number:
            return None
        return sympy.expand(x * (index[d] + 1))

    return g


# ---------------------------------------------------------------- views: the operand's index


def _reindex(remap: Callable[[Value, Index], Index | None]) -> Callable[[Value, Memo], Function]:
    def maker(v: Value, memo: Memo) -> Function:
        f = evaluate(v.args["self"], memo)

        def g(ctx: Context, index: Index) -> object:
            at = remap(v, index)
            return None if at is None else f(ctx, at)

        return g

    return maker


def _reshape(v: Value, index: Index) -> Index | None:
    """Dims of size one come and go; any other change of shape is not followed."""
    source = v.args["self"].shape
    if v.overload == "dtype" or [s for s in source if s != 1] != [s for s in v.shape if s != 1]:
        return None
    rest = iter([e for e, s in zip(index, v.shape, strict=True) if s != 1])
    return tuple(sympy.Integer(0) if s == 1 else next(rest) for s in source)


def _expand(v: Value, index: Index) -> Index:
    source = v.args["self"].shape
    tail = index[len(index) - len(source) :]
    return tuple(sympy.Integer(0) if s == 1 else e for e, s in zip(tail, source, strict=True))


def _permuted(v: Value, index: Index) -> Index | None:
    """Through `dims`, which knows every spelling of a permutation: the index plays the atoms' part."""
    from spcompile.passes.recognize.dims import back_through_view

    marks: Dims = tuple((e,) for e in index)  # type: ignore[misc]
    back = back_through_view(v, marks)
    return None if back is None else tuple(d[0] for d in back[1])  # type: ignore[misc]


def _slice(v: Value, index: Index) -> Index:
    source = v.args["self"].shape
    d = v.args.get("dim", 0) % len(source)
    start = v.args.get("start") or 0
    start = max(0, start + source[d]) if start < 0 else min(start, source[d])
    return (*index[:d], sympy.expand(index[d] * v.args.get("step", 1) + start), *index[d + 1 :])


def _select(v: Value, index: Index) -> Index:
    source = v.args["self"].shape
    d = v.args["dim"] % len(source)
    return (*index[:d], sympy.Integer(v.args["index"] % source[d]), *index[d:])


def _flip(v: Value, index: Index) -> Index:
    dims = [d % len(index) for d in v.args["dims"]]
    return tuple(v.shape[n] - 1 - e if n in dims else e for n, e in enumerate(index))


def _gather(v: Value, memo: Memo) -> Function | None:
    """x[rows, cols] with an index tensor for each of the leading dims, all of v's shape after broadcasting."""
    source, picks = v.args["self"], v.args["indices"]
    if any(not isinstance(p, Value) or p.dtype == torch.bool for p in picks) or len(picks) > len(source.shape):
        return None
    rest = len(source.shape) - len(picks)
    lead = len(v.shape) - rest
    f = evaluate(source, memo)
    parts = [_operand(p, memo, lead) for p in picks]

    def g(ctx: Context, index: Index) -> object:
        at = [p(ctx, index[:lead]) for p in parts]  # type: ignore[misc]
        for e, size in zip(at, source.shape, strict=False):
            if isinstance(e, Choice) or not 0 <= ctx.interval(e)[0] <= ctx.interval(e)[1] < size:
                return None
        return f(ctx, (*at, *index[lead:]))

    return g


def _joined(ctx: Context, parts: list[Value], memo: Memo, d: int, index: Index) -> object:
    """The entry of `cat(parts, d)` at `index`."""
    before = sum(p.shape[d] for p in parts[:-1])
    at = (*index[:d], sympy.expand(index[d] - before), *index[d + 1 :])
    here = evaluate(parts[-1], memo)(ctx, at)
    if len(parts) == 1:
        return here
    return _where(ctx, ctx.at_least_zero(at[d]), here, _joined(ctx, parts[:-1], memo, d, index))


def _cat(v: Value, memo: Memo) -> Function:
    parts, d = list(v.args["tensors"]), v.args.get("dim", 0) % len(v.shape)
    return lambda ctx, index: _joined(ctx, parts, memo, d, index)


def _diff(v: Value, memo: Memo) -> Function | None:
    """y_t = x_{t+1} - x_t, of x between what is prepended and appended."""
    if v.args.get("n", 1) != 1 or v.dtype == torch.bool:
        return None
    parts = [p for p in (v.args.get("prepend"), v.args["self"], v.args.get("append")) if p is not None]
    d = v.args.get("dim", -1) % len(v.shape)

    def f(ctx: Context, index: Index) -> object:
        after = (*index[:d], index[d] + 1, *index[d + 1 :])
        ends = [as_number(_joined(ctx, parts, memo, d, i)) for i in (after, index)]
        return lift(lambda a, b: sympy.expand(a - b), *ends)

    return f


_SAME = _elementwise(lambda ctx, x: x, "self")
_AND, _OR, _XOR = _bitwise(sympy.And), _bitwise(sympy.Or), _bitwise(sympy.Xor)
_OPS: dict[str, Callable[[Value, Memo], Function | None]] = {
    "literal": _full(None),
    **dict.fromkeys(("full", "full_like", "new_full", "fill", "scalar_tensor"), _full(None)),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero"), _full(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _full(1)),
    "arange": _arange,
    "eye": _eye,
    "tril": _triangle(True),
    "triu": _triangle(False),
    "cumsum": _cumsum,
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    **dict.fromkeys(("clone", "contiguous", "alias", "lift_fresh_copy", "detach"), _SAME),
    **dict.fromkeys(("reshape", "view", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "view_as"), _reindex(_reshape)),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _reindex(_expand)),
    **dict.fromkeys(("permute", "transpose", "t", "mT", "numpy_T", "movedim", "swapaxes"), _reindex(_permuted)),
    "slice": _reindex(_slice),
    "select": _reindex(_select),
    "flip": _reindex(_flip),
    "index": _gather,
    "cat": _cat,
    "diff": _diff,
    **dict.fromkeys(("add",), _elementwise(_arithmetic(lambda a, b: a + b), "self", "other")),
    **dict.fromkeys(("sub", "subtract"), _elementwise(_arithmetic(lambda a, b: a - b), "self", "other")),
    "rsub": _elementwise(_arithmetic(lambda a, b: b - a), "self", "other"),
    **dict.fromkeys(("mul", "multiply"), _elementwise(_arithmetic(lambda a, b: a * b), "self", "other")),
    "neg": _elementwise(_arithmetic(lambda a: -a), "self"),
    "abs": _elementwise(lambda ctx, x: lift(lambda e: choose(_at_least(ctx, e, sympy.Integer(0)), e, -e), as_number(x)), "self"),
    **dict.fromkeys(("maximum",), _elementwise(lambda ctx, a, b: lift(lambda x, y: _max(ctx, x, y), as_number(a), as_number(b)), "self", "other")),
    **dict.fromkeys(("minimum",), _elementwise(lambda ctx, a, b: lift(lambda x, y: choose(_at_least(ctx, y, x), x, y), as_number(a), as_number(b)), "self", "other")),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp),
    "floor_divide": _division(False),
    "div": _division(False),
    "remainder": _division(True),
    **dict.fromkeys(("ge", "greater_equal"), _elementwise(_compare(_at_least), "self", "other")),
    **dict.fromkeys(("le", "less_equal"), _elementwise(_compare(lambda c, a, b: _at_least(c, b, a)), "self", "other")),
    **dict.fromkeys(("gt", "greater"), _elementwise(_compare(lambda c, a, b: sympy.Not(_at_least(c, b, a))), "self", "other")),
    **dict.fromkeys(("lt", "less"), _elementwise(_compare(lambda c, a, b: sympy.Not(_at_least(c, a, b))), "self", "other")),
    "eq": _elementwise(_compare(_equal), "self", "other"),
    **dict.fromkeys(("ne", "not_equal"), _elementwise(_compare(lambda c, a, b: sympy.Not(_equal(c, a, b))), "self", "other")),
    **dict.fromkeys(("bitwise_and", "__and__"), _elementwise(_AND, "self", "other")),
    **dict.fromkeys(("bitwise_or", "__or__"), _elementwise(_OR, "self", "other")),
    **dict.fromkeys(("bitwise_xor", "__xor__"), _elementwise(_XOR, "self", "other")),
    "bitwise_not": _elementwise(_bitwise(sympy.Not), "self"),
    "logical_and": _elementwise(_logical(sympy.And), "self", "other"),
    "logical_or": _elementwise(_logical(sympy.Or), "self", "other"),
    "logical_xor": _elementwise(_logical(sympy.Xor), "self", "other"),
    "logical_not": _elementwise(_logical(sympy.Not), "self"),
    "where": _elementwise(_where, "condition", "self", "other"),
    "masked_fill": _elementwise(lambda ctx, x, m, value: _where(ctx, m, value, x), "self", "mask", "value"),
}  # fmt: skip


