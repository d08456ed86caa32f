"""What FlexAttention is told of a call: ``mask_mod``, ``score_mod`` and the block mask (see ``flex.py``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile.kernels.scan import state_dtype
from spcompile.kernels.softmax.operands import Options

__all__ = ["BLOCK", "Given", "blocks_of", "given_of", "modifications"]

# Rows and keys of a block of the block mask: the kernels' tiles divide it.
BLOCK = 128

# An entry so far below its row's largest hides its key: no real score makes up for it, and exp of it is 0.
_HIDDEN = -1e30


class Given(NamedTuple):
    """The tensors that the modifications read."""

    first: Tensor  # []: the position of row 0 among the keys
    mask: Tensor | None = None  # bool or additive, 4-D; dims of size 1 are broadcast
    top: Tensor | None = None  # [., ., R or 1, 1]: the largest additive entry that each row sees, finite
    documents: Tensor | None = None  # [B or 1, S]: of each key
    relative: Tensor | None = None  # [H or 1, 2 L - 1]: added to a score by distance
    prefixes: Tensor | None = None  # [B or 1, S]: of each key


def _band(options: Options) -> tuple[int | None, int | None]:
    """Row i, at position p, sees key j only where ``low <= p - j < high``; None: no bound."""
    window = options.window
    return 0 if options.causal else None if window is None else 1 - window, window


def _within(distance: Tensor, band: tuple[int | None, int | None]) -> Tensor:
    """Which distances p - j the band allows; any shape that broadcasts to theirs."""
    low, high = band
    seen = distance.new_ones((), dtype=torch.bool)
    seen = seen if low is None else seen & (distance >= low)
    return seen if high is None else seen & (distance < high)


def _entry(x: Tensor, *at: Tensor) -> Tensor:
    """x[b, h, i, j]; dims of size 1 are broadcast."""
    return x[tuple(torch.zeros_like(n) if size == 1 else n for n, size in zip(at, x.shape, strict=True))]


def modifications(options: Options, given: Given) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(mask_mod, score_mod) of a call: the only place that says what a mask or an option means.

    d score_mod / d score is 1, but for a soft cap: what changes it needs a line in ``flex._gradients`` too.
    """
    band, (first, mask, top, documents, relative, prefixes) = _band(options), given

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = _within(first + i - j, band)
        if prefixes is not None:
            own = _entry(prefixes, b, (first + i).clamp(max=prefixes.shape[1] - 1))
            seen = seen | ((own == _entry(prefixes, b, j)) & (own >= 0))
        if documents is not None:
            own = (first + i).clamp(max=documents.shape[1] - 1)
            seen = seen & (_entry(documents, b, own) == _entry(documents, b, j))
        if mask is not None and top is None:
            seen = seen & _entry(mask, b, h, i, j)
        return seen

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if options.soft_cap is not None:
            score = options.soft_cap * torch.tanh(score / options.soft_cap)
        if relative is not None:
            at = (relative.shape[1] // 2 + first + i - j).clamp(0, relative.shape[1] - 1)
            score = score + _entry(relative, h, at).to(score.dtype)
        if mask is not None and top is not None:  # the NOTE in flex.py: in this order
            score = (score + _entry(mask, b, h, i, j).to(top.dtype)) - _entry(top, b, h, i, j)
        return score

    return mask_mod, score_mod


def _distances(first: Tensor, rows: int, keys: int, step: int = 1) -> Tensor:
    """p - j of every so many rows and keys; Inductor makes it where it is read."""
    places = (torch.arange(0, length, step, device=first.device) for length in (rows, keys))
    p, j = places
    return first + p[:, None] - j


def _own(ids: Tensor, given: Given, rows: int) -> Tensor:
    """The number of each row, [B or 1, rows]; behind the keys that of the last."""
    return ids[:, (given.first + torch.arange(rows, device=ids.device)).clamp(max=ids.shape[1] - 1)]


def _structure(options: Options, given: Given, rows: int, keys: int) -> Tensor:
    """Which keys each row may see by its place and numbers, [rows, keys] or [B or 1, 1, rows, keys]."""
    seen = _within(_distances(given.first, rows, keys), _band(options))
    if given.prefixes is not None:
        own = _own(given.prefixes, given, rows).unsqueeze(2)
        seen = seen | ((own == given.prefixes.unsqueeze(1)) & (own >= 0)).unsqueeze(1)
    if given.documents is None:
        return seen
    own = _own(given.documents, given, rows).unsqueeze(2)
    return seen & (own == given.documents.unsqueeze(1)).unsqueeze(1)


def given_of(options: Options, q: Tensor, k: Tensor, mask: Tensor | None, given: Given) -> Given:
    """What the modifications of a call read: what is given, and the mask."""
    if mask is None:
        return given
    given = given._replace(mask=mask[(None,) * (4 - mask.dim())])
    assert given.mask is not None
    if mask.dtype == torch.bool:
        return given
    entries, seen = given.mask.to(state_dtype(q.dtype)), _structure(options, given, q.shape[2], k.shape[2])
    top = torch.where(seen, entries, -torch.inf).amax(-1, keepdim=True)
    return given._replace(top=torch.where(top == -torch.inf, 0.0, top))


def blocks_of(options: Options, q: Tensor, k: Tensor, given: Given) -> tuple[Tensor, ...]:
    """The block mask by rows: numbers and indices of the blocks in part visible, and of those all visible."""
    rows, keys, (low, high) = q.shape[2], k.shape[2], _band(options)
    if given.mask is None:
        # The distances in a block are all from nearest to farthest.
        corner = _distances(given.first, rows, keys, BLOCK)
        nearest, farthest = corner - (BLOCK - 1), corner + (BLOCK - 1)
        # One that sticks out is taken for one that is visible in part.
        inside = [torch.arange(BLOCK, n + BLOCK, BLOCK, device=q.device) <= n for n in (rows, keys)]
        some = _within(farthest, (low, None)) & _within(nearest, (None, high)) & (corner == corner)
        whole = _within(nearest, (low, None)) & _within(farthest, (None, high))
        whole = whole & inside[0][:, None] & inside[1]
        some, whole = some[None, None], whole[None, None]
        if given.prefixes is not None:
            meet, alike = _meet(given.prefixes, given, rows, least=0)
            some, whole = some | meet, whole | (alike & inside[0][:, None] & inside[1])
        if given.documents is not None:
            meet, alike = _meet(given.documents, given, rows)
            some, whole = some & meet, whole & alike
    else:
        seen = _structure(options, given, rows, keys) & _allowed(given)
        seen = seen.expand(*seen.shape[:2], rows, keys)
        padded = F.pad(seen, (0, -keys % BLOCK, 0, -rows % BLOCK))
        number = padded.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).sum((3, 5), dtype=torch.int32)
        some, whole = number > 0, number == BLOCK * BLOCK
    return *_listed(some & ~whole), *_listed(whole)


