"""Ranks that are about to run different things, for tests/test_agreement.py: real Gloo ranks, no Inductor.

The errors come before anything is compiled, so that what would be compiled is run as Dynamo traced it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import spcompile
from spcompile import _torch


class Net(nn.Module):
    """A loss of tokens, with a parameter, a buffer and a number."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, input_ids: Tensor, number: int = 1, **kwargs: Tensor) -> Tensor:
        logits = self.head(self.embed(input_ids) * self.scale * number)
        return F.cross_entropy(logits.flatten(0, 1), kwargs["labels"].flatten())


def compiled(net: nn.Module, **options: Any) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(net, backend="spcompile", options=options)


def tokens(seed: int = 0, length: int = 12) -> Tensor:
    return torch.randint(0, 20, (2, length), generator=torch.Generator().manual_seed(seed))


def same() -> None:
    call = compiled(Net())
    for step in range(5):
        call(tokens(step), labels=tokens(step)).backward()


def batch() -> None:
    compiled(Net())(tokens(dist.get_rank()), labels=tokens(dist.get_rank()))


def batch_and_weights() -> None:
    compiled(Net(dist.get_rank()))(tokens(dist.get_rank()), labels=tokens())


def batch_later() -> None:
    call = compiled(Net())
    call(tokens(), labels=tokens())
    call(tokens(5 + dist.get_rank()), labels=tokens(5))


def labels() -> None:
    ours = tokens()
    ours[1, 11] += dist.get_rank()
    compiled(Net())(tokens(), labels=ours)


def shape() -> None:
    length = 12 + dist.get_rank()
    compiled(Net())(tokens(0, length), labels=tokens(0, length))


def weights() -> None:
    compiled(Net(dist.get_rank()))(tokens(), labels=tokens())


def buffer() -> None:
    net = Net()
    net.scale[3] += 1e-6 * dist.get_rank()
    compiled(net)(tokens(), labels=tokens())


def weights_later() -> None:
    """One rank's step of the optimizer was another: found at the second call."""
    net = Net()
    call = compiled(net)
    for step in range(3):
        call(tokens(step), labels=tokens(step))
        with torch.no_grad():
            net.head.weight[0, 0] += 0.1 * dist.get_rank()


def rounding() -> None:
    """The same, but by less than the kernels of some GPUs give: a warning, once."""
    net = Net()
    call = compiled(net)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(5):
            call(tokens(step), labels=tokens(step))
            with torch.no_grad():
                net.head.weight[0, 0] *= 1 + 2e-7 * dist.get_rank()
    assert [w for w in told if "by rounding" in str(w.message)] and len(told) == 1, told


def number() -> None:
    """Dynamo writes a Python number into the graph."""
    compiled(Net())(tokens(), 1 + dist.get_rank(), labels=tokens())


def options() -> None:
    compiled(Net(), regather=dist.get_rank() == 1)(tokens(), labels=tokens())


def data_parallel() -> None:
    """DDP over the ranks that spcompile takes for the sequence axis: its habit is a batch for each."""
    net = DistributedDataParallel(Net())
    compiled(net)(tokens(dist.get_rank()), labels=tokens(dist.get_rank()))


def sampler() -> None:
    """What a Hugging Face Trainer does after model.compile(): its sampler gives each rank other rows."""
    data = [tokens(seed) for seed in range(8)]
    call = compiled(Net())
    for ids in DataLoader(data, batch_size=None, sampler=DistributedSampler(data)):
        call(ids, labels=ids).backward()


def shapes_alone() -> None:
    compiled(Net(), check="shapes")(tokens(dist.get_rank()), labels=tokens(dist.get_rank()))


def again() -> None:
    """The error leaves nothing behind: the right batch then runs."""
    call = compiled(Net())
    for first in (True, False):
        try:
            call(tokens(dist.get_rank() if first else 0), labels=tokens())
        except spcompile.SpcompileError:
            assert first
    call(tokens(1), labels=tokens(1))


def one_rank_compiles_again() -> None:
    """The others wait for it, and nobody takes its check for the model's collectives."""
    net = Net()
    call = compiled(net)
    for step in range(4):
        if step == 2 and dist.get_rank() == 1:
            torch._dynamo.reset()
        call(tokens(step), labels=tokens(step))
        dist.all_reduce(torch.ones(3))


def other_axis() -> None:
    """A batch for each row of a 2-D mesh: data differ, and nobody compares them."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("dp", "sp"))
    net = DistributedDataParallel(Net(), process_group=mesh["dp"].get_group())
    compiled(net, mesh=mesh["sp"])(tokens(dist.get_rank()), labels=tokens(dist.get_rank()))


def wrong_axis() -> None:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("dp", "sp"))
    net = DistributedDataParallel(Net(), process_group=mesh["dp"].get_group())
    compiled(net, mesh=mesh["dp"])(tokens(dist.get_rank()), labels=tokens(dist.get_rank()))


PASS = (same, rounding, shapes_alone, again, one_rank_compiles_again, other_axis)
FAIL = (
    *(batch, batch_and_weights, batch_later, labels, shape, weights, buffer, weights_later, number, options),
    *(data_parallel, sampler, wrong_axis),
)


def _eagerly(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
    return gm.forward


def agreement() -> dict[str, Any]:
    """Case -> the type and text of its error, or nothing."""
    _torch.compile_fx = _eagerly
    found = {}
    for case in (*PASS, *FAIL):
        try:
            case()
            found[case.__name__] = ["", ""]
        except Exception as error:  # the test looks at what it says
            found[case.__name__] = [type(error).__name__, str(error)]
    return found
