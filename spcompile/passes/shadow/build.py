"""Turns the ATen calls of a trace into Values, one spelling of each, as they appear.

NOTE [How mutation is made functional]
An in-place call is the pure call on what its target held at that moment, and a write: (storage, time,
geometry, new Value). A later read of a tensor whose storage has been written since it was made is
  * the written Value, if the last write had the tensor's own geometry (`s.masked_fill_(m, -inf)`, then `s`);
  * the view replayed on what the viewed tensor now holds, if the tensor is a view;
  * an opaque Value, otherwise (a slice was written): data, of which nothing can be proved.
So two reads that may differ are never the same Value, which is what recognizers rely on.
"""

from __future__ import annotations

import operator
from itertools import takewhile
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from spcompile._torch import OpOverload, disable_current_modes, get_proxy_mode, get_proxy_slot
from spcompile.passes.numbers import size_symbols
from spcompile.passes.shadow.spelling import Call, canonical
from spcompile.passes.shadow.values import (
    Record,
    Shadow,
    Value,
    Write,
    differentiable,
    geometry_of,
    mark_live,
)
from spcompile.passes.transforms import Transforms

__all__ = ["Builder"]

# Ops that read only the shape and dtype of their input.
_SHAPE_ONLY = {"empty_like", "new_empty"}


