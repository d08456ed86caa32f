"""Causal linear attention of every variant in chunks, as batched ATen matmuls that Inductor fuses around.

``intra.py`` says what a chunk does: S_after = A S_before + B and out = intra + queries S_before. Here the
chunks are chained, forward and backward, cut where a rank needs other ranks (``kernel.py``):

    made     what each chunk does to the state
    total    what all of them together do: the summary that ranks exchange
    local    the intra-chunk work, which needs no communication and is what the exchange hides behind
    finish   the states before each chunk, from the state ``carry`` before the first one

With R_c the gradient of the state after chunk c, R_{c-1} = A_c^T R_c + queries_c^T do_c, the gradients of
what a chunk does are

    d intra = do      d queries_c = do_c S_{c-1}^T      dB_c = R_c      dA_c = R_c S_{c-1}^T

and those of the tokens follow by differentiating the functions of ``intra.py``, for every variant alike.

Shapes: N = B*H, n chunks, C tokens per chunk; memory and work are linear in T, and the graph has the same
size for any T: the only loop, over chunks, is inside ``spcompile::affine_scan``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile._torch import statically_known_true
from spcompile.kernels.linear.intra import Tokens, outputs, transition, written
from spcompile.kernels.linear.operands import Operands, Options
from spcompile.kernels.scan import state_dtype

__all__ = ["CHUNK", "Backward", "Forward", "chunk_length", "cut", "uncut"]

# Tokens per chunk. Scores take T*C elements and states T*K*V/C. CPU milliseconds of forward and backward by
# Inductor on one core, T = 4096 and H*K = 512, for C = 32, 64, 128, 256:
#     K = V = 64:  94, 91, 112, 137      K = V = 128:  108, 95, 108, 142      K = V = 256:  189, 164, 163, 193
CHUNK = 64

# From this head size on, a chunk of 128 is as fast and halves the memory of the states.
_WIDE = 256


def chunk_length(x: Operands) -> int:
    """Tokens per chunk, a power of two, hardly more than there are."""
    wide = x.beta is None and x.k.shape[3] * x.v.shape[3] >= _WIDE**2
    tokens, most = x.k.shape[2], 2 * CHUNK if wide else CHUNK
    if isinstance(tokens, torch.SymInt):
        return most  # however few there are
    return min(most, 1 << (max(1, tokens) - 1).bit_length())


def cut(x: Tensor, chunk: int, reverse: bool) -> Tensor:
    """Cut ``[B, H, T, D]`` into chunks ``[B*H, ceil(T/chunk), chunk, D]`` in the state dtype.

    A last chunk that is not full is filled with zeros, which do nothing to the state: no key, no decay.
    """
    b, h, t, d = x.shape
    x = x.to(state_dtype(x.dtype))
    x = x.flip(2) if reverse else x
    n = (t + chunk - 1) // chunk
    if not statically_known_true(t == n * chunk):
        x = F.pad(x, (0, 0, 0, n * chunk - t))
    return x.reshape(b * h, n, chunk, d)


def uncut(x: Tensor, like: Tensor, reverse: bool) -> Tensor:
    """Chunks ``[B*H, n, C, D]`` back to tokens ``[B, H, T, D]`` of the B, H and T of ``like``."""
    b, h, t, _ = like.shape
    x = x.reshape(b, h, -1, x.shape[-1])[:, :, :t]
    return x.flip(2) if reverse else x


class _Run:
    """The tokens of a call, in chunks."""

    def __init__(self, x: Operands, options: Options) -> None:
        self.x, self.options = x, options
        self.chunk = chunk_length(x)
        self.matrix = x.beta is not None
        g = x.log_decay
        if g is not None:
            g = self.cut(g.expand(*x.k.shape[:3], g.shape[3]))
        beta = None if x.beta is None else self.cut(x.beta)
        self.tokens = Tokens(self.cut(x.q) * options.scale, self.cut(x.k), self.cut(x.v), g, beta)

    def cut(self, tensor: Tensor) -> Tensor:
        """``[B, H, T, D]`` in chunks, in the order of time."""
        return cut(tensor, self.chunk, self.options.reverse)

    def heads(self, state: Tensor) -> Tensor:
        """A state ``[N, ...]`` as ``[B, H, ...]``."""
        return state.reshape(*self.x.q.shape[:2], *state.shape[1:])

    def flat(self, state: Tensor | None) -> Tensor | None:
        """A state ``[B, H, ...]`` as ``[N, ...]`` in the state dtype."""
        return None if state is None else state.flatten(0, 1).to(self.tokens.k.dtype)

    def scan(
        self, a: Tensor | None, b: Tensor, initial: Tensor | None, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """States ``[N, n, K, V]`` before each chunk, and the one ``[N, K, V]`` after the last."""
        return torch.ops.spcompile.affine_scan(a, b, initial, a is not None and self.matrix, reverse)

    def summary(self, a: Tensor | None, b: Tensor, reverse: bool = False) -> tuple[Tensor, ...]:
        """What all chunks together do to the state, ``[B, H, ...]``: (B), (sum of log decays, B) or (A, B).

        ``reverse``: from the last chunk to the first.
        """
        if a is None:
            return (self.heads(b.sum(1)),)
        if self.matrix:
            k, v = b.shape[-2:]
            eye = torch.eye(k, dtype=b.dtype, device=b.device).expand(b.shape[0], k, k)
            start = torch.cat([torch.zeros_like(b[:, 0]), eye], -1)
            after = self.scan(a, F.pad(b, (0, k)), start, reverse)[1]
            return self.heads(after[..., v:]), self.heads(after[..., :v])
        assert self.tokens.g is not None
        logs = self.tokens.g.sum(-2).unsqueeze(-1)  # [N, n, 1 or K, 1]
        order = logs if reverse else logs.flip(1)
        beyond = F.pad(order.cumsum(1)[:, :-1], (0, 0, 0, 0, 1, 0))
        beyond = (beyond if reverse else beyond.flip(1)).exp()
        return self.heads(logs.sum(1)), self.heads((beyond * b).sum(1))


class Forward(_Run):
    """See :class:`spcompile.kernels.linear.kernel.Forward`."""

    def __init__(self, x: Operands, options: Options) -> None:
        super().__init__(x, options)
        _, k, v, g, beta = self.tokens
        self._written = written(k, v, g, beta)
        self.a, self.b = transition(k, g, *self._written)

    def total(self) -> tuple[Tensor, ...]:
        """What this run of tokens does to the state: the summary that ranks exchange."""
        return self.summary(self.a, self.b)

    def local(self) -> None:
        """The part that needs no other rank."""
        q, k, _, g, _ = self.tokens
        self.intra, self.queries = outputs(q, k, g, *self._written, self.options.exclusive)

    def finish(self, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs ``[B, H, T, V]`` in q's dtype and the state ``[B, H, K, V]`` after the last token, from the
        state ``carry`` before the first (None: zero)."""
        before, after = self.scan(self.a, self.b, self.flat(carry))
        out = self.intra + self.queries @ before
        out = uncut(out, self.x.q, self.options.reverse)
        return out.to(self.x.q.dtype).contiguous(), self.heads(after)


