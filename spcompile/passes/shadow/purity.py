"""Whether a call of ATen only computes."""

from __future__ import annotations

import operator

import torch
from torch import fx

from spcompile._torch import OpOverload

__all__ = ["is_pure"]


def is_pure(n: fx.Node) -> bool:
    """Whether an ATen node only computes: it writes nothing and draws no random numbers."""
    if n.op == "get_attr" or n.target is operator.getitem:
        return True
    target = n.target
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags and not target.overloadpacket.__name__.endswith(
        "dropout"
    ):
        return True
    args = dict(zip((a.name for a in target._schema.arguments), n.args, strict=False)) | dict(n.kwargs)
    if target.overloadpacket.__name__ == "scaled_dot_product_attention":
        return args.get("dropout_p", 0.0) == 0
    return args.get("p") == 0 or args.get("train") is False
