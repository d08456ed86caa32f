"""A pre-autograd ATen trace of Dynamo's graph, for recognizers to read.

Dynamo's graph speaks the user's language (methods, composite functions, in-place updates); recognizers want
one spelling of everything. The shadow is that: an `fx.Interpreter` runs Dynamo's graph under
`make_fx(pre_dispatch=True)` on fake tensors, and every ATen call becomes a `Value`, pure and immutable.
Nothing is ever compiled from the shadow: retracing a whole graph loses the custom backward of
`autograd_function_apply`. It is only read, and each Value knows the Dynamo node that made it, so that the
edit can be made on Dynamo's own graph.

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

from spcompile._torch import (
    HigherOrderOperator,
    OpOverload,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
    track_tensor_tree,
)
from spcompile.passes.numbers import is_operand, size_symbols, unsized
from spcompile.passes.shadow_values import (
    VIEWS,
    Record,
    Shadow,
    Value,
    Write,
    differentiable,
    mark_live,
    values_in,
)
from spcompile.passes.spelling import Call, canonical
from spcompile.passes.transforms import Inside, Transforms, clean_state, may_write

__all__ = ["Record", "Shadow", "Value", "is_pure", "trace"]

# Higher-order ops whose body is plain code that runs where it stands, so that one may read and edit inside.
_INLINED = {"tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint"}
# These may return their input or a copy, by dtype and strides that autocast can change: assume both.
_MAY_ALIAS = {"to", "type_as", "contiguous", "reshape", "float", "flatten", "expand_as", "ravel"}
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


def trace(gm: fx.GraphModule) -> Shadow | None:
    """Trace Dynamo's `gm` on static shapes; None where its inputs are not plain fake tensors.

    Sizes that are still symbolic (`passes/lengths.py` gives copies without) are specialised by `int()`, which
    is what guards them.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    examples = [n.meta.get("example_value") for n in placeholders]
    modes = {id(m): m for e in examples if (m := getattr(e, "fake_mode", None)) is not None}
    if len(modes) != 1:
        return None
    (mode,) = modes.values()
    if any(isinstance(e, torch.Tensor) and getattr(e, "fake_mode", None) is None for e in examples):
        return None
    builder = _Builder(gm)
    with mode:
        fakes = [0 if is_operand(e, builder.sizes) else _static(e) for e in examples]
        for e, f in zip(examples, fakes, strict=True):
            if isinstance(e, torch.Tensor):
                builder.alias_inputs(e, f)
        with torch.enable_grad(), clean_state():
            make_fx(builder.run, tracing_mode="real", pre_dispatch=True)(*fakes)
    return builder.finish(mode)


def _static(example: Any) -> Any:
    """A fresh fake of static shape: in-place calls in the graph must not touch Dynamo's own fakes."""
    if isinstance(example, torch.Tensor):
        size, stride = tuple(map(int, example.shape)), tuple(map(int, example.stride()))
        return torch.empty_strided(size, stride, dtype=example.dtype, device=example.device)
    if isinstance(example, torch.SymInt):
        return int(example)
    if isinstance(example, torch.SymFloat):
        return float(example)
    if isinstance(example, torch.SymBool):
        return bool(example)
    return example


def _geometry(t: torch.Tensor) -> tuple:
    return (t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.stride())


