"""What recognition made of a graph is kept beside Inductor's caches, and made again without recognizing.

Inductor's caches are asked for the graph that recognition has left, so a second start would recognize all
anew, and that is the largest part of what spcompile adds to it.

NOTE [When an edit is made again]
Recognition is a function of what it reads, and what is kept is found by a digest of all of that: each node of
Dynamo's graph and of those nested in it, the geometry of each value, which of them share a storage, which
nodes come from one line of the user's, the modes that PyTorch is in, and the versions of PyTorch, of sympy
and of spcompile's sources. (It never reads the values of a model's tensors.) A graph in which something else
occurs, be it a function that is not PyTorch's or a size that is symbolic (which recognition may guard), is
not kept. The edit is written into new graphs, and these take the place of Dynamo's only if they are, text for
text, what recognition had made; if not, or if anything fails, recognition runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from types import EllipsisType
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from spcompile import _torch
from spcompile.passes.sites import FAILED, Site
from spcompile.source import source_of
from spcompile.warm import remember, remembered

__all__ = ["Kept"]

_PLAIN = (
    *(type(None), bool, int, float, complex, str, range, EllipsisType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_OURS = ("aten", "prims", "spcompile")
# The higher-order operators whose operands and bodies say all that recognition can see of them.
_HIGHER = ("autograd_function_apply", "tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint")
_MODULES = ("torch", "_operator", "math", "builtins")


class _Unkept(Exception):
    """Something of which a text does not say all that recognition may read."""


class Kept:
    """The edit of one graph, from an earlier start or for a later one.

    Args:
        gm: Dynamo's graph before the edit.
        version: changes when the same graph may be edited otherwise.
    """

    def __init__(self, gm: fx.GraphModule, version: str) -> None:
        self.gm, self.scopes = gm, _scopes(gm)
        self.nodes = [list(m.graph.nodes) for m in self.scopes]
        self.sources = [source_of(n) for nodes in self.nodes for n in nodes]
        self.first = {s: i for i, s in reversed(list(enumerate(self.sources)))}
        self.key: str | None = None
        try:
            self.mode = _mode(self.nodes)
            self.texts = [_text(m, self.scopes, self.mode) for m in self.scopes]
            lines = [self.first[s] for s in self.sources]
            everything = (version, _surroundings(), lines, self._storages(), self.texts)
            self.key = hashlib.sha256(repr(everything).encode()).hexdigest()
        except _Unkept:
            pass

    def _storages(self) -> list[tuple[int, Any]]:
        """The number of each value's storage, which tells those that share one, and where it begins there."""
        numbers: dict[int, int] = {}
        values = [x for nodes in self.nodes for n in nodes for x in _tensors(n)]
        return [
            (numbers.setdefault(x.untyped_storage()._cdata, len(numbers)), x.storage_offset()) for x in values
        ]

    # ---- for a later start

    def keep(self, sites: Sequence[Site]) -> None:
        """Keep what the graph has become, and the sites that were seen in it."""
        if any(s.kind == FAILED for s in sites):
            return  # it may have been a want of memory
        try:
            if self.key is not None and _scopes(self.gm) == self.scopes:
                remember(self._name, self._edit(sites))
        except Exception:  # it has no text, or cannot be pickled: a later start recognizes anew
            pass

    @property
    def _name(self) -> str:
        return f"what recognition makes of {self.key}"

    def _edit(self, sites: Sequence[Site]) -> dict[str, Any]:
        texts = [_text(m, self.scopes, self.mode) for m in self.scopes]
        changed = [i for i, text in enumerate(texts) if text != self.texts[i]]
        graphs = {i: self._written(i) for i in changed}
        told = [
            (dataclasses.replace(s, source=""), self.first[s.source] if s.source else None) for s in sites
        ]
        return {"graphs": graphs, "digest": _digest(texts), "sites": told}

    def _written(self, scope: int) -> bytes:
        """A graph's nodes: the old ones by their number, of new ones all that they are."""
        stream = io.BytesIO()
        pickler = _Pickler(stream)
        old = {n: i for i, n in enumerate(self.nodes[scope])}
        metas = {(k, id(x)): i for n, i in reversed(old.items()) for k, x in n.meta.items()}
        graph = self.scopes[scope].graph
        pickler.dump(len(graph.nodes))
        for node in graph.nodes:
            fresh = None
            if node not in old:
                own = {k: x for k, x in node.meta.items() if k == "example_value"}
                lent = {k: metas[k, id(x)] for k, x in node.meta.items() if k not in own}
                fresh = node.op, node.target, node.name, lent, own
            pickler.dump((old.get(node), fresh, node.args, node.kwargs))
            pickler.numbers[node] = len(pickler.numbers)
        return stream.getvalue()

    # ---- from an earlier start

    def again(self) -> list[Site] | None:
        """Make the edit that was kept; its sites, or None (and the graph is as it was) if there is none."""
        kept = remembered(self._name) if self.key is not None else None
        if kept is None:
            return None
        try:
            graphs = {i: self._read(i, content) for i, content in kept["graphs"].items()}
            texts = [
                _text(m, self.scopes, self.mode, graphs[i]) if i in graphs else self.texts[i]
                for i, m in enumerate(self.scopes)
            ]
            if _digest(texts) != kept["digest"]:
                return None
            sites = [
                s if line is None else dataclasses.replace(s, source=self.sources[line])
                for s, line in kept["sites"]
            ]
        except Exception:  # whatever is wrong with what was kept: recognition does not need it
            return None
        for i, graph in graphs.items():
            self.scopes[i].graph = graph  # which compiles it
        return sites

    def _read(self, scope: int, content: bytes) -> fx.Graph:
        module, nodes = self.scopes[scope], self.nodes[scope]
        graph = fx.Graph(tracer_cls=module.graph._tracer_cls)
        graph.set_codegen(module.graph._codegen)
        unpickler = _Unpickler(io.BytesIO(content), self.mode)
        for _ in range(unpickler.load()):
            number, fresh, args, kwargs = unpickler.load()
            if fresh is None:
                old = nodes[number]
                made = graph.create_node(old.op, old.target, args, kwargs, old.name, old.type)
                made.meta = old.meta
                for name, value in vars(old).items():  # what Dynamo notes on nodes besides their meta
                    vars(made).setdefault(name, value)
            else:
                op, target, name, lent, own = fresh
                made = graph.create_node(op, target, args, kwargs, name)
                made.meta = {k: nodes[i].meta[k] for k, i in lent.items()} | own
            unpickler.made.append(made)
        return graph


