"""Recognition of decays: every usual spelling of a decay mask is proved; look-alikes are left."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recognition import INF, B, D, H, T, future, see, spelling
from torch import Tensor

from spcompile.simulate import simulated
from tests.releases import each_change

CONSTANT, DATA, LEFT = {}, {}, {}


def operands(*extra: tuple[int, ...]) -> list[Tensor]:
    """q, k, v [B, H, T, D], gates [B, H, T] (log decays), slopes [H] > 0."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, T, D, generator=g, dtype=torch.float64) for _ in range(3))
    gate = F.logsigmoid(torch.randn(B, H, T, generator=g, dtype=torch.float64))
    slope = torch.rand(H, generator=g, dtype=torch.float64) + 0.1
    return [x.requires_grad_() for x in (q, k, v, gate, slope)]


def distance() -> Tensor:
    i = torch.arange(T)
    return i[:, None] - i[None, :]


def per_head(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1)


# ---------------------------------------------------------------- constant per head


@spelling(CONSTANT, "causal with decay")
def power_of_a_number(q, k, v, g, s):
    return (q @ k.mT * (0.9 ** distance().double() * (distance() >= 0))) @ v


@spelling(CONSTANT, "causal with decay")
def retnet_with_nan_filled(q, k, v, g, s):
    n, m = torch.arange(T).unsqueeze(1), torch.arange(T).unsqueeze(0)
    decay = (0.8 ** (n - m).double()) * (n >= m).double()
    decay[decay != decay] = 0
    return (q @ k.mT * decay.unsqueeze(0)) @ v


@spelling(CONSTANT, "causal with decay")
def power_of_gammas(q, k, v, g, s):
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=q.dtype))
    n = torch.arange(T, dtype=q.dtype)
    decay = torch.where(n[:, None] >= n, gamma[:, None, None] ** (n[:, None] - n), 0.0)
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k) * decay, v) / math.sqrt(D)


@spelling(CONSTANT, "causal with decay")
def power_of_data_of_any_sign(q, k, v, g, s):
    gamma = s - 0.5
    n = torch.arange(T, dtype=q.dtype)
    decay = torch.where(n[:, None] >= n, gamma[:, None, None] ** (n[:, None] - n), 0.0)
    return (q @ k.mT * decay) @ v


@spelling(CONSTANT, "causal with decay")
def slopes_with_tril(q, k, v, g, s):
    return (q @ k.mT * torch.exp(-per_head(s) * distance()).tril()) @ v


@spelling(CONSTANT, "causal with decay")
def lightning(q, k, v, g, s):
    i = torch.arange(T)
    index = i[:, None] - i[None, :]
    index = per_head(s) * index
    decay = torch.exp(torch.where(index >= 0, -index, -INF))
    # the condition above is on data: the next line says the same by positions
    decay = torch.exp(torch.where(distance() >= 0, -per_head(s) * distance(), -INF))
    return (q @ k.mT * decay) @ v


@spelling(CONSTANT, "causal with decay")
def exponents_filled_with_infinity(q, k, v, g, s):
    s = s.detach()  # the gradient of an infinite exponent is no number
    i = torch.arange(T).to(s)
    keep = torch.tril(torch.ones(T, T).to(s))
    mask = torch.masked_fill(i[:, None] - i[None, :], ~keep.bool(), INF)
    mask = torch.nan_to_num(torch.exp(mask * -s[:, None, None]))
    return (q @ k.mT * mask) @ v


@spelling(CONSTANT, "causal with decay")
def its_own_normaliser(q, k, v, g, s):
    mask = torch.exp(-per_head(s) * distance().clamp(min=0)) * (distance() >= 0)
    mask = mask / mask.sum(dim=-1, keepdim=True).sqrt()
    return (q @ k.mT * D**-0.5 * mask) @ v


@spelling(CONSTANT, "causal with decay")
def base_two(q, k, v, g, s):
    n = torch.arange(T, dtype=q.dtype)
    decay = torch.exp2((n.unsqueeze(-1) - n) * -s.view(-1, 1, 1)) * n.unsqueeze(-1).ge(n)
    a = torch.einsum("bhqd,bhkd,hqk->bhqk", q * D**-0.5, k, decay)
    return torch.einsum("bhqk,bhkd->bhqd", a, v)


