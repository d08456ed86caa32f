"""Recognition of attention: dozens of spellings are found and stay equal."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from recognition import INF, B, D, H, T, future, qkv, see, spelling
from torch import Tensor

# ---------------------------------------------------------------- softmax, by hand

SOFTMAX = {}
LINEAR = {}


@spelling(SOFTMAX, "all")
def plain(q, k, v):
    return ((q @ k.transpose(-2, -1)) / math.sqrt(D)).softmax(-1) @ v


@spelling(SOFTMAX, "causal")
def masked_fill_arange(q, k, v):
    return ((q @ k.mT) * 0.3).masked_fill(future(), -INF).softmax(dim=-1) @ v


@spelling(SOFTMAX, "causal")
def masked_fill_tril_buffer_made_here(q, k, v):
    mask = torch.tril(torch.ones(T, T)).view(1, 1, T, T)
    return F.softmax((q @ k.mT).masked_fill(mask == 0, -INF), dim=-1) @ v


@spelling(SOFTMAX, "causal")
def additive_triu(q, k, v):
    mask = torch.triu(torch.full((T, T), -INF, dtype=q.dtype), diagonal=1)
    return torch.softmax(torch.matmul(q, k.permute(0, 1, 3, 2)) + mask, -1).matmul(v)


@spelling(SOFTMAX, "causal")
def additive_on_the_left(q, k, v):
    mask = torch.zeros(T, T, dtype=q.dtype).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -1e9)
    return torch.softmax(mask + q @ k.mT, -1) @ v


@spelling(SOFTMAX, "causal")
def one_minus_mask_times_least(q, k, v):
    mask = (1.0 - torch.tril(torch.ones(T, T, dtype=q.dtype))) * torch.finfo(q.dtype).min
    return F.softmax(q @ k.mT + mask, -1) @ v


@spelling(SOFTMAX, "causal")
def where_keep(q, k, v):
    keep = torch.arange(T)[:, None] >= torch.arange(T)
    return torch.where(keep, q @ k.mT, torch.finfo(q.dtype).min).softmax(-1) @ v


@spelling(SOFTMAX, "causal")
def where_tensor_fill(q, k, v):
    return torch.where(future(), torch.tensor(-INF, dtype=q.dtype), q @ k.mT).softmax(-1) @ v


@spelling(SOFTMAX, "causal")
def two_bands_make_causal(q, k, v):
    i = torch.arange(T)
    s = (q @ k.mT).masked_fill(i[None] > i[:, None] + 2, -INF)
    return s.masked_fill((i[None] - i[:, None] > 0) & (i[None] - i[:, None] < 3), -INF).softmax(-1) @ v


@spelling(SOFTMAX, "causal")
def in_place(q, k, v):
    s = q @ k.mT
    s *= 0.5
    s.masked_fill_(future(), -INF)
    return s.softmax(-1) @ v


@spelling(SOFTMAX, "causal")
def in_place_through_a_view(q, k, v):
    s = torch.bmm(q.reshape(B * H, T, D), k.reshape(B * H, T, D).mT).div_(2)
    s = s.view(B, H, T, T)
    s.add_(torch.full((T, T), -INF, dtype=q.dtype).triu_(1))
    return s.softmax(-1) @ v


@spelling(SOFTMAX, "causal")
def einsum_all(q, k, v):
    s = torch.einsum("bhid,bhjd->bhij", q, k).masked_fill(future(), -INF)
    return torch.einsum("bhij,bhjd->bihd", s.softmax(-1), v).reshape(B, T, H * D)


@spelling(SOFTMAX, "all")
def einsum_keys_first(q, k, v):
    s = torch.einsum("bhid,bhjd->bhji", q, k)
    return torch.einsum("bhji,bhje->bhie", s.softmax(2), v)


@spelling(SOFTMAX, "all")
def einsum_ellipsis(q, k, v):
    s = torch.einsum("...id,...jd->...ij", q, k * 0.2)
    return torch.einsum("...ij,...jd->...id", s.softmax(-1), v)


@spelling(SOFTMAX, "causal")
def heads_in_the_batch(q, k, v):
    q, k, v = (x.transpose(1, 2).reshape(B, T, H * D) for x in (q, k, v))
    q, k, v = (x.view(B, T, H, D).permute(0, 2, 1, 3).reshape(B * H, T, D) for x in (q, k, v))
    s = torch.baddbmm(torch.zeros(B * H, T, T, dtype=q.dtype), q, k.mT, beta=0, alpha=0.4)
    s = s.view(B, H, T, T).masked_fill(future(), -INF).view(B * H, T, T)
    return torch.bmm(s.softmax(-1), v).view(B, H, T, D).transpose(1, 2).reshape(B, T, -1)


@spelling(SOFTMAX, "causal")
def baddbmm_mask(q, k, v):
    mask = torch.full((T, T), -INF, dtype=q.dtype).triu(1).expand(B * H, T, T)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return (torch.baddbmm(mask, q, k.mT, alpha=0.4).softmax(-1) @ v).unflatten(0, (B, H))


@spelling(SOFTMAX, "all")
def scale_on_q(q, k, v):
    return F.softmax((q * D**-0.5) @ k.mT, -1) @ v


@spelling(SOFTMAX, "causal")
def dropout_that_is_off(q, k, v):
    p = F.dropout((q @ k.mT).masked_fill(future(), -INF).softmax(-1), 0.3, training=False)
    return F.dropout(p, 0.0) @ v


@spelling(SOFTMAX, "all")
def casts(q, k, v):
    return F.softmax((q @ k.mT).double(), dim=-1, dtype=torch.float64).to(q.dtype) @ v


@spelling(SOFTMAX, "causal")
def values_on_the_left(q, k, v):
    p = (q @ k.mT).masked_fill(future(), -INF).softmax(-1)
    return (v.mT @ p.mT).mT


@spelling(SOFTMAX, "causal")
def repeated_kv(q, k, v):
    k, v = k[:, ::2], v[:, ::2]
    k = k[:, :, None].expand(B, 2, 2, T, D).reshape(B, H, T, D)
    v = v.repeat_interleave(2, dim=1)
    return (q @ k.mT).masked_fill(future(), -INF).softmax(-1) @ v


@spelling(SOFTMAX, "causal")
def tiled_kv(q, k, v):
    k, v = (x[:, ::2].repeat(1, 2, 1, 1) for x in (k, v))
    return (q @ k.mT).masked_fill(future(), -INF).softmax(-1) @ v


@spelling(SOFTMAX, "causal")
def grouped_in_five_dims(q, k, v):
    k, v = k[:, :2], v[:, :2]
    s = torch.einsum("bgnid,bgjd->bgnij", q.view(B, 2, 2, T, D), k).masked_fill(future(), -INF)
    return torch.einsum("bgnij,bgjd->bgnid", s.softmax(-1), v).reshape(B, H, T, D)


@spelling(SOFTMAX, "all")
def one_kv_head(q, k, v):
    k, v = k[:, 0], v[:, 0]
    return torch.einsum("bhij,bjd->bhid", torch.einsum("bhid,bjd->bhij", q, k).softmax(-1), v)


@spelling(SOFTMAX, "all")
def no_batch(q, k, v):
    q, k, v = q[0, 0], k[0, 0], v[0, 0]
    return torch.mm(torch.mm(q, k.t()).softmax(1), v)


@spelling(SOFTMAX, "all")
def longer_keys(q, k, v):
    q = q[:, :, :3]
    return F.softmax(q @ k.mT, -1) @ v


@spelling(SOFTMAX, "causal")
def longer_keys_causal(q, k, v):
    q = q[:, :, :3]
    return F.softmax((q @ k.mT).masked_fill(future(3, T), -INF), -1) @ v


@spelling(SOFTMAX, "window of 5")  # of three rows none has a key that far behind it
def bottom_right_causal(q, k, v):
    q = q[:, :, :3]
    keep = torch.ones(3, T, dtype=torch.bool).tril(T - 3)
    return F.softmax((q @ k.mT).masked_fill(~keep, -INF), -1) @ v


@spelling(SOFTMAX, "causal window of 4")
def window(q, k, v):
    i = torch.arange(T)
    d = i[:, None] - i
    return (q @ k.mT).masked_fill((d < 0) | (d > 3), -INF).softmax(-1) @ v


@spelling(SOFTMAX, "causal, relative bias")
def alibi_and_causal(q, k, v):
    i = torch.arange(T)
    bias = (i[None] - i[:, None]) * torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=q.dtype)[:, None, None]
    return (q @ k.mT * 0.3 + bias).masked_fill(future(), -INF).softmax(-1) @ v


@spelling(SOFTMAX, "general")
def finite_fill_of_a_window(q, k, v):
    i = torch.arange(T)
    far = i[None] < i[:, None] + 2  # the last rows keep no key: uniform there, not zero
    return (q @ k.mT).masked_fill(far, torch.finfo(q.dtype).min).softmax(-1) @ v


@spelling(SOFTMAX, "all")
def mask_that_is_all_true(q, k, v):
    return (q @ k.mT).masked_fill(~torch.ones(T, T, dtype=torch.bool), -INF).softmax(-1) @ v


# ---------------------------------------------------------------- scaled_dot_product_attention


@spelling(SOFTMAX, "causal")
def sdpa_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, None, 0.0, True)


@spelling(SOFTMAX, "all")
def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=0.7)


@spelling(SOFTMAX, "causal")
def sdpa_bool(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~future())


@spelling(SOFTMAX, "causal")
def sdpa_float(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, torch.where(future(), -INF, 0.0).to(q.dtype))


@spelling(SOFTMAX, "general")
def sdpa_bias(q, k, v):
    return F.scaled_dot_product_attention(
        q, k, v, torch.sin(torch.arange(T, dtype=q.dtype)) * torch.ones(T, 1).double()
    )


@spelling(SOFTMAX, "causal")
def sdpa_three_dims(q, k, v):
    return F.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True)


@spelling(SOFTMAX, "all")
def sdpa_five_dims(q, k, v):
    return F.scaled_dot_product_attention(*(x.view(B, 2, 2, T, D) for x in (q, k, v)))


@spelling(SOFTMAX, "causal")
def sdpa_gqa(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], is_causal=True, enable_gqa=True)


@spelling(SOFTMAX, "causal")
def sdpa_from_tokens_first(q, k, v):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)


@spelling(SOFTMAX, "causal")
def result_updated_in_place(q, k, v):
    out = (q @ k.mT).masked_fill(future(), -INF).softmax(-1) @ v
    out *= 2
    return out


@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax_is_found_and_equal(name: str) -> None:
    fn, (mask,) = SOFTMAX[name]
    seen = see(fn, *qkv())
    assert seen.rewritten == [("softmax", mask)], seen.sites
    assert seen.calls("softmax_attention") == 1 and seen.calls("linear_attention") == 0
    assert "test_recognize.py:" in seen.sites[0].source


def test_grouped_heads_stay_grouped() -> None:
    for fn in (repeated_kv, sdpa_gqa, grouped_in_five_dims, one_kv_head):
        (gm,) = see(fn, *qkv()).graphs
        (call,) = [n for n in gm.graph.nodes if "softmax_attention" in str(n.target)]
        heads = [n.meta["example_value"].shape[1] for n in call.args[:3]]
        assert heads[0] > heads[1] == heads[2], fn.__name__


# ---------------------------------------------------------------- linear


def positive(*xs: Tensor) -> list[Tensor]:
    return [F.elu(x) + 1 for x in xs]


@spelling(LINEAR, "causal")
def times_tril(q, k, v):
    return ((q @ k.mT) * torch.tril(torch.ones(T, T, dtype=q.dtype))) @ v


@spelling(LINEAR, "causal")
def times_bool(q, k, v):
    return (0.3 * (q @ k.transpose(2, 3)) * ~future()) @ v


@spelling(LINEAR, "causal")
def tril_of_scores(q, k, v):
    return torch.matmul(torch.tril(torch.matmul(q, k.mT) / 3), v)


@spelling(LINEAR, "causal")
def fill_zero(q, k, v):
    return (q @ k.mT).masked_fill(future(), 0.0) @ v


@spelling(LINEAR, "causal")
def where_zero(q, k, v):
    return torch.where(~future(), q @ k.mT, 0.0) @ v


@spelling(LINEAR, "causal")
def where_zeros_like(q, k, v):
    s = q @ k.mT
    return torch.where(future(), torch.zeros_like(s), s) @ v


@spelling(LINEAR, "causal")
def fill_in_place(q, k, v):
    s = q @ k.mT
    s.masked_fill_(future(), 0)
    return s @ v


@spelling(LINEAR, "causal")
def einsum_with_mask(q, k, v):
    return torch.einsum("bhid,bhjd,ij,bhje->bhie", q, k, torch.ones(T, T, dtype=q.dtype).tril(), v)


@spelling(LINEAR, "causal")
def einsum_tokens_first(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * torch.ones(T, T, dtype=q.dtype).tril() * D**-0.5
    return torch.einsum("bhij,bjhe->bihe", s, v).flatten(2)


@spelling(LINEAR, "causal")
def bmm_heads_in_batch(q, k, v):
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    s = torch.bmm(q, k.mT).view(B, H, T, T) * torch.ones(T, T, dtype=q.dtype).tril()
    return torch.bmm(s.view(B * H, T, T), v).view(B, H, T, D)


@spelling(LINEAR, "causal")
def mask_with_a_constant(q, k, v):
    return (q @ k.mT * (torch.ones(T, T, dtype=q.dtype).tril() * 0.25)) @ v


@spelling(LINEAR, "causal")
def running_sum_of_states(q, k, v):
    state = torch.einsum("bhtd,bhte->bhtde", k, v).cumsum(2)
    return torch.einsum("bhtd,bhtde->bhte", q, state)


@spelling(LINEAR, "causal")
def grouped(q, k, v):
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    return ((q @ k.mT) * torch.ones(T, T, dtype=q.dtype).tril()) @ v


@spelling(LINEAR, "causal")
def normalised_after(q, k, v):
    q, k = positive(q, k)
    s = (q @ k.mT).tril()
    return (s @ v) / (s.sum(-1, keepdim=True) + 1e-6)


@spelling(LINEAR, "causal")
def normalised_before(q, k, v):
    q, k = positive(q, k)
    s = (q @ k.mT).masked_fill(future(), 0)
    return (s / s.sum(dim=-1, keepdim=True).clamp_min(1e-6)) @ v


@spelling(LINEAR, "causal")
def normalised_by_a_running_sum(q, k, v):
    q, k = positive(q, k)
    z = 1 / (torch.einsum("bhtd,bhtd->bht", q, k.cumsum(2)) + 1e-6)
    return torch.einsum("bhij,bhje,bhi->bhie", (q @ k.mT).tril(), v, z)


@spelling(LINEAR, "causal")
def normalised_elementwise(q, k, v):
    q, k = positive(q, k)
    return ((q @ k.mT).tril() @ v) / (q * k.cumsum(-2)).sum(-1, keepdim=True)


@spelling(LINEAR, "causal")
def normalised_by_absolute_value_of_the_sum(q, k, v):
    s = (q @ k.mT).tril()
    return (s @ v) / s.sum(-1, keepdim=True).abs().clamp(min=1.0)


@spelling(LINEAR, "all")
def state_first(q, k, v):
    return q @ (k.mT @ v)


@spelling(LINEAR, "all")
def scores_first(q, k, v):
    return (q @ k.mT / 5) @ v


@spelling(LINEAR, "all")
def state_einsum(q, k, v):
    return torch.einsum("bhid,bhde->bhie", q, torch.einsum("bhjd,bhje->bhde", k, v))


@spelling(LINEAR, "all")
def three_operands(q, k, v):
    return torch.einsum("bhid,bhjd,bhje->bhie", q, k, v)


@spelling(LINEAR, "all")
def state_first_normalised(q, k, v):
    q, k = positive(q, k)
    return q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT + 1e-6)


@spelling(LINEAR, "all")
def state_first_normalised_einsum(q, k, v):
    q, k = positive(q, k)
    z = 1 / torch.einsum("bhnd,bhd->bhn", q, k.sum(dim=-2))
    return torch.einsum("bhnd,bhde,bhn->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v), z)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_is_found_and_equal(name: str) -> None:
    fn, (mask,) = LINEAR[name]
    seen = see(fn, *qkv())
    assert seen.rewritten == [("linear", mask)], seen.sites
    assert seen.calls("linear_attention") == 1
    if "normalised" in name:  # the normaliser rides along: no contraction of the user's is left
        assert not any(seen.calls(op) for op in ("matmul", "einsum", "cumsum")), seen.graphs[0].code
