"""Samples of fla's kernels, which need a GPU: what they compute is said by fla's own references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.library_samples import (
    _STATES,
    SAMPLES,
    B,
    H,
    K,
    Sample,
    T,
    V,
    _beta,
    _gate,
    _qkv,
    _random,
    _sample,
    _state,
)
from tests.third_party import fla_naive, load, transformers_function

__all__ = ["SAMPLES"]


def _flipped(reference: Callable[..., Any], dim: int = 1, reverse: bool = True) -> Callable[..., Any]:
    """The reference with time running backwards for everything that has tokens."""

    def run(**given: Any) -> Any:
        def flip(x: Any) -> Any:
            return x.flip(dim) if isinstance(x, Tensor) and x.dim() > 2 and x.shape[dim] == T else x

        out, state = reference(**{n: flip(x) for n, x in given.items()})
        return flip(out), state

    return run if reverse else reference


def _transposed_state(reference: Callable[..., Any]) -> Callable[..., Any]:
    def run(**given: Any) -> Any:
        if given.get("initial_state") is not None:
            given["initial_state"] = given["initial_state"].mT
        out, state = reference(**given)
        return out, state if state is None else state.mT

    return run


# ---- decays --------------------------------------------------------------------------------------------
def _gla(g: Tensor | None = None, g_gamma: Tensor | None = None, **given: Any) -> Any:
    """fla's loop for one decay per token; ``g_gamma`` is the same at each token."""
    given.setdefault("output_final_state", False)
    tokens = given["q"].shape[:3]
    if g is None:
        g = torch.zeros(tokens) if g_gamma is None else g_gamma.expand(tokens)
    return fla_naive("simple_gla/naive", "naive_recurrent_simple_gla")(g=g, **given)


_SIMPLE = "fla.ops.simple_gla."


def _simple_gla(reverse: bool, transposed: bool) -> Callable[[], list[Sample]]:
    def samples() -> list[Sample]:
        x = _qkv()
        found = [
            Sample(x | {"g": _gate(B, T, H)}, {}, _gla),
            Sample(x | {"g": _gate(B, T, H), "initial_state": _state()}, _STATES, _gla),
            Sample(x, {"g_gamma": _gate(H), "scale": 0.5}, _gla),
            Sample(x, {}, _gla),
        ]
        if transposed:
            state = _state().mT.contiguous()
            rest = _STATES | {"state_v_first": True}

            def reference(state_v_first: bool, **given: Any) -> Any:
                return _transposed_state(_gla)(**given)

            found.append(Sample(x | {"g": _gate(B, T, H), "initial_state": state}, rest, reference))
        if reverse:

            def backwards(reverse: bool, **given: Any) -> Any:
                return _flipped(_gla)(**given)

            found.append(Sample(x | {"g": _gate(B, T, H)}, _STATES | {"reverse": True}, backwards))
        return found

    return samples


SAMPLES[f"{_SIMPLE}chunk.chunk_simple_gla"] = _simple_gla(reverse=False, transposed=True)
SAMPLES[f"{_SIMPLE}fused_chunk.fused_chunk_simple_gla"] = _simple_gla(reverse=False, transposed=False)
SAMPLES[f"{_SIMPLE}fused_recurrent.fused_recurrent_simple_gla"] = _simple_gla(reverse=True, transposed=True)


@_sample(f"{_SIMPLE}parallel.parallel_simple_gla")
def _() -> list[Sample]:
    """It returns no weights unless they are asked for."""
    return [Sample(_qkv() | {"g": _gate(B, T, H)}, {}, _gla), Sample(_qkv(), {"scale": 0.5}, _gla)]


@_sample(
    "fla.ops.retention.chunk.chunk_retention",
    "fla.ops.retention.fused_chunk.fused_chunk_retention",
    "fla.ops.retention.fused_recurrent.fused_recurrent_retention",
    "fla.ops.retention.parallel.parallel_retention",
)
def _() -> list[Sample]:
    def reference(**given: Tensor) -> Any:
        x = {n: y.transpose(1, 2) for n, y in given.items()}
        return fla_naive("retention/naive", "naive_retention")(**x).transpose(1, 2), None

    return [Sample(_qkv(), {}, reference)]


@_sample(
    "fla.ops.lightning_attn.chunk.chunk_lightning_attn",
    "fla.ops.lightning_attn.fused_recurrent.fused_recurrent_lightning_attn",
)
def _() -> list[Sample]:
    def reference(layer_idx: int, num_layers: int, **given: Any) -> Any:
        decay = -(8 / H * (1 - layer_idx / num_layers)) * torch.arange(H, dtype=torch.float)
        return _gla(g_gamma=decay, **given)

    depth = {"layer_idx": 1, "num_layers": 4}
    return [
        Sample(_qkv(), depth, reference),
        Sample(_qkv() | {"initial_state": _state()}, depth | _STATES, reference),
    ]


