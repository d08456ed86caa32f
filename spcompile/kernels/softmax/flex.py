"""Softmax attention by PyTorch's FlexAttention, on NVIDIA GPUs: what flash attention refuses there.

That is float32, a mask that is data, windows, documents, prefixes, biases, soft caps. FlexAttention is told
of a call by three things:

- ``mask_mod``, whether row i may see key j: the band of the options, prefixes, documents, and a bool mask's
  entry;
- ``score_mod``, what becomes of a score: a soft cap; a mask's entry and a relative bias's are added;
- a block mask: which blocks of 128 rows by 128 keys are looked at, and in which ``mask_mod`` is asked.

They are built inside the compiled function from tensors, this rank's first row among them, so that one piece
of code serves all ranks and lengths, and no number is read back from the GPU. Of an R x S mask there is no
second copy: a block mask has an entry for each block.

NOTE [The largest entry of a row is taken off an additive mask]
A row whose entries are all ``finfo.min`` is a softmax of its scores after rounding (mostly uniform), and one
with -1e4 everywhere has lost digits of its scores, but not the distribution. The kernel's exp2(1.44 * x)
overflows for the first, and a log-sum-exp of -3e38 or -1e4 does not say the weights: exp(x - lse) is off, for
the first by the number of keys. So with top_i the largest entry that row i sees the kernel is given

    x_ij = (scale * q_i k_j + mask_ij) - top_i          lse_i = top_i + log sum_j exp(x_ij)

which rounds as the sum alone does. The backward needs the log-sum-exp of x itself: lse - top where top is
moderate, and for the blocks that hold other rows a second forward. Nothing is asked of the host. A sink is
one more exponential in both: exp(sink - top_i).
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from spcompile import _torch
from spcompile.kernels.choice import without_triton
from spcompile.kernels.scan import own_dtypes
from spcompile.kernels.softmax.flex_told import BLOCK, Given, blocks_of, given_of, modifications
from spcompile.kernels.softmax.operands import Operands, Options, with_sinks

__all__ = ["backward", "forward", "or_blocks", "programs", "refuses"]

# Where the largest entry of a row is beyond it, lse - top is not found by subtraction.
_MODERATE = 64.0

# What the kernels take: head sizes, kinds of numbers, and entries that they index by 32 bits.
_SMALLEST, _LARGEST = 16, 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 2**31 - 1

# Options and operands that may be left out and that this file has a line for.
_KNOWN = frozenset({"first_row", "window", "soft_cap", "mask", "sinks", "documents", "relative", "prefixes"})

# Of the choices of PyTorch's kernels the plain one. The backward is given what a forward would write down.
_FORWARD = {"BACKEND": "TRITON"}
# Products of float32 where nobody allowed TF32: by three TF32 products, as our own kernels have them.
# PyTorch's choice, "ieee", leaves the tensor cores unused, and spills (heads of 128: 6,936 bytes, not 240).
_PRECISE = {"FLOAT32_PRECISION": "'tf32x3'"}
_BACKWARD = {
    "BACKEND": "TRITON",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}


def refuses(x: Operands, options: Options) -> str:
    """Why the kernel does not take such a call, for the report; empty if it does."""
    q, mask = x.q, x.mask
    if q.numel() == 0 or x.k.numel() == 0:
        return "no tokens"
    reason = without_triton(q.device)
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "a GPU before sm_80"
    if q.dtype not in _DTYPES:
        return f"{str(q.dtype).removeprefix('torch.')}, not float32, bfloat16 or float16"
    sizes = q.shape[3], x.v.shape[3]
    if max(sizes) > _LARGEST or min(sizes) < _SMALLEST:
        return f"heads of {sizes[0]} and {sizes[1]} numbers, not {_SMALLEST} to {_LARGEST}"
    if mask is not None and _torch.statically_known_true(mask.numel() > _MOST):
        return "a mask of more than 2^31 entries"
    told, defaults = options._asdict() | x._asdict(), options._field_defaults | x._field_defaults
    unknown = [n for n, default in defaults.items() if n not in _KNOWN and told[n] is not default]
    if unknown:
        return f"{', '.join(unknown)}: not known to FlexAttention"
    return _failed.get(_kind(x, options), "") if _failed else ""


# ---- the programs that are compiled ----


class _Call(NamedTuple):
    """Options, and those of PyTorch's kernels."""

    options: Options
    forward: dict[str, Any]
    backward: dict[str, Any]


