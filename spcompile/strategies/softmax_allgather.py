"""LASP-2H: one all-gather of packed keys and values, one reduce-scatter of their packed gradients.

Source: LASP-2, arXiv 2502.07563, section 3.4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile import collectives
from spcompile.collectives import Sequence
from spcompile.kernels.softmax.operands import Operands, Options
from spcompile.strategies.masking import masked, others

__all__ = ["AllGather"]


class AllGather:
    """See :class:`spcompile.strategies.softmax.SoftmaxStrategy`; kv is ``[P*block, B, Hkv, K+V]``."""

    @staticmethod
    def gather(x: Operands, keys: Sequence | None) -> Tensor | None:
        """Packed in one collective; None where keys and values are whole already.

        Tokens come first, so that what the ranks send lies in the sequence's order and no copy follows.
        """
        group = others(keys)
        if group is None:
            return None
        packed = torch.cat([x.k.permute(2, 0, 1, 3), x.v.permute(2, 0, 1, 3)], dim=3)
        return collectives.all_gather(packed, group).reshape(-1, *packed.shape[1:])

    @staticmethod
    def forward(
        x: Operands, options: Options, queries: Sequence | None, keys: Sequence | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """This rank's rows against all keys."""
        kv = AllGather.gather(x, keys)
        x = _with_all_keys(x, kv, keys)
        if options.causal and (group := others(queries)) is not None:
            assert queries is not None
            local = torch.ops.spcompile.local_softmax_attention
            out, lse = local(*x, options.scale, group.name, queries.block)
        else:
            out, lse = torch.ops.spcompile.softmax_attention(*x, options.causal, options.scale)
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of all keys from this rank's rows, then each rank's own of their sum."""
        x = _with_all_keys(x, kv, keys)
        grad, q, out = masked(queries, 2, grad, x.q, out)
        (lse,) = masked(queries, 2, lse)
        mask = x.mask
        if mask is not None and mask.is_floating_point() and mask.dim() > 1 and mask.shape[-2] > 1:
            (mask,) = masked(queries, mask.dim() - 2, mask)
        group = others(queries)
        saved = (grad, q, x.k, x.v, mask, out, lse)
        if options.causal and group is not None:
            assert queries is not None
            local = torch.ops.spcompile.local_softmax_attention_backward
            dq, dk, dv = local(*saved, options.scale, group.name, queries.block)
        else:
            whole = torch.ops.spcompile.softmax_attention_backward
            dq, dk, dv = whole(*saved, options.causal, options.scale)
        if kv is None:
            return dq, dk, dv
        assert keys is not None
        dk, dv = _scatter_kv(dk, dv, keys, summed=group is not None)
        return dq, dk, dv


def _with_all_keys(x: Operands, kv: Tensor | None, keys: Sequence | None) -> Operands:
    """The operands with views ``[B, Hkv, length, *]`` of all keys and values, without the padding."""
    if kv is None:
        return x
    assert keys is not None
    size, all_kv = x.k.shape[3], kv[: keys.length].permute(1, 2, 0, 3)
    return x._replace(k=all_kv[..., :size], v=all_kv[..., size:])


def _scatter_kv(dk: Tensor, dv: Tensor, sequence: Sequence, summed: bool) -> tuple[Tensor, Tensor]:
    """This rank's tokens of the gradients of all keys and values, ``[B, Hkv, block, *]``; padding is zero.

    ``summed``: each rank holds the term of its own queries, to be summed; otherwise (every rank computed all
    queries) each holds the whole gradient and takes its part.
    """
    packed = torch.cat([dk.permute(2, 0, 1, 3), dv.permute(2, 0, 1, 3)], dim=3)
    packed = F.pad(packed, (0, 0, 0, 0, 0, 0, 0, sequence.group.size * sequence.block - sequence.length))
    if summed:
        blocks = packed.reshape(sequence.group.size, sequence.block, *packed.shape[1:])
        own = collectives.reduce_scatter(blocks, sequence.group)
    else:
        own = packed[collectives.local_positions(sequence, packed.device)]
    own = own.permute(1, 2, 0, 3)
    return own[..., : dk.shape[3]].contiguous(), own[..., dk.shape[3] :].contiguous()
