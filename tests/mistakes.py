"""What a new user does wrong, each with the words that answer it: ``python -m tests.mistakes`` prints them.

None of them gets as far as Inductor, so each answers at once.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import spcompile
from spcompile import agreement, backend
from spcompile.collectives import Group
from spcompile.disagreement import Report, Value


class Mistake(NamedTuple):
    """A thing to do, and what its error says."""

    name: str
    do: Callable[[], object]
    says: tuple[str, ...]


class Mlp(nn.Module):
    """No tokens and no attention: the sequence must be named."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, features: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
        return self.down(self.up(features).relu())


class Broken(Mlp):
    """The same with a graph break: the second half has no argument of that name, which is no mistake."""

    def forward(self, features: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
        x = self.up(features).relu()
        torch._dynamo.graph_break()
        return self.down(x)


def call(
    options: Any = None, *, mode: str | None = None, model: nn.Module | None = None, **more: Any
) -> object:
    """Compile and call a small model on 2 sequences of 7 entries."""
    torch._dynamo.reset()
    compiled = torch.compile(model or Mlp(), backend="spcompile", mode=mode, options=options)
    return compiled(torch.ones(2, 7, 4), **more)


def with_hint(**dims: Any) -> Callable[[], object]:
    return lambda: call({"sequence_dims": dims})


def with_inductor(**options: Any) -> Callable[[], object]:
    return lambda: call({"inductor": options})


def no_group() -> object:
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "2"}):
        return call()


class TwoAxes:
    """Stands for a DeviceMesh of two axes, which needs a process group."""

    ndim = 2

    def get_group(self) -> object:
        raise AssertionError("a mesh of two axes has no group")

    def __repr__(self) -> str:
        return "DeviceMesh((dp=2, sp=2))"


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def of_two_ranks(**other: Any) -> Callable[[], object]:
    """A call on rank 0 of two, where rank 1 has something else of the argument ``features``."""

    def changed(value: Value) -> Value:
        return replace(value, **other) if value.argument.name == "features" else value

    def numbers(group: Group, mine: list[int], values: list[Tensor | None]) -> list[list[int]]:
        row = [*mine, *(0 if value is None else int(value) for value in values)]
        return [row, [row[0], *(number + 1 for number in row[1:])]]

    def objects(group: Group, mine: Report) -> list[Report]:
        return [mine, replace(mine, values=[changed(value) for value in mine.values])]

    def do() -> object:
        with (
            mock.patch.object(backend, "sequence_group", return_value=Group(2, "two ranks")),
            mock.patch.object(agreement, "gather_numbers", numbers),
            mock.patch.object(agreement, "gather_objects", objects),
        ):
            return call()

    return do


def hook_taken() -> object:
    with torch._inductor.config.patch(joint_custom_pre_pass=lambda graph: None):
        return call()


def of_no_rank() -> object:
    """A mesh in which this process is not."""
    with one_process():
        mesh = torch.distributed.init_device_mesh("cpu", (1,), mesh_dim_names=("sp",))
        with mock.patch.object(type(mesh), "get_coordinate", return_value=None):
            return call({"mesh": mesh})


