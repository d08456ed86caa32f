"""What recognizers know of an operation: each row has a sample, read and compared with what it computes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from spcompile.passes.recognize.algebra import expand as expansion
from spcompile.passes.recognize.algebra.dims import Dims, name_dims, resolve
from spcompile.passes.recognize.algebra.expand import expand
from spcompile.passes.recognize.algebra.picks import PICKS, picks
from spcompile.passes.recognize.algebra.products import Mask, Term
from spcompile.passes.recognize.loops.selections import selections
from spcompile.passes.recognize.proof.context import Choice, Context, is_bool
from spcompile.passes.recognize.proof.exact import Exact
from spcompile.passes.recognize.proof.reals import Reals
from spcompile.passes.shadow import Value
from tests.test_spelling import result, run, shadow_of

X = torch.arange(12.0).reshape(3, 4) / 3 + 1
Sample = Callable[[Tensor], Tensor]


def rows() -> Tensor:
    return torch.arange(5)[:, None]


def keys() -> Tensor:
    return torch.arange(5)[None, :]


def band() -> Tensor:
    return (rows() - keys()).expand(5, 5).clone()


EXACT: dict[str, Callable[[], Tensor]] = {
    "reshape": lambda: torch.arange(5)[None, :, None],
    "expand": lambda: torch.arange(5).expand(3, 5),
    "permute": lambda: band().mT,
    "slice": lambda: band()[1:4:2],
    "select": lambda: band()[:, 3],
    "flip": lambda: band().flip(1),
    "clone": lambda: rows().expand(5, 5).clone(),
    "detach": lambda: band().detach(),
    "add": lambda: torch.add(rows(), keys(), alpha=-2),
    "where": lambda: torch.where(rows() > keys(), rows(), 7),
    "literal": lambda: torch.full((), 3),
    "full": lambda: torch.full((2, 3), -math.inf),
    "arange": lambda: torch.arange(3, 12, 2),
    "eye": lambda: torch.eye(4, dtype=torch.bool),
    "cumsum": lambda: torch.ones(4, 5, dtype=torch.int64).cumsum(1),
    "_to_copy": lambda: (rows() >= keys()).to(torch.float32),
    "index": lambda: torch.arange(3, 8)[torch.arange(4).flip(0)],
    "cat": lambda: torch.cat([torch.arange(3), torch.arange(4, 6), torch.arange(2)]),
    "stack": lambda: torch.stack([torch.arange(3), torch.arange(4, 7)], 1),
    "diff": lambda: torch.diff(torch.arange(5) * 3, prepend=torch.full((1,), -1), dim=-1),
    "mul": lambda: rows() * keys(),
    "abs": lambda: band().abs(),
    "maximum": lambda: torch.maximum(rows(), keys()),
    "minimum": lambda: torch.minimum(rows(), keys()),
    "clamp": lambda: band().clamp(-1, 2),
    "div": lambda: rows().div(2, rounding_mode="floor"),
    "remainder": lambda: torch.arange(5).remainder(3),
    "ge": lambda: rows() >= keys(),
    "le": lambda: rows() <= keys(),
    "gt": lambda: rows() > keys(),
    "lt": lambda: rows() < keys(),
    "eq": lambda: rows() == keys() + 1,
    "ne": lambda: rows() != keys() + 1,
    "bitwise_and": lambda: (rows() >= keys()) & (rows() > 2),
    "bitwise_or": lambda: (rows() >= keys()) | (rows() > 2),
    "bitwise_xor": lambda: (rows() >= keys()) ^ (rows() > 2),
    "bitwise_not": lambda: ~(rows() >= keys()),
    "logical_and": lambda: torch.logical_and(rows() >= keys(), rows()),
    "logical_or": lambda: torch.logical_or(rows() >= keys(), rows() - 2),
    "logical_xor": lambda: torch.logical_xor(rows() >= keys(), keys()),
    "logical_not": lambda: torch.logical_not(rows() - keys()),
}
OF_NUMBERS = {"div", "remainder"}  # of a range of positions they are data


def decay() -> Tensor:
    return (rows() - keys()).float() * 0.25


REALS: dict[str, Sample] = {
    "reshape": lambda x: x[:, :, None],
    "expand": lambda x: x[:, :1].expand(3, 4),
    "permute": lambda x: x.mT,
    "slice": lambda x: x[1:, ::2],
    "select": lambda x: x[:, 2],
    "flip": lambda x: x.flip(1),
    "clone": lambda x: x.clone(),
    "_to_copy": lambda x: x.to(torch.float64),
    "add": lambda x: torch.add(x[:, :1], x[0], alpha=0.5),
    "where": lambda x: torch.where(rows()[:3] > keys()[:, :4], x, 2.0),
    "mul": lambda x: decay()[:3, :4] * x,
    "div": lambda x: x[:, :1] / x,
    "reciprocal": lambda x: x.reciprocal(),
    "exp": lambda x: decay().exp(),
    "exp2": lambda x: decay().exp2(),
    "pow": lambda x: 0.5 ** decay(),
    "float_power": lambda x: torch.float_power(0.5, decay()),
    "nan_to_num": lambda x: decay().nan_to_num(0.0),
    "cumsum": lambda x: x.cumsum(0),
    "einsum": lambda x: torch.outer(x[:, 0], x[0]),
}

PICKED: dict[str, list[Sample]] = {
    "select": [lambda x: x[1], lambda x: x[:, 2]],
    "slice": [lambda x: x[1:], lambda x: x[:, 1:4:2]],
    "flip": [lambda x: x.flip(0), lambda x: x.flip(-1)],
    "cat": [lambda x: torch.cat([x, x * x, x[:1]]), lambda x: torch.cat([x[:, :1], x], 1)],
    "stack": [lambda x: torch.stack([x, x * x], 1)],
    "roll": [lambda x: x.roll(1, 0), lambda x: x.roll(-2, 1)],
    "pad": [lambda x: torch.ops.aten.pad(x, [1, 2]), lambda x: torch.ops.aten.pad(x, [0, 0, 2, -1])],
    "constant_pad_nd": [
        lambda x: torch.constant_pad_nd(x, [1, 2]),
        lambda x: torch.constant_pad_nd(x, [-1, 2]),
    ],
}

EXPANDED: dict[str, list[Sample]] = {
    "einsum": [lambda x: x @ x.mT, lambda x: torch.einsum("ij,kj,i->kj", x, x, x[:, 0])],
    "sum": [lambda x: x.sum(0), lambda x: x.sum(1, keepdim=True)],
    "mul": [lambda x: x * x[:, :1], lambda x: 3 * x, lambda x: x * torch.tensor(2.0)],
    "div": [lambda x: x / x[:1], lambda x: x / 4, lambda x: torch.ones(3, 4) / x],
    "add": [lambda x: torch.add(x, x[0], alpha=2), lambda x: x - 1],
    "copy": [lambda x: torch.ops.aten.copy(torch.zeros(3, 4), x[0])],
    "cumsum": [lambda x: x.cumsum(0), lambda x: x.cumsum(1)],
    "where": [lambda x: torch.where(x > 2, x, 0.0), lambda x: torch.where(x[0] > 2, 0.0, x)],
}


def value_of(function: Callable[..., Tensor], name: str) -> Value:
    value = result(shadow_of(function, X))
    assert value.name == name
    return value


def concrete(ctx: Context, x: Any, at: dict) -> Any:
    """An expression where the index symbols are these numbers."""
    if isinstance(x, Choice):
        return concrete(ctx, x.then if concrete(ctx, x.test, at) else x.other, at)
    if is_bool(x):
        facts = {s: sympy.S(bool(ctx.atoms[s].subs(at) >= 0)) for s in x.free_symbols}
        x = x.xreplace(facts)
        assert x in (sympy.true, sympy.false)
        return x == sympy.true
    return x.subs(at)


def entries(
    value: Value, expected: Tensor, ctx: Context
) -> Iterator[tuple[Sequence[sympy.Symbol], dict, Any]]:
    """The index symbols, what they are for an entry, and the entry."""
    symbols = [ctx.i, ctx.j, *(ctx.index(size) for size in value.shape)][: len(value.shape)]
    for s, size in zip(symbols, value.shape, strict=True):
        ctx.ranges[s] = (0, size - 1)
    for index in itertools.product(*(range(size) for size in value.shape)):
        yield symbols, dict(zip(symbols, index, strict=True)), expected[index].item()


@pytest.mark.parametrize("name", EXACT)
def test_an_entry_of_a_mask(name: str) -> None:
    value, ctx = value_of(lambda x: EXACT[name](), name), Context()
    for symbols, at, expected in entries(value, EXACT[name](), ctx):
        index = map(sympy.Integer, at.values()) if name in OF_NUMBERS else symbols
        found = concrete(ctx, Exact(ctx).at(value, tuple(index)), at)
        assert isinstance(found, bool) == isinstance(expected, bool)
        assert float(found) == expected, f"{name} at {tuple(at.values())}"


@pytest.mark.parametrize("name", REALS)
def test_an_entry_of_a_decay(name: str) -> None:
    value, ctx = value_of(REALS[name], name), Context()
    reals, expected = Reals(ctx), REALS[name](X)
    assert value.dtype is not None and value.dtype.is_floating_point
    for symbols, at, wanted in entries(value, expected, ctx):
        tree = reals.at(value, tuple(symbols))
        found = concrete(ctx, tree, at)
        made = {f: _entry(f, reals) for f in found.atoms(sympy.core.function.AppliedUndef)}
        assert all(reals.sources[f.func].value is not value or name == "cumsum" for f in made), "it is data"
        assert float(found.subs(made)) == pytest.approx(wanted, rel=1e-6), f"{name} at {tuple(at.values())}"


def _entry(f: Any, reals: Reals) -> float:
    source = reals.sources[f.func]
    x = run(source.value, X)
    if source.summed is not None:
        x = x.cumsum(source.summed)
    return float(x[tuple(int(e) for e in f.args)])


def numbered(samples: dict[str, list[Sample]]) -> pytest.MarkDecorator:
    cases = [(n, k) for n, found in samples.items() for k in range(len(found))]
    return pytest.mark.parametrize(("name", "number"), cases)


@numbered(PICKED)
def test_picks_are_the_result(name: str, number: int) -> None:
    value, expected = value_of(PICKED[name][number], name), PICKED[name][number](X)
    out = torch.zeros(expected.shape)
    for p in picks(value) or ():
        source = run(p.source, X)
        size = 1 if p.lacks == "source" else source.shape[p.dim]
        for index in itertools.product(*map(range, expected.shape)):
            o = 0 if p.lacks == "result" else index[p.dim]
            place = p.step * o + p.offset
            place = place % p.wrap if p.wrap else place
            if 0 <= place < size:
                at = p.index(index)
                out[index] += source[
                    tuple(e % p.wrap if p.wrap and d == p.dim else e for d, e in enumerate(at))
                ]
    torch.testing.assert_close(out, expected)
    dims = name_dims(value.shape)
    torch.testing.assert_close(multiplied(selections(value, dims), dims, value.shape), expected)


@numbered(EXPANDED)
def test_products_are_the_result(name: str, number: int) -> None:
    value = value_of(EXPANDED[name][number], name)
    dims = name_dims(value.shape)
    torch.testing.assert_close(multiplied(expand(value, dims), dims, value.shape), EXPANDED[name][number](X))


def test_a_running_sum_is_a_product_with_a_matrix() -> None:
    value = value_of(lambda x: x.cumsum(1), "cumsum")
    dims = name_dims(value.shape)
    torch.testing.assert_close(multiplied(selections(value, dims), dims, value.shape), X.cumsum(1))


def multiplied(terms: list[Term] | None, dims: Dims, shape: Sequence[int]) -> Tensor:
    """A sum of products, by einsum."""
    assert terms is not None
    total = torch.zeros(shape)
    for term in terms:
        letters: dict = {}
        operands: list[Any] = [torch.ones([a.size for d in dims for a in resolve(d)]), _atoms(dims, letters)]
        for f in term.factors:
            x = _matrix(f.value) if f.value.name == "constant" else run(f.value, X)
            x = x.reshape([a.size for d in f.dims for a in resolve(d)]).float()
            operands += [1 / x if f.inverse else x, _atoms(f.dims, letters)]
        for m in term.masks:
            operands += [_kept(m).float(), _atoms(m.dims, letters)]
        found = torch.einsum(*operands, _atoms(dims, letters))
        total = total + term.scale * found.reshape(shape)
    return total


def _atoms(dims: Dims, letters: dict) -> list[int]:
    return [letters.setdefault(a, len(letters)) for d in dims for a in resolve(d)]


def _matrix(v: Value) -> Tensor:
    built: Tensor = v.args["build"](torch.device("cpu"))
    return built


def _kept(m: Mask) -> Tensor:
    sizes = [a.size for d in m.dims for a in resolve(d)]
    if m.value is None:
        i, j = (torch.arange(n) for n in sizes)
        return j[None, :] <= i[:, None] + m.diagonal
    keep: Tensor = run(m.value, X).reshape(sizes)
    return ~keep if m.complement else keep


def test_every_row_has_a_sample() -> None:
    assert EXACT.keys() == Exact.readers.keys()
    assert REALS.keys() == Reals.readers.keys()
    assert PICKED.keys() == PICKS.keys()
    assert EXPANDED.keys() == expansion._READERS.keys()
