"""Causal self-attention with grouped key-value heads and rotary positions.

B batch   T tokens   D d_model
H query heads   K key-value heads   E head_dim
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from seedbed.model.config import DecoderConfig
from seedbed.model.cpu_attention import block_attention, suits_blocks
from seedbed.model.documents import Documents, Mask, attend_in_documents, dense_mask
from seedbed.model.linear import Linear

SHARES_HEADS = ("cpu",)  # where the fast kernel shares key-value heads with a mask too; elsewhere they are repeated

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (B or 1, 1, T, E/2), float32


class Attention(nn.Module):
    """Softmax attention to the tokens before and at each position (Vaswani et al., 2017).

    Key-value heads may be fewer than query heads (Ainslie et al., 2023), and queries and keys may be
    normalised head by head (Qwen3). Queries, keys and values are separate layers in every family.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        c = config
        self.head_dim, self.groups, self.dropout = c.head_dim, c.num_heads // c.num_kv_heads, c.dropout
        self.q_proj = Linear(c.d_model, c.num_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.d_model, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.d_model, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_heads * c.head_dim, c.d_model, bias=c.output_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Mask | None) -> Tensor:
        """(B, T, D) to (B, T, D). `mask` says where a token may look; None is causal."""
        q = self.q_norm(self._heads(self.q_proj(x))).transpose(1, 2)  # (B, H, T, E)
        k = self.k_norm(self._heads(self.k_proj(x))).transpose(1, 2)  # (B, K, T, E)
        v = self._heads(self.v_proj(x)).transpose(1, 2)  # (B, K, T, E)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        y = self._attend(q, k, v, mask)  # (B, H, T, E)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]  # (B, T, D)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if isinstance(mask, Documents) and dropout:  # which their kernels have not
            mask = dense_mask(mask.segment_ids)
        if suits_blocks(q):
            seed = torch.randint(2**62, (1,)) if dropout else None
            return block_attention(q, k, v, mask, dropout, seed)  # type: ignore[no-any-return]
        share = self.groups > 1 and q.device.type in SHARES_HEADS
        if self.groups > 1 and not share:
            k, v = (x.repeat_interleave(self.groups, dim=1) for x in (k, v))  # (B, H, T, E)
        if isinstance(mask, Documents):
            return attend_in_documents(q, k, v, mask)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, enable_gqa=share
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)  # (B, T, H or K, E)


class RMSNorm(nn.Module):
    """Division by the root of the mean square, then a learned scale, in float32 (Zhang & Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) to the same."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotation(position_ids: Tensor, config: DecoderConfig) -> Rotation:
    """Cosines and sines for rotary positions (Su et al., 2021): (B, T) to two of (B, 1, T, E/2), float32."""
    angles = position_ids[:, None, :, None].float() / tokens_a_radian(config, position_ids.device)  # (B, 1, T, E/2)
    return angles.cos(), angles.sin()


def tokens_a_radian(config: DecoderConfig, device: torch.device | None = None) -> Tensor:
    """How slowly each pair of a head turns: (E/2,), float32."""
    c, s = config, config.rope_scaling
    slowness = c.rope_theta ** (torch.arange(0, c.head_dim, 2, dtype=torch.float32, device=device) / c.head_dim)
    if s is None:
        return slowness
    turns = s.original_max_position_embeddings / (2 * math.pi * slowness)
    kept = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return slowness / (kept + (1 - kept) / s.factor)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn (B, H, T, E) by its positions; pairs are (i, i + E/2), the layout of Hugging Face's weights."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