MISTAKES = [
    Mistake(
        "unknown option", lambda: call({"sofmax": "ring"}), ("no option 'sofmax'", "did you mean 'softmax'")
    ),
    Mistake(
        "option of nothing like", lambda: call({"nonsense": 1}), ("no option 'nonsense'", "there are: mesh")
    ),
    Mistake("name that is no text", lambda: call({3: 1}), ("no option 3",)),
    Mistake("wrong strategy", lambda: call({"linear": "pigeon"}), ("one of 'auto', 'allgather'",)),
    Mistake("wrong on_gather", lambda: call({"on_gather": "shout"}), ("'warn', 'error', 'ignore'",)),
    Mistake("number for a switch", lambda: call({"regather": 1}), ("regather=1", "True, False")),
    Mistake("text for a switch", lambda: call({"recognize": "no"}), ("recognize='no'", "True, False")),
    Mistake("text for ranks", lambda: call({"ranks": "8"}), ("ranks='8'", "a number of ranks")),
    Mistake("ranks that are not there", lambda: call({"ranks": 64}), ("cannot run", "spcompile.explain")),
    Mistake("options that are no dict", lambda: call([("linear", "auto")]), ("must be a dict",)),
    Mistake("unknown mode", lambda: call(mode="fastest"), ("mode='fastest'", "'reduce-overhead'", "Remedy")),
    Mistake("mode that would not do", lambda: call(mode="lite"), ("mode='lite'", "Remedy")),
    Mistake("unknown option of Inductor", with_inductor(max_autotun=True), ("did you mean 'max_autotune'",)),
    Mistake("wrong type for Inductor", with_inductor(max_autotune="yes"), ("is a str", "give a bool")),
    Mistake(
        "hook of ours", with_inductor(joint_custom_pre_pass=None), ("cannot be set", "joint_custom_post_pass")
    ),
    Mistake("hook of ours, globally", hook_taken, ("config.joint_custom_pre_pass is set", "Remedy")),
    Mistake("Inductor's options bare", lambda: call({"inductor": True}), ("must be a dict of Inductor's",)),
    Mistake(
        "no such argument", with_hint(input_ids=1), ("no argument 'input_ids'", "features [2, 7, 4], mask")
    ),
    Mistake("dim out of range", with_hint(features=3), ("[2, 7, 4]", "dims are 0 to 2", "Remedy")),
    Mistake("dim that is a text", with_hint(features="1"), ("sequence_dims", "{'input_ids': 1}")),
    Mistake(
        "dims that are a number", lambda: call({"sequence_dims": 1}), ("sequence_dims=1", "must be a dict")
    ),
    Mistake(
        "argument that is no tensor",
        lambda: call({"sequence_dims": {"mask": 1}}, mask=[1, 2]),
        ("'mask' is a list", "there are features"),
    ),
    Mistake(
        "dim of one entry",
        lambda: torch.compile(Mlp(), backend="spcompile", options={"sequence_dims": {"features": 0}})(
            torch.ones(1, 7, 4)
        ),
        ("[1, 7, 4]", "one entry", "Remedy"),
    ),
    Mistake("missing group", no_group, ("WORLD_SIZE=2", "init_process_group")),
    Mistake("mesh of two axes", lambda: call({"mesh": TwoAxes()}), ("1-D DeviceMesh", "mesh['sp']")),
    Mistake("mesh that is none", lambda: call({"mesh": (0, 1)}), ("must be a DeviceMesh",)),
    Mistake("mesh without this rank", of_no_rank, ("not in it", "Remedy")),
    Mistake(
        "other shapes on another rank",
        of_two_ranks(text="float32[2, 9, 4]"),
        ("ranks [1]", "features", "[2, 9, 4]", "Remedy"),
    ),
    Mistake("another batch on another rank", of_two_ranks(digest=1), ("ranks [1]", "features", "Remedy")),
    Mistake("explain of no model", lambda: spcompile.explain([1]), ("list", "nothing to call")),
    Mistake("explain, wrong option", lambda: spcompile.explain(Mlp(), sofmax=1), ("did you mean 'softmax'",)),
]


def answer(mistake: Mistake) -> str:
    """What the error says."""
    from spcompile import hints

    hints._LONG.clear()
    try:
        mistake.do()
    except spcompile.SpcompileError as error:
        return str(error)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, spcompile.SpcompileError):
            return str(error)
        raise
    raise AssertionError(f"{mistake.name}: no error")


if __name__ == "__main__":
    for mistake in MISTAKES:
        start = time.perf_counter()
        text = answer(mistake).replace("backend='spcompile' raised:\nSpcompileError: ", "")
        text = text.partition("\n\nSet TORCHDYNAMO")[0]
        print(f"{mistake.name} ({time.perf_counter() - start:.2f} s)\n    {text}")