class _Pickler(pickle.Pickler):
    """Writes nodes as numbers, operators by name, and fake tensors by their geometry."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.numbers: dict[fx.Node, int] = {}

    def persistent_id(self, x: Any) -> Any:
        """What stands for ``x``; None if it is pickled as it is."""
        if isinstance(x, fx.Node):
            return "node", self.numbers[x]
        if isinstance(x, _torch.OpOverload):
            return "operator", x.namespace, x.overloadpacket.__name__, x._overloadname
        if isinstance(x, Tensor):
            return "tensor", tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad
        return None


class _Unpickler(pickle.Unpickler):
    """Reads what :class:`_Pickler` has written, beside the nodes that were made of it so far."""

    def __init__(self, stream: io.BytesIO, mode: Any) -> None:
        super().__init__(stream)
        self.mode, self.made = mode, list[fx.Node]()

    def persistent_load(self, pid: Any) -> Any:
        """What ``pid`` stands for."""
        kind, *rest = pid
        if kind == "node":
            return self.made[rest[0]]
        if kind == "operator":
            return reduce(getattr, rest, torch.ops)
        shape, stride, dtype, device, requires_grad = rest
        with self.mode:
            x = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            return x.requires_grad_(requires_grad)


# ---- texts


def _scopes(gm: fx.GraphModule) -> list[fx.GraphModule]:
    return [m for m in gm.modules() if isinstance(m, fx.GraphModule)]


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(repr(texts).encode()).hexdigest()


def _mode(nodes: Sequence[Sequence[fx.Node]]) -> Any:
    """The fake mode of the graph's values; the shadow is traced in that of the inputs."""
    modes = {id(x.fake_mode): x.fake_mode for scope in nodes for n in scope for x in _tensors(n)}
    if len(modes) != 1:
        raise _Unkept
    return next(iter(modes.values()))


