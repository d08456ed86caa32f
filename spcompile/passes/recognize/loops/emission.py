"""Everything that a loop's surroundings want of it, computed without the loop.

States are solved in the order in which they depend on each other; then what is wanted is evaluated for all
steps from the states before each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, fx

from spcompile.passes.recognize.algebra.products import is_zero
from spcompile.passes.recognize.edit import Refused
from spcompile.passes.recognize.loops import named, scans
from spcompile.passes.recognize.loops.affine import Reader
from spcompile.passes.recognize.loops.evaluate import Batch, Evaluator
from spcompile.passes.recognize.loops.families import Carry, Family, Invariant, Loop, Progress
from spcompile.passes.recognize.loops.layout import Layout
from spcompile.passes.shadow import Value

__all__ = ["Emission"]


class Emission:
    """Computes families of a loop; run once on fake tensors to see what it needs, and once to be traced."""

    def __init__(
        self, loop: Loop, invariant: Callable[[Value], Tensor | None], calls: dict[Value, fx.Node]
    ) -> None:
        self.loop = loop
        like = next(v for v in loop.body if v.fake is not None)
        self.evaluator = Evaluator(loop.steps, invariant, calls, like, _runs_down(loop))
        self.reader = Reader(loop, self.evaluator.given.__contains__)
        self.finals: dict[Family, Tensor] = {}
        self.carries = False
        """Whether a state is carried from step to step."""

    def solve(self, families: Sequence[Family], last: Sequence[Family]) -> None:
        """Solve the states that these families need: for all steps, or just in the last.

        Raises:
            Refused: a state is not affine, or is used in a way that is not read.
        """
        for group in _in_order(self.reader, [*families, *last]):
            states = {c.family for c in group}
            roots = list(families)
            roots += [f for f in last if f not in states]
            if len(group) == 1:
                others = _needed(self.reader, [*families, *last]) - set(group)
                updates = [c.family for c in _in_place(others) if c not in self.evaluator.given]
                roots += updates
            self._solve(group, roots)
            self.reader.memo.clear()

    def _solve(self, group: list[Carry], roots: list[Family]) -> None:
        self.carries = True
        like = group[0].family.like
        if like.dtype is None or not like.dtype.is_floating_point or like.fake is None:
            raise Refused("its state is not a tensor of floats")
        if any(c.initial.shape != c.family.like.shape for c in group):
            raise Refused("its state changes its shape")
        layout = Layout(self.reader, self.evaluator, like.fake)
        initial = [self._initial(c) for c in group]
        if len(group) == 1:
            try:
                found, final = named.attention(layout, group[0], initial[0], roots)
            except Refused:
                pass  # some other affine recurrence, or none
            else:
                for family, readout in found.items():
                    self.evaluator.given[family] = readout
                self.evaluator.given[group[0]] = _Missing()
                self.finals[group[0].family] = final
                return
        followed = any(self.reader.carries(r) & set(group) for r in roots)
        found_states = scans.scan(layout, group, initial, followed)
        for carry, (before, final) in zip(group, found_states, strict=True):
            self.evaluator.given[carry] = before if before is not None else _Missing()
            self.finals[carry.family] = final

    def _initial(self, carry: Carry) -> Tensor | None:
        if is_zero(carry.initial):
            return None
        b = self.evaluator.value(Invariant(carry.initial))
        assert isinstance(b, Batch) and not b.batched
        return b.x

    # ---- what is wanted

    def stacked(self, family: Family) -> Tensor:
        """A family's tensors, with the steps in front, in the order of the loop."""
        b = self.evaluator.value(family)
        x = b.x if b.batched else b.x.unsqueeze(0).expand(self.loop.steps, *b.x.shape)
        return x

    def at(self, family: Family, step: int) -> Tensor:
        """A family's tensor in one step."""
        if step == self.loop.steps - 1 and family in self.finals:
            return self.finals[family]
        b = self.evaluator.value(family)
        if not b.batched:
            return b.x
        return b.x[self.loop.steps - 1 - step if self.evaluator.reverse else step]


class _Missing:
    """In the place of a state that is nowhere as a whole."""

    def __init__(self) -> None:
        self.batched = True

    @property
    def x(self) -> Tensor:
        raise Refused("its state is used as a whole")


def _runs_down(loop: Loop) -> bool:
    """Whether most parts are taken by an index that falls: the loop runs from the last token."""
    up = down = 0
    for ref in loop.families.values():
        for a in ref.args.values() if isinstance(ref, Family) else ():
            if isinstance(a, Progress):
                up, down = up + (a.step > 0), down + (a.step < 0)
    return down > up


def _needed(reader: Reader, families: Sequence[Family]) -> set[Carry]:
    """Every state that the families need, also for the updates of states."""
    found: set[Carry] = set()
    todo = [c for f in families for c in reader.carries(f)]
    while todo:
        c = todo.pop()
        if c not in found:
            found.add(c)
            todo += reader.carries(c.family)
    return found


def _in_place(carries: Iterable[Carry]) -> list[Carry]:
    """In an order that is the same in all processes."""
    return sorted(carries, key=lambda c: (c.family.position or 0, c.initial.time))


def _in_order(reader: Reader, families: Sequence[Family]) -> list[list[Carry]]:
    """Groups of states that depend on each other, after those that they only use."""
    needed = _needed(reader, families)
    reach = {c: _needed(reader, [c.family]) for c in needed}
    groups: list[list[Carry]] = []
    left = _in_place(needed)
    while left:
        first = left[0]
        group = [c for c in left if c is first or (c in reach[first] and first in reach[c])]
        groups.append(group)
        left = [c for c in left if c not in group]
    done: set[Carry] = set()
    out = []
    while groups:
        ready = next(g for g in groups if all(reach[c] <= done | set(g) for c in g))
        groups.remove(ready)
        done |= set(ready)
        out.append(ready)
    return out


