"""What hides the exchange in the code that Inductor writes for GPUs (``tests/inductor_cuda.py``)."""

from __future__ import annotations

from typing import Any

import pytest

from tests import workers

pytest.importorskip("triton", reason="Triton is for Linux alone")
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def code() -> dict[str, dict[str, Any]]:
    """Model -> what the worker found."""
    return workers.found("inductor_cuda", timeout=380)


def between(steps: list[str], start: str) -> list[list[str]]:
    """What the code does between each such start and the wait behind it."""
    found = []
    for i, step in enumerate(steps):
        if step == f"start {start}":
            found.append(steps[i + 1 : steps.index("wait", i)])
    return found


def ours(steps: list[str]) -> list[str]:
    """The operators among the steps, without the small kernels that Inductor fuses."""
    return [x.rsplit(".", 1)[1] for x in steps if "spcompile" in x or "extern_kernels" in x]


@pytest.mark.parametrize("model", ["plain and softmax", "decay"])
def test_every_gather_of_states_has_work_behind_it(code: dict[str, dict[str, Any]], model: str) -> None:
    """One all-gather per layer and direction: the states of the segments hide it, and in the backward dq."""
    forward = between(code[model]["forward"], "all_gather_into_tensor")
    assert [ours(x) for x in forward[:2]] == [["affine_scan"]] * 2
    backward = between(code[model]["backward"], "all_gather_into_tensor")
    if model == "plain and softmax":  # keys and values again, behind the products of the last layer
        assert ours(backward.pop(0)) == ["mm", "mm"]
    assert len(backward) == 2
    for steps in backward:
        assert {"affine_scan", "segment_outputs"} <= set(ours(steps)), steps
        assert ("segment_pairs" in ours(steps)) == (model == "decay")


def test_scores_of_a_decay_per_key_hide_the_gather(code: dict[str, dict[str, Any]]) -> None:
    """They need no state; in the backward what comes from pairs of a chunk, and dq."""
    forward = between(code["per key"]["forward"], "all_gather_into_tensor")
    assert [sorted(ours(x)) for x in forward] == [["affine_scan", "diagonal_within"]] * 2
    backward = between(code["per key"]["backward"], "all_gather_into_tensor")
    assert len(backward) == 2
    for steps in backward:
        assert {"affine_scan", "diagonal_within", "diagonal_columns"} <= set(ours(steps)), steps


def test_softmax_gathers_once_and_scatters_once(code: dict[str, dict[str, Any]]) -> None:
    """K and V in one all-gather, their gradients in one reduce-scatter; the backward gathers them again."""
    found = code["plain and softmax"]
    assert len(between(found["forward"], "all_gather_into_tensor")) == 3  # two layers are linear
    assert len(between(found["backward"], "reduce_scatter_tensor")) == 1


def test_a_delta_rule(code: dict[str, dict[str, Any]]) -> None:
    """One all-gather each way; what the forward wrote is made again behind the backward's, and not saved.

    The systems of the chunks are saved, and serve both ways.
    """
    steps = code["delta"]["forward"], code["delta"]["backward"]
    forward, backward = (between(x, "all_gather_into_tensor") for x in steps)
    assert len(forward) == len(backward) == 2
    for x in backward:
        assert "segment_outputs" in ours(x), x
    assert [ours(x).count("delta_corrected") for x in steps] == [0, 4]
    assert [ours(x).count("delta_systems") for x in steps] == [2, 0]


def test_a_delta_rule_with_a_decay_per_key(code: dict[str, dict[str, Any]]) -> None:
    """One all-gather each way; what the forward made of q and k is made again, and not saved."""
    steps = code["delta per key"]["forward"], code["delta per key"]["backward"]
    forward, backward = (between(x, "all_gather_into_tensor") for x in steps)
    assert len(forward) == len(backward) == 2
    assert sum(ours(x).count("kda_written") for x in backward) == 2
    for name in ("kda_prepared", "kda_written"):
        assert [ours(x).count(name) for x in steps] == [2, 2]


def test_what_is_sent_is_the_same_on_a_cpu(code: dict[str, dict[str, Any]]) -> None:
    for model, found in code.items():
        assert found["sent"] == found["sent on cpu"], model
