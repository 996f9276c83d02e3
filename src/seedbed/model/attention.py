"""Causal self-attention with grouped key-value heads, rotary positions, and the cache for decoding.

B batch   T tokens   S tokens seen (cached and new)   D d_model
H query heads   K key-value heads   E head_dim
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from seedbed.model.config import DecoderConfig
from seedbed.model.cpu_attention import block_attention, suits_blocks

SHARES_HEADS = ("cpu",)  # where the fast kernel shares key-value heads with a mask too; elsewhere they are repeated

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (B or 1, 1, T, E/2), float32


class Attention(nn.Module):
    """Softmax attention to the tokens before and at each position (Vaswani et al., 2017).

    Key-value heads may be fewer than query heads (Ainslie et al., 2023), and queries and keys may be
    normalised head by head (Qwen3). Queries, keys and values are separate layers in every family.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        c = config
        self.layer = layer
        self.head_dim, self.groups, self.dropout = c.head_dim, c.num_heads // c.num_kv_heads, c.dropout
        self.q_proj = nn.Linear(c.d_model, c.num_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.d_model, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.d_model, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.d_model, bias=c.output_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        """(B, T, D) to (B, T, D). `mask` (B, 1, T, S) is true where a token may look; None is causal."""
        q = self.q_norm(self._heads(self.q_proj(x))).transpose(1, 2)  # (B, H, T, E)
        k = self.k_norm(self._heads(self.k_proj(x))).transpose(1, 2)  # (B, K, T, E)
        v = self._heads(self.v_proj(x)).transpose(1, 2)  # (B, K, T, E)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, E)
        dropout = self.dropout if self.training else 0.0
        if dropout == 0 and cache is None and suits_blocks(q):
            y = block_attention(q, k, v, mask)  # (B, H, T, E)
        else:
            y = self._attend(q, k, v, mask, dropout)  # (B, H, T, E)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]  # (B, T, D)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """By torch's own kernels."""
        share = self.groups > 1 and q.device.type in SHARES_HEADS
        if self.groups > 1 and not share:
            k, v = (x.repeat_interleave(self.groups, dim=1) for x in (k, v))  # (B, H, S, E)
        causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=share
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


def rotation(position_ids: Tensor, head_dim: int, theta: float) -> Rotation:
    """Cosines and sines for rotary positions (Su et al., 2021): (B, T) to two of (B, 1, T, E/2), float32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[:, None, :, None].float() / theta**exponent  # (B, 1, T, E/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn (B, H, T, E) by its positions; pairs are (i, i + E/2), the layout of Hugging Face's weights."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class KeyValueCache:
    """Keys and values of the tokens seen so far, in memory set aside once.

    A batch of prompts of unequal length is padded on the left; `padding` (B,) says by how much. Padding is
    attended by nothing but itself, and positions count from the first real token of each row.

    The decoder adds the tokens it is given. To decode, feed the prompt, then one token at a time:

        cache = KeyValueCache(model.config, batch_size=1, max_len=64)
        hidden = model(prompt, cache=cache)
        hidden = model(next_token, cache=cache)
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        max_len: int,
        *,
        padding: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_len, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.padding = padding if padding is not None and bool(padding.any()) else None
        self.length = 0
        self.max_len = max_len

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, E) of one layer after the tokens seen; give back all, (B, K, S, E)."""
        end = self.length + k.shape[2]
        assert end <= self.max_len, f"{end} tokens in a cache of {self.max_len}"
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Positions of the next tokens, (B or 1, T), 0 for padding."""
        slots = torch.arange(self.length, self.length + tokens, device=device)[None]  # (1, T)
        return slots if self.padding is None else (slots - self.padding[:, None]).clamp(min=0)

    def mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """Where the next tokens may look, (B or 1, 1, T, S); None where plain causal says the same."""
        if self.padding is None and (self.length == 0 or tokens == 1):
            return None
        seen = torch.arange(self.length + tokens, device=device)  # (S,)
        query = seen[self.length :, None]  # (T, 1)
        if self.padding is None:
            return (seen <= query)[None, None]  # (1, 1, T, S)
        real = seen >= self.padding[:, None, None, None]  # (B, 1, 1, S)
        # A padding token looks at itself: a row with nothing to look at has no softmax.
        return (seen <= query) & real | (seen == query)  # (B, 1, T, S)