def _attend(
    call: _Call, q: Tensor, k: Tensor, v: Tensor, given: Given, blocks: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """out and the log-sum-exp of what ``score_mod`` returns."""
    mask_mod, score_mod = modifications(call.options, given)
    lengths = q.shape[2], k.shape[2]
    of_rows = {"mask_mod": mask_mod, "seq_lengths": lengths, "compute_q_blocks": False}
    block_mask = BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, **of_rows)
    more = {"scale": call.options.scale, "enable_gqa": True, "return_aux": AuxRequest(lse=True)}
    out, aux = flex_attention(q, k, v, score_mod, block_mask, kernel_options=call.forward, **more)
    return out, aux.lse


def _lse(
    call: _Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    given: Given,
    blocks: tuple[Tensor, ...],
) -> Tensor:
    """The log-sum-exp of what ``score_mod`` returns, from that of the scores (NOTE above)."""
    if given.top is None:
        return lse
    again = (given.top.abs() > _MODERATE).squeeze(-1).expand(-1, -1, q.shape[2])
    in_block = F.pad(again, (0, -q.shape[2] % BLOCK)).unflatten(-1, (-1, BLOCK)).any(-1)
    part, part_at, whole, whole_at = blocks
    few = torch.where(in_block, part, 0), part_at, torch.where(in_block, whole, 0), whole_at
    _, found = _attend(call, q, k, v, given, few)
    top = given.top.squeeze(-1)
    if sinks is not None:
        found = torch.logaddexp(found, sinks.to(found.dtype)[:, None] - top)
    return torch.where(again, found, lse - top)


def _gradients(call: _Call) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """FlexAttention's backward as one function of tensors, which Dynamo does not look into.

    Its modifications are functions of the tensors that they read as well.
    """

    def gradients(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        first: Tensor,
        mask: Tensor | None,
        top: Tensor | None,
        documents: Tensor | None,
        relative: Tensor | None,
        prefixes: Tensor | None,
        *blocks: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = first, mask, top, documents, relative, prefixes
        there = [x is not None for x in given]
        tensors = tuple(x for x in given if x is not None)

        def of(tensors: tuple[Tensor, ...]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
            fresh = iter(tensors)
            return modifications(call.options, Given(*(next(fresh) if x else None for x in there)))

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor, *tensors: Tensor) -> Tensor:
            return of(tensors)[0](b, h, i, j)

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *tensors: Tensor) -> Tensor:
            return of(tensors)[1](score, b, h, i, j)

        def back(
            score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, grad: Tensor, *tensors: Tensor
        ) -> list[Tensor | None]:
            """Gradients of score_mod's arguments: masks and biases get none."""
            cap = call.options.soft_cap
            grad = grad if cap is None else grad * (1 - torch.tanh(score / cap).square())
            return [grad, *[None] * (4 + len(tensors))]

        lengths = q.shape[2], k.shape[2]
        described = BlockMask.from_kv_blocks(
            *blocks, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=lengths
        )
        what = q, k, v, out, lse, grad, None, score_mod, back, described.as_tuple()
        how = call.options.scale, dict(call.backward), tensors, tensors
        return _torch.flex_attention_backward(*what, *how)[:3]

    return torch.compiler.allow_in_graph(gradients)


