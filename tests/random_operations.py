"""What graphs put together at random are made of (``tests/random_graphs.py``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.experts import COUNTS, grouped

__all__ = ["EXPERTS", "HIDDEN", "LARGEST", "OPERATIONS", "VOCAB", "Given", "Operation", "Step"]

VOCAB, HIDDEN, EXPERTS, LARGEST = 19, 6, 5, 20_000


class Step(NamedTuple):
    """An operation on one or two values of the pool, counted from its end, with three choices."""

    name: str
    x: int
    y: int
    i: int
    j: int
    k: int


class Given(NamedTuple):
    """What operations have besides the pool."""

    ids: Tensor
    bank: Tensor
    experts: Tensor

    def matrix(self, n: int, m: int) -> Tensor:
        """Parameters, ``[n, m]``."""
        return self.bank[: n * m].view(n, m)


Operation = Callable[[Given, Tensor, Tensor, Step], "Tensor | None"]
OPERATIONS: dict[str, Operation] = {}


def operation(fits: Callable[..., bool] = lambda x, y, s: True) -> Callable[[Operation], Operation]:
    """Register an operation, which does nothing where ``fits`` of (x, y, step) is false."""

    def register(function: Operation) -> Operation:
        def guarded(m: Given, x: Tensor, y: Tensor, s: Step) -> Tensor | None:
            return function(m, x, y, s) if fits(x, y, s) else None

        OPERATIONS[function.__name__.strip("_")] = guarded
        return function

    return register


def _dim(x: Tensor, n: int) -> int:
    return n % x.dim()


def _has(dims: int) -> Callable[..., bool]:
    return lambda x, y, s: x.dim() >= dims


def _alike(x: Tensor, y: Tensor, s: Step) -> bool:
    """Whether they broadcast, and to something small."""
    pairs = zip(reversed(x.shape), reversed(y.shape))
    if not all(a == b or 1 in (a, b) for a, b in pairs):
        return False
    return torch.broadcast_shapes(x.shape, y.shape).numel() <= LARGEST


# ------------------------------------------------------------------------------------- one entry at a time
UNARY: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.sin, torch.sigmoid, torch.relu, torch.tanh, torch.abs, F.silu, F.softplus,
    lambda x: x / (1 + x.square()), lambda x: 0.5 * x + 1, lambda x: (-x.abs()).exp(),
)  # fmt: skip


@operation()
def _unary(m, x, y, s):
    return UNARY[s.i % len(UNARY)](x)


@operation(_alike)
def _binary(m, x, y, s):
    ways = (torch.add, torch.mul, torch.maximum, torch.sub, lambda x, y: torch.where(x > y, x, y.sin()))
    return ways[s.i % len(ways)](x, y)


@operation(lambda x, y, s: x.dim() >= 2 and x.shape[-1] <= 24)
def _linear(m, x, y, s):
    return F.linear(x, m.matrix((4, 6, 8)[s.i % 3], x.shape[-1]) / 2)


@operation()
def _masked(m, x, y, s):
    """By places, by other values, or by the tokens."""
    dim, n = _dim(x, s.i), 1 + s.j % 5
    places = torch.arange(x.shape[dim]).view(-1, *[1] * (x.dim() - dim - 1))
    if s.k % 3 == 0:
        return x.masked_fill(places < n, 0.5)
    if s.k % 3 == 1:
        return torch.where(places % 3 == n % 3, x, -x)
    if x.shape[:2] != m.ids.shape:
        return None
    return x * (m.ids > 3).view(*m.ids.shape, *[1] * (x.dim() - 2))


# ------------------------------------------------------------------------------------------------- views
@operation(_has(2))
def _transpose(m, x, y, s):
    return x.transpose(_dim(x, s.i), _dim(x, s.j))


@operation(_has(2))
def _flatten(m, x, y, s):
    start = s.i % (x.dim() - 1)
    return x.flatten(start, start + 1)


@operation()
def _unflatten(m, x, y, s):
    dim, parts = _dim(x, s.i), (2, 3, 4)[s.j % 3]
    if x.shape[dim] % parts or x.dim() > 4:
        return None
    return x.unflatten(dim, (-1, parts) if s.k % 2 else (parts, -1))


@operation(lambda x, y, s: x.dim() <= 4)
def _unsqueeze(m, x, y, s):
    x = x.unsqueeze(s.i % (x.dim() + 1))
    dim = s.i % x.dim()
    return x.expand(*x.shape[:dim], 2, *x.shape[dim + 1 :]) if s.j % 3 == 0 else x


@operation()
def _repeat(m, x, y, s):
    dim = _dim(x, s.i)
    if s.j % 2:
        return x.repeat_interleave(2, dim)
    return x.repeat(*[2 if d == dim else 1 for d in range(x.dim())])


@operation()
def _shift(m, x, y, s):
    """Along a dim, by one to three: with zeros, around, by parts put together, or as pads."""
    dim, n = _dim(x, s.i), 1 + s.j % 3
    size = x.shape[dim]
    if size <= n:
        return None
    pads = [0, 0] * (x.dim() - 1 - dim)
    if s.k % 5 == 0:
        return F.pad(x.narrow(dim, 0, size - n), [*pads, n, 0])
    if s.k % 5 == 1:
        return F.pad(x.narrow(dim, n, size - n), [*pads, 0, n])
    if s.k % 5 == 2:
        return x.roll(n, dim)
    if s.k % 5 == 3:
        return torch.cat([x.narrow(dim, size - n, n), x.narrow(dim, 0, size - n)], dim)
    return F.pad(x, [*pads, n, -n])


@operation()
def _part(m, x, y, s):
    """Some of a dim."""
    dim, n = _dim(x, s.i), s.j % 4
    size = x.shape[dim]
    index = [slice(None)] * x.dim()
    if s.k % 5 == 0:
        return x.select(dim, n % size) if x.dim() > 1 else None
    if s.k % 5 == 1:
        index[dim] = slice(None, None, 2)
    elif s.k % 5 == 2:
        index[dim] = slice(n, None)
    elif s.k % 5 == 3:
        index[dim] = slice(None, max(1, size - n))
    else:
        index[dim] = slice(min(n, size - 1), min(n + 4, size))
    return x[tuple(index)]


@operation()
def _written(m, x, y, s):
    """In place, into some of a copy."""
    dim, n = _dim(x, s.i), s.j % 3
    x, index = x.clone(), [slice(None)] * x.dim()
    size = x.shape[dim]
    if s.k % 4 == 0:
        index[dim] = slice(n, size - 1)
        x[tuple(index)] = x[tuple(index)] * 0.5
    elif s.k % 4 == 1:
        x.select(dim, n % size).copy_(x.select(dim, (n + 2) % size) * 0.5)
    elif s.k % 4 == 2:
        index[dim] = torch.arange(size).flip(0)[: n + 1]
        x[tuple(index)] = 0.25
    else:
        x.masked_fill_(y < 0, 1.0) if x.shape == y.shape else x.add_(1)
    return x


@operation()
def _integers(m, x, y, s):
    """Of the tokens, or places of values, as numbers."""
    if s.i % 5 == 0:
        return F.one_hot(m.ids % 4, 4).double()
    if s.i % 5 == 1:
        return (m.ids.cumsum(1) % 7).double().unsqueeze(-1)
    if s.i % 5 == 2:
        return x.argmax(_dim(x, s.j), True) * y.mean()
    if s.i % 5 == 3:
        return x.argsort(dim=_dim(x, s.j), stable=True) * x
    return F.embedding((m.ids * 3 + s.j) % 11, m.matrix(11, HIDDEN))


@operation(_alike)
def _detached(m, x, y, s):
    with torch.no_grad():
        scale = y.abs().amax() if s.i % 2 else y.cos()
    return x * scale


@operation()
def _flip(m, x, y, s):
    return x.flip(_dim(x, s.i))


@operation()
def _together(m, x, y, s):
    """One behind the other, or beside it."""
    dim = _dim(x, s.i)
    same = x.dim() == y.dim() and all(a == b for d, (a, b) in enumerate(zip(x.shape, y.shape)) if d != dim)
    if s.j % 3 == 0 and x.shape == y.shape:
        return torch.stack([x, y], dim)
    return torch.cat([x, y], dim) if same else None


@operation()
def _halves(m, x, y, s):
    dim = _dim(x, s.i)
    if x.shape[dim] % 2:
        return None
    a, b = x.chunk(2, dim)
    return (a * b.sigmoid(), torch.cat([-b, a], dim), F.glu(x, dim))[s.j % 3]


# -------------------------------------------------------------------------------------- along dimensions
ALONG: tuple[Callable[[Tensor, int, bool], Tensor], ...] = (
    lambda x, d, keep: x.sum(d, keep), lambda x, d, keep: x.mean(d, keep), lambda x, d, keep: x.amax(d, keep),
    lambda x, d, keep: x.var(d, keepdim=keep, correction=0), lambda x, d, keep: x.logsumexp(d, keep),
    lambda x, d, keep: x.max(d, keep).values, lambda x, d, keep: x.norm(dim=d, keepdim=keep),
)  # fmt: skip
WITHIN: tuple[Callable[[Tensor, int], Tensor], ...] = (
    lambda x, d: x.softmax(d), lambda x, d: x.log_softmax(d), lambda x, d: x.cumsum(d) / x.shape[d],
    lambda x, d: x.sort(d).values, lambda x, d: F.normalize(x, dim=d), lambda x, d: x.cummax(d).values,
    lambda x, d: x.sigmoid().cumprod(d), lambda x, d: x.logcumsumexp(d), lambda x, d: x - x.mean(d, True),
    lambda x, d: x.flip(d).cumsum(d).flip(d), lambda x, d: x.diff(dim=d),
)  # fmt: skip


@operation()
def _along(m, x, y, s):
    keep = bool(s.k % 2)
    return ALONG[s.i % len(ALONG)](x, _dim(x, s.j), keep) if keep or x.dim() > 1 else None


@operation()
def _within(m, x, y, s):
    return WITHIN[s.i % len(WITHIN)](x, _dim(x, s.j))


@operation(_has(2))
def _norm(m, x, y, s):
    if s.i % 4 == 0:  # of one number it is zero, and the gradient only rounding
        return None if x.shape[-1] == 1 else F.layer_norm(x, x.shape[-1:], m.bank[: x.shape[-1]])
    if s.i % 4 == 1:
        return F.rms_norm(x, x.shape[-1:])
    if s.i % 4 == 2:
        return F.batch_norm(x, None, None, training=True) if x.numel() > 2 * x.shape[1] else None
    return F.group_norm(x, 2) if x.shape[1] % 2 == 0 and x.dim() > 2 else None


@operation()
def _chosen(m, x, y, s):
    """Entries by the order of others, or the largest."""
    dim = _dim(x, s.i)
    if s.j % 3 == 0:
        return x.topk(min(3, x.shape[dim]), dim).values
    if s.j % 3 == 1:
        return x.gather(dim, y.argsort(dim=dim, stable=True)) if x.shape == y.shape else None
    return x.take_along_dim(x.argmax(dim, True), dim)


@operation()
def _by_index(m, x, y, s):
    dim = _dim(x, s.i)
    index = (torch.arange(x.shape[dim]) * (1 + s.j % 3) + s.k) % x.shape[dim]
    return x.index_select(dim, index) if s.k % 2 else torch.zeros_like(x).index_add(dim, index, x)


@operation(lambda x, y, s: x.dim() == 3)
def _convolution(m, x, y, s):
    """Of each channel by itself, or mixing them; causal, centred or in strides; or a pool, or windows."""
    x = x.transpose(1, 2) if s.k % 2 else x
    channels, taps = x.shape[1], 2 + s.i % 3
    if channels * taps > 64 or x.shape[2] <= taps:
        return None
    if s.j % 8 == 0:
        return x.unfold(2, taps, 1 + s.i % 2).sin().mean(-1)
    if s.j % 4 == 0:
        return F.avg_pool1d(x, taps, stride=1 + s.i % 2)
    weight = m.bank[: channels * taps].view(channels, 1, taps)
    pad = taps // 2 if s.j % 4 == 1 else 0
    x = x if pad else F.pad(x, [taps - 1, 0])
    return F.conv1d(x, weight, padding=pad, stride=1 + (s.j % 4 == 3), groups=channels)


# ------------------------------------------------------------------------------------------- contractions
@operation(lambda x, y, s: x.dim() >= 2 and y.dim() >= 2)
def _product(m, x, y, s):
    y = y.transpose(-1, -2) if s.i % 2 else y
    if x.shape[-1] != y.shape[-2] or not _alike(x[..., :1, :1], y[..., :1, :1], s):
        return None
    rows = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]).numel() * x.shape[-2]
    return x @ y / x.shape[-1] if rows * y.shape[-1] <= LARGEST else None


def _mask(size: int, s: Step) -> Tensor:
    rows, columns = torch.arange(size)[:, None], torch.arange(size)[None]
    ways = (
        columns <= rows,
        (columns <= rows) & (columns > rows - 3),
        (rows - columns).abs() < 4,
        columns >= rows,
        (columns <= rows) & (columns // 3 == rows // 3),
        rows // 5 == columns // 5,
    )
    prefixes = (columns <= rows) | (columns < 5), (columns <= rows) | (rows // 4 == columns // 4)
    return prefixes[s.k % 2] if s.j > 9 else ways[s.k % len(ways)]


@operation(lambda x, y, s: x.dim() >= 3 and x.shape == y.shape and x.shape[-2] <= 64)
def _attention(m, x, y, s):
    """Softmax, by hand or PyTorch's, or linear by its square."""
    size, scale, way = x.shape[-2], x.shape[-1] ** -0.5, s.i % 5
    if way == 0:
        return F.scaled_dot_product_attention(x, y, x, is_causal=bool(s.j % 2))
    if way == 1:
        return F.scaled_dot_product_attention(x, y, x + y, attn_mask=_mask(size, s))
    scores = x @ y.transpose(-1, -2) * scale
    if way == 2:
        return scores.masked_fill(~_mask(size, s), -torch.inf).softmax(-1) @ y
    if way == 3:
        return (scores * _mask(size, s)) @ x
    distances = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    return torch.softmax(scores.tril() - 0.1 * distances, -1) @ y


