"""What ways across the ranks cost: the bytes are those that are counted, and what follows from them."""

from __future__ import annotations

import pytest
import torch

import models
import spcompile
from spcompile.costs import MACHINES, Machine, Sizes, predicted, received, ways
from spcompile.strategies import LINEAR, SOFTMAX

CASES = [
    *(("linear", "linear_llama3", name) for name in LINEAR),
    *(("linear", "gla", name) for name in LINEAR),
    *(("softmax", "linear_llama3", name) for name in SOFTMAX),
]


@pytest.mark.parametrize(("kind", "model", "way"), CASES)
def test_bytes_are_those_counted(kind: str, model: str, way: str) -> None:
    """In the graphs as they are run, of three or two ranks; keys that were gathered are gathered again."""
    torch.manual_seed(0)
    shape = {"vocab": 20, "hidden": 16, "heads": 4, "kv_heads": 2, "mlp": 12}
    net = models.get(f"{model}:tiny", **shape, pattern="L" if kind == "linear" else "N", layers=1)()
    ranks = 3 if kind == "linear" else 2
    report = spcompile.explain(net, ranks=ranks, regather=True, **{kind: way})(**net.example_inputs(seq=24))
    (found,) = report.ways
    assert (found.kind, found.count, found.sizes.P, found.sizes.b) == (kind, 1, ranks, 24 // ranks)
    counted = dict.fromkeys(("forward", "backward"), 0)
    for row in report.collectives:
        if (
            row.purpose.startswith(kind) and row.op != "all_reduce"
        ):  # of the last state, where one asks for it
            counted[row.phase] += row.count * row.bytes
    rows = LINEAR if kind == "linear" else SOFTMAX
    assert received(rows[way], found.sizes) == tuple(counted.values())
    assert all(f"{name} " in str(report) for name in rows) and "ways across the ranks" in str(report)
    assert report.to_dict()["ways"][0]["sizes"]["P"] == ranks


def test_more_ranks_take_a_scan() -> None:
    """An all-gather of P - 1 states, until log2 P sends of one are less."""
    taken = {}
    for ranks in (2, 8, 128):
        sizes = Sizes(ranks, b=2**14, B=1, H=32, G=32, K=128, V=128, w=4, n=8)
        taken[ranks] = next(iter(ways("linear", sizes, MACHINES["cuda"])))
    assert taken == {2: "allgather", 8: "allgather", 128: "scan"}


@pytest.mark.parametrize(
    ("ranks", "heads", "causal", "first"),
    [(8, 32, 1, "alltoall"), (2, 4, 1, "alltoall"), (8, 2, 1, "allgather"), (8, 9, 0, "allgather")],
)
def test_heads_say_whether_ranks_share_them(ranks: int, heads: int, causal: int, first: str) -> None:
    """Causal work is even by heads; heads that ranks do not divide are filled up with zeros."""
    sizes = Sizes(ranks, b=2**14, B=1, H=heads, G=heads, K=128, V=128, w=2, c=causal)
    order = list(ways("softmax", sizes, MACHINES["cuda"]))
    assert (order[0] == "alltoall") == (first == "alltoall")


def test_terms_are_latency_bandwidth_and_work() -> None:
    sizes = Sizes(4, b=100, B=2, H=4, G=2, K=8, V=16, w=4, c=0)
    free, never = float("inf"), 0.0
    ring = SOFTMAX["ring"]
    assert predicted(ring, sizes, Machine(1.0, free, free)) == 3 + 7
    assert predicted(ring, sizes, Machine(never, 1.0, free)) == 10 * 100 * 2 * 2 * (8 + 16) * 4
    assert predicted(ring, sizes, Machine(never, free, 1.0)) == 3.5 * 2 * 2 * 4 * (8 + 16) * 100 * 400
    alone = Sizes(1, b=400, B=2, H=4, G=2, K=8, V=16, w=4, c=0)
    assert predicted(ring, alone, Machine(1.0, 1.0, 1.0)) == 4 * predicted(
        ring, sizes, Machine(never, free, 1.0)
    )