def _surroundings() -> list[Any]:
    """What PyTorch lets depend on more than a call's arguments."""
    versions = torch.__version__, torch.version.git_version, sympy.__version__
    devices = (
        ["cpu", torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else ["cpu"]
    )
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    return [versions, autocast, modes, deterministic, torch.get_default_dtype()]


def _text(
    module: fx.GraphModule, scopes: Sequence[fx.GraphModule], mode: Any, graph: fx.Graph | None = None
) -> str:
    """All of ``module``'s graph (or of ``graph``, which may take its place) but for what shares a storage.

    Raises:
        _Unkept: there is something in it of which a text cannot tell all.
    """
    numbers: dict[fx.Node, int] = {}
    lines = []
    for number, n in enumerate((graph or module.graph).nodes):
        args = ", ".join(_literals((n.args, n.kwargs), numbers))
        value = ", ".join(_literals(n.meta.get("example_value"), {}, mode))
        lines.append(f"{n.op} {n.name} {_target(n, module, scopes)} ({args}) {value}")
        numbers[n] = number
    return "\n".join(lines)


def _target(n: fx.Node, module: fx.GraphModule, scopes: Sequence[fx.GraphModule]) -> str:
    target: Any = n.target
    if n.op in ("placeholder", "output"):
        return str(target)
    if n.op == "call_method" and hasattr(Tensor, target):
        return str(target)
    if n.op == "get_attr":
        return f"{target} {_attribute(reduce(getattr, target.split('.'), module), scopes)}"
    if n.op != "call_function":
        raise _Unkept
    if isinstance(target, _torch.OpOverload | _torch.OpOverloadPacket):
        space = str(target).split(".")[0]
        if space not in _OURS:
            raise _Unkept
        return f"operator {target}"
    if isinstance(target, _torch.HigherOrderOperator):
        if target.name() not in _HIGHER:
            raise _Unkept
        return f"higher {target.name()}"
    return f"function {_function(target)}"


def _function(target: Any) -> str:
    """The name by which pickle finds exactly this function, of PyTorch or of Python."""
    if str(getattr(target, "__module__", None)).split(".")[0] not in _MODULES:
        raise _Unkept
    try:
        return pickle.dumps(target, 0).decode("ascii")
    except (pickle.PicklingError, TypeError, AttributeError, UnicodeError) as why:
        raise _Unkept from why


def _attribute(value: Any, scopes: Sequence[fx.GraphModule]) -> str:
    if isinstance(value, fx.GraphModule) and value in scopes:
        return f"graph {scopes.index(value)}"
    if type(value) not in (Tensor, nn.Parameter, _torch.FakeTensor):
        raise _Unkept
    return f"{type(value)} {_geometry(value)}"


def _literals(x: Any, numbers: Mapping[fx.Node, int], mode: Any = None) -> Iterator[str]:
    """What stands in a call, or what Dynamo noted of a value, with its type."""
    if type(x) in _PLAIN:
        yield repr(x)
    elif isinstance(x, fx.Node):
        yield f"%{numbers[x]}"
    elif isinstance(x, Tensor) and mode is not None:
        yield f"{_bare(x, mode)} {isinstance(x, nn.Parameter)} {_geometry(x)}"
    elif isinstance(x, slice):
        yield "slice"
        yield from _literals((x.start, x.stop, x.step), numbers, mode)
    elif isinstance(x, tuple | list):
        yield f"{_kind(x)} of {len(x)}"
        for y in x:
            yield from _literals(y, numbers, mode)
    elif isinstance(x, Mapping):
        yield f"mapping of {len(x)}"
        for k, y in x.items():
            yield from _literals((k, y), numbers, mode)
    elif isinstance(x, type) and x.__module__ in ("builtins", "torch"):
        yield f"class {x.__module__}.{x.__qualname__}"
    else:
        raise _Unkept


def _bare(x: Tensor, mode: Any) -> str:
    """What kind of tensor without values it is: ours are on the meta device."""
    if isinstance(x, _torch.FakeTensor) and x.fake_mode is mode:
        return "fake"
    if type(x) is Tensor and x.is_meta:
        return "meta"
    raise _Unkept


def _kind(x: Sequence[Any]) -> str:
    """fx makes its own lists of lists, which mean the same."""
    if type(x) in (tuple, torch.Size):
        return type(x).__name__
    if isinstance(x, list) and type(x).__module__ in ("builtins", "torch.fx.immutable_collections"):
        return "list"
    if type(x).__module__ == "torch.return_types":
        return type(x).__name__
    raise _Unkept


def _geometry(x: Tensor) -> str:
    if x.layout is not torch.strided or _torch.is_wrapped(x):
        raise _Unkept
    shape, stride = tuple(x.shape), x.stride()
    if not all(type(n) is int for n in (*shape, *stride)):  # symbolic
        raise _Unkept
    bits = x.requires_grad, x.is_conj(), x.is_neg()
    return f"{x.dtype} {x.device} {shape} {stride} {bits}"


def _tensors(n: fx.Node) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(n.meta.get("example_value"))
    return [x for x in leaves if isinstance(x, _torch.FakeTensor)]