def _channels(**given: Any) -> Any:
    given["gk"] = given.pop("g") if "g" in given else given["gk"]
    return fla_naive("gla/naive", "naive_recurrent_gla")(**given)


@_sample("fla.ops.gla.chunk.chunk_gla")
def _() -> list[Sample]:
    x = _qkv() | {"g": _gate(B, T, H, K)}
    return [Sample(x, {}, _channels), Sample(x | {"initial_state": _state()}, _STATES, _channels)]


@_sample("fla.ops.gla.fused_recurrent.fused_recurrent_gla")
def _() -> list[Sample]:
    def backwards(reverse: bool, **given: Any) -> Any:
        return _flipped(_channels)(**given)

    x = _qkv() | {"gk": _gate(B, T, H, K)}
    return [Sample(x, {}, _channels), Sample(x, _STATES | {"reverse": True}, backwards)]


@_sample("fla.ops.rwkv6.chunk.chunk_rwkv6", "fla.ops.rwkv6.fused_recurrent.fused_recurrent_rwkv6")
def _() -> list[Sample]:
    def reference(r: Tensor, u: Tensor, initial_state: Tensor | None = None, **given: Any) -> Any:
        rest = {n: given.pop(n) for n in ("scale", "output_final_state") if n in given}
        x = {n: y.transpose(1, 2) for n, y in {"q": r, **given}.items()}
        naive = fla_naive("rwkv6/recurrent_naive", "naive_recurrent_rwkv6")
        out, state = naive(**x, u=u, initial_state=initial_state, **rest)
        return out.transpose(1, 2), state

    x = _qkv() | {"w": _gate(B, T, H, K), "u": _random(H, K)}
    x["r"] = x.pop("q")
    return [
        Sample(x, {}, reference),
        Sample(x | {"initial_state": _state()}, _STATES | {"scale": 0.5}, reference),
    ]


# ---- the delta rule ------------------------------------------------------------------------------------
def _delta(
    beta: Tensor | None = None, g: Tensor | None = None, use_qk_l2norm_in_kernel: bool = False, **given: Any
) -> Any:
    """fla's loop for channel-wise decays, of which a decay per token, and none, are special cases."""
    if use_qk_l2norm_in_kernel:
        for n in "qk":
            given[n] = given[n] / torch.sqrt((given[n] ** 2).sum(-1, keepdim=True) + 1e-6)
    v = given["v"]
    g = torch.zeros(v.shape[:3]) if g is None else g
    g = g if g.dim() == 4 else g[..., None].expand(*g.shape, K)
    beta = torch.ones(v.shape[:3]) if beta is None else beta
    return fla_naive("kda/naive", "naive_recurrent_kda")(beta=beta, g=g, **given)


_NORMALIZED = _STATES | {"use_qk_l2norm_in_kernel": True}


@_sample("fla.ops.delta_rule.chunk.chunk_delta_rule")
def _() -> list[Sample]:
    x = _qkv() | {"beta": _beta(B, T, H)}
    return [Sample(x, {}, _delta), Sample(x | {"initial_state": _state()}, _NORMALIZED, _delta)]


@_sample("fla.ops.delta_rule.fused_recurrent.fused_recurrent_delta_rule")
def _() -> list[Sample]:
    x = _qkv()
    return [Sample(x, {}, _delta), Sample(x | {"beta": _beta(B, T, H)}, _NORMALIZED, _delta)]


def _with_gates(naive_gate: Callable[..., Any]) -> Callable[..., Any]:
    """``_delta`` with the gate and the sigmoid that the kernel applies to what it is given."""

    def reference(**given: Any) -> Any:
        pre = {n: given.pop(n) for n in ("A_log", "dt_bias", "lower_bound") if n in given}
        if given.pop("use_gate_in_kernel", False):
            given["g"] = naive_gate(given["g"], **pre)
        if given.pop("use_beta_sigmoid_in_kernel", False):
            given["beta"] = given["beta"].sigmoid() * (2 if given.pop("allow_neg_eigval", False) else 1)
        return _delta(**given)

    return reference


_RAW = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "use_qk_l2norm_in_kernel": True}


@_sample(
    "fla.ops.gated_delta_rule.chunk.chunk_gated_delta_rule",
    "fla.ops.gated_delta_rule.fused_recurrent.fused_recurrent_gated_delta_rule",
)
def _() -> list[Sample]:
    gate = load("fla.ops.gated_delta_rule.gate").naive_gdn_gate
    x = _qkv(groups=2) | {"g": _gate(B, T, 2 * H), "beta": _beta(B, T, 2 * H)}
    raw = x | {"g": _random(B, T, 2 * H), "A_log": _random(2 * H), "dt_bias": _random(2 * H, seed=1)}
    return [
        Sample(x, {}, _delta),
        Sample(x | {"initial_state": _state(2 * H)}, _NORMALIZED, _delta),
        Sample(raw, _RAW | {"allow_neg_eigval": True}, _with_gates(gate)),
    ]


