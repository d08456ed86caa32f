"""The attention operators: what they need where, and which strategy carries it across ranks."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import spcompile.attention  # noqa: F401  (registers the operators)
from spcompile.collectives import Sequence
from spcompile.costs import Sizes
from spcompile.errors import SpcompileError
from spcompile.kernels.linear.kernel import kernel_of
from spcompile.kernels.linear.operands import Operands, Options
from spcompile.kernels.scan import state_dtype
from spcompile.kernels.softmax import operands as softmax
from spcompile.kernels.softmax import rows
from spcompile.placement import Partial, Placement, Replicate, Shard
from spcompile.rules.base import Call, Context, Emit, Side, Split
from spcompile.rules.scans import StateScan
from spcompile.sizes import hint
from spcompile.strategies import linear
from spcompile.strategies.linear_pipelined import slices_of

__all__ = ["FORWARD", "RULES", "edges", "forward_of", "is_operand"]

ops = torch.ops.spcompile

FORWARD = {
    (ops.softmax_attention.default, 0): -2,
    (ops.softmax_attention.default, 1): -2,
    (ops.linear_attention.default, 0): -2,
    (ops.linear_attention.default, 1): -2,
    (ops.affine_scan.default, 1): -3,
    (ops.max_scan.default, 1): -3,
}
"""(operator, argument) -> which dim of it is a sequence: tokens of queries and keys, steps of a scan."""


_MADE_BY_FORWARD = {
    ops.linear_attention_backward.default: (ops.linear_attention.default, 8),
    ops.softmax_attention_backward.default: (ops.softmax_attention.default, 6),
    ops.softmax_attention_relative_backward.default: (ops.softmax_attention.default, 6),
}
# backward operator -> its forward, and the argument of the backward that the forward returned


def forward_of(node: fx.Node) -> fx.Node | None:
    """The forward that an attention operator's node belongs to; itself, if it is one.

    None where there is none in the graph: a backward whose forward lies in another one, or another operator.

    Raises:
        SpcompileError: a backward that is given what no forward returned.
    """
    if node.target not in _MADE_BY_FORWARD:
        return node if node.target in RULES else None
    forward, index = _MADE_BY_FORWARD[node.target]
    made = node.args[index]
    while isinstance(made, fx.Node) and made.target in _SAME:
        made = made.args[0]
    if isinstance(made, fx.Node) and made.op == "placeholder":
        return None
    if not isinstance(made, fx.Node) or made.target is not forward:
        raise SpcompileError(
            f"{node.name} is the backward of an attention, but it is given {made}, which none returned."
            f"\n{(node.meta.get('stack_trace') or '').strip()}"
        )
    return made


_SAME = (operator.getitem, torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def is_operand(argument: Any) -> bool:
    """Whether an argument of an attention operator's node is a tensor, or stands where one could."""
    return argument is None or isinstance(argument, fx.Node)


def _is_sequence(shard: Shard) -> bool:
    return shard.dim == 2 and shard.start == 0 and shard.outer == 1


_OPERANDS = ("q", "k", "v", "log_decay", "beta", "initial_state")


