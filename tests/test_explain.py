"""explain: the tables say what is in the graphs, on any number of ranks and without running them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import spcompile
from spcompile import cli
from spcompile.reports import tables, traffic
from spcompile.reports.memory import Memory, measure, timeline
from spcompile.reports.report import Report

RANKS = 64
TOKENS = 1_048_576


class Layer(nn.Module):
    """One attention, linear or softmax, between projections: 2 heads of 8."""

    def __init__(self, linear: bool):
        super().__init__()
        self.linear = linear
        self.project = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.project(x).view(B, T, 3, 2, 8).permute(2, 0, 3, 1, 4)
        if self.linear:
            out = (q @ k.transpose(-2, -1)).tril() @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + out.transpose(1, 2).reshape(B, T, 16)


class Hybrid(nn.Module):
    """Two linear layers and a softmax one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(True), Layer(True), Layer(False)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.pow(2).mean()


def on_meta(module: type[nn.Module], *args: object) -> nn.Module:
    with torch.device("meta"):
        return module(*args)


@pytest.fixture(scope="module")
def hybrid() -> Report:
    x = torch.zeros(1, TOKENS, 16, device="meta")
    return spcompile.explain(on_meta(Hybrid), ranks=RANKS)(x)


def by_purpose(report: Report) -> dict[tuple[str, str, str], traffic.Collective]:
    return {(c.phase, c.op, c.purpose): c for c in report.collectives}


