"""Where the sequence is known from, and how many of its tokens a rank gets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from spcompile.passes.shard.ports import arrivals
from spcompile.passes.shard.propagate import Plan, Value, propagate
from spcompile.placement import Shard, reshape_shard
from spcompile.rules import attention
from spcompile.rules.convolutions import Convolution
from spcompile.rules.pooling import AveragePool, Unfold
from spcompile.rules.views import Reshape
from spcompile.sizes import ceil_div, hint

__all__ = ["plan_sequences"]

aten = torch.ops.aten
# Entries that a sequence may have more than the tokens, for all of them to have longer blocks.
_FEW = 64


def plan_sequences(graph: fx.Graph, ranks: int, hints: Mapping[str, int]) -> Plan:
    """A placement for every tensor, from all that tells where the sequence is.

    The longest sequence is that of the tokens. What tells of a shorter one may mean the tokens of another
    input (an encoder's), or chunks of the same ones (a scan of their states): it counts where the tokens'
    sequence does not reach.
    """
    seeds = _find_sequences(graph, ranks, hints)
    arrived = arrivals(graph)
    longest = max((s.length for s in (arrived or seeds).values()), default=0, key=hint)
    tokens = {value: seed for value, seed in seeds.items() if seed.length == longest}
    if arrived:  # what comes in parts stays in these parts
        block = next(s.block for s in arrived.values() if s.length == longest)
        tokens = {v: replace(s, block=block) for v, s in tokens.items()}
        tokens |= {v: s for v, s in arrived.items() if (s.length, s.block) == (longest, block)}
    plan = propagate(graph, ranks, tokens)
    rounded = _in_whole_chunks(plan, tokens)
    if rounded != tokens:
        plan = propagate(graph, ranks, rounded)
    elif not arrived and (room := _room(plan, tokens)) != tokens:
        roomy = propagate(graph, ranks, room)
        if _gathering(roomy) < _gathering(plan):
            plan, rounded = roomy, room
    others = {value: seed for value, seed in seeds.items() if value not in plan.marks}
    return propagate(graph, ranks, rounded | others) if others else plan


def _find_sequences(graph: fx.Graph, ranks: int, hints: Mapping[str, int]) -> dict[Value, Shard]:
    """The tensors from which the sequence axis is known.

    They are attention's queries and keys; without any attention, the indices of embeddings. A hint by
    placeholder name overrides both.
    """

    def shard(value: Tensor, dim: int) -> Shard:
        length = value.shape[dim]
        return Shard(dim % value.dim(), length, ceil_div(length, ranks))

    def found(target: Any, position: int, dim: int) -> dict[Value, Shard]:
        seeds: dict[Value, Shard] = {}
        for node in graph.nodes:
            if node.op == "call_function" and node.target is target:
                operand = node.args[position]
                value = operand.meta["val"]
                if value.dim() >= -dim and value.shape[dim] > 1:
                    seeds[(operand, 0)] = shard(value, dim)
        return seeds

    hinted = {
        (node, 0): shard(node.meta["val"], hints[node.name])
        for node in graph.nodes
        if node.op == "placeholder" and node.name in hints
    }
    by_attention: dict[Value, Shard] = {}
    for (target, position), dim in attention.FORWARD.items():
        by_attention |= found(target, position, dim)
    return hinted or by_attention or found(aten.embedding.default, 1, -1)


def _in_whole_chunks(plan: Plan, seeds: Mapping[Value, Shard]) -> dict[Value, Shard]:
    """The seeds with blocks of whole chunks, where the graph views the sequence as chunks, or strides.

    A view of T tokens as [T / c, c] moves nothing if every rank has whole chunks; with blocks of ceil(T / P)
    the sequence would be gathered for it. A rank never gets more than twice the tokens that it would have:
    where chunks are longer than that, they are gathered.
    """
    if not seeds:
        return {}
    tokens = next(iter(seeds.values()))  # all are of one length, in the same blocks
    fitting = {c for c in _chunks(plan, tokens) if _rounded(tokens.block, c) <= 2 * tokens.block}
    block = _rounded(tokens.block, math.lcm(*fitting))
    if block > 2 * tokens.block:
        return dict(seeds)
    return {value: replace(seed, block=block) for value, seed in seeds.items()}


def _room(plan: Plan, seeds: Mapping[Value, Shard]) -> dict[Value, Shard]:
    """The seeds with blocks for what is a few tokens longer, and gathered as the ranks do not hold it.

    The first of two convolutions behind one pad gives the tokens and, before them, what the second one reads
    there.
    """
    found = [
        mark.length
        for node, step in plan.steps.items()
        if step.gathers
        for mark in plan.marks.get((node, 0), ())
        if mark.outer == 1 and not mark.holds_all(plan.ranks)
    ]
    length = next(iter(seeds.values())).length if seeds else 0
    few = [x for x in found if hint(x) <= hint(length) + _FEW]
    if not few:
        return dict(seeds)
    block = ceil_div(max(few, key=hint), plan.ranks)
    return {value: replace(seed, block=block) for value, seed in seeds.items()}


def _gathering(plan: Plan) -> int:
    return sum(bool(step.gathers) for step in plan.steps.values())


def _rounded(block: int, chunk: int) -> int:
    return ceil_div(block, chunk) * chunk


def _chunks(plan: Plan, tokens: Shard) -> Iterator[int]:
    """The lengths in tokens of the chunks as which the sequence is viewed, and of the steps of convolutions
    and means."""
    for step in plan.steps.values():
        if isinstance(step.rule, Convolution | AveragePool | Unfold) and step.call is not None:
            for mark in plan.marks.get(step.operands[0], ()):
                sizes = step.rule.stride_along(mark.dim) * tokens.block, mark.block
                yield Fraction(*map(hint, sizes)).numerator
        if not isinstance(step.rule, Reshape) or step.call is None:
            continue
        (value,), shapes = step.operands, (step.call.operands[0].shape, step.call.outputs[0].shape)
        for mark in plan.marks.get(value, ()):
            chunks = reshape_shard(replace(mark, block=mark.length), *map(tuple, shapes))
            if chunks is not None and chunks.length < mark.length:  # in one block no view cuts it
                sizes = mark.length * tokens.block, chunks.length * mark.block
                yield Fraction(*map(hint, sizes)).numerator
