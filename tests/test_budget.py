"""What a rank holds in all, and what follows from it: the fewest ranks, what the choices cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import spcompile
from spcompile.example import tiny
from spcompile.reports import budget
from spcompile.reports.budget import _search, choices, parse_size
from spcompile.reports.memory import largest
from spcompile.reports.report import Report
from spcompile.reports.tables import human

TOKENS = 512


def explained(ranks: int, batch: int = 1, labels: bool = True, **options: object) -> Report:
    with torch.device("meta"):
        model, ids = tiny("LN", hidden=32, heads=2), torch.zeros(batch, TOKENS, dtype=torch.long)
    return spcompile.explain(model, ranks=ranks, **options)(ids, **({"labels": ids} if labels else {}))


@pytest.fixture(scope="module")
def report() -> Report:
    return explained(8)


def test_the_letters_are_the_models(report: Report) -> None:
    """The textbook's matrix product folds batch and heads into one dim: B = 2 and H = 1 to the operator."""
    for row in report.collectives:
        assert row.values.get("B", 1) == 1 and row.values.get("H", 2) == row.values.get("G", 2) == 2
    assert "B = 1 (batch), H = 2 (heads)" in str(report)


def test_the_total_is_the_sum_of_its_rows(report: Report) -> None:
    memory, parameters = report.memory, sum(p.nbytes for p in tiny("LN", hidden=32, heads=2).parameters())
    assert memory is not None and report.parameters == report.trained == parameters
    assert report.inputs == 2 * TOKENS * 8
    peak = max(memory.forward, memory.backward)
    assert report.total == 4 * parameters + report.inputs + peak
    report.optimizer = "none"
    try:
        assert report.total == 2 * parameters + report.inputs + peak
        assert "optimizer" not in str(report)
    finally:
        report.optimizer = "adamw"


def test_another_number_of_ranks_is_what_explain_finds_for_it(report: Report) -> None:
    other = explained(3)
    assert report.memory_on(3) == other.memory
    assert other.total is not None and report.total is not None and report.total < other.total
    # Between two ranks and three, the fewest are three.
    assert report.fewest_ranks(other.total) == 3
    report.device_memory = other.total
    try:
        assert "fits" in str(report) and "the fewest ranks that do: 3" in str(report)
        report.device_memory = report.parameters
        assert "does not fit" in str(report) and "no number of ranks does" in str(report)
    finally:
        report.device_memory = None


@pytest.mark.parametrize("whole", [0, 70, 99, 100])
@pytest.mark.parametrize("shared", [1, 30, 1000, 10**6])
def test_the_search_finds_the_least_and_tries_few(whole: int, shared: int) -> None:
    tried: set[int] = set()

    def size(ranks: int) -> int:
        tried.add(ranks)
        # Unlike a + b / P: from two ranks on something more is held.
        return whole + -(-shared // ranks) + 5 * (ranks > 1)

    expected = next((p for p in range(1, 4097) if size(p) <= 100), None)
    tried.clear()
    assert _search(size, 100, 4096, 8) == expected
    assert len(tried) <= 13


def test_the_largest_tensors_have_the_users_lines(report: Report) -> None:
    def f(x: Tensor) -> Tensor:
        big, small = x.exp(), x[:1].cos()
        return (big.t() * 2).sum() + small.sum()

    found = largest(make_fx(f, tracing_mode="fake")(torch.zeros(10, 10)).graph)
    assert [(x.bytes, x.shape) for x in found[:2]] == [(400, (10, 10))] * 2
    first = report.largest[0]
    assert first.bytes >= report.largest[-1].bytes and "example.py" in first.stack
    assert "largest tensors at the peak" in str(report)


def test_what_regathering_saves(report: Report) -> None:
    held, again = explained(8, regather=False), explained(8, regather=True)
    (kept,) = choices(held)
    assert held.memory is not None and again.memory is not None
    keys = next(c.bytes for c in held.collectives if c.purpose == "softmax: keys and values")
    # What is received, and this rank's own keys and values: without a gather they are views of the projection
    # that is saved for the queries.
    assert held.memory.saved - again.memory.saved == keys * 8 // 7
    (other,) = choices(again)
    assert keys == 7 * 64 * 2 * 32 * 4 == 114688
    size = human(keys)
    assert kept.costs == f"{size} more is saved" and other.instead == f"regather=False saves {size} more"


def test_returned_logits_are_told() -> None:
    with torch.no_grad():
        report, parts = explained(4, labels=False, outputs="whole"), explained(4, labels=False)
    (outputs,) = choices(report)
    assert not choices(parts)  # they stay this rank's part
    whole = TOKENS * 256 * 4
    assert outputs.costs == "384 KiB is received, 512 KiB held" and whole == 512 * 1024
    assert "outputs are returned whole" in str(report)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("80 GiB", 80 * 2**30), ("1.5t", 15 * 10**11), ("64k", 64000), ("123", 123)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "80PB", "-1GB", "0"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


def test_optimizers_keep_what_torchs_do() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    for name, made in {"adamw": torch.optim.AdamW([p]), "sgd": torch.optim.SGD([p], momentum=0.9)}.items():
        made.step()
        kept = sum(x.shape == p.shape for x in made.state[p].values() if isinstance(x, Tensor))
        assert kept == budget.OPTIMIZERS[name]
