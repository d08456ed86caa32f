"""The softmax attention operators of the ``spcompile`` namespace: schema, kernel, fake and autograd of each.

They mean the whole sequence and are right wherever they run (eager, any backend). Inside the spcompile
backend the strategies replace each call, forward and backward, by its sharded lowering.

A strategy also emits ``local_softmax_attention``: this rank's rows against all keys, with the rank read at
run time. The backward operators give the gradients of q, k and v; that of the sinks follows from the results
by ordinary operators (``_sink_gradient``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile.collectives import current_rank
from spcompile.errors import SpcompileError
from spcompile.kernels.scan import state_dtype
from spcompile.kernels.softmax import rows
from spcompile.kernels.softmax.operands import Operands, Options

__all__ = [
    "Local",
    "check_shapes",
    "empty_like",
    "local",
    "local_softmax_attention",
    "local_softmax_attention_backward",
    "softmax_attention",
    "softmax_attention_backward",
]


def check_shapes(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse shapes that no attention has, by the operator's name and the shapes."""
    shapes = f"{name}: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise ValueError(f"{shapes}: expected [batch, heads, tokens, head size]")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{shapes}: batch, key size or tokens of keys and values disagree")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: the key heads must divide the query heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{name}: q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")


def _check_options(name: str, x: Operands, options: Options) -> None:
    q, sinks, window, soft_cap = x.q, x.sinks, options.window, options.soft_cap
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"{name}: sinks {list(sinks.shape)}: expected one per query head, {q.shape[1]}")
    if window is not None and window < 1:
        raise ValueError(f"{name}: a window of {window}: a row sees at least itself, 1")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{name}: a soft cap of {soft_cap}: expected a positive number")
    for role, ids in (("documents", x.documents), ("prefixes", x.prefixes)):
        if ids is None:
            continue
        b, _, s, _ = x.k.shape
        if ids.dim() != 2 or ids.shape[0] not in (1, b) or ids.shape[1] != s or q.shape[2] != s:
            raise ValueError(
                f"{name}: {role} {list(ids.shape)}: expected {[b, s]} or {[1, s]}, one number per token, "
                f"and as many queries as keys, not {q.shape[2]} and {s}"
            )
        if ids.dtype.is_floating_point or ids.dtype.is_complex:
            raise ValueError(f"{name}: {role} of {ids.dtype}: expected integers")
    if x.relative is not None:
        _check_relative(name, x, x.relative)


def _check_relative(name: str, x: Operands, relative: Tensor) -> None:
    heads, longest = x.q.shape[1], max(x.q.shape[2], x.k.shape[2])
    fits = relative.dim() == 2 and relative.shape[0] in (1, heads)
    if not fits or relative.shape[1] % 2 == 0 or relative.shape[1] < 2 * longest - 1:
        raise ValueError(
            f"{name}: relative {list(relative.shape)}: expected an entry for each distance from "
            f"{1 - longest} to {longest - 1}, of each of {heads} heads or of all"
        )
    if not relative.dtype.is_floating_point:
        raise ValueError(f"{name}: relative of {relative.dtype}: expected floats")


# ---- softmax ----


