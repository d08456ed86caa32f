"""The Values that a loop computes in each iteration, as one: a `Family` has a member for each step.

An edge into a family is
  * invariant: all members use the same Value from outside the loop;
  * same-iteration: member t uses member t of another family;
  * carried: member t uses member t - 1 of another family, and the first uses an initial Value;
  * external: each member uses another Value from outside, which again are a family (`f(x[:, t])` computed
    before the loop), or parts of one tensor, by index literals in arithmetic progression.
Whatever is none of these is no loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from spcompile.passes.recognize.edit import Refused
from spcompile.passes.recognize.loops.runs import Run, index_arguments, label
from spcompile.passes.shadow import Value

__all__ = ["Carry", "Family", "Invariant", "Loop", "Progress", "Ref"]


@dataclass(eq=False)
class Invariant:
    """One Value, from outside, for all steps."""

    value: Value


@dataclass(eq=False)
class Carry:
    """What a family held in the step before; `initial` before the first."""

    family: Family
    initial: Value


@dataclass(frozen=True)
class Progress:
    """An index literal: `start + t * step`."""

    start: int
    step: int


@dataclass(eq=False)
class Family:
    """One Value per step. `args` has a Ref in place of each Value, and a Progress for an index that runs."""

    members: list[Value]
    position: int | None
    """Its place in the body; None for one that is computed before the loop."""
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def like(self) -> Value:
        """The member that stands for all: shape, dtype, op and literals."""
        return self.members[1]

    def operands(self) -> Iterator[Ref]:
        yield from refs_in(self.args)


Ref = Family | Carry | Invariant


def refs_in(tree: Any) -> Iterator[Ref]:
    """Every Ref inside lists, tuples and dicts."""
    if isinstance(tree, (Family, Carry, Invariant)):
        yield tree
    elif isinstance(tree, dict):
        for x in tree.values():
            yield from refs_in(x)
    elif isinstance(tree, (list, tuple)):
        for x in tree:
            yield from refs_in(x)


class Loop:
    """A run of Values as a loop. Families are built where something asks for them."""

    def __init__(self, values: list[Value], run: Run) -> None:
        self.run = run
        self.steps = run.steps
        self.body = values[run.start : run.stop]
        self.place = {id(v): i for i, v in enumerate(self.body)}
        self.families: dict[tuple[int, ...], Ref] = {}
        self.carries: dict[tuple[int, int], Carry] = {}
        self.by_value: dict[Value, Ref] = {}
        """What the Values of the second step stand for."""
        self.ambiguous: set[Value] = set()
        """Those that stand for several things."""

    def at(self, position: int) -> Family:
        """The family at a place of the body."""
        members = self.body[position :: self.run.period]
        ref = self.ref(members)
        assert isinstance(ref, Family)
        return ref

    def family_of(self, v: Value) -> tuple[Family, int] | None:
        """The family and step of a Value of the body."""
        if id(v) not in self.place:
            return None
        step, position = divmod(self.place[id(v)], self.run.period)
        return self.at(position), step

    def ref(self, members: Sequence[Value]) -> Ref:
        """What these Values, one per step, are."""
        key = tuple(map(id, members))
        if key not in self.families:
            found = self._classify(list(members))
            self.families[key] = found
            if self.by_value.setdefault(members[1], found) is not found:
                self.ambiguous.add(members[1])
            if isinstance(found, Family):  # after it is entered: a carry leads back to it
                found.args = self._arguments(found)
        return self.families[key]

    def _classify(self, members: list[Value]) -> Ref:
        if all(m is members[0] for m in members):
            if id(members[0]) in self.place:
                raise Refused("it uses the result of one step in the others")
            return Invariant(members[0])
        period = self.run.period
        at = [self.place.get(id(m)) for m in members]
        if at[1] is not None:
            step, position = divmod(at[1], period)
            if all(a == position + t * period for t, a in enumerate(at)):
                return Family(members, position)
            if step == 0 and at[0] is None and all(
                a == position + (t - 1) * period for t, a in enumerate(at) if t
            ):
                return self._carry(position, members[0])
            raise Refused("it uses the results of other steps than the one before")
        if any(a is not None for a in at) or len({label(m) for m in members}) > 1:
            raise Refused("its steps use unlike values")
        if members[1].name in ("opaque", "input", "literal"):
            raise Refused("its steps use values of which nothing is known")
        return Family(members, None)

    def _carry(self, position: int, initial: Value) -> Carry:
        family = self.at(position)  # which may ask for this very carry
        return self.carries.setdefault((position, id(initial)), Carry(family, initial))

    def _arguments(self, family: Family) -> dict[str, Any]:
        indices = index_arguments(family.like)
        columns = {k: [m.args.get(k) for m in family.members] for k in family.like.args}
        if family.like.name == "copy":  # what it is written over is no operand
            columns.pop("self")
        return {k: self._progress(x) if k in indices else self._tree(x) for k, x in columns.items()}

    def _progress(self, column: list[Any]) -> Any:
        first = column[0]
        if all(x == first for x in column):
            return first
        if not all(type(x) is int for x in column):
            raise Refused("its indices are not in arithmetic progression")
        step = column[1] - first
        if any(x != first + t * step for t, x in enumerate(column)):
            raise Refused("its indices are not in arithmetic progression")
        return Progress(first, step)

    def _tree(self, column: list[Any]) -> Any:
        """One argument of all members; the labels are equal, so its structure is."""
        first = column[0]
        if isinstance(first, Value):
            return self.ref(column)
        if isinstance(first, (list, tuple)):
            return [self._tree(list(x)) for x in zip(*column, strict=True)]
        return first


