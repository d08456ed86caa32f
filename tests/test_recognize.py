"""Recognition of attention: dozens of spellings are found and stay equal, look-alikes are left alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from recognition import see
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spcompile.passes.recognize import recognize

B, H, T, D = 2, 4, 7, 5
INF = float("inf")


def qkv(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = shapes or ((B, H, T, D),) * 3
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


def future(t: int = T, s: int | None = None) -> Tensor:
    """True where key j comes after query i."""
    return torch.arange(s or t)[None, :] > torch.arange(t)[:, None]


# ---------------------------------------------------------------- softmax, by hand

SOFTMAX = {}
LINEAR = {}
LEFT = {}


def spelling(table: dict, *expected):
    def register(fn):
        table[fn.__name__] = (fn, expected)
        return fn

    return register


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


@spelling(SOFTMAX, "general")
def bottom_right_causal(q, k, v):
    q = q[:, :, :3]
    keep = torch.ones(3, T, dtype=torch.bool).tril(T - 3)
    return F.softmax((q @ k.mT).masked_fill(~keep, -INF), -1) @ v


@spelling(SOFTMAX, "general")
def window(q, k, v):
    i = torch.arange(T)
    d = i[:, None] - i
    return (q @ k.mT).masked_fill((d < 0) | (d > 3), -INF).softmax(-1) @ v


@spelling(SOFTMAX, "causal and general")
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


# ---------------------------------------------------------------- left alone


def left(reason: str = ""):
    return spelling(LEFT, reason)


@left("dropout")
def dropout_that_is_on(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), 0.5) @ v


@left("dropout")
def sdpa_dropout(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


@left("used elsewhere")
def weights_returned(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return p @ v, p


@left("used elsewhere")
def linear_scores_returned(q, k, v):
    s = (q @ k.mT).tril()
    return s @ v, s.abs().sum()


@left("not proved")
def linear_window(q, k, v):
    i = torch.arange(T)
    d = i[:, None] - i
    return ((q @ k.mT) * ((d >= 0) & (d < 3))) @ v


@left("not proved")
def linear_strictly_causal(q, k, v):
    return torch.tril(q @ k.mT, -1) @ v


@left("")
def softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


@left("")
def softmax_of_half(q, k, v):
    return (q @ k.mT).softmax(-1).sqrt() @ v


@left("")
def softcap(q, k, v):
    return (torch.tanh(q @ k.mT / 5) * 5).softmax(-1) @ v


@left("")
def probabilities_masked_after(q, k, v):
    return (q @ k.mT).softmax(-1).tril() @ v


@left("")
def softmax_by_hand(q, k, v):
    e = (q @ k.mT).tril().exp()
    return (e / e.sum(-1, keepdim=True)) @ v


@left("")
def relu(q, k, v):
    return (q @ k.mT).relu().tril() @ v


@left("")
def squared(q, k, v):
    return ((q @ k.mT) ** 2).tril() @ v


@left("")
def absolute(q, k, v):
    return (q @ k.mT).abs().tril() @ v


@left("")
def times_itself(q, k, v):
    s = q @ k.mT
    return (s * s).tril() @ v


@left("")
def sigmoid(q, k, v):
    return (q @ k.mT).sigmoid().tril() @ v


@left("")
def stick_breaking(q, k, v):
    b = (q @ k.mT).sigmoid().tril()
    return (b * (1 - b).cumprod(-1)) @ v


@left("")
def cosine_scores(q, k, v):
    return F.normalize((q @ k.mT).tril(), dim=-1) @ v


@left("")
def norm_of_rows(q, k, v):
    s = (q @ k.mT).tril()
    return (s / s.abs().sum(-1, keepdim=True)) @ v


@left("")
def top_k(q, k, v):
    s = q @ k.mT
    least = s.topk(3, dim=-1).values[..., -1:]
    return s.masked_fill(s < least, -INF).softmax(-1) @ v


@left("")
def linear_scores_threshold(q, k, v):
    s = q @ k.mT
    return s.masked_fill(s < 0, 0) @ v


@left("")
def softmax_without_values(q, k, v):
    return (q @ k.mT).softmax(-1) + v.sum()


@left("")
def softmax_of_a_product_with_itself_transposed(q, k, v):
    return ((q @ k.mT) + (q @ k.mT).mT).softmax(-1) @ v


@left("")
def bias_of_its_own_scores(q, k, v):
    s = q @ k.mT
    return (s + s.amax(-1, keepdim=True).cos()).softmax(-2) @ v


@left("not positive")
def negative_scale_after_the_mask(q, k, v):
    return (-((q @ k.mT).masked_fill(future(), 1e30))).softmax(-1) @ v


@pytest.mark.parametrize("name", LEFT)
def test_look_alikes_are_left(name: str) -> None:
    fn, (reason,) = LEFT[name]
    seen = see(fn, *qkv())
    assert not seen.rewritten, seen.sites
    assert not seen.calls("spcompile")
    if reason:
        assert reason in " ".join(seen.reasons), seen.sites


def test_a_parameter_is_not_a_key() -> None:
    """x (A^T B) and (x A^T) B with weights are an MLP."""
    a, b = (nn.Parameter(torch.randn(9, D, dtype=torch.float64)) for _ in range(2))
    (x,) = qkv((B, T, D))
    assert not see(lambda x: x @ (a.mT @ b), x).sites
    assert not see(lambda x: (x @ a.mT) @ b, x).sites
    assert not see(lambda x: F.linear(F.linear(x, a) * 2.0, b.mT), x).sites


def test_gated_mlp_is_not_reported() -> None:
    w1, w2, w3 = (nn.Parameter(torch.randn(D, D, dtype=torch.float64)) for _ in range(3))
    (x,) = qkv((B, T, D))
    assert not see(lambda x: F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w2), w3), x).sites


def test_a_buffer_is_data() -> None:
    """Dynamo guards no buffer's values: it may be all false tomorrow."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(T, T, dtype=torch.bool).tril())

        def forward(self, q, k, v, linear):
            s = q @ k.mT
            return (
                s.masked_fill(~self.mask, 0) @ v
                if linear
                else s.masked_fill(~self.mask, -INF).softmax(-1) @ v
            )

    module = Attention()
    assert see(module, *qkv(), False).rewritten == [("softmax", "general")]
    assert see(module, *qkv(), True).reasons == ["its mask is not proved to be causal"]


