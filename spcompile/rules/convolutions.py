"""Convolutions: along the sequence, an entry needs its neighbours, a halo of kernel - 1 tokens.

With a stride s the output's blocks are the operand's divided by s, if they can be: else it is computed whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from spcompile.neighbours import give_back
from spcompile.placement import Partial, Replicate, Shard
from spcompile.rules.base import Call, Context, Emit, Factors, Side, Split
from spcompile.rules.halo import halo

__all__ = ["Convolution", "ConvolutionBackward", "Window"]


@dataclass(frozen=True)
class Window:
    """y[t] = sum_j w_j x[s t + j d - p]: what an entry of a one-dimensional convolution sees.

    ``span`` is (k - 1) d, ``padding`` is p, ``stride`` s. If x starts at position a and y at b, then y at a
    position needs x at the s b - a + p positions before s times it, and up to ``span`` minus that behind it.
    """

    padding: int
    span: int
    x: int
    y: int
    stride: int = 1

    @classmethod
    def of(cls, x: Tensor, y: Tensor, weight: Tensor, options: tuple[Any, ...]) -> Window | None:
        """The window of a call; None if it is transposed or has more dims than one."""
        stride, padding, dilation, transposed = options[:4]
        if x.dim() != 3 or transposed:
            return None
        return cls(padding[0], (weight.shape[2] - 1) * dilation[0], x.shape[2], y.shape[2], stride[0])

    def output(self, x: Shard) -> Shard | None:
        """Where the output lies: at position 0, as what is computed does, if the halo's sides allow it."""
        if self.stride > 1:
            if not isinstance(x.block, int) or x.block % self.stride:
                return None
            start = max(0, -((self.padding - x.start) // self.stride))
            return replace(x, start=start, length=self.y, block=x.block // self.stride)
        start = min(max(0, x.start - self.padding), x.start - self.padding + self.span)
        return x.window(start, self.y)

    def input(self, y: Shard) -> Shard:
        """Where the operand lies: its last token beside the output's, or the first if it is the shorter."""
        if self.stride > 1:
            first = self.stride * y.start + self.padding
            start = min(max(0, first - self.span), first)
            return replace(y, start=start, length=self.x, block=y.block * self.stride)
        start = y.start + min(0, self.y - self.x)
        start = min(max(start, y.start + self.padding - self.span), y.start + self.padding)
        return y.window(start, self.x)

    def sides(self, x: Shard, y: Shard | None) -> tuple[int, int] | None:
        """How many positions of x before and behind its own block an output needs; None: farther apart."""
        if y is None:
            return None
        left = self.stride * y.start - x.start + self.padding
        if not 0 <= left <= self.span:
            return None
        return left, max(0, self.span - left - self.stride + 1)

    def settled(self, x: Shard) -> Shard | None:
        """Where the output lies if at position 0, and so farther behind x than a halo's sides allow; None if
        they do. Behind a pad for two convolutions the first one's output begins before any position."""
        y = x.window(0, self.y)
        return y if self.stride == 1 and self.unread(x, y) > 0 else None

    def unread(self, x: Shard, y: Shard) -> int:
        """How many positions lie between the last one of x that an entry of y needs, and its own."""
        return y.start - x.start + self.padding - self.span


def _asked_for(call: Call, split: Split | None) -> Split | None:
    """A gradient that was not asked for has no placement."""
    if split is None:
        return None
    pairs = zip(call.outputs, split.outputs, strict=True)
    return replace(split, outputs=tuple(Replicate() if x is None else p for x, p in pairs))


def _settled(rule: Convolution | ConvolutionBackward, window: Window | None, shard: Shard) -> Split | None:
    """With the operand as ``shard`` and the output at position 0, farther off: either way, the same halo."""
    if window is None or shard.dim != 2 or shard.outer != 1:
        return None
    after = window.settled(shard)
    if after is None:
        return None
    unread = window.unread(shard, after)
    return rule._between(shard, after, rule._emit(window.span + unread, 0, unread))


@dataclass
class Convolution:
    """convolution: batch entries are independent, positions need a halo; channels are needed whole.

    The operand's padding is zero, as the convolution's own is.
    """

    call: Call

    def stride_along(self, dim: int) -> int:
        """How many of a dim's entries a step takes."""
        return int(self.call.args[3][-1]) if dim == 2 else 1

    @property
    def linear(self) -> tuple[frozenset[int], ...]:
        """In the operand and in the weight, but for a bias."""
        return (frozenset({0}), frozenset({1})) if len(self.call.operands) == 2 else ()

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        x, weight, *_ = self.call.operands
        if index == 0 and shard.dim == 0:
            inputs = tuple(("n" if t is x else None, *(None,) * (t.dim() - 1)) for t in self.call.operands)
            return Factors(self.call, inputs, (inputs[0],)).split(side, index, shard)
        window = Window.of(x, self.call.outputs[0], weight, self.call.args[3:])
        if index != 0 or shard.dim != 2 or window is None or shard.outer != 1:
            return None
        before = shard if side == "in" else window.input(shard)
        after = window.output(shard) if side == "in" else shard
        sides = window.sides(before, after)
        if after is None or sides is None:
            return None
        return self._between(before, after, self._emit(*sides))

    def settled(self, index: int, shard: Shard) -> Split | None:
        """How the call runs with its output at position 0, where :meth:`split` has it before that."""
        x, weight, *_ = self.call.operands
        window = Window.of(x, self.call.outputs[0], weight, self.call.args[3:])
        return _settled(self, window, shard) if index == 0 else None

    def _between(self, before: Shard, after: Shard, emit: Emit) -> Split:
        whole = [Replicate() for _ in self.call.operands[1:]]
        return Split((before, *whole), (after,), (0.0, *(None for _ in whole)), emit)

    def _emit(self, left: int, right: int, unread: int = 0) -> Emit:
        def emit(context: Context, operands: list[Tensor]) -> Tensor:
            around = halo(context, operands[0], 2, left, right, 0.0)
            around = around.narrow(2, 0, around.shape[2] - unread)
            args, kwargs = self.call.replaced([around, *operands[1:]])
            return self.call.op(*args[:4], [0], *args[5:], **kwargs)

        return emit


@dataclass
class ConvolutionBackward:
    """convolution_backward: the gradient of an operand needs the mirrored halo of the output's gradient.

    dx[i] = sum_j w_j dy[i + p - j d] and dw_j = sum_i x[i] dy[i + p - j d], summed over this rank's own
    entries of x, so that one halo of dy serves both.
    """

    call: Call
    linear: tuple[frozenset[int], ...] = (frozenset({0}),)

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        dy, x, weight = self.call.operands
        given = index if side == "in" else {0: 1}.get(index, 2)
        if given == 2:
            return None
        if shard.dim == 0:
            names = [("n", *(None,) * (t.dim() - 1)) for t in (dy, x)]
            whole = ((None,) * weight.dim(), (None,))
            outputs = (names[1], *whole)
            factors = Factors(self.call, (*names, whole[0]), outputs, mixed=True)
            return _asked_for(self.call, factors.split(side, index, shard))
        window = Window.of(x, dy, weight, self.call.args[4:])
        if shard.dim != 2 or window is None or shard.outer != 1:
            return None
        before = shard if given == 1 else window.input(shard)
        after = window.output(shard) if given == 1 else shard
        sides = window.sides(before, after)
        if after is None or sides is None:
            return None
        if window.stride > 1 and max(sides) > before.block:
            return None
        emit = self._emit(*sides) if window.stride == 1 else self._emit_in_steps(*sides)
        return self._between(before, after, emit)

    def settled(self, index: int, shard: Shard) -> Split | None:
        """How the call runs where the operand lies as ``shard`` and the output's gradient at position 0."""
        dy, x, weight = self.call.operands
        window = Window.of(x, dy, weight, self.call.args[4:])
        return _settled(self, window, shard) if index == 1 else None

    def _between(self, before: Shard, after: Shard, emit: Emit) -> Split | None:
        gradients = (before, Partial("sum"), Partial("sum"))
        split = Split((after, before, Replicate()), gradients, (0.0, 0.0, None), emit)
        return _asked_for(self.call, split)

    def _emit_in_steps(self, left: int, right: int) -> Emit:
        """Of this rank's own entries of dy, with the halo of x, whose gradient the neighbours get."""

        def emit(context: Context, operands: list[Tensor]) -> tuple[Tensor | None, ...]:
            dy, x, weight = operands
            around = halo(context, x, 2, left, right, 0.0)
            args, _ = self.call.replaced([dy, around, weight])
            dx, dw, db = self.call.op(*args[:5], [0], *args[6:])
            if dx is not None and left + right:
                tokens_first = dx.permute(2, 0, 1)
                rank = context.rank(x.device)
                dx = give_back(tokens_first, left, right, context.group, rank).permute(1, 2, 0)
            return dx, dw, db

        return emit

    def _emit(self, left: int, right: int, unread: int = 0) -> Emit:
        def emit(context: Context, operands: list[Tensor]) -> tuple[Tensor | None, ...]:
            dy, x, weight = operands
            # Of a block of x and no more, every position that sees some of it is an output.
            around = halo(context, dy, 2, right, left, 0.0)
            around = around.narrow(2, unread, around.shape[2] - unread)
            args, _ = self.call.replaced([around, x, weight])
            wanted = args[10]
            dx, dw, _ = self.call.op(*args[:5], [left + right - unread], *args[6:10], [*wanted[:2], False])
            return dx, dw, dy.sum([0, 2]) if wanted[2] else None

        return emit
