"""Recognition of attention: look-alikes are left alone, and edits are right where the code is unusual."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recognition import INF, B, D, H, T, future, qkv, see, spelling
from test_recognize import masked_fill_arange, sdpa_causal, times_tril
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spcompile.passes.recognize import recognize

LEFT = {}

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


@left("")
def softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


@left("")
def softmax_of_half(q, k, v):
    return (q @ k.mT).softmax(-1).sqrt() @ v


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
def absolute(q, k, v):
    return (q @ k.mT).abs().tril() @ v


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
    assert see(module, *qkv(), True).reasons == ["its mask is not proved to be causal, nor to be a decay"]


def test_padding_stays_data() -> None:
    def fn(q, k, v, pad):
        return (q @ k.mT).masked_fill(future(), -INF).masked_fill(~pad[:, None, None], -INF).softmax(-1) @ v

    def finite(q, k, v, pad):
        least = torch.finfo(q.dtype).min
        return (q @ k.mT).masked_fill(future(), least).masked_fill(~pad[:, None, None], least).softmax(-1) @ v

    pad = torch.ones(B, T, dtype=torch.bool)
    pad[0, -2:] = False
    assert see(fn, *qkv(), pad).rewritten == [("softmax", "causal and padding")]
    assert see(finite, *qkv(), pad).rewritten == [("softmax", "causal and padding")]
    left_padded = pad.flip(-1)  # its first rows see no key: eager's finite fill makes them uniform
    assert see(finite, *qkv(), left_padded).rewritten == [("softmax", "causal and padding")]


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
    # Eager's dv is NaN; its dq and dk are NaN or 0, by the spelling. Ours are NaN: never finite where eager's
    # are not.
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


@pytest.mark.parametrize("how", ["sdpa", "written out", "written on", "written on before"])
def test_keys_written_in_parts(how: str) -> None:
    """As transformers puts the keys of multi-head latent attention together: they are no result of a node."""

    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys = k.new_empty(k.shape)
        keys[..., :2].copy_(k[..., :2])
        keys[..., 2:].copy_(k[..., 2:] * 2)
        if how == "sdpa":
            return F.scaled_dot_product_attention(q, keys, v, is_causal=True), keys
        scores = (q @ keys.mT).masked_fill(future(), -INF)
        if how == "written on before":  # and not what the scores are of
            keys.detach()[..., :1] = 0
        out = scores.softmax(-1) @ v
        if how == "written on":
            keys.detach()[..., :1] = 0
        return out, keys

    seen = see(f, *qkv()) if "on" not in how.split() else see(f, *(x.detach() for x in qkv()))
    if how == "written on before":
        assert not seen.rewritten and "overwritten" in seen.reasons[0]
    else:
        assert seen.rewritten == [("softmax", "causal")]


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
