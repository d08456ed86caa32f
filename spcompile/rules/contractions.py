"""Matrix products: the factor that the output has not is summed, so its shards give partial sums."""

from __future__ import annotations

from typing import Any

import torch

from spcompile.rules.base import Call, Factors
from spcompile.rules.pointwise import broadcast_dims

__all__ = ["CONTRACTIONS", "add_contraction"]

aten = torch.ops.aten

CONTRACTIONS: dict[Any, str] = {
    # A row of the output needs its own row of the left operand and all of the right one.
    aten.mm.default: "m k, k n -> m n; linear 0 1",
    aten.bmm.default: "b m k, b k n -> b m n; linear 0 1",
    aten.mv.default: "m k, k -> m; linear 0 1",
    aten.dot.default: "k, k -> ; linear 0 1",
}


def add_contraction(call: Call) -> Factors:
    """addmm, baddbmm: the summed factor is needed whole, or the added term would count once per rank."""
    added, left, _ = call.operands
    batch = () if left.dim() == 2 else ("d3",)
    out = (*batch, "d2", "d1")
    term = broadcast_dims(tuple(added.shape), tuple(call.outputs[0].shape))
    return Factors(call, (term, (*batch, "d2", "k"), (*batch, "k", "d1")), (out,), whole=frozenset({"k"}))
