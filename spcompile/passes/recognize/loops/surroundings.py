"""What lies around a loop in Dynamo's graph: which of its nodes go, and what their users want instead.

NOTE [When a loop's writes may be removed]: a write in place goes with its node, so every storage that the
loop writes must be the loop's own affair: made by a node of this graph (no input, parameter or buffer),
seen from outside only through tensors whose whole content after the loop is known: the last value written to
all of them, or slots that the steps have filled one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from spcompile._torch import HigherOrderOperator, OpOverload
from spcompile.passes.recognize.edit import Refused
from spcompile.passes.recognize.loops.families import Family, Loop, Progress
from spcompile.passes.shadow import Record, Shadow, Value, is_pure
from spcompile.passes.shadow.values import Write, geometry_of, values_in

__all__ = ["Slots", "Stacked", "Step", "Surroundings", "Want"]

_MODES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode")


@dataclass(frozen=True)
class Step:
    """A family's tensor in one step."""

    family: Family
    step: int


@dataclass(frozen=True)
class Slots:
    """A tensor `base` whose parts along `dim` the steps have overwritten."""

    family: Family
    base: fx.Node
    dim: int
    index: Progress
    width: int | None
    """None: each step wrote `base.select(dim, index)`; else `base.narrow(dim, index, width)`."""


@dataclass(frozen=True)
class Stacked:
    """`torch.stack` or `torch.cat` of a list in which stand the steps of families."""

    dim: int
    new_dim: bool
    pieces: tuple[Any, ...]
    """Nodes, and (family, first step, last step) for several steps in a row."""


Want = Step | Slots | Stacked


