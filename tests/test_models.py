"""The example models by themselves, in eager: shapes, loss, gradients, causality, sizes."""

from __future__ import annotations

import math

import pytest
import torch

import models
from models import based, lightning, linear_llama3, mamba2, rebased, retention, simple_gla
from models.frame import Model, SoftmaxAttention, rotary_table
from models.linear_llama3 import Config, LinearLlama3

PATTERNS = {"L": "LLLLLLLL", "LLLLLLLN": "LLLLLLLN", "LLLN": "LLLNLLLN", "LN": "LNLNLNLN", "N": "NNNNNNNN"}
SMALL = dict(vocab=32, layers=8, hidden=16, heads=4, kv_heads=2, mlp=24)

every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
either_direction = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
either_norm = pytest.mark.parametrize("normaliser", [False, True], ids=["plain", "normalised"])


def build(seed: int = 0, **overrides) -> LinearLlama3:
    """A small float64 model whose weights are large enough that every part of it matters."""
    torch.manual_seed(seed)
    model = LinearLlama3(Config(**{**SMALL, **overrides})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model


@every_pattern
def test_pattern_is_repeated_over_the_layers(pattern):
    model = build(pattern=pattern)
    assert model.config.kinds == PATTERNS[pattern]
    kinds = {SoftmaxAttention: "N", linear_llama3.LinearAttention: "L"}
    assert "".join(kinds[type(block.attention)] for block in model.blocks) == PATTERNS[pattern]


@every_pattern
@either_direction
@either_norm
def test_shapes_loss_and_gradients(pattern, causal, normaliser):
    model = build(pattern=pattern, causal=causal, normaliser=normaliser)
    inputs = model.example_inputs(seq=13, batch=2)
    assert model(inputs["ids"]).shape == (2, 13, 32)
    loss = model(**inputs)
    assert loss.shape == () and loss.dtype == torch.float64 and loss.isfinite()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@every_pattern
@either_direction
@either_norm
def test_only_a_causal_model_ignores_later_tokens(pattern, causal, normaliser):
    model = build(pattern=pattern, causal=causal, normaliser=normaliser)
    ids = model.example_inputs(seq=12)["ids"]
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 32
    difference = (model(ids) - model(changed))[:, :7].abs().amax(-1)
    if causal:
        assert difference.max() < 1e-12
    else:
        assert difference.min() > 1e-9


@either_direction
def test_labels_are_shifted_only_in_a_causal_model(causal):
    model = build(causal=causal)
    ids = model.example_inputs(seq=9, batch=2)["ids"]
    labels = ids.clone()
    labels[:, ::3] = -100
    log_p = model(ids).log_softmax(-1)
    if causal:
        log_p, labels_seen = log_p[:, :-1], labels[:, 1:]
    else:
        labels_seen = labels
    counted = labels_seen != -100
    picked = log_p.gather(-1, labels_seen.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(model(ids, labels), -picked[counted].mean(), rtol=1e-12, atol=1e-12)


@either_norm
def test_causal_linear_attention_is_the_recurrence(normaliser):
    """S_t = S_{t-1} + k_t^T v_t,  o_t = q_t S_t / sqrt(D): token by token."""
    torch.manual_seed(0)
    q, k, v = (torch.rand(2, 3, 11, 4, dtype=torch.float64) for _ in range(3))
    S, z, rows = torch.zeros(2, 3, 4, 4, dtype=torch.float64), torch.zeros(2, 3, 4, dtype=torch.float64), []
    for t in range(11):
        S = S + k[:, :, t, :, None] * v[:, :, t, None, :]
        z = z + k[:, :, t]
        row = (q[:, :, t, None] @ S)[:, :, 0] / 2
        rows.append(row / ((q[:, :, t] * z).sum(-1, keepdim=True) / 2 + 1e-6) if normaliser else row)
    got = linear_llama3.causal_linear_attention(q, k, v, normaliser)
    torch.testing.assert_close(got, torch.stack(rows, 2), rtol=1e-12, atol=1e-12)
    last = linear_llama3.linear_attention(q, k, v, normaliser)[:, :, -1]
    torch.testing.assert_close(last, rows[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", ["L", "N"])
def test_grouped_heads_equal_written_out_heads(pattern):
    """Copying each key/value head once per query head of its group changes nothing."""
    grouped, full = build(pattern=pattern), build(pattern=pattern, kv_heads=4)
    state = grouped.state_dict()
    for name, weight in state.items():
        if name.endswith(("key.weight", "value.weight")):
            state[name] = weight.view(2, 1, 4, 16).expand(2, 2, 4, 16).reshape(16, 16)
    full.load_state_dict(state)
    ids = grouped.example_inputs(seq=10)["ids"]
    torch.testing.assert_close(grouped(ids), full(ids), rtol=1e-12, atol=1e-12)


def test_float64_is_float64_throughout():
    """A float32 step anywhere would leave 1e-7: rotary angles are the usual suspect."""
    model = build(pattern="LN")
    cos, sin = rotary_table(500, 4, 500_000.0, torch.float64, torch.device("cpu"))
    expected = math.cos(499 / math.sqrt(500_000))
    assert (cos**2 + sin**2 - 1).abs().max() < 1e-15
    assert cos[499, 1].item() == pytest.approx(expected, abs=1e-14)
    assert model(model.example_inputs(seq=8)["ids"]).dtype == torch.float64


def test_dropout_acts_in_training_only():
    model = build(dropout=0.5)
    ids = model.example_inputs(seq=16)["ids"]
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_stay_narrow_and_near(dtype):
    model = build()
    inputs = model.example_inputs(seq=16)
    exact = model(**inputs)
    loss = model.to(dtype)(**inputs)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4 if dtype == torch.float32 else 5e-2)


def test_tiny_is_tiny():
    assert sum(p.numel() for p in models.get("linear_llama3:tiny")().parameters()) < 2e6


# Llama 3: embedding V C (twice unless tied), and for each layer the projections, the SwiGLU and the norms;
# linear layers, 3 of 4 here, add a norm of D.
COUNTS = {
    "1b": 128_256 * 2048 + 16 * (3 * 2048**2 + 3 * 2048 * 8192 + 2 * 2048) + 12 * 128 + 2048,
    "8b": 2 * 128_256 * 4096 + 32 * (5 * 4096**2 // 2 + 3 * 4096 * 14_336 + 2 * 4096) + 24 * 128 + 4096,
}


@pytest.mark.parametrize(("preset", "count"), COUNTS.items())
def test_presets_have_their_size_on_the_meta_device(preset, count):
    with torch.device("meta"):
        model = models.get(f"linear_llama3:{preset}")()
        inputs = model.example_inputs(seq=1 << 20)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == count
    assert inputs["ids"].shape == (1, 1 << 20) and inputs["ids"].is_meta
    assert round(count / 1e9) == int(preset[0])


def test_presets_are_found_by_name():
    assert set(models.names()) >= {"linear_llama3:tiny", "linear_llama3:1b", "linear_llama3:8b"}
    assert models.get("models.linear_llama3:tiny", pattern="L")().config.pattern == "L"
    assert getattr(linear_llama3, "1b") is linear_llama3.llama_1b
    with pytest.raises(ValueError, match="linear_llama3:tiny"):
        models.get("nothing:tiny")


@pytest.mark.parametrize(
    ("field", "value"),
    [("pattern", "LX"), ("pattern", ""), ("heads", 3), ("heads", 16), ("kv_heads", 3), ("feature_map", "x")],
)
def test_bad_configurations_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Config(**{**SMALL, field: value})


def test_a_normaliser_needs_a_positive_feature_map():
    with pytest.raises(ValueError, match="normaliser"):
        Config(**SMALL, normaliser=True, feature_map="silu")


# ------------------------------------------------------------------------------------ the linear family

VARIANTS = [
    *("retention", "lightning", "simple_gla", "mamba2", "gla", "hgrn2"),
    *("rwkv6", "deltanet", "gated_deltanet", "kda", "based", "rebased"),
]
every_variant = pytest.mark.parametrize("name", VARIANTS)


def variant(name: str, **overrides) -> Model:
    torch.manual_seed(0)
    shape = dict(vocab=16, layers=2, hidden=16, heads=2, kv_heads=1, mlp=24, pattern="L")
    return models.get(f"{name}:tiny", **{**shape, **overrides})()


@every_variant
@pytest.mark.parametrize("pattern", ["L", "LN"])
def test_a_variant_learns(name, pattern):
    """Tokens that repeat with period three: the loss falls from ln 16 to almost nothing."""
    model = variant(name, pattern=pattern)
    ids = torch.tensor([3, 11, 6]).repeat(5)[None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[0] == pytest.approx(math.log(16), abs=0.3) and losses[-1] < 0.3


@every_variant
def test_a_variant_is_causal_and_float64(name):
    model = variant(name).double()
    ids = model.example_inputs(seq=9)["ids"]
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 16
    difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert difference[:6].max() < 1e-14 and difference[6:].min() > 1e-9
    assert model(ids).dtype == torch.float64


@every_variant
def test_a_variant_has_no_bidirectional_form(name):
    with pytest.raises(ValueError, match="causal"):
        variant(name, causal=False)


def recurrence(q, k, v, decay):
    """S_t = decay_t S_{t-1} + k_t^T v_t and q_t S_t, token by token; decay broadcasts to [B, H, T, K]."""
    decay = decay.expand(k.shape)
    state, rows = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[2]):
        state = decay[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        rows.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(rows, 2)


def _based_features(x):
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2)
    return torch.cat([torch.ones_like(x[..., :1]), x, squares], -1)


def _normalised(q, k, v):
    one = torch.ones((), dtype=q.dtype)
    out = recurrence(q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1), one)
    return out[..., :-1], out[..., -1:]


def test_retention_is_its_recurrence():
    q, k, v, _ = _qkvg()
    gamma = torch.tensor([0.9, 0.5, 0.99], dtype=q.dtype)
    expected = recurrence(q, k, v, gamma[:, None, None]) / 2
    torch.testing.assert_close(retention.retention(q, k, v, gamma), expected, rtol=1e-12, atol=1e-12)


def test_lightning_is_its_recurrence():
    q, k, v, _ = _qkvg()
    slopes = torch.tensor([0.9, 0.5, 0.01], dtype=q.dtype)
    expected = recurrence(q, k, v, (-slopes).exp()[:, None, None])
    torch.testing.assert_close(lightning.lightning(q, k, v, slopes), expected, rtol=1e-12, atol=1e-12)


def test_simple_gla_is_its_recurrence():
    q, k, v, g = _qkvg()
    expected = recurrence(q, k, v, g.exp()[..., None]) / 2
    torch.testing.assert_close(simple_gla.simple_gla(q, k, v, g), expected, rtol=1e-12, atol=1e-12)


def test_mamba2_is_its_recurrence():
    q, k, v, g = _qkvg()
    k, q = k[:, :1].expand(k.shape), q[:, :1].expand(q.shape)
    expected = recurrence(q, k, v, g.exp()[..., None])
    torch.testing.assert_close(mamba2.ssd(v, g, k[:, 0], q[:, 0]), expected, rtol=1e-12, atol=1e-12)


def test_based_is_its_recurrence():
    q, k, v, _ = _qkvg()
    out, total = _normalised(_based_features(q / math.sqrt(2)), _based_features(k / math.sqrt(2)), v)
    torch.testing.assert_close(based.based(q, k, v), out / total, rtol=1e-12, atol=1e-12)


def test_rebased_is_its_recurrence():
    q, k, v, _ = _qkvg()
    features = [(x[..., :, None] * x[..., None, :]).flatten(-2) / 2 for x in (q, k)]
    out, total = _normalised(*features, v)
    torch.testing.assert_close(rebased.rebased(q, k, v), out / (total + 1e-6), rtol=1e-12, atol=1e-12)


def _qkvg():
    """q, k [2, 3, 11, 4], v [2, 3, 11, 5], and the log decay of each token [2, 3, 11]."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 11, size, dtype=torch.float64) for size in (4, 4, 5))
    return q, k, v, -torch.rand(2, 3, 11, dtype=torch.float64)
