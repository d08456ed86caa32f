"""Placements: how one tensor lies on the ranks of the sequence axis (docs/how_it_works.md draws them).

A *position* is an index into the padded sequence, 0 <= p < P * block; rank r holds positions
[r * block, (r + 1) * block) of every sharded tensor, whatever its length. This is why a slice or a pad along
the sequence moves no data: it only renames which positions are valid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from spcompile.sizes import Sized, at, expression, hint

__all__ = [
    "Order",
    "Partial",
    "Placement",
    "Replicate",
    "Routed",
    "Shard",
    "Sharding",
    "Unread",
    "local_shape",
    "reshape_shard",
    "same_blocks",
]


@dataclass(frozen=True)
class Replicate:
    """The same on every rank."""

    def __str__(self) -> str:
        return "Replicate"


@dataclass(frozen=True)
class Partial:
    """Every rank holds a term; the tensor is their ``op`` ("sum", "max", "min" or "product")."""

    op: str = "sum"

    def __str__(self) -> str:
        return f"Partial({self.op})"


@dataclass(frozen=True, eq=False)
class Shard(Sized):
    """Dim ``dim``, seen as [outer, length], holds the sequence; a rank has ``block`` of its positions.

    Element i of the sequence stands at position start + i. ``outer`` is what a view merged into the dim from
    before ([B, T] -> [B * T] has outer = B). What it merged from behind makes the positions finer ([T, H] ->
    [T * H] is a sequence of T * H, in blocks of H times as many), and a view into chunks makes them coarser:
    the ranks' parts stay the same memory. A local tensor's dim has outer * block entries; those at positions
    outside [start, start + length) are padding. All sizes may be symbolic (``sizes.py``).
    """

    dim: int
    length: int
    block: int
    start: int = 0
    outer: int = 1

    def __str__(self) -> str:
        merged = f", outer={self.outer}" * (hint(self.outer) > 1)
        shifted = f", start={self.start}" * (hint(self.start) != 0)
        return f"Shard({self.dim}, {self.length}/{self.block}{merged}{shifted})"

    def expressions(self) -> Shard:
        """The same with expressions in the place of symbolic sizes: it can be kept."""
        return self._with(expression)

    def at_sizes(self, values: Mapping[Any, int]) -> Shard:
        """One of expressions, where their symbols have these values."""
        return self._with(lambda size: at(size, values))

    def _with(self, change: Callable[[Any], Any]) -> Shard:
        return Shard(self.dim, *map(change, (self.length, self.block, self.start, self.outer)))

    def at(self, dim: int) -> Shard:
        """The same block of the sequence on another dim (of another tensor)."""
        return self if dim == self.dim else replace(self, dim=dim)

    def window(self, start: int, length: int) -> Shard:
        """The same positions, of which others are valid."""
        return replace(self, start=start, length=length)

    def unshifted(self) -> Shard:
        """The placement that a computed tensor is given: its first element at position 0."""
        return self if self.start == 0 else replace(self, start=0)

    def holds_all(self, ranks: int) -> bool:
        """Whether every valid element is on some rank (a pulled window may leave some out)."""
        return self.start >= 0 and self.start + self.length <= ranks * self.block

    def padded(self, ranks: int) -> bool:
        """Whether some position that a rank holds is not valid."""
        return self.start > 0 or self.start + self.length < ranks * self.block


@dataclass(frozen=True)
class Order:
    """The order in which a sort puts the entries of its operand, a vector of slots (a token has one or more).

    ``sort`` is the name of its node. ``ids`` names what it sorts where that is known to be integers >= 0 and
    ascending, so that entries of one id lie together, the ids before them being smaller; else it is None.
    """

    sort: str
    ids: str | None = None

    def __str__(self) -> str:
        return self.sort


@dataclass(frozen=True)
class Routed:
    """Dim ``slots.dim`` is in the order of a sort; each rank has the entries of the slots that it holds.

    The slots lie on the ranks as ``slots`` says, and each rank has sorted its own (padding is last). Entry p
    of its part is the entry of the whole tensor at the place where the sort of all ranks' slots has the one
    that is p-th on this rank. So it is a permutation of a rank's own slots: what acts on each entry by itself
    acts on it as on any shard, and nothing crosses the ranks on the way there or back.
    """

    order: Order
    slots: Shard

    def __str__(self) -> str:
        return f"Routed({self.order}, {self.slots})"

    @property
    def dim(self) -> int:
        """The dim in the sort's order."""
        return self.slots.dim

    def at(self, dim: int) -> Routed:
        """The same entries on another dim (of another tensor)."""
        return replace(self, slots=self.slots.at(dim))

    def padded(self, ranks: int) -> bool:
        """Whether some entry that a rank holds is not valid."""
        return self.slots.padded(ranks)


@dataclass(frozen=True)
class Unread:
    """Of an operand that a rank does not need: what it would read there it knows from elsewhere."""

    def __str__(self) -> str:
        return "Unread"


Sharding = Shard | Routed
Placement = Replicate | Shard | Partial | Routed | Unread


def same_blocks(a: Shard, b: Shard) -> bool:
    """Whether two placements of a tensor differ by a shift at most."""
    return (a.dim, a.block, a.outer) == (b.dim, b.block, b.outer)


def local_shape(shape: tuple[int, ...], placement: Placement) -> tuple[int, ...]:
    """The shape on each rank of a tensor of global ``shape``."""
    if isinstance(placement, Routed):
        return local_shape(shape, placement.slots)
    if not isinstance(placement, Shard):
        return tuple(shape)
    dim = placement.dim
    assert shape[dim] == placement.outer * placement.length, (shape, placement)
    return (*shape[:dim], placement.outer * placement.block, *shape[dim + 1 :])


def reshape_shard(shard: Shard, source: tuple[int, ...], target: tuple[int, ...]) -> Shard | None:
    """Where the sequence of a tensor of shape ``source`` lies once viewed as ``target``; None if it is cut.

    Row-major order makes the flat index (o * T + t) * I + i, with O entries of o before the sequence and I of
    i after. A target dim with b entries before it and a after it holds the sequence whole iff b divides O and
    I / a times as many positions are a whole number, of the sequence and of each rank: fewer where a view
    cuts the sequence into chunks (which the blocks must be multiples of), more where it merges dims into it.
    A sequence of length 1 could be any dim of length 1, so it is never matched.
    """
    if shard.length <= 1:
        return None
    before = prod(source[: shard.dim]) * shard.outer
    after = prod(source[shard.dim + 1 :])
    for dim, size in enumerate(target):
        ahead, behind = (max(prod(sizes), 1) for sizes in (target[:dim], target[dim + 1 :]))
        scaled = [x * after for x in (shard.length, shard.block, shard.start)]
        if before % ahead or any(x % behind for x in scaled):
            continue
        outer, (length, block, start) = before // ahead, (x // behind for x in scaled)
        if size == outer * length and length > 1:
            return Shard(dim, length, block, start, outer)
    return None