@_sample("fla.ops.kda.chunk.chunk_kda", "fla.ops.kda.fused_recurrent.fused_recurrent_kda")
def _() -> list[Sample]:
    gates = load("fla.ops.kda.gate")
    x = _qkv(groups=2) | {"g": _gate(B, T, 2 * H, K), "beta": _beta(B, T, 2 * H)}
    raw = x | {"g": _random(B, T, 2 * H, K), "A_log": _random(2 * H), "dt_bias": _random(2 * H * K, seed=1)}
    transposed = x | {"initial_state": _state(2 * H).mT.contiguous()}

    def v_first(state_v_first: bool, **given: Any) -> Any:
        return _transposed_state(_delta)(**given)

    return [
        Sample(x, {}, _delta),
        Sample(transposed, _NORMALIZED | {"state_v_first": True}, v_first),
        Sample(raw, _RAW, _with_gates(gates.naive_kda_gate)),
        Sample(raw, _RAW | {"lower_bound": -5.0}, _with_gates(gates.naive_kda_lowerbound_gate)),
    ]


# ---- no decay ------------------------------------------------------------------------------------------
def _linear(**given: Any) -> Any:
    """fla's loop; beside a normalized output the kernels return the sums of k even if not asked for."""
    asked = given.pop("output_final_state", False)
    out, state = fla_naive("linear_attn/naive", "naive_recurrent_linear_attn")(
        **given, output_final_state=True
    )
    if given.get("normalize"):
        return out, (state[0] if asked else None, state[1])
    return out, state if asked else None


@_sample(
    "fla.ops.linear_attn.chunk.chunk_linear_attn",
    "fla.ops.linear_attn.fused_chunk.fused_chunk_linear_attn",
    "fla.ops.linear_attn.fused_recurrent.fused_recurrent_linear_attn",
)
def _() -> list[Sample]:
    x = _qkv()
    positive = x | {"q": x["q"].exp(), "k": x["k"].exp()}
    states = (_state(), _random(B, 1, H, K).exp())
    return [
        Sample(x, {"normalize": False}, _linear),
        Sample(x | {"initial_state": _state()}, {"normalize": False} | _STATES, _linear),
        Sample(positive, {"normalize": True}, _linear),
        Sample(positive, {"normalize": True, "initial_state": states} | _STATES, _linear),
    ]


@_sample("fla.ops.hgrn.chunk.chunk_hgrn", "fla.ops.hgrn.fused_recurrent.fused_recurrent_hgrn")
def _() -> list[Sample]:
    naive = fla_naive("hgrn/naive", "naive_recurrent_hgrn")
    x = {"x": _random(B, T, V), "g": _gate(B, T, V)}
    return [Sample(x, {}, naive), Sample(x | {"initial_state": _random(B, V)}, _STATES, naive)]


@_sample("fla.modules.causal_conv1d.ops.causal_conv1d")
def _() -> list[Sample]:
    def reference(x: Tensor, residual: Tensor | None = None, **given: Any) -> Any:
        out = transformers_function("bamba", "causal_conv1d_fn")(x.mT, **given).mT
        return out if residual is None else out + residual, None

    x = {"x": _random(B, T, 6), "weight": _random(6, 4)}
    return [
        Sample(x, {"activation": "swish"}, reference),
        Sample(x | {"bias": _random(6), "residual": _random(B, T, 6, seed=1)}, {}, reference),
    ]


def _heads_first(naive: Callable[..., Tensor]) -> Callable[..., Any]:
    def reference(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Any:
        return naive(*(x.transpose(1, 2) for x in (q, k, v)), **given).transpose(1, 2)

    return reference


@_sample("fla.ops.based.parallel.parallel_based", "fla.ops.based.fused_chunk.fused_chunk_based")
def _() -> list[Sample]:
    reference = _heads_first(fla_naive("based/naive", "naive_parallel_based"))
    return [Sample(_qkv(), {}, reference), Sample(_qkv(), {"use_norm": False, "scale": 0.5}, reference)]


@_sample("fla.ops.rebased.parallel.parallel_rebased")
def _() -> list[Sample]:
    naive = _heads_first(fla_naive("rebased/naive", "naive_parallel_rebased"))

    def reference(use_normalize: bool = True, use_scale: bool = True, **given: Any) -> Any:
        given.pop("eps", None)
        return naive(**given, use_norm=use_normalize, scale=None if use_scale else 1.0)

    return [
        Sample(_qkv(), {"eps": 1e-6}, reference),
        Sample(_qkv(), {"use_normalize": False, "use_scale": False}, reference),
    ]
