"""The rule table is proved by brute force, and the proof catches rules that are wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rule_checker import Sample, WrongRule, check_allowed, check_linear, cut, forbidden_but_right, run_ranks
from rule_refusals import CONSERVATIVE
from rule_samples import EMPTY, POINTWISE, RANDOM, ROUTED, SAMPLES, flags, n, x
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spcompile import _torch, collectives, simulate
from spcompile.config import Config
from spcompile.emit import Emitter
from spcompile.passes.shard.context import GraphContext
from spcompile.placement import Partial, Replicate, Shard, local_shape
from spcompile.rules import RULES, Call, Context, Factors, Split, kernels, reductions, rule_for, views
from spcompile.rules.base import along, parse
from spcompile.rules.halo import halo

aten, prims = torch.ops.aten, torch.ops.prims
pytestmark = pytest.mark.filterwarnings(
    "ignore:The reduce argument of torch.scatter", "ignore:torch.searchsorted"
)

every_sample = pytest.mark.parametrize("sample", [*SAMPLES, *POINTWISE], ids=str)


# ------------------------------------------------------------------------------------------------ the table


@every_sample
def test_what_a_rule_allows_is_right(sample):
    allowed = check_allowed(sample)
    call = sample.call()
    whole_only = not any(s.op is sample.op and _allows(s) for s in SAMPLES)
    assert allowed or not whole_only or sample in POINTWISE, (
        f"{call.op}: its rule allows nothing in any sample"
    )


def _allows(sample: Sample) -> bool:
    call = sample.call()
    rule = rule_for(call)
    tensors = [("in", i, t) for i, t in enumerate(call.operands)] + [
        ("out", i, t) for i, t in enumerate(call.outputs) if t is not None
    ]
    return any(
        rule.split(s, i, Shard(d, t.shape[d], t.shape[d])) for s, i, t in tensors for d in range(t.dim())
    )


@every_sample
def test_what_a_rule_calls_linear_is(sample):
    check_linear(sample)


@every_sample
def test_what_a_rule_forbids_is_wrong(sample):
    right = forbidden_but_right(sample)
    listed = {key[1:] for key in CONSERVATIVE if key[0] == str(sample)}
    assert not set(right) - listed, f"refused though right: {right}"
    assert not listed - set(right), "listed as conservative, but stale"


def test_conservative_entries_name_samples():
    assert {key[0] for key in CONSERVATIVE} <= {str(s) for s in SAMPLES}
    assert len({str(s) for s in SAMPLES}) == len(SAMPLES), "two samples have one name"


def _without_sample(table) -> set[str]:
    return {str(op) for op in table} - {str(s.op) for s in (*SAMPLES, *RANDOM, *EMPTY, *ROUTED)}


def test_every_key_has_a_sample():
    assert not _without_sample(RULES)


def test_a_key_without_a_sample_fails():
    assert _without_sample({**RULES, aten.kthvalue.default: reductions.rowwise}) == {"aten.kthvalue.default"}


def test_a_pointwise_operator_passes_everything():
    assert len({s.op for s in POINTWISE}) >= 60
    for sample in POINTWISE:
        call = sample.call()
        (out,) = call.outputs
        rule = rule_for(call)
        assert all(rule.split("out", 0, Shard(d, out.shape[d], 2)) is not None for d in range(out.dim())), (
            sample
        )


# -------------------------------------------------------------------------------------- planted wrong rules


def _rule(spelling, **changes):
    return lambda call: dataclasses.replace(parse(spelling, call), **changes)


def _of(make, **changes):
    return lambda call: dataclasses.replace(make(call), **changes)


class _Moved:
    """A right rule whose output is said to be ``by`` positions off."""

    linear = ()

    def __init__(self, rule, by):
        self.rule, self.by = rule, by

    def split(self, side, index, shard):
        split = self.rule.split(side, index, shard)
        if split is None or split.inputs[0] == split.outputs[0]:
            return split
        if side == "in":
            out = split.outputs[0]
            return dataclasses.replace(split, outputs=(out.window(out.start + self.by, out.length),))
        first = split.inputs[0]
        return dataclasses.replace(split, inputs=(first.window(first.start + self.by, first.length),))


class _Counted:
    """A sum into x, in which every rank has all of x."""

    linear = ()

    def __init__(self, call):
        self.rule = rule_for(call)

    def split(self, side, index, shard):
        split = self.rule.split(side, index, shard)
        if split is None or not isinstance(split.outputs[0], Partial):
            return split
        return dataclasses.replace(split, inputs=(Replicate(), *split.inputs[1:]))


class _WrongReshape(views.Reshape):
    def split(self, side, index, shard):
        split = super().split(side, index, shard)
        if split is None or side != "in":
            return split
        out = split.outputs[0]
        return dataclasses.replace(
            split, outputs=(dataclasses.replace(out, outer=1, length=out.outer * out.length),)
        )


def _plain_iota(call):
    def emit(split):
        (shard,) = split.outputs

        def values(context: Context, operands: list[Tensor]) -> Tensor:
            index = context.clamped_index(shard, torch.device("cpu"))
            return (3 - 2 * index.expand(shard.outer, -1)).reshape(-1)

        return values

    return Factors(call, (), (("d0",),), emit=emit)


def _local_cumsum(call):
    def split(side, index, shard):
        return Split((shard,), (shard,), (0.0,), lambda context, operands: call.run(operands))

    rule = along(call, set())
    rule.split = split
    return rule


def _first_rows(call):
    return dataclasses.replace(kernels.flash_attention(call), emit=None)


def _scattered_terms(call):
    rule = rule_for(call)
    return dataclasses.replace(rule.factors, reduce="sum")


def _convolution(left: int, fill: float | None = 0.0):
    """The rule of a causal convolution with another halo, or other padding."""

    def make(call):
        rule, split = rule_for(call), rule_for(call).split

        def changed(side, index, shard):
            found = split(side, index, shard)
            if found is None or shard.dim != 2:
                return found
            return dataclasses.replace(found, fills=(fill, *found.fills[1:]), emit=rule._emit(left, 2 - left))

        rule.split = changed
        return rule

    return make


def _gradient_of_all(call):
    """The gradient of the bias sums the halo too."""
    rule, emit = rule_for(call), rule_for(call)._emit

    def wrong(left, right):
        def run(context, operands):
            around = halo(context, operands[0], 2, right, left, 0.0)
            return *emit(left, right)(context, operands)[:2], around.sum([0, 2])

        return run

    rule._emit = wrong
    return rule


_of_two_tokens = next(s for s in SAMPLES if str(s) == f"{aten.convolution.default} (of two tokens)")
_causal, _causal_backward = (
    next(s for s in SAMPLES if str(s) == f"{op} (causal)")
    for op in (aten.convolution.default, aten.convolution_backward.default)
)
_flash = next(s for s in SAMPLES if str(s) == f"{kernels.flash_attention_cpu} (causal)")
_iota = Sample(
    prims.iota.default,
    (12,),
    dict(start=3, step=-2, dtype=torch.int64, device=torch.device("cpu"), requires_grad=False),
)
_mm = Sample(aten.mm.default, (x(6, 5), x(5, 7)))
_gather = Sample(aten.gather.default, (x(4, 6), 1, n(6, 4, 6)))


def _unread(call):
    """A convolution behind another one: it reads the nearest entries of its halo, and not the farthest."""
    rule, emit = rule_for(call), rule_for(call)._emit
    rule._emit = lambda left, right, unread=0: emit(left - unread, right)
    return rule


PLANTED = {
    "softmax along its own dim": (
        Sample(aten._softmax.default, (x(4, 6), 1, False)),
        lambda c: along(c, set()),
    ),
    "sort along its own dim": (Sample(aten.sort.default, (x(4, 6), 1)), lambda c: along(c, set())),
    "mm: k passes": (Sample(aten.mm.default, (x(6, 5), x(5, 5))), _rule("m n, k n -> m n")),
    "mm: k by maximum": (_mm, _rule("m k, k n -> m n", reduce="max", fill=0.0)),
    "mm: padding is not zero": (_mm, _rule("m k, k n -> m n", fill=1.0)),
    "addmm: k is summed": (Sample(aten.addmm.default, (x(7), x(6, 5), x(5, 7))), _rule("n, m k, k n -> m n")),
    "cumsum passes": (Sample(aten.cumsum.default, (x(4, 6), 1), exchanges=True), lambda c: along(c, set())),
    "cumsum without a carry": (Sample(aten.cumsum.default, (x(7), 0), exchanges=True), _local_cumsum),
    "gather: the indexed dim passes": (_gather, _rule("a b, a b -> a b")),
    "embedding: the table's rows pass": (
        Sample(aten.embedding.default, (x(6, 4), n(6, 6))),
        _rule("v d, v -> v d"),
    ),
    "mean of means": (Sample(aten.mean.dim, (x(4, 7), [1])), reductions.reduction),
    "amax by sum": (
        Sample(aten.amax.default, (x(4, 6), [1])),
        _of(reductions.reduction, reduce="sum", fill=0.0),
    ),
    "amax of negatives, padded by zero": (
        Sample(aten.amax.default, (-x(4, 7).abs(), [1])),
        _of(reductions.reduction, fill=0.0),
    ),
    "any by min": (Sample(aten.any.dim, (flags(4, 6), 1)), _of(reductions.reduction, reduce="min")),
    "slice without its shift": (
        Sample(aten.slice.Tensor, (x(4, 8), 1, 2, 7)),
        lambda c: _Moved(views.window(c), -2),
    ),
    "pad on the wrong side": (
        Sample(aten.constant_pad_nd.default, (x(4, 6), [1, 0])),
        lambda c: _Moved(views.pad(c), 1),
    ),
    "expand to the global size": (
        Sample(aten.expand.default, (x(1, 5), [6, 5])),
        _of(views.expand, emit=None),
    ),
    "view that forgets what it merged": (
        Sample(aten.view.default, (x(4, 6, 5), [24, 5])),
        _WrongReshape,
    ),
    "permute to another order": (
        Sample(aten.permute.default, (x(6, 6, 6), [1, 2, 0])),
        _rule("a b c -> c a b"),
    ),
    "index_put: x counts on every rank": (
        Sample(aten.index_put.default, (x(7, 4), [n(7, 6)], x(6, 4), True)),
        _Counted,
    ),
    "index_put: padding is added": (
        Sample(aten.index_put.default, (x(7, 4), [n(7, 5)], x(4), True)),
        _scattered_terms,
    ),
    "iota: merged dims": (_iota, _plain_iota),
    "convolution: the halo on the other side": (_causal, _convolution(0)),
    "convolution: a halo too short": (_causal, _convolution(1)),
    "convolution: behind another one, a halo too near": (_of_two_tokens, _unread),
    "convolution: padding is not zero": (_causal, _convolution(2, None)),
    "convolution: a token counts on two ranks": (_causal_backward, _gradient_of_all),
    "one entry on every rank": (
        Sample(aten.select.int, (x(6, 5), 0, 3)),
        lambda c: Factors(c, (("a", "b"),), (("b",),)),
    ),
    "causal rows taken for the first": (_flash, _first_rows),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_wrong_rule_is_caught(name):
    sample, make = PLANTED[name]
    assert check_allowed(dataclasses.replace(sample)) is not None, "the true rule passes"
    with pytest.raises((WrongRule, RuntimeError, IndexError)):
        check_allowed(sample, make)


@pytest.mark.parametrize(
    "sample",
    [
        Sample(aten.exp.default, (x(4, 6),)),
        Sample(aten.add.Tensor, (x(4, 6), 3.0)),
        Sample(aten.relu.default, (x(4, 6),)),
    ],
    ids=str,
)
def test_a_planted_linear_claim_is_caught(sample):
    check_linear(sample)
    with pytest.raises(WrongRule, match="not linear"):
        check_linear(sample, lambda call: dataclasses.replace(rule_for(call), linear=(frozenset({0}),)))


def test_product_of_two_is_not_jointly_linear():
    with pytest.raises(WrongRule, match="not linear"):
        check_linear(
            Sample(aten.mul.Tensor, (x(4, 6), x(6))),
            lambda call: dataclasses.replace(rule_for(call), linear=(frozenset({0, 1}),)),
        )


def test_a_rule_that_refuses_too_much_is_caught():
    assert forbidden_but_right(_mm, _rule("m k, k n -> m n; whole n")) == {
        (1, 1): "cutting dims (None, 1), outputs by ['cat 1']"
    }


# -------------------------------------------------------------------------------------------- what is drawn


def _drawn(sample: Sample, shard: Shard | None, ranks: int) -> list[Tensor]:
    """Each rank's draw, as the compiled graph makes it."""
    call = Call(sample.op, sample.args, sample.kwargs, sample.op(*sample.args, **sample.kwargs))
    rule = rule_for(call)
    graph, fake_mode = fx.Graph(), FakeTensorMode()
    emitter = Emitter(graph, fake_mode, _torch.select_decomp_table())
    context = GraphContext(collectives.Group(ranks, "drawn"), emitter, Config())
    emit = rule.whole_emit() if shard is None else rule.split("out", 0, shard).emit
    graph.output(
        [emitter.node_of(emitter.run(emit, context, [])), emitter.node_of(emitter.run(emit, context, []))]
    )
    first, second = simulate._Ranks(fx.GraphModule(nn.Module(), graph), ranks).run()
    assert not torch.equal(first[0], second[0]), "two draws of one graph are alike"
    return list(first)


