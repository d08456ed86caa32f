"""Rules in a sort's order, by brute force: rows taken and put, counts, grouped products, and all others."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from routed_checker import Sorted, check_split
from rule_checker import Sample, WrongRule
from rule_samples import POINTWISE, ROUTED, SAMPLES, n, x

from spcompile.placement import Order, Replicate, Shard
from spcompile.rules import Call, rule_for
from spcompile.rules.base import split_of
from spcompile.rules.routing import Ends, Places, Rows
from tests.third_party import load

aten = torch.ops.aten
ORDER = Order("sort", "ids")
SLOTS = [(12, Shard(0, 12, 6), 2), (10, Shard(0, 10, 4), 3), (14, Shard(0, 7, 4, 0, 2), 2)]
every_slots = pytest.mark.parametrize(("size", "slots", "ranks"), SLOTS)


def _sorted(size, slots, ranks, **options):
    return Sorted(n(4, size, seed=3), slots, ranks, **options)


def _call(op, *args, known=(), makes=None, **kwargs):
    return Call(op, args, kwargs, op(*args, **kwargs), known=known, makes=makes)


def _tried(call, sort, tolerance=1e-12):
    """The splits that the rule has for an order, each checked."""
    found = []
    for side, xs in (("in", call.operands), ("out", call.outputs)):
        for index, tensor in enumerate(xs):
            for dim in range(tensor.dim() if tensor is not None else 0):
                for placement in (sort.routed.at(dim), sort.slots.at(dim)):
                    if tensor.shape[dim] == sort.ids.shape[0]:
                        found.append(split_of(rule_for(call), side, index, placement))
    found = [s for s in found if s is not None and sort.routed in [p.at(0) for p in _routed(s)]]
    for split in found:
        check_split(call, split, sort, tolerance)
    return found


def _routed(split):
    return [p for p in (*split.inputs, *split.outputs) if type(p).__name__ == "Routed"]


@every_slots
@pytest.mark.parametrize("descending", [False, True])
def test_a_sort(size, slots, ranks, descending):
    sort = _sorted(size, slots, ranks, descending=descending)
    call = _call(aten.sort.stable, sort.ids, stable=True, dim=0, descending=descending, makes=ORDER)
    assert _tried(call, sort)


@every_slots
def test_rows_taken_and_put(size, slots, ranks):
    sort = _sorted(size, slots, ranks)
    tokens, rows, wide = sort.order // 2, x(size, 3), x(size // 2, 3)
    places, half = sort.order.argsort(), slots.length % 2 == 0 and slots.block % 2 == 0
    spread = {k: v[:, None].expand(-1, 3) for k, v in {"at": sort.order, "to": places, "of": tokens}.items()}
    at, to, of = (None, Rows(ORDER, 1)), (None, Places(ORDER)), (None, Rows(ORDER, 2))
    calls = [
        _call(aten.index.Tensor, rows, [sort.order], known=at),
        _call(aten.index.Tensor, rows, [places], known=to),
        _call(aten.gather.default, rows, 0, spread["at"], known=at),
        _call(aten.gather.default, rows, 0, spread["to"], known=to),
        _call(aten.index_put.default, rows, [sort.order], x(size, 3, seed=1), known=(*at, None)),
        _call(aten.index_put.default, rows, [places], x(size, 3, seed=1), True, known=(*to, None)),
        _call(aten.scatter_add.default, rows, 0, spread["at"], x(size, 3, seed=1), known=(*at, None)),
        _call(aten.scatter_add.default, rows, 0, spread["to"], x(size, 3, seed=1), known=(*to, None)),
    ]
    if half:
        calls += [
            _call(aten.index.Tensor, wide, [tokens], known=of),
            _call(aten.gather.default, wide, 0, spread["of"], known=of),
            _call(aten.index_put.default, wide, [tokens], rows, True, known=(*of, None)),
            _call(aten.scatter_add.default, wide, 0, spread["of"], rows, known=(*of, None)),
        ]
    for call in calls:
        assert _tried(call, sort), call.op


@every_slots
def test_grouped_products(size, slots, ranks):
    load("transformers.integrations.moe")
    sort, experts = _sorted(size, slots, ranks), 4
    ends = torch.bincount(sort.ids, minlength=experts).cumsum(0).int()
    known = (None, None, Ends("ids"))
    rows, weight = x(size, 8).float(), x(experts, 8, 16).float()
    for left, right in ((rows, weight), (weight.mT.contiguous(), rows.t()), (rows.t(), x(size, 16).float())):
        assert _tried(_call(aten._grouped_mm.default, left, right, ends, known=known), sort, 1e-5)
    ours = torch.ops.transformers
    rows, weight, gradient = x(size, 3), x(experts, 3, 5), x(size, 5)
    assert _tried(_call(ours.grouped_mm_fallback.default, rows, weight, ends, known=known), sort)
    op = ours.grouped_mm_fallback_backward.default
    assert _tried(_call(op, rows, weight, ends, gradient, known=(*known, None)), sort)


def test_groups_of_another_sort_are_not_taken():
    sort, ends = _sorted(*SLOTS[0]), torch.tensor([3, 6, 9, 12], dtype=torch.int32)
    args = x(12, 8).float(), x(4, 8, 8).float(), ends
    for known in (Ends("others"), None, Rows(ORDER, 1)):
        rule = rule_for(_call(aten._grouped_mm.default, *args, known=(None, None, known)))
        assert split_of(rule, "in", 0, sort.routed) is None


@every_slots
def test_a_histogram_counts_no_padding(size, slots, ranks):
    sort = _sorted(size, slots, ranks)
    for ids in (sort.ids[sort.order].float(), sort.ids[sort.order].double()):
        assert _tried(_call(aten.histc.default, ids, 4, 0, 3), sort)
    assert rule_for(_call(aten.histc.default, sort.ids.float(), 4)) is None


def test_a_bin_for_each_integer_counts_it():
    """What ``passes/shard/routes.py`` takes a histogram for."""
    from spcompile.passes.shard.routes import _BINS

    for dtype in (torch.float32, torch.float64):
        for bins in (*range(2, 40), 127, 128, 129, 255, 256, 384, 511, 1000, 1023, _BINS):
            assert torch.histc(torch.arange(bins, dtype=dtype), bins, 0, bins - 1).eq(1).all()


@pytest.mark.parametrize("sample", [*SAMPLES, *POINTWISE, *ROUTED], ids=str)
def test_every_rule_that_knows_orders(sample: Sample) -> None:
    """Each split for an entry order of each operand and output, whatever the operator."""
    call = sample.call()
    rule = rule_for(call)
    for side, xs in (("in", call.operands), ("out", call.outputs)):
        for index, tensor in enumerate(xs):
            for dim, size in enumerate(tensor.shape if tensor is not None else ()):
                if size < 2:
                    continue
                sort = Sorted(n(3, size, seed=5), Shard(0, size, -(-size // 2)), 2)
                split = split_of(rule, side, index, sort.routed.at(dim))
                if split is not None:
                    check_split(call, split, sort, max(sample.tolerance, 1e-12))


def test_planted_faults_are_found():
    """A range has other entries in another order; so has what is not masked where it is summed."""
    sort = Sorted(n(3, 7, seed=5), Shard(0, 7, 4), 2)
    call = Sample(aten.cumsum.default, (x(7), 0)).call()
    assert split_of(rule_for(call), "in", 0, sort.routed) is None
    iota = Sample(torch.ops.prims.iota.default, (7,), dict(start=0, step=1, dtype=torch.int64,
                  device=torch.device("cpu"), requires_grad=False)).call()  # fmt: skip
    assert split_of(rule_for(iota), "out", 0, sort.routed) is None
    total = Sample(aten.sum.dim_IntList, (x(7, 3), [0])).call()
    split = split_of(rule_for(total), "in", 0, sort.routed)
    check_split(total, split, sort)
    with pytest.raises(WrongRule):
        check_split(total, dataclasses.replace(split, fills=(None,)), sort)
    with pytest.raises(WrongRule):
        check_split(total, dataclasses.replace(split, outputs=(Replicate(),)), sort)
