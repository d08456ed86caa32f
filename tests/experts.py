"""Mixtures of experts as people spell them, and look-alikes in which a place among all tokens counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.third_party import load

__all__ = ["APART", "COUNTS", "LOCAL", "Experts", "inputs_of"]

load("transformers.integrations.moe")  # for its operators

VOCAB, HIDDEN, EXPERTS = 19, 6, 5


class Experts(nn.Module):
    """Tokens, a router, ``spelling``, a residual, and a loss. ``top`` experts have each token."""

    def __init__(self, spelling: Callable[..., Tensor], top: int = 2, experts: int = EXPERTS) -> None:
        super().__init__()
        self.spelling, self.top, self.experts = spelling, top, experts
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.router = nn.Linear(HIDDEN, experts)
        self.weight = nn.Parameter(torch.randn(experts, HIDDEN, HIDDEN) / 2)
        self.bias = nn.Parameter(torch.randn(experts, HIDDEN) / 2)
        self.register_buffer("load", torch.zeros(experts, dtype=torch.long))
        self.register_buffer("balance", torch.zeros(experts))

    def forward(self, input_ids: Tensor) -> Tensor:
        """The loss."""
        x = self.embedding(input_ids)
        tokens = x.flatten(0, 1)
        scores = self.router(tokens).softmax(-1)
        _, ids = (scores + self.balance).topk(self.top, -1)
        y = self.spelling(self, tokens, scores.gather(1, ids), ids)
        out = x + y.view_as(x)
        return (out.square() * torch.arange(1, x.shape[1] + 1).to(x)[:, None]).mean()


def inputs_of(length: int, batch: int = 2) -> dict[str, Any]:
    """Tokens."""
    generator = torch.Generator().manual_seed(length)
    return {"input_ids": torch.randint(VOCAB, (batch, length), generator=generator)}


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Products by groups of rows; transformers' own, which has a float64."""
    return torch.ops.transformers.grouped_mm_fallback(x, weight, ends)


# ---- what counts the tokens of an expert, and where its group ends ----------------------------------------
def _histogram(ids: Tensor, experts: int) -> Tensor:
    return torch.histc(ids.float(), bins=experts, min=0, max=experts - 1)


def _added(ids: Tensor, experts: int) -> Tensor:
    return torch.zeros(experts, dtype=torch.long).scatter_add(0, ids, torch.ones_like(ids))


def _put(ids: Tensor, experts: int) -> Tensor:
    ones = torch.ones(ids.shape[0], dtype=torch.long)
    return torch.zeros(experts, dtype=torch.long).index_put((ids,), ones, accumulate=True)


def _compared(ids: Tensor, experts: int) -> Tensor:
    return (ids[:, None] == torch.arange(experts)).sum(0)


def _one_hot(ids: Tensor, experts: int) -> Tensor:
    return F.one_hot(ids, experts).sum(0)


COUNTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "histc": _histogram,
    "scatter_add": _added,
    "index_put": _put,
    "compared": _compared,
    "one_hot": _one_hot,
}


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


# ---- what stays on each rank -------------------------------------------------------------------------------
LOCAL: dict[str, Callable[..., Tensor]] = {}
APART: dict[str, Callable[..., Tensor]] = {}


