"""Third-party models, one step of training on simulated ranks: recognized, and equal to eager.

``recognized`` counts the operators of linear attention in Dynamo's graph, before anything is sharded: one for
each layer of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from spcompile.simulate import simulated
from tests.proof import capture, eager
from tests.releases import each_change
from tests.zoo import FUNCTIONS, MODELS

# float32 throughout; ten times that for models whose norms, decays and loss amplify float32's rounding.
TOLERANCE, INSIDE = 2e-5, 2e-4


@dataclass(frozen=True)
class Case:
    recognized: int
    length: int = 97
    tolerance: float = TOLERANCE
    operator: str = "linear_attention"


LINEAR = {
    "qwen3_next": Case(1, tolerance=INSIDE),
    "qwen3_5": Case(1, tolerance=INSIDE),
    "kimi_linear_dense": Case(1, tolerance=INSIDE),
    "mamba2": Case(2, tolerance=INSIDE),
    "bamba": Case(1, tolerance=INSIDE),
    "granitemoehybrid_dense": Case(1, tolerance=INSIDE),
    "minimax": Case(1, tolerance=INSIDE, operator="affine_scan"),  # over blocks; its decays are buffers: data
    "mamba": Case(2, operator="affine_scan"),
    **dict.fromkeys(FUNCTIONS, Case(1)),
    "fla_linear_attn_chunk": Case(1, length=128),
    "fla_delta_rule_chunk": Case(1, length=128),
    "fla_hgrn_recurrent": Case(1, operator="affine_scan"),
    "hf_mamba_selective_scan": Case(1, operator="affine_scan"),
    # Stabilised by a running maximum: that, and then two states.
    "hf_rwkv4": Case(2, length=33, operator="affine_scan"),
    "xlstm": Case(4, length=128, tolerance=INSIDE, operator="affine_scan"),
}
# Their algebra is another: normalised by the absolute value of the scores, or stabilised by a maximum.
OTHER = {
    "torchscale_retnet_parallel": Case(0),
    "mlstm_parallel": Case(0),
    "lucid_lat_causal": Case(0, length=128),
    "gemma4": Case(0, tolerance=INSIDE),  # softmax alone
    "fla_gdn2_chunk": Case(0, length=33, tolerance=INSIDE),
}
CASES = LINEAR | OTHER
# One of each algebra, chunked, by tokens or quadratic; the longest and the likes of these are a release's.
NOW = {"qwen3_next", "kimi_linear_dense", "mamba2", "minimax", "mamba", "fla_based_parallel"}
NOW |= {"fla_linear_attn_chunk", "fla_simple_gla_parallel", "fla_rwkv6_recurrent", "hf_gated_delta_chunk"}
NOW |= {"hf_kda_chunk", "fla_hgrn_recurrent", "fla_delta_rule_chunk", "performer_causal", "mlstm_parallel"}
NOW |= {"torchscale_retnet_parallel", "performer_noncausal", "hf_rwkv4"}
# Its own backward raises, in eager: it writes in place.
FORWARD_ALONE = {"fla_rwkv6_chunk": CASES.pop("fla_rwkv6_chunk")}


@pytest.mark.parametrize("ranks", each_change([3, 2], [3]))
@pytest.mark.parametrize("name", each_change(sorted(CASES), NOW))
def test_recognized_and_equal_to_eager(name: str, ranks: int) -> None:
    case = CASES[name]
    model, inputs = {**MODELS, **FUNCTIONS}[name](case.length)
    expected, joint = eager(model, inputs), capture(model, inputs)
    assert expected.error(*joint.run(ranks)) <= case.tolerance
    if name in OTHER:
        return
    assert joint.operators[case.operator] == case.recognized
    if name == "kimi_linear_dense":  # multi-head latent attention, its keys written in two parts
        assert all(site.rewritten for site in joint.sites)


@pytest.mark.parametrize("name", FORWARD_ALONE)
def test_forward_alone(name: str) -> None:
    model, inputs = FUNCTIONS[name](128)
    with torch.no_grad():
        found = torch.compile(model, backend=simulated(3), fullgraph=True)(**inputs)
        torch.testing.assert_close(found, model(**inputs), rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("name", ["qwen3_5", "minimax", "fla_simple_gla_chunk"])
def test_graphs_do_not_grow_with_the_length(name: str) -> None:
    """Dynamo's graph, the joint graph and each rank's graph have as many nodes at 4,096 tokens as at 256."""
    counts = []
    for length in (256, 4096):
        joint = capture(*{**MODELS, **FUNCTIONS}[name](length))
        assert joint.operators[CASES[name].operator] == 1
        local, _ = joint.shard(2)
        counts.append([joint.nodes, len(joint.module.graph.nodes), len(local.graph.nodes)])
    assert counts[0] == counts[1]
