"""Models of packed documents: a layer of every variant of linear attention, and softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spcompile.library import decays, delta, features, mamba, packed, scans

__all__ = ["LAYERS", "Model"]

H, D = 2, 4  # heads, and their size
Layer = Callable[[dict[str, Tensor], Tensor], Tensor]


def gates(x: dict[str, Tensor]) -> Tensor:
    return F.logsigmoid(x["g"])


def softmax(x: dict[str, Tensor], ends: Tensor) -> Tensor:
    """Causal attention inside of each document, by a mask."""
    q, k, v = (x[n].transpose(1, 2) for n in "qkv")
    ids = torch.bucketize(torch.arange(q.shape[2]), ends, right=True)
    i = torch.arange(q.shape[2])
    mask = (ids[:, None] == ids) & (i <= i[:, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


# q, k, v [1, T, H, D], g like q, and the ends of the documents -> out
LAYERS: dict[str, Layer] = {
    "no decay": lambda x, ends: features.linear(x["q"], x["k"], x["v"], cu_seqlens=ends)[0],
    "constant": lambda x, ends: decays.retention(x["q"], x["k"], x["v"], cu_seqlens=ends)[0],
    "scalar": lambda x, ends: decays.gated(x["q"], x["k"], x["v"], g=gates(x)[..., 0], cu_seqlens=ends)[0],
    "diagonal": lambda x, ends: decays.gated(x["q"], x["k"], x["v"], g=gates(x), cu_seqlens=ends)[0],
    "reversed": lambda x, ends: decays.gated(
        x["q"], x["k"], x["v"], g=gates(x), reverse=True, cu_seqlens=ends
    )[0],
    "bonus": lambda x, ends: decays.rwkv6(
        x["q"], x["k"], x["v"], gates(x), torch.ones(H, D, dtype=x["q"].dtype), cu_seqlens=ends
    )[0],
    "delta rule": lambda x, ends: delta.delta_rule(
        x["q"], x["k"], x["v"], x["g"][..., 0].sigmoid(), use_qk_l2norm_in_kernel=True, cu_seqlens=ends
    )[0],
    "gated delta rule": lambda x, ends: delta.delta_rule(
        x["q"],
        x["k"],
        x["v"],
        x["g"][..., 0].sigmoid(),
        gates(x)[..., 1],
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=ends,
    )[0],
    "channel-wise delta rule": lambda x, ends: delta.delta_rule(
        x["q"],
        x["k"],
        x["v"],
        x["g"][..., 0].sigmoid(),
        gates(x),
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=ends,
    )[0],
    "scan": lambda x, ends: scans.hgrn(x["v"].flatten(2), gates(x).flatten(2), cu_seqlens=ends)[0].unflatten(
        2, (H, D)
    ),
    "ssd": lambda x, ends: mamba.ssd(
        x["v"],
        x["g"][..., 0],
        -torch.ones(H, dtype=x["v"].dtype),
        x["k"],
        x["q"],
        dt_softplus=True,
        seq_idx=packed.documents_of(ends, x["q"].shape[1]),
    ).double(),
    "softmax": lambda x, ends: softmax(x, ends),
    "softmax behind linear": lambda x, ends: softmax(x | {"v": LAYERS["diagonal"](x, ends)}, ends),
}


class Model(nn.Module):
    """An embedding, a short convolution, a layer and a head; T documents' tokens one after another."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer
        self.embedding = nn.Embedding(11, 4 * H * D, dtype=torch.float64)
        self.weight = nn.Parameter(torch.randn(4 * H * D, 3, dtype=torch.float64))
        self.head = nn.Linear(H * D, 11, dtype=torch.float64)

    def forward(self, ids: Tensor, ends: Tensor, labels: Tensor) -> Tensor:
        """The sum of the tokens' losses."""
        x, _ = packed.fla_convolution(self.embedding(ids), self.weight, activation="silu", cu_seqlens=ends)
        parts = dict(zip("qkvg", x.unflatten(2, (4 * H, D)).chunk(4, 2), strict=True))
        logits = self.head(self.layer(parts, ends).flatten(2))
        return F.cross_entropy(logits[0], labels[0], reduction="sum")