@operation(lambda x, y, s: x.dim() == 3 and x.shape[-1] == HIDDEN)
def _mixture(m, x, y, s):
    """A mixture of experts, whatever the tokens are, by a sort."""
    tokens = x.flatten(0, 1)
    scores = F.linear(tokens, m.matrix(EXPERTS, HIDDEN)).softmax(-1)
    weights, ids = scores.topk(2, -1)
    flat = ids.reshape(-1)
    order = flat.argsort(stable=bool(s.i % 2))
    counts = list(COUNTS.values())[s.j % len(COUNTS)](flat, EXPERTS)
    out = grouped(tokens[order // 2], m.experts, counts.cumsum(0).to(torch.int32))
    out = out * weights.reshape(-1)[order][:, None]
    if s.k % 2:
        return torch.zeros_like(tokens).index_add(0, order // 2, out).view_as(x)
    return out[order.argsort()].view(-1, 2, HIDDEN).sum(1).view_as(x)


@operation(lambda x, y, s: x.dim() == 3)
def _loss(m, x, y, s):
    """Of each token's class; some count for nothing."""
    if x.shape[:2] != m.ids.shape or x.shape[2] < 2:
        return None
    shifted = s.i % 2
    logits, labels = (x[:, :-1], m.ids[:, 1:]) if shifted else (x, m.ids)
    labels = (labels % x.shape[2]).masked_fill(labels > 14, -100)
    reduction = ("mean", "sum")[s.j % 2]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction) / 7
