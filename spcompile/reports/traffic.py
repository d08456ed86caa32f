"""What crosses ranks: the collectives of a graph, why each is there, and its bytes as a formula.

Bytes are those that one rank receives. An all-gather or a reduce-scatter receives P-1 parts; an all-reduce is
counted as the two of them that a ring makes of it. Formulas are written from what the passes meant to send
(`Purpose`), bytes are measured on the graph, and a formula is printed only where both agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import fx

from spcompile import collectives  # noqa: F401  (registers its operators)
from spcompile.costs import parsed
from spcompile.phases import backward_of
from spcompile.placement import Partial, Placement, Shard
from spcompile.sizes import hint
from spcompile.source import source_of
from spcompile.strategies import LINEAR, SOFTMAX
from spcompile.strategies.linear_pipelined import slices_of

__all__ = ["Collective", "Purpose", "Transfer", "rows", "transfers"]

_c10d = torch.ops._c10d_functional
_NAMES = {
    _c10d.all_gather_into_tensor.default: "all_gather",
    _c10d.all_reduce.default: "all_reduce",
    _c10d.reduce_scatter_tensor.default: "reduce_scatter",
    _c10d.all_to_all_single.default: "all_to_all",
    torch.ops.spcompile.start_shift.default: "shift",
    torch.ops.spcompile.start_mirror.default: "mirror",
}
_TO_ONE = ("shift", "mirror")  # sent to one rank, and not to all
_PARTS = ("reduce_scatter", "all_to_all")  # of what a rank has, a part to each


class Purpose(NamedTuple):
    """Why a pass emitted a node: plain facts, of which text is made only when somebody asks."""

    op: str
    """The operator whose tensor it is, or "gradients" for a bucket of them."""
    consumer: str = ""
    """The operator that asked for it; "output" if the graph returns it."""
    whole: bool = False
    """The consumer cannot be sharded and is computed whole."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Global shapes: of the operator's operands (of an attention operator () for one that is None), or of
    the one tensor that moves."""
    have: Placement | None = None
    want: Placement | None = None
    mark: Shard | None = None
    """Where that tensor carries the sequence, if it does."""
    edges: int = 0
    """Of an attention under a window: so many of the neighbours' tokens do, where that is less than all."""


class Transfer(NamedTuple):
    """One collective of a graph, as found."""

    op: str
    phase: str
    ranks: int
    elements: int
    """Of this rank's input."""
    itemsize: int
    purpose: Purpose | None
    stack: str
    batch: int | None = None
    """Of the model, where it is known."""

    @property
    def bytes(self) -> int:
        """Received by one rank."""
        size, P = self.elements * self.itemsize, self.ranks
        if self.op in _TO_ONE:
            return size
        if self.op == "all_reduce":
            return round(2 * (P - 1) * size / P)
        return (P - 1) * size // P if self.op in _PARTS else (P - 1) * size


@dataclass(frozen=True)
class Collective:
    """Equal collectives of a report.

    Args:
        phase: "forward" or "backward".
        op: the collective.
        purpose: what for.
        count: how many, in one call of the model.
        bytes: received by one rank in each.
        formula: the bytes in P ranks, b tokens per rank, T tokens and sizes; empty if not known.
        values: of the formula's letters.
        grows: whether the bytes grow with the length of the sequence; None if that is not known.
        source: the user's line that it serves.
    """

    phase: str
    op: str
    purpose: str
    count: int
    bytes: int
    formula: str
    values: dict[str, int]
    grows: bool | None
    source: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def transfers(
    graph: fx.Graph, ranks: int, phase: str | None = None, batch: int | None = None
) -> list[Transfer]:
    """The collectives of a graph.

    Args:
        graph: local, with fake values.
        phase: of all of them; None for a joint graph, where what depends on tangents is backward.
        batch: of the model.
    """
    found, backward = [], backward_of(graph.nodes)
    for node in graph.nodes:
        name = _NAMES.get(node.target)
        if name is None and getattr(node.target, "namespace", "") == "_c10d_functional":
            name = node.target._opname if node.target is not _c10d.wait_tensor.default else None
        if name is not None:
            value = node.all_input_nodes[0].meta["val"]
            when = phase or ("backward" if node in backward else "forward")
            elements = prod(map(hint, value.shape))
            why, stack = node.meta.get("spcompile"), node.meta.get("stack_trace") or ""
            found.append(Transfer(name, when, ranks, elements, value.dtype.itemsize, why, stack, batch))
    return found


