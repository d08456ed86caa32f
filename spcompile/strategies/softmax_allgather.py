"""LASP-2H: one all-gather of packed keys and values, one reduce-scatter of their packed gradients.

Under a window that is shorter than a shard a rank's rows see no more than the keys at its neighbours' edges:
then the edges alone are gathered, and the edges of the gradients on the way back (a halo).

Source: LASP-2, arXiv 2502.07563, section 3.4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile import collectives
from spcompile.collectives import Sequence
from spcompile.kernels.softmax.operands import Operands, Options
from spcompile.neighbours import give_back, neighbours
from spcompile.strategies.masking import masked, others

__all__ = ["AllGather"]


class _Reach(NamedTuple):
    """How many keys before and behind a rank's own its rows see."""

    left: int
    right: int


def _reach(x: Operands, options: Options, queries: Sequence | None, keys: Sequence | None) -> _Reach | None:
    """That of a window; None where all keys are gathered, or are there already: a prefix has any length.

    At P (left + right) tokens received the edges are the less as long as they are no whole block.
    """
    if options.window is None or x.prefixes is not None:
        return None
    if queries is None or keys is None or others(keys) is None:
        return None
    if queries.block != keys.block or queries.length != keys.length:
        return None
    far = options.window - 1
    reach = _Reach(far, 0 if options.causal else far)
    return reach if reach.left + reach.right < keys.block else None


class AllGather:
    """See :class:`spcompile.strategies.softmax.SoftmaxStrategy`; kv is ``[P*block, B, Hkv, K+V]``, or the
    neighbours' edges ``[left + right, B, Hkv, K+V]``."""

    @staticmethod
    def gather(
        x: Operands, options: Options, queries: Sequence | None, keys: Sequence | None
    ) -> Tensor | None:
        """Packed in one collective; None where keys and values are whole already, or a row sees but itself.

        Tokens come first, so that what the ranks send lies in the sequence's order and no copy follows.
        """
        group = others(keys)
        if group is None:
            return None
        reach = _reach(x, options, queries, keys)
        if reach is not None and reach.left + reach.right == 0:
            return None
        packed = _packed(x.k, x.v)
        if reach is None:
            return collectives.all_gather(packed, group).reshape(-1, *packed.shape[1:])
        return neighbours(packed, 0, *reach, group, collectives.rank(group, packed.device))

    @staticmethod
    def grows(kv: Tensor) -> bool:
        """All keys, or a window's edges."""
        return True

    @staticmethod
    def forward(
        x: Operands, options: Options, queries: Sequence | None, keys: Sequence | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """This rank's rows against all keys that they may see."""
        kv = AllGather.gather(x, options, queries, keys)
        x = _with_keys(x, kv, options, queries, keys)
        where = _where(x, options, queries, keys)
        if where is not None:
            local = torch.ops.spcompile.local_softmax_attention
            out, lse = local(*x[:4], options.scale, *where[:2], **_named(x, options), **where[2])
        else:
            whole = torch.ops.spcompile.softmax_attention
            out, lse = whole(*x[:4], options.causal, options.scale, *options[3:], *x[4:])
        return out, lse, kv

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
        """Gradients of all keys from this rank's rows, then each rank's own of their sum; that of a
        ``relative`` bias, if it is wanted, is a term of the sum over ranks."""
        x = _with_keys(x, kv, options, queries, keys)
        grad, q, out = masked(queries, 2, grad, x.q, out)
        (lse,) = masked(queries, 2, lse)
        mask = x.mask
        if mask is not None and mask.is_floating_point() and mask.dim() > 1 and mask.shape[-2] > 1:
            (mask,) = masked(queries, mask.dim() - 2, mask)
        saved = (grad, q, x.k, x.v, mask, out, lse)
        where = _where(x, options, queries, keys)
        if where is not None:
            local = _BACKWARD[relative][0]
            dq, dk, dv, *more = local(*saved, options.scale, *where[:2], **_named(x, options), **where[2])
        else:
            whole = _BACKWARD[relative][1]
            dq, dk, dv, *more = whole(*saved, options.causal, options.scale, *options[3:], *x[4:])
        if kv is not None:
            dk, dv = _given_back(dk, dv, x, options, queries, keys)
        return dq, dk, dv, *more


_BACKWARD = {
    False: (
        torch.ops.spcompile.local_softmax_attention_backward,
        torch.ops.spcompile.softmax_attention_backward,
    ),
    True: (
        torch.ops.spcompile.local_softmax_attention_relative_backward,
        torch.ops.spcompile.softmax_attention_relative_backward,
    ),
}
"""Of this rank's rows and of all rows, without and with the gradient of a relative bias."""


def _given_back(
    dk: Tensor, dv: Tensor, x: Operands, options: Options, queries: Sequence | None, keys: Sequence | None
) -> tuple[Tensor, Tensor]:
    """Each rank's own part of the gradients of all keys that its rows saw."""
    assert keys is not None
    reach = _reach(x, options, queries, keys)
    if reach is None:
        return _scatter_kv(dk, dv, keys, summed=others(queries) is not None)
    rank = collectives.rank(keys.group, dk.device)
    return _unpacked(give_back(_packed(dk, dv), *reach, keys.group, rank), dk.shape[3])


def _where(
    x: Operands, options: Options, queries: Sequence | None, keys: Sequence | None
) -> tuple[str, int, dict[str, int]] | None:
    """Where this rank's rows stand among the keys: the arguments of the operator that reads the rank; None
    where it is all the same."""
    group = others(queries)
    placed = options.causal or any(y is not None for y in (options.window, x.relative, *x.ids))
    if group is None or not placed:
        return None
    assert queries is not None
    reach = _reach(x, options, queries, keys)
    halo = {} if reach is None else {"length": queries.length, "reach": reach.left}
    return group.name, queries.block, halo


def _named(x: Operands, options: Options) -> dict[str, object]:
    """The options that are not the plain causal attention's."""
    given = options._asdict() | x._asdict()
    names = ("window", "soft_cap", "sinks", "documents", "relative", "prefixes")
    named: dict[str, object] = {name: given[name] for name in names if given[name] is not None}
    return named if options.causal else {"causal": False, **named}


def _packed(k: Tensor, v: Tensor) -> Tensor:
    """``[tokens, B, Hkv, K+V]``."""
    return torch.cat([k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)], dim=3)


