"""``spcompile::linear_attention``, one operator for the whole family: schema, kernel, fake and autograd.

It means the whole sequence and is right wherever it runs (eager, any backend). Inside the spcompile backend
the strategy replaces each call, forward and backward, by its sharded lowering.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spcompile._torch import differentiable
from spcompile.attention.softmax import check_shapes
from spcompile.kernels.linear.kernel import kernel_of
from spcompile.kernels.linear.operands import Operands, Options
from spcompile.kernels.scan import own_dtypes, state_dtype

__all__ = ["linear_attention", "linear_attention_backward"]


def _check(x: Operands, options: Options) -> None:
    """Refuse what is no linear attention, by the shapes."""
    q, k, v = x.q, x.k, x.v
    check_shapes("linear_attention", q, k, v)
    shapes = f"linear_attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.shape[1] != k.shape[1] or (options.causal and q.shape[2] != k.shape[2]):
        raise ValueError(f"{shapes}: heads or tokens differ")
    if not options.causal:
        if any(y is not None for y in x[3:]) or options.exclusive or options.reverse:
            raise ValueError(f"{shapes}: only a causal one has a decay, beta, an initial state or an order")
        return
    if x.log_decay is not None:
        given, full = x.log_decay.shape, k.shape
        if len(given) != 4 or any(g not in (1, f) for g, f in zip(given, full, strict=True)):
            raise ValueError(f"{shapes}: log_decay {list(given)} does not broadcast to {list(full)}")
    if x.beta is not None and x.beta.shape != (*k.shape[:3], 1):
        raise ValueError(f"{shapes}: beta is {list(x.beta.shape)}, not {[*k.shape[:3], 1]}")
    state = [*k.shape[:2], k.shape[3], v.shape[3]]
    if x.initial_state is not None and list(x.initial_state.shape) != state:
        raise ValueError(f"{shapes}: initial_state is {list(x.initial_state.shape)}, not {state}")


@torch.library.custom_op("spcompile::linear_attention", mutates_args=())
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    causal: bool,
    scale: float,
    exclusive: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Linear attention with any of the family's memory states.

        S_t = D_t S_{t-1} + k_t^T v_t                                       D_t = Diag(exp(log_decay_t))
        S_t = (I - beta_t k_t^T k_t) D_t S_{t-1} + beta_t k_t^T v_t         if beta is given (delta rule)
        out_t = scale * q_t S_t                                             (q_t S_{t-1} if exclusive)

    Args:
        q, k: ``[B, H, T, K]``, any float dtype; v: ``[B, H, T, V]``.
        log_decay: natural log of the decay, <= 0 (-inf forgets all), 4 dims, broadcastable to ``[B, H, T,
            K]``: ``[1, H, 1, 1]`` constant per head, ``[B, H, T, 1]`` per token, ``[B, H, T, K]`` diagonal.
            None: 1.
        beta: ``[B, H, T, 1]``, the delta rule's strength of writing.
        initial_state: S_0, ``[B, H, K, V]``; None: zero.
        causal: False lets every query see the state of all tokens; then there is no decay, beta or order.
        scale: factor of the scores.
        exclusive: a query sees the tokens before its own only, with the decays before its own.
        reverse: time runs from the last token to the first.
    Returns:
        out ``[B, H, T, V]`` in q's dtype and the state after the last token ``[B, H, K, V]``, float32
        (float64 for float64), both contiguous. Memory states and all sums are float32 (float64).
    Raises:
        ValueError: shapes or dtypes that disagree; the heads of q, k and v must be as many.
    """
    x = Operands(q, k, v, log_decay, beta, initial_state)
    options = Options(causal, scale, exclusive, reverse)
    _check(x, options)
    with own_dtypes(q):
        run = kernel_of(x, options).forward(x, options)
        run.local()
        out, final = run.finish(initial_state if causal else run.total()[-1])
        return out, final.clone(memory_format=torch.contiguous_format)


@linear_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    causal: bool,
    scale: float,
    exclusive: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    _check(Operands(q, k, v, log_decay, beta, initial_state), Options(causal, scale, exclusive, reverse))
    state = (*k.shape[:2], k.shape[3], v.shape[3])
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(state, dtype=state_dtype(q.dtype))


@torch.library.custom_op("spcompile::linear_attention_backward", mutates_args=())
def linear_attention_backward(
    grad: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    final: Tensor,
    causal: bool,
    scale: float,
    exclusive: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dlog_decay, dbeta, dinitial_state) of ``linear_attention`` from its inputs, its
    ``final`` state, ``grad`` ``[B, H, T, V]`` of out and ``grad_final`` of the final state; ``[0]`` for
    operands that are None.

    ``final`` is what a call that is not causal starts from. In a graph it says which forward this belongs to.
    """
    x, options = Operands(q, k, v, log_decay, beta, initial_state), Options(causal, scale, exclusive, reverse)
    with differentiable(), own_dtypes(q):
        run = kernel_of(x, options).backward(x, options, grad, initial_state if causal else final)
        run.local()
        carry = grad_final
        if not causal:
            (carry,) = run.total()
            carry = carry if grad_final is None else carry + grad_final
        return tuple(q.new_zeros(0) if g is None else g for g in run.finish(carry))


@linear_attention_backward.register_fake
def _(
    grad: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    final: Tensor,
    causal: bool,
    scale: float,
    exclusive: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, ...]:
    operands = (q, k, v, log_decay, beta, initial_state)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in operands)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.options = inputs[6:]
    ctx.save_for_backward(*inputs[:6], *output)


def _gradients(ctx: Any, grad: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
    *operands, out, final = ctx.saved_tensors
    nothing = (None,) * len(ctx.options)
    if grad is None and grad_final is None:
        return (None,) * 6 + nothing
    grad = torch.zeros_like(out) if grad is None else grad
    grads = torch.ops.spcompile.linear_attention_backward(grad, grad_final, *operands, final, *ctx.options)
    return *(None if x is None else g for x, g in zip(operands, grads, strict=True)), *nothing


linear_attention.register_autograd(_gradients, setup_context=_save)