class _Storages:
    """Numbers for storages; storages that may be the same memory share one."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}
        self.keep: list[torch.Tensor] = []  # a storage's address is its name only while it lives

    def key(self, tensor: torch.Tensor) -> int:
        self.keep.append(tensor)
        return self._find(tensor.untyped_storage()._cdata)

    def _find(self, s: int) -> int:
        while self.parent.setdefault(s, s) != s:
            s = self.parent[s]
        return s

    def unite(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.parent[self.key(a)] = self.key(b)


class Builder:
    """Turns the ATen nodes of each Dynamo node into Values as they appear."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.records: dict[fx.Node, Record] = {}
        self.rewritten: list[Record] = []
        self.values: list[Value] = []
        self.value_of: dict[fx.Node, Value] = {}
        self.writes: dict[int, list[Write]] = {}
        self.storages = _Storages()
        self.reads: dict[tuple, Value] = {}
        self.last_reads: dict[fx.Node, tuple[int, Value]] = {}
        self.scope_runs: dict[fx.GraphModule, int] = {}
        self.input_storage: dict[int, int] = {}
        self.seen: fx.Node | None = None
        self.time = 0
        self.roots: list[Value] = []
        self.written_values: list[tuple[int, Value]] = []
        self.transforms = Transforms()
        nested = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
        self.sizes = size_symbols(n.meta.get("example_value") for m in nested for n in m.graph.nodes)

    # ---- running

    def alias_inputs(self, example: torch.Tensor, fake: torch.Tensor) -> None:
        """Inputs that share memory outside share a storage key here."""
        first = self.input_storage.setdefault(example.untyped_storage()._cdata, self.storages.key(fake))
        self.storages.parent[self.storages.key(fake)] = self.storages._find(first)

    def new_nodes(self) -> list[fx.Node]:
        """The ATen nodes made since the last call, in order."""
        nodes = list(takewhile(lambda a: a is not self.seen, reversed(self.tracer().graph.nodes)))
        self.seen = nodes[0] if nodes else self.seen
        return nodes[::-1]

    @staticmethod
    def tracer() -> Any:
        mode = get_proxy_mode()
        assert mode is not None, "the shadow is built only under make_fx"
        return mode.tracer

    def tree(self, out: Any) -> Any:
        """`out` with a Value in place of each tensor."""
        return pytree.tree_map_only(torch.Tensor, self.of_tensor, out)

    def of_tensor(self, t: torch.Tensor) -> Value:
        slot = get_proxy_slot(t, self.tracer(), None)
        if slot is None:  # a constant that no call has read yet
            return self.opaque(t, {}, None)
        node = slot.proxy.node if hasattr(slot, "proxy") else slot.node
        if node not in self.value_of:
            self.absorb(node, None)
        return self.read(node)

    # ---- ATen nodes to Values

    def add(self, value: Value) -> Value:
        value.grad_mode = torch.is_grad_enabled()
        value.autocast = value.fake is not None and torch.is_autocast_enabled(value.fake.device.type)
        if value.name != "input":
            value.requires_grad = differentiable(value) and any(o.requires_grad for o in value.operands())
        if value.name not in _SHAPE_ONLY:
            for o in set(value.operands()):
                o.users.append(value)
        self.values.append(value)
        return value

    def opaque(self, t: torch.Tensor, args: dict, node: fx.Node | None) -> Value:
        return self.add(Value("opaque", args, tuple(t.shape), t.dtype, time=self.time, node=node, fake=t))

    def absorb(self, aten_node: fx.Node, node: fx.Node | None) -> None:
        """Give one ATen node its Value."""
        self.time += 1
        val = aten_node.meta.get("val")
        target = aten_node.target
        if aten_node.op == "call_function" and isinstance(target, OpOverload):
            self.value_of[aten_node] = self.call(aten_node, target, val, node)
        elif target is operator.getitem:
            many, index = aten_node.args
            args = {"self": self.lookup(many), "index": index, "before": _shapes(many.meta["val"], index)}
            self.value_of[aten_node] = self.make("getitem", "", args, val, node)
        elif (number := self.constant(aten_node)) is not None:
            self.value_of[aten_node] = self.make("literal", "", {"value": number}, val, node)
        elif isinstance(val, torch.Tensor):
            name = "input" if aten_node.op == "placeholder" else "opaque"
            args = {str(i): x for i, x in enumerate(fx.map_arg(aten_node.args, self.lookup))}
            self.value_of[aten_node] = self.make(name, "", args, val, node)
        else:
            args = {str(i): x for i, x in enumerate(fx.map_arg(aten_node.args, self.lookup))}
            self.value_of[aten_node] = self.make("opaque", "", args, val, node)
            self.roots.append(self.value_of[aten_node])

    def constant(self, aten_node: fx.Node) -> float | None:
        """The number that a call in Python made a tensor of, as `x[mask] = 0.0` does."""
        if aten_node.op != "get_attr":
            return None
        tensor: Any = getattr(self.tracer().root, str(aten_node.target), None)
        if type(tensor) is not torch.Tensor or tensor.shape != () or tensor.is_complex():
            return None
        with disable_current_modes():
            return float(tensor) if tensor.is_floating_point() else int(tensor)

    def lookup(self, n: fx.Node) -> Value:
        if n not in self.value_of:
            self.absorb(n, None)
        return self.read(n)

    def make(self, name: str, overload: str, args: dict, val: Any, node: fx.Node | None) -> Value:
        tensor = val if isinstance(val, torch.Tensor) else None
        shape = tuple(map(int, tensor.shape)) if tensor is not None else ()
        dtype, device = (tensor.dtype, tensor.device) if tensor is not None else (None, None)
        call = canonical(
            Call(name, overload, args, shape, dtype, device), lambda part: self.derive(part, node)
        )
        return self.add(
            Value(call.name, call.args, shape, dtype, call.overload, self.time, node, fake=tensor)
        )

    def derive(self, part: Call, node: fx.Node | None) -> Value:
        """A Value on the way to that of one ATen node."""
        made = Value(
            part.name, part.args, part.shape, part.dtype, part.overload, self.time, node, derived=True
        )
        self.add(made)
        made.autocast = part.device is not None and torch.is_autocast_enabled(part.device.type)
        return made

    def call(self, n: fx.Node, target: OpOverload, val: Any, node: fx.Node | None) -> Value:
        schema = target._schema
        raw = dict(zip((a.name for a in schema.arguments), n.args, strict=False)) | dict(n.kwargs)
        args = {k: fx.map_arg(x, self.lookup) for k, x in raw.items()}
        name = target.overloadpacket.__name__
        written = [
            raw[a.name] for a in schema.arguments if a.alias_info and a.alias_info.is_write and a.name in raw
        ]
        if not written:
            # Which it is depends on dtypes and strides, that autocast can change: assume both.
            if _may_alias(target) and isinstance(val, torch.Tensor) and "self" in raw:
                self.storages.unite(val, raw["self"].meta["val"])
            return self.make(name, target._overloadname, args, val, node)
        in_place = len(written) == 1 and name.endswith("_") and written[0] is n.args[0]
        value = self.make(name[:-1] if in_place else "opaque", target._overloadname, args, val, node)
        if name != "detach_":  # writes no memory
            for w in pytree.tree_leaves(written):
                self.write(w, value)
        return value

    # ---- mutation: NOTE [How mutation is made functional]

    def write(self, n: fx.Node, value: Value) -> None:
        t = n.meta["val"]
        self.writes.setdefault(self.storages.key(t), []).append(Write(self.time, geometry_of(t), value))
        self.written_values.append((self.storages.key(t), value))

    def read(self, n: fx.Node) -> Value:
        """What the tensor of ATen node `n` holds now."""
        made, t = self.value_of[n], n.meta.get("val")
        if not isinstance(t, torch.Tensor) or not self.writes:
            return made
        writes = self.writes.get(self.storages.key(t))
        if not writes or writes[-1].time <= made.time:
            return made
        if writes[-1].geometry == geometry_of(t):
            return writes[-1].value
        key = (n, writes[-1].time)
        if key not in self.reads:
            self.reads[key] = self.reread(n, made, t, writes)
        return self.reads[key]

    def reread(self, n: fx.Node, made: Value, t: torch.Tensor, writes: list[Write]) -> Value:
        source = n.args[0] if n.args and isinstance(n.args[0], fx.Node) else None
        if source is not None and isinstance(n.target, OpOverload) and _may_alias(n.target):
            now = self.read(source)
            if now.name != "opaque":
                args = dict(made.args) | {"self": now}
                return self.add(
                    Value(made.name, args, made.shape, made.dtype, made.overload, self.time, fake=t)
                )
        # What it held when it was last read, and what has been written since: of T slots, one each time.
        since, before = self.last_reads.get(n, (made.time, made))
        held = {"held": before}
        held |= {str(w.time): w.value for w in takewhile(lambda w: w.time > since, reversed(writes))}
        value = self.opaque(t, held, None)
        self.last_reads[n] = (writes[-1].time, value)
        return value

    def keep_reread(self, n: fx.Node, t: torch.Tensor, begin: int) -> None:
        """Node ``n``, whose tensor a call at ``begin`` was given, held then what the call read of it.

        It was written in parts since it was made, so that this is no result of any node.
        """
        slot = get_proxy_slot(t, self.tracer(), None)
        key, node = self.storages.key(t), getattr(getattr(slot, "proxy", slot), "node", None)
        written = [w.time for w in self.writes.get(key, ()) if w.time <= begin]
        value = self.reads.get((node, written[-1])) if written else None
        if value is not None:
            self.rewritten.append(Record(n, value, (key,), [], begin, begin, False))

    # ---- the end

    def finish(self, mode: Any) -> Shadow:
        scopes = [g for g, runs in self.scope_runs.items() if runs == 1]
        inputs = {self.storages._find(s) for s in self.input_storage.values()}
        self.roots += [v for s, v in self.written_values if self.storages._find(s) in inputs]
        mark_live(self.roots)
        writes: dict[int, list[Write]] = {}
        for s, ws in self.writes.items():  # keys may have been united since
            writes.setdefault(self.storages._find(s), []).extend(ws)
        for r in (*self.records.values(), *self.rewritten):
            r.storages = tuple(self.storages._find(s) for s in r.storages)
        return Shadow(
            self.gm, mode, self.records, self.rewritten, self.values, scopes, writes, self.value_of
        )


def _may_alias(target: OpOverload) -> bool:
    """Whether it may return a view of its first operand, or the operand itself, unwritten."""
    returns = target._schema.returns
    return target.overloadpacket.__name__ == "type_as" or (
        len(returns) == 1 and returns[0].alias_info is not None
    )


def _shapes(many: Any, index: int) -> list[tuple[int, ...]]:
    """Of the tensors before one of several."""
    return [tuple(map(int, x.shape)) for x in list(many)[:index] if isinstance(x, torch.Tensor)]
