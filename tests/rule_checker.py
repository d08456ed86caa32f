"""The brute-force checker of sharding rules: every split that a rule allows is run, every one it forbids is
refuted.

It shares no code with what it checks: shards are cut and put together again by plain indexing. Padding is
filled with NaN (where the split asks for a neutral element, with that; integers with copies of the nearest
valid entry).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from spcompile import _torch, collectives, simulate
from spcompile.emit import Emitter
from spcompile.placement import Partial, Placement, Replicate, Shard
from spcompile.rules import Call, Context, Rule, Split, rule_for

__all__ = [
    "Sample",
    "WrongRule",
    "check_allowed",
    "check_linear",
    "cut",
    "forbidden_but_right",
    "run_ranks",
    "terms_of",
]

TOLERANCE = 1e-12
REDUCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}


class WrongRule(AssertionError):
    """A rule says what is not so."""


@dataclass
class Sample:
    """Arguments on which an operator's rule is tried.

    ``exchanges``: its emission has collectives. ``trusting``: its kernel doesn't check shapes, so no
    disagreeing ones may be tried on it.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    exchanges: bool = False
    trusting: bool = False
    tolerance: float = TOLERANCE

    def call(self) -> Call:
        """The call with its result, computed whole."""
        return Call(self.op, self.args, self.kwargs, self.op(*self.args, **self.kwargs))

    def __str__(self) -> str:
        return f"{self.op}{f' ({self.name})' if self.name else ''}"


# ------------------------------------------------------------------------------------- the reference cutter


def _parts(x: Tensor, shard: Shard) -> Tensor:
    return x.unflatten(shard.dim, (shard.outer, -1))


def cut(x: Tensor, shard: Shard, rank: int, fill: float | None = None) -> Tensor:
    """Rank's local tensor of ``x`` under ``shard``, one position at a time."""
    at, parts = shard.dim + 1, _parts(x, shard)
    columns = []
    for position in range(rank * shard.block, (rank + 1) * shard.block):
        index = position - shard.start
        column = parts.select(at, min(max(index, 0), shard.length - 1))
        if not 0 <= index < shard.length:
            if fill is not None:
                column = torch.full_like(column, fill)
            elif x.is_floating_point() or x.is_complex():
                column = torch.full_like(column, torch.nan)
        columns.append(column)
    local = torch.stack(columns, at)
    return local.reshape(*x.shape[: shard.dim], -1, *x.shape[shard.dim + 1 :]).contiguous()


def terms_of(x: Tensor, count: int, seed: int = 0) -> list[Tensor]:
    """Random tensors whose sum is ``x``."""
    generator = torch.Generator().manual_seed(seed)
    if x.is_floating_point() or x.is_complex():
        terms = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(count - 1)]
    else:
        terms = [torch.randint(-5, 5, x.shape, generator=generator).to(x.dtype) for _ in range(count - 1)]
    return [*terms, x - sum(terms)] if terms else [x]


def _locals(x: Tensor, placement: Placement, ranks: int, fill: float | None) -> list[Tensor]:
    if isinstance(placement, Shard):
        return [cut(x, placement, r, fill) for r in range(ranks)]
    if isinstance(placement, Partial):
        assert placement.op == "sum", "only sums are asked for"
        return terms_of(x, ranks)
    return [x] * ranks


def _same(got: Tensor, want: Tensor, tolerance: float) -> bool:
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if got.is_floating_point() or got.is_complex():
        return torch.allclose(got, want, rtol=tolerance, atol=tolerance)
    return torch.equal(got, want)


def _compare(locals_: list[Tensor], placement: Placement, whole: Tensor, tolerance: float) -> str:
    """What is wrong with the ranks' local tensors, "" if nothing."""
    if isinstance(placement, Partial):
        total = reduce(REDUCE[placement.op], locals_)
        return (
            ""
            if _same(total, whole, tolerance)
            else f"the {placement.op} of the terms is {total}, not {whole}"
        )
    if isinstance(placement, Replicate):
        bad = [r for r, x in enumerate(locals_) if not _same(x, whole, tolerance)]
        return f"rank {bad[0]} has {locals_[bad[0]]}, not {whole}" if bad else ""
    at, want = placement.dim + 1, _parts(whole, placement)
    for rank, x in enumerate(locals_):
        if x.shape[placement.dim] != placement.outer * placement.block or x.dtype != whole.dtype:
            return f"rank {rank} has shape {tuple(x.shape)} {x.dtype} under {placement} of {whole.dtype}"
        got = _parts(x, placement)
        for j in range(placement.block):
            index = rank * placement.block + j - placement.start
            if 0 <= index < placement.length and not _same(
                got.select(at, j), want.select(at, index), tolerance
            ):
                return f"rank {rank}, entry {index}: {got.select(at, j)}, not {want.select(at, index)}"
    return ""


# ------------------------------------------------------------------------------------------ what is allowed


