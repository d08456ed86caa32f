"""What is said where ranks are about to run different things: which argument, how it differs, what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx

from spcompile import digest
from spcompile.arguments import Argument
from spcompile.source import source_of

__all__ = ["Report", "Sketch", "Value", "graph_lines", "message", "only_rounding", "rounding"]

Line = tuple[str, str]  # a node and the user's source line


@dataclass(frozen=True)
class Sketch:
    """By which two tensors that differ in rounding alone can be told (``digest.sketch``)."""

    norm: float
    sums: list[float]
    eps: float

    @classmethod
    def of(cls, x: Tensor) -> Sketch:
        return cls(*digest.sketch(x), torch.finfo(x.dtype).eps)

    def is_near(self, other: Sketch) -> bool:
        """All sums of signed entries agree to half of the dtype's digits; NaN is near to nothing."""
        within = math.sqrt(self.eps) * max(self.norm, other.norm)
        return all(abs(a - b) <= within for a, b in zip(self.sums, other.sums))


@dataclass(frozen=True)
class Value:
    """One input on one rank: dtype and shape (or a number), and the digest of its values if it has one."""

    argument: Argument
    text: str
    digest: int | None = None
    sketch: Sketch | None = None


@dataclass(frozen=True)
class Report:
    """All that one rank tells of itself. ``hashes`` tells whether two processes hash strings alike."""

    values: list[Value]
    graph: list[Line]
    settings: dict[str, str]
    hashes: int
    reads: str = ""  # the sharded tensor that this rank reads, where it calls no compiled module

    def of_kind(self, own: bool) -> dict[str, Value]:
        """What a call passes (``own``), or what was there before, by name."""
        return {v.argument.name: v for v in self.values if (v.argument.kind == "argument") is own}


@dataclass(frozen=True)
class _Difference:
    subject: str
    ranks: list[int]
    text: str


def graph_lines(gm: fx.GraphModule) -> list[Line]:
    """The graph's nodes, those of nested graphs too, each with the user's line."""
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return [(str(n.format_node()), source_of(n)) for g in graphs for n in g.nodes]


def message(reports: Sequence[Report]) -> str:
    """The error that every rank raises."""
    readers = [r for r, report in enumerate(reports) if report.reads]
    if readers:
        return (
            f"ranks {readers} read {reports[readers[0]].reads} (print it, index it, or use it in code that "
            "spcompile has not compiled), and the other ranks do something else. Reading gathers it, so "
            "every rank must read it.\nRemedy: read it on every rank, and print on one."
        )
    hashes = len({r.hashes for r in reports}) > 1
    ways = [
        (_values(reports, own=True), _BATCH),
        (_settings(reports), _SAME),
        (_graphs(reports), _HASHES if hashes else _SAME),
        (_values(reports, own=False), _STATE),
    ]
    nothing: list[_Difference] = []
    found, remedy = next((way for way in ways if way[0]), (nothing, _SAME))
    if not found:
        return f"the ranks of the sequence axis are not at the same call.\n{remedy}"
    others = ", ".join(d.subject for d in found[1:4]) + (", ..." if len(found) > 4 else "")
    also = f" Also: {others}." if others else ""
    names = found[0].subject.partition("`")[2].rstrip("`")
    remedy = remedy.format(ranks=len(reports), name=names)
    return (
        f"ranks {found[0].ranks} of the sequence axis run something else than rank 0: "
        f"{found[0].text}.{also}\n{remedy}"
    )


def _unlike(items: Sequence[Any]) -> list[int]:
    """The ranks that have something else than rank 0."""
    return [r for r, x in enumerate(items) if x != items[0]]


def _values(reports: Sequence[Report], own: bool) -> list[_Difference]:
    """Inputs of another shape, not there on every rank, or of other values."""
    every = [r.of_kind(own) for r in reports]
    shapes, missing, contents = [], [], []
    for name in dict.fromkeys(n for values in every for n in values):
        found = [values.get(name) for values in every]
        subject = str(next(v.argument for v in found if v is not None))
        values = [v for v in found if v is not None]
        if len(values) < len(found):
            ranks = _unlike([v is None for v in found])
            has, lacks = ("rank 0", f"ranks {ranks}") if found[0] else (f"ranks {ranks}", "rank 0")
            missing.append(_Difference(subject, ranks, f"{subject} is there on {has} and not on {lacks}"))
        elif ranks := _unlike([v.text for v in values]):
            other = f"{values[ranks[0]].text} on rank {ranks[0]}"
            shapes.append(_Difference(subject, ranks, f"{subject} is {values[0].text} on rank 0, {other}"))
        elif ranks := _unlike([v.digest for v in values]):
            text = f"{subject}, {values[0].text}, has other values"
            contents.append(_Difference(subject, ranks, text))
    return shapes + missing + contents


