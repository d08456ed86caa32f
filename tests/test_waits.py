"""What reads what a collective brings waits for it, in the code that Inductor generates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor.scheduler import SchedulerNode
from torch.testing._internal.distributed.fake_pg import FakeStore

from spcompile import _torch, collectives
from spcompile.collectives import Group
from spcompile.passes.overlap import scheduler
from spcompile.warm import NO_CACHES
from tests.waits import kept_codes, unwaited


@pytest.fixture
def group() -> Iterator[Group]:
    """Two ranks, of which one is there."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield Group(2, dist.group.WORLD.group_name)
    finally:
        dist.destroy_process_group()


def too_early(how: str, group: Group) -> list[str]:
    """What reads too early in the code of a collective with two readers, of other loops.

    They are fused; then the loops of one are computed again.
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
    with kept_codes() as codes:
        torch.compile(work, options=options)(*given)
    (code,) = codes
    assert code.count("wait_tensor.default(") == 2
    return unwaited(code)


@pytest.mark.parametrize("how", ["gather", "shift"])
def test_the_wait_comes_first(group: Group, how: str) -> None:
    """Code on real ranks is looked at in the same way, whatever it computes (tests/real_ranks.py)."""
    assert not too_early(how, group)


def test_without_the_mend_it_does_not(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail. Where it fails, this version of torch does without what we mend."""
    monkeypatch.setattr(SchedulerNode, "recompute_size_and_body", _torch._recompute)
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    assert bool(too_early("gather", group)) == (version < (2, 14))