def _meet(ids: Tensor, given: Given, rows: int, least: int | None = None) -> tuple[Tensor, Tensor]:
    """Of each block of rows and of keys, whether the least and largest of their numbers leave room for a
    common one, and whether all are one; [B or 1, 1, blocks of rows, blocks of keys].

    Args:
        least: numbers below it are none.
    """

    def ends(ids: Tensor) -> tuple[Tensor, Tensor]:
        length = ids.shape[1]  # the last block is filled up with the last token's
        filled = torch.arange(length + -length % BLOCK, device=ids.device).clamp(max=length - 1)
        blocks = ids[:, None, filled].unflatten(2, (-1, BLOCK))
        return blocks.amin(3), blocks.amax(3)

    low, high = (x.unsqueeze(3) for x in ends(_own(ids, given, rows)))
    first, last = (x.unsqueeze(2) for x in ends(ids))
    meet, alike = (low <= last) & (first <= high), (low == high) & (first == last) & (low == first)
    return (
        (meet, alike) if least is None else (meet & (high >= least) & (last >= least), alike & (low >= least))
    )


def _allowed(given: Given) -> Tensor:
    """What the mask lets a row see: an additive one hides what is far below the row's largest entry."""
    mask, top = given.mask, given.top
    assert mask is not None
    return mask if top is None else mask.to(top.dtype) - top > _HIDDEN


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row of blocks are True, and their indices before the others'."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)
