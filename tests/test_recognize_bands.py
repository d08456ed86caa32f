"""Recognition of windows, padding per key, soft caps and sinks: found, named as what they are, and equal."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from recognition import INF, B, D, H, T, future, qkv, see, spelling
from torch import Tensor

from spcompile.passes.recognize.proof.masks import Span
from spcompile.passes.recognize.softmax.bands import Band, band_of

FOUND: dict = {}
LEFT: dict = {}
MIN = torch.finfo(torch.float64).min


def distance() -> Tensor:
    i = torch.arange(T)
    return i[:, None] - i


# ---- windows


@spelling(FOUND, "causal window of 4")
def window(q, k, v):
    d = distance()
    return (q @ k.mT).masked_fill((d < 0) | (d > 3), -INF).softmax(-1) @ v


@spelling(FOUND, "causal window of 3")
def window_of_indices(q, k, v):
    rows, keys = torch.arange(T)[None, None, :, None], torch.arange(T)[None, None, None, :]
    keep = (keys > rows - 3) & (keys <= rows)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep.expand(B, -1, T, T))


@spelling(FOUND, "causal window of 3")
def window_as_a_bias(q, k, v):
    rows, keys = torch.arange(T)[:, None], torch.arange(T)
    keep = torch.ones((), dtype=torch.bool) & (keys > rows - 3) & (keys <= rows)
    bias = torch.where(keep, torch.tensor(0.0, dtype=q.dtype), MIN)
    return F.softmax(q @ k.mT * 0.5 + bias, dim=-1) @ v


@spelling(FOUND, "causal window of 2")
def window_of_two_triangles(q, k, v):
    band = torch.ones(T, T).tril() * torch.ones(T, T).triu(-1)
    return (q @ k.mT).masked_fill(band == 0, -1e9).softmax(-1) @ v


@spelling(FOUND, "causal window of 5")
def window_in_two_steps(q, k, v):
    s = (q @ k.mT).masked_fill(future(), -INF)
    return s.masked_fill(distance() >= 5, -INF).softmax(-1) @ v


@spelling(FOUND, "window of 3")
def window_both_ways(q, k, v):
    return (q @ k.mT).masked_fill(distance().abs() >= 3, -INF).softmax(-1) @ v


@spelling(FOUND, "window of 3")
def window_both_ways_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=distance().abs() <= 2)


@spelling(FOUND, "causal")
def window_of_all(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance() >= 0) & (distance() < T))


@spelling(FOUND, "causal window of 1")
def only_itself(q, k, v):
    return (q @ k.mT).masked_fill(distance() != 0, -INF).softmax(-1) @ v


# ---- and padding: data per key. The first sequence has padding before, so that rows keep no key


def seen_keys() -> Tensor:
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[0, :2] = False
    keep[1, 5:] = False
    return keep


@spelling(FOUND, "causal and padding")
def padding_sdpa(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :] & ~future())


@spelling(FOUND, "causal window of 3 and padding")
def padding_by_index(q, k, v, keep):
    rows, keys = torch.arange(T)[None, None, :, None], torch.arange(T)[None, None, None, :]
    padding = keep[torch.arange(B)[:, None, None, None], keys]
    mask = (keys > rows - 3) & (keys <= rows) & padding
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(B, -1, T, T))


@spelling(LEFT, "general")
def padding_as_a_bias(q, k, v, keep):
    """Rows without a key have the least number everywhere: uniform, and with a gradient of their scores."""
    mask = keep[:, None, None, :] & (distance() >= 0) & (distance() < 3)
    bias = torch.where(mask, torch.tensor(0.0, dtype=q.dtype), MIN)
    return F.softmax(q @ k.mT + bias, dim=-1) @ v


@spelling(FOUND, "causal and padding")
def padding_of_integers(q, k, v, keep):
    mask = keep.long()[:, None, None, :].bool() & ~future()
    return (q @ k.mT).masked_fill(~mask, MIN).softmax(-1) @ v


@spelling(FOUND, "causal and padding")
def padding_says_where_not(q, k, v, keep):
    return (q @ k.mT).masked_fill(future() | ~keep[:, None, None, :], -INF).softmax(-1) @ v


@spelling(FOUND, "window of 2 and padding")
def padding_both_ways(q, k, v, keep):
    mask = keep[:, None, None, :] & (distance().abs() < 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# ---- scores


@spelling(FOUND, "all, soft cap")
def soft_cap(q, k, v):
    return ((q @ k.mT * 0.5 / 3.0).tanh() * 3.0).softmax(-1) @ v


@spelling(FOUND, "causal window of 3, soft cap")
def soft_cap_and_window(q, k, v):
    s = torch.tanh((q @ k.mT) * D**-0.5 / 2.0) * 2.0
    rows, keys = torch.arange(T)[:, None], torch.arange(T)
    bias = torch.where((keys > rows - 3) & (keys <= rows), torch.tensor(0.0, dtype=q.dtype), MIN)
    return F.softmax(s + bias, dim=-1) @ v


@spelling(FOUND, "causal, soft cap")
def soft_cap_that_is_negative(q, k, v):
    return (-2.0 * torch.tanh(q @ k.mT)).masked_fill(future(), -INF).softmax(-1) @ v


def column(sinks: Tensor, like: Tensor) -> Tensor:
    return sinks.reshape(1, -1, 1, 1).expand(like.shape[0], -1, like.shape[2], -1)


@spelling(FOUND, "causal window of 3, sinks")
def sinks(q, k, v, _, s):
    logits = (q @ k.mT * 0.4).masked_fill((distance() < 0) | (distance() > 2), MIN)
    logits = torch.cat([logits, column(s, q)], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    return F.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1] @ v


@spelling(FOUND, "causal window of 3")
def without_the_largest(q, k, v, _, s):
    logits = (q @ k.mT * 0.4).masked_fill((distance() < 0) | (distance() > 2), MIN)
    return F.softmax(logits - logits.amax(-1, keepdim=True), dim=-1) @ v


@spelling(FOUND, "causal, sinks")
def sinks_first(q, k, v, _, s):
    logits = torch.cat([column(s, q), (q @ k.mT).masked_fill(future(), -INF)], dim=-1)
    return F.softmax(logits, dim=-1)[..., 1:] @ v


@spelling(FOUND, "causal and padding, sinks")
def sinks_and_padding(q, k, v, keep, s):
    bias = torch.where(keep[:, None, None, :] & ~future(), torch.tensor(0.0, dtype=q.dtype), MIN)
    return F.softmax(torch.cat([q @ k.mT + bias, column(s, q)], dim=-1), dim=-1)[..., :-1] @ v


@spelling(FOUND, "all, soft cap, sinks")
def sinks_and_cap(q, k, v, _, s):
    logits = torch.cat([torch.tanh(q @ k.mT) * 2, column(s, q)], dim=-1)
    return (logits - logits.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("name", FOUND)
def test_found_and_equal(name: str) -> None:
    fn, (mask,) = FOUND[name]
    given = [*qkv(), seen_keys(), torch.randn(H, dtype=torch.float64).requires_grad_()]
    if name == "padding_says_where_not":
        given[3][0] = True  # else there are rows of NaN, which nothing can be compared with
    seen = see(fn, *given[: fn.__code__.co_argcount])
    assert seen.rewritten == [("softmax", mask)], seen.sites
    (gm,) = seen.graphs
    (call,) = [n for n in gm.graph.nodes if "softmax_attention" in str(n.target)]
    data = call.args[3]
    assert ("padding" in mask) == (data is not None)
    assert data is None or data.meta["example_value"].shape == (B, 1, 1, T)
    assert seen.calls("softmax_attention") == 1 and not seen.calls("matmul")


# ---- look-alikes


@spelling(LEFT, "general")
def window_of_what_comes(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance() <= 0) & (distance() > -3))


@spelling(LEFT, "general")
def uneven_window(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance() < 2) & (distance() > -3))


@spelling(LEFT, "general")
def every_second(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance() == 0) | (distance() == 2))


@spelling(LEFT, "general")
def padding_or_causal(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :] | ~future())


@spelling(LEFT, "general")
def padding_of_rows(q, k, v, keep):
    """Row i looks at what key i is."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, :, None] & ~future())


