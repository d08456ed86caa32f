"""For each row of spcompile.library's table: arguments, and what computes the same in plain PyTorch.

The reference is the library's own function where a CPU can run it, and otherwise a token-by-token one of the
same library, or of the published formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spcompile.library.table import TABLE
from tests.third_party import fla_naive, load, transformers_function, transformers_module

__all__ = ["SAMPLES", "Sample"]

B, T, H, K, V = 2, 64, 2, 8, 6


@dataclass
class Sample:
    """Arguments of a function: ``tensors`` get gradients. ``reference`` None: the library's own function."""

    tensors: dict[str, Tensor]
    rest: dict[str, Any] = field(default_factory=dict)
    reference: Callable[..., Any] | None = None


SAMPLES: dict[str, Callable[[], list[Sample]]] = {}


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def _qkv(order: str = "bthd", groups: int = 1, size: int = V, length: int = T) -> dict[str, Tensor]:
    """q, k of half the heads of v if ``groups`` is 2, k of norm 1."""
    shapes = [(B, length, H, K), (B, length, H, K), (B, length, H * groups, size)]
    q, k, v = (_random(*s, seed=i) for i, s in enumerate(shapes))
    k = F.normalize(k, dim=-1)
    return dict(zip("qkv", (x.transpose(1, 2).contiguous() if order == "bhtd" else x for x in (q, k, v))))


def _gate(*shape: int) -> Tensor:
    return F.logsigmoid(_random(*shape, seed=9) + 2)


def _beta(*shape: int) -> Tensor:
    return _random(*shape, seed=7).sigmoid()


def _state(heads: int = H, size: int = V) -> Tensor:
    return _random(B, heads, K, size, seed=5)


def _renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {names.get(n, n): x for n, x in tensors.items()}


def _rows(name: str) -> list[str]:
    return [path for path in TABLE if path.endswith(f".{name}")]


def _sample(*paths: str) -> Callable[[Callable[[], list[Sample]]], Callable[[], list[Sample]]]:
    def register(make: Callable[[], list[Sample]]) -> Callable[[], list[Sample]]:
        SAMPLES.update(dict.fromkeys(paths, make))
        return make

    return register


_HF = {"q": "query", "k": "key", "v": "value"}


# ---- transformers --------------------------------------------------------------------------------------
def _hf_delta(channel: bool, groups: int) -> list[Sample]:
    x = _renamed(_qkv(groups=groups), _HF)
    x["g"] = _gate(B, T, H * groups, *([K] if channel else []))
    x["beta"] = _beta(B, T, H * groups)
    none = {"initial_state": None, "output_final_state": False}
    full = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    return [Sample(x, none), Sample({**x, "initial_state": _state(H * groups)}, full)]


@_sample(*_rows("torch_chunk_gated_delta_rule"), *_rows("torch_recurrent_gated_delta_rule"))
def _() -> list[Sample]:
    return _hf_delta(channel=False, groups=2)


@_sample(*_rows("chunk_kimi_delta_attention"), *_rows("recurrent_kimi_delta_attention"))
def _() -> list[Sample]:
    return _hf_delta(channel=True, groups=1)


class _EmptyCache:
    """Holds no state, and keeps none: a sample is run more than once."""

    def get_linear_cache(self, layer: int) -> None:
        return None

    def set_linear_cache(self, layer: int, state: Tensor) -> None:
        assert state.dim() == 4


@_sample(*_rows("MiniMaxLightningAttention.forward"))
def _() -> list[Sample]:
    """Whole blocks and not, fewer tokens than a block, a mask, a cache, more arguments; its own buffers."""
    config = transformers_module("minimax", "configuration").MiniMaxConfig(
        hidden_size=16, num_attention_heads=4, head_dim=4, num_hidden_layers=4, block_size=16
    )
    torch.manual_seed(0)
    layer = transformers_module("minimax").MiniMaxLightningAttention(config, 1)
    with torch.no_grad():
        layer.key_decay.mul_(0.9)
    more: list[dict[str, Any]] = [
        {"attention_mask": None},
        {"attention_mask": (torch.arange(T) < T - 5).expand(B, T)},
        {"attention_mask": None, "past_key_values": _EmptyCache(), "use_cache": True, "position_ids": None},
    ]
    rest = {"self": layer, "position_embeddings": None}
    whole = [Sample({"hidden_states": _random(B, T, 16)}, rest | m) for m in more]
    return whole + [Sample({"hidden_states": _random(B, t, 16)}, rest | more[0]) for t in (1, 7, 37)]


