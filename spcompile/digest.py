"""A number for the values of a tensor: equal for equal values, different (all but surely) for others.

The tensor's memory is read as 64-bit words w_0, w_1, ... in the order of its indices, piece by piece, and

    digest = sum over pieces p of K^p * sum over j of (w_j xor (w_j >> 32)) * c_j       (mod 2^64)

with fixed pseudo-random c_j. The shift folds the upper half of a word into the lower one: without it a change
of sign in an even number of float64 would go unseen, since 2^63 times an even number is 0. The order of a
device's reductions does not matter, because integers wrap around: every rank gets the same bits.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["digest", "sketch"]

# Words in a piece: few kernel launches on a GPU, all in the cache of a CPU.
_WORDS = {"cpu": 2**15}
_MOST = 2**19
_K = 0x9E3779B97F4A7C15 - 2**64


@functools.cache
def _constants(device: torch.device) -> Tensor:
    """c_j: splitmix64 of j, as int64."""
    with torch.inference_mode(False):
        z = torch.arange(1, _words(device) + 1) * _K
        for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
            z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return (z ^ ((z >> 31) & ((1 << 33) - 1))).to(device)


def _words(device: torch.device) -> int:
    return _WORDS.get(device.type, _MOST)


def digest(x: Tensor) -> Tensor:
    """The digest of ``x``: an int64 of no dims on its device. It depends on shape, dtype and values alone.

    NaN and -0.0 count by their bits. Whatever the strides are, no more than a few MB are copied at a time.
    """
    with torch.no_grad():
        x = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()
        constants = _constants(x.device)
        most = constants.numel() * 8 // x.element_size()
        head = hashlib.sha256(f"{tuple(x.shape)} {x.dtype}".encode()).digest()
        total = torch.full((), int.from_bytes(head[:8], "big", signed=True), device=x.device)
        for piece in _pieces(x, most):
            words = _as_words(piece)
            total = total * _K + ((words ^ (words >> 32)) * constants[: words.numel()]).sum()
        return total


def _pieces(x: Tensor, most: int) -> Iterator[Tensor]:
    """Parts of at most ``most`` entries, in the order of the indices; the same ones for any strides."""
    if x.numel() <= most:
        if x.numel():
            yield x
        return
    dim = next(d for d, size in enumerate(x.shape) if size > 1)
    step = max(1, most // (x.numel() // x.shape[dim]))
    for part in x.split(step, dim):
        yield from _pieces(part, most)


def _as_words(x: Tensor) -> Tensor:
    """The bits of ``x`` as a line of int64, filled up with zeros."""
    x = x.resolve_neg().contiguous()
    missing = -x.numel() * x.element_size() % 8
    if missing:
        return F.pad(x.view(-1).view(torch.uint8), (0, missing)).view(torch.int64)
    return (x.clone() if x.data_ptr() % 8 else x).view(-1).view(torch.int64)


def sketch(x: Tensor) -> tuple[float, list[float]]:
    """The norm of ``x``, and four sums of its entries with fixed pseudo-random signs.

    By them two floating tensors can be told apart that differ in more than rounding, without sending them.
    """
    norm, sums = 0.0, [0.0] * 4
    with torch.no_grad():
        constants = _constants(x.device)
        for piece in _pieces(x.detach(), constants.numel()):
            line = piece.reshape(-1).double()
            norm += float(line.square().sum())
            for lane in range(4):
                signs = 1 - 2 * ((constants[: line.numel()] >> (40 + lane)) & 1)
                sums[lane] += float((line * signs).sum())
    return norm**0.5, sums
