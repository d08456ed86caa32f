"""Views, joins and gathers of masks: which entry of the operand an entry of the result is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy
import torch

from spcompile.passes.recognize.proof.context import Choice, Context, lift
from spcompile.passes.recognize.proof.values import (
    Function,
    Index,
    Memo,
    as_number,
    broadcast,
    evaluate,
    where,
)
from spcompile.passes.shadow import Value


def reindex(remap: Callable[[Value, Index], Index | None]) -> Callable[[Value, Memo], Function]:
    def maker(v: Value, memo: Memo) -> Function:
        f = evaluate(v.args["self"], memo)

        def g(ctx: Context, index: Index) -> object:
            at = remap(v, index)
            return None if at is None else f(ctx, at)

        return g

    return maker


def reshape_view(v: Value, index: Index) -> Index | None:
    """Dims of size one come and go; any other change of shape is not followed."""
    source = v.args["self"].shape
    if [s for s in source if s != 1] != [s for s in v.shape if s != 1]:
        return None
    rest = iter([e for e, s in zip(index, v.shape, strict=True) if s != 1])
    return tuple(sympy.Integer(0) if s == 1 else next(rest) for s in source)


def expand_view(v: Value, index: Index) -> Index:
    return expand_index(v.args["self"].shape, index)


def expand_index(shape: Sequence[int], index: Index) -> Index:
    """The index into an operand of `shape` that was broadcast, from the right."""
    tail = index[len(index) - len(shape) :]
    return tuple(sympy.Integer(0) if s == 1 else e for e, s in zip(tail, shape, strict=True))


def permuted(v: Value, index: Index) -> Index:
    at = dict(zip(v.args["dims"], index, strict=True))
    return tuple(at[d] for d in range(len(index)))


def slice_view(v: Value, index: Index) -> Index:
    d, start, step = (v.args[n] for n in ("dim", "start", "step"))
    return (*index[:d], sympy.expand(index[d] * step + start), *index[d + 1 :])


def select_view(v: Value, index: Index) -> Index:
    d = v.args["dim"]
    return (*index[:d], sympy.Integer(v.args["index"]), *index[d:])


def flip_view(v: Value, index: Index) -> Index:
    return tuple(v.shape[n] - 1 - e if n in v.args["dims"] else e for n, e in enumerate(index))


def gather(v: Value, memo: Memo) -> Function | None:
    """x[rows, cols] with an index tensor for each of the leading dims, all of v's shape after
    broadcasting."""
    source, picks = v.args["self"], v.args["indices"]
    if any(not isinstance(p, Value) or p.dtype == torch.bool for p in picks) or len(picks) > len(
        source.shape
    ):
        return None
    rest = len(source.shape) - len(picks)
    lead = len(v.shape) - rest
    f = evaluate(source, memo)
    parts = [broadcast(p, memo) for p in picks]

    def g(ctx: Context, index: Index) -> object:
        at = [p(ctx, index[:lead]) for p in parts]
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
    return where(ctx, ctx.at_least_zero(at[d]), here, _joined(ctx, parts[:-1], memo, d, index))


def cat(v: Value, memo: Memo) -> Function:
    parts, d = list(v.args["tensors"]), v.args["dim"]
    return lambda ctx, index: _joined(ctx, parts, memo, d, index)


def diff(v: Value, memo: Memo) -> Function | None:
    """y_t = x_{t+1} - x_t, of x between what is prepended and appended."""
    if v.args.get("n", 1) != 1 or v.dtype == torch.bool:
        return None
    parts = [p for p in (v.args.get("prepend"), v.args["self"], v.args.get("append")) if p is not None]
    d = v.args["dim"]

    def f(ctx: Context, index: Index) -> object:
        after = (*index[:d], index[d] + 1, *index[d + 1 :])
        ends = [as_number(_joined(ctx, parts, memo, d, i)) for i in (after, index)]
        return lift(lambda a, b: sympy.expand(a - b), *ends)

    return f


REMAPS: dict[str, Callable[[Value, Index], Index | None]] = {
    "reshape": reshape_view,
    "expand": expand_view,
    "permute": permuted,
    "slice": slice_view,
    "select": select_view,
    "flip": flip_view,
}
"""Views, by op name: the index of the operand's entry."""
