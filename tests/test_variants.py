"""The linear family: each model of models/, pure and hybrid, on simulated ranks equals unsharded eager."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from torch import fx

import models
from spcompile.attention.variants import VARIANTS as TABLE
from spcompile.reports.traffic import rows, transfers
from tests.proof import Eager, Joint, capture, eager
from tests.releases import each_change

SHAPE = {"vocab": 20, "hidden": 8, "heads": 2, "kv_heads": 1, "mlp": 12}
VARIANTS = [
    *("retention", "lightning", "simple_gla", "mamba2", "gla", "hgrn2"),
    *("rwkv6", "deltanet", "gated_deltanet", "kda", "based", "rebased"),
]
LENGTH = 7  # no multiple of the ranks
# Of each kind of memory state one is looked at for each change, the others for a release.
KINDS = ("linear_llama3", "gla", "gated_deltanet", "kda")
TWO = KINDS[::2]
DELTA_OR_DIAGONAL = [n for n, row in TABLE.items() if row.delta or row.decay == "diagonal"]


@functools.lru_cache(maxsize=1)
def case(name: str, pattern: str) -> tuple[Eager, Joint]:
    torch.manual_seed(0)
    model = models.get(f"{name}:tiny", **SHAPE, pattern=pattern, layers=len(pattern))().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)  # so that every part matters
    inputs = model.example_inputs(seq=LENGTH, batch=2)
    return eager(model, inputs), capture(model, inputs)


@pytest.mark.parametrize(
    ("pattern", "ranks"),
    [("LN", 3), *(pytest.param(*how, marks=pytest.mark.sweep) for how in (("LN", 2), ("L", 2), ("L", 3)))],
)
@pytest.mark.parametrize("name", each_change(VARIANTS, KINDS[1:]))
def test_a_variant_is_eager(name: str, pattern: str, ranks: int) -> None:
    expected, joint = case(name, pattern)
    kinds = {"L": "linear", "N": "softmax"}
    found = [s.kind for s in joint.sites if s.rewritten and s.kind != "loop"]
    assert found == [kinds[p] for p in pattern]
    assert expected.error(*joint.run(ranks, nan_padding=True)) <= 1e-9


@pytest.mark.parametrize("name", each_change(VARIANTS, ["gated_deltanet"]))
def test_what_crosses_ranks(name: str) -> None:
    """One all-gather of summaries each way per layer, by the formula; besides it halos, losses, gradients.

    ``grows`` is False where the formula gives the bytes that are sent and has no length in it.
    """
    torch.manual_seed(0)
    model = models.get(f"{name}:tiny", **SHAPE, pattern="L", layers=1)()
    module, _ = capture(model, model.example_inputs(seq=16, batch=2)).shard(4)
    crossing = rows((t, 1) for t in transfers(module.graph, 4))
    states = [c for c in crossing if c.purpose.startswith("linear")]
    row = TABLE[name]
    sent = "(K V+K K)" if row.delta else "(K V+D)" if row.decay in ("scalar", "diagonal") else "K V"
    expected = ("all_gather", 1, f"(P-1) B H {sent} w", False)
    assert [(c.op, c.count, c.formula, c.grows) for c in states] == [expected] * 2
    assert [c.phase for c in states] == ["forward", "backward"]
    for c in crossing:
        assert c in states or c.op == "all_reduce" or c.purpose.startswith("halo of"), c


_PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "addmm", "baddbmm")}
_KEEPS_ZERO = {
    *("alias", "expand", "view", "_unsafe_view", "reshape", "permute", "unsqueeze", "slice", "select"),
    *("clone", "mul", "neg", "_to_copy"),
}


def zeros(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that are zero whatever the inputs are."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        name = getattr(node.target, "_opname", "")
        made = name in ("zeros", "zeros_like", "new_zeros") or (
            name in ("full", "full_like", "new_full") and node.args[1 if name != "new_full" else 2] == 0
        )
        if made or (name in _KEEPS_ZERO and any(x in found for x in node.all_input_nodes)):
            found.add(node)
    return found


@pytest.mark.parametrize("name", each_change(["linear_llama3", *VARIANTS], TWO))
def test_no_product_is_one_with_zeros(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What several ranks compute is what one does, and for the delta rules the matrix that they send.

    Where chunks are traced into the graph, as on GPUs without Triton's kernels; on CPUs they are operators.
    """
    monkeypatch.setattr("spcompile.kernels.linear.kernel.is_opaque", lambda device: False)
    torch.manual_seed(0)
    model = models.get(f"{name}:tiny", **SHAPE, pattern="L", layers=1)()
    joint = capture(model, model.example_inputs(seq=16, batch=2))
    graphs = [joint.shard(ranks)[0].graph for ranks in (1, 4)]
    products = [[n for n in graph.nodes if n.target in _PRODUCTS] for graph in graphs]
    for graph, found in zip(graphs, products, strict=True):
        nothing = zeros(graph)
        assert not [n for n in found if any(x in nothing for x in n.all_input_nodes)]
    alone, one_of_four = map(len, products)
    assert one_of_four <= alone + (12 if TABLE[name].delta else 0)


@pytest.mark.parametrize("name", each_change(DELTA_OR_DIAGONAL, KINDS[1:3]))
def test_a_layer_is_the_same_few_operators(name: str) -> None:
    """On CPUs, of a delta rule or decays per key: no product of a chunk is Inductor's to compile.

    Several ranks call what one does, and the total that they exchange; what a chunk does by itself is between
    the start and the wait.
    """
    torch.manual_seed(0)
    model = models.get(f"{name}:tiny", **SHAPE, pattern="L", layers=1)()
    joint = capture(model, model.example_inputs(seq=16, batch=2))
    order = [
        [getattr(n.target, "_opname", "") for n in joint.shard(ranks)[0].graph.nodes] for ranks in (1, 4)
    ]
    alone, together = (Counter(x for x in names if x.startswith("chunk_")) for names in order)
    assert together - alone == Counter({"chunk_total": 2}) and not alone - together
    names = order[1]
    for total in (i for i, x in enumerate(names) if x == "chunk_total"):
        start = names.index("all_gather_into_tensor", total)
        hidden = names[start : names.index("wait_tensor", start)]
        assert {"chunk_within", "chunk_within_backward"} & set(hidden)