def _settings(reports: Sequence[Report]) -> list[_Difference]:
    """Options, versions and sources that are not the same everywhere."""
    found = []
    for name in reports[0].settings:
        texts = [r.settings.get(name, "") for r in reports]
        if ranks := _unlike(texts):
            shown = f"{texts[0][:200]} on rank 0, {texts[ranks[0]][:200]} on rank {ranks[0]}"
            found.append(_Difference(name, ranks, f"{name}: {shown}"))
    return found


def _graphs(reports: Sequence[Report]) -> list[_Difference]:
    """The first node that is not the same everywhere."""
    ranks = _unlike([[line for line, _ in r.graph] for r in reports])
    if not ranks:
        return []
    pairs = zip_longest(reports[0].graph, reports[ranks[0]].graph, fillvalue=("nothing more", ""))
    (first, at), (other, other_at) = next(p for p in pairs if p[0][0] != p[1][0])
    here, there = f"  {first} ({at})", f"  {other} ({other_at})"
    text = f"the graph has\n{here}\non rank 0, where on rank {ranks[0]} it has\n{there}"
    return [_Difference("the graph", ranks, text)]


def only_rounding(reports: Sequence[Report]) -> bool:
    """Whether nothing differs but floating state, and that by its last digits."""
    for values in zip(*(r.values for r in reports), strict=True):
        first = values[0]
        for other in values[1:]:
            if other.digest == first.digest:
                continue
            if first.sketch is None or other.sketch is None or not first.sketch.is_near(other.sketch):
                return False
    return True


def rounding(reports: Sequence[Report]) -> str:
    """The warning where ranks have drifted apart by rounding."""
    found = _values(reports, own=False)
    return (
        f"spcompile: on ranks {found[0].ranks} of the sequence axis {found[0].text} than on rank 0 "
        f"(and {len(found) - 1} more), by rounding: a kernel on these machines gives other bits every time. "
        "torch.use_deterministic_algorithms(True) would name it; broadcasting the parameters from rank 0 now "
        "and then keeps the ranks together."
    )


_BATCH = (
    "All {ranks} ranks of the sequence axis must be given one and the same batch, of which spcompile gives "
    "each its part of the sequence. Remedy: if these ranks are to train on different data, they are not a "
    "sequence axis: make a mesh of both axes, mesh = torch.distributed.init_device_mesh(device, (dp, sp), "
    'mesh_dim_names=("dp", "sp")), and compile with options={{"mesh": mesh["sp"]}}. Otherwise give them the '
    "same `{name}`: a sampler (DistributedSampler, or the one that Hugging Face's Trainer makes) must count "
    "its replicas along the data axis alone and shuffle with one seed; or torch.distributed.broadcast it "
    'from rank 0. options={{"check": "shapes"}} compares no values.'
)
_STATE = (
    "All {ranks} ranks of the sequence axis must have one and the same model. Remedy: seed every rank alike "
    "before the model is built (torch.manual_seed), or load one checkpoint, or broadcast from rank 0: "
    "for x in [*model.parameters(), *model.buffers()]: torch.distributed.broadcast(x.data, 0). "
    'options={{"check": "shapes"}} compares no values.'
)
_SAME = (
    "Every rank must call the same module with inputs of the same shapes and dtypes. "
    "Remedy: compare the inputs' shapes, the model's configuration and the versions of torch and "
    "spcompile on these ranks."
)
_HASHES = (
    "These processes hash strings differently, and code that walks a set of strings then walks it in another "
    "order on each. Remedy: start every rank with PYTHONHASHSEED=0 in its environment; if that changes "
    "nothing, compare the inputs and the model's configuration on these ranks."
)
