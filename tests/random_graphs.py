"""Graphs put together at random, sharded, against eager: ``python -m tests.random_graphs --count 1000``.

A program is a list of steps, each an operation's name and five numbers; any list is one. An operation takes
values from a pool by the numbers and adds its result; one that does not fit its operands does nothing. So a
program stays one whatever is left out of it, and what is wrong shrinks by leaving out.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from spcompile.errors import SpcompileError
from tests.proof import capture, eager
from tests.random_operations import EXPERTS, HIDDEN, LARGEST, OPERATIONS, VOCAB, Given, Step

__all__ = ["Case", "Program", "drawn", "error_of", "shrunk", "verdict"]

EXACT = 1e-9


class Case(NamedTuple):
    """A program on a batch of sequences, over some ranks."""

    steps: tuple[Step, ...]
    batch: int
    length: int
    ranks: int


class Program(nn.Module):
    """Tokens, the steps of a program, and a loss in which every place counts."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.steps = steps
        self.embedding = nn.Parameter(normal(VOCAB, HIDDEN))
        self.bank = nn.Parameter(normal(4096) / 2)
        self.experts = nn.Parameter(normal(EXPERTS, HIDDEN, HIDDEN) / 2)
        self.register_buffer("weights", 1 + normal(LARGEST) / 4)

    def forward(self, ids: Tensor) -> Tensor:
        """The loss."""
        given = Given(ids, self.bank, self.experts)
        pool, losses = [F.embedding(ids, self.embedding)], [torch.zeros((), dtype=torch.float64)]
        for step in self.steps:
            x, y = (pool[-1 - n % len(pool)] for n in (step.x, step.y))
            out = OPERATIONS[step.name](given, x, y, step)
            if out is not None and 0 < out.numel() <= LARGEST:
                (pool if out.dim() else losses).append(out)
        return torch.stack([*losses, *map(self.weighed, [pool[0], *pool[-3:]])]).sum()

    def weighed(self, x: Tensor) -> Tensor:
        """A number that depends on every entry of ``x`` and on its place."""
        for dim, size in enumerate(x.shape):
            x = x * self.weights[:size].view(-1, *[1] * (x.dim() - dim - 1))
        return (x * x.cos()).mean()


# --------------------------------------------------------------------------------------------- the check
def error_of(case: Case) -> float:
    """The largest relative error of the loss and the gradients of a sharded step; padding is NaN."""
    generator = torch.Generator().manual_seed(case.length)
    inputs: dict[str, Any] = {"ids": torch.randint(VOCAB, (case.batch, case.length), generator=generator)}
    model = Program(case.steps)
    expected = eager(model, inputs)
    left = (expected.loss, *expected.gradients.values())
    if not all(x.isfinite().all() for x in left):
        return 0.0  # of what is not a number in eager nothing can be told
    error = expected.error(*capture(model, inputs).run(case.ranks, nan_padding=True))
    return 0.0 if error > EXACT and error <= 16 * _of_rounding(model, inputs) else error


def _of_rounding(model: nn.Module, inputs: dict[str, Any]) -> float:
    """What the last digits of the parameters do to eager's results: a norm of nothing but rounding, say."""
    expected, generator = eager(model, inputs), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 1e-15 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    other = eager(model, inputs)
    return expected.error(other.loss, other.gradients | other.written)


def verdict(case: Case) -> str:
    """Empty if it is right; else what is wrong, of one line. A refusal of ours says so."""
    try:
        error = error_of(case)
    except Exception as raised:
        ours = isinstance(raised, SpcompileError)
        text = " ".join(str(raised).split())[:200]
        return f"{'refused' if ours else 'raised'} {type(raised).__name__}: {text}"
    return "" if error <= EXACT else f"wrong by {error:.2g}"


def shrunk(case: Case, verdict_of: Callable[[Case], str] = verdict) -> Case:
    """With every step left out that the same kind of verdict does not need."""
    kind = verdict_of(case).split(" ")[:2]
    at = len(case.steps) - 1
    while at >= 0:
        less = case._replace(steps=case.steps[:at] + case.steps[at + 1 :])
        if verdict_of(less).split(" ")[:2] == kind:
            case = less
        at -= 1
    return case


def drawn(seed: int) -> Case:
    """The case of a seed."""
    chance = random.Random(seed)
    names = list(OPERATIONS)
    steps = tuple(
        Step(
            chance.choice(names),
            min(chance.randrange(4), chance.randrange(6)),
            *(chance.randrange(12) for _ in "yijk"),
        )
        for _ in range(chance.randint(4, 14))
    )
    return Case(steps, chance.randint(1, 3), chance.choice((5, 8, 12, 13, 16)), chance.randint(2, 4))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.random_graphs", description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first (default: %(default)s)")
    args = parser.parse_args()
    failed = 0
    for seed in track(range(args.first, args.first + args.count), "random graphs"):
        said = verdict(drawn(seed))
        if said:
            failed += not said.startswith("refused")
            print(f"seed {seed}: {said}", flush=True)
            if not said.startswith("refused"):
                print(f"    {shrunk(drawn(seed))}", flush=True)
    print(f"{args.count} graphs, {failed} wrong")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