@dataclass
class Surroundings:
    """The plan of an edit: nothing is changed before all of it is known."""

    shadow: Shadow
    loop: Loop
    nodes: list[fx.Node] = field(default_factory=list)
    """The loop's, in order."""
    wants: list[tuple[Want, fx.Node, list[fx.Node]]] = field(default_factory=list)
    """(what, the node that it stands for, the users to be changed; none: all)."""

    def plan(self) -> Surroundings:
        """Find all of it, or refuse."""
        self.graph = self._graph()
        self.order = {n: i for i, n in enumerate(self.graph.nodes)}
        self._find_nodes()
        self.inside = set(self.nodes)
        self.begin = self.shadow.records[self.nodes[0]].begin
        self.end = max(self.shadow.records[n].end for n in self.nodes if n in self.shadow.records)
        self.stacks: dict[fx.Node, None] = {}
        self._find_writes()
        self._find_users()
        for node in self.stacks:
            self.wants.append((self._stack(node), node, []))
        self._check_aliases()
        return self

    def _graph(self) -> fx.Graph:
        graphs = {v.node.graph for v in self.loop.body if v.node is not None}
        if len(graphs) != 1 or any(v.node is None for v in self.loop.body):
            raise Refused("its steps lie in several graphs")
        (graph,) = graphs
        if graph.owning_module not in self.shadow.scopes:
            raise Refused("its graph is run more than once")
        return graph

    # ---- nodes

    def _find_nodes(self) -> None:
        made = {v.node for v in self.loop.body}
        places = [self.order[n] for n in made if n in self.order]
        if len(places) != len(made):
            raise Refused("its nodes have been edited")
        first, last = min(places), max(places)
        for n in list(self.graph.nodes)[first : last + 1]:
            if n in made:
                self._check_node(n)
            elif not self._belongs(n, made):
                continue
            made.add(n)
            self.nodes.append(n)

    def _check_node(self, n: fx.Node) -> None:
        """All that it does must lie in the loop, and be understood."""
        record = self.shadow.records[n]
        for a in record.emitted:
            value = self.shadow.value_of.get(a)
            if a.op == "call_function" and value is not None and id(value) not in self.loop.place:
                raise Refused("a call lies partly outside of its steps")
            if not isinstance(a.target, OpOverload) or not a.target._schema.is_mutable:
                if not is_pure(a):
                    raise Refused("its steps do more than compute")
            elif value is None or value.name == "opaque":
                raise Refused(f"its steps call {a.target}, which writes")

    def _belongs(self, n: fx.Node, made: set) -> bool:
        """Whether a node between the steps that computes nothing is part of them."""
        if getattr(n.target, "__name__", "") in _MODES:
            raise Refused("autocast or the grad mode changes inside its steps")
        inputs = set(n.all_input_nodes) & made
        record = self.shadow.records.get(n)
        if record is None or record.emitted or record.begin != record.end or _higher_order(n):
            if inputs:
                raise Refused("other code lies between its steps")
            return False
        return bool(inputs)

    # ---- storages that the loop writes

    def _find_writes(self) -> None:
        shadow = self.shadow
        holders: dict[int, list[Record]] = {}
        for r in shadow.records.values():
            for s in r.storages:
                holders.setdefault(s, []).append(r)
        for storage, writes in shadow.writes.items():
            here = [w for w in writes if self.begin < w.time <= self.end]
            if not here:
                continue
            if any(id(w.value) not in self.loop.place for w in here):
                raise Refused("its steps write in a way that is not read")
            for r in holders.get(storage, ()):
                if r.begin <= self.begin and r.end >= self.end and r.node.graph is not self.graph:
                    continue  # the call of this very graph
                if r.node.op in ("placeholder", "get_attr"):
                    raise Refused("its steps write to an input")
                if r.node not in self.inside and r.end <= self.begin:
                    self._find_outside(r, here)
                elif r.node not in self.inside and r.begin < self.end:
                    raise Refused("other code lies between its steps")
                elif r.node in self.inside:
                    self._check_held(r, here)

    def _find_outside(self, r: Record, writes: list[Write]) -> None:
        """A tensor made before the loop, that the loop writes: what it holds after."""
        if r.node.graph is not self.graph:
            raise Refused("its steps write to a tensor of another graph")
        first, last = self.order[self.nodes[0]], self.order[self.nodes[-1]]
        outside = [u for u in r.node.users if u not in self.inside]
        later = [u for u in outside if self.order[u] > last]
        if any(first <= self.order[u] < last for u in outside):
            raise Refused("other code lies between its steps")
        if not later:
            return
        fake = r.result.fake if isinstance(r.result, Value) else None
        if fake is None:
            raise Refused("its steps write to a tensor that is not read")
        if writes[-1].geometry == geometry_of(fake):
            found = self.loop.family_of(writes[-1].value)
            assert found is not None
            self.wants.append((Step(*found), r.node, later))
        else:
            self.wants.append((self._slots(r.node, fake, writes), r.node, later))

    def _check_held(self, r: Record, writes: list[Write]) -> None:
        """A tensor of the loop's own that is used outside must not have been written after it was made."""
        outside = any(u not in self.inside for u in r.node.users)
        if outside and any(w.time > r.end for w in writes):
            raise Refused("a tensor that it returns is written later")

    def _check_aliases(self) -> None:
        """What stands in for two views of one tensor is two tensors: neither may be written later."""
        seen: set[int] = set()
        for _, node, _ in self.wants:
            storages = set(self.shadow.records[node].storages)
            if storages & seen and self.shadow.written_after(tuple(storages), self.end):
                raise Refused("a tensor that it returns is written later")
            seen |= storages

    def _slots(self, base: fx.Node, fake: torch.Tensor, writes: list[Write]) -> Slots:
        found = [self.loop.family_of(w.value) for w in writes]
        family = found[0][0] if found[0] is not None else None
        steps = [f[1] for f in found if f is not None and f[0] is family]
        if family is None or family.like.name != "copy" or steps != list(range(self.loop.steps)):
            raise Refused("its steps write to a tensor in several places")
        targets = [m.args["self"] for m in family.members]
        dim, first, width = _place(targets[0], fake.shape)
        _, second, _ = _place(targets[1], fake.shape)
        index = Progress(first, second - first)
        for t, w in enumerate(writes):
            start = first + t * index.step
            if index.step == 0 or not 0 <= start <= fake.shape[dim] - (width or 1):
                raise Refused("its steps write to a tensor in several places")
            slot = fake.select(dim, start) if width is None else fake.narrow(dim, start, width)
            if geometry_of(slot) != w.geometry:
                raise Refused("its steps write to a tensor in a way that is not read")
        if width is not None and abs(index.step) < width:
            raise Refused("its steps write over each other")
        return Slots(family, base, dim, index, width)

    # ---- users

    def _find_users(self) -> None:
        for n in self.nodes:
            outside = [u for u in n.users if u not in self.inside]
            if not outside:
                continue
            if any(self.order.get(u, -1) < self.order[self.nodes[-1]] for u in outside):
                raise Refused("other code lies between its steps")
            value = self.shadow.records[n].result
            found = self.loop.family_of(value) if isinstance(value, Value) else None
            if found is None:
                raise Refused("a result is used that is no tensor of its steps")
            plain = [u for u in outside if not self._is_stack(u)]
            self.stacks |= dict.fromkeys(u for u in outside if u not in plain)
            if plain:
                self.wants.append((Step(*found), n, plain))

    def _is_stack(self, u: fx.Node) -> bool:
        record = self.shadow.records.get(u)
        if record is None or not isinstance(record.result, Value):
            return False
        if record.result.name not in ("stack", "cat"):
            return False
        listed = u.args[0] if u.args else u.kwargs.get("tensors")
        values = list(values_in(record.result.args["tensors"]))
        if not isinstance(listed, (list, tuple)) or len(listed) != len(values) or len(record.emitted) != 1:
            return False
        return all(
            isinstance(n, fx.Node) and n in self.shadow.records and self.shadow.records[n].result is v
            for n, v in zip(listed, values, strict=True)
        )

    def _stack(self, u: fx.Node) -> Stacked:
        value = self.shadow.records[u].result
        listed = list(u.args[0] if u.args else u.kwargs["tensors"])
        pieces: list[Any] = []
        for n, v in zip(listed, values_in(value.args["tensors"]), strict=True):
            found = self.loop.family_of(v) if n in self.inside else None
            if found is None:
                pieces.append(n)
                continue
            family, step = found
            last = pieces[-1] if pieces and isinstance(pieces[-1], tuple) else None
            if last is not None and last[0] is family and _continues(last, step):
                pieces[-1] = (family, last[1], step)
            else:
                pieces.append((family, step, step))
        return Stacked(value.args["dim"], value.name == "stack", tuple(pieces))


def _higher_order(n: fx.Node) -> bool:
    return isinstance(n.target, HigherOrderOperator)


def _continues(piece: tuple[Family, int, int], step: int) -> bool:
    _, first, last = piece
    return abs(step - last) == 1 and (first == last or (step > last) == (last > first))


def _place(v: Any, shape: Any) -> tuple[int, int, int | None]:
    """(dim, index, width) of a part of a tensor of `shape`, by one select or slice."""
    found: tuple[int, int, int | None] | None = None
    while isinstance(v, Value) and v.name in ("select", "slice", "clone"):
        source = v.args["self"]
        if v.name == "clone":  # a slice of the whole
            v = source
            continue
        dim = v.args["dim"]
        part = (dim, v.args["index"], None) if v.name == "select" else (dim, v.args["start"], v.shape[dim])
        if found is not None:
            raise Refused("its steps write to a tensor in a way that is not read")
        found, v = part, source
    if found is None or not isinstance(v, Value) or v.shape != tuple(shape):
        raise Refused("its steps write to a tensor in a way that is not read")
    return found
