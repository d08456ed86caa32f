"""What a rule is: how one operator's tensors may lie on the ranks, and how it then runs on each.

A rule looks at a :class:`Call` and answers one question, :meth:`Rule.split`: if this operand (or output) is
sharded so, how must all the others be? Propagation asks it in both directions and knows no operator by name.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from spcompile import collectives
from spcompile.costs import Sizes
from spcompile.errors import SpcompileError
from spcompile.placement import Partial, Placement, Replicate, Routed, Shard, Sharding
from spcompile.sizes import key
from spcompile.strategies import strategy_of
from spcompile.strategies.exchange import StartExchange
from spcompile.strategies.softmax import SoftmaxStrategy

__all__ = ["Call", "Context", "Emit", "Factors", "Rule", "Side", "Split", "along", "parse", "split_of"]

Side = Literal["in", "out"]


class Call:
    """One call of an operator: its arguments with (fake or real) tensors as leaves, and its results.

    ``site`` is the same of an attention and of its backward; None of a backward whose forward is not there.
    ``known`` is what is known of the entries of each operand, ``makes`` of those of the result
    (``rules/routing.py``).
    """

    def __init__(
        self,
        op: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        out: Any,
        site: Any = None,
        known: tuple[Any, ...] = (),
        makes: Any = None,
    ) -> None:
        self.op, self.site, self.makes = op, site, makes
        self.args = tuple(args)
        self.kwargs = dict(kwargs)
        self._leaves, self._spec = tree_flatten((self.args, self.kwargs))
        self.operands = [x for x in self._leaves if isinstance(x, Tensor)]
        self.known = known or (None,) * len(self.operands)
        self.outputs: tuple[Any, ...] = tuple(out) if isinstance(out, (tuple, list)) else (out,)

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """The argument at ``index``, or by ``name``, or its default."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def replaced(self, operands: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors in place of the operands."""
        fresh = iter(operands)
        leaves = [next(fresh) if isinstance(x, Tensor) else x for x in self._leaves]
        return tree_unflatten(leaves, self._spec)

    def run(self, operands: list[Tensor]) -> Any:
        """The operator on other operands, its other arguments as they are."""
        args, kwargs = self.replaced(operands)
        return self.op(*args, **kwargs)