@dataclass
class LinearAttention:
    """linear_attention and its backward: what has tokens is sharded alike, only memory states cross ranks.

    States are whole on every rank, and so is a decay without tokens, whose gradient is a sum over ranks.
    """

    call: Call
    linear: tuple[frozenset[int], ...] = ()

    @property
    def backward(self) -> bool:
        """Whether this is the backward operator, whose first operands are gradients of the results."""
        return self.call.op is ops.linear_attention_backward.default

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`. Batch and heads pass; the strategy does the sequence."""
        roles, results = self._roles(), self._results()
        sizes = [x.shape for x in self.call.operands]
        role = (roles if side == "in" else results)[index]
        if not role or shard.dim == 3 or (side == "in" and sizes[index][shard.dim] == 1):
            return None
        if shard.dim < 2:
            if any(s[shard.dim] == 1 for s in sizes):
                return None  # a decay that is broadcast
            alike = [shard if x.dim() == 4 else Replicate() for x in self.call.outputs]
            return Split((shard,) * len(sizes), tuple(alike), (None,) * len(sizes), self._emit(None))
        if not _is_sequence(shard) or role in ("state", "constant"):
            return None
        q, k = (self._arguments()[name].shape[2] for name in ("q", "k"))
        if q != k:
            return self._across(shard, roles, keys=self._of_keys(side, index))
        place: dict[str, Placement] = {"tokens": shard, "state": Replicate(), "": Replicate()}
        inputs = tuple(place.get(r, Replicate()) for r in roles)
        outputs = tuple(place.get(r, Partial("sum")) for r in results)
        return Split(inputs, outputs, (None,) * len(inputs), self._emit(shard))

    def _of_keys(self, side: Side, index: int) -> bool:
        """Whether an operand (a result) has the tokens of keys and values, not those of queries."""
        if side == "out":
            return self.backward and index in (1, 2)
        return [name for name, x in self._arguments().items() if x is not None][index] in ("k", "v")

    def _across(self, shard: Shard, roles: list[str], keys: bool) -> Split:
        """Queries of another length than the keys: either are sharded, the others whole; padding is zero.

        A part of the queries has a term of the gradients of keys, values and state. A part of the keys has a
        term of the state, and so of every output.
        """
        of_keys = [self._of_keys("in", i) for i in range(len(roles))]
        theirs: Placement = Replicate() if keys or not self.backward else Partial("sum")
        place: dict[str, Placement] = {"tokens": Replicate(), "state": Replicate()}
        inputs = [
            shard if role == "tokens" and of == keys else place[role]
            for role, of in zip(roles, of_keys, strict=True)
        ]
        if not keys and self.call.args[1] is not None and self.backward:
            inputs[1] = theirs  # the gradient of the final state
        if self.backward:
            own: tuple[Placement, ...] = (Replicate(), shard, shard) if keys else (shard, theirs, theirs)
            outputs = (*own, *(Replicate(),) * (len(self.call.outputs) - 3))
        else:
            outputs = (Partial("sum"), Partial("sum")) if keys else (shard, Replicate())
        fills = tuple(0.0 if isinstance(x, Shard) else None for x in inputs)
        return Split(tuple(inputs), outputs, fills, self._emit(None))

    def whole_emit(self) -> Emit:
        """The lowering for one rank: no collective."""
        return self._emit(None)

    def _arguments(self) -> dict[str, Any]:
        """The tensor arguments by name, None where there is none."""
        names = ("grad", "grad_final", *_OPERANDS, "final") if self.backward else _OPERANDS
        return dict(zip(names, self.call.args, strict=False))

    def _role(self, name: str, x: Any) -> str:
        if x is None or x.dim() != 4:
            return ""
        if name in ("initial_state", "grad_final", "final"):
            return "state"
        return "constant" if name == "log_decay" and x.shape[2] == 1 != self._tokens() else "tokens"

    def _tokens(self) -> int:
        return self._arguments()["k"].shape[2]

    def _roles(self) -> list[str]:
        """Of the operands that are there: "tokens", "state" or "constant" (a decay without tokens)."""
        return [self._role(name, x) for name, x in self._arguments().items() if x is not None]

    def _results(self) -> list[str]:
        if not self.backward:
            return ["tokens", "state"]
        given = self._arguments()
        return [self._role(name, given[name]) for name in _OPERANDS]

    def _emit(self, shard: Shard | None) -> Emit:
        names = [name for name, x in self._arguments().items() if x is not None]
        options = Options(*self.call.args[len(self._arguments()) :], **self.call.kwargs)

        def emit(context: Context, operands: list[Tensor]) -> Any:
            sequence = None if shard is None else Sequence(context.group, shard.block, shard.length)
            given = dict(zip(names, operands, strict=True))
            x = Operands(*(given.get(name) for name in _OPERANDS))
            if not self.backward:
                kernel = kernel_of(x, options)
                context.took("linear", kernel.name, kernel.refused)
                if sequence is not None and options.causal:
                    context.priced("linear", x.k.device.type, _sizes_of_linear(x, sequence))
                # What both ways make is one node, this one.
                with context.again(kernel.again):
                    out, final, carry = linear.forward(x, options, sequence, context.linear)
                ours = carry is not None and carry is not x.initial_state
                if sequence is not None or options.causal:  # else it is ``final``, or a term of it
                    context.leave(self.call.site, sequence, context.keep(carry) if ours else carry)
                return out, final
            key = self.call.site, sequence
            carry = context.left(*key, lambda: _carry(x, given, options, sequence, context))
            gradients = (given["grad"], given.get("grad_final"))
            with context.again(kernel_of(x, options).again):
                grads = linear.backward(*gradients, x, options, carry, sequence, context.linear)
            return tuple(x.q.new_zeros(0) if g is None else g for g in grads)

        return emit


def _sizes_of_linear(x: Operands, sequence: Sequence) -> Sizes:
    b, h, _, k = map(hint, x.k.shape)
    decay, v = x.log_decay, hint(x.v.shape[3])
    sent = 0 if decay is None or decay.shape[2] == 1 else hint(decay.shape[3])
    width = state_dtype(x.k.dtype).itemsize
    more = {"w": width, "A": k * k if x.beta is not None else sent, "n": slices_of(v)}
    return Sizes(sequence.group.size, hint(sequence.block), b, h, h, k, v, **more)


def _sizes_of_softmax(x: softmax.Operands, options: softmax.Options, queries: Sequence) -> Sizes:
    b, h, _, k = map(hint, x.q.shape)
    of_keys = hint(x.k.shape[1]), k, hint(x.v.shape[3])
    width, causal = x.q.dtype.itemsize, int(options.causal)
    return Sizes(queries.group.size, hint(queries.block), b, h, *of_keys, w=width, c=causal)


def _carry(
    x: Operands, given: dict[str, Tensor], options: Options, sequence: Sequence | None, context: Context
) -> Tensor | None:
    """The state from which a backward starts whose forward is not in this graph."""
    if not options.causal:
        return given["final"]
    return linear.forward(x, options, sequence, context.linear)[2]


_BACKWARD = (ops.softmax_attention_backward.default, ops.softmax_attention_relative_backward.default)


def edges(node: fx.Node) -> int:
    """How many of its neighbours' keys a rank's rows see under the window of a softmax attention, or 0."""
    backward = node.target in _BACKWARD
    if not backward and node.target is not ops.softmax_attention.default:
        return 0
    at = 7 if backward else 4

    def given(behind: int, name: str) -> Any:
        return node.args[at + behind] if len(node.args) > at + behind else node.kwargs.get(name)

    window = None if given(7, "prefixes") is not None else given(2, "window")
    return 0 if window is None else (int(window) - 1) * (1 if node.args[at] else 2)


_MORE = ("sinks", "documents", "relative", "prefixes")
# Operands of a softmax attention behind its options, which have no queries' and no keys' shape.
_IDS = ("documents", "prefixes")  # of them those that are a number per token


@dataclass
class SoftmaxAttention:
    """softmax_attention and its backward: queries stay, keys and values are gathered by the strategy.

    Under a window that is shorter than a shard these are its neighbours'. Sinks are whole, and their gradient
    is made of other operators. So are documents and prefixes: a number per token; and relative biases, whose
    gradient is a term of the sum over ranks.

    Keys of another length than the queries (cross attention) are asked for whole; their gradients are then
    partial.
    """

    call: Call
    linear: tuple[frozenset[int], ...] = ()

    @property
    def backward(self) -> bool:
        """Whether this is the backward operator, whose first operand is the gradient of the output."""
        return self.call.op in _BACKWARD

    def _result(self, index: int) -> str:
        """The role of a result."""
        return ("q", "kv", "kv", "relative")[index] if self.backward else "q"

    def _lead(self, roles: list[str], role: str) -> int:
        """The length of an operand's first dim; 1 where there is none."""
        return self.call.operands[roles.index(role)].shape[0] if role in roles else 1

    @property
    def _relative_gradient(self) -> bool:
        return self.call.op is ops.softmax_attention_relative_backward.default

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        if shard.dim == 3 or (shard.dim == 2 and not _is_sequence(shard)):
            return None
        roles = self._roles()
        first = 1 if self.backward else 0
        if side == "in" and roles[index] in _IDS:
            batch = shard.dim == 0 and self._lead(roles, roles[index]) > 1
            return self._by_batch(shard, roles) if batch else None
        alike = self.call.operands[first].shape[2] == self.call.operands[first + 1].shape[2]
        role = roles[index] if side == "in" else self._result(index)
        if role == "relative":
            heads = shard.dim == 0 and self._lead(roles, role) > 1
            return self._by_batch(shard.at(1), roles) if heads else None
        if shard.dim < 2:
            by = shard.at(1) if role == "sinks" else shard
            return self._by_batch(by, roles) if role != "mask" else None
        if role in ("mask", "sinks") or (role == "kv" and not alike):
            return None
        keys: Placement = shard if alike else Replicate()
        inputs = tuple(self._place(r, x, shard, keys) for r, x in zip(roles, self.call.operands, strict=True))
        grads: Placement = shard if alike else Partial("sum")
        terms = (Partial("sum"),) if self._relative_gradient else ()
        outputs = (shard, grads, grads, *terms) if self.backward else (shard, shard)
        return Split(inputs, outputs, (None,) * len(inputs), self._emit(shard, alike))

    def whole_emit(self) -> Emit:
        """The lowering for one rank: no collective."""
        return self._emit(None, False)

    def _option(self, index: int, name: str) -> Any:
        """An argument behind the scale, which is there only where it is not the default."""
        return self.call.argument(index + (9 if self.backward else 6), name)

    def _roles(self) -> list[str]:
        mask = ["mask"] if isinstance(self.call.args[4 if self.backward else 3], Tensor) else []
        more = [name for i, name in enumerate(_MORE) if self._option(2 + i, name) is not None]
        before, after = (["q", "q"], ["q", "q"]) if self.backward else (["q"], [])
        return [*before, "kv", "kv", *mask, *after, *more]

    def _place(self, role: str, x: Tensor, shard: Shard, keys: Placement) -> Placement:
        if role in _MORE:
            return Replicate()
        if role != "mask":
            return shard if role == "q" else keys
        rows = x.dim() - 2
        return shard.at(rows) if rows >= 0 and x.shape[rows] != 1 else Replicate()

    def _by_batch(self, shard: Shard, roles: list[str]) -> Split | None:
        tensors = [x for x, r in zip(self.call.operands, roles, strict=True) if r not in _MORE]
        if len({x.shape[shard.dim] for x in tensors}) > 1 or "mask" in roles:
            return None  # grouped heads, or a mask that may or may not have the dim
        place = dict.fromkeys(_MORE, Replicate()) | dict.fromkeys(("q", "kv"), shard)
        if shard.dim == 1:
            place["sinks"] = shard.at(0)
            place["relative"] = shard.at(0) if self._lead(roles, "relative") > 1 else Replicate()
        else:
            place |= {role: shard for role in _IDS if self._lead(roles, role) > 1}
        if self._relative_gradient and not isinstance(place["relative"], Shard):
            return None  # it sums over what is cut, whose padding may hold anything
        inputs = tuple(place[r] for r in roles)
        outputs: tuple[Placement, ...] = (shard,) * len(self.call.outputs)
        outputs = (*outputs[:3], place["relative"]) if self._relative_gradient else outputs
        return Split(inputs, outputs, (None,) * len(roles), self._emit(None, False))

    def _emit(self, shard: Shard | None, alike: bool) -> Emit:
        causal, scale = self.call.args[7:9] if self.backward else self.call.args[4:6]
        window, soft_cap = self._option(0, "window"), self._option(1, "soft_cap")
        options = softmax.Options(causal, scale, window=window, soft_cap=soft_cap)
        roles = self._roles()

        def emit(context: Context, operands: list[Tensor]) -> Any:
            queries = None if shard is None else Sequence(context.group, shard.block, shard.length)
            keys = queries if alike else None
            there = ("mask", *_MORE)
            more = [operands[roles.index(r)] if r in roles else None for r in there]
            given = [x for x, r in zip(operands, roles, strict=True) if r not in there]
            if not self.backward:
                x = softmax.Operands(given[0], given[1], given[2], *more)
                context.took("softmax", rows.name(x, options), rows.refuses(x, options))
                if queries is not None and alike and options.window is None:
                    context.priced("softmax", x.q.device.type, _sizes_of_softmax(x, options, queries))
                out, lse, kv = context.softmax.forward(x, options, queries, keys)
                grows = kv is not None and context.softmax.grows(kv)
                context.leave(self.call.site, keys, context.gathered(kv) if grows else kv)
                return out, lse
            grad, q, k, v, out, lse = given
            x = softmax.Operands(q, k, v, *more)
            gather = lambda: context.softmax.gather(x, options, queries, keys)  # noqa: E731
            kv = context.left(self.call.site, keys, gather)
            wanted = {"relative": True} if self._relative_gradient else {}
            return context.softmax.backward(grad, x, out, lse, kv, options, queries, keys, **wanted)

        return emit


RULES: dict[Any, type[LinearAttention] | type[SoftmaxAttention] | type[StateScan]] = {
    ops.affine_scan.default: StateScan,
    ops.max_scan.default: StateScan,
    ops.linear_attention.default: LinearAttention,
    ops.linear_attention_backward.default: LinearAttention,
    ops.softmax_attention.default: SoftmaxAttention,
    **dict.fromkeys(_BACKWARD, SoftmaxAttention),
}
