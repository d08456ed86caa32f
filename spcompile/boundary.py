"""The edges of a compiled graph: which outputs leave it, and which inputs enter it, as this rank's part.

Dynamo's graph is edited before autograd (NOTE [Ports] in ``spcompile.ports``); which of the outputs that
could carry the sequence do so is known only when the joint graph has been sharded (:meth:`Boundary.settle`).
What the compiled graph takes and gives is translated at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from spcompile import ports
from spcompile.arguments import arguments_of, examples_of
from spcompile.collectives import Group
from spcompile.config import Config
from spcompile.errors import SpcompileError
from spcompile.expressions import Expressions
from spcompile.parts import local
from spcompile.placement import Shard
from spcompile.ports import Layout
from spcompile.serve import inputs_of, like
from spcompile.sharded import ShardedTensor, hand_out, own_strides, plain, take_in
from spcompile.sizes import InputSizes

__all__ = ["Boundary", "open_boundary"]


@dataclass
class _Output:
    """An output that has a port: its number among the outputs, and that of its token, if it has one; its
    sizes as in a :class:`~spcompile.ports.Layout`."""

    number: int
    token: int | None
    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    aliased: bool


@dataclass
class Boundary:
    """The edges of one graph.

    Args:
        group: the ranks along the sequence.
        count: how many outputs the user's graph has.
        outputs: those that may stay this rank's part.
        arriving: which inputs come as this rank's part.
        written: which of the user's are such parts, but are written to, and so are gathered before.
        local: whether these are returned as plain tensors of this rank's tokens.
        sizes: what the symbols of sizes are in a call, by what the user passes and what the graph is given.
        layouts: the outputs that do stay, by their number: how they lie, for any sizes.
    """

    group: Group
    count: int
    local: bool = False
    outputs: list[_Output] = field(default_factory=list)
    arriving: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    sizes: InputSizes = field(default_factory=lambda: InputSizes(()))
    layouts: dict[int, Layout] = field(default_factory=dict)
    _last: tuple[Mapping[Any, int], dict[int, Layout]] | None = None

    def settle(self, lent: Mapping[int, Shard]) -> None:
        """Take what the joint pass has decided: how the outputs lie that stay this rank's part."""
        for out in self.outputs:
            if out.number in lent:
                self.layouts[out.number] = Layout(lent[out.number], out.shape, out.stride, self.group)

    def layouts_at(self, values: Mapping[Any, int]) -> dict[int, Layout]:
        """The layouts where sizes have these values; those of the last call are kept."""
        if self._last is None or self._last[0] != values:
            here = {number: layout.at_sizes(values) for number, layout in self.layouts.items()}
            own = {n: replace(x, stride=own_strides(x.shape, x.stride)) for n, x in here.items()}
            self._last = values, own
        return self._last[1]

    def around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled`` for the user's arguments; it takes them as ``compiled`` does."""
        if self.group.size == 1:
            return compiled

        def call(*args: Any) -> Any:
            given = inputs_of(args)
            taken = self.take(given)
            values = self.sizes.values([*given, *taken])
            if len(args) != 1 or not isinstance(args[0], list):
                return self.give(compiled(*taken), values)
            args[0].clear()
            return self.give(compiled(taken), values)

        return like(compiled, call)

    def take(self, args: Sequence[Any]) -> list[Any]:
        """What the compiled graph is given for the user's arguments."""
        args = list(args)
        for index in self.arriving:
            args[index] = take_in(args[index])
        for index in self.written:
            args[index] = plain(args[index])
        return args

    def give(self, results: Sequence[Any], values: Mapping[Any, int]) -> Any:
        """What the user gets for the compiled graph's results, in a call with these sizes."""
        given, layouts = list(results[: self.count]), self.layouts_at(values)
        for out in self.outputs:
            token = None if out.token is None else results[out.token]
            layout = layouts.get(out.number)
            if layout is not None or token is not None:
                given[out.number] = hand_out(given[out.number], token, layout, out.aliased)
                if self.local:
                    given[out.number] = local(given[out.number])
        return tuple(given) if isinstance(results, tuple) else given