@spelling(CONSTANT, "causal with decay")
def fla_retention(q, k, v, g, s):
    """fla's naive_retention, in float64."""
    heads, length, size = q.shape[1:]
    s = (1 - q.new_tensor(2.0).pow(-5.0 - q.new_tensor(range(heads)))).log2()
    n = q.new_tensor(range(length))
    n = torch.exp2((n.unsqueeze(-1) - n) * s.view(-1, 1, 1)) * n.unsqueeze(-1).ge(n)
    s = torch.einsum("bhqd,bhkd,hqk->bhqk", q * size**-0.5, k, n.to(q.dtype))
    return torch.einsum("bhqk,bhkd->bhqd", s, v)


@spelling(CONSTANT, "causal with decay")
def with_a_normaliser(q, k, v, g, s):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    a = q @ k.mT * torch.exp(-per_head(s) * distance()).tril()
    return (a @ v) / (a.sum(-1, keepdim=True) + 1e-6)


@spelling(CONSTANT, "strictly causal with decay")
def the_own_token_left_out(q, k, v, g, s):
    return (q @ k.mT * torch.exp(-per_head(s) * distance()).tril(-1)) @ v


@spelling(CONSTANT, "bidirectional with decay")
def both_directions(q, k, v, g, s):
    return (q @ k.mT * torch.exp(-per_head(s) * distance().abs())) @ v


@spelling(CONSTANT, "reversed with decay")
def towards_the_past(q, k, v, g, s):
    return (q @ k.mT * torch.exp(per_head(s) * distance()).triu()) @ v


@spelling(CONSTANT, "strictly causal")
def no_decay_own_token_left_out(q, k, v, g, s):
    return torch.tril(q @ k.mT, -1) @ v


@spelling(CONSTANT, "reversed")
def no_decay_reversed(q, k, v, g, s):
    return torch.triu(q @ k.mT) @ v


# ---------------------------------------------------------------- data-dependent


@spelling(DATA, "causal with decay")
def simple_gla(q, k, v, g, s):
    g = g.cumsum(-1)
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).tril().exp().tril()
    return (q @ k.transpose(-1, -2) * 0.4 * decay) @ v


@spelling(DATA, "causal with decay")
def filled_with_minus_infinity(q, k, v, g, s):
    c = torch.cumsum(g, dim=2)
    decay = (c[..., :, None] - c[..., None, :]).masked_fill(future(), -INF).exp()
    return ((q @ k.mT) * decay) @ v


@spelling(DATA, "causal with decay")
def where_then_exp(q, k, v, g, s):
    c = g.cumsum(-1)
    keep = torch.ones(T, T, dtype=torch.bool).tril()
    decay = torch.exp(torch.where(keep, c[:, :, :, None] - c[:, :, None], -INF))
    return ((q @ k.mT) * decay) @ v


def segsum(x: Tensor) -> Tensor:
    """As in state-spaces/mamba's minimal SSD."""
    t = x.size(-1)
    x = x.unsqueeze(-1).expand(*x.shape, t)
    mask = torch.tril(torch.ones(t, t, dtype=torch.bool), diagonal=-1)
    x = x.masked_fill(~mask, 0)
    sums = torch.cumsum(x, dim=-2)
    mask = torch.tril(torch.ones(t, t, dtype=torch.bool), diagonal=0)
    return sums.masked_fill(~mask, -INF)


@spelling(DATA, "causal with decay")
def ssd(q, k, v, g, s):
    return (torch.exp(segsum(g)) * (q @ k.mT)) @ v


@spelling(DATA, "causal with decay")
def ssd_tokens_first(q, k, v, g, s):
    """C and B are shared by the heads."""
    c, b, x = q[:, 0], k[:, 0], v.transpose(1, 2)
    dt = F.softplus(g.transpose(1, 2))
    a = -dt * s
    decay = torch.exp(segsum(a.transpose(1, 2)))
    return torch.einsum("bln,bsn,bhls,bshp->blhp", c, b, decay, x * dt[..., None])


