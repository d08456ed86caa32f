"""A placement for every tensor: mark, choose, and what is pulled lazily (docs/how_it_works.md).

This pass only analyses. It knows no operator by name: it asks the rule table in both directions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from spcompile._torch import OpOverload
from spcompile.passes.numbers import SYMBOLIC, is_size, size_symbols, unsized
from spcompile.passes.shard.routes import Routes, routes
from spcompile.placement import Order, Partial, Placement, Replicate, Routed, Shard, Sharding, Unread
from spcompile.rules import PULLED, Call, Rule, Split, attention, commits, rule_for
from spcompile.rules.base import split_of
from spcompile.rules.pointwise import is_pointwise
from spcompile.sizes import bytes_of

__all__ = ["Plan", "Step", "call_of", "propagate", "value_of"]

# Up to so many single entries of a sequence are summed one by one; more are gathered with all the others.
FEW = 2

# A shifted tensor is computed where it lies if no more than so many are computed from it.
SOON = 32

Value = tuple[fx.Node, int]
"""One tensor: a node, and which of its outputs (0 unless it returns several)."""


def value_of(node: fx.Node) -> Value:
    """The tensor that ``node`` stands for: a getitem is an output of the node it reads."""
    if is_output(node):
        return node.args[0], node.args[1]
    return node, 0


def is_output(node: fx.Node) -> bool:
    """Whether ``node`` is one tensor of those that another returns (and no entry of a dict, nor a number)."""
    return node.target is getitem and type(node.args[1]) is int and isinstance(node.meta.get("val"), Tensor)


@dataclass
class Step:
    """What is known of one operator node.

    ``kind``: "free" (computed from inputs alone, every consumer asks for the version it needs), "pulled" (a
    view of something computed, or an order), or "computed" (one native placement per output). ``split`` is
    how a computed node runs on shards, None if it runs whole; ``gathers`` says why sharded operands are
    gathered for it.
    """

    call: Call | None
    rule: Rule | None
    operands: tuple[Value, ...]
    kind: str = "computed"
    native: tuple[Placement, ...] = ()
    split: Split | None = None
    gathers: str = ""


@dataclass
class Plan:
    """The result of :func:`propagate`: a step for each node, the sequence dims found, and orders of sorts."""

    ranks: int
    sorts: dict[Order, fx.Node] = field(default_factory=dict)
    steps: dict[fx.Node, Step] = field(default_factory=dict)
    marks: dict[Value, list[Shard]] = field(default_factory=dict)

    def natural(self, value: Value) -> Placement | None:
        """Where a value lies without anything being moved; None if it is free to be had in any placement."""
        node, index = value
        step = self.steps.get(node)
        if step is None or step.kind == "free":
            return None
        if step.kind == "computed":
            return step.native[index] if step.native else Replicate()
        return step.native[0]


def propagate(graph: fx.Graph, ranks: int, seeds: Mapping[Value, Shard]) -> Plan:
    """Decide the placement of every tensor of a joint graph.

    Args:
        graph: a functional ATen graph; every node has its global fake value in ``meta["val"]``.
        ranks: the number of ranks on the sequence axis.
        seeds: tensors whose sequence dim is known.
    """
    found = routes(graph)
    plan = Plan(ranks, found.sorts)
    sizes = size_symbols(n.meta.get("val") for n in graph.nodes)
    for node in graph.nodes:
        size = is_size(node.meta.get("val"), sizes)  # written anew where it is used
        if node.op == "call_function" and not is_output(node) and not size:
            plan.steps[node] = _step(node, sizes, found)
    _mark(plan, seeds)
    for node, step in plan.steps.items():
        _choose(plan, node, step)
    return plan


def _step(node: fx.Node, sizes: frozenset[Any], found: Routes) -> Step:
    leaves = tree_leaves((node.args, node.kwargs))
    operands = [x for x in leaves if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), Tensor)]
    if not _takes_tensors(node, leaves, sizes) or not _returns_tensors(node) or not _only_computes(node):
        return Step(None, None, tuple(map(value_of, operands)))
    call = call_of(node, found.of(operands), found.makes.get(node))
    return Step(call, rule_for(call), tuple(map(value_of, operands)))


def _takes_tensors(node: fx.Node, leaves: list[Any], sizes: frozenset[Any]) -> bool:
    """Whether every operand is a tensor, or a size; a pointwise operator may also take a number."""
    values = [x.meta.get("val") for x in leaves if isinstance(x, fx.Node)]
    values = [v for v in values if not is_size(v, sizes)]
    others = [v for v in values if not isinstance(v, Tensor)]
    numbers = is_pointwise(node.target) and all(isinstance(v, SYMBOLIC) for v in others)
    return (not others or numbers) and not unsized([*values, node.meta.get("val")])


def _only_computes(node: fx.Node) -> bool:
    """Whether ``node`` is a function of tensors, and not a write, nor an operator with a body of its own."""
    return isinstance(node.target, OpOverload) and not node.target._schema.is_mutable


def call_of(node: fx.Node, known: tuple[Any, ...] = (), makes: Any = None) -> Call:
    """The call that ``node`` makes, with the global fake values of its operands and results."""

    def value(x: Any) -> Any:
        return x.meta["val"] if isinstance(x, fx.Node) else x

    args, kwargs = tree_map(value, (node.args, node.kwargs))
    return Call(node.target, args, kwargs, node.meta["val"], attention.forward_of(node), known, makes)


def _returns_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    outputs = value if isinstance(value, (tuple, list)) else (value,)
    some = any(isinstance(x, Tensor) for x in outputs)  # a gradient that is not asked for is None
    return some and all(x is None or isinstance(x, Tensor) for x in outputs)


# ----------------------------------------------------------------------------------------------- mark


def _mark(plan: Plan, seeds: Mapping[Value, Shard]) -> None:
    """Learn which dim of which tensor is the sequence, by applying rules both ways to a fixed point."""
    users: dict[Value, list[tuple[Step, int]]] = {}
    for step in plan.steps.values():
        for index, operand in enumerate(step.operands):
            users.setdefault(operand, []).append((step, index))
    outputs = {id(step): node for node, step in plan.steps.items()}
    todo: deque[tuple[Value, Shard]] = deque()

    def add(value: Value, shard: Shard) -> None:
        shard = shard.unshifted()
        known = plan.marks.setdefault(value, [])
        if all((m.dim, m.outer) != (shard.dim, shard.outer) for m in known):
            known.append(shard)
            todo.append((value, shard))

    def spread(step: Step, split: Split | None) -> None:
        if split is None:
            return
        for operand, placement in zip(step.operands, split.inputs, strict=True):
            if isinstance(placement, Shard):
                add(operand, placement)
        for index, placement in enumerate(split.outputs):
            if isinstance(placement, Shard):
                add((outputs[id(step)], index), placement)

    for value, shard in seeds.items():
        add(value, shard)
    while todo:
        value, shard = todo.popleft()
        for step, index in users.get(value, ()):
            if step.rule is not None:
                spread(step, step.rule.split("in", index, shard))
        maker = plan.steps.get(value[0])
        if maker is not None and maker.rule is not None:
            spread(maker, maker.rule.split("out", value[1], shard))


# --------------------------------------------------------------------------------------------- choose


def _choose(plan: Plan, node: fx.Node, step: Step) -> None:
    naturals = [plan.natural(v) for v in step.operands]
    if step.call is not None and step.rule is not None:
        if getattr(step.rule, "lazy", False):
            _order(plan, step, naturals)
            return
        if not commits(node.target) and all(p is None for p in naturals):
            step.kind = "free"
            return
        if node.target in PULLED and _pull(plan, node, step, naturals):
            return
    if step.rule is not None:
        if _stays_partial(plan, node, step, naturals):
            assert step.call is not None
            step.native = tuple(Partial("sum") for _ in step.call.outputs)
            return
        _choose_split(plan, node, step, naturals)
    if step.split is None and any(isinstance(p, Sharding) for p in naturals):
        step.gathers = "no rule" if step.rule is None else "no dim of it can be sharded so"
        if step.call is None:
            step.gathers = "it writes, has a body, or takes what is known at run time only"


def _order(plan: Plan, step: Step, naturals: list[Placement | None]) -> None:
    """A sort of slots: each consumer asks for the rank's own order, or for that of all slots."""
    assert step.rule is not None
    (value, *_), (natural, *_) = step.operands, naturals
    shards = [natural] if natural is not None else plan.marks.get(value, [])
    splits = (step.rule.split("in", 0, p.unshifted()) for p in shards if isinstance(p, Shard))
    split = next((s for s in splits if s is not None), None)
    step.kind, step.native = "pulled", (Replicate() if split is None else split.outputs[0],)


