"""The algebra of placements, and the collectives between them, against brute force."""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_checker import cut, terms_of
from rule_samples import x
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spcompile import _torch, collectives, simulate
from spcompile.emit import Emitter
from spcompile.passes.shard.communicate import redistribute
from spcompile.placement import Partial, Placement, Replicate, Shard, local_shape, reshape_shard
from spcompile.rules import Context

quick = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def sharded(
    draw, longest: int = 7, shifted: bool = True, whole: bool = False
) -> tuple[tuple[int, ...], Shard, int]:
    """A shape, how one of its dims is sharded, and over how many ranks."""
    ranks, length = draw(st.integers(1, 5)), draw(st.integers(1, longest))
    outer, unit = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3), (2, 2)]))
    block = -(-length // ranks) + draw(st.integers(0, 2))
    room = max(ranks * block - length, 0)
    start = draw(st.integers(0 if whole else -1, room if whole else room + 1)) if shifted else 0
    before, after = (draw(st.lists(st.integers(1, 3), max_size=2)) for _ in range(2))
    shape = (*before, outer * length * unit, *after)
    return shape, Shard(len(before), length * unit, block * unit, start * unit, outer), ranks


# ------------------------------------------------------------------------------------------------ the algebra


@quick
@given(sharded())
def test_local_shape_is_that_of_a_cut_tensor(case):
    shape, shard, ranks = case
    assert all(tuple(cut(x(*shape), shard, r).shape) == local_shape(shape, shard) for r in range(ranks))
    assert local_shape(shape, Replicate()) == local_shape(shape, Partial()) == shape


@quick
@given(sharded())
def test_what_a_shard_holds(case):
    _, shard, ranks = case
    positions = range(shard.start, shard.start + shard.length)
    held = range(ranks * shard.block)
    assert shard.holds_all(ranks) == all(p in held for p in positions)
    assert shard.padded(ranks) == any(p not in positions for p in held)
    assert shard.unshifted().start == 0 and shard.at(9).dim == 9


def _sequence_index(shape: tuple[int, ...], shard: Shard) -> Tensor:
    """For every entry of a tensor, its index in the sequence."""
    own = torch.arange(shape[shard.dim]) % shard.length
    return own.reshape([-1 if d == shard.dim else 1 for d in range(len(shape))]).expand(shape)


def _factorizations(size: int, parts: int) -> list[tuple[int, ...]]:
    if parts == 1:
        return [(size,)]
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return [(d, *rest) for d in divisors for rest in _factorizations(size // d, parts - 1)]


def _homes(shape: tuple[int, ...], shard: Shard) -> Tensor:
    """For every entry of a tensor, the rank that holds it, and its number among what stands before it."""
    index = _sequence_index(shape, shard)
    rank = torch.div(index + shard.start, shard.block, rounding_mode="floor")
    runs = torch.arange(shape[shard.dim]) // shard.length
    runs = runs.reshape([-1 if d == shard.dim else 1 for d in range(len(shape))]).expand(shape)
    ahead = shape[: shard.dim]
    first = torch.arange(prod(ahead)).reshape(*ahead, *[1] * (len(shape) - shard.dim)).expand(shape)
    return torch.stack([rank, first * shard.outer + runs]).reshape(2, -1)


@quick
@given(sharded(), st.data())
def test_a_view_keeps_the_sequence_or_cuts_it(case, data):
    shape, shard, _ = case
    target = data.draw(st.sampled_from(_factorizations(prod(shape), data.draw(st.integers(1, 4)))))
    found = reshape_shard(shard, shape, target)
    # Every way in which a dim of the target might be seen as [outer, length], in blocks of any size.
    right = {
        candidate
        for dim, size in enumerate(target)
        for outer, length in _factorizations(size, 2)
        if shard.length > 1 < length
        for ratio in [Fraction(length, shard.length)]
        if (ratio * shard.block).denominator == (ratio * shard.start).denominator == 1
        for candidate in [Shard(dim, length, int(ratio * shard.block), int(ratio * shard.start), outer)]
        if torch.equal(_homes(target, candidate), _homes(shape, shard))
    }
    if found is None:
        assert not right
    else:
        assert right == {found}
        assert reshape_shard(found, target, shape) == shard


@pytest.mark.parametrize("block", [4, 8, 12])
def test_chunks_of_the_sequence(block):
    """Whole chunks on every rank: a view into chunks and back moves nothing; else it cuts the sequence."""
    tokens = Shard(1, 32, block)
    chunks = reshape_shard(tokens, (2, 32, 5), (2, 8, 4, 5))
    assert chunks == Shard(1, 8, block // 4)
    assert reshape_shard(chunks, (2, 8, 4, 5), (2, 32, 5)) == tokens
    coarser = Shard(1, 4, 1) if block == 8 else None
    assert reshape_shard(tokens, (2, 32, 5), (2, 4, 8, 5)) == coarser


def test_a_sequence_of_one_is_never_matched():
    assert reshape_shard(Shard(1, 1, 1), (2, 1, 3), (2, 1, 3)) is None


# -------------------------------------------------------------------------------------------- the collectives


def _moved(whole: Tensor, have: Placement, want: Placement, ranks: int, dirty: float) -> list[Tensor]:
    """The local tensors under ``want`` that :func:`redistribute` makes from those under ``have``."""
    if isinstance(have, Shard):
        mine = [cut(whole, have, r, dirty) for r in range(ranks)]
    elif have == Partial("sum"):
        mine = terms_of(whole, ranks)
    else:
        mine = [whole] * ranks
    graph, fake_mode = fx.Graph(), FakeTensorMode()
    emitter = Emitter(graph, fake_mode, _torch.select_decomp_table())
    local = emitter.bind(fake_mode.from_tensor(mine[0]), graph.placeholder("x"))
    context = Context(collectives.Group(ranks, "moved"))
    out = emitter.run(redistribute, context, local, have, want, tuple(whole.shape))
    graph.output([emitter.node_of(out)])
    (got,) = simulate._Ranks(fx.GraphModule(nn.Module(), graph), ranks).run(simulate._PerRank(mine))
    return got


def _check_moved(whole: Tensor, have: Placement, want: Placement, ranks: int) -> None:
    got = _moved(whole, have, want, ranks, dirty=torch.nan)
    if isinstance(want, Partial):
        torch.testing.assert_close(sum(got), whole)
        return
    for rank, local in enumerate(got):
        if isinstance(want, Replicate):
            torch.testing.assert_close(local, whole)
            continue
        assert tuple(local.shape) == local_shape(tuple(whole.shape), want)
        expected = cut(whole, want, rank, torch.nan)
        there = ~expected.isnan()
        if isinstance(have, Shard) and not have.holds_all(ranks):
            # What the old window had lost can't be there: entries that no rank held.
            kept = sum((~cut(whole, have, r, torch.nan).isnan()).sum() for r in range(ranks))
            assert kept < whole.numel()
            lost = _lost(whole.shape, have, ranks)
            there &= ~cut(lost.double(), want, rank, 0.0).bool()
        torch.testing.assert_close(local[there], expected[there], msg=f"rank {rank}: {have} -> {want}")


def _lost(shape: torch.Size, have: Shard, ranks: int) -> Tensor:
    position = _sequence_index(tuple(shape), have) + have.start
    return (position < 0) | (position >= ranks * have.block)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sharded(whole=True))
def test_between_a_shard_and_the_rest(case):
    shape, shard, ranks = case
    whole = x(*shape)
    for have, want in itertools.permutations([Replicate(), Partial("sum"), shard], 2):
        if not (isinstance(have, Shard) and isinstance(want, Partial)):
            _check_moved(whole, have, want, ranks)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(sharded(), st.integers(-9, 9))
def test_a_shift_is_a_halo(case, shift):
    """Of the same dim: also by more than a block, and out of the window."""
    shape, shard, ranks = case
    _check_moved(x(*shape), shard, shard.window(shard.start + shift, shard.length), ranks)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_from_one_dim_to_another(ranks):
    """One tensor of scores by rows and by columns; also from one size of block to another."""
    rows, columns = Shard(0, 7, -(-7 // ranks)), Shard(1, 4, -(-4 // ranks))
    for have, want in itertools.permutations([rows, columns, dataclasses.replace(rows, block=6)], 2):
        _check_moved(x(7, 4), have, want, ranks)


@pytest.mark.parametrize("op", ["max", "min", "product"])
def test_other_reductions_are_all_reduced(op):
    function = {"max": torch.maximum, "min": torch.minimum, "product": torch.mul}[op]
    terms = [x(4, 5, seed=r) for r in range(3)]
    graph, fake_mode = fx.Graph(), FakeTensorMode()
    emitter = Emitter(graph, fake_mode, _torch.select_decomp_table())
    local = emitter.bind(fake_mode.from_tensor(terms[0]), graph.placeholder("x"))
    context = Context(collectives.Group(3, "moved"))
    outs = [
        emitter.run(redistribute, context, local, Partial(op), want, (4, 5))
        for want in (Replicate(), Shard(0, 4, 2))
    ]
    graph.output([emitter.node_of(out) for out in outs])
    whole, rows = simulate._Ranks(fx.GraphModule(nn.Module(), graph), 3).run(simulate._PerRank(terms))
    expected = function(function(terms[0], terms[1]), terms[2])
    assert all(torch.equal(got, expected) for got in whole)
    assert torch.equal(rows[0], expected[:2]) and torch.equal(rows[1], expected[2:])
