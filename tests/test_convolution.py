"""Short convolutions along the sequence: sharded by a halo of kernel - 1 tokens, once in each direction."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spcompile.simulate import simulated
from tests.proof import Eager, Joint, capture, eager, left_behind
from tests.releases import each_change

RANKS = (1, 2, 3, 4)
CHANNELS = 6
GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default


class Sliced(nn.Module):
    """The convolution pads on both sides, and what it says of the future is cut off (Mamba-2, Qwen3-Next)."""

    def __init__(self, kernel: int):
        super().__init__()
        self.convolution = nn.Conv1d(CHANNELS, CHANNELS, kernel, groups=CHANNELS, padding=kernel - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Padded(nn.Module):
    """The past is padded with zeros first (causal-conv1d's reference)."""

    def __init__(self, kernel: int):
        super().__init__()
        self.convolution = nn.Conv1d(CHANNELS, CHANNELS, kernel, groups=CHANNELS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x.transpose(1, 2), (self.convolution.kernel_size[0] - 1, 0))
        return self.convolution(padded).transpose(1, 2)


class Summed(nn.Module):
    """Written out: a sum of shifted products."""

    def __init__(self, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(kernel, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        kernel, length = self.weight.shape[0], x.shape[1]
        padded = F.pad(x, (0, 0, kernel - 1, 0))
        return sum(padded[:, i : i + length] * self.weight[i] for i in range(kernel))


FORMS = {"sliced": Sliced, "padded": Padded, "summed": Summed}


class Model(nn.Module):
    """Tokens, a convolution with its activation and residual, and a loss."""

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self.embedding, self.convolution = nn.Embedding(11, CHANNELS), convolution
        self.head = nn.Linear(CHANNELS, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        logits = self.head(x + F.silu(self.convolution(x)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@functools.lru_cache(maxsize=2)
def case(form: str, kernel: int, length: int) -> tuple[Eager, Joint]:
    torch.manual_seed(0)
    model = Model(FORMS[form](kernel)).double()
    inputs = {"ids": torch.randint(11, (2, length))}
    return eager(model, inputs), capture(model, inputs)


def halos(joint: Joint, ranks: int) -> list[int]:
    """How many tokens each all-gather of the sharded graph takes from a rank."""
    local, sharded = joint.shard(ranks)
    assert not sharded.gathers
    sent = [n.args[0].meta["val"].numel() for n in local.graph.nodes if n.target is GATHER]
    return [n // (2 * CHANNELS) for n in sent]


# Divisible by some and by none, and blocks shorter than the halo or than a token for each rank.
@pytest.mark.parametrize("length", each_change([13, 3, 12, 5], [13, 3]))
@pytest.mark.parametrize("kernel", each_change([4, 2, 1, 3], [4, 2]))
@pytest.mark.parametrize("form", FORMS)
def test_a_causal_convolution(form: str, kernel: int, length: int) -> None:
    expected, joint = case(form, kernel, length)
    for ranks in RANKS:
        error = expected.error(*joint.run(ranks, nan_padding=length % ranks != 0))
        assert error <= 1e-9, f"P={ranks}: {error:.1e}"
        if ranks > 1 and kernel > 1:
            assert halos(joint, ranks) == [min(kernel - 1, -(-length // ranks))] * 2


class Other(nn.Module):
    """`body` of a hidden state [B, T, C] and some parameters, beside a residual."""

    def __init__(self, body: Callable[..., Tensor], *shapes: tuple[int, ...]):
        super().__init__()
        self.body, self.weights = body, nn.ParameterList(torch.randn(s) for s in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, *self.weights)


def convolved(x: Tensor, weight: Tensor, **options: int) -> Tensor:
    return F.conv1d(x.transpose(1, 2), weight, groups=CHANNELS // weight.shape[1], **options).transpose(1, 2)


def both_ways(x: Tensor, weight: Tensor) -> Tensor:
    return convolved(x, weight, padding=2)[:, :-2] + convolved(x, weight, padding=2)[:, 2:]


def wanted_whole(x: Tensor, weight: Tensor) -> Tensor:
    """Keys of an attention: of the convolution's output the part inside is gathered."""
    keys = convolved(x, weight, padding=3)[:, :-3]
    return (x @ keys.transpose(1, 2)).softmax(-1) @ keys


def cut_twice(x: Tensor, weight: Tensor) -> Tensor:
    return F.pad(convolved(x, weight, padding=3)[:, :-3][:, 1:], (0, 0, 1, 0))


def tail_is_used(x: Tensor, weight: Tensor) -> Tensor:
    y = convolved(x, weight, padding=3)
    return y[:, :-3] + y[:, -3:].sum(1, keepdim=True)


def padded_by_one(x: Tensor, weight: Tensor) -> Tensor:
    """What sticks out is not zero."""
    return convolved(F.pad(x, (0, 0, 3, 0), value=1.0), weight)


def of_padding(x: Tensor, weight: Tensor) -> Tensor:
    """What sticks out is cos 0."""
    return convolved(F.pad(x, (0, 0, 3, 0)).cos(), weight)


KERNEL = (CHANNELS, 1, 4)
# What is computed, the shapes of its parameters, and the tokens that each all-gather takes from a rank
# (None where some are gathered whole).
OTHERS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], list[int] | None]] = {
    "centred": (lambda x, w: convolved(x, w, padding=1), [(CHANNELS, 1, 3)], [2, 2]),
    "dilated": (
        lambda x, w: convolved(x, w, padding=4, dilation=2)[:, : x.shape[1]],
        [(CHANNELS, 1, 3)],
        [4, 4],
    ),
    "mixing channels": (lambda x, w: convolved(x, w, padding=3)[:, :-3], [(CHANNELS, CHANNELS, 4)], [3, 3]),
    "both ways": (both_ways, [(CHANNELS, 1, 3)], None),
    "wanted whole": (wanted_whole, [KERNEL], None),
    "cut twice": (cut_twice, [KERNEL], None),
    "its tail is used": (tail_is_used, [KERNEL], None),
    "padded by one": (padded_by_one, [KERNEL], None),
    "of padding": (of_padding, [KERNEL], None),
    "token shift": (lambda x, w: x + w * F.pad(x, (0, 0, 1, -1)), [(CHANNELS,)], [1, 1]),
    "token shift by cat": (
        lambda x, w: x + w * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1),
        [(CHANNELS,)],
        [1, 1],
    ),
    "one entry": (lambda x, w: x * (x[:, -1:] @ w) + x[:, 2].unsqueeze(1), [(CHANNELS, CHANNELS)], []),
    "many entries": (lambda x: sum((x * x[:, t, None].sin() for t in range(5)), x), [], None),
    "cumulative sum": (lambda x: x.cumsum(1) / 10, [], [1, 1]),
    "cumulative sum from the end": (lambda x: x.flip(1).cumsum(1).flip(1) / 10, [], [1, 1]),
}


@pytest.mark.parametrize("length", each_change([13, 16, 6], [13]))
@pytest.mark.parametrize("name", OTHERS)
def test_neighbours(name: str, length: int) -> None:
    body, shapes, tokens = OTHERS[name]
    torch.manual_seed(0)
    model = Model(Other(body, *shapes)).double()
    inputs = {"ids": torch.randint(11, (2, length))}
    expected, joint = eager(model, inputs), capture(model, inputs)
    for ranks in (2, 3, 4):
        error = expected.error(*joint.run(ranks, nan_padding=length % ranks != 0))
        assert error <= 1e-9, f"P={ranks}: {error:.1e}"
    if tokens is not None and length == 16:
        assert halos(joint, 2) == tokens


class Speech(nn.Module):
    """As Whisper's encoder begins: a convolution, one of stride two, attention of all to all."""

    def __init__(self, kernel: int, padding: int):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1)
        self.second = nn.Conv1d(CHANNELS, CHANNELS, kernel, stride=2, padding=padding)
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.second(F.gelu(self.first(x.transpose(1, 2))))).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).square().mean()


@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (2, 0), (4, 1)])
@pytest.mark.parametrize("length", each_change([12, 13, 23], [23]))
def test_strides(length: int, kernel: int, padding: int) -> None:
    """Nothing is gathered where the stride divides the blocks, and all is right where it does not."""
    model = Speech(kernel, padding).double()
    inputs = {"x": torch.randn(2, length, CHANNELS, dtype=torch.float64)}
    expected, joint = eager(model, inputs), capture(model, inputs)
    for ranks in RANKS:
        _, sharded = joint.shard(ranks)
        assert not sharded.gathers or -(-length // ranks) % 2
        assert expected.error(*joint.run(ranks, nan_padding=True)) <= 1e-9


def test_through_inductor() -> None:
    torch.manual_seed(0)
    model = Model(nn.Sequential(Sliced(4), Padded(3), Summed(2))).double()
    inputs = {"ids": torch.randint(11, (2, 13))}
    expected = eager(model, inputs)
    loss = torch.compile(model, backend=simulated(3, on_gather="error"))(**inputs)
    loss.backward()
    assert expected.error(loss.detach(), left_behind(model, inputs)) <= 1e-9