class Context:
    """What an emission may ask about the ranks; tensors it returns are computed once per graph.

    ``linear`` and ``softmax`` are the strategies by which attention crosses ranks: what starts an exchange of
    states, and a ``SoftmaxStrategy``.
    """

    def __init__(self, group: collectives.Group, linear: str = "auto", softmax: str = "auto") -> None:
        self.group = group
        self.linear: StartExchange = strategy_of("linear", linear).load()
        self.softmax: SoftmaxStrategy = strategy_of("softmax", softmax).load()
        self._left: dict[Any, dict[Any, Tensor | None]] = {}
        self._cache: dict[Any, Tensor] = {}
        self._routes: dict[tuple[Routed, str], Tensor] = {}

    def took(self, kind: str, kernel: str, refused: str = "") -> None:
        """A kernel takes an attention, and why that is not a fused one: for the report."""

    def priced(self, kind: str, device: str, sizes: Sizes) -> None:
        """The sizes of an attention that crosses ranks: for what each way would take."""

    @contextlib.contextmanager
    def again(self, operators: frozenset[Any]) -> Iterator[None]:
        """Results of these operators inside are made again in the backward and not saved."""
        yield

    def leave(self, site: Any, sequence: Any, left: Tensor | None) -> None:
        """What the forward of ``site`` has gathered of ``sequence``, for its backward."""
        if site is not None:
            self._left.setdefault(site, {})[sequence] = left

    def left(self, site: Any, sequence: Any, gather: Callable[[], Tensor | None]) -> Tensor | None:
        """What the forward of ``site`` left; made now where it is not in this graph, or where all is whole.

        Raises:
            SpcompileError: the forward is there, but has left nothing of this sequence: gathering it again
                would be a second collective.
        """
        known = self._left.get(site, {})
        there = sequence in known
        if not there and (site is None or sequence is None):
            return gather()
        if not there:
            raise SpcompileError(
                f"the backward of {site} runs on {sequence}, its forward on {list(known)}. "
                "This is a fault of spcompile; please report it with the model."
            )
        return known[sequence]

    def keep(self, state: Tensor) -> Tensor:
        """A small result of a collective: to be saved for the backward, also where the rest is recomputed."""
        return state

    def gathered(self, keys: Tensor | None) -> Tensor | None:
        """All ranks' keys and values: to be saved for the backward, or gathered again in it."""
        return keys

    def cached(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()`` the first time that ``key`` is asked for."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def rank(self, device: torch.device) -> Tensor:
        """This rank's index, a 0-dim int64 tensor."""
        return self.cached(("rank", device), lambda: collectives.rank(self.group, device))

    def positions(self, block: int, device: torch.device) -> Tensor:
        """The positions that this rank holds, [block] int64."""
        return self.cached(
            ("positions", key(block), device),
            lambda: torch.arange(block, device=device) + self.rank(device) * block,
        )

    def valid(self, shard: Shard, device: torch.device) -> Tensor:
        """Which of this rank's positions are valid, [block] bool."""

        def compute() -> Tensor:
            positions = self.positions(shard.block, device)
            below = positions < shard.start + shard.length
            return below if shard.start <= 0 else below & (positions >= shard.start)

        return self.cached(("valid", *map(key, (shard.block, shard.start, shard.length)), device), compute)

    def clamped_index(self, shard: Shard, device: torch.device) -> Tensor:
        """The sequence index at each position this rank holds, [block] int64; in padding, the nearest
        valid one."""

        def compute() -> Tensor:
            index = self.positions(shard.block, device)
            if shard.start:
                index = index - shard.start
            return index.clamp(0, shard.length - 1) if shard.padded(self.group.size) else index

        return self.cached(("index", *map(key, (shard.block, shard.start, shard.length)), device), compute)

    def flat_index(self, shard: Shard, device: torch.device) -> Tensor:
        """The index in the whole dim of each entry held, merged dims included; padding as above."""
        index = self.clamped_index(shard, device)
        if shard.outer == 1:
            return index
        outer = torch.arange(shard.outer, device=device).reshape(-1, 1)
        return (outer * shard.length + index).reshape(-1)

    def next_seed(self, device: torch.device) -> Tensor:
        """A seed that no other draw of this graph has and that all ranks share, 0-dim int64."""
        raise AssertionError("only the context of a graph (GraphContext) gives out seeds")

    def note_route(self, routed: Routed, ids: Tensor, slots: Tensor) -> None:
        """A rank has sorted its own slots: their ``ids``, and which ``slots`` these are (a permutation)."""
        self._routes |= {(routed.at(0), "ids"): ids, (routed.at(0), "slots"): slots}

    def knows_route(self, routed: Routed) -> bool:
        """Whether :meth:`route` knows this order."""
        return (routed.at(0), "slots") in self._routes

    def route(self, routed: Routed, what: str = "slots") -> Tensor:
        """Of each entry in a sort's order, the slot of this rank that it is of, [outer * block] int64.

        Or its "places", the inverse, and its "ids", which are ascending (what padding has is the last).
        """
        known = self._routes
        key = routed.at(0), what
        if what == "places" and key not in known:  # with the tags of the region that reads it first
            slots = self.route(routed)
            known[key] = torch.scatter(
                torch.zeros_like(slots), 0, slots, torch.arange(slots.shape[0], device=slots.device)
            )
        return known[key]

    def where_valid(self, x: Tensor, shard: Sharding, other: Tensor | float | bool) -> Tensor:
        """``x``, a local tensor placed as ``shard``, with ``other`` in its padding."""

        def mask() -> Tensor:
            slots = shard.slots if isinstance(shard, Routed) else shard
            valid = self.valid(slots, x.device)
            if slots.outer != 1:
                valid = valid.expand(slots.outer, slots.block).reshape(-1)
            if isinstance(shard, Routed):
                valid = valid[self.route(shard)]
            return valid.reshape([-1 if d == shard.dim else 1 for d in range(x.dim())])

        valid = self.cached(("mask", shard, x.dim(), x.device), mask)
        if not isinstance(other, Tensor):
            key = ("scalar", repr(other), x.dtype, x.device)
            other = self.cached(key, lambda: torch.full((), other, dtype=x.dtype, device=x.device))
        return torch.where(valid, x, other)


Emit = Callable[[Context, list[Tensor]], Any]


@dataclass(frozen=True)
class Split:
    """One way to run a call on shards.

    ``fills[i]``, where it is not None, is what the padding of operand i must hold: the neutral element of
    the sum (or maximum, ...) that the operand's sequence dim is reduced by.
    """

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    fills: tuple[float | None, ...]
    emit: Emit


class Rule(Protocol):
    """A rule's interface; one whose whole form is not the plain call has ``whole_emit() -> Emit`` too.

    One that writes a number where no operand has an entry (a pad) has it as ``beyond``. One that is asked for
    a ``Routed`` placement too has a true ``orders``. One whose result each consumer asks for in its own
    placement, as it does of a view, has a true ``lazy``. One whose output may lie farther off than beside its
    operand has ``settled(index, shard)``, which says how it runs with the output at position 0.
    """

    @property
    def linear(self) -> tuple[frozenset[int], ...]:
        """Sets of operands in which the call is linear: if exactly they are sums, the outputs are too."""

    def split(self, side: Side, index: int, shard: Any) -> Split | None:
        """How the call runs if operand (or output) ``index`` is placed as ``shard``; None if it can't."""


def split_of(rule: Any, side: Side, index: int, placement: Sharding) -> Split | None:
    """What a rule says of a placement; nothing of one in a sort's order, if it does not know of such."""
    knows = isinstance(placement, Shard) or getattr(rule, "orders", False)
    return rule.split(side, index, placement) if knows else None


Dims = tuple[str | None, ...]


@dataclass
class Factors:
    """A rule that names the factor each dim runs over; None is a dim that runs over none (a broadcast 1).

    A factor in ``whole`` is needed entire on every rank. One that no output has is reduced by ``reduce``,
    and is whole where that is None; one that some outputs have and others not is whole unless the rule is
    ``mixed``: then it is reduced in the others. ``emit`` replaces the plain call: it is given the split.
    ``fill`` is what padding of a reduced factor must hold, by default the neutral element of ``reduce``.
    ``anywhere`` says that ``emit`` does not ask which entries these are, as the plain call never does: a rule
    that holds for blocks of one entry acts on each entry alike, so in any order of them.
    ``beyond`` is the number that every entry is which comes from no operand, if that is known.
    """

    call: Call
    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    whole: frozenset[str] = frozenset()
    reduce: str | None = "sum"
    linear: tuple[frozenset[int], ...] = ()
    emit: Callable[[Split], Emit] | None = None
    fill: float | None = None
    mixed: bool = False
    beyond: float | None = None
    anywhere: bool = False

    @property
    def orders(self) -> bool:
        """Whether entries may be in any order."""
        return self.emit is None or self.anywhere

    def __post_init__(self) -> None:
        if self.fill is None and self.reduce is not None:
            self.fill = {"sum": 0.0, "max": -math.inf, "min": math.inf, "product": 1.0}[self.reduce]

    def split(self, side: Side, index: int, shard: Sharding) -> Split | None:
        """See :class:`Rule`."""
        factor = (self.inputs if side == "in" else self.outputs)[index][shard.dim]
        if factor is None or factor in self.whole:
            return None
        inputs = tuple(_place(dims, factor, shard) for dims in self.inputs)
        outputs = tuple(_place(dims, factor, shard) for dims in self.outputs)
        reduced = not all(factor in dims for dims in self.outputs)
        if reduced:
            mixed = any(factor in dims for dims in self.outputs)
            if self.reduce is None or (mixed and not self.mixed):
                return None
            outputs = tuple(p if isinstance(p, Sharding) else Partial(self.reduce) for p in outputs)
        fills = tuple(self.fill if reduced and isinstance(p, Sharding) else None for p in inputs)
        split = Split(inputs, outputs, fills, _run(self.call))
        return split if self.emit is None else Split(inputs, outputs, fills, self.emit(split))


def _place(dims: Dims, factor: str, shard: Sharding) -> Placement:
    return shard.at(dims.index(factor)) if factor in dims else Replicate()


def _run(call: Call) -> Emit:
    return lambda context, operands: call.run(operands)


def parse(spelling: str, call: Call) -> Factors:
    """A rule from einsum spelling: ``"m k, k n -> m n"``.

    Dims are letters, ``...`` stands for any leading dims, ``1`` for a dim of size one that is broadcast;
    after ``whole`` stand the factors that every rank needs entire, after ``linear`` the sets of operands
    (``0+1`` jointly) in which the call is linear.
    """
    head, *options = spelling.split(";")
    left, right = head.split("->")
    tensors = [*call.operands], [*call.outputs]
    sides = []
    for text, values in zip((left, right), tensors, strict=True):
        terms = [t.split() for t in text.split(",")]
        assert len(terms) == len(values), (
            f"{call.op}: {spelling!r} speaks of {len(terms)} tensors, not {len(values)}"
        )
        sides.append(tuple(_dims(t, v.dim()) for t, v in zip(terms, values, strict=True)))
    whole: frozenset[str] = frozenset()
    linear: tuple[frozenset[int], ...] = ()
    for option in options:
        name, *words = option.split()
        if name == "whole":
            whole = frozenset(words)
        else:
            assert name == "linear", f"unknown word {name!r} in {spelling!r}"
            linear = tuple(frozenset(map(int, w.split("+"))) for w in words)
    return Factors(call, sides[0], sides[1], whole, linear=linear)


def _dims(names: list[str], rank: int) -> Dims:
    if "..." in names:
        at = names.index("...")
        count = rank - len(names) + 1
        # Numbered from the right, as broadcasting aligns them.
        names = names[:at] + [f"...{count - i}" for i in range(count)] + names[at + 1 :]
    assert len(names) == rank, f"{names} for a tensor of {rank} dims"
    return tuple(None if n == "1" else n for n in names)


def along(call: Call, whole_dims: set[int]) -> Factors:
    """Operands and outputs with the same dims; ``whole_dims`` are needed whole, the others pass.

    (An operand with other dims is the empty [0] that cat ignores.)
    """
    rank = call.outputs[0].dim()
    names = tuple(f"d{i}" for i in range(rank))
    whole = frozenset(names[d % rank] for d in whole_dims) if rank else frozenset()
    inputs = tuple(names if x.dim() == rank else (None,) * x.dim() for x in call.operands)
    return Factors(call, inputs, tuple(names for _ in call.outputs), whole)
