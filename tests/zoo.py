"""Third-party linear attention, unmodified: transformers' models, other libraries' functions in a small LM.

``MODELS[name](length)`` and ``FUNCTIONS[name](length)`` give a module in train mode, float32 and random, and
its keyword arguments, labels included. Sizes are tiny; the code is what people run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.third_party import fla_naive, load, transformers_function, transformers_module

__all__ = ["FUNCTIONS", "MODELS", "Builder"]

VOCAB, HIDDEN, HEADS, SIZE = 128, 64, 4, 16
Builder = Callable[[int], tuple[nn.Module, dict[str, Any]]]

MODELS: dict[str, Builder] = {}
FUNCTIONS: dict[str, Builder] = {}


def _tokens(length: int) -> dict[str, Any]:
    ids = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


# ---- transformers ----------------------------------------------------------------------------------------
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
_SMALL: dict[str, Any] = _SPECIAL | {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2}
_DECODER: dict[str, Any] = _SMALL | {
    "intermediate_size": 128,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}


def _model(name: str, stem: str, config: dict[str, Any], module: str = "", kind: str = "Config") -> None:
    def build(length: int) -> tuple[nn.Module, dict[str, Any]]:
        source = module or name
        configuration = getattr(transformers_module(source, "configuration"), stem + kind)
        torch.manual_seed(0)
        model = getattr(transformers_module(source), f"{stem}ForCausalLM")(configuration(**config))
        return model.float().train(), _tokens(length) | {"use_cache": False}

    MODELS[name] = build


_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": SIZE,
    "linear_value_head_dim": SIZE,
    "linear_conv_kernel_dim": 4,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_KIMI = {
    "num_key_value_heads": HEADS,
    "moe_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "linear_head_dim": SIZE,
    "linear_num_heads": HEADS,
    "linear_conv_kernel_dim": 4,
    "mlp_layer_types": ["dense", "dense"],
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": SIZE,
    "mamba_n_groups": 1,
    "mamba_d_state": SIZE,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_GRANITE = {
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 64,
    "position_embedding_type": "rope",
}
_XLSTM = {
    "num_heads": HEADS,
    "chunk_size": 32,
    "mode": "train",
    "return_last_states": True,
    "autocast_kernel_dtype": "float32",
}
_MINIMAX = {"block_size": 16, "head_dim": SIZE, "num_local_experts": 2, "num_experts_per_tok": 1}

_model("minimax", "MiniMax", _DECODER | _HYBRID | _MINIMAX)
# Its forward walks a set of the layers' types.
_GEMMA4 = {
    "head_dim": SIZE,
    "global_head_dim": SIZE,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 0,
}
_model("gemma4", "Gemma4", _DECODER | _GEMMA4, kind="TextConfig")
_model("qwen3_next", "Qwen3Next", _DECODER | _HYBRID | _DELTA_NET | _EXPERTS | {"head_dim": SIZE})
_model("qwen3_5", "Qwen3_5", _DECODER | _HYBRID | _DELTA_NET | {"head_dim": SIZE}, kind="TextConfig")
_model("kimi_linear_dense", "KimiLinear", _DECODER | _HYBRID | _KIMI, "kimi_linear")
_model("bamba", "Bamba", _DECODER | _MAMBA2 | {"attn_layer_indices": [1]})
_model(
    "granitemoehybrid_dense", "GraniteMoeHybrid", _DECODER | _HYBRID | _MAMBA2 | _GRANITE, "granitemoehybrid"
)
_model(
    "mamba2",
    "Mamba2",
    _SMALL | {"num_heads": 8, "head_dim": SIZE, "state_size": SIZE, "n_groups": 1, "chunk_size": 16},
)
# Mixtures of experts.
_FEW = {"num_local_experts": 4, "num_experts_per_tok": 2}
_JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "use_associative_scan": False,
}
_ZAYA = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "router_hidden_size": 16}
_model("mixtral", "Mixtral", _DECODER | _FEW)
_model("gpt_oss", "GptOss", _DECODER | _FEW | {"head_dim": SIZE, "sliding_window": 16})
_model("granitemoehybrid", "GraniteMoeHybrid", _DECODER | _HYBRID | _MAMBA2 | _GRANITE | _FEW)
_model("jamba", "Jamba", _DECODER | _JAMBA)
_model("kimi_linear", "KimiLinear", _DECODER | _HYBRID | _KIMI | {"mlp_layer_types": ["dense", "sparse"]})
_model("zaya", "Zaya", _DECODER | _ZAYA | {"head_dim": SIZE, "layer_types": ["hybrid", "hybrid"]})
_model("mamba", "Mamba", _SMALL | {"state_size": 8, "use_associative_scan": False})
_model("xlstm", "xLSTM", _SMALL | _XLSTM)


# ---- functions -------------------------------------------------------------------------------------------
_POSITIVE = {"q", "k", "query", "key", "matQ", "matK"}


@dataclass(frozen=True)
class Spec:
    """A function and what it takes: projections of the tokens by name, with the entries per head (0: one
    number), and a parameter that belongs to no token."""

    get: Callable[[], Callable[..., Any]]
    takes: dict[str, int]
    order: str = "bthd"
    rest: dict[str, Any] = field(default_factory=dict)
    bonus: str = ""


class FunctionLM(nn.Module):
    """A decoder whose attention is one third-party function; all else is plain PyTorch.

    Queries and keys are positive and of norm 1, so that forms with a normaliser and with the delta rule are
    stable; decays (g, gk, w) are log sigmoids, beta is a sigmoid.
    """

    def __init__(self, spec: Spec, layers: int = 1) -> None:
        super().__init__()
        self.spec, self.function = spec, spec.get()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(self._layer() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)

    def _layer(self) -> nn.ModuleDict:
        project = {n: nn.Linear(HIDDEN, HEADS * max(size, 1)) for n, size in self.spec.takes.items()}
        parts: dict[str, nn.Module] = {"project": nn.ModuleDict(project), "norm": nn.LayerNorm(HIDDEN)}
        if self.spec.bonus:
            parts["bonus"] = nn.ParameterList([nn.Parameter(torch.randn(HEADS, SIZE))])
        return nn.ModuleDict(parts | {"out": nn.Linear(HIDDEN, HIDDEN)})

    def _argument(self, name: str, x: Tensor) -> Tensor:
        size = self.spec.takes[name]
        x = x.view(*x.shape[:2], HEADS, *([size] if size else []))
        if name in _POSITIVE:
            x = F.normalize(F.elu(x) + 1, dim=-1)
        elif name in ("g", "gk", "w"):
            x = F.logsigmoid(x + 3)
        elif name == "beta":
            x = x.sigmoid()
        return x if self.spec.order == "bthd" else x.transpose(1, 2)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            h = layer["norm"](x)
            given = {n: self._argument(n, p(h)) for n, p in layer["project"].items()}
            if self.spec.bonus:
                given[self.spec.bonus] = layer["bonus"][0]
            out = self.function(**given, **self.spec.rest)
            out = out[0] if isinstance(out, tuple) else out
            out = out if self.spec.order == "bthd" or out.dim() < 4 else out.transpose(1, 2)
            x = x + layer["out"](out.reshape(*x.shape))
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


def _function(
    name: str, get: Callable[[], Callable[..., Any]], takes: str, order: str = "bthd", **more: Any
) -> None:
    """``takes``: names of projections with entries per head; in round brackets those with one number."""
    sizes = {n.strip("()"): 0 if n.startswith("(") else SIZE for n in takes.split()}

    def build(length: int) -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(0)
        return FunctionLM(Spec(get, sizes, order, **more)).train(), _tokens(length)

    FUNCTIONS[name] = build


def _fla(file: str, name: str) -> Callable[[], Callable[..., Any]]:
    return lambda: fla_naive(file, name)


def _transformers(model: str, name: str) -> Callable[[], Callable[..., Any]]:
    return lambda: transformers_function(model, name)


def _performer(name: str) -> Callable[[], Callable[..., Any]]:
    return lambda: getattr(load("performer_pytorch.performer_pytorch"), name)


_CHUNK = {"chunk_size": 16}
_NORMED = {"use_qk_l2norm_in_kernel": True}
_function("fla_simple_gla_parallel", _fla("simple_gla/naive", "naive_parallel_simple_gla"), "q k v (g)")
_function("fla_based_parallel", _fla("based/naive", "naive_parallel_based"), "q k v", "bhtd")
_function("fla_linear_attn_chunk", _fla("linear_attn/naive", "naive_chunk_linear_attn"), "q k v")
_function(
    "fla_simple_gla_chunk", _fla("simple_gla/naive", "naive_chunk_simple_gla"), "q k v (g)", rest=_CHUNK
)
_function(
    "fla_delta_rule_chunk",
    _fla("delta_rule/naive", "delta_rule_chunkwise"),
    "q k v (beta)",
    "bhtd",
    rest=_CHUNK,
)
_function(
    "fla_rwkv6_chunk",
    _fla("rwkv6/chunk_naive", "naive_chunk_rwkv6"),
    "q k v w",
    "bhtd",
    rest=_CHUNK,
    bonus="u",
)
_function("fla_linear_attn_recurrent", _fla("linear_attn/naive", "naive_recurrent_linear_attn"), "q k v")
_function("fla_simple_gla_recurrent", _fla("simple_gla/naive", "naive_recurrent_simple_gla"), "q k v (g)")
_function(
    "fla_rwkv6_recurrent",
    _fla("rwkv6/recurrent_naive", "naive_recurrent_rwkv6"),
    "q k v w",
    "bhtd",
    bonus="u",
)
_function(
    "fla_delta_rule_recurrent", _fla("delta_rule/naive", "delta_rule_recurrence"), "q k v (beta)", "bhtd"
)
_function(
    "fla_gated_delta_recurrent",
    _fla("gated_delta_rule/naive", "naive_recurrent_gated_delta_rule"),
    "q k v (beta) (g)",
)
_function("fla_kda_recurrent", _fla("kda/naive", "naive_recurrent_kda"), "q k v g (beta)")
_function(
    "hf_gated_delta_chunk",
    _transformers("qwen3_next", "torch_chunk_gated_delta_rule"),
    "query key value (g) (beta)",
    rest=_CHUNK | _NORMED,
)
_function(
    "hf_gated_delta_recurrent",
    _transformers("qwen3_next", "torch_recurrent_gated_delta_rule"),
    "query key value (g) (beta)",
)
_function(
    "hf_kda_chunk",
    _transformers("kimi_linear", "chunk_kimi_delta_attention"),
    "query key value g (beta)",
    rest=_CHUNK | _NORMED,
)
_function(
    "performer_causal", _performer("causal_linear_attention_noncuda"), "q k v", "bhtd", rest={"chunk_size": 4}
)
_function("performer_noncausal", _performer("linear_attention"), "q k v", "bhtd")
_function(
    "mlstm_parallel",
    lambda: load("mlstm_kernels.torch.parallel.native.fw").mlstm_parallel_fw,
    "matQ matK matV (vecI) (vecF)",
    "bhtd",
)


# Functions whose arguments are no heads of queries, keys and values.
def _mamba2_scan() -> Callable[..., Tensor]:
    scan = transformers_function("mamba2", "mamba2_chunk_scan")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        A, D = -torch.arange(1, HEADS + 1, dtype=q.dtype), torch.ones(HEADS)
        return scan(v, q.mean(-1), A, k, q, 16, D=D, dt_softplus=True)

    return call


def _selective_scan() -> Callable[..., Tensor]:
    scan = transformers_function("mamba", "mamba_selective_scan")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        u, dt = (x.flatten(2).transpose(1, 2) for x in (v, q))
        A = -torch.arange(1, SIZE + 1, dtype=q.dtype).expand(u.shape[1], SIZE)
        B, C = (k[:, :, i].transpose(1, 2) for i in (0, 1))
        return scan(u, dt, A, B, C, D=torch.ones(u.shape[1]), delta_softplus=True).transpose(1, 2)

    return call


def _hgrn() -> Callable[..., Tensor]:
    recurrence = fla_naive("hgrn/naive", "naive_recurrent_hgrn")
    return lambda q, k, v: recurrence(v.flatten(2), F.logsigmoid(k.flatten(2) + q.flatten(2)))


def _rwkv4() -> Callable[..., Tensor]:
    attend = transformers_function("rwkv", "rwkv_linear_attention_cpu")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = k.flatten(2)
        decay, first = torch.linspace(-1.0, 1.0, keys.shape[-1]), torch.linspace(1.0, 0.0, keys.shape[-1])
        return attend(decay, first, keys, v.flatten(2) * q.flatten(2))[0]

    return call


def _gdn2() -> Callable[..., Tensor]:
    """Its einsums of three operands go to opt_einsum, which breaks ties by the order of sets."""
    chunked = fla_naive("gdn2/naive", "naive_chunk_gdn2")
    return lambda q, k, v, g, b: chunked(q, k, v, g, b.sigmoid(), v.sigmoid(), chunk_size=16)


_function("fla_gdn2_chunk", _gdn2, "q k v g b")
_function("hf_mamba2_chunk_scan", _mamba2_scan, "q k v")
_function("hf_mamba_selective_scan", _selective_scan, "q k v")
_function("fla_hgrn_recurrent", _hgrn, "q k v")
_function("hf_rwkv4", _rwkv4, "q k v")


# ---- whole modules of other libraries --------------------------------------------------------------------
class _WithLoss(nn.Module):
    """A net of tokens to logits, with the loss of the next token."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.net(input_ids)
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB).float(), labels[:, 1:].reshape(-1))


