"""Code that views the sequence as chunks: ranks get whole chunks, so that the view moves nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.proof import capture, eager
from tests.releases import each_change

CHUNK, SIZE = 4, 8


class Chunked(nn.Module):
    """Tokens mix within their chunk, and chunk means within the sequence, before causal softmax attention."""

    def __init__(self, across: bool) -> None:
        super().__init__()
        self.embedding, self.across = nn.Embedding(11, SIZE), across
        self.mix = nn.Parameter(torch.randn(CHUNK, CHUNK))
        self.query, self.value, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 11)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        batch, length = ids.shape
        x = self.embedding(ids)
        chunks = -(-length // CHUNK)
        x = F.pad(x, (0, 0, 0, chunks * CHUNK - length)).view(batch, chunks, CHUNK, SIZE)
        x = torch.einsum("ij,bnjd->bnid", self.mix, x)
        if self.across:
            x = x + x.mean(2, keepdim=True).cumsum(1)
        x = x.reshape(batch, -1, SIZE)[:, :length]
        q, v = self.query(x)[:, None], self.value(x)[:, None]
        x = x + F.scaled_dot_product_attention(q, q, v, is_causal=True)[:, 0]
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("length", each_change([96, 97, 5], [97]))
@pytest.mark.parametrize("across", [False, True])
def test_a_view_into_chunks_moves_nothing(length: int, across: bool) -> None:
    torch.manual_seed(0)
    model = Chunked(across).double()
    ids = torch.randint(11, (2, length), generator=torch.Generator().manual_seed(0))
    inputs = {"ids": ids, "labels": ids}
    expected, joint = eager(model, inputs), capture(model, inputs)
    for ranks in (2, 3, 5, 8):
        local, sharded = joint.shard(ranks)
        gathers = sum("all_gather" in str(n.target) for n in local.graph.nodes)
        assert expected.error(*joint.run(ranks)) <= 1e-9
        if -(-length // ranks) >= CHUNK:
            # Keys and values once; a carry for the sum over chunks, each way.
            assert gathers == 1 + 2 * across and not sharded.gathers, ranks


def test_chunks_that_are_too_long_are_gathered() -> None:
    """A rank would get more than twice its tokens, the last ones none."""
    torch.manual_seed(0)
    model = Chunked(False).double()
    ids = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
    inputs = {"ids": ids, "labels": ids}
    expected, joint = eager(model, inputs), capture(model, inputs)
    _, sharded = joint.shard(8)
    blocks = {m.block for marks in sharded.plan.marks.values() for m in marks if m.length == 8}
    assert blocks == {1}
    assert expected.error(*joint.run(8)) <= 1e-9
