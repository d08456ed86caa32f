"""Linear attention on GPUs with more keys than a program holds: Based's features of 1 + 16 + 256 numbers.

With one decay for all keys, or none, the memory state's rows know nothing of each other. In pieces of keys

    q_i . k_j = sum_p q_i,p . k_j,p      S = [S_p]      out = sum_p out_p      dv = sum_p dv_p

dq_p, dk_p and the state's gradients are each piece's own, and the decay's gradient is a sum as dv is. Terms
are float32 and rounded once. The features are a tensor, made by the model: a piece reads its own alone, and
values are read once for each piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from spcompile.kernels.linear import fused
from spcompile.kernels.linear.operands import Operands, Options

__all__ = ["Backward", "Forward", "refuses", "sizes"]

# Keys of a piece: with 256 a program holds twice the state, and the last piece of 273 is then one of 17.
_PIECE = 128


def refuses(x: Operands) -> str:
    """Why the kernels do not take such operands, for the report; empty if they do."""
    return fused.refused(x, x.k.shape[3])


def sizes(x: Operands) -> list[int]:
    """Of the pieces, the last may be smaller."""
    whole, rest = divmod(x.k.shape[3], _PIECE)
    return [_PIECE] * whole + [rest] * (rest > 0)


def _pieces(x: Operands) -> list[Operands]:
    # The gradient of a decay is a sum over the pieces: of float32.
    x = x._replace(log_decay=None if x.log_decay is None else x.log_decay.float())
    q, k = (y.split(sizes(x), 3) for y in (x.q, x.k))
    states = (None,) * len(q) if x.initial_state is None else x.initial_state.split(sizes(x), 2)
    return [x._replace(q=a, k=b, initial_state=c) for a, b, c in zip(q, k, states, strict=True)]


class _Pieces:
    """What a forward and a backward over pieces have in common."""

    parts: Sequence[Any]  # of fused.Forward or fused.Backward

    def total(self) -> tuple[Tensor, ...]:
        """What the tokens do to the state, or to its gradient: decays are the same for all keys."""
        totals = [part.total() for part in self.parts]
        return *totals[0][:-1], torch.cat([total[-1] for total in totals], 2)

    def local(self) -> None:
        """What needs no carry."""
        for part in self.parts:
            part.local()


class Forward(_Pieces):
    """See :class:`spcompile.kernels.linear.kernel.Forward`."""

    def __init__(self, x: Operands, options: Options) -> None:
        self.x = x
        self.parts = [fused.Forward(piece, options, term=True) for piece in _pieces(x)]

    def finish(self, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs, and the state after the last token."""
        found = [part.finish(y) for part, y in zip(self.parts, _split(carry, self.x), strict=True)]
        out = reduce(torch.add, [out for out, _ in found]).to(self.x.q.dtype)
        return out, torch.cat([final for _, final in found], 2)


class Backward(_Pieces):
    """See :class:`spcompile.kernels.linear.kernel.Backward`."""

    def __init__(self, x: Operands, options: Options, grad: Tensor, carry: Tensor | None) -> None:
        self.x = x
        given = zip(_pieces(x), _split(carry, x), strict=True)
        self.parts = [fused.Backward(piece, options, grad, y, term=True) for piece, y in given]

    def finish(self, carry: Tensor | None) -> tuple[Tensor | None, ...]:
        """The other gradients, which read the gradient of the state."""
        x = self.x
        found = [part.finish(y) for part, y in zip(self.parts, _split(carry, x), strict=True)]
        dq, dk, dv, decay, _, initial = ([y for y in of if y is not None] for of in zip(*found, strict=True))
        return (
            torch.cat(dq, 3),
            torch.cat(dk, 3),
            reduce(torch.add, dv).to(x.v.dtype),
            reduce(torch.add, decay).to(x.log_decay.dtype) if x.log_decay is not None else None,
            None,
            torch.cat(initial, 2) if initial else None,
        )


def _split(state: Tensor | None, x: Operands) -> list[Tensor] | list[None]:
    """A state ``[B, H, K, V]`` in the pieces' rows."""
    return [None] * len(sizes(x)) if state is None else [*state.split(sizes(x), 2)]
