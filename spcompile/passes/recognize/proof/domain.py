"""A symbolic evaluator of tensor code: what an entry of a Value is, as an expression in its index.

There are two domains. `Exact` decides conditions, so its numbers are integers that a dtype holds. `Reals`
reads decays, which need only be right up to rounding. What an operation does to an entry is a row of the
domain's table; the rows that both have in common are `SHARED`. An operation without a row, and a result that
the domain does not hold, is data: an uninterpreted function of its index, of which nothing is known but that
it equals itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import sympy

from spcompile.passes.recognize.proof import views
from spcompile.passes.recognize.proof.context import Context, both, choose, either, is_bool
from spcompile.passes.recognize.proof.values import as_number, number
from spcompile.passes.recognize.proof.views import Index
from spcompile.passes.shadow import Value

__all__ = ["SHARED", "TOO_LARGE", "Domain", "Reader", "copied", "where"]

Reader = Callable[[Any, Value, Index], object]
"""The entry of a Value at an index, in a domain; None: it can't be said."""

TOO_LARGE = 64  # leaves of a Choice: more than any hand-written mask has


class Domain(ABC):
    """Evaluates code over the symbols of one Context."""

    readers: ClassVar[Mapping[str, Reader]]
    """By op name."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    @abstractmethod
    def at(self, v: Value, index: Index) -> Any:
        """The entry of `v` at `index`."""

    @abstractmethod
    def test(self, v: Value, index: Index) -> Any:
        """The condition `v`, broadcast from the right, at an index of the result."""

    @abstractmethod
    def arithmetic(self, f: Callable[..., sympy.Expr], v: Value, index: Index, *names: str) -> object:
        """f of the arguments called `names`, for every combination of their leaves."""

    def read(self, v: Value, index: Index) -> object:
        """By the row of its operation; None if there is none."""
        reader = self.readers.get(v.name)
        return None if reader is None else reader(self, v, index)

    def operand(self, x: object, index: Index) -> Any:
        """An argument at the index of the result: a number, or a Value broadcast from the right."""
        if isinstance(x, bool):
            return sympy.S(x)
        if isinstance(x, (int, float)):
            return number(x)
        return self.at(x, views.expand_index(x.shape, index)) if isinstance(x, Value) else None


def _view(remap: Callable[[Value, Index], Index | None]) -> Reader:
    def reader(d: Domain, v: Value, index: Index) -> object:
        at = remap(v, index)
        return None if at is None else d.at(v.args["self"], at)

    return reader


def copied(d: Domain, v: Value, index: Index) -> object:
    return d.at(v.args["self"], index)


def _add(d: Domain, v: Value, index: Index) -> object:
    alpha = number(v.args.get("alpha", 1))
    return d.arithmetic(lambda a, b: a + alpha * b, v, index, "self", "other")


def _where(d: Domain, v: Value, index: Index) -> object:
    yes, no = (d.operand(v.args[n], index) for n in ("self", "other"))
    if yes is None or no is None:
        return None
    return where(d.test(v.args["condition"], index), yes, no)


def where(test: Any, yes: object, no: object) -> object:
    """`yes` where the test holds, else `no`."""
    if is_bool(yes) and is_bool(no):
        return either(both(test, yes), both(sympy.Not(test), no))
    return choose(test, as_number(yes), as_number(no))


SHARED: Mapping[str, Reader] = {
    **{name: _view(remap) for name, remap in views.REMAPS.items()},
    "clone": copied,
    "add": _add,
    "where": _where,
}
