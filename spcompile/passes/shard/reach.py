"""How far each tensor is shifted, over all that is asked of it: so that its shifts share one halo."""

from __future__ import annotations

from spcompile.passes.shard.communicate import is_shift
from spcompile.passes.shard.propagate import Plan, Value
from spcompile.placement import Placement, Shard, same_blocks

__all__ = ["reaches"]


def reaches(plan: Plan) -> dict[Value, tuple[int, int]]:
    """The widest halo that computed tensors are asked for: positions before a rank's block, and behind it."""
    found: dict[Value, tuple[int, int]] = {}
    asked: set[tuple[Value, Placement]] = set()
    todo = [
        pair
        for step in plan.steps.values()
        if step.split is not None
        for pair in zip(step.operands, step.split.inputs, strict=True)
    ]
    while todo:
        value, want = todo.pop()
        if (value, want) in asked or not isinstance(want, Shard):
            continue
        asked.add((value, want))
        step, have = plan.steps.get(value[0]), plan.natural(value)
        if isinstance(have, Shard) and same_blocks(have, want) and not is_shift(have, want, plan.ranks):
            continue
        if step is not None and step.kind != "computed":
            split = step.rule.split("out", value[1], want) if step.rule is not None else None
            if split is not None:
                todo += zip(step.operands, split.inputs, strict=True)
        elif isinstance(have, Shard) and same_blocks(have, want):
            left, right = found.get(value, (0, 0))
            shift = have.start - want.start
            found[value] = max(left, -shift), max(right, shift)
    return found