def _seeds(size: int, dim: int, ranks: int) -> Iterator[Shard]:
    """Ways to shard a dim: plain, roomy blocks, shifted windows (also ones that stick out), merged dims."""
    block = -(-size // ranks)
    yield Shard(dim, size, block)
    yield Shard(dim, size, block + 1)
    for start in (1, 2, -1):
        yield Shard(dim, size, block + 2, start)
    yield Shard(dim, size, block, 1)
    for unit in (2, 3):  # what a view merged from behind, and cuts off again
        yield Shard(dim, size, -(-size // (ranks * unit)) * unit)
    for outer in (2, 3):
        length, cut_off = divmod(size, outer)
        if not cut_off and length > 1:
            yield Shard(dim, length, -(-length // ranks), 0, outer)


def _outs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def run_ranks(split: Split, operands: list[list[Tensor]], ranks: int, exchanges: bool) -> list[list[Tensor]]:
    """The split's emission on every rank: the outputs, each a list over the ranks."""
    group = collectives.Group(ranks, "checked")
    if exchanges:
        return _run_graph(split, operands, group)
    results = []
    for rank in range(ranks):
        collectives._simulated_rank.append(rank)
        try:
            results.append(_outs(split.emit(Context(group), [x[rank] for x in operands])))
        finally:
            collectives._simulated_rank.pop()
    return [list(x) for x in zip(*results)]


def _run_graph(split: Split, operands: list[list[Tensor]], group: collectives.Group) -> list[list[Tensor]]:
    """As the compiler does: the emission traced into a graph, which all ranks then run together."""
    graph, fake_mode = fx.Graph(), FakeTensorMode()
    emitter = Emitter(graph, fake_mode, _torch.select_decomp_table())
    fakes = []
    for i, x in enumerate(operands):
        fakes.append(emitter.bind(fake_mode.from_tensor(x[0]), graph.placeholder(f"x{i}")))
    outs = emitter.run(split.emit, Context(group), fakes)
    graph.output([emitter.node_of(x) for x in _outs(outs)])
    module = fx.GraphModule(torch.nn.Module(), graph)
    return simulate._Ranks(module, group.size).run(*(simulate._PerRank(x) for x in operands))


def check_allowed(
    sample: Sample, make: Callable[[Call], Rule | None] = rule_for
) -> set[tuple[str, int, int]]:
    """Run every split that the rule allows and compare with the whole; returns the plain seeds it allows.

    Raises:
        WrongRule: names the seed and what differs.
    """
    call, allowed, checked = sample.call(), set(), set()
    rule = make(call)
    assert rule is not None, f"{sample} has no rule"
    tensors = [("in", i, x) for i, x in enumerate(call.operands)] + [
        ("out", i, x) for i, x in enumerate(call.outputs) if x is not None
    ]
    for side, index, x in tensors:
        for dim, ranks in itertools.product(range(x.dim()), (2, 3)):
            for seed in _seeds(x.shape[dim], dim, ranks):
                split = rule.split(side, index, seed)
                if split is None:
                    continue
                if seed.start == 0 and seed.outer == 1:
                    allowed.add((side, index, dim))
                if (split.inputs if side == "in" else split.outputs)[index] != seed:
                    raise WrongRule(f"{sample}: asked for {side} {index} as {seed}, answers {split}")
                if (ranks, split.inputs, split.outputs) not in checked:
                    checked.add((ranks, split.inputs, split.outputs))
                    _check_split(sample, call, split, ranks)
    check_settled(sample, call, rule)
    return allowed


def check_settled(sample: Sample, call: Call, rule: Rule) -> None:
    """Run every split that the rule allows with its output at position 0, farther off.

    Raises:
        WrongRule: as :func:`check_allowed` does.
    """
    settled = getattr(rule, "settled", None)
    if settled is None:
        return
    for index, x in enumerate(call.operands):
        for dim, ranks, start in itertools.product(range(x.dim()), (2, 3), (-1, -3)):
            size = x.shape[dim]
            split = settled(index, Shard(dim, size, -(-size // ranks) + 1, start))
            if split is not None:
                _check_split(sample, call, split, ranks)


def _without_lost(call: Call, split: Split, ranks: int) -> Call:
    """The call with the entries that the ranks lose replaced by what the rule puts there."""
    operands = []
    for x, placement, fill in zip(call.operands, split.inputs, split.fills, strict=True):
        if isinstance(placement, Shard) and fill is not None:
            x, at = x.clone(), placement.dim + 1
            parts = _parts(x, placement)
            for i in range(placement.length):
                if not 0 <= placement.start + i < ranks * placement.block:
                    parts.select(at, i).fill_(fill)
        operands.append(x)
    args, kwargs = call.replaced(operands)
    return Call(call.op, args, kwargs, call.op(*args, **kwargs))


def _check_split(sample: Sample, call: Call, split: Split, ranks: int) -> None:
    # Entries of an operand that stick out of the ranks are lost. The rule says what stands there instead;
    # where it doesn't, they may be lost only if each output entry needs but those at its own position.
    lost = {
        i: f
        for i, (p, f) in enumerate(zip(split.inputs, split.fills))
        if isinstance(p, Shard) and not p.holds_all(ranks)
    }
    if any(isinstance(p, Partial) for p in split.outputs) and None in lost.values():
        return
    if any(f is not None for f in lost.values()):
        call = _without_lost(call, split, ranks)
    operands = [
        _locals(x, p, ranks, f) for x, p, f in zip(call.operands, split.inputs, split.fills, strict=True)
    ]
    before = [[x.clone() for x in xs] for xs in operands]
    outs = run_ranks(split, operands, ranks, sample.exchanges)
    if len(outs) != len(call.outputs) or len(split.outputs) != len(call.outputs):
        raise WrongRule(
            f"{sample}: {len(outs)} outputs, {len(split.outputs)} placements, not {len(call.outputs)}"
        )
    for xs, ys in zip(operands, before):
        if not all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(xs, ys)):
            raise WrongRule(f"{sample}: an operand was written")
    for i, (locals_, placement, whole) in enumerate(zip(outs, split.outputs, call.outputs)):
        if whole is None:
            continue
        wrong = _compare(locals_, placement, whole, sample.tolerance)
        if wrong:
            raise WrongRule(
                f"{sample} on {ranks} ranks, {split.inputs} -> {split.outputs}, output {i}: {wrong}"
            )


# ------------------------------------------------------------------------------------------ what is claimed


def check_linear(sample: Sample, make: Callable[[Call], Rule | None] = rule_for) -> None:
    """The call on terms of a sum, summed, is the call on the sum, for every set that the rule calls
    linear."""
    call = sample.call()
    rule = make(call)
    assert rule is not None
    for linear in rule.linear:
        if any(call.operands[i].dtype == torch.bool for i in linear):
            continue  # no sum of terms is a flag
        for count in (2, 3):
            terms = {i: terms_of(call.operands[i], count, seed=7 + i) for i in linear}
            runs = [
                _outs(call.run([terms[i][n] if i in linear else x for i, x in enumerate(call.operands)]))
                for n in range(count)
            ]
            for xs, whole in zip(zip(*runs), call.outputs):
                if whole is None:
                    continue
                got = reduce(torch.add, xs)
                if not _same(got, whole, max(sample.tolerance, 1e-10)):
                    raise WrongRule(f"{sample}: not linear in operands {sorted(linear)}: {got}, not {whole}")


# ---------------------------------------------------------------------------------------- what is forbidden


def forbidden_but_right(
    sample: Sample, make: Callable[[Call], Rule | None] = rule_for
) -> dict[tuple[int, int], str]:
    """(operand, dim) that the rule refuses though a naive way to cut it gives the right result, with that
    way."""
    call = sample.call()
    rule = make(call)
    assert rule is not None
    refused = {
        (i, dim): _can_be_cut(sample, call, i, dim)
        for i, x in enumerate(call.operands)
        for dim, size in enumerate(x.shape)
        if size > 1 and rule.split("in", i, Shard(dim, size, -(-size // 2))) is None
    }
    return {key: way for key, way in refused.items() if way}


def _can_be_cut(sample: Sample, call: Call, operand: int, dim: int) -> str:
    """A naive way to run the call on two blocks of this dim, "" if there is none."""
    size = call.operands[operand].shape[dim]
    choices: list[list[int | None]] = []
    for i, x in enumerate(call.operands):
        same = [d for d, s in enumerate(x.shape) if s == size]
        free = [None] if not (sample.trusting and same) else []
        choices.append([dim] if i == operand else [*free, *same])
    for dims in itertools.product(*choices):
        runs = []
        for block in range(2):
            operands = [
                x if d is None else x.tensor_split(2, d)[block]
                for x, d in zip(call.operands, dims, strict=True)
            ]
            try:
                runs.append(_outs(call.run(operands)))
            except Exception:
                break
        if len(runs) == 2:
            outs = [xs for xs in zip(*runs, call.outputs) if xs[2] is not None]
            ways = [_reassembled(a, b, whole, sample.tolerance) for a, b, whole in outs]
            if all(ways):
                return f"cutting dims {dims}, outputs by {ways}"
    return ""


def _reassembled(a: Tensor, b: Tensor, whole: Tensor, tolerance: float) -> str:
    """How two blocks' results make the whole, "" if they don't."""
    for dim in range(whole.dim()):
        fits = a.dim() == b.dim() == whole.dim() and a.shape[dim] + b.shape[dim] == whole.shape[dim]
        if fits and all(x.shape[d] == whole.shape[d] for x in (a, b) for d in range(whole.dim()) if d != dim):
            if _same(torch.cat([a, b], dim), whole, tolerance):
                return f"cat {dim}"
    if a.shape == b.shape == whole.shape:
        for name, function in REDUCE.items():
            if not (whole.dtype == torch.bool and name == "product") and _same(
                function(a, b), whole, tolerance
            ):
                return name
    return ""