def open_boundary(
    gm: fx.GraphModule, inputs: Sequence[Any], group: Group, config: Config
) -> tuple[Boundary, list[Any]]:
    """Edit Dynamo's graph in place; returns its boundary and the inputs to compile it for."""
    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    boundary = Boundary(group, len(output.args[0]), config.outputs == "sharded")
    inputs = list(inputs)
    passed = examples_of(gm)
    if group.size > 1:
        _open_inputs(gm, inputs, boundary)
    boundary.sizes = InputSizes([*passed, *examples_of(gm)])
    if group.size > 1:
        if config.inputs == "sharded" and not (boundary.arriving or boundary.written):
            _require_parts(gm)
        if config.outputs != "whole" and not _ends_without_grad(gm):
            _open_outputs(gm, output, boundary)
        gm.recompile()
    return boundary, inputs


def _require_parts(gm: fx.GraphModule) -> None:
    """Under ``inputs="sharded"`` a graph with arguments has one that is this rank's part.

    Raises:
        SpcompileError: names the arguments.
    """
    found = [str(a) for a in arguments_of(gm) if a.kind == "argument"]
    if found:
        raise SpcompileError(
            f"option inputs='sharded': of {', '.join(found)} none is this rank's part of a tensor. "
            "Remedy: pass spcompile.shard(tokens_of_this_rank, dim=1)."
        )


def _ends_without_grad(gm: fx.GraphModule) -> bool:
    """Whether autograd is switched off where the graph ends, though not where it is called."""
    modes = [n.args[0] for n in gm.graph.nodes if getattr(n.target, "__name__", "") == "_set_grad_enabled"]
    return bool(modes) and not modes[-1] and torch.is_grad_enabled()


def _open_outputs(gm: fx.GraphModule, output: fx.Node, boundary: Boundary) -> None:
    returned = list(output.args[0])
    values = [x.meta.get("example_value") if isinstance(x, fx.Node) else None for x in returned]
    inputs = [n for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")]
    theirs = {_storage(n.meta.get("example_value")) for n in inputs}
    mine = [_storage(v) for v in values]
    tokens: list[fx.Node] = []
    with gm.graph.inserting_before(output):
        for number, (node, value) in enumerate(zip(list(returned), values, strict=True)):
            if not isinstance(value, Tensor) or value.numel() <= 1 or mine[number] in theirs:
                continue
            token = None
            if value.requires_grad and torch.is_grad_enabled():
                token = len(returned) + len(tokens)
                made = gm.graph.call_function(ports.ops.open_port.default, (node,))
                tokens.append(_described(made, node, torch.zeros((), dtype=torch.float64, device="meta")))
                node = _described(gm.graph.call_method("detach", (node,)), node, value)
            made = gm.graph.call_function(ports.ops.lend.default, (node, number))
            returned[number] = _described(made, node, value)
            shape, stride = (tuple(map(boundary.sizes.expression, x)) for x in (value.shape, value.stride()))
            aliased = mine.count(mine[number]) > 1
            boundary.outputs.append(_Output(number, token, shape, stride, aliased))
    output.args = ((*returned, *tokens),)


def _storage(value: Any) -> int | None:
    if not isinstance(value, Tensor) or isinstance(value, ShardedTensor):
        return None
    return value.untyped_storage()._cdata


def _described(made: fx.Node, like: fx.Node, value: Tensor) -> fx.Node:
    made.meta = {k: like.meta[k] for k in ("stack_trace", "nn_module_stack") if k in like.meta}
    made.meta["example_value"] = value
    return made


def _open_inputs(gm: fx.GraphModule, inputs: list[Any], boundary: Boundary) -> None:
    """Inputs that are this rank's part are taken as such; the graph goes on as if they were whole."""
    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    wholes: list[tuple[fx.Node, Layout, Tensor]] = []
    for index, node in enumerate([n for n in gm.graph.nodes if n.op == "placeholder"]):
        value = node.meta.get("example_value")
        if not isinstance(value, ShardedTensor):
            continue
        local = value._local
        with local.fake_mode:
            whole = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        whole.requires_grad_(value.requires_grad)
        if value._version > 0:  # the graph writes to it
            node.meta["example_value"] = inputs[index] = whole
            boundary.written.append(index)
            continue
        if value.requires_grad:
            local = local.detach().requires_grad_()
        node.meta["example_value"] = inputs[index] = local
        boundary.arriving.append(index)
        wholes.append((node, value._part.layout, whole))
    sizes = Expressions(gm.graph, "example_value")
    for node, layout, whole in wholes:
        users = list(node.users)
        numbers = tree_map_only(torch.SymInt, sizes.node, layout.numbers())
        with gm.graph.inserting_before(first):
            made = gm.graph.call_function(ports.ops.arrive.default, (node, *numbers))
        _described(made, node, whole)
        for user in users:
            user.replace_input_with(node, made)