def _local(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    LOCAL[function.__name__.strip("_")] = function
    return function


def _apart(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    APART[function.__name__.strip("_")] = function
    return function


@_local
def _sorted_and_put_back(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """As transformers spells it."""
    experts, order = torch.sort(ids.reshape(-1))
    rows, weights = x[order // m.top], w.reshape(-1)[order]
    ends = torch.cumsum(_histogram(experts, m.experts), 0, dtype=torch.int32)
    y = F.silu(grouped(rows, m.weight, ends)) + m.bias[experts]
    y = grouped(y, m.weight.transpose(1, 2), ends) * weights[:, None]
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0])
    return y[places].view(-1, m.top, x.shape[1]).sum(1)


@_local
def _added_to_tokens(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """The numbers of the tokens are sorted; index_add brings the rows back."""
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    tokens = torch.arange(x.shape[0]).repeat_interleave(m.top)[order]
    y = grouped(x.index_select(0, tokens), m.weight, _ends(_one_hot(flat, m.experts)))
    y = (y + m.bias[flat[order]]).tanh() * w.reshape(-1).gather(0, order)[:, None]
    return torch.zeros_like(x).index_add(0, tokens, y)


@_local
def _gathered_and_scattered(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """gather and scatter_add with the index as wide as a row."""
    flat = ids.reshape(-1)
    order = flat.argsort()
    wide = (order // m.top)[:, None].expand(-1, x.shape[1])
    y = grouped(x.gather(0, wide), m.weight, _ends(_added(flat, m.experts)))
    y = F.layer_norm(y, y.shape[1:]) * w.reshape(-1)[order].unsqueeze(1)
    return torch.zeros_like(x).scatter_add(0, wide, y)


@_local
def _descending(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """The last expert first; each row has its own matrix, and the inverse is a sort of the order."""
    experts, order = ids.reshape(-1).sort(descending=True)
    rows = x.repeat_interleave(m.top, 0)[order]
    y = torch.bmm(m.weight[experts], rows[:, :, None]).squeeze(-1) + m.bias[experts]
    y = y * w.reshape(-1)[order, None]
    return y[order.argsort()].unflatten(0, (-1, m.top)).sum(1)


@_local
def _written_back(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """Rows are written, not added, to where they were."""
    flat = ids.reshape(-1)
    order = torch.argsort(flat)
    y = grouped(x[order // m.top], m.weight, _ends(_compared(flat, m.experts))).relu()
    back = torch.zeros(order.shape[0], x.shape[1], dtype=x.dtype)
    back[order] = y
    return (back.view(-1, m.top, x.shape[1]) * w[..., None]).sum(1)


@_local
def _with_counters(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """A counter of each expert's load, and a bias that follows it, count all tokens."""
    counts = _put(ids.reshape(-1), m.experts)
    m.load += counts
    share = counts.to(x.dtype)
    m.balance += 0.01 * (share.mean() - share).sign()
    return _sorted_and_put_back(m, x, w, ids) * share.softmax(0)[0]


@_local
def _skipped(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """The last expert does nothing: its tokens go to the first, without weight."""
    skip = ids == m.experts - 1
    return _sorted_and_put_back(m, x, w.masked_fill(skip, 0), ids.masked_fill(skip, 0))


@_local
def _columns(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """Slots stand k by k: all first choices, then all second ones."""
    flat = ids.t().reshape(-1)
    order = flat.argsort()
    rows = x.expand(m.top, *x.shape).reshape(-1, x.shape[1])
    y = grouped(rows[order], m.weight, _ends(_compared(flat, m.experts)))
    y = y[torch.argsort(order)] * w.t().reshape(-1)[:, None]
    return y.view(m.top, -1, x.shape[1]).sum(0)


# ---- where a place among all tokens counts -----------------------------------------------------------------
@_apart
def _capacity(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """An expert has only its first few tokens."""
    experts, order = ids.reshape(-1).sort(stable=True)
    counts = _added(ids.reshape(-1), m.experts)
    before = counts.cumsum(0) - counts
    place = torch.arange(order.shape[0]) - before[experts]
    y = grouped(x[order // m.top], m.weight, _ends(counts)) * w.reshape(-1)[order][:, None]
    y = torch.where((place < 4)[:, None], y, 0.0)
    return torch.zeros_like(x).index_add(0, order // m.top, y)


@_apart
def _first_slots(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """What is behind a place in the order is dropped."""
    order = ids.reshape(-1).argsort(stable=True)
    kept = order[: order.shape[0] // 2]
    y = x[kept // m.top].tanh() * w.reshape(-1)[kept][:, None]
    return torch.zeros_like(x).index_add(0, kept // m.top, y)


@_apart
def _summed_along(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """A running sum along the order."""
    order = ids.reshape(-1).argsort(stable=True)
    y = x[order // m.top].cumsum(0)
    return torch.zeros_like(x).index_add(0, order // m.top, y)


@_apart
def _numbered(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """Places, and where tokens are put, are read as numbers."""
    order = ids.reshape(-1).argsort(stable=True)
    places = order.argsort()
    y = x[order // m.top] * torch.arange(order.shape[0])[:, None] + order[:, None]
    return torch.zeros_like(x).index_add(0, order // m.top, y) * places.view(-1, m.top).sum(1, keepdim=True)


@_apart
def _other_ids(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """The groups are those of other ids than the sort's."""
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    other = (flat + 1) % m.experts
    y = grouped(x[order // m.top], m.weight, _ends(_added(other, m.experts)))
    return torch.zeros_like(x).index_add(0, order // m.top, y)


@_apart
def _below_zero(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """Some ids are below zero: they are sorted first and not counted."""
    flat = torch.where(w.reshape(-1) > w.mean(), ids.reshape(-1), -1)
    experts, order = flat.sort(stable=True)
    ends = torch.cumsum(_histogram(experts, m.experts), 0, dtype=torch.int32)
    y = grouped(x[order // m.top], m.weight, ends)
    return torch.zeros_like(x).index_add(0, order // m.top, y)


@_apart
def _shifted_ends(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """Groups end one row too early."""
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    y = grouped(x[order // m.top], m.weight, _ends(_added(flat, m.experts)).sub(1).clamp(min=0))
    return torch.zeros_like(x).index_add(0, order // m.top, y)


@_apart
def _by_score(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """Experts choose tokens: a sort of scores along all of them."""
    order = w[:, 0].argsort(stable=True)
    y = x[order].cumsum(0)
    return torch.zeros_like(x).index_add(0, order, y)


@_apart
def _wrong_share(m: Experts, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """Slots are taken for tokens by another share than their own."""
    order = ids.reshape(-1).argsort(stable=True)
    y = x[order // (m.top + 1)] * w.reshape(-1)[order][:, None]
    return torch.zeros_like(x).index_add(0, order // m.top, y)
