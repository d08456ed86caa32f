"""What was compiled, kept for inspection: one record per graph of this process, and reports of records."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from torch import fx

from spcompile.collectives import Group
from spcompile.config import Config
from spcompile.costs import MACHINES, Sizes, Way, ways
from spcompile.phases import is_tangent
from spcompile.placement import Shard
from spcompile.reports import budget
from spcompile.reports.memory import Large, Memory, timeline
from spcompile.reports.traffic import Collective, Transfer, rows, transfers
from spcompile.sizes import hint
from spcompile.strategies import strategy_of

__all__ = ["RECORDS", "Record", "Report", "last", "pass_seconds", "strategy_names"]


@dataclass(repr=False)
class Record:
    """One compiled graph.

    Args:
        group: the ranks it was compiled for.
        strategies: by which strategy each kind of attention crosses ranks.
        sites: what recognition saw (``spcompile.passes.recognize.Site``).
        lent: how the outputs lie that stay this rank's part, by their number.
        kernels: (kind of attention, kernel, why it is not a fused one) -> how many take it.
        sizes: (kind of attention, device, sizes) -> how many cross ranks.
        gathers: gathers that a missing rule forced (``spcompile.passes.shard.localize.GatherNote``).
        transfers: the collectives of the graph.
        sequence: (tokens, tokens per rank) of most of its sharded tensors; None if nothing is sharded.
        batch: of the inputs that carry the sequence; None if there are none.
        memory, alone: on each rank, and were one rank to run it all; known to ``explain`` only.
        largest: tensors alive at the peak, largest first; measure: the memory on so many ranks. As above.
        graphs: what :attr:`before`, :attr:`after` and the like print; kept by ``explain`` only.
        seconds: wall time by pass.
        sharded: whether our passes have run on it, in this process or in the one that filled the caches.
        catch_up: takes what became known since (``spcompile.warm``).
    """

    group: Group
    strategies: dict[str, str] = field(default_factory=dict)
    sites: list[Any] = field(default_factory=list)
    lent: dict[int, Shard] = field(default_factory=dict)
    kernels: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    sizes: Counter[tuple[str, str, Sizes]] = field(default_factory=Counter)
    gathers: list[Any] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    sequence: tuple[int, int] | None = None
    batch: int | None = None
    memory: Memory | None = None
    alone: Memory | None = None
    largest: list[Large] = field(default_factory=list)
    measure: Callable[[int], Memory] | None = None
    graphs: dict[str, fx.GraphModule] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    sharded: bool = False
    catch_up: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the time spent inside under ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def saw_joint(self, graph: fx.Graph, sharded: Any) -> None:
        """Take what is to be known of a joint graph that was just sharded (``passes.shard.Sharded``)."""
        self.sharded = True
        self.gathers += sharded.gathers
        self.kernels, self.sizes = sharded.kernels, sharded.sizes
        self.lent = {number: shard.expressions() for number, shard in sharded.lent.items()}
        steps = sharded.plan.steps.values() if sharded.plan is not None else ()
        placements = [p for step in steps for p in step.native if isinstance(p, Shard)]
        lengths = Counter((hint(p.length), hint(p.block)) for p in placements if hint(p.start) == 0)
        self.sequence = lengths.most_common(1)[0][0] if lengths else None
        self.batch = _batch(sharded.plan) if sharded.plan is not None else None
        self.transfers = transfers(graph, self.group.size, batch=self.batch)

    def saw_final(self, graph: fx.Graph) -> str:
        """Take the collectives of the forward or the backward as they are really run, not as in the joint.

        Returns:
            Which of the two it is.
        """
        phase = "backward" if any(map(is_tangent, graph.nodes)) else "forward"
        self.transfers = [t for t in self.transfers if t.phase != phase] + transfers(
            graph, self.group.size, phase, self.batch
        )
        return phase

    def __repr__(self) -> str:
        return f"<Record: {Report(self.group.size, [self]).summary()}>"

    def text(self, name: str) -> str:
        """A kept graph ("before", "after", "forward", "backward") with the user's source lines."""
        graph = self.graphs.get(name)
        return "" if graph is None else graph.print_readable(print_output=False)