def test_a_million_tokens_on_64_ranks(hybrid: Report) -> None:
    assert hybrid.ranks == RANKS and len(hybrid.records) == 1 and hybrid.calls == [1]
    assert hybrid.records[0].sequence == (TOKENS, TOKENS // RANKS)
    assert [(s.kind, s.mask, s.rewritten) for s in hybrid.sites] == [
        ("linear", "causal", True),
        ("linear", "causal", True),
        ("softmax", "causal", True),
    ]
    assert "test_explain.py" in hybrid.sites[0].source and "tril()" in hybrid.sites[0].source


def test_collectives_of_each_kind_of_layer(hybrid: Report) -> None:
    found = by_purpose(hybrid)
    states = (RANKS - 1) * 2 * 8 * 8 * 4
    keys = (RANKS - 1) * (TOKENS // RANKS) * 2 * (8 + 8) * 4
    for key, count, size, grows in [
        (("forward", "all_gather", "linear: memory states"), 2, states, False),
        (("backward", "all_gather", "linear: gradients of memory states"), 2, states, False),
        (("forward", "all_gather", "softmax: keys and values"), 1, keys, True),
        (("backward", "all_gather", "softmax: keys and values"), 1, keys, True),  # gathered again
        (("backward", "reduce_scatter", "softmax: gradients of keys and values"), 1, keys, True),
    ]:
        row = found.pop(key)
        assert (row.count, row.bytes, row.grows) == (count, size, grows)
    assert sum(c.count for k, c in found.items() if "gradients" in k[2]) == 1
    assert not any(c.grows for c in found.values())


def test_formulas_give_the_measured_bytes(hybrid: Report) -> None:
    for row in hybrid.collectives:
        assert row.formula, row
        assert round(traffic._evaluated(row.formula, row.values)) == row.bytes


def test_tables_fit_and_say_what_grows(hybrid: Report) -> None:
    text = str(hybrid)
    assert max(map(len, text.splitlines())) <= 120
    assert "1,048,576 tokens, 16,384 per rank, no padding" in text
    assert re.search(r"all_gather +2 +linear: memory states .*\(P-1\) B H K V 4 +same", text)
    assert re.search(r"all_gather +1 +softmax: keys and values .*\(P-1\) b B H? ?G? ?\(K\+V\) 4 +grows", text)
    assert "LASP-2H" in text and "P = 64 (ranks)" in text
    assert re.search(r" 2 +linear +ATen chunks +Triton kernels are for NVIDIA GPUs", text)
    assert re.search(r" 1 +softmax +PyTorch's flash attention", text)


def test_memory_falls_with_the_ranks(hybrid: Report) -> None:
    each, alone = hybrid.memory, hybrid.alone
    assert each is not None and alone is not None
    inputs = TOKENS * 16 * 4
    assert alone.saved > 3 * inputs
    # Keys and values of the softmax layer are whole on each rank, and not kept; all else is a 64th.
    keys = TOKENS * 2 * (8 + 8) * 4
    assert each.saved < 1.1 * alone.saved / RANKS
    assert keys < each.forward < 2 * keys + 1.1 * alone.forward / RANKS
    parameters = 3 * (16 + 1) * 48 * 4
    assert hybrid.parameters == hybrid.trained == parameters


def test_graphs_before_and_after(hybrid: Report, tmp_path) -> None:
    assert "linear_attention.default" in hybrid.before and "all_gather" not in hybrid.before
    assert "all_gather_into_tensor" in hybrid.after
    assert "test_explain.py" in hybrid.before and ".tril() @ v" in hybrid.after
    files = hybrid.save(tmp_path / "report")
    assert sorted(f.name for f in files) == sorted(f.name for f in (tmp_path / "report").iterdir())
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert data["ranks"] == RANKS and len(data["sites"]) == 3 and data["collectives"][0]["formula"]
    assert [(k["kind"], k["count"]) for k in data["kernels"]] == [("linear", 2), ("softmax", 1)]


def test_phases_of_the_joint_graph_are_those_of_its_halves(hybrid: Report) -> None:
    record = hybrid.records[0]
    joint = [t[:5] for t in traffic.transfers(record.graphs["after"].graph, RANKS)]
    # Keys and values are the largest, and gathered in the backward once more.
    largest = max((t for t in joint if t[0] == "all_gather"), key=lambda t: t[3])
    assert sorted([*joint, (largest[0], "backward", *largest[2:])]) == sorted(t[:5] for t in record.transfers)


def test_buckets_of_many_sizes_are_one_row(hybrid: Report) -> None:
    (row,) = [c for c in hybrid.collectives if c.purpose.startswith("gradients")]
    other = replace(row, bytes=2 * row.bytes, count=3, values=row.values | {"N": 2 * row.values["N"]})
    cells = tables._merged([row, other])
    assert cells[:3] == ("all_reduce", 4, "gradients in buckets")
    assert cells[-2:] == (f"2 (P-1)/P {7 * row.values['N']} 4", "same")


class Awkward(nn.Module):
    """What a report must survive: a graph break, a buffer that is overwritten, an operator without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(False)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        x = self.layer(x)
        torch._dynamo.graph_break()
        return self.layer(x).cummax(1).values.sum()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it where a graph resumes
def test_breaks_gathers_and_nothing_disturbed() -> None:
    model = Awkward()
    x = torch.randn(1, 30, 16)
    compiled = torch.compile(model, backend="eager")
    expected = compiled(x)
    model.steps.zero_()
    entries = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seed = torch.get_rng_state()
    report = spcompile.explain(compiled, ranks=4)(x)
    assert len(report.records) == 2 and sum(report.breaks.values()) == 1
    assert any("cummax" in g.op for g in report.gathers)
    assert "cummax" in str(report) and "graph break" in str(report)
    assert any("computed whole" in c.purpose for c in report.collectives)
    # The buffer, the gradients, the random state and the user's compiled code are as they were.
    assert model.steps.item() == 0 and all(p.grad is None for p in model.parameters())
    assert torch.equal(seed, torch.get_rng_state())
    after = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(compiled(x), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == after > entries


def test_inference_and_a_length_that_the_ranks_do_not_divide() -> None:
    with torch.no_grad():
        layer, x = on_meta(Layer, True), torch.zeros(2, 1001, 16, device="meta")
        report = spcompile.explain(layer, ranks=8, outputs="whole")(x)
        parts = spcompile.explain(layer, ranks=8)(x)
    assert not [c for c in parts.collectives if c.purpose == "output"]
    assert report.records[0].sequence == (1001, 126)
    assert "7 positions of padding" in str(report)
    assert {c.phase for c in report.collectives} == {"forward"}
    assert report.memory is not None and report.memory.backward == 0
    outputs = [c for c in report.collectives if c.purpose == "output"]
    assert [c.bytes for c in outputs] == [7 * 2 * 126 * 16 * 4] and outputs[0].grows


def test_checkpointing_and_one_rank() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer(True)

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False).sum()

    model, x = on_meta(Checkpointed), torch.zeros(1, 4096, 16, device="meta")
    report = spcompile.explain(model, ranks=4)(x)
    assert [s.kind for s in report.sites] == ["linear"]
    alone = spcompile.explain(model)(x)
    assert alone.ranks == 1 and not alone.collectives
    assert "collectives" not in str(alone) and alone.memory == alone.alone


def test_liveness_of_a_small_graph() -> None:
    def f(x: Tensor) -> Tensor:
        a = x.exp()  # 400 bytes, alive until b is made
        b = a.t() * 2  # 400 more; the view costs nothing
        return b.sum()  # 4

    graph = make_fx(f, tracing_mode="fake")(torch.zeros(10, 10)).graph
    assert measure(graph) == Memory(forward=800)


def test_timeline_runs_the_backwards_in_the_opposite_order() -> None:
    first, second = Memory(saved=10, forward=15, backward=12), Memory(saved=5, forward=6, backward=20)
    assert timeline([first, second]) == Memory(saved=15, forward=16, backward=30)


# ------------------------------------------------------------------------------------------------------ cli


def test_command(capsys, tmp_path) -> None:
    command = ["explain", "models.linear_llama3:tiny", "layers=1", "--pattern", "L", "--ranks", "64"]
    assert cli.main([*command, "--seq", str(TOKENS), "--inference", "--save", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "1,048,576 tokens, 16,384 per rank" in text and "linear: memory states" in text
    assert (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["models.linear_llama3"], "module:factory"),
        (["no_such_module:tiny"], "no module 'no_such_module'"),
        (["models.linear_llama3:huge"], "it has tiny, 1b, 8b"),
        (["models.linear_llama3:tiny", "depth=3"], "unexpected keyword argument 'depth'"),
        (["models.linear_llama3:tiny", "--pattern", "LX"], "pattern must be"),
        (["models.linear_llama3:tiny", "--option", "lineer=ring"], "did you mean 'linear'"),
        (["models.linear_llama3:math"], "not a callable"),
        (["models.linear_llama3:tiny", "--dry"], "needs a value"),
    ],
)
def test_bad_commands(capsys, words: list[str], message: str) -> None:
    assert cli.main(["explain", *words]) == 2
    assert message in capsys.readouterr().err


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and spcompile.__version__ in capsys.readouterr().out
