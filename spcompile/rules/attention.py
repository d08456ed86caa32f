"""The attention operators: what they need where, and which strategy carries it across ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import spcompile.attention  # noqa: F401  (registers the operators)
from spcompile.collectives import Sequence
from spcompile.placement import Partial, Placement, Replicate, Shard
from spcompile.rules.base import Call, Context, Emit, Side, Split

__all__ = ["FORWARD", "RULES"]

ops = torch.ops.spcompile

FORWARD = (ops.softmax_attention.default, ops.linear_attention.default)
"""The forward operators; operands 0 and 1 are queries and keys, [B, H, T, K]."""


def _is_sequence(shard: Shard) -> bool:
    return shard.dim == 2 and shard.start == 0 and shard.outer * shard.inner == 1


@dataclass
class LinearAttention:
    """linear_attention and its backward: every operand is sharded alike, only memory states cross ranks."""

    call: Call
    linear: tuple[frozenset[int], ...] = ()

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`. Batch and heads pass; the strategy does the sequence."""
        if shard.dim == 3 or (shard.dim == 2 and not _is_sequence(shard)):
            return None
        inputs, outputs = (shard,) * len(self.call.operands), (shard,) * len(self.call.outputs)
        return Split(inputs, outputs, (None,) * len(inputs), self._emit(shard if shard.dim == 2 else None))

    def whole_emit(self) -> Emit:
        """The lowering for one rank: no collective."""
        return self._emit(None)

    def _emit(self, shard: Shard | None) -> Emit:
        tail = self.call.args[len(self.call.operands) :]
        causal, scale = tail
        backward = self.call.op is ops.linear_attention_backward.default

        def emit(context: Context, operands: list[Tensor]) -> Any:
            sequence = None if shard is None else Sequence(context.group, shard.block, shard.length)
            options: dict[str, Any] = {"causal": causal, "scale": scale, "sequence": sequence}
            key = ("carry", *map(id, operands[-2:]), causal, sequence)
            if not backward:
                out, carry = context.linear.linear_forward(*operands, **options)
                context.stash[key] = context.keep(carry)
                return out
            if key not in context.stash:
                _, context.stash[key] = context.linear.linear_forward(*operands[1:], **options)
            grad, q, k, v = operands
            return context.linear.linear_backward(grad, q, k, v, context.stash[key], **options)

        return emit


@dataclass
class SoftmaxAttention:
    """softmax_attention and its backward: queries stay, keys and values are gathered by the strategy.

    Keys of another length than the queries (cross attention) are asked for whole; their gradients are then
    partial.
    """

    call: Call
    linear: tuple[frozenset[int], ...] = ()

    @property
    def backward(self) -> bool:
        """Whether this is the backward operator, whose first operand is the gradient of the output."""
        return self.call.op is ops.softmax_attention_backward.default

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        if shard.dim == 3 or (shard.dim == 2 and not _is_sequence(shard)):
            return None
        roles = self._roles()
        first = 1 if self.backward else 0
        alike = self.call.operands[first].shape[2] == self.call.operands[first + 1].shape[2]
        role = roles[index] if side == "in" else "q" if not self.backward or index == 0 else "kv"
        if shard.dim < 2:
            return self._by_batch(shard, roles) if role != "mask" else None
        if role == "mask" or (role == "kv" and not alike):
            return None
        keys: Placement = shard if alike else Replicate()
        inputs = tuple(self._place(r, x, shard, keys) for r, x in zip(roles, self.call.operands, strict=True))
        grads: Placement = shard if alike else Partial("sum")
        outputs = (shard, grads, grads) if self.backward else (shard, shard)
        return Split(inputs, outputs, (None,) * len(inputs), self._emit(shard, alike))

    def whole_emit(self) -> Emit:
        """The lowering for one rank: no collective."""
        return self._emit(None, False)

    def _roles(self) -> list[str]:
        mask = ["mask"] if isinstance(self.call.args[4 if self.backward else 3], Tensor) else []
        return ["q", "q", "kv", "kv", *mask, "q", "q"] if self.backward else ["q", "kv", "kv", *mask]

    def _place(self, role: str, x: Tensor, shard: Shard, keys: Placement) -> Placement:
        if role != "mask":
            return shard if role == "q" else keys
        rows = x.dim() - 2
        return shard.at(rows) if rows >= 0 and x.shape[rows] != 1 else Replicate()

    def _by_batch(self, shard: Shard, roles: list[str]) -> Split | None:
        shared = {x.shape[shard.dim] for x, r in zip(self.call.operands, roles, strict=True) if r != "mask"}
        if len(shared) > 1 or "mask" in roles:
            return None  # grouped heads, or a mask that may or may not have the dim
        outputs = (shard,) * len(self.call.outputs)
        return Split((shard,) * len(roles), outputs, (None,) * len(roles), self._emit(None, False))

    def _emit(self, shard: Shard | None, alike: bool) -> Emit:
        causal, scale = self.call.args[-2:]
        roles = self._roles()

        def emit(context: Context, operands: list[Tensor]) -> Any:
            queries = None if shard is None else Sequence(context.group, shard.block, shard.length)
            options: dict[str, Any] = {"causal": causal, "scale": scale, "q_sequence": queries}
            options["kv_sequence"] = queries if alike else None
            mask = operands[roles.index("mask")] if "mask" in roles else None
            plain = [x for x, r in zip(operands, roles, strict=True) if r != "mask"]
            keys = plain[2:4] if self.backward else plain[1:3]
            key = ("kv", *map(id, keys), options["kv_sequence"])
            if not self.backward:
                q, k, v = plain
                out, lse, gathered = context.softmax.softmax_forward(q, k, v, mask, **options)
                context.stash[key] = context.gathered(gathered)
                return out, lse
            grad, q, k, v, out, lse = plain
            kv = context.stash.get(key)
            return context.softmax.softmax_backward(grad, q, k, v, mask, out, lse, kv=kv, **options)

        return emit


RULES: dict[Any, type[LinearAttention] | type[SoftmaxAttention]] = {
    ops.linear_attention.default: LinearAttention,
    ops.linear_attention_backward.default: LinearAttention,
    ops.softmax_attention.default: SoftmaxAttention,
    ops.softmax_attention_backward.default: SoftmaxAttention,
}
