"""One compilation serves many lengths: symbolic sizes through recognition, sharding and simulated ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spcompile import _torch, backend, limits
from spcompile.simulate import simulated
from tests.proof import eager


class Model(nn.Module):
    """A language model with one attention; the loss is that of the next token."""

    def __init__(self, kind: str, window: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.window = kind, window
        self.embedding, self.project = nn.Embedding(11, 8), nn.Linear(8, 24)
        self.head = nn.Linear(8, 11, bias=False)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.project(x).chunk(3, -1))
        x = x + self.attend(q, k, v).transpose(1, 2).flatten(2)
        logits = self.head(x)
        return F.cross_entropy(logits[:, :-1].reshape(-1, 11), ids[:, 1:].reshape(-1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kind == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = q @ k.transpose(-1, -2)
        if self.kind == "linear":
            return scores.tril() @ v
        at = torch.arange(q.shape[2])
        hidden = at[:, None] < at
        if self.window:
            hidden = hidden | (at[:, None] - at >= self.window)
        return (scores / math.sqrt(4)).masked_fill(hidden, -math.inf).softmax(-1) @ v


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ids(tokens: int) -> Tensor:
    return torch.randint(0, 11, (2, tokens), generator=torch.Generator().manual_seed(tokens))


class Trained:
    """A compiled model on simulated ranks, compared with eager at every call."""

    def __init__(self, net: nn.Module, ranks: int, dynamic: bool | None = None, **options: Any) -> None:
        self.net, self.compilations = net, set[str]()
        ranked = simulated(ranks, nan_padding=ranks > 1, **options)

        def counted(gm: Any, inputs: Any) -> Callable[..., Any]:
            # Dynamo may start a graph over, under the same number.
            self.compilations.add(str(_torch.CompileContext.current_compile_id()))
            return ranked(gm, inputs)

        self.compiled = torch.compile(net, backend=counted, dynamic=dynamic)

    @property
    def graphs(self) -> int:
        """How many were compiled."""
        return len(self.compilations)

    def step(self, batch: Tensor) -> None:
        """Loss and all gradients are eager's."""
        expected = eager(self.net, {"ids": batch})
        loss = self.compiled(batch)
        loss.backward()
        found = {n: p.grad for n, p in self.net.named_parameters()}
        assert expected.error(loss.detach(), found) <= 1e-9, batch.shape


