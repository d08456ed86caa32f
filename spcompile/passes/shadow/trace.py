"""Runs Dynamo's graph on fake tensors, so that a :class:`Builder` sees each of its calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from spcompile._torch import HigherOrderOperator, get_proxy_slot, make_fx, track_tensor_tree
from spcompile.passes.numbers import is_operand, unsized
from spcompile.passes.shadow.build import Builder
from spcompile.passes.shadow.purity import is_pure
from spcompile.passes.shadow.values import Record, Shadow, Value, values_in
from spcompile.passes.transforms import Inside, clean_state, may_write

__all__ = ["trace"]

# Higher-order ops whose body is plain code that runs where it stands, so that one may read and edit inside.
_INLINED = {"tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint"}


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
    builder = Builder(gm)
    with mode:
        fakes = [0 if is_operand(e, builder.sizes) else _static(e) for e in examples]
        for e, f in zip(examples, fakes, strict=True):
            if isinstance(e, torch.Tensor):
                builder.alias_inputs(e, f)
        with torch.enable_grad(), clean_state():
            make_fx(_running(builder), tracing_mode="real", pre_dispatch=True)(*fakes)
    return builder.finish(mode)


def _running(builder: Builder) -> Callable[..., list[torch.Tensor]]:
    """What `make_fx` traces."""

    def run(*args: Any) -> list[torch.Tensor]:
        out = Interpreter(builder.gm, builder).run(*args)
        builder.roots.extend(values_in(builder.tree(out)))
        return [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]

    return run


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


class Interpreter(fx.Interpreter):
    """Runs one graph module and keeps a Record of each of its nodes."""

    def __init__(self, gm: fx.GraphModule, builder: Builder) -> None:
        super().__init__(gm)
        self.builder = builder
        builder.scope_runs[gm] = builder.scope_runs.get(gm, 0) + 1
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
        for x in n.all_input_nodes if b.writes else ():
            if isinstance(self.env[x], torch.Tensor):
                b.keep_reread(x, self.env[x], begin)
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
            return Interpreter(args[0], self.builder).run(*args[1:])
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


def _be_arange(result: Value, numbers: range) -> None:
    """A tensor of a Python range is an `arange`."""
    result.name, result.overload = "arange", "start_step"
    result.args = {"start": numbers.start, "end": numbers.stop, "step": numbers.step, "dtype": result.dtype}