def rows(found: Iterable[tuple[Transfer, int]]) -> list[Collective]:
    """Equal transfers, each met so many times, as one row each."""
    counts: dict[Any, int] = {}
    for transfer, times in found:
        row = _row(transfer)
        key = (
            row.phase,
            row.op,
            row.purpose,
            row.bytes,
            row.formula,
            tuple(row.values.items()),
            row.grows,
            row.source,
        )
        counts[key] = counts.get(key, 0) + times
    return [
        Collective(phase, op, purpose, count, size, formula, dict(values), grows, source)
        for (phase, op, purpose, size, formula, values, grows, source), count in counts.items()
    ]


def _row(t: Transfer) -> Collective:
    text, values = _formula(t)
    grows: bool | None = None
    if text and round(_evaluated(text, values)) == t.bytes:
        grows = any(str(s) in ("b", "T") for s in parsed(text).free_symbols)
    else:
        text, values = "", {}
    if t.purpose is None:
        grows = False  # the seed: the only collective that serves no node
    return Collective(t.phase, t.op, _what(t), 1, t.bytes, text, values, grows, source_of(t.stack))


# --------------------------------------------------------------------------------------------------- formulas

# (attention operator, collective, and "edges" if they are sent) -> (what is sent, its formulas): those of
# no strategy, and of each, of which several may send by the same collective.
_ATTENTION: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {
    ("linear_attention", "all_reduce"): ("memory state", ("2 (P-1)/P B H K V w",)),
    ("linear_attention_backward", "all_reduce"): ("gradient of memory state", ("2 (P-1)/P B H K V w",)),
}
for _strategy in (*LINEAR.values(), *SOFTMAX.values()):
    for _sent, (_said, *_texts) in _strategy.sends.items():
        _, _known = _ATTENTION.get(_sent, (_said, ()))
        _ATTENTION[_sent] = _said, tuple(dict.fromkeys((*_known, *_texts)))

# What rules send themselves: a number of tokens (or totals) that does not depend on the sequence's length.
_EDGES = {
    "convolution": "halo of",
    "convolution_backward": "halo of",
    "cumsum": "totals of",
    "reverse_cumsum": "totals of",
}


def _base(op: str) -> str:
    """aten.mm.default -> mm."""
    parts = op.split(".")
    return parts[1] if len(parts) > 2 else op


def _what(t: Transfer) -> str:
    p = t.purpose
    if p is None:
        return "random seed of all ranks"
    if p.op == "gradients":
        return f"gradients ({len(p.shapes)} in a bucket)"
    op, consumer = _base(p.op), _base(p.consumer)
    attention = _ATTENTION.get(_key(t, p)) if p.have is None else None
    if attention is not None:
        return f"{op.split('_')[0]}: {attention[0]}"
    if isinstance(p.have, Partial):
        return f"output: sum of {op}" if consumer == "output" else f"sum of {op} for {consumer}"
    if isinstance(p.have, Shard):
        if isinstance(p.want, Shard):
            return f"halo of {op}"
        if p.whole:
            return f"forced by {consumer}, computed whole"
        return "output" if consumer == "output" else f"operand of {consumer}"
    return f"{_EDGES.get(op, 'inside')} {op}"


