"""A tensor of which each rank holds a part, and which is gathered when somebody reads it.

It has the shape, strides, dtype and device of the whole tensor, and its place in autograd; what only asks for
these gathers nothing. Any operator on it, printing, ``tolist``, ``numpy`` or saving gathers once, on every
rank, and goes on with the whole tensor. Reading is a collective: every rank must read, in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from spcompile import _torch, ports
from spcompile.agreement import before_reading
from spcompile.collectives import Group
from spcompile.errors import SpcompileError
from spcompile.groups import fingerprint
from spcompile.passes.shard.communicate import redistribute
from spcompile.placement import Placement, Replicate, Shard
from spcompile.ports import Layout
from spcompile.rules.base import Context

__all__ = ["Letter", "Part", "ShardedTensor", "hand_out", "own_strides", "plain", "take_in"]

aten = torch.ops.aten
_serial = itertools.count()


class Part:
    """What views of one sharded tensor share: this rank's part, and the whole once it was read."""

    def __init__(self, local: Tensor, layout: Layout, aliased: bool = False) -> None:
        self.local, self.layout, self.aliased = local, layout, aliased
        self.whole: Tensor | None = None
        self.version = 0
        # Of what a trace makes there may be other numbers on other ranks.
        self.serial = next(_serial) if type(local) is Tensor else 0

    def read(self) -> Tensor:
        """The whole tensor; gathered the first time."""
        if type(self.local) is not Tensor:  # while a graph is traced
            return gathered(self.local, self.layout)
        if self.whole is None:
            if self.layout.group.name == "explained":
                self.whole = torch.empty(1, dtype=self.local.dtype, device=self.local.device)
                self.whole = self.whole.zero_().expand(self.layout.shape)
                return self.whole
            if self.layout.group.size > 1:
                what = f"a sharded tensor, {list(self.layout.shape)} {self.local.dtype}"
                before_reading(self.layout.group, what, fingerprint(self.serial, what))
            self.whole = gathered(self.local, self.layout)
            self.version = self.whole._version
        return self.whole

    @property
    def written(self) -> bool:
        """Whether the whole has been written to since it was gathered, so that the part is stale."""
        return self.whole is not None and self.whole._version > self.version