@spelling(LEFT, "general")
def padding_added_twice(q, k, v, keep):
    """Twice the least number is minus infinity: rows without a key are not uniform."""
    low = torch.tensor(MIN, dtype=q.dtype)
    bias = torch.where(keep[:, None, None, :], 0.0, low / 4) + torch.where(~future(), 0.0, low / 2)
    return F.softmax(q @ k.mT + bias, dim=-1) @ v


@spelling(LEFT, None)
def tanh_of_masked_scores(q, k, v):
    return ((q @ k.mT).masked_fill(future(), -5.0).tanh() * 2).softmax(-1) @ v


@spelling(LEFT, None)
def sinks_that_are_kept(q, k, v, _, s):
    p = torch.cat([q @ k.mT, column(s, q)], dim=-1).softmax(-1)
    return p[..., :-1] @ v + p[..., -1:]


@spelling(LEFT, None)
def sinks_of_rows(q, k, v):
    p = torch.cat([q @ k.mT, q.sum(-1, keepdim=True)], dim=-1).softmax(-1)
    return p[..., :-1] @ v


@spelling(LEFT, None)
def another_maximum(q, k, v, _, s):
    """Of the scores alone, taken off the scores alone: the sink's share changes."""
    scores = q @ k.mT
    scores = scores - scores.amax(-1, keepdim=True)
    return torch.cat([scores, column(s, q)], dim=-1).softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("name", LEFT)
def test_look_alikes(name: str) -> None:
    """Data, or left; and in any case equal."""
    fn, (mask,) = LEFT[name]
    given = [*qkv(), seen_keys(), torch.randn(H, dtype=torch.float64).requires_grad_()]
    seen = see(fn, *given[: fn.__code__.co_argcount])
    assert seen.rewritten == ([] if mask is None else [("softmax", mask)]), seen.sites


# ---- bands


@pytest.mark.parametrize(("rows", "cols"), [(5, 5), (3, 6), (6, 3), (2, 2)])
def test_every_band(rows: int, cols: int) -> None:
    """What is said of every interval of i - j is what it is, on every pair."""
    low, high = 1 - cols, rows - 1
    d = torch.arange(rows)[:, None] - torch.arange(cols)
    for first, last in itertools.product(range(low, high + 1), repeat=2):
        if first > last:
            continue
        bounds = [(low, first - 1, False), (first, last, True), (last + 1, high, False)]
        band = band_of([Span(a, b, x) for a, b, x in bounds if a <= b])
        want = (d >= first) & (d <= last)
        if band is None:
            assert first != 0 and first != -last and (first, last) != (low, high)
            continue
        assert band.name or band == Band()
        keep = torch.ones(rows, cols, dtype=torch.bool)
        keep &= d >= 0 if band.causal else True
        keep &= d.abs() < band.window if band.window is not None else True
        assert torch.equal(keep, want), (first, last, band)
