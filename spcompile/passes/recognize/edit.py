"""Edits on Dynamo's own graph: which node holds a Value, operands brought to [B, H, T, D], a node replaced.

What is emitted is ordinary torch calls with their `example_value`. NOTE [What makes an edit refuse]: an
operand must be held by a node of the same graph (checkpoint bodies are graphs of their own) that stands
before the insertion point, and its storage must not be written in between; the grad mode must not change
inside what is replaced.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

from spcompile.passes.recognize.algebra.dims import Atom, Dims, atoms_of, back_through_view, resolve
from spcompile.passes.recognize.algebra.products import Factor, same_values
from spcompile.passes.shadow import Record, Shadow, Value

Group = tuple[Atom, ...]


class Refused(Exception):
    """An edit that can't be made, or must not; the message is the reason that the user reads."""


@dataclass
class Operand:
    """A node of Dynamo's graph and the names of its dims."""

    node: fx.Node
    value: Value
    dims: Dims


class Editor:
    """Edits the graphs of one shadow."""

    def __init__(self, shadow: Shadow) -> None:
        self.shadow = shadow
        self.holders: dict[Value, list[Record]] = {}
        self.replaced: set[fx.Node] = set()
        for record in (*shadow.records.values(), *shadow.rewritten):
            self._hold(record)

    def _hold(self, record: Record) -> None:
        if isinstance(record.result, Value):
            self.holders.setdefault(record.result, []).append(record)

    # ---- looking up

    def find(self, value: Value, before: fx.Node) -> fx.Node | None:
        """A node of `before`'s graph that still holds `value` there."""
        limit = self.shadow.records[before].begin
        for record in self.holders.get(value, ()):
            if record.node.graph is not before.graph or record.end > limit or record.node in self.replaced:
                continue
            if not self.shadow.written_between(record.storages, record.end, limit):
                return record.node
        return None

    def operand(self, factor: Factor, before: fx.Node) -> Operand:
        """The node to use for a factor: behind the views that only repeat it, if there are such, else the
        nearest."""
        best, size, written = None, 0, False
        for value, dims in chain_of_views(factor.value, factor.dims):
            elements = prod(a.size for a in atoms_of(dims))
            if best is not None and elements >= size:
                continue
            node = self.find(value, before)
            written |= node is None and any(r.node.graph is before.graph for r in self.holders.get(value, ()))
            if node is not None:
                best, size = Operand(node, value, dims), elements
        if best is not None:
            return best
        if written:
            raise Refused("an operand is overwritten before it is used")
        raise Refused("an operand is not a node of its graph (a checkpoint boundary may lie between)")

    def node_of(self, value: Value) -> fx.Node:
        """The node whose result is `value`; a composite function that it lies in is spelled out."""
        node = value.node
        if value.derived:
            raise Refused("it lies inside one call, with more")
        if (
            node is None
            or node not in self.shadow.records
            or node.graph.owning_module not in self.shadow.scopes
        ):
            raise Refused("its graph is run more than once")
        if self.shadow.records[node].result is not value:
            self.inline(node)
            node = value.node
        assert node is not None and self.shadow.records[node].result is value
        return node

    # ---- spelling out a composite function

    def inline(self, node: fx.Node) -> None:
        """Replace one node by the ATen calls it was recorded to make."""
        record = self.shadow.records[node]
        if not record.pure or any(a.op != "call_function" for a in record.emitted):
            raise Refused(f"it lies inside {_called(node)}, which does more than compute")
        env: dict[fx.Node, fx.Node] = {}
        made: dict[Value, fx.Node] = {}

        def given(a: fx.Node) -> fx.Node:
            if a in env:
                return env[a]
            found = self.find(self.shadow.value_of[a], node)
            if found is None:
                raise Refused(f"it lies inside {_called(node)}, whose operands are not nodes of the graph")
            return found

        planned = [(a, fx.map_arg(a.args, lambda x: x), a.kwargs) for a in record.emitted]
        for a, args, kwargs in planned:
            for x in fx.node.map_arg((args, kwargs), lambda x: x) and a.all_input_nodes:
                if x not in record.emitted:
                    given(x)
        with node.graph.inserting_before(node):
            for a, args, kwargs in planned:
                new = node.graph.call_function(a.target, fx.map_arg(args, given), fx.map_arg(kwargs, given))
                new.meta = {k: x for k, x in node.meta.items() if k != "example_value"}
                new.meta["example_value"] = a.meta.get("val")
                env[a] = new
                value = self.shadow.value_of[a]
                value.node, made[value] = new, new
                storages = self._storages(a)
                self.shadow.records[new] = Record(new, value, storages, [a], value.time - 1, value.time, True)
                self._hold(self.shadow.records[new])
        self._take_over(node, record.result, made)

    def _storages(self, a: fx.Node) -> tuple[int, ...]:
        val = a.meta.get("val")
        return (val.untyped_storage()._cdata,) if isinstance(val, torch.Tensor) else ()

    def _take_over(self, node: fx.Node, result: Any, made: dict[Value, fx.Node]) -> None:
        if isinstance(result, Value):
            node.replace_all_uses_with(made.get(result) or self._required(result, node))
        else:
            for user in list(node.users):
                if getattr(user.target, "__name__", "") != "getitem":
                    raise Refused(f"the result of {_called(node)} is used as a whole")
                value = result[user.args[1]]
                user.replace_all_uses_with(made.get(value) or self._required(value, node))
                self.replaced.add(user)
                node.graph.erase_node(user)
        self.replaced.add(node)
        node.graph.erase_node(node)

    def _required(self, value: Value, before: fx.Node) -> fx.Node:
        found = self.find(value, before)
        assert found is not None
        return found

    # ---- emitting

    def writer(self, before: fx.Node) -> Writer:
        return Writer(before, self.shadow.mode)

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        """Let `by` stand for `node`, in the graph and as the holder of its value."""
        record = self.shadow.records[node]
        node.replace_all_uses_with(by)
        self.replaced.add(node)
        new = replace(record, node=by, storages=(), emitted=[])
        self.shadow.records[by] = new
        self._hold(new)

    def written_later(self, node: fx.Node) -> bool:
        record = self.shadow.records[node]
        return self.shadow.written_after(record.storages, record.end)

    def erase(self, nodes: Sequence[fx.Node]) -> None:
        """Drop the nodes that nothing uses any more, of these, where they only compute."""
        for node in reversed(nodes):
            record = self.shadow.records[node]
            named = node.op == "call_method" or node.target is operator.getitem
            pure = record.pure or (record.begin == record.end and named)
            if not node.users and pure and node.op in ("call_function", "call_method"):
                self.replaced.add(node)
                node.graph.erase_node(node)