@dataclass(repr=False)
class Report:
    """Graphs that were compiled: as tables (``print(report)``), as data (its fields), as text of the graphs.

    Args:
        ranks: along the sequence.
        records: one per graph.
        calls: how often each graph ran in one call of the model; once each if that was not watched.
        breaks: reason of a graph break -> how often; empty if that was not watched.
        parameters: bytes of parameters and buffers; trained: of those that get a gradient. 0 if not known.
        seconds: the whole time that it took; 0 if not known.
        name: of the model.
        inputs: bytes of the arguments; 0 if not known.
        optimizer: whose state counts in the total: "adamw" (two tensors of a parameter's size), "sgd" (with
            momentum: one) or "none".
        device_memory: bytes that a rank has; None if that is not to be told.
    """

    ranks: int
    records: list[Record]
    calls: list[int] | None = None
    breaks: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    trained: int = 0
    seconds: float = 0.0
    name: str = ""
    inputs: int = 0
    optimizer: str = "adamw"
    device_memory: int | None = None

    def _called(self) -> list[tuple[Record, int]]:
        return list(zip(self.records, self.calls or [1] * len(self.records), strict=True))

    @property
    def sites(self) -> list[Any]:
        """Every attention that was seen, rewritten or not."""
        return [site for record in self.records for site in record.sites]

    @property
    def gathers(self) -> list[Any]:
        """The gathers that missing rules forced."""
        return [gather for record in self.records for gather in record.gathers]

    @property
    def ways(self) -> list[Way]:
        """What each way across the ranks would take, of the attention of each size."""
        found: dict[tuple[str, str, Sizes], Way] = {}
        for record in self.records:
            for key, count in record.sizes.items():
                kind, device, sizes = key
                count += found[key].count if key in found else 0
                machine = MACHINES.get(device, MACHINES["cuda"])
                taken = record.strategies.get(kind, "")
                found[key] = Way(kind, count, taken, sizes, ways(kind, sizes, machine))
        return list(found.values())

    @property
    def kernels(self) -> Counter[tuple[str, str, str]]:
        """(kind of attention, kernel, why it is not a fused one) -> how many take it."""
        return sum((record.kernels for record in self.records), Counter())

    @property
    def collectives(self) -> list[Collective]:
        """What crosses ranks in one call of the model, forward first, equal ones in one row."""
        found = rows((t, times) for record, times in self._called() for t in record.transfers)
        return sorted(found, key=lambda row: row.phase != "forward")

    @property
    def memory(self) -> Memory | None:
        """Activations on each rank; None if that was not measured."""
        return self._timeline([r.memory for r in self._runs()])

    @property
    def alone(self) -> Memory | None:
        """Activations if one rank ran it all, lowered the same way."""
        return self._timeline([r.alone for r in self._runs()])

    def memory_on(self, ranks: int) -> Memory:
        """Activations on each of another number of ranks; only ``explain`` can tell."""
        measured = {id(r): r.measure(ranks) for r in self.records if r.measure is not None}
        found = self._timeline([measured.get(id(r)) for r in self._runs()])
        assert found is not None, "only a report of explain knows its memory"
        return found

    @property
    def total(self) -> int | None:
        """Bytes on each rank in all: parameters, gradients, optimizer state, inputs, peak of activations."""
        return None if self.memory is None else budget.total(self, self.memory)

    @property
    def largest(self) -> list[Large]:
        """The largest tensors alive at the peak of a graph, each graph once."""
        found = [large for record in self.records for large in record.largest]
        return sorted(found, key=lambda large: -large.bytes)

    def fewest_ranks(self, device_memory: int) -> int | None:
        """The fewest ranks on each of which it fits so many bytes; None if no number does."""
        return budget.fewest_ranks(self, device_memory)

    def _runs(self) -> list[Record]:
        return [record for record, times in self._called() for _ in range(times)]

    @staticmethod
    def _timeline(calls: list[Memory | None]) -> Memory | None:
        known = [m for m in calls if m is not None]
        return timeline(known) if known else None

    @property
    def pass_seconds(self) -> dict[str, float]:
        """Wall time by pass."""
        return _summed(self.records)

    @property
    def before(self) -> str:
        """The joint graphs before our passes, with the user's source lines; kept by ``explain`` only."""
        return self._text("before")

    @property
    def after(self) -> str:
        """The joint graphs after our passes."""
        return self._text("after")

    def _text(self, name: str) -> str:
        return "\n".join(filter(None, (record.text(name) for record in self.records)))

    def save(self, folder: str | Path) -> list[Path]:
        """Write the tables, the data and each graph's texts into ``folder``; returns the files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {"report.txt": f"{self}\n", "report.json": json.dumps(self.to_dict(), indent=2) + "\n"}
        for index, record in enumerate(self.records):
            files |= {f"graph{index}_{name}.py": record.text(name) for name in record.graphs}
        for name, text in files.items():
            (folder / name).write_text(text)
        return [folder / name for name in files]

    def to_dict(self) -> dict[str, Any]:
        """All but the graphs, as plain data."""
        memory, alone = self.memory, self.alone
        return {
            "name": self.name,
            "ranks": self.ranks,
            "sequences": [list(r.sequence) if r.sequence else None for r in self.records],
            "graphs": len(self.records),
            "calls": [times for _, times in self._called()],
            "breaks": self.breaks,
            "strategies": self.records[0].strategies if self.records else {},
            "sites": [
                {k: getattr(s, k) for k in ("kind", "mask", "rewritten", "reason", "source", "name")}
                for s in self.sites
            ],
            "kernels": [
                {"kind": kind, "kernel": kernel, "refused": why, "count": n}
                for (kind, kernel, why), n in self.kernels.items()
            ],
            "ways": [asdict(way) for way in self.ways],
            "collectives": [row.to_dict() for row in self.collectives],
            "gathers": [dict(g._asdict()) for g in self.gathers],
            "parameters": self.parameters,
            "trained": self.trained,
            "inputs": self.inputs,
            "optimizer": self.optimizer,
            "total": self.total,
            "largest": [large._asdict() for large in self.largest[:5]],
            "choices": [choice._asdict() for choice in budget.choices(self)],
            "memory": memory and memory.to_dict(),
            "memory_on_one_rank": alone and alone.to_dict(),
            "pass_seconds": self.pass_seconds,
            "seconds": self.seconds,
        }

    def summary(self) -> str:
        """One line: how much was found, and how much moves."""
        from spcompile.reports.tables import human

        counts = {
            "graph": len(self.records),
            "attention": sum(s.rewritten for s in self.sites),
            "forced gather": len(self.gathers),
            "collective": sum(c.count for c in self.collectives),
        }
        parts = [f"{n} {what}{'' if n == 1 else 's'}" for what, n in counts.items() if n]
        moved = sum(c.count * c.bytes for c in self.collectives)
        parts += [f"{human(moved)} received by a rank"] if moved else []
        parts += [f"{human(self.total)} on each rank"] if self.total is not None else []
        return f"{self.name or 'compiled'} on {self.ranks} rank{'s'[: self.ranks > 1]}: {', '.join(parts)}"

    def __repr__(self) -> str:
        return f"<Report: {self.summary()}>"

    def _repr_html_(self) -> str:
        from spcompile.reports.tables import render_html

        return render_html(self)

    def __str__(self) -> str:
        from spcompile.reports.tables import render

        return render(self)


def _batch(plan: Any) -> int | None:
    """How many sequences the inputs hold: what lies before the sequence's dim."""
    found: dict[fx.Node, int] = {}
    for (node, _), marks in plan.marks.items():
        if node.op == "placeholder" and not is_tangent(node) and marks:
            shape = tuple(map(hint, node.meta["val"].shape))
            found[node] = min(prod(shape[: mark.dim]) * hint(mark.outer) for mark in marks)
    return max(found.values(), default=None)


