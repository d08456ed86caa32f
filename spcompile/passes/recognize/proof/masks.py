"""Masks as functions of i - j: values over intervals, and their readings.

A new kind (a band, say) is a new reading of the same spans in `kind_of`; kinds that are not constant in
i - j (decay) have spans whose value is an expression (`linear/weights.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spcompile.passes.recognize.algebra.dims import Atom
from spcompile.passes.recognize.proof.context import INF

__all__ = [
    "Span",
    "Spans",
    "combine",
    "indicator",
    "keeps_every_row",
    "kind_of",
    "mapped",
    "triangle",
]


@dataclass(frozen=True)
class Span:
    """The value wherever lo <= i - j <= hi: True or False, a number (minus infinity is allowed), or
    a decay's expression in i and j."""

    lo: int
    hi: int
    value: Any


Spans = list[Span]


def triangle(rows: Atom, cols: Atom, diagonal: int) -> Spans:
    """j <= i + diagonal."""
    lo, hi = 1 - cols.size, rows.size - 1
    return _clip([Span(lo, -diagonal - 1, False), Span(-diagonal, hi, True)], lo, hi)


def _clip(spans: Spans, lo: int, hi: int) -> Spans:
    out = [Span(max(p.lo, lo), min(p.hi, hi), p.value) for p in spans]
    return [p for p in out if p.lo <= p.hi]


# ---------------------------------------------------------------- reading spans


def combine(f, a: Spans, b: Spans) -> Spans:
    """f of two masks, over the common refinement of their spans; equal neighbours are joined."""
    out: Spans = []
    for p in a:
        for q in b:
            lo, hi = max(p.lo, q.lo), min(p.hi, q.hi)
            if lo <= hi:
                out.append(Span(lo, hi, f(p.value, q.value)))
    joined: Spans = []
    for p in sorted(out, key=lambda p: p.lo):
        if joined and joined[-1].value == p.value:
            joined[-1] = Span(joined[-1].lo, p.hi, p.value)
        else:
            joined.append(p)
    return joined


def mapped(f, a: Spans) -> Spans:
    return combine(lambda x, _: f(x), a, [Span(a[0].lo, a[-1].hi, True)])


def kind_of(spans: Spans | None) -> str:
    """Name a boolean mask: "all", "none", "causal" (j <= i), "anticausal" (j > i), or "general"."""
    if spans is None or not all(isinstance(p.value, bool) for p in spans):
        return "general"
    if len(spans) == 1:
        return "all" if spans[0].value else "none"
    if len(spans) == 2 and spans[1].lo == 0:
        return "causal" if spans[1].value else "anticausal"
    return "general"


def indicator(spans: Spans | None) -> tuple[Spans, float] | None:
    """A mask that multiplies, as (where it is not zero, its one other value); None if it has more values
    or unknown."""
    if spans is None:
        return None
    others = {float(p.value) for p in spans} - {0.0}
    if len(others) > 1 or any(abs(x) == INF for x in others):
        return None
    return mapped(lambda x: float(x) != 0.0, spans), others.pop() if others else 1.0


def keeps_every_row(spans: Spans, rows: int, cols: int) -> bool:
    """Whether each row i in [0, rows) keeps some column: a run of kept d meets [i - cols + 1, i] for every
    i."""
    kept = sorted((p.lo, p.hi) for p in spans if p.value)
    reach = 0  # the first row not yet shown to keep a key
    for lo, hi in kept:
        if max(lo, 0) <= reach:
            reach = max(reach, min(hi + cols, rows) if hi >= 0 or hi + cols > reach else reach)
    return reach >= rows
