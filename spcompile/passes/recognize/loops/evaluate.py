"""The body of a loop, computed for all steps at once: every tensor gets the steps as its first dim.

Parts of a tensor by a running index (`x[:, :, t]`) become the whole tensor, with that dim in front; every
other op of the body is mapped over the steps by `torch.vmap`, so any op that can be batched is, by PyTorch's
own rules. What a family's member was in eager is checked for shape and dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from spcompile._torch import OpOverload
from spcompile.passes.recognize.edit import Refused
from spcompile.passes.recognize.loops.families import Carry, Family, Invariant, Progress, Ref, refs_in
from spcompile.passes.shadow import Value, is_pure
from spcompile.passes.shadow.spelling import by_schema, target_of

__all__ = ["Batch", "Evaluator"]

# What only rearranges entries: the log of what is so taken is so taken of the log.
_SAME_ENTRIES = {"clone", "_to_copy", "reshape", "permute", "expand", "select", "slice", "getitem"}


@dataclass(eq=False)
class Batch:
    """A tensor; `batched` if its first dim is the steps, and it is the same in each step otherwise."""

    x: Tensor
    batched: bool


class Evaluator:
    """Computes families. `given` holds what is computed otherwise: carried states, and their readouts."""

    def __init__(
        self,
        steps: int,
        invariant: Callable[[Value], Tensor | None],
        calls: dict[Value, fx.Node],
        like: Value,
        reverse: bool = False,
    ) -> None:
        self.steps = steps
        self.invariant = invariant
        self.calls = calls
        """The ATen node of each Value."""
        assert like.fake is not None
        self.device = like.fake.device
        self.grad_mode = like.grad_mode
        self.autocast = like.autocast
        self.reverse = reverse
        """Whether index 0 of the steps' dim is the last step: the loop runs down an index."""
        self.given: dict[Ref, Any] = {}
        self.memo: dict[tuple[Any, bool], Any] = {}
        self.wrapped: dict[Value, Invariant] = {}

    # ---- values

    def value(self, ref: Ref) -> Any:
        """A family's Batch (or a list of them, for an op with several results)."""
        return self._remembered(ref, False)

    def log(self, ref: Ref) -> Batch:
        """The natural log of what is positive by construction: exp, sigmoid, products and parts of these.

        Raises:
            Refused: it isn't.
        """
        out = self._remembered(ref, True)
        assert isinstance(out, Batch)
        return out

    def _remembered(self, ref: Ref, log: bool) -> Any:
        if not log and ref in self.given:
            return self.given[ref]
        key = (ref.value if isinstance(ref, Invariant) else ref, log)
        if key not in self.memo:
            self.memo[key] = self._log(ref) if log else self._value(ref)
        return self.memo[key]

    def _value(self, ref: Ref) -> Any:
        if isinstance(ref, Carry):
            raise Refused("its state is used in a way that is not read")
        like, args = self.parts(ref)
        if isinstance(ref, Invariant):
            x = self.invariant(ref.value)
            if x is not None:
                return Batch(x, False)
        return self.apply(like, args, self.value)

    def parts(self, ref: Family | Invariant) -> tuple[Value, dict[str, Any]]:
        """The Value that a ref is like, and its arguments with refs."""
        if isinstance(ref, Family):
            return ref.like, ref.args
        return ref.value, pytree.tree_map_only(Value, self._wrap, ref.value.args)

    def _wrap(self, v: Value) -> Invariant:
        return self.wrapped.setdefault(v, Invariant(v))

    def apply(self, like: Value, args: dict[str, Any], operand: Callable[[Ref], Any]) -> Any:
        """One op on its operands."""
        if like.name == "literal":
            return Batch(torch.full((), like.args["value"], dtype=like.dtype, device=self.device), False)
        if like.name == "constant":
            return Batch(like.args["build"](self.device), False)
        if (like.grad_mode, like.autocast) != (self.grad_mode, self.autocast):
            raise Refused("gradients or autocast are switched on or off inside it")
        if like.name in ("opaque", "input"):
            raise Refused("it uses a value that the loop writes, or of which nothing is known")
        if like.name == "getitem":
            return self._getitem(like, args, operand)
        if any(isinstance(a, Progress) for a in args.values()):
            return self._running(like, args, operand(args["self"]))
        known = {k: pytree.tree_map(lambda a: operand(a) if _is_ref(a) else a, x) for k, x in args.items()}
        if like.name == "copy":
            src = known["src"]
            return _mapped(lambda x: x.to(like.dtype).expand(like.shape), [src])
        if like.name == "reshape":
            out = _mapped(lambda x: x.reshape(like.shape), [known["self"]])
        else:
            out = self._call(like, known)
            if self.autocast and isinstance(out, Batch) and out.x.dtype != like.dtype:
                out = self._call(like, pytree.tree_map(lambda a: _cast(a, like.dtype), known))
        return self._checked(like, out)

    @staticmethod
    def _checked(like: Value, out: Any) -> Any:
        if isinstance(out, Batch) and (_shape(out) != like.shape or out.x.dtype != like.dtype):
            raise Refused(f"{like.name} gives something else for all steps at once")
        return out

    def _call(self, like: Value, args: dict[str, Any]) -> Any:
        target = self._target(like)
        leaves, spec = pytree.tree_flatten(args)
        at = [i for i, x in enumerate(leaves) if isinstance(x, Batch)]

        def op(*tensors: Tensor) -> Any:
            filled = list(leaves)
            for i, x in zip(at, tensors, strict=True):
                filled[i] = x
            positional, named = by_schema(target, pytree.tree_unflatten(filled, spec))
            return target(*positional, **named)

        try:
            return _mapped(op, [leaves[i] for i in at])
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as why:
            raise Refused(f"{like.name} can't be computed for all steps at once") from why

    def _target(self, like: Value) -> OpOverload:
        """The op that a Value is a call of; a call in place is read as one that is not."""
        node = self.calls.get(like)
        called = node.target if node is not None else None
        if isinstance(called, OpOverload):
            if called.namespace != "aten":
                raise Refused(f"{like.name} is no op of PyTorch's own")
            if torch.Tag.nondeterministic_seeded in called.tags:
                raise Refused("it draws random numbers")
            if not called._schema.is_mutable and not is_pure(node):
                raise Refused(f"{like.name} does more than compute")
        target = target_of(like)
        if target is None:
            raise Refused(f"{like.name} is no op of PyTorch's own")
        if target._schema.is_mutable:
            raise Refused(f"{like.name} writes in place and has no other form")
        return target

    # ---- parts by a running index

    def _running(self, like: Value, args: dict[str, Any], base: Batch) -> Batch:
        if base.batched:
            raise Refused("the steps read moving parts of what they compute")
        dim = args["dim"]
        index = args["index"] if like.name == "select" else args["start"]
        if not isinstance(index, Progress):
            raise Refused("its indices are not in arithmetic progression")
        if like.name == "select":
            return self.along(base.x, dim, index)
        if args["step"] == 1:
            return self._windows(base.x, dim, index, like.shape[dim])
        raise Refused("it takes parts by a slice with steps")

    def along(self, x: Tensor, dim: int, index: Progress) -> Batch:
        """x.select(dim, index_t) for all steps."""
        first, step = self._order(index, x.shape[dim])
        low = min(first, first + (self.steps - 1) * step)
        part = x.movedim(dim, 0)
        if (low, abs(step), self.steps) != (0, 1, x.shape[dim]):
            part = part[low : low + (self.steps - 1) * abs(step) + 1 : abs(step)]
        return Batch(part.flip(0) if step < 0 else part, True)

    def _order(self, index: Progress, size: int) -> tuple[int, int]:
        """First index and step in the order of the steps' dim."""
        first, last = index.start, index.start + (self.steps - 1) * index.step
        if index.step == 0 or not (0 <= first < size and 0 <= last < size):
            raise Refused("an index leaves its dim")
        return (last, -index.step) if self.reverse else (first, index.step)

    def _windows(self, x: Tensor, dim: int, index: Progress, width: int) -> Batch:
        """x.narrow(dim, start_t, width) for all steps."""
        first, step = self._order(index, x.shape[dim])
        low, stride = min(first, first + (self.steps - 1) * step), abs(step)
        if low + (self.steps - 1) * stride + width > x.shape[dim]:
            raise Refused("an index leaves its dim")
        if width > max(self.steps, stride):
            raise Refused("its steps are few shifts of something longer")
        if stride == width:
            whole = low == 0 and x.shape[dim] == self.steps * width
            part = x if whole else x.narrow(dim, low, self.steps * width)
            part = part.unflatten(dim, (self.steps, width)).movedim(dim, 0)
        else:
            part = x.narrow(dim, low, (self.steps - 1) * stride + width).unfold(dim, width, stride)
            part = part.movedim(-1, dim + 1).movedim(dim, 0)
        return Batch(part.flip(0) if step < 0 else part, True)

    def _getitem(self, like: Value, args: dict[str, Any], operand: Callable[[Ref], Any]) -> Any:
        if isinstance(args["index"], Progress):
            raise Refused("its steps take one result each of one call")
        return self._checked(like, operand(args["self"])[args["index"]])

    # ---- logarithms

    def _log(self, ref: Ref) -> Batch:
        if isinstance(ref, Carry):
            raise Refused("a decay that depends on the state")
        like, args = self.parts(ref)
        inner: Any = args.get("self")
        if like.name == "exp" and inner is not None:
            return self.value(inner)
        if like.name == "sigmoid" and inner is not None:
            return _mapped(torch.nn.functional.logsigmoid, [self.value(inner)])
        if (log := self._log_complement(like, args)) is not None:
            return log
        if like.name == "mul" and _is_ref(args["other"]):
            return _mapped(torch.add, [self.log(inner), self.log(args["other"])])
        if like.name == "mul" and args["other"] > 0:
            return _mapped(lambda x: x + math.log(args["other"]), [self.log(inner)])
        if like.name in ("literal", "full") and (number := _number(like)) is not None and number > 0:
            return _mapped(torch.log, [self.value(ref)])
        floats = like.dtype is not None and like.dtype.is_floating_point
        one = list(refs_in(args)) == [inner]
        if floats and one and like.name in _SAME_ENTRIES:
            return self.apply(like, args, self._log_operand)
        raise Refused("its decay is not shown to be positive")

    def _log_operand(self, ref: Ref) -> Batch:
        return self.log(ref)

    def _log_complement(self, like: Value, args: dict[str, Any]) -> Batch | None:
        """1 - sigmoid(x) = sigmoid(-x)."""
        if like.name != "add" or args["other"] != 1 or not isinstance(args["self"], (Family, Invariant)):
            return None
        less, of_less = self.parts(args["self"])
        if less.name != "mul" or of_less["other"] != -1 or args.get("alpha", 1) != 1:
            return None
        inner, inner_args = self.parts(of_less["self"])
        if inner.name != "sigmoid":
            return None
        return _mapped(lambda y: torch.nn.functional.logsigmoid(-y), [self.value(inner_args["self"])])


def _is_ref(x: Any) -> bool:
    return isinstance(x, (Family, Carry, Invariant))


def _number(v: Value) -> float | None:
    x = v.args.get("value", v.args.get("fill_value"))
    return float(x) if isinstance(x, (int, float)) else None


def _cast(x: Any, dtype: torch.dtype | None) -> Any:
    """What autocast does to the operands of an op that it runs in `dtype`."""
    return Batch(x.x.to(dtype), x.batched) if isinstance(x, Batch) and x.x.is_floating_point() else x


def _shape(b: Batch) -> tuple[int, ...]:
    return tuple(b.x.shape[1:] if b.batched else b.x.shape)


def _mapped(op: Callable[..., Any], operands: list[Batch]) -> Any:
    """`op` on each step."""
    batched = any(b.batched for b in operands)
    if batched:
        dims = tuple(0 if b.batched else None for b in operands)
        out = torch.vmap(op, in_dims=dims)(*(b.x for b in operands))
    else:
        out = op(*(b.x for b in operands))
    if isinstance(out, (tuple, list)):
        return [Batch(x, batched) for x in out]
    return Batch(out, batched)
