"""What a user may choose for all benchmarks, and the types that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

Row = dict[str, Any]  # one measurement, a line of the CSV file
Table = tuple[str, list[str], list[list[Any]]]  # title, heads, body


@dataclass(frozen=True)
class Options:
    """
    Args:
        quick: few lengths and short timings.
        max_seq: the longest sequence.
        threads: of each rank; None shares the cores evenly.
        budget: seconds of repeats for each measurement.
        square_limit: bytes of T x T tensors above which eager and Inductor are not tried.
        backend: measured in the place of spcompile.
        log: takes messages about failures.
        static: nothing is run on a GPU.
        before: a folder with an earlier checkout to measure beside this one, where a benchmark can.
    """

    quick: bool
    max_seq: int
    threads: int | None
    budget: float
    square_limit: int
    backend: str
    log: Callable[[str], None]
    static: bool = False
    before: str | None = None


class Benchmark(Protocol):
    """A row of the registry."""

    @property
    def title(self) -> str: ...

    def plan(self, options: Options) -> list[Any]:
        """The steps, in order."""

    def measure(self, step: Any, options: Options) -> Row:
        """Take one step. A failure is a row with a `note`."""

    def tables(self, rows: list[Row]) -> list[Table]:
        """What to print."""

    def plots(self, rows: list[Row]) -> list[Any]:
        """(title, y label, {line: (T, y)}) for each picture, logarithmic on both axes."""
