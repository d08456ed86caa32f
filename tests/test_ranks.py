"""Real Gloo processes through Inductor confirm what the simulated ranks prove, and that nothing hangs."""

from __future__ import annotations

import pytest

from tests.real_ranks import run_ranks


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_experts_are_eager() -> None:
    """Through Inductor, where a checkpointed region sorts again in the backward."""
    for result in run_ranks("experts", 2, timeout=580):
        assert max(result["errors"]) <= 1e-9 and not result["gathers"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("ranks", "case"), [(2, "train"), pytest.param(3, "train_each", marks=pytest.mark.sweep)]
)
def test_training_and_inference_are_eager(ranks: int, case: str) -> None:
    """Two ranks with symbolic lengths from the second on, three with graphs of one length."""
    for result in run_ranks(case, ranks, timeout=580):
        assert max(result["errors"]) <= 1e-9
        assert result["graphs"] == 3 and result["same_text"]


@pytest.mark.sweep
@pytest.mark.timeout(600)
def test_a_delta_rule_before_a_softmax_layer_is_eager() -> None:
    for result in run_ranks("delta", 2, timeout=580):
        assert result["error"] <= 1e-9


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_that_a_step_leaves_behind() -> None:
    """Gradients, parameters, buffers, and what a compiled optimizer leaves."""
    for result in run_ranks("left", 2, timeout=580):
        assert all(result["names"])
        assert max(result["errors"].values()) <= 1e-9, result["errors"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_wait_comes_after_the_intra_chunk_products() -> None:
    """One gather forward and one backward; matrix products stand between each and its wait."""
    for order in run_ranks("waits", 2)[0]["codes"]:
        gather, wait = order.index("all_gather"), order.index("wait_tensor")
        assert order.count("all_gather") == 1, order
        between = [x for x in order[gather:wait] if x.endswith("mm")]
        assert len(between) >= 2, order


@pytest.mark.parametrize("case", ["other_shape_at_once", "other_shape_later", "other_model"])
@pytest.mark.timeout(200)
def test_ranks_that_differ_get_an_error_on_every_rank(case: str) -> None:
    for result in run_ranks(case, 2):
        assert result["error"] is not None and "run something else than rank 0" in result["error"]
        assert "Remedy" in result["error"] and result["seconds"] < 60


@pytest.mark.timeout(200)
def test_a_mesh_must_have_one_axis() -> None:
    for result in run_ranks("mesh_of_two_axes", 2):
        assert "must be a 1-D DeviceMesh" in result["error"] and "mesh['sp']" in result["error"]
        assert result["error_of_axis"] <= 1e-9
