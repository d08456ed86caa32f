"""Views and copies: the same entries under other dims, pulled by their consumers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch

from spcompile.placement import Partial, Replicate, Routed, Shard, Sharding, local_shape, reshape_shard
from spcompile.rules.base import Call, Context, Emit, Factors, Side, Split, along
from spcompile.sizes import bounds_of

__all__ = [
    "Concatenation",
    "Select",
    "SelectScatter",
    "along_dim",
    "expand",
    "pad",
    "permute",
    "repeat",
    "reshape",
    "slice_scatter",
    "unbind",
    "window",
]

aten, prims = torch.ops.aten, torch.ops.prims


@dataclass
class Reshape:
    """view, reshape, squeeze, unsqueeze: row-major order is kept, so any dim that is not cut passes."""

    call: Call
    linear: tuple[frozenset[int], ...] = (frozenset({0}),)
    orders = True

    def split(self, side: Side, index: int, shard: Sharding) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        (source,), (target,) = self.call.operands, self.call.outputs
        shapes = tuple(source.shape), tuple(target.shape)
        other = _reshaped(shard, *(shapes if side == "in" else shapes[::-1]))
        if other is None:
            return None
        before, after = (shard, other) if side == "in" else (other, shard)
        shape = local_shape(shapes[1], after)
        return Split((before,), (after,), (None,), lambda context, operands: operands[0].reshape(shape))

    def whole_emit(self) -> Emit:
        """A reshape: the operand's strides may no longer be those for which a view was asked."""
        shape = tuple(self.call.outputs[0].shape)
        return lambda context, operands: operands[0].reshape(shape)


def _reshaped(shard: Sharding, source: tuple[int, ...], target: tuple[int, ...]) -> Sharding | None:
    """Where the sequence lies; a dim in a sort's order stays the dim that it is: nothing is merged."""
    if isinstance(shard, Shard):
        return reshape_shard(shard, source, target)
    slots = reshape_shard(shard.slots, source, target)
    return shard.at(slots.dim) if slots is not None and slots == shard.slots.at(slots.dim) else None


def reshape(call: Call) -> Reshape:
    """See :class:`Reshape`."""
    return Reshape(call)


def permute(call: Call) -> Factors:
    """Dim i of the output is dim order[i] of the operand."""
    order = call.args[1]
    dims = tuple(f"d{i}" for i in range(len(order)))
    return Factors(call, (dims,), (tuple(dims[i] for i in order),), linear=(frozenset({0}),))


def expand(call: Call) -> Factors:
    """A broadcast dim runs over no factor; the dim it becomes is a factor of the output alone."""
    (x,), (out,) = call.operands, call.outputs
    outputs = tuple(f"d{i}" for i in range(out.dim()))
    offset = out.dim() - x.dim()
    inputs = tuple(
        None if size == 1 != out.shape[offset + d] else outputs[offset + d] for d, size in enumerate(x.shape)
    )

    def emit(split: Split) -> Emit:
        shape = local_shape(tuple(out.shape), split.outputs[0])
        return lambda context, operands: operands[0].expand(shape)

    return Factors(call, (inputs,), (outputs,), linear=(frozenset({0}),), emit=emit, anywhere=True)


def _without(call: Call, dim: int) -> tuple[tuple[str, ...], tuple[str, ...], frozenset[str]]:
    """The factors of operand 0, those left when ``dim`` is taken away, and that one, which is whole."""
    rank = call.operands[0].dim()
    dims = tuple(f"d{i}" for i in range(rank))
    return dims, tuple(d for i, d in enumerate(dims) if i != dim % rank), frozenset({dims[dim % rank]})


def unbind(call: Call) -> Factors:
    """Entries of a dim, which is needed whole; the others pass."""
    dims, kept, whole = _without(call, call.argument(1, "dim", 0))
    return Factors(call, (dims,), tuple(kept for _ in call.outputs), whole, linear=(frozenset({0}),))


def _of_one_rank(shard: Shard, index: int, select: Callable[[torch.Tensor, int], torch.Tensor]) -> Split:
    """One entry of the sequence: the rank that holds it has it, the others have a term of zeros."""
    position = shard.start + index
    owner, inside = position // shard.block, position % shard.block

    def emit(context: Context, operands: list[torch.Tensor]) -> torch.Tensor:
        entry = select(operands[0], inside)
        return torch.where(context.rank(entry.device) == owner, entry, entry.new_zeros(()))

    return Split((shard,), (Partial("sum"),), (None,), emit)