@pytest.mark.parametrize("sample", RANDOM, ids=str)
def test_shards_draw_different_numbers_and_whole_tensors_the_same(sample):
    shard = Shard(1, 6, 2)
    torch.manual_seed(3)
    mine = _drawn(sample, shard, 3)
    assert len({tuple(t.flatten().tolist()) for t in mine}) == 3 and mine[0].shape == (4, 2)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(mine, _drawn(sample, shard, 3))), "a seed repeats itself"
    whole = _drawn(sample, None, 3)
    assert whole[0].shape == (4, 6) and all(torch.equal(whole[0], t) for t in whole)


@pytest.mark.parametrize("sample", RANDOM, ids=str)
def test_drawn_numbers_have_their_distribution(sample):
    large = dataclasses.replace(sample, args=([300, 300],))
    torch.manual_seed(0)
    values = torch.cat(_drawn(large, Shard(0, 300, 100), 3)).double()
    mean, std = (0.5, 12**-0.5) if sample.op is aten.rand.default else (0.0, 1.0)
    assert abs(values.mean() - mean) < 0.02 and abs(values.std() - std) < 0.02


@pytest.mark.parametrize("sample", EMPTY, ids=str)
def test_empty_memory_has_its_shape_and_type(sample):
    call = sample.call()
    (whole,) = call.operands
    for dim in range(2):
        shard = Shard(dim, whole.shape[dim], 4, 1)
        split = rule_for(call).split("out", 0, shard)
        (out,) = run_ranks(split, [[cut(whole, split.inputs[0], r) for r in range(3)]], 3, exchanges=False)
        assert all(t.shape == local_shape(whole.shape, shard) and t.dtype == whole.dtype for t in out)