@torch.library.custom_op("spcompile::softmax_attention", mutates_args=())
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    documents: Tensor | None = None,
    relative: Tensor | None = None,
    prefixes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention, ``out_i = sum_j softmax_j(s_ij + mask_ij) v_j`` with ``s_ij = scale * q_i k_j``.

    Args:
        q: queries ``[B, H, T, K]``, any float dtype.
        k: keys ``[B, Hkv, S, K]``; Hkv divides H and query head h uses key head ``h // (H // Hkv)``.
        v: values ``[B, Hkv, S, V]``.
        mask: None, bool (True = may see) or additive, broadcastable to ``[B, H, T, S]``; it gets no gradient.
        causal: key j is visible to query i only if ``j <= i``.
        scale: factor of the scores.
        window: key j is visible to query i only if ``|i - j| < window``.
        soft_cap: scores are ``soft_cap * tanh(s_ij / soft_cap)``, before the mask.
        sinks: ``[H]``, any float dtype: a logit beside those of the keys in each row of a head, whose weight
            is dropped: ``softmax_j`` is of ``[s_i0, s_i1, ..., sink_h]``.
        documents: ``[B, S]`` or ``[1, S]``, integers, with T = S: key j is visible to query i only if
            ``documents_i == documents_j``. The ids need not ascend; where they do, other documents cost no
            time.
        relative: ``[H, 2 L - 1]`` or ``[1, 2 L - 1]``, any float dtype, L at least T and S: entry
            ``L - 1 + i - j`` is added to s_ij (behind a soft cap).
        prefixes: ``[B, S]`` or ``[1, S]``, integers, with T = S: tokens of one number >= 0 see each other
            whatever ``causal`` and ``window`` say (the prefix of a prefix language model, an image's tokens).
    Returns:
        out ``[B, H, T, V]`` in q's dtype, and lse ``[B, H, T]``, natural log, float32 (float64 for
        float64), which is not differentiable. Both contiguous. A query that may see no key (False or -inf
        everywhere) gets out 0, lse -inf (the sink, if there is one) and no gradient, as in
        ``scaled_dot_product_attention``; ``torch.softmax`` would make it NaN.
    Raises:
        ValueError: shapes or dtypes that disagree; a window or a soft cap that is not positive.
        SpcompileError: the mask requires a gradient.
    """
    x, options = (
        Operands(q, k, v, mask, sinks, documents, relative, prefixes),
        Options(causal, scale, 0, window, soft_cap),
    )
    check_shapes("softmax_attention", q, k, v)
    _check_options("softmax_attention", x, options)
    return rows.forward(x, options)


def _fake_softmax(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    wide = state_dtype(q.dtype)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


def empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)


@softmax_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    documents: Tensor | None = None,
    relative: Tensor | None = None,
    prefixes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_shapes("softmax_attention", q, k, v)
    x, options = (
        Operands(q, k, v, mask, sinks, documents, relative, prefixes),
        Options(causal, scale, 0, window, soft_cap),
    )
    _check_options("softmax_attention", x, options)
    return _fake_softmax(q, v)


@torch.library.custom_op("spcompile::softmax_attention_backward", mutates_args=())
def softmax_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    documents: Tensor | None = None,
    relative: Tensor | None = None,
    prefixes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of ``softmax_attention`` from its inputs, its results and ``grad`` of out."""
    options = Options(causal, scale, 0, window, soft_cap)
    return rows.backward(
        grad, Operands(q, k, v, mask, sinks, documents, relative, prefixes), out, lse, options
    )


@softmax_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    return empty_like(q, k, v)


def _save_softmax(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, *ctx.options, sinks, documents, relative, prefixes = inputs
    out, lse = output
    if ctx.needs_input_grad[3]:
        raise SpcompileError(
            "softmax_attention: the mask requires a gradient, which is not computed. "
            "Remedy: detach the mask, or write this attention with torch.softmax."
        )
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, mask, out, lse, sinks, documents, relative, prefixes)