@spelling(DATA, "causal with decay")
def ssd_matrix(q, k, v, g, s):
    scores = torch.einsum("btn,bsn->bts", q[:, 0], k[:, 0])
    m = torch.exp(segsum(g)) * scores[:, None]
    return torch.einsum("bhts,bhsp->bhtp", m, v)


@spelling(DATA, "causal with decay")
def segment_sums_by_a_product(q, k, v, g, s):
    x = g[..., None] * torch.ones(T, T, dtype=g.dtype).tril(-1)
    decay = x.cumsum(-2).exp().tril()
    return ((q @ k.mT) * decay) @ v


@spelling(DATA, "causal with decay")
def outer_product_of_exponentials(q, k, v, g, s):
    c = g.cumsum(-1)
    decay = torch.einsum("bhi,bhj->bhij", c.exp(), (-c).exp())
    return ((q @ k.mT) * decay.tril()) @ v


@spelling(DATA, "causal with decay")
def rate_times_a_running_sum(q, k, v, g, s):
    """exp(-A_h sum of dt)."""
    c = g.cumsum(-1)
    decay = torch.exp(per_head(s) * (c[..., None] - c[..., None, :]))
    return ((q @ k.mT) * decay * (distance() >= 0)) @ v


@spelling(DATA, "causal with decay")
def gate_and_slope(q, k, v, g, s):
    c = g.cumsum(-1)
    decay = torch.exp(c[..., None] - c[..., None, :] - per_head(s) * distance())
    return ((q @ k.mT) * decay).tril() @ v


@spelling(DATA, "causal with decay")
def two_masks(q, k, v, g, s):
    c = g.cumsum(-1)
    decay = (c[..., None] - c[..., None, :]).tril().exp()
    return ((q @ k.mT) * decay * torch.exp(-per_head(s) * distance())).tril() @ v


@spelling(DATA, "causal with decay")
def no_running_sum(q, k, v, g, s):
    """Any function of the token will do."""
    f = -torch.arange(T, dtype=q.dtype) ** 1.5 + 0 * g
    decay = (f[..., None] - f[..., None, :]).masked_fill(future(), -INF).exp()
    return ((q @ k.mT) * decay) @ v


@spelling(DATA, "causal with decay")
def an_input_gate_in_the_exponent(q, k, v, g, s):
    c = g.cumsum(-1)
    decay = (c[..., None] - c[..., None, :] + g[..., None, :]).masked_fill(future(), -INF).exp()
    return ((q @ k.mT) * decay) @ v


@spelling(DATA, "causal with decay")
def the_gate_of_the_key_counts(q, k, v, g, s):
    x = g[..., None] * torch.ones(T, T, dtype=g.dtype).tril()
    decay = x.cumsum(-2).exp().tril()
    return ((q @ k.mT) * decay) @ v


@spelling(DATA, "causal with decay")
def normalised_by_a_sum(q, k, v, g, s):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    c = g.cumsum(-1)
    a = (q @ k.mT) * (c[..., None] - c[..., None, :]).tril().exp().tril()
    return (a @ v) / a.sum(-1, keepdim=True).clamp_min(1e-3)


@spelling(DATA, "strictly causal with decay")
def gate_own_token_left_out(q, k, v, g, s):
    c = g.cumsum(-1)
    return ((q @ k.mT) * (c[..., None] - c[..., None, :]).tril(-1).exp().tril(-1)) @ v


@spelling(DATA, "strictly causal with decay")
def running_sum_shifted_by_one(q, k, v, g, s):
    """RWKV's: the decay of the query itself does not count yet."""
    c = g.cumsum(-1)
    before = c - g
    return ((q @ k.mT) * (before[..., None] - c[..., None, :]).tril(-1).exp().tril(-1)) @ v