def _ssd(x: str, groups: int, length: int = T) -> dict[str, Tensor]:
    return {
        x: _random(B, length, 4, V),
        "dt": _random(B, length, 4, seed=3),
        "A": -_random(4, seed=2).exp(),
        "B": _random(B, length, groups, K, seed=1),
        "C": _random(B, length, groups, K, seed=4),
    }


@_sample(*_rows("mamba2_chunk_scan"))
def _() -> list[Sample]:
    more = {"D": _random(4), "dt_bias": _random(4, seed=8), "initial_states": _random(B, 4, V, K, seed=6)}
    full = {"chunk_size": 16, "dt_softplus": True, "dt_limit": (0.01, 1.0), "return_final_states": True}
    x = _ssd("hidden_states", 1)
    plain = {**x, "dt": F.softplus(x["dt"])}
    return [Sample(plain, {"chunk_size": 16}), Sample(_ssd("hidden_states", 2) | more, full)]


def _selective() -> dict[str, Tensor]:
    inner = 5
    return {
        "hidden_states": _random(B, inner, T),
        "dt": _random(B, inner, T, seed=1),
        "A": -_random(inner, K).exp(),
        "B": _random(B, K, T, seed=2),
        "C": _random(B, K, T, seed=3),
        "D": _random(inner),
        "z": _random(B, inner, T, seed=4),
        "delta_bias": _random(inner, seed=5),
    }


@_sample(*_rows("mamba_selective_scan"))
def _() -> list[Sample]:
    x = _selective()
    least = {n: x[n] for n in ("hidden_states", "A", "B", "C")} | {"dt": F.softplus(x["dt"])}
    return [Sample(least), Sample(x, {"delta_softplus": True, "return_last_state": True})]


# ---- fla, in plain PyTorch -----------------------------------------------------------------------------
_STATES: dict[str, Any] = {"output_final_state": True}


@_sample("fla.ops.linear_attn.naive.naive_recurrent_linear_attn")
def _() -> list[Sample]:
    x = _qkv()
    positive = x | {"q": x["q"].exp(), "k": x["k"].exp()}
    return [
        Sample(x),
        Sample(x | {"initial_state": _state()}, _STATES),
        Sample(positive, {"normalize": True}),
    ]


@_sample("fla.ops.linear_attn.naive.naive_chunk_linear_attn")
def _() -> list[Sample]:
    x = _qkv()
    return [Sample(x), Sample(x | {"q": x["q"].exp(), "k": x["k"].exp()}, {"normalize": True, "scale": 0.5})]


@_sample("fla.ops.simple_gla.naive.naive_chunk_simple_gla")
def _() -> list[Sample]:
    x = _qkv() | {"g": _gate(B, T, H)}
    return [Sample(x), Sample(x | {"initial_state": _state()}, _STATES | {"chunk_size": 16, "scale": 0.5})]


@_sample("fla.ops.simple_gla.naive.naive_recurrent_simple_gla")
def _() -> list[Sample]:
    x = _qkv() | {"g": _gate(B, T, H)}
    return [Sample(x), Sample(x | {"initial_state": _state()}, {"output_final_state": False})]


@_sample("fla.ops.simple_gla.naive.naive_parallel_simple_gla")
def _() -> list[Sample]:
    return [Sample(_qkv() | {"g": _gate(B, T, H)}), Sample(_qkv() | {"g": _gate(B, T, H)}, {"scale": 0.5})]


@_sample("fla.ops.retention.naive.naive_retention")
def _() -> list[Sample]:
    return [Sample(_qkv("bhtd"))]