@dataclass
class Select:
    """select: an entry of the sequence is a term of one rank; other dims pass."""

    call: Call
    linear: tuple[frozenset[int], ...] = (frozenset({0}),)
    orders = True

    def split(self, side: Side, index: int, shard: Sharding) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        (x,) = self.call.operands
        dim, entry = self.call.argument(1, "dim") % x.dim(), self.call.argument(2, "index")
        if side == "out" or shard.dim != dim:
            return unbind(self.call).split(side, index, shard)
        if isinstance(shard, Routed) or shard.outer != 1:
            return None
        return _of_one_rank(shard, entry % x.shape[dim], lambda local, at: local.select(dim, at))


@dataclass
class SelectScatter:
    """select_scatter: one entry of ``base`` is replaced; along the sequence, chosen by position."""

    call: Call
    linear: tuple[frozenset[int], ...] = (frozenset({0, 1}),)
    orders = True

    def split(self, side: Side, index: int, shard: Sharding) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        base = self.call.operands[0]
        dim, entry = self.call.argument(2, "dim") % base.dim(), self.call.argument(3, "index")
        if (side, index) == ("in", 1) or shard.dim != dim:
            dims, kept, whole = _without(self.call, dim)
            return Factors(self.call, (dims, kept), (dims,), whole).split(side, index, shard)
        if isinstance(shard, Routed) or shard.outer != 1:
            return None
        place = shard.window(shard.start + entry % base.shape[dim], 1)
        return Split(
            (shard, Replicate()),
            (shard,),
            (None, None),
            lambda context, ops: context.where_valid(ops[1].unsqueeze(dim), place, ops[0]),
        )


def repeat(call: Call) -> Factors:
    """A dim that is repeated is needed whole; one that stays as it is passes."""
    (x,), (out,) = call.operands, call.outputs
    times, offset = call.argument(1, "repeats"), out.dim() - x.dim()
    outputs = tuple(f"d{i}" for i in range(out.dim()))
    whole = frozenset(d for i, d in enumerate(outputs) if times[i] != 1 or i < offset)
    return Factors(call, (outputs[offset:],), (outputs,), whole, linear=(frozenset({0}),))


def along_dim(call: Call) -> Factors:
    """cat: the dim named is needed whole, the others pass. All are linear."""
    rule = along(call, {call.argument(1, "dim", 0)})
    rule.linear = (frozenset(range(len(call.operands))),)
    return rule


@dataclass
class Window:
    """slice: the same positions, of which fewer are valid (NOTE in placement.py); other dims pass.

    A single entry is a term of the rank that holds it.
    """

    call: Call
    linear: tuple[frozenset[int], ...] = (frozenset({0}),)
    orders = True

    def split(self, side: Side, index: int, shard: Sharding) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        (x,), (out,) = self.call.operands, self.call.outputs
        dim, start, step = self._bounds()
        if shard.dim != dim or x.shape[dim] == out.shape[dim]:
            return Split((shard,), (shard,), (None,), self._on_other_dim(shard))
        if isinstance(shard, Routed) or step != 1 or shard.outer != 1:
            return None
        if side == "in" and out.shape[dim] == 1:
            return _of_one_rank(shard, start, lambda local, at: local.narrow(dim, at, 1))
        # Element i of the output is element i + start of the operand, so they stand at the same position.
        origin = shard.start if side == "in" else shard.start - start
        before = shard.window(origin, x.shape[dim])
        after = shard.window(origin + start, out.shape[dim])
        return Split((before,), (after,), (None,), lambda context, operands: operands[0])

    def _bounds(self) -> tuple[int, int, int]:
        (x,) = self.call.operands
        dim = self.call.argument(1, "dim", 0) % x.dim()
        start, stop = self.call.argument(2, "start"), self.call.argument(3, "end")
        step = self.call.argument(4, "step", 1)
        return dim, bounds_of(start, stop, step, x.shape[dim])[0], step

    def _on_other_dim(self, shard: Sharding) -> Emit:
        dim, _, _ = self._bounds()
        if shard.dim == dim:
            return lambda context, operands: operands[0]
        return lambda context, operands: self.call.run(operands)


def window(call: Call) -> Window:
    """See :class:`Window`."""
    return Window(call)