Gradients = list[Tensor | None]


def _vjp(
    function: Callable[..., tuple[Tensor | None, ...]], *given: Tensor | None
) -> tuple[tuple[Tensor | None, ...], Callable[..., Gradients]]:
    """The results of ``function``, and what maps their gradients to those of ``given``; None stays None."""
    there: list[bool] = []

    def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
        fresh = iter(tensors)
        results = function(*(None if x is None else next(fresh) for x in given))
        there[:] = [x is not None for x in results]
        return tuple(x for x in results if x is not None)

    made, pull = torch.func.vjp(of_tensors, *(x for x in given if x is not None))
    results = iter(made)

    def back(*grads: Tensor | None) -> Gradients:
        fresh = iter(pull(tuple(x for x in grads if x is not None)))
        return [None if x is None else next(fresh) for x in given]

    return tuple(next(results) if is_there else None for is_there in there), back


def _sum(*terms: Tensor | None) -> Tensor | None:
    given = [x for x in terms if x is not None]
    return reduce(torch.add, given) if given else None


class Backward(_Run):
    """See :class:`spcompile.kernels.linear.kernel.Backward`.

    The gradient of what a chunk gives out is known at once, that of what it does to the state needs the later
    ranks': the two halves are differentiated each by itself.
    """

    def __init__(self, x: Operands, options: Options, grad: Tensor, carry: Tensor | None) -> None:
        super().__init__(x, options)
        (q, k, v, g, beta), exclusive = self.tokens, self.options.exclusive
        (u, w), self._of_written = _vjp(written, k, v, g, beta)
        (self.a, b), self._of_transition = _vjp(transition, k, g, u, w)
        given, self._of_outputs = _vjp(partial(outputs, exclusive=exclusive), q, k, g, u, w)
        assert b is not None and given[1] is not None
        self.grad = self.cut(grad)
        self.before, _ = self.scan(self.a, b, self.flat(carry))
        self.back = self.a if self.a is None or not self.matrix else self.a.mT
        self.states = given[1].mT @ self.grad

    def total(self) -> tuple[Tensor, ...]:
        """What this run of tokens does to the gradient of the state, from its last token to its first."""
        return self.summary(self.back, self.states, reverse=True)

    def local(self) -> None:
        """The gradients that need no later rank."""
        self._local = self._of_outputs(self.grad, self.grad @ self.before.mT)

    def finish(self, carry: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the operands, None for those that are None, from the gradient ``carry`` of the state
        after the last token (None: zero)."""
        after, initial = self.scan(self.back, self.states, self.flat(carry), reverse=True)
        of_a = None
        if self.a is not None and self.matrix:
            of_a = after @ self.before.mT
        elif self.a is not None:
            of_a = (after * self.before).sum_to_size(self.a.shape)
        q, *one = self._local
        other = self._of_transition(of_a, after)
        k, g, u, w = map(_sum, one, other)
        if self.tokens.beta is None:
            return self._gradients([q, k, u, g, None], initial)
        of_k, v, of_g, beta = self._of_written(u, w)
        return self._gradients([q, _sum(k, of_k), v, _sum(g, of_g), beta], initial)

    def _gradients(self, tokens: Gradients, initial: Tensor) -> tuple[Tensor | None, ...]:
        x, reverse = self.x, self.options.reverse
        assert tokens[0] is not None
        tokens[0] = tokens[0] * self.options.scale
        grads: Gradients = []
        for operand, grad in zip(x[:-1], tokens, strict=True):
            if operand is None or grad is None:
                grads.append(None)
                continue
            grad = uncut(grad, x.k, reverse).sum_to_size(operand.shape)
            grads.append(grad.to(operand.dtype).contiguous())
        state = x.initial_state
        return *grads, None if state is None else self.heads(initial).to(state.dtype).contiguous()