@_sample("fla.ops.gla.naive.naive_recurrent_gla")
def _() -> list[Sample]:
    x = _qkv() | {"gk": _gate(B, T, H, K)}
    return [Sample(x), Sample(x | {"initial_state": _state()}, _STATES)]


@_sample("fla.ops.rwkv6.recurrent_naive.naive_recurrent_rwkv6")
def _() -> list[Sample]:
    x = _qkv("bhtd") | {"w": _gate(B, H, T, K), "u": _random(H, K)}
    return [Sample(x), Sample(x | {"initial_state": _state()}, _STATES)]


@_sample("fla.ops.rwkv6.chunk_naive.naive_chunk_rwkv6")
def _() -> list[Sample]:
    """Its own backward raises (it writes in place): the outputs are compared with the loop's, without a
    scale."""
    x = _qkv("bhtd") | {"w": _gate(B, H, T, K), "u": _random(H, K)}

    def reference(**given: Any) -> Any:
        return fla_naive("rwkv6/recurrent_naive", "naive_recurrent_rwkv6")(**given, scale=1.0)[0]

    return [Sample(x, reference=reference)]


@_sample("fla.ops.delta_rule.naive.delta_rule_recurrence")
def _() -> list[Sample]:
    x = _qkv("bhtd") | {"beta": _beta(B, H, T)}
    return [Sample(x), Sample(x | {"initial_state": _state()}, {"output_final_state": False})]


@_sample("fla.ops.delta_rule.naive.delta_rule_chunkwise")
def _() -> list[Sample]:
    return [Sample(_qkv("bhtd") | {"beta": _beta(B, H, T)}, {"chunk_size": 16})]


@_sample(*_rows("naive_recurrent_gated_delta_rule"), *_rows("naive_chunk_gated_delta_rule"))
def _() -> list[Sample]:
    x = _qkv() | {"g": _gate(B, T, H), "beta": _beta(B, T, H)}
    return [Sample(x), Sample(x | {"initial_state": _state()}, _STATES)]


@_sample(*_rows("naive_recurrent_kda"), *_rows("naive_chunk_kda"))
def _() -> list[Sample]:
    x = _qkv(groups=2) | {"g": _gate(B, T, 2 * H, K), "beta": _beta(B, T, 2 * H)}
    return [Sample(x), Sample(x | {"initial_state": _state(2 * H)}, _STATES | {"scale": 0.5})]


@_sample(*_rows("naive_recurrent_hgrn"), *_rows("naive_chunk_hgrn"))
def _() -> list[Sample]:
    x = {"x": _random(B, T, V), "g": _gate(B, T, V)}
    return [Sample(x), Sample(x | {"initial_state": _random(B, V)}, _STATES)]


@_sample("fla.ops.based.naive.naive_parallel_based", "fla.ops.rebased.naive.naive_parallel_rebased")
def _() -> list[Sample]:
    return [Sample(_qkv("bhtd")), Sample(_qkv("bhtd"), {"use_norm": False, "scale": 0.5})]


@_sample("fla.ops.based.naive.naive_chunk_based")
def _() -> list[Sample]:
    return [Sample(_qkv("bhtd"), {"chunk_size": 16})]


# ---- other libraries -----------------------------------------------------------------------------------
@_sample("performer_pytorch.performer_pytorch.causal_linear_attention_noncuda")
def _() -> list[Sample]:
    x = _qkv("bhtd")
    x |= {"q": x["q"].exp(), "k": x["k"].exp()}
    return [Sample(x, {"chunk_size": 4}), Sample(x, {"eps": 1e-3})]


@_sample("performer_pytorch.performer_pytorch.linear_attention")
def _() -> list[Sample]:
    x = _qkv("bhtd")
    return [Sample(x | {"q": x["q"].exp(), "k": x["k"].exp()})]


