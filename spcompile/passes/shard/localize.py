"""Rewrite the graph for one rank: every tensor in the placement that its consumer needs, when it is needed.

The original nodes are walked in order. A computed node is emitted once, under its native placement; a free or
pulled one whenever a consumer asks, in the version that it asks for. Old nodes are erased at the end.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from spcompile import collectives
from spcompile.passes.numbers import SYMBOLIC, unsized
from spcompile.passes.shard import copies, reorder
from spcompile.passes.shard.communicate import is_shift, redistribute, shifted, surrounded
from spcompile.passes.shard.context import GraphContext
from spcompile.passes.shard.propagate import Plan, Step, Value, value_of
from spcompile.passes.shard.reach import reaches
from spcompile.phases import backward_of
from spcompile.placement import (
    Partial,
    Placement,
    Replicate,
    Routed,
    Shard,
    Sharding,
    Unread,
    same_blocks,
)
from spcompile.reports.traffic import Purpose
from spcompile.rules import Split, attention
from spcompile.rules.base import split_of
from spcompile.rules.ports import LEND
from spcompile.sizes import bytes_of, hint
from spcompile.source import source_of

__all__ = ["GatherNote", "Localizer", "same_strides"]

# Gradients are all-reduced together in buckets of about this many bytes, as DistributedDataParallel does.
BUCKET_BYTES = 25 * 2**20


class GatherNote(NamedTuple):
    """One gather that a missing rule forced."""

    node: str
    op: str
    reason: str
    bytes: int
    source: str


class Localizer:
    """Emit the local graph of ``plan`` into ``graph``, in place.

    Args:
        nan_padding: a debugging mode that fills the padding of every floating tensor with NaN.
        partial: values returned as they are if they are sums over the ranks: each rank's term, times the
            number of ranks, so that it is the mean that is the value (as it is of equal values).
    """

    def __init__(
        self,
        graph: fx.Graph,
        plan: Plan,
        context: GraphContext,
        nan_padding: bool = False,
        partial: Collection[Value] = (),
    ) -> None:
        self.partial = partial
        self.graph, self.plan, self.context, self.emitter = graph, plan, context, context.emitter
        self.nan_padding = nan_padding
        self.versions: dict[tuple[Value, Placement, float | None], Tensor] = {}
        self.gathers: list[GatherNote] = []
        self.lent: dict[int, Shard] = {}  # outputs that stay this rank's part, by the number of their port
        self.originals = list(graph.nodes)
        self.last_writes = copies.last_writes(self.originals)
        self._pending: list[tuple[Value, Tensor]] = []
        self._reach = reaches(plan)
        self._around: dict[Value, Tensor] = {}

    def run(self) -> None:
        """Rewrite the graph."""
        outputs = next(n for n in self.originals if n.op == "output")
        wanted = {value_of(x) for x in tree_leaves(outputs.args) if isinstance(x, fx.Node)}
        self._backward = backward_of(self.originals)  # no output of a forward shares a collective with one
        for node in (n for n in self.originals if n not in self.last_writes):
            self._consumer = node
            with self.graph.inserting_before(node):
                if node.op in ("placeholder", "get_attr"):
                    self._bind(node)
                elif node.op == "call_function" and node in self.plan.steps:
                    self._emit(node, self.plan.steps[node])
                elif node.op == "output":
                    self._flush()
                    self._finish(node)
                    self._write()
                self._collect(node, wanted)
        for node in reversed(self.originals):
            if node.op == "call_function":
                self.graph.erase_node(node)

    # ------------------------------------------------------------------------------------------- versions

    def version(self, value: Value, want: Placement, fill: float | None = None) -> Tensor:
        """The local tensor of ``value`` under ``want``, with ``fill`` in its padding if that is asked."""
        key = (value, want, fill)
        if isinstance(want, Routed):
            reorder.know(self, want)
        if key not in self.versions:
            if fill is not None and isinstance(want, Sharding) and want.padded(self.context.group.size):
                local = self.run_at(value[0], self.context.where_valid, self.version(value, want), want, fill)
            elif fill is not None:
                local = self.version(value, want)
            else:
                local = self._poisoned(value[0], self._compute(value, want), want)
            self.versions[key] = local
        return self.versions[key]

    def _compute(self, value: Value, want: Placement) -> Tensor:
        node = value[0]
        step = self.plan.steps.get(node)
        if step is not None and step.kind != "computed" and not self._cuts_off(step, want):
            found = self._pull(value, step, want)
            if found is not None:
                return found
        have = self._at_hand(value, step, want)
        shape = tuple(self._global(value).shape)
        if isinstance(have, Routed) or isinstance(want, Routed):
            return reorder.reordered(self, value, have, want)
        local = self.version(value, have)
        ranks = self.context.group.size
        if isinstance(have, Shard) and isinstance(want, Shard) and is_shift(have, want, ranks):
            left, right = reach = self._reach.get(value, (0, 0))
            if -left <= have.start - want.start <= right:
                if value not in self._around:
                    args = (self.context, local, have, want, shape, reach)
                    self._around[value] = self.run_at(node, surrounded, *args)
                return self.run_at(node, shifted, self._around[value], have, want, left)
        return self.run_at(node, redistribute, self.context, local, have, want, shape)

    def _at_hand(self, value: Value, step: Step | None, want: Placement) -> Placement:
        """The placement from which ``want`` is made: the native one, or whole."""
        native = self.plan.natural(value)
        if step is not None and self._cuts_off(step, want):
            return step.native[0]
        if step is None or native is None or step.kind == "pulled":
            assert want != Replicate(), f"{value} has no version to start from"
            return Replicate()
        return native

    def _cuts_off(self, step: Step, want: Placement) -> bool:
        """Whether ``step`` views the part that the ranks hold of a tensor that sticks out of them, or a few
        entries that are wanted far away.

        Then it can't be had whole by a gather at the root, where that tensor has lost entries; or need not.
        """
        native, ranks = step.native[0] if step.kind == "pulled" else None, self.context.group.size
        if not isinstance(native, Shard):
            return False
        if isinstance(want, Shard) and same_blocks(native, want):
            return not is_shift(native, want, ranks)
        return native.holds_all(ranks) and any(map(self._sticks_out, step.operands))

    def _sticks_out(self, value: Value) -> bool:
        """Whether a tensor has lost entries: it, or what it views, is computed and not all on the ranks."""
        step, natural = self.plan.steps.get(value[0]), self.plan.natural(value)
        if step is None or not isinstance(natural, Shard) or natural.holds_all(self.context.group.size):
            return False
        return step.kind == "computed" or any(map(self._sticks_out, step.operands))

    def _pull(self, value: Value, step: Step, want: Placement) -> Tensor | None:
        """A free or pulled value under ``want``, through its rule; None if the rule can't."""
        node, index = value
        assert step.rule is not None and step.call is not None
        if isinstance(want, Sharding):
            split = split_of(step.rule, "out", index, want)
            if split is None:
                return None
            outs = self.run_at(node, split.emit, self.context, self.operands(step, split))
            placements: tuple[Placement, ...] = split.outputs
        else:
            if isinstance(want, Partial) and step.native != (want,):
                return None
            terms = [want if self.plan.natural(v) == want else Replicate() for v in step.operands]
            operands = [self.version(v, p) for v, p in zip(step.operands, terms, strict=True)]
            outs = self._whole(node, step, operands)
            placements = tuple(want for _ in step.call.outputs)
        self.store(node, outs, placements)
        return self.versions[(value, placements[index], None)]

    def operands(self, step: Step, split: Split) -> list[Any]:
        """The operands in the placements, and with the padding, that ``split`` wants."""
        wants = zip(step.operands, split.inputs, split.fills, strict=True)
        reorder.know_all(self, step, split)
        return [None if isinstance(p, Unread) else self.version(value, p, fill) for value, p, fill in wants]

    def store(self, node: fx.Node, outs: Any, placements: tuple[Placement, ...]) -> None:
        outs = tuple(outs) if isinstance(outs, (tuple, list)) else (outs,)
        for index, (out, placement) in enumerate(zip(outs, placements, strict=True)):
            if isinstance(out, Tensor):
                local = self._poisoned(node, out, placement)
                self.versions.setdefault(((node, index), placement, None), local)

    def _poisoned(self, node: fx.Node, local: Tensor, placement: Placement) -> Tensor:
        ranks = self.context.group.size
        if not (self.nan_padding and isinstance(placement, Sharding) and placement.padded(ranks)):
            return local
        if local.is_floating_point():
            return self.run_at(node, self.context.where_valid, local, placement, math.nan)
        step = self.plan.steps.get(node)
        if step is None or step.call is None or not any(x.is_floating_point() for x in step.call.operands):
            return local
        # A number that NaN is cast to may index out of bounds.
        return self.run_at(node, self.context.where_valid, local, placement, 0)

    # ------------------------------------------------------------------------------------------- emission

    def _emit(self, node: fx.Node, step: Step) -> None:
        if step.kind != "computed":
            return
        if step.call is None:
            copies.copy(self, node)
            return
        if step.native and step.native[0] == Partial("sum") and step.split is None:
            naturals = [(v, self.plan.natural(v)) for v in step.operands]
            terms = [self.version(v, p if p == Partial("sum") else Replicate()) for v, p in naturals]
            self.store(node, self._whole(node, step, terms), step.native)
            return
        if step.split is None:
            self.note_gathers(node, step)
            outs = self._whole(node, step, [self.version(v, Replicate()) for v in step.operands])
            self.store(node, outs, tuple(Replicate() for _ in step.call.outputs))
            return
        split = step.split
        self.store(
            node, self.run_at(node, split.emit, self.context, self.operands(step, split)), split.outputs
        )
        for index, (got, native) in enumerate(zip(split.outputs, step.native, strict=True)):
            if got != native:
                shape = tuple(self._global((node, index)).shape)
                local = self.versions[((node, index), got, None)]
                moved = self.run_at(node, redistribute, self.context, local, got, native, shape)
                self.versions[((node, index), native, None)] = self._poisoned(node, moved, native)

    def _whole(self, node: fx.Node, step: Step, operands: list[Tensor]) -> Any:
        """The operator on whole operands (or on terms of a sum, in which it is linear)."""
        assert step.call is not None
        whole = getattr(step.rule, "whole_emit", None)
        if whole is not None:
            return self.run_at(node, whole(), self.context, operands)
        return self.run_at(node, step.call.run, operands)

    def run_at(self, node: fx.Node, function: Any, *args: Any) -> Any:
        with self.emitter.serving(node, spcompile=self._purpose(node, function, args)):
            return self.emitter.run(function, *args)

    def _purpose(self, node: fx.Node, function: Any, args: tuple[Any, ...]) -> Purpose:
        """Why the nodes emitted next are there, for the report."""
        consumer = self.plan.steps.get(self._consumer)
        asked = "output" if self._consumer.op == "output" else str(self._consumer.target)
        whole = consumer is not None and bool(consumer.gathers)
        if function is collectives.all_reduce_bucket:
            mark = next((m for v, _ in self._pending for m in self.plan.marks.get(v, ())), None)
            return Purpose("gradients", asked, False, _hints(args[0]), mark=_hinted(mark))
        mark = _hinted(next(iter(self.plan.marks.get((node, 0), ())), None))
        if function in (redistribute, surrounded):
            moved = (tuple(map(hint, args[4])),)
            have, want = map(_hinted, args[2:4])
            return Purpose(str(node.target), asked, whole, moved, have, want, mark)
        step = self.plan.steps.get(node)
        shapes = _hints(map(self._global, step.operands)) if step else ()
        if node.target in attention.RULES:  # by position: an operand that is not there has no dims
            given = iter(shapes)
            shapes = tuple(() if x is None else next(given) for x in node.args if attention.is_operand(x))
        return Purpose(str(node.target), asked, whole, shapes, mark=mark, edges=attention.edges(node))

    def note_gathers(self, node: fx.Node, step: Step) -> None:
        if not step.gathers:
            return
        for value in step.operands:
            if isinstance(self.plan.natural(value), Sharding):
                size = bytes_of(self._global(value))
                source = source_of(node) or "no source line"
                note = GatherNote(node.name, str(node.target), step.gathers, size, source)
                self.gathers.append(note)

    # ---------------------------------------------------------------------------------- inputs and outputs

    def _bind(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            self.versions[((node, 0), Replicate(), None)] = self.emitter.bind(self.emitter.fresh(value), node)
        elif isinstance(value, SYMBOLIC):
            self.emitter.bind_number(value, node)

    def _global(self, value: Value) -> Tensor:
        result = value[0].meta["val"]
        return result[value[1]] if isinstance(result, (tuple, list)) else result

    def _collect(self, node: fx.Node, wanted: set[Value]) -> None:
        """Gradients that are still sums over the ranks are all-reduced as soon as they fill a bucket."""
        step = self.plan.steps.get(node)
        for index in range(len(step.call.outputs) if step is not None and step.call is not None else 1):
            value = (node, index)
            if value not in wanted or value in self.partial or step is None:
                continue
            natural = self.plan.natural(value)
            if natural == Partial("sum") and node in self._backward:
                self._pending.append((value, self.version(value, natural)))
                if sum(x.numel() * x.dtype.itemsize for _, x in self._pending) >= BUCKET_BYTES:
                    self._flush()

    def _flush(self) -> None:
        """All-reduce the pending gradients of each dtype in one collective."""
        for dtype in dict.fromkeys(x.dtype for _, x in self._pending):
            bucket = [(v, x) for v, x in self._pending if x.dtype == dtype]
            last = bucket[-1][0][0]
            sums = self.run_at(
                last, collectives.all_reduce_bucket, [x for _, x in bucket], self.context.group
            )
            for (value, _), whole in zip(bucket, sums, strict=True):
                self.versions[(value, Replicate(), None)] = whole
        self._pending.clear()

    def _finish(self, outputs: fx.Node) -> None:
        def returned(x: fx.Node) -> Any:
            if not isinstance(x.meta.get("val"), Tensor):
                return copies.number(self, x)
            if x.target is LEND and self._lends(x):
                return self.emitter.node_of(self.version(value_of(x.args[0]), self.lent[x.args[1]]))
            x = x.args[0] if x.target is LEND else x
            value = value_of(x)
            if value in self.partial and self.plan.natural(value) == Partial("sum"):
                term = self.version(value, Partial("sum"))
                local = self.run_at(x, lambda: term * self.context.group.size)
            else:
                local = self.version(value, Replicate())
            return self.emitter.node_of(self.restrided(x, local))

        outputs.args = fx.map_arg(outputs.args, returned)

    def _write(self) -> None:
        """The writes with which the graph ends, once whatever reads an old value has been written out."""
        for write in (copies.arguments, copies.copy):
            for node in self.last_writes:
                self._consumer = node
                write(self, node)

    def _lends(self, x: fx.Node) -> bool:
        """Whether an output stays this rank's part; in ``lent`` is then how it lies."""
        natural = self.plan.natural((x, 0))
        if not isinstance(natural, Shard) or not natural.holds_all(self.context.group.size):
            return False
        self.lent[x.args[1]] = natural.unshifted()
        return True

    def restrided(self, node: fx.Node, local: Tensor) -> Tensor:
        """``local`` in the strides that eager gives ``node``."""
        if unsized(local):  # it is a copy's, as it was
            return local
        strides = tuple(node.meta["val"].stride())
        if same_strides(local, strides):
            return local
        order = sorted(range(local.dim()), key=lambda d: hint(strides[d]), reverse=True)
        back = [order.index(d) for d in range(local.dim())]
        return self.run_at(node, lambda: local.permute(order).contiguous().permute(back))


def same_strides(x: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether ``x`` lies in memory as ``strides`` say.

    The stride of a dim of size one is never used. Where the strides leave gaps (a slice that is returned) or
    overlap (an expanded dim), they tell of a buffer that this rank does not have; then any will do.
    """
    used = [(stride, size) for stride, size in zip(strides, x.shape, strict=True) if size != 1]
    used.sort(key=lambda pair: (hint(pair[0]), hint(pair[1])))
    expected = 1
    for stride, size in used:
        if stride != expected:
            return True
        expected *= size
    pairs = zip(x.stride(), strides, x.shape, strict=True)
    return all(have == want for have, want, size in pairs if size != 1)


def _hints(tensors: Iterable[Tensor]) -> tuple[tuple[int, ...], ...]:
    """The shapes at hand, for a report."""
    return tuple(tuple(map(hint, x.shape)) for x in tensors)


def _hinted(placement: Any) -> Any:
    if not isinstance(placement, Shard):
        return placement
    sizes = placement.length, placement.block, placement.start, placement.outer
    return Shard(placement.dim, *map(hint, sizes))
