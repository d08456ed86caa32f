"""What the benchmarks measure: a module, its inputs, and a reference that needs no T x T memory.

Letters: B batch, H heads, T tokens, D head size; a chunk is the tokens that the reference takes at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import models
from models import linear_llama3

Results = dict[str, Tensor]


def chunked_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, normaliser: bool = False, eps: float = 1e-6
) -> Tensor:
    """What `models.linear_llama3.causal_linear_attention` computes, a chunk at a time with a carried state.

    o_c = tril(q_c k_c^T) v_c + q_c S,  S = sum of k^T v over the chunks before, both over sqrt(D).
    """
    q = q / math.sqrt(q.shape[-1])
    if normaliser:  # the row sum of scores is what a value of 1 would give
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    state = q.new_zeros(*q.shape[:-2], q.shape[-1], v.shape[-1])
    out = []
    for q_c, k_c, v_c in zip(q.split(512, -2), k.split(512, -2), v.split(512, -2)):
        out.append((q_c @ k_c.transpose(-2, -1)).tril() @ v_c + q_c @ state)
        state = state + k_c.transpose(-2, -1) @ v_c
    result = torch.cat(out, -2)
    return result[..., :-1] / (result[..., -1:] + eps) if normaliser else result


class TextbookLinearAttention(nn.Module):
    """o = tril(q k^T / sqrt(D)) v, for q, k, v [B, H, T, D]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_llama3.causal_linear_attention(q, k, v, normaliser=False)


@dataclass(frozen=True)
class Case:
    """One thing to run.

    Args:
        module: to run on `inputs`, keyword arguments.
        direction: the gradient of the output that a backward starts from.
        leaves: the tensors whose gradients a backward yields, by name.
        square_elements: elements of eager's T x T tensors at their most, (forward, forward+backward).
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    direction: Tensor
    leaves: dict[str, Tensor]
    square_elements: tuple[int, int]

    def run(self, function: Callable[..., Tensor], backward: bool) -> Tensor:
        """Call `function`, the module or its compiled form; with `backward`, also fill the gradients."""
        for leaf in self.leaves.values():
            leaf.grad = None
        with torch.set_grad_enabled(backward):
            out = function(**self.inputs)
        if backward:
            out.backward(self.direction.to(out.dtype))
        return out

    def results(self, function: Callable[..., Tensor], backward: bool) -> Results:
        out = {"output": self.run(function, backward).detach()}
        if backward:
            out |= {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}
        return out


def layer(length: int, dtype: torch.dtype = torch.float32) -> Case:
    """A causal linear attention layer as in a textbook, B1 H8 D64: q, k, v in, o out."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, direction = (torch.randn(1, 8, length, 64, generator=generator).to(dtype) for _ in range(4))
    leaves = {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_()}
    # Scores and their masked copy; backward: the masked copy, its gradient, the scores' gradient.
    square = 8 * length**2
    return Case(TextbookLinearAttention(), leaves, direction, leaves, (2 * square, 3 * square))


def model(length: int, dtype: torch.dtype = torch.float32, **overrides: Any) -> Case:
    """The tiny Linear-Llama3 in the pattern LLLN: ids in, the loss out."""
    torch.manual_seed(0)
    module = models.get("linear_llama3:tiny", **overrides)()
    inputs = module.example_inputs(length)
    module = module.to(dtype)
    # Each linear layer keeps its masked scores for the backward; one layer at a time holds two more.
    square = module.config.heads * length**2
    kept = module.config.kinds.count("L")
    leaves = dict(module.named_parameters())
    return Case(module, inputs, torch.ones(()), leaves, (2 * square, (kept + 2) * square))


CASES: dict[str, Callable[..., Case]] = {"layer": layer, "model": model}


def reference(name: str, length: int, backward: bool) -> Results:
    """The case in float64, chunked: memory linear in `length`, for lengths at which eager does not fit."""
    case = CASES[name](length, dtype=torch.float64)
    with mock.patch.object(linear_llama3, "causal_linear_attention", chunked_linear_attention):
        return case.results(case.module, backward)


def error(got: Results, want: Results) -> float:
    """The largest error of all results, each relative to its own largest entry.

    A gradient that is 0 in truth has no relative error: its size counts as at least 1e-6 of the largest.
    """
    assert got.keys() == want.keys(), f"{got.keys() ^ want.keys()}"
    sizes = {name: value.abs().max().item() for name, value in want.items()}
    least = 1e-6 * max(sizes.values())
    worst = 0.0
    for name, value in want.items():
        difference = (got[name].double() - value.double()).abs().max().item()
        worst = max(worst, difference / max(sizes[name], least)) if difference == difference else math.inf
    return worst
