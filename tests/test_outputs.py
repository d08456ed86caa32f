"""What is returned is not gathered before it is used: simulated ranks, sharded tensors alone, real ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import spcompile
from spcompile import _torch
from spcompile.collectives import Group
from spcompile.config import Config
from spcompile.errors import SpcompileError
from spcompile.passes.shard import shard_joint_graph
from spcompile.placement import Shard
from spcompile.ports import Layout
from spcompile.sharded import Part, ShardedTensor, own_strides
from spcompile.simulate import simulated
from tests.outputs_worker import LM, LOSSES, gradients, seeded, tokens, worst
from tests.proof import relative_error
from tests.real_ranks import run_ranks

WORKER = "tests.outputs_worker"


# --------------------------------------------------------------------------------------- simulated ranks


@pytest.mark.parametrize(("ranks", "length"), [(2, 13), (3, 12), (4, 3)])
def test_outputs_and_their_gradients_are_eager(ranks: int, length: int) -> None:
    net, ids = seeded(LM), tokens(length)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=simulated(ranks, nan_padding=True))
    for loss in LOSSES.values():
        expected = gradients(net, lambda loss=loss: loss(net(ids, ids)))
        assert worst(gradients(net, lambda loss=loss: loss(compiled(ids, ids))), expected) <= 1e-9
    for found, expected_output in zip(compiled(ids, ids), net(ids, ids), strict=True):
        assert found.requires_grad == expected_output.requires_grad
        assert relative_error(found.detach() + 0, expected_output.detach()) <= 1e-9


def test_one_graph_gives_parts_of_many_lengths() -> None:
    net = seeded(LM)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=simulated(2, nan_padding=True))
    _torch.counters.clear()
    for length in (13, 9, 17, 5):
        ids = tokens(length)
        expected = gradients(net, lambda ids=ids: LOSSES["both"](net(ids, ids)))
        found = gradients(net, lambda ids=ids: LOSSES["both"](compiled(ids, ids)))
        assert worst(found, expected) <= 1e-9, length
    assert _torch.counters["stats"]["unique_graphs"] == 2


def test_explain_counts_no_gather_of_what_is_returned() -> None:
    net, ids = seeded(LM), tokens(64)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            report = spcompile.explain(net, ranks=4)(ids, ids)
            at_once = spcompile.explain(net, ranks=4, outputs="whole")(ids, ids)
        gathered = [c for c in report.collectives if c.op == "all_gather" and c.purpose == "output"]
        assert not gathered and any(c.purpose == "output" for c in at_once.collectives)


# ----------------------------------------------------------------------------- a sharded tensor by itself


@pytest.mark.timeout(200)
def test_a_plan_of_a_million_tokens() -> None:
    """What a vocabulary of 128,256 takes is divided by the ranks; the plan itself holds none of it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2**20,
    )
    model, ids = transformers.LlamaForCausalLM(config), torch.zeros(1, 2**20, dtype=torch.long)
    report = spcompile.explain(model, ranks=64)(ids, labels=ids)
    assert report.alone is not None and report.memory is not None
    assert report.alone.backward > 60 * report.memory.backward
    # Keys and values, the loss, and gradients of parameters: nothing of T times the vocabulary.
    weights = 4 * sum(p.numel() for p in model.parameters())
    for row in report.collectives:
        assert "keys and values" in row.purpose or row.bytes <= 2 * weights, row
    with torch.no_grad():
        report = spcompile.explain(model, ranks=8, outputs="sharded")(ids)
    assert report.alone is not None and report.memory is not None
    assert report.alone.forward > 7.9 * report.memory.forward
    assert ["keys and values" in row.purpose for row in report.collectives] == [True]


def one_rank(x: Tensor, aliased: bool = False) -> ShardedTensor:
    """A tensor of which one rank holds all, with a position of padding."""
    part = torch.cat([x, x[:, -1:]], 1)
    layout = Layout(Shard(1, x.shape[1], x.shape[1] + 1), tuple(x.shape), x.stride(), Group(1, ""))
    return ShardedTensor(Part(part, layout, aliased))


def test_metadata_is_not_read() -> None:
    x = torch.randn(2, 5, 3)
    sharded = one_rank(x)
    assert isinstance(sharded, Tensor) and sharded.shape == x.shape and sharded.stride() == x.stride()
    assert not sharded.detach().requires_grad and len(sharded) == 2 and sharded.numel() == 30
    assert sharded._part.whole is None


def test_any_operator_reads() -> None:
    x = torch.randn(2, 5, 3)
    sharded = one_rank(x)
    assert torch.equal(sharded[:, 1], x[:, 1]) and type(sharded + 1) is Tensor
    assert sharded.tolist() == x.tolist() and repr(sharded) == repr(x)
    assert (sharded.numpy() == x.numpy()).all() and torch.equal(copy.deepcopy(sharded), x)
    assert [row.tolist() for row in sharded] == x.tolist()