RECORDS: deque[Record] = deque(maxlen=64)
"""The graphs compiled last by this process."""


def last(graphs: int = 1) -> Report:
    """A report on the graphs that the backend compiled last in this process.

    Args:
        graphs: how many.
    Raises:
        ValueError: the backend has compiled nothing yet.
    """
    if not RECORDS:
        raise ValueError(
            "the spcompile backend has compiled nothing in this process; call the compiled module first"
        )
    records = list(RECORDS)[-graphs:]
    for record in records:
        record.catch_up()
    return Report(records[-1].group.size, records)


def strategy_names(group: Group, config: Config) -> dict[str, str]:
    """By which strategy each kind of attention crosses ranks."""
    if group.size == 1:
        return {"linear": "one rank", "softmax": "one rank"}
    chosen = {"linear": config.linear, "softmax": config.softmax}
    rows = {kind: strategy_of(kind, name) for kind, name in chosen.items()}
    return {kind: f"{row.name} ({row.title})" for kind, row in rows.items()}


def pass_seconds() -> dict[str, float]:
    """Wall time that spcompile's passes have taken in this process, by pass."""
    return _summed(list(RECORDS))


def _summed(records: list[Record]) -> dict[str, float]:
    total: dict[str, float] = {}
    for record in records:
        for name, seconds in record.seconds.items():
            total[name] = total.get(name, 0.0) + seconds
    return total
