"""Short convolutions along the sequence: sharded by a halo of kernel - 1 tokens, once in each direction."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.proof import Eager, Joint, capture, eager

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


FORMS = {"sliced": Sliced, "padded": Padded}


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
@pytest.mark.parametrize("length", [12, 13, 5, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("form", FORMS)
def test_a_causal_convolution(form: str, kernel: int, length: int) -> None:
    expected, joint = case(form, kernel, length)
    for ranks in RANKS:
        error = expected.error(*joint.run(ranks, nan_padding=length % ranks != 0))
        assert error <= 1e-9, f"P={ranks}: {error:.1e}"
        if ranks > 1 and kernel > 1:
            assert halos(joint, ranks) == [min(kernel - 1, -(-length // ranks))] * 2