def _softmax_gradients(ctx: Any, grad: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, sinks, documents, relative, prefixes = ctx.saved_tensors
    given = [*ctx.options, sinks, documents, relative, prefixes]
    while given[-1] is None and len(given) > len(ctx.options):
        given.pop()  # what there is not is not in the graph
    drelative = None
    if relative is not None and ctx.needs_input_grad[10]:
        *grads, drelative = torch.ops.spcompile.softmax_attention_relative_backward(grad, *saved, *given)
    else:
        grads = torch.ops.spcompile.softmax_attention_backward(grad, *saved, *given)
    dsinks = None
    if sinks is not None and ctx.needs_input_grad[8]:
        dsinks = _sink_gradient(grad, saved[4], saved[5], sinks)
    return *grads, None, None, None, None, None, dsinks, None, drelative, None


def _sink_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """dsink_h = - sum over batch and rows of p_sink (dO . out), p_sink = exp(sink - lse)."""
    weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    common = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return -(weight * common).sum((0, 2)).to(sinks.dtype)


softmax_attention.register_autograd(_softmax_gradients, setup_context=_save_softmax)


# ---- softmax, this rank's rows ----


class Local(NamedTuple):
    """This rank's rows and the keys that are given, as positions of one sequence."""

    x: Operands
    options: Options
    first: int
    """Which of the keys given is the first that is there."""

    def back(self, dk: Tensor, dv: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        """Gradients of all ``keys`` that were given, 0 where one is not there."""
        there = self.x.k.shape[2]
        if there == keys:
            return dk, dv
        pad = (0, 0, self.first, keys - self.first - there)
        return F.pad(dk, pad), F.pad(dv, pad)


def local(
    x: Operands, options: Options, group: str, block: int, length: int, reach: int | None, ring: int | None
) -> Local:
    """Place this rank's rows among the keys; of other ranks' keys, drop what lies outside of the sequence."""
    row = current_rank(group) * block
    if reach is None:
        return Local(x, options._replace(first_row=row), 0)
    begin = row - reach
    begin += ring if ring is not None and begin < 0 else 0
    first, end = max(0, begin), min(length, begin + x.k.shape[2])
    count = max(0, end - first)
    first = first if count else begin
    k, v = (y.narrow(2, first - begin, count) for y in x[1:3])
    mask, documents = x.mask, x.documents
    if mask is not None and mask.shape[-1] > 1:
        mask = mask[..., first : first + count]
    if documents is not None:
        documents = documents[:, first : first + count]
    x = x._replace(k=k, v=v, mask=mask, documents=documents)
    return Local(x, options._replace(first_row=row - first), first - begin)


@torch.library.custom_op("spcompile::local_softmax_attention", mutates_args=())
def local_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    group: str,
    block: int,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    length: int = 0,
    reach: int | None = None,
    documents: Tensor | None = None,
    relative: Tensor | None = None,
    prefixes: Tensor | None = None,
    ring: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of this rank's query rows where the position says what a row may see.

    Row i of ``q`` is token ``rank * block + i``, so the work of rank r is that of its visible keys; the rank
    of the process in ``group`` is read at run time and no mask of rows x keys is built.

    Args:
        q: this rank's queries ``[B, H, block, K]``.
        k, v: all keys and values ``[B, Hkv, S, *]``; or, where ``reach`` is given, this rank's and those of
            its neighbours: the positions from ``rank * block - reach`` on, of which those before 0 and from
            ``length`` on are not there, whatever they hold.
        ring: where the keys given are those of one rank, so many positions on: of all ranks, for what would
            be before 0 then follows from the end; or 0, where rows do not see what is behind them.
        mask: None, or these rows' mask, broadcastable to ``[B, H, block, S]`` with the columns of all keys.
        group: registered name of the process group along the sequence.
        block: tokens per rank.
        causal, scale, window, soft_cap, sinks: as in ``softmax_attention``.
        documents, prefixes: of the tokens of all ranks, ``[B, S]`` or ``[1, S]``.
        relative: for all distances between tokens of all ranks.
    Returns:
        out and lse of these rows, as in ``softmax_attention``.
    """
    options = Options(causal, scale, 0, window, soft_cap)
    here = local(
        Operands(q, k, v, mask, sinks, documents, relative, prefixes),
        *(options, group, block, length, reach, ring),
    )
    return rows.forward(here.x, here.options)


@local_softmax_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _fake_softmax(q, v)


@torch.library.custom_op("spcompile::local_softmax_attention_backward", mutates_args=())
def local_softmax_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    group: str,
    block: int,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    length: int = 0,
    reach: int | None = None,
    documents: Tensor | None = None,
    relative: Tensor | None = None,
    prefixes: Tensor | None = None,
    ring: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``local_softmax_attention``: dq of these rows; dk, dv of the keys given from just these
    rows, 0 where a key is not there. In a ``ring`` out and lse are those of all keys."""
    options = Options(causal, scale, 0, window, soft_cap)
    here = local(
        Operands(q, k, v, mask, sinks, documents, relative, prefixes),
        *(options, group, block, length, reach, ring),
    )
    dq, dk, dv = rows.backward(grad, here.x, out, lse, here.options, part=ring is not None)
    return dq, *here.back(dk, dv, k.shape[2])


@local_softmax_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    return empty_like(q, k, v)
