"""What a rule refuses though it could be cut, each with its reason: (sample, operand, dim).

An entry that is no longer true fails.
"""

from __future__ import annotations

import torch

from spcompile._torch import flash_attention_cpu_backward
from spcompile.attention.variants import Variant
from tests.variants import KINDS

aten, ops = torch.ops.aten, torch.ops.spcompile

__all__ = ["CONSERVATIVE"]

CHANNELS = "channels are never the sequence"
HEAD_SIZE = "a head's size is never the sequence"
KEYS = "keys and values are gathered: the sequence of queries is what is cut"
MASKED = "a mask may or may not have the batch: one rule for both"
SUMMED = "the gradient of a bias is a sum over it"
BROADCAST = "a decay that is broadcast over the batch: its gradient would be a sum over it"
BOUNDARIES = "a table of boundaries is never the sequence"


def _refused(op: object, name: str, reason: str, *pairs: tuple[int, int]) -> dict[tuple[str, int, int], str]:
    text = f"{op} ({name})" if name else str(op)
    return {(text, *pair): reason for pair in pairs}


CONSERVATIVE: dict[tuple[str, int, int], str] = {
    **_refused(aten.bucketize.Tensor, "", BOUNDARIES, (1, 0)),
    **_refused(aten.searchsorted.Tensor, "", BOUNDARIES, (0, 0)),
    **_refused(aten.searchsorted.Tensor, "rows", BOUNDARIES, (0, 1)),
    **_refused(flash_attention_cpu_backward, "cross", KEYS, (2, 2), (3, 2)),
    **_refused(flash_attention_cpu_backward, "mask", KEYS, (2, 2), (3, 2), (6, 1)),
    **_refused(flash_attention_cpu_backward, "padding mask", KEYS, (2, 2), (3, 2), (6, 3)),
}
for _name in ("mixing channels", "in steps"):
    CONSERVATIVE |= {
        **_refused(aten.convolution.default, _name, CHANNELS, (1, 0), (2, 0)),
        **_refused(aten.convolution_backward.default, _name, CHANNELS, (0, 1), (1, 1), (2, 0), (2, 1)),
    }
for _name in ("causal", "all", "cross"):
    CONSERVATIVE |= {
        **_refused(ops.linear_attention.default, _name, HEAD_SIZE, (0, 3), (1, 3), (2, 3)),
        **_refused(
            ops.linear_attention_backward.default, _name, HEAD_SIZE, *((i, 3) for i in range(5)), (4, 2)
        ),
    }
CONSERVATIVE |= _refused(
    ops.linear_attention_backward.default,
    "cross, final",
    HEAD_SIZE,
    *((i, 3) for i in range(6)),
    (1, 2),
    (5, 2),
)
_ids = ("documents", "documents alike", "prefixes", "prefixes alike")
for _name in ("causal", "all", "window", "window, cap, sinks", *_ids):
    CONSERVATIVE |= {
        **_refused(ops.softmax_attention.default, _name, HEAD_SIZE, (2, 3)),
        **_refused(ops.softmax_attention_backward.default, _name, HEAD_SIZE, (0, 3), (3, 3), (4, 3)),
    }
for _name in ("relative", "relative alike"):
    CONSERVATIVE |= {
        **_refused(ops.softmax_attention.default, _name, HEAD_SIZE, (2, 3)),
        **_refused(ops.softmax_attention_backward.default, _name, HEAD_SIZE, (0, 3), (3, 3), (4, 3)),
    }
    _backward, _summed = ops.softmax_attention_relative_backward.default, (0, 1)[: 1 + ("alike" in _name)]
    CONSERVATIVE |= {
        **_refused(_backward, _name, HEAD_SIZE, (0, 3), (3, 3), (4, 3)),
        **_refused(_backward, _name, SUMMED, *((i, dim) for i in range(6) for dim in _summed)),
    }
_name = "cross, grouped, masked"
CONSERVATIVE |= {
    **_refused(ops.softmax_attention.default, _name, MASKED, (0, 0), (1, 0), (2, 0), (3, 0)),
    **_refused(ops.softmax_attention.default, _name, HEAD_SIZE, (2, 3)),
    **_refused(ops.softmax_attention_backward.default, _name, HEAD_SIZE, (0, 3), (3, 3), (5, 3)),
    **_refused(ops.softmax_attention_backward.default, _name, KEYS, (2, 2), (3, 2), (4, 1)),
    **_refused(ops.softmax_attention_backward.default, _name, MASKED, *((i, 0) for i in range(7))),
}


def _of_variant(variant: Variant, initial: bool) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Operand -> dims of a head's size, and dims of the batch that a decay is broadcast over."""
    sizes = {"grad": [3], "grad_final": [3], "v": [3], "initial_state": [3], "final": [3]}
    if not variant.delta:  # its keys meet each other
        more = {"q": [3], "k": [3], "grad_final": [2], "initial_state": [2], "final": [2]}
        more |= {"log_decay": [3]} if variant.decay == "diagonal" else {}
        sizes = {n: sizes.get(n, []) + more.get(n, []) for n in {**sizes, **more}}
    names = ["grad", "grad_final", "q", "k", "v", "final"] + (["initial_state"] if initial else [])
    batch = {n: [0] for n in names} if variant.decay == "constant" else {}
    return sizes, batch


for _n, (_kind, _variant) in enumerate(KINDS.items()):
    _given = ["q", "k", "v"] + ["log_decay"] * (_variant.decay != "none") + ["beta"] * _variant.delta
    _given += ["initial_state"] * (_n % 2 == 0)
    for _op, _names in (
        (ops.linear_attention.default, _given),
        (ops.linear_attention_backward.default, ["grad", "grad_final", *_given, "final"]),
    ):
        for _dims, _reason in zip(_of_variant(_variant, _n % 2 == 0), (HEAD_SIZE, BROADCAST), strict=True):
            _pairs = [(i, d) for i, name in enumerate(_names) for d in _dims.get(name, [])]
            for _label in (_kind, f"{_kind}, reverse") if _kind == "gla" else (_kind,):
                CONSERVATIVE |= _refused(_op, _label, _reason, *_pairs)