def _unpacked(packed: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Contiguous ``[B, Hkv, tokens, K]`` and ``[..., V]``."""
    tokens_last = packed.permute(1, 2, 0, 3)
    return tokens_last[..., :size].contiguous(), tokens_last[..., size:].contiguous()


def _with_keys(
    x: Operands, kv: Tensor | None, options: Options, queries: Sequence | None, keys: Sequence | None
) -> Operands:
    """The operands with all keys and values, views ``[B, Hkv, length, *]`` without the padding; or with this
    rank's between its neighbours'."""
    if kv is None:
        return x
    assert keys is not None
    size, more = x.k.shape[3], kv.permute(1, 2, 0, 3)
    reach = _reach(x, options, queries, keys)
    if reach is None:
        more = more[:, :, : keys.length]
        return x._replace(k=more[..., :size], v=more[..., size:])
    left, right = more.narrow(2, 0, reach.left), more.narrow(2, reach.left, reach.right)
    k = torch.cat([left[..., :size], x.k, right[..., :size]], dim=2)
    v = torch.cat([left[..., size:], x.v, right[..., size:]], dim=2)
    return x._replace(k=k, v=v)


def _scatter_kv(dk: Tensor, dv: Tensor, sequence: Sequence, summed: bool) -> tuple[Tensor, Tensor]:
    """This rank's tokens of the gradients of all keys and values, ``[B, Hkv, block, *]``; padding is zero.

    ``summed``: each rank holds the term of its own queries, to be summed; otherwise (every rank computed all
    queries) each holds the whole gradient and takes its part.
    """
    packed = _packed(dk, dv)
    packed = F.pad(packed, (0, 0, 0, 0, 0, 0, 0, sequence.group.size * sequence.block - sequence.length))
    if summed:
        blocks = packed.reshape(sequence.group.size, sequence.block, *packed.shape[1:])
        own = collectives.reduce_scatter(blocks, sequence.group)
    else:
        own = packed[collectives.local_positions(sequence, packed.device)]
    return _unpacked(own, dk.shape[3])