def _stays_partial(plan: Plan, node: fx.Node, step: Step, naturals: list[Placement | None]) -> bool:
    """Whether a call on terms of a sum gives terms of a sum: it is linear in them, or in them and zeros.

    What is expanded along the sequence is summed before: the gradient of a mean over tokens is one entry.
    """
    assert step.rule is not None and step.call is not None
    terms = {i for i, p in enumerate(naturals) if isinstance(p, Partial)}
    if not terms or any(p not in (None, Replicate(), Partial("sum")) for p in naturals):
        return False
    if (node, 0) in plan.marks and step.call.outputs[0].numel() > sum(
        step.call.operands[i].numel() for i in terms
    ):
        return False
    zeros = {i for i, v in enumerate(step.operands) if _is_zero(plan, v)}
    return any(terms <= linear <= terms | zeros for linear in step.rule.linear)


def _is_zero(plan: Plan, value: Value) -> bool:
    """Whether a tensor is made of nothing but zeros, so that every rank may take it for its term."""
    step = plan.steps.get(value[0])
    return step is not None and not step.operands and getattr(step.rule, "beyond", None) == 0


def _pull(plan: Plan, node: fx.Node, step: Step, naturals: list[Placement | None]) -> bool:
    """A view: it lies where what it views lies, as its rule says; nothing is computed for it.

    False for a single entry of the sequence, which is rather computed, as a sum; but where many entries are
    taken, one gather of them all is less.
    """
    assert step.rule is not None
    native: Placement = Partial("sum") if _stays_partial(plan, node, step, naturals) else Replicate()
    for index, placement in enumerate(naturals):
        if isinstance(placement, Sharding):
            split = split_of(step.rule, "in", index, placement)
            if split is None:
                continue
            if isinstance(split.outputs[0], Sharding):
                native = split.outputs[0]
                break
            if isinstance(placement, Routed):
                return False
            entries = _entries_taken(plan, step.operands[index], placement)
            if entries <= FEW and _loses_nothing(plan, node, step, split):
                return False
    step.kind, step.native = "pulled", (native,)
    return True


