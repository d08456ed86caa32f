"""Recognition of packed documents and of chunks: an equation between a row's token and a key's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recognition import INF, B, H, T, future, qkv, see, spelling
from torch import Tensor

FOUND: dict = {}
LEFT: dict = {}
MIN = torch.finfo(torch.float64).min


def of_tokens() -> Tensor:
    """Packed documents, [B, T]."""
    return torch.tensor([[0, 0, 0, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3, 5]])


def restarting() -> Tensor:
    """Positions that start anew in each of them."""
    return torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 0]])


def same(ids: Tensor) -> Tensor:
    return (ids[:, :, None] == ids[:, None, :])[:, None]


@spelling(FOUND, "causal and documents")
def documents(q, k, v, ids):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same(ids) & ~future())


@spelling(FOUND, "documents")
def documents_both_ways(q, k, v, ids):
    return (q @ k.mT).masked_fill(~same(ids), -INF).softmax(-1) @ v


@spelling(FOUND, "causal and documents")
def documents_in_two_steps(q, k, v, ids):
    scores = (q @ k.mT).masked_fill(future(), MIN)
    return scores.masked_fill(ids[:, None, None, :] != ids[:, None, :, None], MIN).softmax(-1) @ v


@spelling(FOUND, "causal and documents")
def documents_as_a_bias(q, k, v, ids):
    keep = same(ids) & ~future()
    return F.softmax(q @ k.mT + torch.where(keep, torch.tensor(0.0, dtype=q.dtype), MIN), dim=-1) @ v


@spelling(FOUND, "causal window of 3 and documents")
def documents_of_positions(q, k, v, _, positions):
    """As transformers finds them: a document begins where a position does not follow on."""
    ids = numbered(positions)
    rows, keys = torch.arange(T)[None, None, :, None], torch.arange(T)[None, None, None, :]
    batch = torch.arange(B)[:, None, None, None]
    mask = (keys > rows - 3) & (keys <= rows) & (ids[batch, rows] == ids[batch, keys])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def numbered(positions: Tensor, step: int = 1) -> Tensor:
    """A document begins where a position does not follow on."""
    return (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != step).cumsum(-1)


@spelling(FOUND, "causal window of 2 and documents")
def order_of_positions(q, k, v, _, positions):
    """Inside of a document, positions differ as places do."""
    rows, keys = positions[:, None, :, None], positions[:, None, None, :]
    mask = same(numbered(positions)) & (keys <= rows) & (keys > rows - 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(FOUND, "causal and documents")
def documents_of_ends(q, k, v, *_):
    """Of one number for all sequences, from the ends of the documents."""
    ids = torch.bucketize(torch.arange(T), torch.tensor([2, 5, 7]), right=True)
    mask = (ids[:, None] == ids[None, :]) & ~future()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(FOUND, "causal and documents")
def chunks(q, k, v, *_):
    i = torch.arange(T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(i[:, None] // 3 == i // 3) & ~future())


@spelling(FOUND, "causal and documents")
def chunks_behind_padding(q, k, v, *_):
    """As transformers has them: chunks are counted from each sequence's first token."""
    left = torch.tensor([0, 2])
    rows, keys = torch.arange(T)[None, None, :, None], torch.arange(T)[None, None, None, :]
    start = left[torch.arange(B)[:, None, None, None]]
    mask = ((rows - start) // 3 == (keys - start) // 3) & (keys <= rows)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(FOUND, "causal and documents and padding")
def documents_and_padding(q, k, v, ids):
    keep = torch.tensor([[True] * 5 + [False] * 2, [False] + [True] * 6])
    mask = keep[:, None, None, :] & same(ids) & ~future()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("name", FOUND)
def test_found_and_equal(name: str) -> None:
    fn, (mask,) = FOUND[name]
    given = [*qkv(), of_tokens(), restarting()]
    seen = see(fn, *given[: max(3, fn.__code__.co_argcount)])
    assert seen.rewritten == [("softmax", mask)], seen.sites
    (gm,) = seen.graphs
    (call,) = [n for n in gm.graph.nodes if "softmax_attention" in str(n.target)]
    ids = call.args[9].meta["example_value"]
    assert ids.shape in ((B, T), (1, T)) and not ids.dtype.is_floating_point
    assert ("padding" in mask) == (call.args[3] is not None)
    gm.graph.eliminate_dead_code()
    shapes = [getattr(n.meta.get("example_value"), "shape", ()) for n in gm.graph.nodes]
    assert not [x for x in shapes if tuple(x[-2:]) == (T, T)], "a mask of rows x keys is left"


# ---- look-alikes


@spelling(LEFT, "general")
def not_itself(q, k, v, ids):
    """A row of a document of one sees none: no structure tells what becomes of it."""
    i = torch.arange(T)
    mask = same(ids) & (i < i[:, None])
    return (q @ k.mT).masked_fill(~mask, MIN).softmax(-1) @ v


@spelling(LEFT, "general")
def another_document(q, k, v, ids):
    return (q @ k.mT).masked_fill(same(ids), -1e9).softmax(-1) @ v


@spelling(LEFT, "general")
def the_document_before(q, k, v, ids):
    mask = (ids[:, :, None] == ids[:, None, :] + 1)[:, None] | ~future()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(LEFT, "general")
def the_next_number(q, k, v, ids):
    keep = ids[:, :, None] == ids[:, None, :] + 1
    return (q @ k.mT).masked_fill(~keep[:, None], -1e9).softmax(-1) @ v


@spelling(LEFT, "general")
def of_two_tables(q, k, v, ids, positions):
    keep = ids[:, :, None] == positions[:, None, :]
    return (q @ k.mT).masked_fill(~keep[:, None], -1e9).softmax(-1) @ v


@spelling(LEFT, "general")
def order_of_other_positions(q, k, v, ids, positions):
    """Those of another tensor than the one that numbers the documents."""
    mask = same(numbered(positions)) & (ids[:, None, None, :] <= ids[:, None, :, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(LEFT, "general")
def steps_of_two(q, k, v, ids, positions):
    mask = same(numbered(positions, 2)) & (positions[:, None, None, :] <= positions[:, None, :, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(LEFT, "general")
def order_of_positions_alone(q, k, v, ids, positions):
    mask = positions[:, None, None, :] <= positions[:, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(LEFT, "general")
def later_documents(q, k, v, ids):
    keep = (ids[:, :, None] >= ids[:, None, :])[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


@spelling(LEFT, "general")
def two_equations(q, k, v, ids, positions):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same(ids) & same(positions // 2))


@spelling(LEFT, None)
def of_each_head(q, k, v, *_):
    ids = torch.arange(H)[:, None] * torch.tensor([0, 0, 1, 1, 2, 2, 3])
    keep = ids[None, :, :, None] == ids[None, :, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


@pytest.mark.parametrize("name", LEFT)
def test_look_alikes(name: str) -> None:
    """Data, or left; and in any case equal."""
    fn, (mask,) = LEFT[name]
    given = [*qkv(), of_tokens(), restarting()]
    seen = see(fn, *given[: max(3, fn.__code__.co_argcount)])
    assert seen.rewritten == ([] if mask is None else [("softmax", mask)]), seen.sites
