"""One graph text under every hash seed; the whole sweep is ``python -m tests.hash_seeds --sweep``.

Each process of the tests on real ranks has hashes of its own as well, and tests/test_ranks.py compares texts.
"""

from __future__ import annotations

import pytest

from tests.hash_seeds import SEEDS, graphs
from tests.real_ranks import run_ranks

# What is known to follow the process's hashes (Gemma 4 from seed 0 to 1), and one of each kind of the rest.
SOME = ["gemma4", "fla_gdn2_chunk", "linear_llama3:tiny"]


@pytest.mark.sweep
@pytest.mark.timeout(300)
def test_one_graph_under_every_seed() -> None:
    found = [graphs(SOME, seed) for seed in SEEDS]
    assert found[0] == found[1] == found[2]
    assert all(len(digest) == 64 for digest in found[0].values()), found[0]


@pytest.mark.sweep
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ["gemma4", "gdn2"])
def test_ranks_whose_hashes_differ_train(case: str) -> None:
    seeds = ["0", "1"]  # under which Gemma 4 walks its layers' types in two orders
    for result in run_ranks(case, 2, timeout=580, each=[{"PYTHONHASHSEED": seed} for seed in seeds]):
        assert result["error"] <= 2e-4  # float32 inside, as in tests/test_zoo.py
        assert result["hashes"] == 2
