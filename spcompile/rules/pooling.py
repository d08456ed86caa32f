"""Windows along the sequence, and means over them: an entry's neighbours, which a halo brings.

With a stride the blocks are divided by it, as a convolution's are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from spcompile.neighbours import give_back
from spcompile.placement import Shard
from spcompile.rules.base import Call, Context, Emit, Factors, Side, Split
from spcompile.rules.convolutions import Window
from spcompile.rules.halo import halo

__all__ = ["AveragePool", "AveragePoolBackward", "Unfold"]


def _window(x: Tensor, y: Tensor, dim: int, options: tuple[Any, ...]) -> Window | None:
    """What a mean along one of the two last dims sees; None if it counts its edges apart, or takes the mean
    over the other dim too."""
    kernel, stride, padding = (_pair(o) for o in options[:3])
    along = dim - x.dim()  # -2 or -1
    other = -3 - along
    trivial = kernel[other] == 1 and stride[other] == 1 and padding[other] == 0
    if not trivial or options[3] or (padding[along] and not options[4]):
        return None
    return Window(padding[along], kernel[along] - 1, x.shape[along], y.shape[along], stride[along])


def _inside(options: tuple[Any, ...]) -> tuple[Any, ...]:
    """The options of a mean over a part with its neighbours, where nothing is padded."""
    return *options[:2], [0], False, True, _divisor(options)


def _mean(dim: int, left: int, right: int, divisor: int) -> Emit:
    """Of the first operand, the sums over each entry and its neighbours, divided."""

    def emit(context: Context, operands: list[Tensor]) -> Tensor:
        x = operands[0]
        around = halo(context, x, dim, left, right, 0.0)
        parts = [around.narrow(dim, j, x.shape[dim]) for j in range(left + right + 1)]
        return reduce(torch.add, parts) / divisor

    return emit


def _divisor(options: tuple[Any, ...]) -> int:
    return options[5] or prod(_pair(options[0]))


def _pair(x: Any) -> tuple[int, int]:
    values = [x] if isinstance(x, int) else list(x)
    return (values[0], values[-1])


def _options(call: Call, first: int) -> tuple[Any, ...]:
    """Kernel, stride (the kernel by default), padding, ceil mode, whether padding counts, divisor."""
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    defaults: tuple[Any, ...] = (None, [], 0, False, True, None)
    found = [call.argument(first + i, n, d) for i, (n, d) in enumerate(zip(names, defaults, strict=True))]
    found[1] = found[1] or found[0]
    return tuple(found)


def _passes(call: Call, x: Tensor, shard: Shard, options: tuple[Any, ...]) -> Factors | None:
    """How dims are split over which no mean is taken: batch, channels, and a kernel of one."""
    kernel, stride, padding = (_pair(o) for o in options[:3])
    means = {d for d in (-2, -1) if (kernel[d], stride[d], padding[d]) != (1, 1, 0)}
    names = tuple(None if i - x.dim() in means else f"d{i}" for i in range(x.dim()))
    return Factors(call, tuple(names for _ in call.operands), (names,)) if names[shard.dim] else None


@dataclass
class AveragePool:
    """avg_pool2d; y[t] = sum_j x[t + j - padding] / divisor, j < kernel: a halo along the sequence."""

    call: Call
    linear: tuple[frozenset[int], ...] = (frozenset({0}),)

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        (x,), (y,), options = self.call.operands, self.call.outputs, _options(self.call, 1)
        factors = _passes(self.call, x, shard, options)
        if factors is not None:
            return factors.split(side, index, shard)
        window = _window(x, y, shard.dim, options)
        if window is None or shard.outer != 1:
            return None
        before = shard if side == "in" else window.input(shard)
        after = window.output(shard) if side == "in" else shard
        sides = window.sides(before, after)
        if after is None or sides is None:
            return None
        return Split((before,), (after,), (0.0,), self._emit(shard.dim, *sides, _inside(options)))

    def stride_along(self, dim: int) -> int:
        """How many of a dim's entries a step takes."""
        along = dim - self.call.operands[0].dim()  # a mean is over the two last dims
        return _pair(_options(self.call, 1)[1])[along] if along >= -2 else 1

    def _emit(self, dim: int, left: int, right: int, options: tuple[Any, ...]) -> Emit:
        def emit(context: Context, operands: list[Tensor]) -> Tensor:
            return self.call.op(halo(context, operands[0], dim, left, right, 0.0), *options)

        return emit


@dataclass
class AveragePoolBackward:
    """avg_pool2d_backward: dx[i] = sum_j dy[i + padding - j] / divisor; of x it reads the shape alone.

    Where it strides, the gradients of the neighbours' entries are given back to them.
    """

    call: Call
    linear: tuple[frozenset[int], ...] = (frozenset({0}),)

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        (dy, x), options = self.call.operands, _options(self.call, 2)
        factors = _passes(self.call, x, shard, options)
        if factors is not None:
            return factors.split(side, index, shard)
        window = _window(x, dy, shard.dim, options)
        if window is None or shard.outer != 1:
            return None
        given_output = side == "in" and index == 0
        before = window.input(shard) if given_output else shard
        after = shard if given_output else window.output(shard)
        sides = window.sides(before, after)
        if after is None or sides is None:
            return None
        if window.stride == 1:
            emit = _mean(shard.dim, *sides[::-1], _divisor(options))
        elif max(sides) > before.block:
            return None
        else:
            emit = self._emit_in_steps(shard.dim, *sides, _inside(options))
        return Split((after, before), (before,), (0.0, None), emit)

    def _emit_in_steps(self, dim: int, left: int, right: int, options: tuple[Any, ...]) -> Emit:
        def emit(context: Context, operands: list[Tensor]) -> Tensor:
            dy, x = operands
            around = x.new_empty(*x.shape[:dim], left + x.shape[dim] + right, *x.shape[dim + 1 :])
            dx = self.call.op(dy, around, *options)
            if left + right:
                rank = context.rank(x.device)
                dx = give_back(dx.movedim(dim, 0), left, right, context.group, rank).movedim(0, dim)
            return dx

        return emit


@dataclass
class Unfold:
    """unfold; y[t, ..., j] = x[step t + j], j < size: a halo. (Its backward is an index_put.)"""

    call: Call
    linear: tuple[frozenset[int], ...] = (frozenset({0}),)

    def split(self, side: Side, index: int, shard: Shard) -> Split | None:
        """See :class:`spcompile.rules.base.Rule`."""
        (x,), (y,) = self.call.operands, self.call.outputs
        dim, size, step = (self.call.args[1] % x.dim(), *self.call.args[2:4])
        if shard.dim != dim:
            names = tuple(None if i == dim else f"d{i}" for i in range(x.dim()))
            return Factors(self.call, (names,), ((*names, None),)).split(side, index, shard)
        if shard.outer != 1:
            return None
        window = Window(0, size - 1, x.shape[dim], y.shape[dim], step)
        before = shard if side == "in" else window.input(shard)
        after = window.output(shard) if side == "in" else shard
        sides = window.sides(before, after)
        if after is None or sides is None:
            return None

        def emit(context: Context, operands: list[Tensor]) -> Tensor:
            return halo(context, operands[0], dim, *sides, 0.0).unfold(dim, size, step)

        return Split((before,), (after,), (0.0,), emit)

    def stride_along(self, dim: int) -> int:
        """How many of a dim's entries a step takes."""
        return int(self.call.args[3]) if dim == self.call.args[1] % self.call.operands[0].dim() else 1