def test_padding_stays_data() -> None:
    def fn(q, k, v, pad):
        return (q @ k.mT).masked_fill(future(), -INF).masked_fill(~pad[:, None, None], -INF).softmax(-1) @ v

    def finite(q, k, v, pad):
        least = torch.finfo(q.dtype).min
        return (q @ k.mT).masked_fill(future(), least).masked_fill(~pad[:, None, None], least).softmax(-1) @ v

    pad = torch.ones(B, T, dtype=torch.bool)
    pad[0, -2:] = False
    assert see(fn, *qkv(), pad).rewritten == [("softmax", "causal and general")]
    assert see(finite, *qkv(), pad).rewritten == [("softmax", "general")]
    left_padded = pad.flip(-1)  # its first rows see no key: eager's finite fill makes them uniform
    assert see(finite, *qkv(), left_padded).rewritten == [("softmax", "general")]


def test_a_row_that_keeps_no_key_is_nan_where_eager_says_so() -> None:
    """A softmax over nothing is NaN; a library's attention gives 0 there."""

    def by_hand(q, k, v, pad):
        return (q @ k.mT).masked_fill(~pad[:, None, None], -INF).softmax(-1) @ v

    pad = torch.ones(B, T, dtype=torch.bool)
    pad[0] = False
    def backend(gm, _):
        assert [site.rewritten for site in recognize(gm)] == [True]
        return gm

    torch._dynamo.reset()
    q, k, v = (x.requires_grad_() for x in qkv())
    expected = by_hand(q, k, v, pad)
    found = torch.compile(by_hand, backend=backend)(q, k, v, pad)
    torch.testing.assert_close(found, expected, equal_nan=True)
    # Eager's dv is NaN; its dq and dk are NaN or 0, by the spelling. Ours are NaN: never finite where eager's are not.
    for gradient in torch.autograd.grad(found.sum(), (q, k, v)):
        assert gradient[0].isnan().all() and not gradient[1].isnan().any()
    assert found[0].isnan().all() and not found[1:].isnan().any()


def test_trained_bias_is_left() -> None:
    bias = nn.Parameter(torch.randn(H, T, T, dtype=torch.float64))
    for fn in (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias),
        lambda q, k, v: (q @ k.mT + bias).softmax(-1) @ v,
    ):
        seen = see(fn, *qkv())
        assert not seen.rewritten and "gradient" in seen.reasons[0]


# ---------------------------------------------------------------- edits that would be wrong


def test_overwritten_operand_is_refused() -> None:
    def fn(q, k, v):
        q = q * 1
        s = q @ k.mT
        q.zero_()
        return s.softmax(-1) @ v + q

    def through_a_view(q, k, v):
        k = k * 1
        s = (q @ k.mT).tril()
        k[:, 0] = 0
        return s @ v + k

    for f in (fn, through_a_view):
        seen = see(f, *(x.detach() for x in qkv()))
        assert not seen.rewritten and "overwritten" in seen.reasons[0]


def test_updated_operand_is_used_as_it_is_now() -> None:
    def fn(q, k, v):
        k = k * 1
        k[:, 0] = 0
        q = q * 2
        q += 1
        return (q @ k.mT).softmax(-1) @ v

    assert see(fn, *qkv()).rewritten == [("softmax", "all")]


