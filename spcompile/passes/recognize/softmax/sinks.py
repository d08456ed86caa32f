"""Sinks: a column of logits beside those of the keys, which takes part in the softmax and is dropped.

    softmax([scores, sinks])[..., :-1]

A maximum of its row that is taken off the logits before changes nothing, in values and in gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from spcompile.passes.recognize.algebra.dims import Atom, Dims, align, resolve
from spcompile.passes.recognize.algebra.products import Factor, peel
from spcompile.passes.shadow import Value

__all__ = ["Sink", "read_sink", "without_maximum"]


@dataclass
class Sink:
    """A softmax with a sink."""

    softmax: Value
    logits: Value
    """Of the keys alone; its dims are those of what was read."""
    sinks: Factor
    path: list[Factor] = field(default_factory=list)
    """What was walked through, the softmax left out."""


def read_sink(v: Value, dims: Dims, keys: Atom) -> Sink | None:
    """Read the probabilities `v`, whose dims are named, as those of `keys` in a softmax of one logit more."""
    if v.name != "slice" or v.args["step"] != 1:
        return None
    whole, at = v.args["self"], v.args["dim"]
    size = v.shape[at]
    if resolve(dims[at]) != resolve((keys,)) or whole.shape[at] != size + 1:
        return None
    first = v.args["start"] == 0  # the keys stand before the sink
    extended = (*dims[:at], (Atom(size + 1),), *dims[at + 1 :])
    soft, soft_dims, path = peel(whole, extended)
    if soft.name != "softmax" or soft_dims != extended or soft.args["dim"] != at:
        return None
    joined, more = _joined(soft.args["self"], extended, at)
    if joined is None or joined.args["dim"] != at or len(joined.args["tensors"]) != 2:
        return None
    scores, sink = joined.args["tensors"] if first else joined.args["tensors"][::-1]
    if scores.shape[at] != size or sink.shape[at] != 1:
        return None
    of_sink = (*dims[:at], (), *dims[at + 1 :])
    source, source_dims, _ = peel(sink, align(of_sink, sink.shape))
    return Sink(soft, scores, Factor(source, source_dims), [Factor(v, dims), *path, *more])


def _joined(v: Value, dims: Dims, at: int) -> tuple[Value | None, list[Factor]]:
    """Back from the logits to the `cat` that put the sink there."""
    walked: list[Factor] = []
    while True:
        v, now, path = peel(v, dims)
        walked += path
        if now != dims:
            return None, walked
        walked.append(Factor(v, dims))
        if v.name == "cat":
            return v, walked
        off = without_maximum(v, at)
        if off is None:
            return None, walked
        v = off[0]
        walked += [Factor(x, ()) for x in off[1]]


def without_maximum(v: Value, dim: int) -> tuple[Value, list[Value]] | None:
    """``x`` where `v` is ``x - max(x over dim)``, and what makes the maximum."""
    if v.name != "add" or v.args.get("alpha", 1) != -1:
        return None
    x, top = v.args["self"], v.args["other"]
    if not isinstance(x, Value) or not isinstance(top, Value):
        return None
    made = []
    while top.name in ("getitem", "detach", "reshape", "clone"):
        if top.name == "getitem" and top.args["index"] != 0:
            return None
        made.append(top)
        top = top.args["self"]
        if not isinstance(top, Value):
            return None
    made.append(top)
    over = top.args.get("dim")
    over = [over] if isinstance(over, int) else over
    if top.name not in ("max", "amax") or top.args["self"] is not x or over is None or len(over) != 1:
        return None
    kept = made[0].shape
    same = len(kept) == len(v.shape) and kept[dim] == 1 and over[0] % len(v.shape) == dim
    return (x, made) if same and x.shape == v.shape else None