def test_two_graphs_serve_all_lengths_but_the_first() -> None:
    """The first length is compiled for itself; then lengths that the ranks divide, and others."""
    run = Trained(Model("sdpa"), 2)
    many = torch.randint(100, 4_001, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    for tokens in (12, 23, 36, 17, 60, 8, 31, *many):
        run.step(ids(tokens))
    assert run.graphs == 3


class Unrolled(Model):
    """Walks its tokens in chunks, so that the graph is of one length whatever Dynamo makes symbolic."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chunks = [x.sin() for x in v.split(8, 2)]
        return super().attend(q, k, torch.cat([x * (i + 1) for i, x in enumerate(chunks)], 2))


def test_symbolic_sizes_that_were_in_vain_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []

    def compiling(gm: Any, config: Any) -> Any:
        config = compile_with(gm, config)
        chosen.append(config.lengths)
        return config

    compile_with = limits.compiling
    monkeypatch.setattr(limits, "compiling", compiling)
    run = Trained(Unrolled("sdpa"), 2)
    for tokens in (16, 32, 48, 64):
        run.step(ids(tokens))
    assert chosen == ["symbolic", "symbolic", "symbolic", "each"]


def test_each_length_for_itself() -> None:
    run = Trained(Model("linear"), 2, lengths="each")
    for tokens in (12, 23, 17):
        run.step(ids(tokens))
    assert run.graphs == 3


@pytest.mark.parametrize(
    ("ranks", "kind", "options"), [(3, "linear", {}), (2, "masked", {"recognize": False})]
)
def test_other_attention(ranks: int, kind: str, options: dict[str, Any]) -> None:
    run = Trained(Model(kind), ranks, **options)
    for tokens in (12, 23, 17, 31):
        run.step(ids(tokens))
    assert run.graphs == 2


def test_dynamic_from_the_first_call() -> None:
    run = Trained(Model("sdpa"), 2, dynamic=True)
    for tokens in (11, 21):
        run.step(ids(tokens))
    assert run.graphs == 1


class Convolved(Model):
    """Two convolutions behind one pad: the first one's output is longer than the sequence."""

    def __init__(self) -> None:
        super().__init__("sdpa")
        self.each, self.all = nn.Conv1d(4, 4, 2, groups=4).double(), nn.Conv1d(4, 4, 3).double()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = self.all(self.each(F.pad(v.flatten(0, 1).mT, (3, 0)))).mT.view_as(v)
        return super().attend(q, k, v)


def test_blocks_have_room_for_what_is_longer_than_the_sequence() -> None:
    run = Trained(Convolved(), 2)
    for tokens in (12, 22, 13, 30, 17):
        run.step(ids(tokens))
    assert run.graphs == 2  # of one length, and of all others, whether the ranks divide them or not


def test_a_dim_that_is_marked_on_one_rank() -> None:
    run = Trained(Model("sdpa"), 1)
    for tokens in (11, 21):
        batch = ids(tokens)
        torch._dynamo.mark_dynamic(batch, 1)
        run.step(batch)
    assert run.graphs == 1


def test_what_was_proved_at_one_length_is_not_taken_for_true_at_another() -> None:
    """Up to its window the mask is causal: recognized as such, and then proved again at each length."""
    net = Model("masked", window=16)
    run = Trained(net, 2, dynamic=True)
    for tokens in (9, 13):
        run.step(ids(tokens))
    assert run.graphs == 1
    run.step(ids(29))  # from here on the window hides keys: another compilation, of the unedited graph


def test_a_failure_with_symbolic_sizes_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = backend.shard_joint_graph

    def fails(graph: Any, group: Any, config: Any, *rest: Any) -> Any:
        if config.lengths == "symbolic" and _torch.CompileContext.current_compile_id().frame_compile_id:
            raise RuntimeError("a rule that takes numbers only")
        return shard(graph, group, config, *rest)

    monkeypatch.setattr(backend, "shard_joint_graph", fails)
    net = Model("sdpa")
    compiled = torch.compile(net, backend="spcompile")
    compiled(ids(8)).backward()
    with pytest.warns(backend.OneLengthEach, match="takes numbers only"):
        loss = compiled(ids(9))
    assert abs(float(loss.detach() - net(ids(9)).detach())) <= 1e-9


class Masked(Model):
    """Ids and labels have symbols each where batch and length change, and a mask may come with them."""

    def forward(self, ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        x = x if mask is None else x * mask[..., None]
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.project(x).chunk(3, -1))
        logits = self.head(x + self.attend(q, k, v).transpose(1, 2).flatten(2))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_batch_and_length_change() -> None:
    """An argument that comes later is of one length at first; that is no reason to give up on lengths."""
    net = Masked("sdpa")
    compiled = torch.compile(net, backend=simulated(2, nan_padding=True))
    _torch.counters.clear()
    for batch, length, masked in ((2, 9, 0), (3, 13, 0), (5, 17, 0), (3, 11, 1), (5, 15, 1), (2, 7, 1)):
        given = {name: torch.randint(0, 11, (batch, length)) for name in ("ids", "labels")}
        given |= {"mask": torch.rand(batch, length, dtype=torch.float64)} if masked else {}
        expected = eager(net, given)
        loss = compiled(**given)
        loss.backward()
        assert expected.error(loss.detach(), {n: p.grad for n, p in net.named_parameters()}) <= 1e-9
    assert _torch.counters["stats"]["unique_graphs"] == 4


def test_ranks_are_told_apart_by_sizes() -> None:
    """What a symbolic graph is called with is part of what ranks agree upon (tests/test_ranks.py runs it)."""
    from spcompile.groups import fingerprint

    assert fingerprint(1, [20]) != fingerprint(1, [21])