class ShardedTensor(ports.LocalPart, Tensor):
    """See the module. Made by compiled modules and by :func:`spcompile.shard`."""

    _part: Part

    @staticmethod
    def __new__(cls, part: Part) -> ShardedTensor:
        layout, local = part.layout, part.local
        made = _torch.make_wrapper_subclass(
            cls, layout.shape, strides=layout.stride, dtype=local.dtype, device=local.device
        )
        made._part = part
        return made

    # Methods that look at memory are not operators, so PyTorch does not ask the class about them.
    __torch_function__ = _torch.disabled_torch_function

    # A compiled nn.Linear called by itself runs eagerly (PyTorch traces nothing of torch.nn as a frame of its
    # own), and Dynamo would then compile this method as if it were the user's.
    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default) and isinstance(args[0], ShardedTensor):
            return ShardedTensor(args[0]._part)
        alike = _ALIKE.get(func)
        if alike is not None and (found := alike(*args, **kwargs)) is not None:
            return found
        writes = getattr(getattr(func, "_schema", None), "is_mutable", False)
        mutated = args[0] if writes and args and isinstance(args[0], ShardedTensor) else None
        if mutated is not None and mutated._part.aliased:
            raise SpcompileError(
                f"{func} writes to an output of a compiled module that shares its memory with another. "
                "Remedy: clone it first, or compile with outputs='whole'."
            )
        args, kwargs = tree_map_only(ShardedTensor, lambda x: x.whole(), (args, kwargs))
        out = func(*args, **kwargs)
        return mutated if mutated is not None and out is args[0] else out

    def whole(self) -> Tensor:
        """All of it, outside of autograd: gathered once. Every rank must call it."""
        return self._part.read()

    def local_part(self) -> Tensor:
        """This rank's part, padding included; of the whole, if that was written to."""
        layout = self._part.layout
        if not self._part.written and self._version == 0:
            return self._local
        return redistribute(Context(layout.group), self.whole(), Replicate(), layout.shard, layout.shape)

    @property
    def _local(self) -> Tensor:
        return self._part.local

    # Dynamo compiles anew where this context differs, so it holds no length: one graph serves many.
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        s, group = self._part.layout.shard, self._part.layout.group
        return ["_local"], (s.dim, s.start, s.outer, group, self._part.aliased)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> ShardedTensor:
        (dim, start, outer, group, aliased), local = context, inner["_local"]
        shard = Shard(dim, size[dim] // outer, local.shape[dim] // outer, start, outer)
        return ShardedTensor(Part(local, Layout(shard, tuple(size), tuple(stride), group), aliased))

    def __coerce_same_metadata_as_tangent__(self, metadata: Any, kind: type | None = None) -> Tensor:
        return self.whole()

    def __repr__(self, **_: Any) -> str:
        return repr(plain(self))

    def tolist(self) -> Any:
        return self.whole().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        return plain(self).numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return plain(self).__array__(*args, **kwargs)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return plain(self).__dlpack__(*args, **kwargs)

    def data_ptr(self) -> int:
        return self.whole().data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return plain(self).__deepcopy__(memo)


def plain(x: ShardedTensor) -> Tensor:
    """The whole tensor where autograd has ``x``: a view of it, which is a plain tensor."""
    return x.view_as(x) if x.requires_grad else x.whole()


# ---- operators that need not gather ---------------------------------------------------------------------


def _sum(x: Any, y: Any, *, alpha: Any = 1) -> Tensor | None:
    """The sum of two that lie alike: of gradients, where a hidden state is used twice."""
    if not (isinstance(x, ShardedTensor) and isinstance(y, ShardedTensor)):
        return None
    read = x._part.whole is not None or y._part.whole is not None
    if read or x._part.layout != y._part.layout or x.dtype != y.dtype:
        return None
    return ShardedTensor(Part(torch.add(x._local, y._local, alpha=alpha), x._part.layout))


_ALIKE: dict[Any, Callable[..., Tensor | None]] = {aten.add.Tensor: _sum}


# ---- gathering ------------------------------------------------------------------------------------------


def gathered(local: Tensor, layout: Layout) -> Tensor:
    """The whole tensor in its strides, of which ``local`` is this rank's part."""
    sent = local.view(torch.uint8) if local.dtype == torch.bool else local  # c10d has no bool
    with torch.no_grad():
        whole = redistribute(Context(layout.group), sent, layout.shard, Replicate(), layout.shape)
        whole = whole.view(torch.bool) if local.dtype == torch.bool else whole
        if whole.stride() == layout.stride:
            return whole
        return local.new_empty_strided(layout.shape, layout.stride).copy_(whole)


def own_strides(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """``stride``, if then each entry has memory of its own (with gaps, perhaps); else contiguous ones."""
    reached = 1
    for step, size in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n > 1):
        if step < reached:
            return torch.empty(shape, device="meta").stride()
        reached = step * (size - 1) + reached
    return stride


# ---- autograd -------------------------------------------------------------------------------------------


class Letter:
    """A gradient for the mailbox."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def part(self, shard: Shard | None, group: Group) -> Tensor:
        """See :class:`spcompile.ports.Letter`."""
        want: Placement = Replicate() if shard is None else shard
        x, shape = self.gradient, tuple(self.gradient.shape)
        if isinstance(x, ShardedTensor):
            if x._part.layout.shard == shard and not x._part.written:
                return x._local
            x = x.whole()
        return redistribute(Context(group), x, Replicate(), want, shape)


class _HandedOut(torch.autograd.Function):
    """An output's place in autograd: its gradient goes into the mailbox, its number to the port's token."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, token: Tensor, part: Part | None) -> Tensor:
        ctx.set_materialize_grads(False)
        if part is not None:
            return ShardedTensor(part)
        # The same tensor and not a view of it, so that a user may write to it. (Inductor returns no views.)
        if local._is_view():
            return local.clone()
        ctx.mark_dirty(local)
        return local

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        return None, None if gradient is None else ports.deliver(Letter(gradient)), None


def hand_out(local: Tensor, token: Tensor | None, layout: Layout | None, aliased: bool = False) -> Tensor:
    """An output as the user gets it: ``local`` itself, or the sharded tensor of which it is a part.

    Args:
        token: of the port by which a gradient comes back; None for an output without gradient.
    """
    part = None if layout is None else Part(local, layout, aliased)
    if token is not None and token.requires_grad and torch.is_grad_enabled():
        return _HandedOut.apply(local, token, part)
    return local if part is None else ShardedTensor(part)


class _TakenIn(torch.autograd.Function):
    """This rank's part of an input; its gradient is this rank's part of the input's."""

    @staticmethod
    def forward(ctx: Any, x: ShardedTensor, local: Tensor) -> Tensor:
        ctx.layout = x._part.layout
        return local.view_as(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ShardedTensor(Part(gradient, ctx.layout)), None


def take_in(x: ShardedTensor) -> Tensor:
    """This rank's part of ``x`` in the place that it has in autograd."""
    local = x.local_part()
    return _TakenIn.apply(x, local) if x.requires_grad and torch.is_grad_enabled() else local
