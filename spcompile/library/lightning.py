"""The adapter for lightning attention as transformers' MiniMax writes it: a module that loops over blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import spcompile.attention  # noqa: F401  (registers the operator)

__all__ = ["minimax"]


def minimax(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None, past_key_values: Any = None
) -> Any:
    """``MiniMaxLightningAttention.forward``, all blocks at once; None for a cache that holds a state already.

    With blocks n of c tokens and what the module holds in its buffers (which are data: a checkpoint may hold
    others than the constructor's), as the library computes them:

        S_{n+1} = exp(-slope c) S_n + (k_n key_decay)^T v_n
        out_n = ((q_n k_n^T) diagonal_decay) v_n + (q_n query_decay) S_n

    The tokens behind the last one are zeros, and their rows are cut off.

    Returns:
        the layer's output [B, T, C], and the state after token T [B, H, D, D], which the cache gets, too.
    """
    if past_key_values is not None and past_key_values.get_linear_cache(self.layer_idx) is not None:
        return None
    b, t, _ = hidden_states.shape
    c, heads, size = self.block_size, self.num_attention_heads, self.head_dim
    blocks = (t + c - 1) // c
    mixed = self.act_fn(self.qkv_proj(hidden_states))
    if attention_mask is not None:
        mixed = (mixed * attention_mask[:, :, None]).to(mixed.dtype)
    mixed = F.pad(mixed, (0, 0, 0, blocks * c - t)).reshape(b, blocks, c, heads, 3 * size)
    q, k, v = mixed.permute(0, 3, 1, 2, 4).split(size, dim=-1)  # [B, H, n, c, D]

    slope, key_decay = self.slope_rate, self.key_decay
    own = ((k * key_decay[:, None]).transpose(-1, -2) @ v).to(torch.promote_types(v.dtype, slope.dtype))
    decay = torch.exp(-slope * c)[None, :, None]
    before, _ = torch.ops.spcompile.affine_scan(decay, own, None, False)
    inside = ((q @ k.transpose(-1, -2)) * self.diagonal_decay[:, :, None]) @ v
    out = inside + (q * self.query_decay[:, None]) @ before
    out = out.permute(0, 2, 3, 1, 4).reshape(b, blocks * c, heads * size)[:, :t]
    out = self.out_proj(F.sigmoid(self.output_gate(hidden_states)) * self.norm(out))

    rest = t - (blocks - 1) * c  # the last block's tokens: its decays are those of so many
    k, v = k[:, :, -1, :rest], v[:, :, -1, :rest]
    last = (k * key_decay[:, -rest:]).transpose(-1, -2) @ v
    state = before[:, :, -1] * torch.exp(-slope * rest) + last
    if past_key_values is not None:
        past_key_values.set_linear_cache(self.layer_idx, state)
    return out, state
