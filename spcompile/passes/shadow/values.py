"""What a shadow is made of: pure Values, and what each of Dynamo's nodes did (see `shadow`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx


@dataclass(eq=False)
class Value:
    """One pure result: op `name` on `args` (by schema name; nested Values inside lists and tuples).

    `name` is an ATen op's in the one spelling that `passes/spelling.py` gives it, or one of "input" (a
    placeholder), "opaque" (nothing is known of it but its shape), "getitem", "literal" (a Python number as a
    tensor).
    """

    name: str
    args: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    overload: str = ""
    time: int = 0
    node: fx.Node | None = None
    """The Dynamo node that emitted it; None in a Value that a replayed view made up."""
    derived: bool = False
    """Whether it is part of what one call computes, by another spelling: no node holds it."""
    grad_mode: bool = True
    autocast: bool = False
    """Whether it was computed under autocast, whose casts the shadow does not show."""
    users: list[Value] = field(default_factory=list)
    live: bool = False
    escapes: bool = False
    """Whether it is an output itself, is left in an input, or is given to a call that is not read."""
    is_parameter: bool = False
    requires_grad: bool = False
    """Whether a gradient can flow into it, by the inputs it was computed from."""
    fake: torch.Tensor | None = field(default=None, repr=False)

    def operands(self) -> Iterator[Value]:
        return values_in(self.args.values())

    def __repr__(self) -> str:
        return f"<{self.name} {list(self.shape)} t{self.time}>"


def values_in(tree: Any) -> Iterator[Value]:
    """Every Value inside lists, tuples and dicts."""
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, dict):
        for x in tree.values():
            yield from values_in(x)
    elif isinstance(tree, (list, tuple)) or (
        isinstance(tree, Iterable) and not isinstance(tree, (str, torch.Tensor))
    ):
        for x in tree:
            yield from values_in(x)


def differentiable(v: Value) -> bool:
    """Whether a gradient passes through `v`, if one can flow into its operands."""
    if v.name in ("detach", "argmax", "argmin", "sign") or not v.grad_mode:
        return False
    return v.dtype is None or v.dtype.is_floating_point or v.dtype.is_complex


def mark_live(roots: list[Value]) -> None:
    """Mark what reaches an output, an input that is updated in place, or a call that is not read."""
    todo = list(roots)
    for v in roots:
        v.escapes = True
    while todo:
        v = todo.pop()
        if not v.live:
            v.live = True
            todo.extend(v.operands())


def geometry_of(t: torch.Tensor) -> tuple:
    """The storage of a tensor, and which part of it the tensor is."""
    return (t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.stride())


@dataclass
class Write:
    """A storage was written at `time`, through a tensor of this geometry, which then held `value`."""

    time: int
    geometry: tuple
    value: Value


@dataclass
class Record:
    """What one Dynamo node did: its result as Values, its ATen nodes, and when."""

    node: fx.Node
    result: Any
    """The returned tree with a Value in place of each tensor."""
    storages: tuple[int, ...]
    emitted: list[fx.Node]
    begin: int
    end: int
    pure: bool


@dataclass
class Shadow:
    """The trace of one Dynamo graph and of the graphs nested in it."""

    gm: fx.GraphModule
    mode: Any
    """Dynamo's fake mode."""
    records: dict[fx.Node, Record]
    rewritten: list[Record]
    """What nodes held besides, between two writes in parts, where a call read it."""
    values: list[Value]
    scopes: list[fx.GraphModule]
    """Every graph module that was interpreted, outermost first; one that ran twice is not here."""
    writes: dict[int, list[Write]]
    value_of: dict[fx.Node, Value]
    """By ATen node."""

    def written_between(self, storages: tuple[int, ...], begin: int, end: int) -> bool:
        """Whether any of the storages was written at a time in (begin, end]."""
        return any(begin < w.time <= end for s in storages for w in self.writes.get(s, ()))

    def written_after(self, storages: tuple[int, ...], begin: int) -> bool:
        return any(w.time > begin for s in storages for w in self.writes.get(s, ()))