@dataclass
class Pad:
    """constant_pad_nd: along the sequence it renames positions and writes the value where nothing was."""

    call: Call
    orders = True

    @property
    def beyond(self) -> float:
        """What is written where nothing was."""
        return self.call.argument(2, "value", 0)

    @property
    def linear(self) -> tuple[frozenset[int], ...]:
        """A sum of padded terms is the padded sum only if the value is zero."""
        return (frozenset({0}),) if self.beyond == 0 else ()

    def split(self, side: Side, index: int, shard: Sharding) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        (x,), (out,) = self.call.operands, self.call.outputs
        pads = list(self.call.args[1])
        pads += [0] * (2 * x.dim() - len(pads))
        left, right = pads[2 * (x.dim() - 1 - shard.dim) :][:2]
        if not (left or right):
            return Split((shard,), (shard,), (None,), self._emit(shard, False))
        if isinstance(shard, Routed) or shard.outer != 1:
            return None
        origin = shard.start if side == "out" else shard.start - left
        before = shard.window(origin + left, x.shape[shard.dim])
        after = shard.window(origin, out.shape[shard.dim])
        return Split((before,), (after,), (None,), self._emit(before, True))

    def _emit(self, before: Sharding, moves: bool) -> Emit:
        value = self.beyond
        (x,) = self.call.operands
        pads = list(self.call.args[1])
        at = 2 * (x.dim() - 1 - before.dim)
        others = [0 if at <= i < at + 2 else p for i, p in enumerate(pads)]

        def emit(context: Context, operands: list[torch.Tensor]) -> torch.Tensor:
            local = operands[0]
            if moves:
                local = context.where_valid(local, before, value)
            return aten.constant_pad_nd.default(local, others, value) if any(others) else local

        return emit


def pad(call: Call) -> Pad:
    """See :class:`Pad`."""
    return Pad(call)


@dataclass
class SliceScatter:
    """slice_scatter: ``source`` written over a slice of ``base``; along the sequence, chosen by position."""

    call: Call
    linear: tuple[frozenset[int], ...] = (frozenset({0, 1}),)
    orders = True

    def split(self, side: Side, index: int, shard: Sharding) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        base, source = self.call.operands
        dim = self.call.argument(2, "dim", 0) % base.dim()
        start, stop = self.call.argument(3, "start"), self.call.argument(4, "end")
        step = self.call.argument(5, "step", 1)
        if base.shape[dim] == source.shape[dim]:  # all of it is written
            return Split((shard, shard), (shard,), (None, None), lambda context, operands: operands[1])
        if shard.dim != dim:
            return Split(
                (shard, shard), (shard,), (None, None), lambda context, operands: self.call.run(operands)
            )
        if isinstance(shard, Routed) or step != 1 or shard.outer != 1:
            return None
        start = bounds_of(start, stop, step, base.shape[dim])[0]
        origin = shard.start - start if (side, index) == ("in", 1) else shard.start
        whole = shard.window(origin, base.shape[dim])
        part = shard.window(origin + start, source.shape[dim])
        return Split(
            (whole, part), (whole,), (None, None), lambda c, ops: c.where_valid(ops[1], part, ops[0])
        )


@dataclass
class Concatenation:
    """cat: along the sequence, each entry is taken from the tensor whose positions it lies among."""

    call: Call
    orders = True

    @property
    def linear(self) -> tuple[frozenset[int], ...]:
        """In all tensors together."""
        return (frozenset(range(len(self.call.operands))),)

    def split(self, side: Side, index: int, shard: Sharding) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        (out,), xs = self.call.outputs, self.call.operands
        dim = self.call.argument(1, "dim", 0) % max(out.dim(), 1)
        if shard.dim != dim:
            return along_dim(self.call).split(side, index, shard)
        if isinstance(shard, Routed) or shard.outer != 1 or any(x.dim() != out.dim() for x in xs):
            return None
        starts = [0, *accumulate(x.shape[dim] for x in xs)]
        origin = shard.start - starts[index] if side == "in" else shard.start
        parts = [shard.window(origin + s, x.shape[dim]) for s, x in zip(starts, xs, strict=False)]

        def emit(context: Context, operands: list[torch.Tensor]) -> torch.Tensor:
            joined = operands[-1].to(out.dtype)
            for x, part in zip(operands[-2::-1], parts[-2::-1], strict=True):
                joined = context.where_valid(x.to(out.dtype), part, joined)
            return joined

        whole = shard.window(origin, out.shape[dim])
        return Split(tuple(parts), (whole,), (None,) * len(xs), emit)


def slice_scatter(call: Call) -> SliceScatter:
    """See :class:`SliceScatter`."""
    return SliceScatter(call)