def programs(options: Options, precise: bool = False) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward as functions of tensors; ``options.first_row`` is not read, ``first`` is.

    Args:
        precise: float32 is multiplied by three products of TF32.
    """
    how = _PRECISE if precise else {}
    call = _Call(options, _FORWARD | how, _BACKWARD | how)
    gradients = _gradients(call)

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
        documents: Tensor | None,
        relative: Tensor | None,
        prefixes: Tensor | None,
        first: Tensor,
    ) -> tuple[Tensor, Tensor]:
        given = given_of(options, q, k, mask, Given(first, None, None, documents, relative, prefixes))
        out, lse = _attend(call, q, k, v, given, blocks_of(options, q, k, given))
        lse = lse if given.top is None else lse + given.top.squeeze(-1)
        if sinks is not None:
            out, lse = with_sinks(out, lse, sinks)
        return out.contiguous(), lse.contiguous()

    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
        documents: Tensor | None,
        relative: Tensor | None,
        prefixes: Tensor | None,
        first: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, ...]:
        given = given_of(options, q, k, mask, Given(first, None, None, documents, relative, prefixes))
        blocks = blocks_of(options, q, k, given)
        lse = _lse(call, q, k, v, lse, sinks, given, blocks) * math.log2(math.e)  # as the kernel has it
        return tuple(x.contiguous() for x in gradients(grad, q, k, v, out, lse, *given, *blocks))

    return forward, backward


class _Kind(NamedTuple):
    """What the code of a call depends on; lengths and the batch are found out by Dynamo."""

    options: Options
    device: torch.device
    dtype: torch.dtype
    sizes: tuple[int, ...]  # query heads, key heads, sizes of keys and of values
    mask: tuple[Any, ...]  # dtype, and which dims are broadcast
    precise: bool  # float32, and TF32 is not allowed
    sinks: tuple[Any, ...] = ()  # as the mask
    documents: tuple[Any, ...] = ()
    relative: tuple[Any, ...] = ()
    prefixes: tuple[Any, ...] = ()


def _kind(x: Operands, options: Options) -> _Kind:
    sizes = x.q.shape[1], x.k.shape[1], x.k.shape[3], x.v.shape[3]
    mask = () if x.mask is None else (x.mask.dtype, *(size == 1 for size in x.mask.shape))
    precise = x.q.dtype == torch.float32 and not _tf32() and max(sizes[2:]) <= 128 and _holds(x.q.device)
    more = (() if y is None else (y.dtype, y.shape[0] == 1) for y in x[4:])
    return _Kind(options._replace(first_row=0), x.q.device, x.q.dtype, sizes, mask, precise, *more)


def _holds(device: torch.device) -> bool:
    """Whether the tiles that three products need are known to fit: on sm_80 heads of 128 take 229 KB."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)


def _tf32() -> bool:
    """Whether the user allows products of float32 by TF32, as PyTorch's matrix products on a GPU ask."""
    chosen = torch.backends.cuda.matmul.fp32_precision
    return chosen == "tf32" if chosen != "none" else torch.get_float32_matmul_precision() != "highest"


@functools.cache
def _compiled(kind: _Kind) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The programs of a kind.

    Dynamo counts recompilations, and learns which sizes vary, by code object: each kind has its own.
    """
    number, found = len(_seen), []
    _seen.append(kind)
    for program in programs(kind.options, kind.precise):
        name = f"flex_{program.__name__}_{number}"
        code = program.__code__.replace(co_name=name)
        own = types.FunctionType(code, program.__globals__, name, program.__defaults__, program.__closure__)
        found.append(torch.compile(own, fullgraph=True))
    return found[0], found[1]


_seen: list[_Kind] = []
_failed: dict[_Kind, str] = {}


def _run(which: int, x: Operands, options: Options, tensors: tuple[Tensor | None, ...]) -> Any:
    # Inside an operator autograd's keys are off, and block masks are made with vmap, whose trace needs them.
    with _torch.differentiable(), torch.no_grad(), own_dtypes(x.q):
        return _compiled(_kind(x, options))[which](*(y if y is None else y.detach() for y in tensors))


def _first(x: Operands, options: Options) -> Tensor:
    return torch.full((), options.first_row, dtype=torch.int32, device=x.q.device)


def forward(x: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """As :func:`.blockwise.forward`."""
    return _run(0, x, options, (*x, _first(x, options)))


def backward(
    grad: Tensor, x: Operands, out: Tensor, lse: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the saved ``out`` and ``lse``: dq, dk, dv contiguous, each in its input's dtype."""
    return _run(1, x, options, (grad, *x, _first(x, options), out, lse))


@contextlib.contextmanager
def or_blocks(x: Operands, options: Options) -> Iterator[None]:
    """Go on behind the block, once with a warning, where FlexAttention cannot be compiled for such a call.

    It is compiled when it is first called, for a GPU that the report's reasons may not know well enough. Out
    of memory, and errors of the device itself, are raised.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as why:
        kind = _kind(x, options)
        said = f"{type(why).__name__}: {str(why).strip()[:300]}"
        _failed[kind] = f"FlexAttention failed: {type(why).__name__}"
        warnings.warn(
            f"spcompile: FlexAttention failed for {kind}, which goes on in blocks of ATen operators, slower. "
            f"Please report it: {said}",
            stacklevel=2,
        )
