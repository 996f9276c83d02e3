"""What GGUF files call the parts of a model; one set of tables for reading and writing.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from seedbed.errors import CheckpointError, MissingExtra
from seedbed.model.config import DecoderConfig
from seedbed.model.decoder import Decoder
from seedbed.model.families import weight_names

ARCHITECTURES: Final = ("gpt2", "llama", "qwen2", "qwen3")

# Keys of the metadata, after the architecture's name, and of config.json.
LLAMA_KEYS: Final = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
LLAMA_OPTIONAL_KEYS: Final = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
GPT2_KEYS: Final = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}

# The decoder's modules and GGUF's; queries, keys and values of GPT-2 are one tensor there, `attn_qkv`.
_NAMES: Final = {
    "embed_tokens": "token_embd",
    "embed_positions": "position_embd",
    "final_norm": "output_norm",
    "lm_head": "output",
    "attention_norm": "attn_norm",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

ROPE_FACTORS: Final = "rope_freqs.weight"


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of a model folder and of a GGUF file."""

    theirs: str  # Hugging Face's name
    stored: str  # GGUF's name
    shape: tuple[int, ...]  # in the file: (out, in) for a matrix
    transposed: bool  # in the folder: (in, out)
    num_heads: int | None  # of queries or keys whose rows are interleaved in the file

    @property
    def folder_shape(self) -> tuple[int, ...]:
        """Its shape in the folder."""
        return self.shape[::-1] if self.transposed else self.shape


def stored_weights(config: DecoderConfig) -> list[StoredWeight]:
    """Every tensor of a model, in Hugging Face's order."""
    with torch.device("meta"):
        state = Decoder(config).state_dict()
    interleaved = {"attention.q_proj": config.num_heads, "attention.k_proj": config.num_kv_heads}
    weights = []
    for name in weight_names(config):
        prefix, module = _split(name.ours[0])
        stored = "attn_qkv" if len(name.ours) > 1 else _NAMES[module]
        for kind in ("weight", "bias"):
            parts = [state[key] for ours in name.ours if (key := f"{ours}.{kind}") in state]
            if parts:
                shape = (sum(map(len, parts)), *parts[0].shape[1:])
                heads = interleaved.get(module) if config.family == "llama" else None
                transposed = name.transposed and len(shape) == 2
                weights.append(
                    StoredWeight(f"{name.theirs}.{kind}", f"{prefix}{stored}.{kind}", shape, transposed, heads)
                )
    return weights


def _split(ours: str) -> tuple[str, str]:
    """GGUF's prefix and the module inside the block.

    >>> _split("blocks.3.mlp.up_proj"), _split("lm_head")
    (('blk.3.', 'mlp.up_proj'), ('', 'lm_head'))
    """
    if not ours.startswith("blocks."):
        return "", ours
    _, block, module = ours.split(".", 2)
    return f"blk.{block}.", module


def require_gguf() -> None:
    """Raise MissingExtra without the package `gguf`."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise MissingExtra("GGUF files", "gguf") from None


def as_type(tensor: Tensor, dtype: torch.dtype, what: str, otherwise: str) -> Tensor:
    """The tensor in a type that has to hold all its numbers.

    Raises:
        CheckpointError: it cannot; `what` names the tensor, and `otherwise` is the remedy where no wider type helps.
    """
    tensor = tensor.to(dtype).contiguous()
    if not tensor.isfinite().all():
        remedy = "take --dtype bfloat16" if dtype == torch.float16 else otherwise
        raise CheckpointError(f"{what} holds numbers that {str(dtype).removeprefix('torch.')} cannot; {remedy}")
    return tensor