def _lucid(length: int) -> nn.Module:
    """It leaves out of a token's sums the bucket that the token is in."""
    return load("linear_attention_transformer").LinearAttentionTransformerLM(
        num_tokens=VOCAB,
        dim=HIDDEN,
        heads=HEADS,
        depth=2,
        max_seq_len=length,
        causal=True,
        blindspot_size=16,
        n_local_attn_heads=1,
        local_attn_window_size=16,
    )


class _RetNet(nn.Module):
    """torchscale's retention layers with its RetNet's positions (whose module needs more to be imported)."""

    def __init__(self) -> None:
        super().__init__()
        retention = load("torchscale.component.multiscale_retention").MultiScaleRetention

        class Arguments:
            multiway, layernorm_eps = False, 1e-6

        self.embedding, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB)
        self.layers = nn.ModuleList(retention(Arguments(), HIDDEN, 2 * HIDDEN, HEADS) for _ in range(2))
        angle = 1.0 / (10000 ** torch.linspace(0, 1, SIZE // 2))
        self.register_buffer("angle", angle.unsqueeze(-1).repeat(1, 2).flatten())
        self.register_buffer("decay", torch.log(1 - 2 ** (-5 - torch.arange(HEADS, dtype=torch.float))))

    def positions(self, length: int) -> Any:
        index = torch.arange(length).to(self.decay)
        sin, cos = (f(index[:, None] * self.angle[None, :]) for f in (torch.sin, torch.cos))
        future = ~torch.tril(torch.ones(length, length).to(self.decay)).bool()
        mask = torch.masked_fill(index[:, None] - index[None, :], future, float("inf"))
        mask = torch.nan_to_num(torch.exp(mask * self.decay[:, None, None]))
        return (sin, cos), mask / mask.sum(dim=-1, keepdim=True).sqrt()

    def forward(self, ids: Tensor) -> Tensor:
        x, positions = self.embedding(ids), self.positions(ids.shape[1])
        for layer in self.layers:
            x = x + layer(x, positions)
        return self.head(x)


def _module(name: str, make: Callable[[int], nn.Module]) -> None:
    def build(length: int) -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(0)
        return _WithLoss(make(length)).float().train(), _tokens(length)

    MODELS[name] = build


_module("lucid_lat_causal", _lucid)
_module("torchscale_retnet_parallel", lambda length: _RetNet())