def test_a_write_is_seen_by_its_aliases() -> None:
    x = torch.randn(2, 5, 3)
    sharded = one_rank(x)
    other = sharded.detach()
    other.add_(1)
    assert torch.equal(sharded + 0, x + 1) and torch.equal(sharded.local_part()[:, :5], x + 1)
    with pytest.raises(spcompile.SpcompileError, match="shares its memory"):
        one_rank(x, aliased=True).add_(1)


def test_equal_layouts_add_without_reading() -> None:
    x, y = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    a, b = one_rank(x), one_rank(y)
    total = a + b
    assert isinstance(total, ShardedTensor) and a._part.whole is None
    assert torch.equal(total + 0, x + y)


def test_own_strides_keep_gaps_and_refuse_overlaps() -> None:
    x = torch.zeros(4, 6, 2)
    for view in (x, x.transpose(0, 1), x[:, 1:], x[:, ::2, :1]):
        assert own_strides(tuple(view.shape), view.stride()) == view.stride()
    assert own_strides((4, 6), (0, 1)) == (6, 1)


# ------------------------------------------------------------------------------------------- real ranks


def small(result: dict[str, Any]) -> bool:
    return all(error <= 1e-9 for error in result["errors"].values())


@pytest.mark.slow
def test_parts_are_eager_to_whoever_reads_them() -> None:
    for result in run_ranks("parts", 2, worker=WORKER):
        assert small(result), result


@pytest.mark.slow
def test_nothing_is_gathered_between_compiled_modules() -> None:
    for result in run_ranks("between", 2, worker=WORKER):
        graphs = {"graphs of blocks": 4, "graphs of break": 4}  # whole tokens in or parts, one length or many
        assert small(result) and result["reads"] == {"blocks": 1, "break": 0} | graphs, result


@pytest.mark.sweep
def test_nothing_is_gathered_between_the_blocks_of_a_hugging_face_llama() -> None:
    """What leaves the last compiled module is read, once; between the blocks, and backwards, nothing is."""
    for result in run_ranks("llama_blocks", 3, worker=WORKER):
        assert small(result) and result["reads"] == {"blocks": [[2, 13, 64]], "all": [[2, 13, 64]]}, result


@pytest.mark.slow
def test_ranks_pass_their_own_tokens_and_get_their_own_logits() -> None:
    for result in run_ranks("given", 3, worker=WORKER):
        assert small(result | {"errors": result["errors"] | {"reads": 0}}), result
        assert result["errors"]["reads"] == 0
        assert "equally many tokens" in result["uneven"] and "Remedy" in result["uneven"]
        assert "inputs='sharded'" in result["global"] and "spcompile.shard" in result["global"]


@pytest.mark.slow
def test_outputs_as_dtensors() -> None:
    for result in run_ranks("as_dtensors", 2, worker=WORKER):
        assert small(result), result
        assert "ranks have 7 of the 10 entries of dim 1" in result["cut"] and "Remedy" in result["cut"]
        assert "merges the sequence" in result["flat"] and "Remedy" in result["flat"]
        assert "not of the ranks along the sequence" in result["mesh"] and "Remedy" in result["mesh"]


def test_a_dtensor_needs_ranks() -> None:
    with pytest.raises(SpcompileError, match="init_process_group"):
        spcompile.dtensor(torch.ones(3))


def test_one_rank_that_reads_alone_is_an_error_on_every_rank() -> None:
    for result in run_ranks("one_reads", 2, worker=WORKER):
        assert "ranks [0] read a sharded tensor" in result["error"] and "Remedy" in result["error"]


@pytest.mark.slow
def test_outputs_through_inductor() -> None:
    for result in run_ranks("through_inductor", 2, worker=WORKER):
        assert small(result), result


class _Slice(torch.nn.Module):
    """Returns every second of what has the tokens' dim but is whole on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 8, dtype=torch.float64)
        self.head = torch.nn.Linear(8, 10, dtype=torch.float64)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and a view that leaves gaps."""
        x = torch.fft.fft(self.embedding(ids), dim=1).real
        both = self.head(torch.stack([x, x.cos()], 1))
        return both[:, 1].logsumexp(-1).mean(), both[:, 0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_slice_that_is_whole(ranks: int) -> None:
    """A port returns a copy, which lies closer than eager's view: that is no wrong graph."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    net, ids = _Slice(), torch.randint(11, (2, 13), generator=torch.Generator().manual_seed(1))

    def step(run: Any) -> tuple[Tensor, ...]:
        loss, out = run(ids)
        return loss, out + 0, *torch.autograd.grad(loss + out.sin().sum(), list(net.parameters()))

    compiled = torch.compile(net, backend=simulated(ranks, nan_padding=True))
    for found, expected in zip(step(compiled), step(net), strict=True):
        assert relative_error(found.detach(), expected.detach()) <= 1e-9


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_graph_without_a_tensor(ranks: int) -> None:
    """Graph breaks may leave such (BigBird's do): there is nothing to shard."""
    graph = torch.fx.Graph()
    graph.output(())
    sharded = shard_joint_graph(graph, Group(ranks, "simulated"), Config())
    assert not sharded.gathers and [n.op for n in graph.nodes] == ["output"]
