"""How the Triton kernels of linear attention are launched: segments, strides, sizes of blocks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = [
    "AMD",
    "CHUNK",
    "blank",
    "dense",
    "has_tensor_memory",
    "lie",
    "narrow",
    "precise",
    "rows",
    "segment",
    "strides_of",
    "target_of",
    "tiles",
]

AMD = "gfx942"

CHUNK = 64
# Segments of all heads together: each is a program or two, and a GPU has 132 multiprocessors.
_ALL = 128
# Segments of a head, at most: a program folds what those before its own do, one after another.
_MOST = 64
# Tokens of a segment, at least.
_LEAST = 512


def segment(tokens: int, heads: int) -> tuple[int, int]:
    """How many segments the tokens of each of ``heads`` (B*H) have, and the tokens of one: whole chunks.

    Segments are there to fill a GPU, and cost a state each: where heads fill it there is one.
    """
    wanted = torch.sym_min(_MOST, (_ALL + heads - 1) // heads)
    size = torch.sym_max(_LEAST, CHUNK * ((tokens + CHUNK * wanted - 1) // (CHUNK * wanted)))
    return (tokens + size - 1) // size, size


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """Of batch, head and token; of a dim of one entry any will do."""
    assert x.stride(-1) == 1 or x.shape[-1] == 1
    return x.stride(0), x.stride(1), x.stride(2)


def dense(*given: Tensor | None) -> list[Tensor | None]:
    """Each contiguous."""
    return [None if x is None else x.contiguous() for x in given]


def lie(states: Tensor | None, carry: Tensor | None) -> tuple[int, ...]:
    """Strides of head, segment, row and column of states; a carry lies as one of them does."""
    if states is not None:
        return states.stride()
    return (0, 0, 0, 0) if carry is None else (0, 0, *carry.stride()[1:])


def blank(x: Tensor, dim: int, tokens: int, of_chunk: int, reverse: bool) -> None:
    """Zero what no program of a walk writes: the chunks that are padding alone, along ``dim`` of ``x``, which
    has ``of_chunk`` entries for each chunk."""
    used = (tokens + CHUNK - 1) // CHUNK * of_chunk
    if x.dim() > 1 and used < x.shape[dim]:
        x.narrow(dim, 0 if reverse else used, x.shape[dim] - used).zero_()


def narrow(x: Tensor) -> torch.dtype:
    """Of what is made of operands: their products are in bf16 or else in float32, as float16 holds no more
    than 65,504, and states may be larger."""
    return x.dtype if x.dtype == torch.bfloat16 else torch.float32


def rows(x: Tensor) -> Tensor:
    """``x`` with its last dim next to each other in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# kernel -> the largest blocks of K and of V: what fits into the registers of sm_90. Where all of K has to be
# in one block and is more than 128, the blocks of V are halved.
_BLOCKS = {
    "summaries": (128, 64),
    "outputs": (256, 64),
    "outputs, less": (256, 32),
    "pairs": (64, 64),
    "within": (256, 64),
    "outputs, per key": (256, 64),
    "systems": (128, 64),
    "delta": (128, 64),
    "delta, back": (128, 32),
    "delta, per key": (128, 64),
    "prepared": (128, 64),
    "readings": (128, 64),
}
# The same of V for float32, whose products are three of TF32 each.
_OF_FLOAT32 = {"delta, per key": 32, "readings": 16}
# And of float32 where each of the three has columns of tensor memory of its own.
_IN_TENSOR_MEMORY = {"outputs": 32, "outputs, per key": 32, "outputs, less": 16}
_IN_TENSOR_MEMORY |= {"delta": 32, "delta, back": 16}
# Kernels with keys of up to so many numbers have four warps, others eight.
_NARROW = dict.fromkeys(_BLOCKS, 32)
_NARROW |= dict.fromkeys(("summaries", "pairs", "delta, back", "outputs, less"), 64)


# kernel -> loads that are under way at once, for heads of up to 128 bytes, 256, 512 and more: some spill less
# with more, but shared memory has 163 KB on sm_80 and 227 KB on sm_90.
_SMALLEST = dict.fromkeys(_BLOCKS, 2) | {"outputs, less": 3}
_SMALL = dict.fromkeys(_BLOCKS, 2)
_LARGE = dict.fromkeys(_BLOCKS, 2) | {"outputs, less": 1, "outputs, per key": 1}
_LARGE |= {"delta, per key": 1, "readings": 1}
_STAGES = ((128, _SMALLEST), (256, _SMALL), (512, _LARGE), (1 << 30, dict.fromkeys(_BLOCKS, 1)))


@cache
def target_of(device: torch.device) -> int | str:
    """What the kernels are compiled for: 90 for sm_90; where no GPU is at hand, too."""
    if torch.version.hip is not None:
        return AMD
    if device.type != "cuda" or not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def has_tensor_memory(target: int | str) -> bool:
    """Whether products are added up in tensor memory (sm_100), which has 512 columns of 128 numbers."""
    return isinstance(target, int) and 100 <= target < 120


def precise(target: int | str) -> str:
    """How float32 is multiplied: by three products of TF32, but for AMD's, which have none."""
    return "ieee" if target == AMD else "tf32x3"


def tiles(kernel: str, k: Tensor, v: Tensor, target: int | str | None = None) -> dict[str, Any]:
    """How a kernel of linear attention is compiled for keys and values: sizes, precision and warps.

    Args:
        target: see :func:`target_of`; None: that of ``k``.
    """
    target = target_of(k.device) if target is None else target
    block_k, block_v = (max(16, triton.next_power_of_2(x.shape[3])) for x in (k, v))
    most_k, most_v = _BLOCKS[kernel]
    halved = kernel.startswith("outputs") and block_k > 128
    # Products in tensor memory read their operands from shared memory, as they are multiplied.
    row = min(block_k, most_k) * (narrow(k) if has_tensor_memory(target) else k.dtype).itemsize
    if k.dtype == torch.float32:
        most_v = _OF_FLOAT32.get(kernel, most_v)
        if has_tensor_memory(target):
            most_v = min(most_v, _IN_TENSOR_MEMORY.get(kernel, most_v))
    stages = next(x for most, x in _STAGES if row <= most)
    return {
        "K": k.shape[3],
        "V": v.shape[3],
        "BK": min(block_k, most_k),
        "BV": min(block_v, most_v // 2 if halved else most_v),
        "C": CHUNK,
        "WIDE": k.dtype != torch.bfloat16,
        "PRECISION": precise(target) if k.dtype == torch.float32 or target == AMD else "tf32",
        "num_warps": 4 if block_k <= _NARROW[kernel] else 8,
        # AMD's have 64 KB of shared memory, which more tiles of a delta rule's would not fit into.
        "num_stages": 1 if target == AMD and kernel.startswith("delta") else stages[kernel],
    }
