"""Writing into a graph by running code: what a pass adds is traced from ordinary PyTorch functions.

An :class:`Emitter` is a dispatch mode. While it is on, every operator that runs on its (fake) tensors becomes
a node of the graph, after Inductor's decompositions, with its fake value refreshed. So a pass is written as
PyTorch code, nothing that Inductor would have decomposed can be emitted by mistake, and shapes can never be
stale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from operator import getitem
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from spcompile._torch import tensor_metadata
from spcompile.expressions import Expressions

__all__ = ["Emitter"]

# What a node that is emitted for another takes over from it: the user's source line, and the tags by which
# activation checkpointing and the partitioner decide where it runs. Without them a collective inside a
# checkpointed region would be saved, or worse, recomputed apart from what it serves.
_INHERITED = (
    "stack_trace",
    "nn_module_stack",
    "source_fn_stack",
    "original_aten",
    "from_node",
    "seq_nr",
    "recompute",
    "ac_graph_id",
    "has_backward_hook",
    "partitioner_tag",
    "autograd_backward",
    "custom",
)

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Emitter(TorchDispatchMode):
    """Append to ``graph`` whatever operators run while the mode is on.

    Args:
        graph: the graph written to, at its current insertion point.
        fake_mode: the fake mode of the graph's values.
        decompositions: operator -> function, Inductor's table.
    """

    def __init__(
        self, graph: fx.Graph, fake_mode: Any, decompositions: dict[Any, Callable[..., Any]]
    ) -> None:
        super().__init__()
        self.graph = graph
        self.fake_mode = fake_mode
        self.decompositions = decompositions
        self._sizes = Expressions(graph)
        self._nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        self._numbers: dict[Any, fx.Node] = {}
        self._meta: dict[str, Any] = {}
        self.emitted: list[fx.Node] = []
        self.declined: set[Any] = set()  # operators whose decomposition left them as they were

    def bind(self, value: Tensor, node: fx.Node) -> Tensor:
        """Declare that ``value`` is what ``node`` computes."""
        self._nodes[id(value)] = (value, node)
        return value

    def bind_number(self, value: Any, node: fx.Node) -> None:
        """Declare that ``node`` computes ``value``, a symbolic number."""
        self._numbers.setdefault((type(value), value.node.expr), node)

    def node_of(self, value: Any) -> Any:
        """The node that computes ``value``; anything but a tensor or a symbolic number is itself."""
        if isinstance(value, _SYMBOLIC):
            known = self._numbers.get((type(value), value.node.expr))
            return self._sizes.node(value) if known is None and isinstance(value, SymInt) else known
        if not isinstance(value, Tensor):
            return value
        assert id(value) in self._nodes, f"a tensor that the graph does not compute was used: {value!r}"
        return self._nodes[id(value)][1]

    def fresh(self, value: Tensor) -> Tensor:
        """A tensor like ``value`` of its own: two nodes may have been given one fake tensor."""
        with self.fake_mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    @contextlib.contextmanager
    def serving(self, node: fx.Node | None, **extra: Any) -> Iterator[None]:
        """Nodes emitted inside take over ``node``'s source line and tags, and ``extra`` in their meta."""
        before = self._meta
        inherited = before if node is None else {k: node.meta[k] for k in _INHERITED if k in node.meta}
        self._meta = {**inherited, **extra}
        try:
            yield
        finally:
            self._meta = before

    @contextlib.contextmanager
    def untagged(self) -> Iterator[None]:
        """Nodes emitted inside serve the whole graph, so they take over nothing."""
        before, self._meta = self._meta, {}
        try:
            yield
        finally:
            self._meta = before

    @contextlib.contextmanager
    def saved(self) -> Iterator[None]:
        """Nodes emitted inside are computed once, in the forward, and saved; in a checkpointed region too."""
        with self.serving(None, recompute=CheckpointPolicy.MUST_SAVE):
            yield

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` on values of this graph and write what it does."""
        with torch.no_grad(), self.fake_mode, self:
            return function(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        decomposition = self.decompositions.get(func)
        if decomposition is not None:
            with self:
                out = decomposition(*args, **kwargs)
            if out is not NotImplemented:
                return out
            self.declined.add(func)
        out = func(*args, **kwargs)
        outs = out if isinstance(out, (tuple, list)) else (out,)
        if not any(isinstance(x, Tensor) for x in outs):
            return out
        return self._record(func, args, kwargs, out)

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        assert not func._schema.is_mutable, f"{func} writes: what is emitted only computes"
        # An operator may answer with one of its inputs (an alias, a no-op cast): it stays that input's node.
        if isinstance(out, Tensor) and id(out) in self._nodes:
            return out
        args, kwargs = fx.node.map_aggregate((args, kwargs), self.node_of)
        node = self._create(func, args, kwargs, out)
        if isinstance(out, Tensor):
            return self.bind(out, node)
        for index, item in enumerate(out):
            if isinstance(item, Tensor):
                self.getitem(node, index, item)
        return out

    def getitem(self, node: fx.Node, index: int, value: Tensor) -> Tensor:
        """Output ``index`` of a node that returns several."""
        return self.bind(value, self._create(getitem, (node, index), {}, value))

    def _create(self, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update(self._meta)
        node.meta["val"] = value
        if isinstance(value, Tensor):
            node.meta["tensor_meta"] = tensor_metadata(value)
        self.emitted.append(node)
        return node
