"""What a way across the ranks costs, as expressions; and by them, how long each would take.

    seconds = latency * sends + received / bandwidth + work of the slowest rank / rate

Sends and bytes are a strategy's own (``strategies/table.py``), in each direction. Work is counted of softmax
attention alone, ``2 B H (K + V) b T`` multiplications and additions times the slowest rank's share of its
keys, two and a half times that in the backward: of linear attention every rank has as much as any other. What
an exchange hides behind is not taken off, so ways that overlap more are better than they look.

Symbols: P ranks, b tokens on each, B, H query heads, G key heads, K, V, w bytes an element, A elements of a
state's transition, n slices of a state, c 1 if causal, else 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from spcompile.strategies.table import LINEAR, SOFTMAX, Strategy

__all__ = ["MACHINES", "Machine", "Sizes", "Way", "parsed", "predicted", "received", "ways"]


@dataclass(frozen=True)
class Machine:
    """What ranks run on.

    Attributes:
        latency: seconds that a collective or a send takes, however small it is.
        bandwidth: bytes a second that one rank receives.
        rate: multiplications and additions a second of one rank in softmax attention.
    """

    latency: float
    bandwidth: float
    rate: float


MACHINES = {"cpu": Machine(3e-4, 1.5e9, 3e10), "cuda": Machine(2e-5, 2e11, 3e14)}
"""Round numbers, by device: Gloo on loopback with a core a rank, and NCCL on NVLink with an H100 a rank."""


@dataclass(frozen=True)
class Sizes:
    """Of one attention; the module's symbols."""

    P: int
    b: int
    B: int
    H: int
    G: int
    K: int
    V: int
    w: int
    A: int = 0
    n: int = 1
    c: int = 1

    def values(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


@dataclass(frozen=True)
class Way:
    """Attention of one size in a report.

    Attributes:
        kind: "linear" or "softmax".
        count: how many there are.
        taken: the strategy that they take.
        sizes: of each.
        seconds: of a step of one of them, as predicted, by strategy, the fastest first.
    """

    kind: str
    count: int
    taken: str
    sizes: Sizes
    seconds: dict[str, float]


@cache
def parsed(text: str) -> Any:
    """A formula of the table: factors beside each other are multiplied.

    Returns:
        A sympy expression.
    """
    import sympy

    known: dict[str, Any] = {name: sympy.Symbol(name) for name in "PTbBDEHGKVNnwAc"}
    known |= {"ceil": sympy.ceiling, "log2": lambda x: sympy.log(x, 2)}
    return sympy.sympify(text.replace(" ", "*"), locals=known)


def _number(text: str, values: Mapping[str, int]) -> float:
    return float(parsed(text).subs(dict(values)))


def received(row: Strategy, sizes: Sizes) -> tuple[float, float]:
    """Bytes that one rank receives, forward and backward."""
    values = sizes.values()
    forward, backward = (
        sum(_number(count, values) * _number(size, values) for count, size in crossing)
        for crossing in (row.forward, row.backward)
    )
    return forward, backward


def predicted(row: Strategy, sizes: Sizes, machine: Machine) -> float:
    """Seconds of a step, forward and backward, of this attention and its exchanges on the slowest rank."""
    if sizes.P == 1:
        return _work(row, sizes) / machine.rate
    values = sizes.values()
    sends = sum(_number(count, values) for count, _ in (*row.forward, *row.backward))
    moved = sum(received(row, sizes)) / machine.bandwidth
    return sends * machine.latency + moved + _work(row, sizes) / machine.rate


def _work(row: Strategy, sizes: Sizes) -> float:
    if not row.share:
        return 0.0
    values = sizes.values()
    return 3.5 * _number("2 B H (K+V) b b P", values) * _number(row.share, values)


def ways(kind: str, sizes: Sizes, machine: Machine) -> dict[str, float]:
    """Seconds by each way, the fastest first."""
    rows = {"linear": LINEAR, "softmax": SOFTMAX}[kind]
    found = {name: predicted(row, sizes, machine) for name, row in rows.items()}
    return dict(sorted(found.items(), key=lambda item: item[1]))
