"""Ring Attention: keys and values walk around the ring of ranks, and each rank's rows see a block at a time.

Parts of a row's softmax are merged by their log-sum-exp:

    lse = log(exp(lse_1) + exp(lse_2))      out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

No rank ever has more than two blocks of keys. In the backward they walk again, and with them the gradients
of what is there, which go home at the end in one step. A causal row sees no block of a later rank, and under
a window of w tokens one walks only as far as a row sees. Every rank sends in every step, so that one graph is
all ranks'. Bytes received per rank: n b B G (K + V) w forward, with n = P - 1 or as many steps as a window
needs; backward those, and (n + 1) of the gradients, in the state's dtype.

Cross attention, documents, prefixes and masks that are added (whose rows the log-sum-exp may not tell) are
gathered as in :mod:`.softmax_allgather`.

Source: Ring Attention, arXiv 2310.01889; RSA, arXiv 2105.13120.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spcompile import collectives
from spcompile.collectives import Sequence
from spcompile.kernels.scan import state_dtype
from spcompile.kernels.softmax.operands import Operands, Options, with_sinks
from spcompile.strategies.masking import masked, shared
from spcompile.strategies.softmax_allgather import AllGather

__all__ = ["Ring"]


class Ring:
    """See :class:`spcompile.strategies.softmax.SoftmaxStrategy`; nothing is kept but what was gathered."""

    @staticmethod
    def gather(
        x: Operands, options: Options, queries: Sequence | None, keys: Sequence | None
    ) -> Tensor | None:
        """None of what walks."""
        walks = _steps(x, options, queries, keys) is not None
        return None if walks else AllGather.gather(x, options, queries, keys)

    @staticmethod
    def grows(kv: Tensor) -> bool:
        """What was gathered."""
        return True

    @staticmethod
    def forward(
        x: Operands, options: Options, queries: Sequence | None, keys: Sequence | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """This rank's rows against its own keys, then against each block that comes."""
        steps = _steps(x, options, queries, keys)
        if steps is None:
            return AllGather.forward(x, options, queries, keys)
        assert queries is not None
        walk, attention = _Walk(x.k, x.v, queries), torch.ops.spcompile.local_softmax_attention
        total: tuple[Tensor, Tensor] | None = None
        for step in range(steps + 1):
            walk.start(step < steps)
            found = attention(x.q, *walk.here(), x.mask, options.scale, *_placed(x, options, queries, step))
            total = _merged(total, found)
            walk.finish()
        assert total is not None
        out, lse = total
        if x.sinks is not None:
            out, lse = with_sinks(out, lse, x.sinks)
        return out.to(x.q.dtype), lse, None

    @staticmethod
    def backward(
        grad: Tensor,
        x: Operands,
        out: Tensor,
        lse: Tensor,
        kv: Tensor | None,
        options: Options,
        queries: Sequence | None,
        keys: Sequence | None,
        *,
        relative: bool = False,
    ) -> tuple[Tensor, ...]:
        """dq from each block that comes; dk and dv walk with theirs."""
        steps = _steps(x, options, queries, keys)
        if steps is None:
            return AllGather.backward(grad, x, out, lse, kv, options, queries, keys, relative=relative)
        assert queries is not None
        grad, q, out = masked(queries, 2, grad, x.q, out)
        (lse,) = masked(queries, 2, lse)
        wide, ops = state_dtype(q.dtype), torch.ops.spcompile
        backward = ops.local_softmax_attention_backward
        backward = ops.local_softmax_attention_relative_backward if relative else backward
        walk = _Walk(x.k, x.v, queries, after=grad)
        home = _Walk(torch.zeros_like(x.k, dtype=wide), torch.zeros_like(x.v, dtype=wide), queries)
        wanted = (q, x.relative) if relative else (q,)
        mine = [torch.zeros_like(y, dtype=wide) for y in wanted if y is not None]
        for step in range(steps + 1):
            walk.start(step < steps)
            placed = _placed(x, options, queries, step)
            dq, dk, dv, *more = backward(grad, q, *walk.here(), x.mask, out, lse, options.scale, *placed)
            mine = [a + b.to(wide) for a, b in zip(mine, (dq, *more), strict=True)]
            home.finish()
            home.add(dk, dv)
            home.start(step < steps)
            walk.finish()
        home.start(steps > 0, -steps)
        home.finish()
        dk, dv = (y.to(x.k.dtype) for y in home.here())
        return (
            mine[0].to(q.dtype),
            dk,
            dv,
            *(y.to(x.relative.dtype) for y in mine[1:] if x.relative is not None),
        )


def _steps(x: Operands, options: Options, queries: Sequence | None, keys: Sequence | None) -> int | None:
    """How often blocks walk on; None where keys are gathered."""
    group = shared(queries, keys)
    if group is None or queries is None or x.ids:
        return None
    if x.mask is not None and x.mask.dtype != torch.bool:
        return None
    if not options.causal or options.window is None:
        return group.size - 1
    return min(group.size - 1, -(-(options.window - 1) // queries.block))


def _placed(x: Operands, options: Options, queries: Sequence, step: int) -> tuple[Any, ...]:
    """The local operator's arguments behind the scale; the keys are those of ``step`` ranks back."""
    around = 0 if options.causal else queries.group.size * queries.block
    where = queries.group.name, queries.block
    more = (options.causal, options.window, options.soft_cap, None, queries.length, step * queries.block)
    return *where, *more, None, x.relative, None, around


def _merged(total: tuple[Tensor, Tensor] | None, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two parts of each row's softmax as one, in the dtype of the log-sum-exp."""
    out, lse = found
    if total is None:
        return out.to(lse.dtype), lse
    both = torch.logaddexp(total[1], lse)
    weights = (torch.where(y == -torch.inf, 0.0, torch.exp(y - both)).unsqueeze(-1) for y in (total[1], lse))
    return sum(w * y for w, y in zip(weights, (total[0], out), strict=True)), both


class _Walk:
    """Two tensors that go from rank to rank, packed.

    ``after``: a gradient. Keys walk again in the backward, where nothing else of theirs depends on one: the
    same sends as in the forward would be its own, and all that came saved, of size T.
    """

    def __init__(self, a: Tensor, b: Tensor, sequence: Sequence, after: Tensor | None = None) -> None:
        self.group, self.shapes, self.after = sequence.group, (a.shape, b.shape), after
        self.packed = torch.cat([a.reshape(-1), b.reshape(-1)])
        self.started: Tensor | None = None

    def here(self) -> tuple[Tensor, Tensor]:
        """What is on this rank."""
        size = self.shapes[0].numel()
        return self.packed[:size].view(self.shapes[0]), self.packed[size:].view(self.shapes[1])

    def add(self, a: Tensor, b: Tensor) -> None:
        """To what is on this rank."""
        self.packed = self.packed + torch.cat([a.reshape(-1), b.reshape(-1)])

    def start(self, goes: bool, by: int = 1) -> None:
        """Send it so many ranks on, or leave it."""
        self.started = collectives.start_shift(self.packed, by, self.group, self.after) if goes else None

    def finish(self) -> None:
        """Take what came in its place."""
        if self.started is not None:
            self.packed = collectives.finish(self.started, tuple(self.packed.shape))
        self.started = None
