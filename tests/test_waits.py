"""What reads what a collective brings waits for it, in the code that Inductor generates."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor.scheduler import SchedulerNode
from torch._inductor.utils import run_and_get_code
from torch.testing._internal.distributed.fake_pg import FakeStore

from spcompile import _torch, collectives
from spcompile.collectives import Group
from spcompile.passes.overlap import scheduler
from spcompile.warm import NO_CACHES

STARTS = r"(start_shift|all_gather_into_tensor)\.default\("


@pytest.fixture
def group() -> Iterator[Group]:
    """Two ranks, of which one is there."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield Group(2, dist.group.WORLD.group_name)
    finally:
        dist.destroy_process_group()


def order(how: str, group: Group) -> list[str]:
    """Which stands first in the code: the wait for what is brought, or the kernel that reads it.

    Its two readers, of other loops, are fused; then the loops of one are computed again.
    """

    def work(x: Tensor, scale: Tensor, first: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        y = x * scale + 1
        if how == "gather":
            started = collectives.start_all_gather(y[:32], group)
        else:
            started = collectives.start_shift(y, 1, group)
        z = m @ m
        arrived = torch.where(first == 1, collectives.finish(started, x.shape), 0.0)
        last = torch.where(first == 1, scale * arrived + y, 0.0)
        return arrived @ m, collectives.all_reduce(last, group), z

    torch.compiler.reset()
    options = {**scheduler(False), **NO_CACHES}
    given = torch.randn(64, 64), torch.rand(64, 1), torch.tensor(1), torch.randn(64, 64)
    _, (code,) = run_and_get_code(torch.compile(work, options=options), *given)
    lines = [x for x in code.split("def call", 1)[1].splitlines() if "assert_" not in x]
    (at,) = (i for i, x in enumerate(lines) if re.search(STARTS, x))
    found = re.search(r"(\w+) = ", lines[at])
    assert found is not None
    name, renamed = found[1], re.search(r"(\w+) = (\w+)$", lines[at + 1])
    if renamed is not None and renamed[2] == name:
        name = renamed[1]
    uses = [x.strip() for x in lines[at + 1 :] if re.search(rf"\b{name}\b", x) and " = " not in x]
    return ["wait" if "wait_tensor" in x else "kernel" for x in uses if not x.startswith("del")][:2]


@pytest.mark.parametrize("how", ["gather", "shift"])
def test_the_wait_comes_first(group: Group, how: str) -> None:
    assert order(how, group) == ["wait", "kernel"]


def test_without_the_mend_it_does_not(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail. Where it fails, this version of torch does without what we mend."""
    monkeypatch.setattr(SchedulerNode, "recompute_size_and_body", _torch._recompute)
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    assert order("gather", group) == (["kernel", "wait"] if version < (2, 14) else ["wait", "kernel"])