class _Builder:
    """Runs the interpreter and turns the ATen nodes of each Dynamo node into Values as they appear."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.records: dict[fx.Node, Record] = {}
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

    def run(self, *args: Any) -> Any:
        out = self.interpret(self.gm, *args)
        self.roots.extend(values_in(self.tree(out)))
        return [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]

    def interpret(self, gm: fx.GraphModule, *args: Any) -> Any:
        self.scope_runs[gm] = self.scope_runs.get(gm, 0) + 1
        return _Interpreter(gm, self).run(*args)

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
        with torch.utils._python_dispatch._disable_current_modes():
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
            if name in _MAY_ALIAS and isinstance(val, torch.Tensor):
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
        self.writes.setdefault(self.storages.key(t), []).append(Write(self.time, _geometry(t), value))
        self.written_values.append((self.storages.key(t), value))

    def read(self, n: fx.Node) -> Value:
        """What the tensor of ATen node `n` holds now."""
        made, t = self.value_of[n], n.meta.get("val")
        if not isinstance(t, torch.Tensor) or not self.writes:
            return made
        writes = self.writes.get(self.storages.key(t))
        if not writes or writes[-1].time <= made.time:
            return made
        if writes[-1].geometry == _geometry(t):
            return writes[-1].value
        key = (n, writes[-1].time)
        if key not in self.reads:
            self.reads[key] = self.reread(n, made, t, writes)
        return self.reads[key]

    def reread(self, n: fx.Node, made: Value, t: torch.Tensor, writes: list[Write]) -> Value:
        source = n.args[0] if n.args and isinstance(n.args[0], fx.Node) else None
        view = isinstance(n.target, OpOverload) and n.target.overloadpacket.__name__ in VIEWS
        if view and source is not None:
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

    # ---- the end

    def finish(self, mode: Any) -> Shadow:
        scopes = [g for g, runs in self.scope_runs.items() if runs == 1]
        inputs = {self.storages._find(s) for s in self.input_storage.values()}
        self.roots += [v for s, v in self.written_values if self.storages._find(s) in inputs]
        mark_live(self.roots)
        writes: dict[int, list[Write]] = {}
        for s, ws in self.writes.items():  # keys may have been united since
            writes.setdefault(self.storages._find(s), []).extend(ws)
        for r in self.records.values():
            r.storages = tuple(self.storages._find(s) for s in r.storages)
        return Shadow(self.gm, mode, self.records, self.values, scopes, writes, self.value_of)


class _Interpreter(fx.Interpreter):
    """Runs one graph module and keeps a Record of each of its nodes."""

    def __init__(self, gm: fx.GraphModule, builder: _Builder) -> None:
        super().__init__(gm)
        self.builder = builder
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        b = self.builder
        begin = b.time
        if b.transforms.enclose(n) or self.unknown(n):
            out = self.unread(n)
        elif n.op == "call_function" and isinstance(n.target, HigherOrderOperator):
            out = self.higher_order(n)
        elif n.op == "call_method" and n.target == "item" and _is_number(n.meta.get("example_value")):
            out = _static(n.meta["example_value"])  # a number that Dynamo passes as a tensor
        else:
            out = super().run_node(n)
        if n.op == "get_attr" and isinstance(out, torch.Tensor) and getattr(out, "fake_mode", None) is None:
            out = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device)
        emitted = b.new_nodes()
        for a in emitted:
            b.absorb(a, n)
        result = b.tree(out)
        _believe_dynamo(n, result, begin)
        if n.target is torch.tensor and n.args and isinstance(n.args[0], (bool, int, float)):
            result.name, result.args = "literal", {"value": n.args[0]}
        if n.target is torch.tensor and n.args and isinstance(n.args[0], range):
            _be_arange(result, n.args[0])
        if n.op == "placeholder":
            _mark_input(n, result)
        tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        storages = tuple(b.storages.key(t) for t in tensors)
        pure = bool(emitted) and all(is_pure(a) for a in emitted) and n.op in ("call_function", "call_method")
        b.records[n] = Record(n, result, storages, emitted, begin, b.time, pure)
        return out

    def higher_order(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target.name() in _INLINED and isinstance(args[0], fx.GraphModule):
            return self.builder.interpret(args[0], *args[1:])
        return self.opaque_call(n, args, kwargs)

    def unknown(self, n: fx.Node) -> bool:
        """Whether ``n`` takes or gives a number that is an operand, or a tensor of unknown size."""
        if n.op == "output":
            return False
        example = n.meta.get("example_value")
        if unsized(example) or any(is_operand(x, self.builder.sizes) for x in pytree.tree_leaves(example)):
            return True
        return any(isinstance(x, Inside) for x in pytree.tree_leaves(self.given(n)))

    def given(self, n: fx.Node) -> list[Any]:
        """What the operands of ``n`` are, those inside a slice too."""
        return [self.env[x] for x in n.all_input_nodes]

    def unread(self, n: fx.Node) -> Any:
        """A call inside torch.vmap or the like, or on what is known at run time only: it is not run."""
        b, example = self.builder, n.meta.get("example_value")
        if n.op == "placeholder":
            super().run_node(n)
        given = b.transforms.reads(self.given(n))
        if b.transforms.leaves(n) and not unsized(example):
            return self.opaque_call(n, tuple(given), {}, b.transforms.writes or may_write(n))
        b.roots += [b.of_tensor(t) for t in given]
        return None if example is None else Inside(tuple(given))

    def opaque_call(self, n: fx.Node, args: tuple, kwargs: dict, writes: bool = True) -> Any:
        """An op whose body is not read: fresh outputs, and any tensor that it was given may be written."""
        b = self.builder
        b.new_nodes()
        tracer = b.tracer()
        out = pytree.tree_map(_static, n.meta["example_value"])
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        reads = tuple(get_proxy_slot(t, tracer).proxy for t in given)
        proxy = tracer.create_proxy("call_function", _opaque, reads, {}, name=n.name)
        track_tensor_tree(out, proxy, constant=None, tracer=tracer)
        for a in b.new_nodes():
            b.absorb(a, n)
        called = b.value_of[proxy.node]
        b.roots.append(called)
        for t, p in zip(given, reads, strict=True) if writes else ():
            held = Value("opaque", {"call": called}, tuple(t.shape), t.dtype, time=b.time, node=n, fake=t)
            b.write(p.node, b.add(held))
        return out


def _shapes(many: Any, index: int) -> list[tuple[int, ...]]:
    """Of the tensors before one of several."""
    return [tuple(map(int, x.shape)) for x in list(many)[:index] if isinstance(x, torch.Tensor)]


def _opaque(*tensors: torch.Tensor) -> Any:
    """Stands for a higher-order op in the trace, of which nothing is ever run."""
    raise AssertionError("the shadow is only read")


def _is_number(example: Any) -> bool:
    """Whether it is a number that is known while Dynamo traces."""
    known = isinstance(example, (torch.SymInt, torch.SymFloat, torch.SymBool)) and example.node.has_hint()
    return known or isinstance(example, (bool, int, float))


def _believe_dynamo(n: fx.Node, result: Any, begin: int) -> None:
    """Take dtypes from Dynamo: autocast's casts happen below the level at which the shadow is recorded."""
    example = n.meta.get("example_value")
    if isinstance(example, torch.Tensor) and isinstance(result, Value) and result.time > begin:
        result.dtype = example.dtype


def _mark_input(n: fx.Node, result: Any) -> None:
    example = n.meta.get("example_value")
    if isinstance(example, torch.Tensor) and isinstance(result, Value) and result.name == "input":
        result.node = n
        result.is_parameter = isinstance(example, torch.nn.Parameter)
        result.requires_grad = example.requires_grad


def is_pure(n: fx.Node) -> bool:
    """Whether an ATen node only computes: it writes nothing and draws no random numbers."""
    if n.op == "get_attr" or n.target is operator.getitem:
        return True
    target = n.target
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags and not target.overloadpacket.__name__.endswith(
        "dropout"
    ):
        return True
    args = dict(zip((a.name for a in target._schema.arguments), n.args, strict=False)) | dict(n.kwargs)
    if target.overloadpacket.__name__ == "scaled_dot_product_attention":
        return args.get("dropout_p", 0.0) == 0
    return args.get("p") == 0 or args.get("train") is False


def _be_arange(result: Value, numbers: range) -> None:
    """A tensor of a Python range is an `arange`."""
    result.name, result.overload = "arange", "start_step"
    result.args = {"start": numbers.start, "end": numbers.stop, "step": numbers.step, "dtype": result.dtype}