class Writer:
    """Emits torch calls before one node, for which they stand."""

    def __init__(self, before: fx.Node, mode: Any) -> None:
        self.before = before
        self.mode = mode
        self.device = before.meta["example_value"].device

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self._emit("call_function", function, function, args, kwargs)

    def method(self, name: str, x: fx.Node, *args: Any) -> fx.Node:
        """`x.name(*args)`: AOTAutograd's cache takes no graph with `torch.Tensor.name` as a function."""
        return self._emit("call_method", name, getattr(torch.Tensor, name), (x, *args), {})

    def _emit(self, op: str, target: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> fx.Node:
        graph = self.before.graph
        with graph.inserting_before(self.before):
            node = graph.create_node(op, target, args, kwargs)
        keep = ("stack_trace", "nn_module_stack", "source_fn_stack")
        node.meta = {k: self.before.meta[k] for k in keep if k in self.before.meta}
        values, named = fx.map_arg((args, kwargs), lambda n: n.meta["example_value"])
        with self.mode:
            node.meta["example_value"] = function(*values, **named)
        return node

    def number(self, x: float, dtype: torch.dtype) -> fx.Node:
        """A number as a tensor of no dims: `where` would take a Python number for a float32 first."""
        x = max(x, torch.finfo(dtype).min) if x > -math.inf else x
        return self.call(torch.full, (), x, dtype=dtype, device=self.device)

    def shape(self, x: fx.Node) -> tuple[int, ...]:
        return tuple(int(s) for s in x.meta["example_value"].shape)

    def reshape(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        return x if self.shape(x) == tuple(shape) else self.call(torch.reshape, x, tuple(shape))

    def permute(self, x: fx.Node, order: Sequence[int]) -> fx.Node:
        return x if list(order) == list(range(len(order))) else self.call(torch.permute, x, tuple(order))

    def to(self, x: fx.Node, dtype: torch.dtype | None) -> fx.Node:
        return x if x.meta["example_value"].dtype == dtype or dtype is None else self.method("to", x, dtype)

    def arrange(self, operand: Operand, groups: Sequence[Group], expand: bool = True) -> fx.Node:
        """The operand as one dim per group of atoms.

        An atom that the operand lacks is expanded; with `expand=False` a group of which it has none stays at
        one.
        """
        atoms = atoms_of(operand.dims)
        groups = [resolve(g) for g in groups]
        wanted = [a for g in groups for a in g]
        assert set(atoms) <= set(wanted) and len(set(atoms)) == len(atoms), (
            "an operand has an atom without a role"
        )
        x = self.reshape(operand.node, [a.size for a in atoms])
        x = self.permute(x, [atoms.index(a) for a in wanted if a in atoms])
        x = self.reshape(x, [a.size if a in atoms else 1 for a in wanted])
        full = [
            a.size if a in atoms or expand or any(b in atoms for b in g) else 1 for g in groups for a in g
        ]
        if self.shape(x) != tuple(full):
            x = self.method("expand", x, tuple(full))
        widths = [prod(full[sum(map(len, groups[:n])) :][: len(g)]) for n, g in enumerate(groups)]
        return self.reshape(x, widths)

    def scatter(self, x: fx.Node, groups: Sequence[Group], dims: Dims, shape: Sequence[int]) -> fx.Node:
        """The inverse of `arrange`: from one dim per group back to the dims of a result."""
        wanted = [a for g in groups for a in resolve(g)]
        atoms = atoms_of(dims)
        assert set(atoms) == set(wanted) and len(atoms) == len(wanted), "a result has an atom without a role"
        x = self.reshape(x, [a.size for a in wanted])
        x = self.permute(x, [wanted.index(a) for a in atoms])
        return self.reshape(x, shape)

    def like(self, x: fx.Node, node: fx.Node, fresh: bool) -> fx.Node:
        """`x` with the dtype and strides of `node`; a copy of its own if `fresh`."""
        want = node.meta["example_value"]
        x = self.to(x, want.dtype)
        strides = tuple(int(s) for s in want.stride())
        have = tuple(int(s) for s in x.meta["example_value"].stride())
        if not _same_strides(self.shape(x), have, strides):
            order = sorted(range(len(strides)), key=lambda d: (-strides[d], d))
            back = [order.index(d) for d in range(len(order))]
            x = self.permute(x, order)
            x = self.permute(self.method("contiguous", x), back)
        elif fresh:
            x = self.call(torch.clone, x)
        return x


def _same_strides(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    return all(n == 1 or x == y for n, x, y in zip(shape, a, b, strict=True))


def _called(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def chain_of_views(value: Value, dims: Dims) -> list[tuple[Value, Dims]]:
    """The value and those it is a view (or a copy in the same dtype) of, nearest first."""
    out = [(value, dims)]
    while True:
        source = same_values(value)
        if source is not None and source.dtype == value.dtype:
            value = source
        elif (back := back_through_view(value, dims)) is not None and back[0].dtype == value.dtype:
            value, dims = back
        else:
            return out
        out.append((value, dims))
