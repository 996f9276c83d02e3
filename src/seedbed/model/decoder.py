"""One decoder for GPT-2 and for the Llama-like families: what differs is in `DecoderConfig`.

B batch   T tokens   D d_model   F d_ff   V vocabulary
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seedbed.device import product_type
from seedbed.model.attention import Attention, RMSNorm, Rotation, rotation
from seedbed.model.config import DecoderConfig
from seedbed.model.cpu_gelu import gelu_in_pieces, suits_pieces
from seedbed.model.documents import Mask, document_mask
from seedbed.model.linear import Embedding, Linear, activated


@dataclass(frozen=True)
class Adapter:
    """The low-rank adapters a model has; `seedbed.lora` puts them in."""

    r: int
    alpha: float
    dropout: float
    rslora: bool
    dora: bool
    modules: tuple[str, ...]  # linear layers by their names here, in the model's order
    train_embeddings: bool  # embed_tokens is trained whole beside the adapters

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied by (with rsLoRA: Kalajdzievski, 2023)."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


@dataclass(frozen=True)
class Base:
    """The model folder that frozen weights come from."""

    path: str
    fingerprint: str  # of its weights, as `seedbed.model.weights.weights_fingerprint` gives it


class AdaptedLinear(nn.Linear):
    """A linear layer whose weight is more than its parameter `weight`: `seedbed.lora.LoraLinear`."""

    def effective_weight(self) -> Tensor:
        """(out, in)."""
        raise NotImplementedError


class Decoder(nn.Module):
    """Tokens to hidden states; the loss or `logits` turns these into a distribution over the vocabulary.

    Matches `GPT2LMHeadModel`, `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM` and
    `Qwen3ForCausalLM` of transformers. Under autocast the residual stream and the norms stay in float32.
    Weights are drawn as the family's authors do, from torch's default generator.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        c = config
        self.config = c
        self.gradient_checkpointing = False
        self.adapter: Adapter | None = None
        self.base: Base | None = None
        self.embed_tokens = Embedding(c.vocab_size, c.d_model)
        self.embed_positions = Embedding(c.max_seq_len, c.d_model) if c.position == "learned" else None
        self.embed_dropout = nn.Dropout(c.dropout if c.family == "gpt2" else 0.0)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.final_norm = make_norm(c)
        self.lm_head = None if c.tie_embeddings else nn.Linear(c.d_model, c.vocab_size, bias=False)
        if not self.embed_tokens.weight.is_meta:
            self.apply(self._init_weights)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: (B, T).
            position_ids: (B, T); counted from 0 when left out.
            segment_ids: (B, T), the document a token belongs to; tokens see only their own.

        Returns:
            (B, T, D).
        """
        assert segment_ids is None or position_ids is not None, "positions restart in each segment"
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, T)
        mask = self.mask(segment_ids)
        turn = None
        x = self.embed_tokens(input_ids)  # (B, T, D)
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids)
        else:
            turn = rotation(position_ids, self.config)
        x = self.embed_dropout(x)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, turn, mask, use_reentrant=False)
            else:
                x = block(x, turn, mask)
        return self.final_norm(x)  # type: ignore[no-any-return]

    def mask(self, segment_ids: Tensor | None) -> Mask | None:
        """What the blocks are given, under autocast where they are."""
        return document_mask(segment_ids, product_type(self.embed_tokens.weight), self.config.head_dim)

    def head_weight(self) -> Tensor:
        """(V, D): the embedding when the two are tied; the sum of both where the head has an adapter."""
        if isinstance(self.lm_head, AdaptedLinear):
            return self.lm_head.effective_weight()
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., V). To train and evaluate, `seedbed.loss` never holds them all."""
        if isinstance(self.lm_head, AdaptedLinear):
            return self.lm_head(hidden)  # type: ignore[no-any-return]  # without making a (V, D) for a few tokens
        return F.linear(hidden, self.head_weight())

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.init_std
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block) and self.config.family == "gpt2":
            # Two sums into the residual stream a block: scaled so that its variance does not grow with depth.
            for layer in (module.attention.o_proj, module.mlp.down_proj):
                nn.init.normal_(layer.weight, std=std / math.sqrt(2 * self.config.num_layers))


class Block(nn.Module):
    """Attention, then the MLP, each on a normalised copy and added back (pre-norm)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp: GeluMLP | SwiGLU = GeluMLP(config) if config.mlp == "gelu" else SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, turn: Rotation | None, mask: Mask | None) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x = x + self.dropout(self.attention(for_products(self.attention_norm(x)), turn, mask))
        return x + self.dropout(self.mlp(for_products(self.mlp_norm(x))))  # type: ignore[no-any-return]


class GeluMLP(nn.Module):
    """Up, GELU by its tanh approximation (`gelu_new` in transformers), down."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.up_proj = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down_proj = Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return activated(self.down_proj, gelu, self.up_proj(x))  # (B, T, D), and (B, T, F) between


class SwiGLU(nn.Module):
    """Up, multiplied by a gate through SiLU, down (Shazeer, 2020)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up_proj = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down_proj = Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return activated(self.down_proj, swiglu, self.gate_proj(x), self.up_proj(x))  # (B, T, D), and (B, T, F) between


def gelu(x: Tensor) -> Tensor:
    """By its tanh approximation."""
    if not torch.compiler.is_compiling() and suits_pieces(x):
        return gelu_in_pieces(x)
    return F.gelu(x, approximate="tanh")


def swiglu(gate: Tensor, x: Tensor) -> Tensor:
    """`x`, as far as the gate lets it through."""
    return F.silu(gate) * x


def for_products(x: Tensor) -> Tensor:
    """In the type of autocast, once for all layers that read it."""
    return x.to(product_type(x))


def make_norm(config: DecoderConfig) -> nn.Module:
    """The norm of the family, over the model width."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.d_model, eps=config.norm_eps)
    return RMSNorm(config.d_model, config.norm_eps)


def num_parameters(config: DecoderConfig) -> int:
    """How many weights a decoder has, tied ones once; takes no memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config).parameters())