def _formula(t: Transfer) -> tuple[str, dict[str, int]]:
    """The bytes by what was meant to be sent, and the symbols' values; "" where nothing is known."""
    p, values = t.purpose, {"P": t.ranks, "w": t.itemsize}
    factor = "1" if t.op in _TO_ONE else "2 (P-1)/P" if t.op == "all_reduce" else "(P-1)"
    if p is None or p.op == "gradients":
        return (
            ("", {})
            if p is not None and p.mark is not None
            else (f"{factor} N w", values | {"N": t.elements})
        )
    if p.have is None and _base(p.op) in _EDGES:
        return f"{factor} N w", values | {"N": t.elements}
    if p.have is None:
        return _attention_formula(t, p, values)
    shape, mark = p.shapes[0], next((x for x in (p.have, p.want, p.mark) if isinstance(x, Shard)), None)
    if mark is None:
        return f"{factor} N w", values | {"N": t.elements}
    rest = prod(shape[: mark.dim] + shape[mark.dim + 1 :]) * mark.outer
    values |= {"N": rest, "b": mark.block}
    if isinstance(p.have, Shard) and isinstance(p.want, Shard) and t.elements < rest * mark.block:
        return f"{factor} N w", values | {"N": t.elements}
    if t.op == "all_reduce":
        return f"{factor} T N w", values | {"T": mark.length}
    return f"{factor} b N w", values


def _key(t: Transfer, p: Purpose) -> tuple[str, ...]:
    """The row of `_ATTENTION`: edges, where what is sent is no more than they are."""
    op = _base(p.op)
    if p.edges and p.mark is not None:
        (b, heads, _, size), values = (
            p.shapes[1 + op.endswith("_backward")],
            p.shapes[2 + op.endswith("_backward")],
        )
        if t.elements == p.edges * b * heads * (size + values[3]):
            return op, t.op, "edges"
    return op, t.op


def _attention_formula(t: Transfer, p: Purpose, values: dict[str, int]) -> tuple[str, dict[str, int]]:
    known = _ATTENTION.get(_key(t, p))
    if known is None or p.mark is None:
        return "", {}
    found = [_with_sizes(text, t, p, values) for text in known[1]]
    return next((f for f in found if round(_evaluated(*f)) == t.bytes), found[0])


def _with_sizes(text: str, t: Transfer, p: Purpose, values: dict[str, int]) -> tuple[str, dict[str, int]]:
    """A formula of :data:`_ATTENTION` for the shapes of an operator, and its symbols' values."""
    op = _base(p.op)
    if op.endswith("_scan"):
        return text, values | {"N": t.elements}
    first = (2 if op.startswith("linear") else 1) if op.endswith("_backward") else 0
    assert p.mark is not None
    q, k, v = p.shapes[first : first + 3]
    sizes = {"B": q[0], "H": q[1], "G": k[1], "K": q[3], "V": v[3], "b": p.mark.block, "E": p.edges}
    # A model may fold its heads into the batch that it gives to the operator.
    if t.batch and q[0] != t.batch and not (q[0] * q[1] % t.batch or k[0] * k[1] % t.batch):
        sizes |= {"B": t.batch, "H": q[0] * q[1] // t.batch, "G": k[0] * k[1] // t.batch}
    if op.startswith("linear"):
        text = text.replace("(K V+A)", _summary(*p.shapes[first + 3 : first + 5]))
        sizes |= {"D": (p.shapes[first + 3] or (0,))[-1], "n": slices_of(v[3])}
    return text, values | {n: s for n, s in sizes.items() if n in text}


def _summary(log_decay: tuple[int, ...], beta: tuple[int, ...]) -> str:
    """What a rank sends per head: the state, and what its tokens multiply it by where others cannot know."""
    if beta:
        return "(K V+K K)"
    return "K V" if not log_decay or log_decay[2] == 1 else "(K V+D)"


def _evaluated(text: str, values: dict[str, int]) -> float:
    return float(parsed(text).subs(values))