@spelling(DATA, "reversed with decay")
def gate_reversed(q, k, v, g, s):
    c = g.cumsum(-1)
    return ((q @ k.mT) * (c[..., None, :] - c[..., None]).triu().exp().triu()) @ v


FOUND = CONSTANT | DATA


@pytest.mark.parametrize("name", FOUND)
def test_decay_is_found_and_equal(name: str) -> None:
    fn, (mask,) = FOUND[name]
    seen = see(fn, *operands())
    assert seen.rewritten == [("linear", mask)], seen.sites
    assert seen.calls("linear_attention") == 1 + mask.startswith("bidirectional")
    assert not any(seen.calls(op) for op in ("matmul", "einsum")), seen.graphs[0].code


def _step(fn, xs: list[Tensor]) -> list[Tensor]:
    xs = [x.detach().clone().requires_grad_() for x in xs]
    out = fn(*xs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    grads = torch.autograd.grad((out * weight).sum(), xs, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if d is None else d for d, x in zip(grads, xs, strict=True))]


@pytest.mark.parametrize("ranks", each_change([1, 2, 3], [3]))
@pytest.mark.parametrize("name", ["its_own_normaliser", "both_directions", "ssd_tokens_first", "two_masks",
                                  "normalised_by_a_sum", "gate_own_token_left_out", "no_running_sum",
                                  "gate_reversed"])  # fmt: skip
def test_decays_on_ranks(name: str, ranks: int) -> None:
    fn, _ = FOUND[name]
    xs = operands()
    torch._dynamo.reset()
    # The tokens are dim 2 of q, which seeds all else.
    got = _step(torch.compile(fn, backend=simulated(ranks), fullgraph=True), xs)
    for x, y in zip(got, _step(fn, xs), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9 * max(float(y.abs().max()), 1.0))


# ---------------------------------------------------------------- look-alikes


def left(fn):
    LEFT[fn.__name__] = fn
    return fn


@left
def growth(q, k, v, g, s):
    return (q @ k.mT * (1.1 ** distance() * (distance() >= 0))) @ v


@left
def off_by_one(q, k, v, g, s):
    return (q @ k.mT * torch.exp(-per_head(s) * distance()).tril(1)) @ v


@left
def band(q, k, v, g, s):
    return (q @ k.mT * torch.exp(-per_head(s) * distance()).tril().triu(-3)) @ v


@left
def a_sum_of_decays(q, k, v, g, s):
    return (q @ k.mT * (torch.exp(-per_head(s) * distance()) + 1.0).tril()) @ v


@left
def not_exponential(q, k, v, g, s):
    return (q @ k.mT * (1 / (1.0 + distance().abs())).tril()) @ v


@left
def gaussian(q, k, v, g, s):
    return (q @ k.mT * torch.exp(-per_head(s) * distance() ** 2).tril()) @ v


@left
def running_sum_over_heads(q, k, v, g, s):
    c = g.cumsum(1)
    return ((q @ k.mT) * (c[..., None] - c[..., None, :]).tril().exp().tril()) @ v


@left
def different_gates(q, k, v, g, s):
    c, d = g.cumsum(-1), (2 * g).sin().cumsum(-1)
    return ((q @ k.mT) * (c[..., None] - d[..., None, :]).tril().exp().tril()) @ v


@left
def running_maximum_taken_off(q, k, v, g, s):
    """mLSTM: stabilised by a maximum per row."""
    c = g.cumsum(-1)
    log = (c[..., None] - c[..., None, :] + q.sum(-1)[..., None, :]).masked_fill(future(), -INF)
    weights = torch.exp(log - log.amax(-1, keepdim=True))
    return ((q @ k.mT) * weights) @ v


@left
def decay_of_the_scores(q, k, v, g, s):
    """Forgetting attention: the gate goes into a softmax."""
    c = g.cumsum(-1)
    scores = q @ k.mT + (c[..., None] - c[..., None, :])
    weights = scores.masked_fill(future(), -INF).exp()
    return (weights @ v) / weights.sum(-1, keepdim=True)


