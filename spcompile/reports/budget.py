"""What a rank must hold in all: parameters, gradients, optimizer state, inputs and the peak of activations.

And what follows: whether it fits a device, on how few ranks it would, and what two choices cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from spcompile.reports.memory import Memory
    from spcompile.reports.report import Report

__all__ = ["OPTIMIZERS", "Choice", "choices", "fewest_ranks", "parse_size", "total"]

OPTIMIZERS = {"adamw": 2, "sgd": 1, "none": 0}
"""Tensors of a parameter's size and dtype that an optimizer keeps; sgd is with momentum."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{u}B": n for u, n in _UNITS.items()} | {f"{u}iB": 1024**i for i, u in enumerate("KMGT", 1)}


def parse_size(text: str) -> int:
    """A number of bytes: "80GB" (10^9), "80GiB" (2^30), "1.5T" or a plain number.

    Raises:
        ValueError: it is none.
    """
    number = text.strip().rstrip("KMGTiBkgmtb ")
    unit = text.strip()[len(number) :].strip()
    known = {name.lower(): size for name, size in _UNITS.items()}
    if unit.lower() not in known or float(number) <= 0:
        raise ValueError(f"{text!r} is no size of memory; give one like 80GB or 40GiB")
    return int(float(number) * known[unit.lower()])


def total(report: Report, memory: Memory) -> int:
    """Bytes that a rank holds at most, when its activations take ``memory``."""
    fixed = report.parameters + report.inputs
    if memory.saved or memory.backward:
        fixed += report.trained * (1 + OPTIMIZERS[report.optimizer])
    return fixed + max(memory.forward, memory.backward)


def fewest_ranks(report: Report, limit: int) -> int | None:
    """The fewest ranks of which each takes at most ``limit`` bytes; None if no number does.

    A number is tried by sharding the graphs for it; the next to try is the one at which whole + shared / P
    meets the limit.
    """
    here, alone = report.memory, report.alone
    assert here is not None and alone is not None, "only a report of explain knows its memory"
    sizes = {1: total(report, alone), report.ranks: total(report, here)}
    most = max((r.sequence[0] for r in report.records if r.sequence), default=report.ranks)

    def size(ranks: int) -> int:
        if ranks not in sizes:
            sizes[ranks] = total(report, report.memory_on(ranks))
        return sizes[ranks]

    return _search(size, limit, most, report.ranks)


def _search(size: Callable[[int], int], limit: int, most: int, first: int) -> int | None:
    """The least number of 1 to ``most`` whose size is at most ``limit``; sizes fall as the number grows."""
    if size(1) <= limit:
        return 1
    if most < 2:
        return None
    low, tried = 1, max(2, min(first, most))
    high: int | None = None
    while high is None or high - low > 1:
        if size(tried) <= limit:
            high = tried
        else:
            low = tried
        if low >= most:
            return None
        guess = _meets(size, high or low, limit, most)
        tried = min(max(guess, low + 1), most if high is None else high - 1)
        if high is None and tried < 2 * low:
            tried = min(2 * low, most)
    return high


def _meets(size: Callable[[int], int], ranks: int, limit: int, most: int) -> int:
    """Where whole + shared / P meets the limit, by the sizes at one rank and at ``ranks``."""
    if ranks == 1:
        return 2
    shared = (size(1) - size(ranks)) / (1 - 1 / ranks)
    whole = size(ranks) - shared / ranks
    return most if limit <= whole else max(2, -int(-shared // (limit - whole)))


class Choice(NamedTuple):
    """Something that could be otherwise: what it costs now, and what to do instead."""

    what: str
    costs: str
    instead: str


def choices(report: Report) -> list[Choice]:
    """What keeping gathered keys and values costs, and what returning whole outputs does."""
    from spcompile.reports.tables import human

    def received(phase: str, *purposes: str) -> int:
        return sum(
            c.count * c.bytes for c in report.collectives if c.phase == phase and c.purpose in purposes
        )

    found = []
    keys = ("softmax: keys and values", "softmax: keys and values again")
    # Beyond its own part a rank keeps what it received and does not receive again.
    again = received("backward", *keys)
    kept = received("forward", *keys) - again
    if again:
        costs, instead = f"{human(again)} more is received", f"regather=False saves {human(again)} more"
        found.append(Choice("keys and values are gathered again", costs, instead))
    if kept > 0 and report.memory is not None and report.memory.saved:
        costs, instead = f"{human(kept)} more is saved", f"regather=True receives {human(kept)} again"
        found.append(Choice("keys and values are kept for the backward", costs, instead))
    moved = received("forward", "output")
    if moved:
        costs = f"{human(moved)} is received, {human(moved * report.ranks / (report.ranks - 1))} held"
        found.append(
            Choice("outputs are returned whole", costs, "return only what is used, such as the loss")
        )
    return found
