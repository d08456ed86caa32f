"""What was compiled, kept for inspection: one record per graph of this process."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from spcompile.collectives import Group

__all__ = ["RECORDS", "Record", "pass_seconds"]


@dataclass
class Record:
    """One compiled graph.

    Args:
        group: the ranks it was compiled for.
        sites: what recognition saw (``spcompile.passes.recognize.Site``).
        gathers: gathers that a missing rule forced (``spcompile.passes.localize.GatherNote``).
        before, after: the joint graph's text before and after the passes.
        seconds: wall time by pass.
    """

    group: Group
    sites: list[Any] = field(default_factory=list)
    gathers: list[Any] = field(default_factory=list)
    before: str = ""
    after: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the time spent inside under ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


RECORDS: deque[Record] = deque(maxlen=64)
"""The graphs compiled last by this process."""


def pass_seconds() -> dict[str, float]:
    """Wall time that spcompile's passes have taken in this process, by pass."""
    total: dict[str, float] = {}
    for record in RECORDS:
        for name, seconds in record.seconds.items():
            total[name] = total.get(name, 0.0) + seconds
    return total