def _entries_taken(plan: Plan, value: Value, shard: Shard) -> int:
    """How many views of a tensor placed as ``shard`` are one rank's term of a sum."""
    steps = (plan.steps.get(user) for user in value[0].users if user.target in PULLED)
    splits = (s.rule.split("in", 0, shard) for s in steps if s is not None and s.rule is not None)
    return sum(split is not None and isinstance(split.outputs[0], Partial) for split in splits)


def _choose_split(plan: Plan, node: fx.Node, step: Step, naturals: list[Placement | None]) -> None:
    """Of the ways to run on shards, the one that moves the fewest bytes; ties to the first operand."""
    assert step.rule is not None and step.call is not None
    candidates = []
    for index, placement in enumerate(naturals):
        if isinstance(placement, Shard):
            candidates += [step.rule.split("in", index, p) for p in {placement.unshifted(): 0, placement: 0}]
            if (settled := getattr(step.rule, "settled", None)) is not None:
                candidates.append(settled(index, placement))
        elif isinstance(placement, Routed):
            candidates.append(split_of(step.rule, "in", index, placement))
    for index in range(len(step.call.outputs)):
        for mark in plan.marks.get((node, index), ()):
            candidates.append(step.rule.split("out", index, mark))
    if not any(c is not None for c in candidates):
        for index, (value, placement) in enumerate(zip(step.operands, naturals, strict=True)):
            if placement is None:
                candidates += [step.rule.split("in", index, mark) for mark in plan.marks.get(value, ())]
    candidates += getattr(step.rule, "offers", ())
    usable = [c for c in candidates if c is not None and _loses_nothing(plan, node, step, c)]
    if not usable:
        return
    step.split = min(usable, key=lambda c: _moved_bytes(step, naturals, c))
    outputs = enumerate(step.split.outputs)
    step.native = tuple(_scattered(plan, (node, i), p) if isinstance(p, Partial) else p for i, p in outputs)