# ------------------------------------------------------------------------------------------ in whole graphs


class _Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.table, self.body = nn.Embedding(11, 6), body

    def forward(self, ids):
        return self.body(self.table(ids))


def _shifted_sum(h):
    return nn.functional.pad(h.sin(), (0, 0, 1, 0)).cos().sum(1)  # one entry more than the ranks' blocks hold


IN_GRAPHS = {
    "pad, then sum": _shifted_sum,
    "any and all": lambda h: h * (h.cos() > 0.9).any(1, keepdim=True) + (h.cos() > -0.9).all(1, keepdim=True),
    "maximum of integers": lambda h: h * (h * 7).int().amax(1, keepdim=True),
    "cumsum": lambda h: h.sin().cumsum(1).cos(),
    "one range, viewed": lambda h: h * torch.arange(h.shape[0] * h.shape[1]).view(h.shape[0], -1, 1),
    "scatter_add": lambda h: torch.zeros(h.shape[0], 4, 6).scatter_add(1, (h * 9).int().abs().long() % 4, h),
    "attention": lambda h: nn.functional.scaled_dot_product_attention(*[h.unsqueeze(1)] * 3, is_causal=True),
    "bidirectional attention": lambda h: nn.functional.scaled_dot_product_attention(*[h.unsqueeze(1)] * 3),
}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", IN_GRAPHS)
def test_rules_in_whole_graphs(name, ranks):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, ids = _Net(IN_GRAPHS[name]), n(11, 2, 8)
    results = []
    for run in (
        net,
        torch.compile(net, backend=simulate.simulated(ranks, recognize=False, nan_padding=True)),
    ):
        net.zero_grad()
        out = run(ids)
        out.sin().sum().backward()
        results.append((out.detach().double(), net.table.weight.grad.double()))
    for got, want in zip(results[1], results[0]):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_what_is_drawn_without_a_rule_is_the_same_on_all_ranks():
    """The simulated ranks share a generator, so each would draw other integers."""
    torch._dynamo.reset()
    net = _Net(lambda h: h + torch.randint(2, 900, (2, 8, 6)))
    out = torch.compile(net, backend=simulate.simulated(3, recognize=False))(n(11, 2, 8))
    drawn = (out - net.table(n(11, 2, 8))).round()
    assert (drawn >= 1).all() and (drawn < 901).all() and len(drawn.unique()) > 20
