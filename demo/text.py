"""Training text: the bytes of Python's own standard library, or of a file."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor


def read(path: str | None, limit: int = 4_000_000) -> Tensor:
    """Up to `limit` bytes of text, uint8 [N].

    Args:
        path: a file; None for the sources in the standard library's own folder, in the order of their names.
    Raises:
        ValueError: there is no text there.
    """
    if path is not None:
        data = Path(path).read_bytes()[:limit]
    else:
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        data = b"".join(source.read_bytes() for source in sources)[:limit]
    if not data:
        raise ValueError(f"no text in {path or 'the standard library: its sources are not installed'}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def batches(text: Tensor, length: int, count: int, seed: int) -> list[Tensor]:
    """`count` random windows of `text`, int64 [1, length]: the same on every rank and in every run of `seed`.

    Raises:
        ValueError: the text is shorter than a window.
    """
    if len(text) <= length:
        raise ValueError(f"the text has {len(text)} bytes, a window needs more than {length}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length, (count,), generator=generator).tolist()
    return [text[start : start + length].long()[None] for start in starts]