@_sample("mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined")
def _() -> list[Sample]:
    """The library is built for CUDA alone: its meaning is that of transformers' fallback for it."""

    def reference(z: Tensor | None = None, **given: Any) -> Any:
        given["hidden_states"] = given.pop("x")
        out = transformers_function("mamba2", "mamba2_chunk_scan")(**given)
        out = out if isinstance(out, tuple) else (out, None)
        gated = out[0] if z is None else out[0] * F.silu(z)
        return (gated, out[1]) if given.get("return_final_states") else gated

    x = _ssd("x", 2) | {"D": _random(4), "dt_bias": _random(4, seed=8), "z": _random(B, T, 4, V, seed=2)}
    full = {"chunk_size": 16, "dt_softplus": True, "return_final_states": True}
    plain = {"chunk_size": 16, "dt_softplus": True}
    return [Sample(_ssd("x", 1), plain, reference), Sample(x, full, reference)]


@_sample("causal_conv1d.causal_conv1d_interface.causal_conv1d_fn")
def _() -> list[Sample]:
    """As transformers computes it without the library."""

    def reference(x: Tensor, **given: Any) -> Any:
        return transformers_function("bamba", "causal_conv1d_fn")(x, **given)

    x = {"x": _random(B, 6, T), "weight": _random(6, 4), "bias": _random(6)}
    return [
        Sample(x, {"activation": "silu"}, reference),
        Sample({n: x[n] for n in ("x", "weight")}, {}, reference),
    ]


@_sample("mamba_ssm.ops.triton.ssd_combined.mamba_split_conv1d_scan_combined")
def _() -> list[Sample]:
    """The layer as transformers computes it without the library."""

    def reference(norm_before_gate: bool, rmsnorm_weight: Tensor, ngroups: int, **given: Any) -> Any:
        z, mixed, dt = given["zxbcdt"].split([4 * V, 4 * V + 2 * ngroups * K, 4], dim=-1)
        weight, bias = given["conv1d_weight"], given["conv1d_bias"]
        mixed = F.pad(mixed.transpose(1, 2), (3, 0))
        mixed = F.silu(F.conv1d(mixed, weight[:, None], bias, groups=weight.shape[0])).transpose(1, 2)
        x, B_, C = mixed.split([4 * V, ngroups * K, ngroups * K], dim=-1)
        groups = [y.unflatten(-1, (ngroups, K)) for y in (B_, C)]
        scan = transformers_function("mamba2", "mamba2_chunk_scan")
        options = {n: given[n] for n in ("D", "dt_bias", "initial_states", "chunk_size")}
        y, final = scan(
            x.unflatten(-1, (4, V)),
            dt,
            given["A"],
            *groups,
            **options,
            dt_softplus=True,
            return_final_states=True,
        )
        y, gate = y.flatten(-2), F.silu(z)
        y = y if norm_before_gate else y * gate
        y = y.unflatten(-1, (ngroups, -1))
        y = (y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2) * rmsnorm_weight
        y = y * gate if norm_before_gate else y
        return F.linear(y, given["outproj_weight"]), final

    def sample(groups: int, before: bool) -> Sample:
        channels = 4 * V + 2 * groups * K
        x = {
            "zxbcdt": _random(B, T, 4 * V + channels + 4),
            "conv1d_weight": _random(channels, 4),
            "conv1d_bias": _random(channels),
            "dt_bias": _random(4, seed=8),
            "A": -_random(4, seed=2).exp(),
            "D": _random(4),
            "initial_states": _random(B, 4, V, K, seed=6),
            "rmsnorm_weight": _random(4 * V, seed=1),
            "outproj_weight": _random(10, 4 * V),
        }
        rest = {"headdim": V, "ngroups": groups, "norm_before_gate": before, "chunk_size": 16}
        return Sample(x, rest | {"return_final_states": True}, reference)

    return [sample(1, False), sample(2, True)]


@_sample("mamba_ssm.ops.selective_scan_interface.selective_scan_fn")
def _() -> list[Sample]:
    def reference(u: Tensor, delta: Tensor, **given: Any) -> Any:
        """The kernel gives the last state no gradient."""
        out, last = transformers_function("mamba", "mamba_selective_scan")(u, delta, **given)
        return out, last.detach()

    x = _renamed(_selective(), {"hidden_states": "u", "dt": "delta"})
    return [Sample(x, {"delta_softplus": True, "return_last_state": True}, reference)]


load("tests.library_samples_fla")
