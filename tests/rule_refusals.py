"""What a rule refuses though it could be cut, each with its reason: (sample, operand, dim).

An entry that is no longer true fails.
"""

from __future__ import annotations

import torch

from spcompile._torch import flash_attention_cpu_backward

aten, ops = torch.ops.aten, torch.ops.spcompile

__all__ = ["CONSERVATIVE"]

CHANNELS = "channels are never the sequence"
HEAD_SIZE = "a head's size is never the sequence"
KEYS = "keys and values are gathered: the sequence of queries is what is cut"
MASKED = "a mask may or may not have the batch: one rule for both"
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
for _name in ("causal", "all"):
    CONSERVATIVE |= {
        **_refused(ops.linear_attention.default, _name, HEAD_SIZE, (0, 3), (1, 3), (2, 3)),
        **_refused(ops.linear_attention_backward.default, _name, HEAD_SIZE, (0, 3), (1, 3), (2, 3), (3, 3)),
        **_refused(ops.softmax_attention.default, _name, HEAD_SIZE, (2, 3)),
        **_refused(ops.softmax_attention_backward.default, _name, HEAD_SIZE, (0, 3), (3, 3), (4, 3)),
    }
_name = "cross, grouped, masked"
CONSERVATIVE |= {
    **_refused(ops.softmax_attention.default, _name, MASKED, (0, 0), (1, 0), (2, 0), (3, 0)),
    **_refused(ops.softmax_attention.default, _name, HEAD_SIZE, (2, 3)),
    **_refused(ops.softmax_attention_backward.default, _name, HEAD_SIZE, (0, 3), (3, 3), (5, 3)),
    **_refused(ops.softmax_attention_backward.default, _name, KEYS, (2, 2), (3, 2), (4, 1)),
    **_refused(ops.softmax_attention_backward.default, _name, MASKED, *((i, 0) for i in range(7))),
}
