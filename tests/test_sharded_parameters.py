"""FSDP2 and DDP beside sequence parallelism, on 2 x 2 real Gloo ranks through Inductor."""

from __future__ import annotations

import pytest

from tests.real_ranks import run_ranks
from tests.sharded_worker import SIZE, VOCAB

BLOCK = (3 * SIZE + SIZE) * (SIZE + 1)
PARAMETERS = VOCAB * SIZE + VOCAB * (SIZE + 1) + 2 * BLOCK


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_gradient_is_reduced_once_and_is_eager() -> None:
    """Elements, of 8 bytes, that enter the reduce-scatters of FSDP2 and our all-reduces.

    All dims are multiples of the ranks, so FSDP2 pads nothing: what enters is every parameter once.
    """
    for result in run_ranks("ALL", 4, timeout=580, worker="tests.sharded_worker"):
        for name, found in result.items():
            assert found["error"] <= 1e-9 and found["sharded"], name
        groups = {name: len(found["scattered"]) for name, found in result.items()}
        assert groups == {"fsdp_rows": 3, "fsdp_blocks": 3, "fsdp_whole": 1, "ddp": 0}
        for name in ("fsdp_rows", "fsdp_blocks", "fsdp_whole"):
            assert sum(result[name]["scattered"]) == PARAMETERS, name
        for name in ("fsdp_blocks", "fsdp_whole", "ddp"):
            assert result[name]["reduced"] == [], name
        # Both blocks run one graph, which sums a block's gradients along the sequence, in one bucket.
        assert result["fsdp_rows"]["reduced"] == [BLOCK]