@left
def part_of_a_longer_sum(q, k, v, g, s):
    """A decay too, but its sum is not over the tokens alone."""
    c = F.pad(g, (1, 0), value=-0.3).cumsum(-1)[..., 1:]
    return ((q @ k.mT) * (c[..., None] - c[..., None, :]).tril().exp().tril()) @ v


@left
def log_linear(q, k, v, g, s):
    """A weight per level of a tree over the tokens, beside the decay."""
    c = g.cumsum(-1)
    decay = (c[..., None] - c[..., None, :]).tril().exp().tril()
    level = (torch.arange(T)[:, None] ^ torch.arange(T)).double().add(1).log2().floor()
    return ((q @ k.mT) * decay * torch.where(level > 1, per_head(s), 1.0)) @ v


@left
def stick_breaking(q, k, v, g, s):
    z = q @ k.mT
    log = F.logsigmoid(-z).tril(-1)
    after = log.sum(-1, keepdim=True) - log.cumsum(-1)
    return (torch.sigmoid(z) * after.exp()).tril(-1) @ v


@left
def gates_between_pairs(q, k, v, g, s):
    """A different decay for every pair."""
    x = torch.einsum("bhi,bhj->bhij", g, g).cumsum(-2)
    return ((q @ k.mT) * (-x).exp().tril()) @ v


@pytest.mark.parametrize("name", LEFT)
def test_look_alikes_are_left(name: str) -> None:
    seen = see(LEFT[name], *operands())
    assert not seen.calls("linear_attention"), seen.sites


# ---------------------------------------------------------------- random programs

# What is a decay, or with a mask of the past becomes one.
EXPONENTS = {
    "0 * i": True, "c_i - c_j": True, "2 * (c_i - c_j)": True, "s * (c_i - c_j)": True, "f_i - f_j": True,
    "s * (j - i)": True, "(j - i) / 3": True, "c_i - c_j + g_j": True,
    "segsum(g).masked_fill(i < j, 0.0)": True,
    "f_i - f_j + s": True, "(s / 2) * (f_i - f_j)": True, "c_j - c_i": True, "s * (i - j)": True,
    "c_i - f_j": False, "g_i + g_j": False, "f_i * c_j": False,
    "s * (i - j) ** 2 / -9": False, "c_i - c_j + f_i": False,
}  # fmt: skip
WRAPPERS = [
    "e.tril({d}).exp().tril({d})", "e.masked_fill(i - j < -({d}), -INF).exp()", "e.exp() * (i - j >= -({d}))",
    "torch.where(i + {d} >= j, e.exp(), 0.0)", "e.triu({d}).exp().triu({d})",
    "e.exp().masked_fill(j > i + {d}, 0)",
    "torch.exp(e) * torch.ones(T, T).double().tril({d}) / 3", "e.exp()",
]  # fmt: skip


SOURCE = """
def fn(q, k, v, g, s):
    i, j = torch.arange(T, dtype=g.dtype)[:, None], torch.arange(T, dtype=g.dtype)
    s, c, f = s.view(-1, 1, 1), g.cumsum(-1), (3 * g).cos()
    c_i, c_j, f_i, f_j = c[..., None], c[..., None, :], f[..., None], f[..., None, :]
    g_i, g_j = g[..., None], g[..., None, :]
    e = {first} + {second}
    return (q @ k.mT * {wrapper}) @ v
"""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    st.sampled_from(sorted(EXPONENTS)),
    st.sampled_from(sorted(EXPONENTS)),
    st.sampled_from(WRAPPERS),
    st.sampled_from([-1, 0, 0, 1]),
)
def test_whatever_is_found_is_equal(first: str, second: str, wrapper: str, diagonal: int) -> None:
    scope = {"torch": torch, "INF": INF, "T": T, "segsum": segsum}
    program = SOURCE.format(first=first, second=second, wrapper=wrapper.format(d=diagonal))
    exec(program, scope)
    seen = see(scope["fn"], *operands())
    if EXPONENTS[first] and EXPONENTS[second] and "tril" in wrapper and diagonal <= 0:
        assert seen.calls("linear_attention"), (program, seen.sites)
