"""Operations that pick and place entries along one dim: select, slice, flip, cat, stack, roll, zero padding.

    out[.., o, ..] = sum_picks x[.., step * o + offset, ..], 0 where x has no such entry

One table for all who read them: masks follow an index through a `Pick`, loops make a matrix of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from spcompile.passes.shadow import Value

__all__ = ["PICKS", "Pick", "joined", "picks"]


@dataclass(frozen=True)
class Pick:
    """Entry o of the result's dim is entry ``step * o + offset`` of the source's, modulo ``wrap`` if given.

    A dim that the result lacks (`select`) or the source (`stack`) counts as one of a single entry there.
    """

    source: Value
    dim: int
    step: int
    offset: int
    lacks: str = ""
    """"result" or "source"."""
    wrap: int = 0

    def index(self, index: Sequence[Any]) -> tuple[Any, ...]:
        """Of the source's entry, from that of the result's."""
        d = self.dim
        o, after = (0, d) if self.lacks == "result" else (index[d], d + 1)
        place = () if self.lacks == "source" else (self.step * o + self.offset,)
        return (*index[:d], *place, *index[after:])


def picks(v: Value) -> list[Pick] | None:
    """The picks whose sum `v` is; None if it is no such sum."""
    reader = PICKS.get(v.name)
    return None if reader is None else reader(v)


def joined(parts: Sequence[Value], dim: int) -> list[Pick]:
    """What is cut at the ends of the parts, in their order."""
    out, at = [], 0
    for x in parts:
        out.append(Pick(x, dim, 1, -at))
        at += x.shape[dim]
    return out


def _select(v: Value) -> list[Pick]:
    return [Pick(v.args["self"], v.args["dim"], 1, v.args["index"], lacks="result")]


def _slice(v: Value) -> list[Pick]:
    dim, start, step = (v.args[n] for n in ("dim", "start", "step"))
    return [Pick(v.args["self"], dim, step, start)]


def _flip(v: Value) -> list[Pick]:
    (dim,) = v.args["dims"]  # one at a time, as the shadow spells it
    return [Pick(v.args["self"], dim, -1, v.shape[dim] - 1)]


def _cat(v: Value) -> list[Pick]:
    return joined(v.args["tensors"], v.args["dim"])


def _stack(v: Value) -> list[Pick]:
    return [Pick(x, v.args["dim"], 1, -n, lacks="source") for n, x in enumerate(v.args["tensors"])]


def _roll(v: Value) -> list[Pick] | None:
    shifts, over = v.args["shifts"], v.args.get("dims", [])
    if len(shifts) != 1 or len(over) != 1:
        return None
    dim = over[0] % len(v.shape)
    return [Pick(v.args["self"], dim, 1, -shifts[0], wrap=v.shape[dim])]


def _pad(v: Value) -> list[Pick] | None:
    pad = v.args["pad"]
    changed = [n for n in range(0, len(pad), 2) if pad[n] or pad[n + 1]]
    if len(changed) != 1 or v.args.get("value") or v.args.get("mode", "constant") != "constant":
        return None
    return [Pick(v.args["self"], len(v.shape) - 1 - changed[0] // 2, 1, -pad[changed[0]])]


PICKS: dict[str, Callable[[Value], list[Pick] | None]] = {
    "select": _select,
    "slice": _slice,
    "flip": _flip,
    "cat": _cat,
    "stack": _stack,
    "roll": _roll,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
}
"""By op name."""