def _loses_nothing(plan: Plan, node: fx.Node, step: Step, split: Split) -> bool:
    """Whether the ranks hold all that counts of what the split reads and computes.

    A tensor that sticks out of the ranks loses entries. Those of an operand may go that are what its padding
    is filled with anyway; those of an output that nobody uses. An output that does not begin at position 0 is
    used by windows only, or comes to an end soon, lest the shift travels on.
    """
    for value, placement, fill in zip(step.operands, split.inputs, split.fills, strict=True):
        if isinstance(placement, Shard) and not placement.holds_all(plan.ranks):
            if fill is None or not _is_beyond(plan, value, placement, fill):
                return False
    return all(
        _is_settled(plan, p) or _only_windows_use(plan, (node, index), p) or _ends(plan, (node, index), p)
        for index, p in enumerate(split.outputs)
        if isinstance(p, Shard)
    )


def _is_settled(plan: Plan, shard: Shard) -> bool:
    return shard.start == 0 and shard.holds_all(plan.ranks)


def _is_beyond(plan: Plan, value: Value, shard: Shard, number: float) -> bool:
    """Whether ``value`` is ``number`` wherever ``shard`` sticks out of the ranks: padding by a view."""
    node, index = value
    step = plan.steps.get(node)
    beyond = getattr(step.rule, "beyond", None) if step is not None else None
    if step is None or step.rule is None or (node.target not in PULLED and beyond is None):
        return False
    split = step.rule.split("out", index, shard)
    if split is None or (beyond is not None and beyond != number):
        return False
    # An entry comes from the operands' entries at the same position, or is what the rule writes beyond them.
    return all(
        isinstance(p, Shard) and (p.holds_all(plan.ranks) or _is_beyond(plan, v, p, number))
        for v, p in zip(step.operands, split.inputs, strict=True)
    )


def _only_windows_use(plan: Plan, value: Value, shard: Shard) -> bool:
    """Whether all that is used of ``value``, placed as ``shard``, are views that the ranks hold entirely."""
    for user in _users(plan, value):
        step = plan.steps.get(user)
        if step is None or step.rule is None or user.target not in PULLED or len(step.operands) != 1:
            return False
        split = step.rule.split("in", 0, shard)
        after = None if split is None else split.outputs[0]
        if not isinstance(after, Shard):
            return False
        if not _is_settled(plan, after) and not _only_windows_use(plan, (user, 0), after):
            return False
    return True


def _users(plan: Plan, value: Value) -> list[fx.Node]:
    node, index = value
    if len(plan.steps[node].call.outputs) == 1:  # type: ignore[union-attr]
        return list(node.users)
    return [u for g in node.users if g.target is getitem and g.args[1] == index for u in g.users]


def _shifted(have: Placement | None, want: Placement) -> bool:
    return isinstance(have, Shard) and isinstance(want, Shard) and have.start != want.start


def _ends(plan: Plan, value: Value, shard: Shard) -> bool:
    """Whether a shift is over within a few operators: all that is computed from ``value`` is summed, or put
    back where it was cut from, before it meets anything that lies otherwise."""
    if not shard.holds_all(plan.ranks):
        return False
    todo, seen = [(value, shard)], {value}
    while todo:
        value, shard = todo.pop()
        for user in _users(plan, value):
            step = plan.steps.get(user)
            if step is None or step.rule is None or len(seen) > SOON:
                return False
            split = step.rule.split("in", step.operands.index(value), shard)
            if split is None or any(
                _shifted(plan.natural(v), p) for v, p in zip(step.operands, split.inputs) if v != value
            ):
                return False
            found = [((user, i), p) for i, p in enumerate(split.outputs) if isinstance(p, Shard) and p.start]
            todo += [(v, p) for v, p in found if v not in seen]
            seen |= {v for v, _ in found}
    return True


def _scattered(plan: Plan, value: Value, partial: Partial) -> Placement:
    """A partial sum that carries the sequence is reduce-scattered at once; another waits for the output."""
    if partial.op == "sum":
        for mark in plan.marks.get(value, ()):
            if mark.holds_all(plan.ranks):
                return mark
    return partial


def _moved_bytes(step: Step, naturals: Iterable[Placement | None], split: Split) -> float:
    assert step.call is not None
    moved = 0.0
    for x, have, want in zip(step.call.operands, naturals, split.inputs, strict=True):
        if isinstance(want, Unread):
            continue
        sliced = isinstance(have, Replicate) and not isinstance(want, Partial | Routed)
        if have is not None and have != want and not sliced:
            moved += bytes_of(x)
    for x, placement in zip(step.call.outputs, split.outputs, strict=True):
        if isinstance(placement, Partial):
            moved += bytes_of(x)
    return moved
