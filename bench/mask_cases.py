"""Softmax attention under each kind of mask, as a textbook writes it: q, k, v in, o out, B1 H2 D64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bench.cases import CASES, Case

__all__ = ["MASKS", "PREFIX"]

PREFIX = "mask: "
"""Before a mask's name in :data:`bench.cases.CASES`."""

Scores = Callable[[Tensor, Tensor], Tensor]
MASKS: dict[str, Scores] = {}
"""What becomes of scores ``[1, 2, T, T]``, given a number of each token ``[1, T]`` that never falls."""


def mask(name: str) -> Callable[[Scores], Scores]:
    def register(function: Scores) -> Scores:
        MASKS[name] = function
        return function

    return register


def _places(scores: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.arange(scores.shape[-1])
    return at[:, None], at[None, :]


def _hidden(scores: Tensor, hidden: Tensor) -> Tensor:
    return scores.masked_fill(hidden, -math.inf)


@mask("causal")
def causal(scores: Tensor, ids: Tensor) -> Tensor:
    i, j = _places(scores)
    return _hidden(scores, j > i)


@mask("window of 512")
def window(scores: Tensor, ids: Tensor) -> Tensor:
    i, j = _places(scores)
    return _hidden(scores, (j > i) | (i - j >= 512))


@mask("ALiBi")
def alibi(scores: Tensor, ids: Tensor) -> Tensor:
    i, j = _places(scores)
    slopes = torch.tensor([2**-4, 2**-8])[:, None, None]
    return _hidden(scores - slopes * (i - j).abs(), j > i)


@mask("documents")
def documents(scores: Tensor, ids: Tensor) -> Tensor:
    i, j = _places(scores)
    return _hidden(scores, (j > i) | (ids[:, None, :, None] != ids[:, None, None, :]))


@mask("prefix")
def prefix(scores: Tensor, ids: Tensor) -> Tensor:
    """The first document is the prompt."""
    i, j = _places(scores)
    answer = (ids > 0)[:, None]
    return _hidden(scores, (j > i) & (answer[:, :, None, :] | answer[..., None]))


@mask("padding")
def padding(scores: Tensor, ids: Tensor) -> Tensor:
    """The last document is padding."""
    i, j = _places(scores)
    return _hidden(scores, (j > i) | (ids == ids[:, -1:])[:, None, None, :])


@mask("soft cap")
def soft_cap(scores: Tensor, ids: Tensor) -> Tensor:
    return causal(30 * torch.tanh(scores / 30), ids)


class Masked(nn.Module):
    """o = softmax(mask(q k^T / sqrt(D))) v, for q, k, v [B, H, T, D]."""

    def __init__(self, scores: Scores) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        scores = self.scores(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), ids)
        return scores.softmax(-1) @ v


def case(scores: Scores, length: int, dtype: torch.dtype = torch.float32) -> Case:
    """One kind; eight documents of equal length."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, direction = (torch.randn(1, 2, length, 64, generator=generator).to(dtype) for _ in range(4))
    leaves = {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_()}
    inputs = leaves | {"ids": (torch.arange(length) * 8 // length)[None]}
    # Scores, masked ones and their softmax; backward: that and two gradients.
    square = 2 * length**2
    return Case(Masked(scores), inputs, direction, leaves, (3 * square, 4 * square))


CASES.update({PREFIX + name: partial(case, scores) for name, scores in MASKS.items()})