def test_mask_written_by_slice_is_data() -> None:
    def fn(q, k, v):
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        mask[3, 1] = False
        return (q @ k.mT).masked_fill(~mask, -INF).softmax(-1) @ v

    assert see(fn, *qkv()).rewritten == [("softmax", "general")]


def test_gradient_switched_off_inside_is_refused() -> None:
    def fn(q, k, v):
        with torch.no_grad():
            s = q @ k.mT
        return s.softmax(-1) @ v

    seen = see(fn, *qkv())
    assert not seen.rewritten and "gradients" in seen.reasons[0]
    assert not see(lambda q, k, v: (q @ k.mT).detach().softmax(-1) @ v, *qkv()).rewritten


def test_checkpointed_block_is_edited_inside() -> None:
    def block(q, k, v):
        return masked_fill_arange(q, k, v).relu() + times_tril(q, k, v)

    def fn(q, k, v):
        return checkpoint(block, q.sin(), k, v, use_reentrant=False)

    seen = see(fn, *qkv())
    assert sorted(seen.rewritten) == [("linear", "causal"), ("softmax", "causal")]
    outer = seen.graphs[0]
    assert not any("spcompile" in str(n.target) for n in outer.graph.nodes) and seen.calls("spcompile") == 2


def test_mask_from_outside_a_checkpoint() -> None:
    def fn(q, k, v):
        mask = future()
        return checkpoint(lambda q, k, v, m: (q @ k.mT).masked_fill(m, -INF).softmax(-1) @ v, q, k, v, mask,
                          use_reentrant=False)  # fmt: skip

    assert see(fn, *qkv()).rewritten == [("softmax", "causal")]


def test_pieces_across_a_checkpoint_are_refused() -> None:
    def fn(q, k, v):
        s = checkpoint(lambda q, k: q @ k.mT, q, k, use_reentrant=False)
        return s.softmax(-1) @ v

    def linear(q, k, v):
        s = (q @ k.mT).tril()
        return checkpoint(lambda s, v: s @ v, s, v, use_reentrant=False)

    for f in (fn, linear):
        seen = see(f, *qkv())
        assert not seen.rewritten and "checkpoint boundary" in seen.reasons[0]


# ---------------------------------------------------------------- around it


def test_inside_a_composite_function() -> None:
    mha = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    (x,) = qkv((B, T, 8))
    seen = see(lambda x: mha(x, x, x, need_weights=False)[0], x)
    assert seen.rewritten == [("softmax", "all")]


def test_autocast() -> None:
    def fn(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ((q @ k.mT) * 0.3).masked_fill(future(), -INF).softmax(-1) @ v, times_tril(q, k, v)

    # bfloat16 has 8 bits; eager rounds the probabilities too
    seen = see(fn, *qkv(dtype=torch.float32), tol=4e-2)
    assert sorted(seen.rewritten) == [("linear", "causal"), ("softmax", "causal")]


def test_symbolic_length() -> None:
    sites = []

    def fn(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) + times(q, k, v)

    def times(q, k, v):
        n = q.shape[2]
        return ((q @ k.mT) * torch.ones(n, n, dtype=q.dtype).tril()) @ v

    from spcompile.passes.recognize import recognize

    def backend(gm, _):
        sites.append([s.mask for s in recognize(gm) if s.rewritten])
        return gm

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=backend, dynamic=True)
    for n in (6, 9):
        q, k, v = qkv(*((B, H, n, D),) * 3)
        torch.testing.assert_close(compiled(q, k, v), fn(q, k, v))
    assert sites == [["causal", "causal"]] * 2


def test_disabled() -> None:
    from spcompile.passes.recognize import recognize

    calls = []

    def backend(gm, _):
        before = gm.code
        calls.append(recognize(gm, enabled=False) == [] and gm.code == before)
        return gm

    torch._dynamo.reset()
    torch.compile(sdpa_causal, backend=backend)(*qkv())
    assert calls == [True]


def test_a_small_model() -> None:
    """Projections, heads, two kinds of attention and an MLP, in two layers."""

    class Layer(nn.Module):
        def __init__(self, linear: bool) -> None:
            super().__init__()
            self.linear = linear
            self.norm = nn.LayerNorm(8, dtype=torch.float64)
            self.qkv, self.up, self.down = (
                nn.Linear(a, b, dtype=torch.float64) for a, b in ((8, 24), (8, 16), (16, 8))
            )

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.view(B, -1, 2, 4).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
            if self.linear:
                q, k = F.silu(q), F.silu(k)
                s = q @ k.mT * torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril()
                o = s @ v / (s.sum(-1, keepdim=True).abs() + 1)
            else:
                o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + o.transpose(1, 2).reshape(x.shape)
            return x + self.down(F.gelu(self.up(x)))

    model = nn.Sequential(Layer(True), Layer(False), Layer(True))
    (x,) = qkv((B, T, 8))
    seen = see(model, x)
    assert seen.rewritten == [("linear", "causal"), ("softmax", "causal"), ("linear", "causal")]
    assert not seen.reasons
