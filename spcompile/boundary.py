"""The edges of a compiled graph: which outputs leave it, and which inputs enter it, as this rank's part.

Dynamo's graph is edited before autograd (NOTE [Ports] in ``spcompile.ports``); which of the outputs that
could carry the sequence do so is known only when the joint graph has been sharded (:meth:`Boundary.settle`).
What the compiled graph takes and gives is translated at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from spcompile import ports
from spcompile.arguments import arguments_of
from spcompile.collectives import Group
from spcompile.config import Config
from spcompile.errors import SpcompileError
from spcompile.parts import local
from spcompile.placement import Shard
from spcompile.ports import Layout
from spcompile.serve import like
from spcompile.sharded import ShardedTensor, hand_out, own_strides, plain, take_in
from spcompile.sizes import is_symbolic

__all__ = ["Boundary", "open_boundary"]


@dataclass
class _Output:
    """An output that has a port: its number among the outputs, and that of its token, if it has one."""

    number: int
    token: int | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    aliased: bool


@dataclass
class Boundary:
    """The edges of one graph.

    Args:
        group: the ranks along the sequence.
        count: how many outputs the user's graph has.
        outputs: those that may stay this rank's part.
        arriving: which inputs come as this rank's part.
        written: which of the user's are such parts, but are written to (or of many lengths), and so are
            gathered before.
        local: whether these are returned as plain tensors of this rank's tokens.
        layouts: the outputs that do stay, by their number.
    """

    group: Group
    count: int
    local: bool = False
    outputs: list[_Output] = field(default_factory=list)
    arriving: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    layouts: dict[int, Layout] = field(default_factory=dict)

    def settle(self, lent: Mapping[int, Shard]) -> None:
        """Take what the joint pass has decided: how the outputs lie that stay this rank's part."""
        for out in self.outputs:
            if out.number in lent:
                self.layouts[out.number] = Layout(lent[out.number], out.shape, out.stride, self.group)

    def around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled`` for the user's arguments; it takes them as ``compiled`` does."""
        if self.group.size == 1:
            return compiled

        def call(*args: Any) -> Any:
            if len(args) != 1 or not isinstance(args[0], list):
                return self.give(compiled(*self.take(args)))
            taken = self.take(args[0])
            args[0].clear()
            return self.give(compiled(taken))

        return like(compiled, call)

    def take(self, args: Sequence[Any]) -> list[Any]:
        """What the compiled graph is given for the user's arguments."""
        args = list(args)
        for index in self.arriving:
            args[index] = take_in(args[index])
        for index in self.written:
            args[index] = plain(args[index])
        return args

    def give(self, results: Sequence[Any]) -> Any:
        """What the user gets for the compiled graph's results."""
        given = list(results[: self.count])
        for out in self.outputs:
            token = None if out.token is None else results[out.token]
            layout = self.layouts.get(out.number)
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
    if group.size > 1:
        symbolic = config.lengths == "symbolic" and _has_symbols(gm)
        _open_inputs(gm, inputs, boundary, whole_only=symbolic)
        if config.inputs == "sharded" and not (boundary.arriving or boundary.written):
            _require_parts(gm)
        # A layout is of one length: where one graph serves many, what crosses its edges is whole.
        if config.outputs != "whole" and not symbolic and not _ends_without_grad(gm):
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
            shape, stride = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
            aliased = mine.count(mine[number]) > 1
            boundary.outputs.append(_Output(number, token, shape, own_strides(shape, stride), aliased))
    output.args = ((*returned, *tokens),)


def _storage(value: Any) -> int | None:
    if not isinstance(value, Tensor) or isinstance(value, ShardedTensor):
        return None
    return value.untyped_storage()._cdata


def _described(made: fx.Node, like: fx.Node, value: Tensor) -> fx.Node:
    made.meta = {k: like.meta[k] for k in ("stack_trace", "nn_module_stack") if k in like.meta}
    made.meta["example_value"] = value
    return made


def _has_symbols(gm: fx.GraphModule) -> bool:
    values = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
    sizes = [s for x in values for s in (x.shape if isinstance(x, Tensor) else (x,))]
    return any(map(is_symbolic, sizes))


def _open_inputs(gm: fx.GraphModule, inputs: list[Any], boundary: Boundary, whole_only: bool) -> None:
    """Inputs that are this rank's part are taken as such; the graph goes on as if they were whole."""
    last = next((n for n in gm.graph.nodes if n.op != "placeholder"), None)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for index, node in enumerate(placeholders):
        value = node.meta.get("example_value")
        if not isinstance(value, ShardedTensor):
            continue
        local = value._local
        with local.fake_mode:
            whole = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        whole.requires_grad_(value.requires_grad)
        if whole_only or value._version > 0:  # the graph writes to it
            node.meta["example_value"] = inputs[index] = whole
            boundary.written.append(index)
            continue
        if value.requires_grad:
            local = local.detach().requires_grad_()
        with gm.graph.inserting_before(last):
            made = gm.graph.call_function(ports.ops.arrive.default, (node, *value._part.layout.numbers()))
        _described(made, node, whole)
        node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
        node.meta["example_value"] = local
        inputs[index] = local
        boundary.arriving.append(index)
