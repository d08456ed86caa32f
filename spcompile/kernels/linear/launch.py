"""How the Triton kernels of linear attention are launched: segments, strides, sizes of blocks."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["CHUNK", "rows", "segment", "strides_of", "tiles"]

CHUNK = 64
# Tokens of a segment, at least. 16K tokens per rank are 32 segments: with 4 heads, as many programs as an
# H100 has multiprocessors.
_SEGMENT = 512
# A scan over more segments than this would take longer than it saves.
_MOST = 128


def segment(tokens: int) -> tuple[int, int]:
    """How many segments, and their tokens: whole chunks."""
    size = torch.sym_max(_SEGMENT, CHUNK * ((tokens + _MOST * CHUNK - 1) // (_MOST * CHUNK)))
    return (tokens + size - 1) // size, size


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """Of batch, head and token; of a dim of one entry any will do."""
    assert x.stride(-1) == 1 or x.shape[-1] == 1
    return x.stride(0), x.stride(1), x.stride(2)


def rows(x: Tensor) -> Tensor:
    """``x`` with its last dim next to each other in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# kernel -> the largest blocks of K and of V: what fits into the registers of sm_90. Where all of K has to be
# in one block and is more than 128, the blocks of V are halved.
_BLOCKS = {
    "summaries": (128, 64),
    "outputs": (256, 64),
    "outputs, less": (256, 64),
    "pairs": (64, 64),
    "within": (256, 64),
    "outputs, per key": (256, 64),
    "delta": (128, 64),
    "delta, per key": (128, 64),
    "prepared": (128, 64),
    "readings": (128, 64),
}
# The same of V for float32, whose products are three of TF32 each.
_OF_FLOAT32 = {"delta, per key": 32, "readings": 16}


# kernel -> loads that are under way at once, for heads of up to 256 bytes, 512 and more: with more the delta
# rule spills less, but shared memory has 163 KB on sm_80 and 227 KB on sm_90.
_SMALL = dict.fromkeys(_BLOCKS, 2) | {"delta": 3}
_LARGE = dict.fromkeys(_BLOCKS, 2) | {"outputs, less": 1, "outputs, per key": 1}
_LARGE |= {"delta, per key": 1, "readings": 1}
_LARGEST = dict.fromkeys(_BLOCKS, 1)


def tiles(kernel: str, k: Tensor, v: Tensor, amd: bool = torch.version.hip is not None) -> dict[str, Any]:
    """How a kernel of linear attention is compiled for keys and values: sizes, precision and warps."""
    block_k, block_v = (max(16, triton.next_power_of_2(x.shape[3])) for x in (k, v))
    most_k, most_v = _BLOCKS[kernel]
    halved = kernel.startswith("outputs") and block_k > 128
    row = min(block_k, most_k) * k.dtype.itemsize
    if k.dtype == torch.float32:
        most_v = _OF_FLOAT32.get(kernel, most_v)
    stages = _SMALL if row <= 256 else _LARGE if row <= 512 else _LARGEST
    return {
        "K": k.shape[3],
        "V": v.shape[3],
        "BK": min(block_k, most_k),
        "BV": min(block_v, most_v // 2 if halved else most_v),
        "C": CHUNK,
        "WIDE": k.dtype != torch.bfloat16,
        "PRECISION": "tf32x3" if k.dtype == torch.float32 else "tf32",
        "num_warps": 4 if block_k <= (64 if kernel in ("summaries", "pairs") else 32) else 8,
        # AMD's have 64 KB of shared memory, which more tiles of a delta rule's would not fit into.
        "num_stages": 1 if amd and kernel.startswith("delta") else stages[kernel],
    }
