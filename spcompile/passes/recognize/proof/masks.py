"""Masks as functions of i - j: values over intervals, and their readings.

A new kind (a band, say) is a new reading of the same pieces in `kind_of`; kinds that are not constant in
i - j (decay) need pieces whose value is an expression (`linear/weights.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from spcompile.passes.recognize.algebra.dims import Atom
from spcompile.passes.recognize.proof.context import INF

__all__ = [
    "Piece",
    "Pieces",
    "combine",
    "indicator",
    "keeps_every_row",
    "kind_of",
    "mapped",
    "triangle",
]


@dataclass(frozen=True)
class Piece:
    """The mask's value for every i, j with lo <= i - j <= hi: True/False, or a number (minus infinity is
    allowed)."""

    lo: int
    hi: int
    value: bool | float


Pieces = list[Piece]


def triangle(rows: Atom, cols: Atom, diagonal: int) -> Pieces:
    """j <= i + diagonal."""
    lo, hi = 1 - cols.size, rows.size - 1
    return _clip([Piece(lo, -diagonal - 1, False), Piece(-diagonal, hi, True)], lo, hi)


def _clip(pieces: Pieces, lo: int, hi: int) -> Pieces:
    out = [Piece(max(p.lo, lo), min(p.hi, hi), p.value) for p in pieces]
    return [p for p in out if p.lo <= p.hi]


# ---------------------------------------------------------------- reading pieces


def combine(f, a: Pieces, b: Pieces) -> Pieces:
    """f of two masks, over the common refinement of their pieces; equal neighbours are joined."""
    out: Pieces = []
    for p in a:
        for q in b:
            lo, hi = max(p.lo, q.lo), min(p.hi, q.hi)
            if lo <= hi:
                out.append(Piece(lo, hi, f(p.value, q.value)))
    joined: Pieces = []
    for p in sorted(out, key=lambda p: p.lo):
        if joined and joined[-1].value == p.value:
            joined[-1] = Piece(joined[-1].lo, p.hi, p.value)
        else:
            joined.append(p)
    return joined


def mapped(f, a: Pieces) -> Pieces:
    return combine(lambda x, _: f(x), a, [Piece(a[0].lo, a[-1].hi, True)])


def kind_of(pieces: Pieces | None) -> str:
    """Name a boolean mask: "all", "none", "causal" (j <= i), "anticausal" (j > i), or "general"."""
    if pieces is None or not all(isinstance(p.value, bool) for p in pieces):
        return "general"
    if len(pieces) == 1:
        return "all" if pieces[0].value else "none"
    if len(pieces) == 2 and pieces[1].lo == 0:
        return "causal" if pieces[1].value else "anticausal"
    return "general"


def indicator(pieces: Pieces | None) -> tuple[Pieces, float] | None:
    """A mask that multiplies, as (where it is not zero, its one other value); None if it has more values
    or unknown."""
    if pieces is None:
        return None
    others = {float(p.value) for p in pieces} - {0.0}
    if len(others) > 1 or any(abs(x) == INF for x in others):
        return None
    return mapped(lambda x: float(x) != 0.0, pieces), others.pop() if others else 1.0


def keeps_every_row(pieces: Pieces, rows: int, cols: int) -> bool:
    """Whether each row i in [0, rows) keeps some column: a run of kept d meets [i - cols + 1, i] for every
    i."""
    kept = sorted((p.lo, p.hi) for p in pieces if p.value)
    reach = 0  # the first row not yet shown to keep a key
    for lo, hi in kept:
        if max(lo, 0) <= reach:
            reach = max(reach, min(hi + cols, rows) if hi >= 0 or hi + cols > reach else reach)
    return reach >= rows
