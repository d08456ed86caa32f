"""The algebra of memory states: associativity, identity, and that any split into ranks gives the whole."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from spcompile.attention import ALGEBRAS, StateAlgebra, reference
from spcompile.attention.algebra import Summary, algebra_of, fold, identity, pack, summary_shapes, unpack
from spcompile.attention.variants import VARIANTS, table
from spcompile.kernels.linear.chunked import Forward
from spcompile.kernels.linear.operands import Operands
from tests.variants import KINDS, draw, options_of

F64 = torch.float64
every_algebra = pytest.mark.parametrize("algebra", ALGEBRAS.values(), ids=ALGEBRAS)
every_kind = pytest.mark.parametrize("kind", KINDS)
seeds = st.integers(0, 2**31)
quick = settings(max_examples=12, deadline=None)


def summaries(algebra: StateAlgebra, count: int, seed: int) -> Summary:
    """``count`` random summaries, stacked."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(count, 2, *shape, generator=generator, dtype=F64)

    transition = {
        "basic": (),
        "decay": (-normal(3, 1).abs(),),
        "matrix": (normal(3, 3) / 2,),
        "affine": (normal(3, 4),),
        "maximum": (normal(3, 1),),
    }
    return (*transition[algebra.name], normal(3, 4))


def entry(stack: Summary, index: int) -> Summary:
    return tuple(x[index] for x in stack)


def same(a: Summary, b: Summary) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@every_algebra
@quick
@given(seed=seeds)
def test_combine_is_associative_and_identity_neutral(algebra: StateAlgebra, seed: int) -> None:
    a, b, c = (entry(summaries(algebra, 3, seed), i) for i in range(3))
    same(algebra.combine(algebra.combine(c, b), a), algebra.combine(c, algebra.combine(b, a)))
    same(algebra.combine(a, identity(algebra, a)), a)
    same(algebra.combine(identity(algebra, a), a), a)


@every_algebra
@quick
@given(seed=seeds)
def test_combine_is_one_run_after_the_other(algebra: StateAlgebra, seed: int) -> None:
    stack = summaries(algebra, 3, seed)
    a, b, (*_, state) = (entry(stack, i) for i in range(3))
    after = algebra.apply(b, algebra.apply(a, state))
    same((algebra.apply(algebra.combine(b, a), state),), (after,))


@every_algebra
@settings(max_examples=30, deadline=None)
@given(seed=seeds, count=st.integers(1, 9), rank=st.integers(0, 8), later=st.booleans())
def test_fold_is_the_chain(algebra: StateAlgebra, seed: int, count: int, rank: int, later: bool) -> None:
    """The fold over a runtime rank is the chain over that rank's predecessors (or successors)."""
    stack, rank = summaries(algebra, count, seed), rank % count
    ranks = torch.arange(count)
    got = fold(algebra, stack, ranks > rank if later else ranks < rank, reverse=later)
    chain = identity(algebra, entry(stack, 0))
    for r in range(count - 1, rank, -1) if later else range(rank):
        chain = algebra.combine(entry(stack, r), chain)
    same(got, chain)


@every_algebra
def test_pack_and_unpack(algebra: StateAlgebra) -> None:
    stack = summaries(algebra, 3, 0)
    packed = torch.stack([pack(entry(stack, r)) for r in range(3)])
    same(unpack(packed, summary_shapes(entry(stack, 0))), stack)


def summary_of(x: Operands, kind: str) -> Summary:
    """What the kernels say of a run of tokens; each cuts it into chunks of its own."""
    return Forward(x, options_of(KINDS[kind])).total()


@every_kind
@quick
@given(seed=seeds, cuts=st.lists(st.integers(0, 90), max_size=3))
def test_any_split_gives_the_whole(kind: str, seed: int, cuts: list[int]) -> None:
    """Ranks of any lengths, each in chunks of its own, composed: the summary of the whole, and of tokens."""
    x = draw(KINDS[kind], 1, 1, 90, 4, 3, initial=False, seed=seed)
    algebra = algebra_of(x)
    bounds = [0, *sorted(cuts), 90]
    total = identity(algebra, summary_of(x, kind))
    for start, stop in itertools.pairwise(bounds):
        part = Operands(*(y if y is None or y.shape[2] == 1 else y[:, :, start:stop] for y in x))
        total = algebra.combine(summary_of(part, kind), total) if stop > start else total
    same(total, summary_of(x, kind))


@every_kind
@quick
@given(seed=seeds)
def test_a_run_maps_states_as_the_recurrence_does(kind: str, seed: int) -> None:
    x = draw(KINDS[kind], 1, 1, 70, 4, 3, seed=seed)
    _, want = reference.linear_attention(*x, *options_of(KINDS[kind]))
    assert x.initial_state is not None
    same((algebra_of(x).apply(summary_of(x, kind), x.initial_state),), (want,))


def test_the_readme_has_the_table_of_variants() -> None:
    """README's table is the code's: ``spcompile variants`` prints what belongs between its two marks."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    between = text.partition("<!-- variants -->\n")[2].partition("\n<!-- /variants -->")[0]
    assert between == table()


def test_every_variant_has_its_model() -> None:
    assert set(VARIANTS) == {name.partition(":")[0] for name in models.names()}
