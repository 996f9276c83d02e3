"""Hugging Face's `config.json` and weight names, read and written from the same tables. Free of torch.

Adding a family: an entry in `WEIGHT_NAMES`, its keys in the two functions that translate `config.json`, its
rules in `seedbed.model.config`, and a parity test.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from seedbed.errors import CheckpointError, ConfigError
from seedbed.model.config import FAMILIES, DecoderConfig, RopeScaling
from seedbed.parsing import parse_json, require_plain_files


@dataclass(frozen=True)
class Name:
    """One of Hugging Face's modules and what it is here; `{}` is the number of the block."""

    theirs: str
    ours: tuple[str, ...]  # several: theirs holds these, one after the other along the output
    transposed: bool = False  # GPT-2's Conv1D keeps its weight as (in, out)


_LLAMA: Final = (
    Name("model.embed_tokens", ("embed_tokens",)),
    Name("model.layers.{}.input_layernorm", ("blocks.{}.attention_norm",)),
    Name("model.layers.{}.self_attn.q_proj", ("blocks.{}.attention.q_proj",)),
    Name("model.layers.{}.self_attn.k_proj", ("blocks.{}.attention.k_proj",)),
    Name("model.layers.{}.self_attn.v_proj", ("blocks.{}.attention.v_proj",)),
    Name("model.layers.{}.self_attn.o_proj", ("blocks.{}.attention.o_proj",)),
    Name("model.layers.{}.post_attention_layernorm", ("blocks.{}.mlp_norm",)),
    Name("model.layers.{}.mlp.gate_proj", ("blocks.{}.mlp.gate_proj",)),
    Name("model.layers.{}.mlp.up_proj", ("blocks.{}.mlp.up_proj",)),
    Name("model.layers.{}.mlp.down_proj", ("blocks.{}.mlp.down_proj",)),
    Name("model.norm", ("final_norm",)),
    Name("lm_head", ("lm_head",)),
)

WEIGHT_NAMES: Final[Mapping[str, tuple[Name, ...]]] = {
    "gpt2": (
        Name("transformer.wte", ("embed_tokens",)),
        Name("transformer.wpe", ("embed_positions",)),
        Name("transformer.h.{}.ln_1", ("blocks.{}.attention_norm",)),
        Name(
            "transformer.h.{}.attn.c_attn",
            ("blocks.{}.attention.q_proj", "blocks.{}.attention.k_proj", "blocks.{}.attention.v_proj"),
            transposed=True,
        ),
        Name("transformer.h.{}.attn.c_proj", ("blocks.{}.attention.o_proj",), transposed=True),
        Name("transformer.h.{}.ln_2", ("blocks.{}.mlp_norm",)),
        Name("transformer.h.{}.mlp.c_fc", ("blocks.{}.mlp.up_proj",), transposed=True),
        Name("transformer.h.{}.mlp.c_proj", ("blocks.{}.mlp.down_proj",), transposed=True),
        Name("transformer.ln_f", ("final_norm",)),
        Name("lm_head", ("lm_head",)),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": (
        *_LLAMA,
        Name("model.layers.{}.self_attn.q_norm", ("blocks.{}.attention.q_norm",)),
        Name("model.layers.{}.self_attn.k_norm", ("blocks.{}.attention.k_norm",)),
    ),
}

_ARCHITECTURES: Final = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Masks and rotary tables that older versions of transformers kept among the weights.
_BUFFERS: Final = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")


def weight_names(config: DecoderConfig) -> list[Name]:
    """The modules of a model in Hugging Face's order, block numbers filled in.

    Some have no weight or bias in this config (an untied head, biases): the decoder's own list decides.
    """
    every = WEIGHT_NAMES[config.family]
    outside = [n for n in every if "{}" not in n.theirs]
    inside = [n for n in every if "{}" in n.theirs]
    return outside + [
        Name(n.theirs.format(i), tuple(o.format(i) for o in n.ours), n.transposed)
        for i in range(config.num_layers)
        for n in inside
    ]


def canonical_name(family: str, name: str) -> str | None:
    """A tensor's name as the family writes it today, or None for a buffer that is not a weight.

    The first GPT-2 files have no `transformer.` in front.

    >>> canonical_name("gpt2", "h.0.ln_1.weight")
    'transformer.h.0.ln_1.weight'
    """
    if _BUFFERS.search(name):
        return None
    prefix = "transformer." if family == "gpt2" else "model."
    return name if name.startswith((prefix, "lm_head.")) else prefix + name


def read_config(folder: Path) -> DecoderConfig:
    """The config of a model folder.

    Raises:
        CheckpointError: no `config.json`, or it is damaged, or the folder holds links out of it.
        ConfigError: a model this decoder cannot be; names the key, its value and what is supported.
    """
    require_plain_files(folder)
    path = folder / "config.json"
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no config.json; expected a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); copy the file again") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object; copy the file again")
    try:
        return config_from_hf(raw)
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Fields of the decoder from the content of a `config.json`, old (4.x) or new (5.x) transformers.

    Dropout is GPT-2's `resid_pdrop`, or `attention_dropout` of the others.

    Raises:
        ConfigError: every key that is missing, of the wrong kind, or asks for what the decoder has not.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"model_type {family!r}: supported are {', '.join(FAMILIES)}")
    reader = _Reader(raw)
    fields = _gpt2_fields(reader) if family == "gpt2" else _llama_fields(reader, family)
    if reader.problems:
        raise ConfigError(reader.problems)
    return DecoderConfig(family=family, **fields)


def config_to_hf(
    config: DecoderConfig, *, bos_token_id: int | None, eos_token_id: int | list[int] | None, dtype: str
) -> dict[str, Any]:
    """The content of a `config.json` that transformers 4.57 and 5.x read alike.

    Args:
        dtype: of the stored weights, such as "float32".
    """
    c = config
    shared = {
        "architectures": [_ARCHITECTURES[c.family]],
        "bos_token_id": bos_token_id,
        "dtype": dtype,
        "eos_token_id": eos_token_id,
        "initializer_range": c.init_std,
        "model_type": c.family,
        "tie_word_embeddings": c.tie_embeddings,
        "use_cache": True,
        "vocab_size": c.vocab_size,
    }
    own = _gpt2_keys(c) if c.family == "gpt2" else _llama_keys(c)
    return dict(sorted((shared | own).items()))


def _gpt2_fields(read: _Reader) -> dict[str, Any]:
    d_model, num_heads = read.size("n_embd"), read.size("n_head")
    read.only("activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    read.only("scale_attn_weights", True, True)
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        read.only(key, False, False)
    return {
        "vocab_size": read.size("vocab_size"),
        "d_model": d_model,
        "num_layers": read.size("n_layer"),
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": d_model // num_heads,
        "d_ff": read.size("n_inner", 4 * d_model),
        "max_seq_len": read.size("n_positions"),
        "norm": "layernorm",
        "norm_eps": read.number("layer_norm_epsilon", 1e-5),
        "position": "learned",
        "rope_theta": 10000.0,
        "mlp": "gelu",
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "tie_embeddings": read.flag("tie_word_embeddings", True),
        "dropout": read.number("resid_pdrop", 0.1),
        "init_std": read.number("initializer_range", 0.02),
    }


def _gpt2_keys(c: DecoderConfig) -> dict[str, Any]:
    return {
        "activation_function": "gelu_new",
        "attn_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "layer_norm_epsilon": c.norm_eps,
        "n_embd": c.d_model,
        "n_head": c.num_heads,
        "n_inner": None if c.d_ff == 4 * c.d_model else c.d_ff,
        "n_layer": c.num_layers,
        "n_positions": c.max_seq_len,
        "resid_pdrop": c.dropout,
    }


def _llama_fields(read: _Reader, family: str) -> dict[str, Any]:
    d_model, num_heads = read.size("hidden_size"), read.size("num_attention_heads")
    max_seq_len, num_layers = read.size("max_position_embeddings"), read.size("num_hidden_layers")
    read.only("hidden_act", "silu", "silu")
    read.full_attention(family, max_seq_len, num_layers)
    bias = family in ("llama", "qwen3") and read.flag("attention_bias", False)
    return {
        "vocab_size": read.size("vocab_size"),
        "d_model": d_model,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": read.size("num_key_value_heads", num_heads),
        # Qwen3 alone has a width of its own when the file is silent.
        "head_dim": read.size("head_dim", 128 if family == "qwen3" else d_model // num_heads),
        "d_ff": read.size("intermediate_size"),
        "max_seq_len": max_seq_len,
        "norm": "rmsnorm",
        "norm_eps": read.number("rms_norm_eps", 1e-6),
        "position": "rope",
        "rope_theta": read.rope_theta(),
        "rope_scaling": read.rope_scaling(),
        "mlp": "swiglu",
        "qkv_bias": bias or family == "qwen2",
        "output_bias": bias,
        "mlp_bias": family == "llama" and read.flag("mlp_bias", False),
        "qk_norm": family == "qwen3",
        "tie_embeddings": read.flag("tie_word_embeddings", False),
        "dropout": read.number("attention_dropout", 0.0),
        "init_std": read.number("initializer_range", 0.02),
    }


def _llama_keys(c: DecoderConfig) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", **asdict(c.rope_scaling)} if c.rope_scaling else {"rope_type": "default"}
    keys: dict[str, Any] = {
        "attention_dropout": c.dropout,
        "hidden_act": "silu",
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "max_position_embeddings": c.max_seq_len,
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "rms_norm_eps": c.norm_eps,
        # transformers 5 reads the first; 4.x, and most other programs, the second.
        "rope_parameters": {"rope_theta": c.rope_theta, **scaling},
        "rope_theta": c.rope_theta,
    }
    if c.rope_scaling:
        keys["rope_scaling"] = scaling
    if c.family in ("llama", "qwen3"):
        keys["attention_bias"] = c.qkv_bias
    if c.family == "llama":
        keys["mlp_bias"] = c.mlp_bias
    if c.family != "qwen2":
        keys["head_dim"] = c.head_dim
    if c.family != "llama":
        keys["sliding_window"] = None
    if c.family in ("qwen2", "qwen3"):
        keys["use_sliding_window"] = False
    return keys


class _Reader:
    """Values of a `config.json` by key; collects what is wrong instead of stopping at the first."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.problems: list[str] = []

    def size(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        self.problems.append(
            f"{key} {value!r}: expected a whole number, 1 or more" if key in self.raw else f"{key} is missing"
        )
        return 1

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        self.problems.append(f"{key} {value!r}: expected a number" if key in self.raw else f"{key} is missing")
        return default or 1.0

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool):
            return value
        self.problems.append(f"{key} {value!r}: expected true or false")
        return default

    def only(self, key: str, default: object, *supported: object) -> None:
        value = self.raw.get(key, default)
        if value not in supported:
            self.problems.append(f"{key} {value!r}: supported is {' or '.join(map(repr, supported))}")

    def rope_theta(self) -> float:
        """From `rope_parameters` (transformers 5), or `rope_theta` (4.x)."""
        places = (*self._ropes(), self.raw)
        for keys in places:
            if keys.get("partial_rotary_factor") not in (None, 1, 1.0):
                self.problems.append(f"partial_rotary_factor {keys['partial_rotary_factor']}: supported is 1.0")
        theta = next((keys["rope_theta"] for keys in places if keys.get("rope_theta")), 10000.0)
        read = _Reader({"rope_theta": theta})
        value = read.number("rope_theta")
        self.problems += read.problems
        return value

    def rope_scaling(self) -> RopeScaling | None:
        """From `rope_parameters` (transformers 5), or `rope_scaling` (4.x)."""
        for rope in self._ropes():
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind == "llama3":
                read = _Reader(rope)
                scaling = RopeScaling(
                    read.number("factor"),
                    read.number("low_freq_factor"),
                    read.number("high_freq_factor"),
                    read.size("original_max_position_embeddings"),
                )
                self.problems += [f"rope_type 'llama3': {problem}" for problem in read.problems]
                return scaling
            if kind != "default":
                self.problems.append(f"rope_type {kind!r}: supported are 'default' and 'llama3'")
        return None

    def _ropes(self) -> list[dict[str, Any]]:
        return [rope for key in ("rope_parameters", "rope_scaling") if isinstance(rope := self.raw.get(key), dict)]

    def full_attention(self, family: str, max_seq_len: int, num_layers: int) -> None:
        """Refuse windows in which a token would not see every token before it."""
        if family == "llama":
            return
        window = self.raw.get("sliding_window", 4096)  # what transformers takes when the file is silent
        if window is not None and self.size("sliding_window", 4096) != window:
            return  # it is no number, which is a problem enough
        kinds = self.raw.get("layer_types") or ["sliding_attention"]
        used = family == "mistral" or (
            self.flag("use_sliding_window", False)
            and (not isinstance(kinds, list) or "sliding_attention" in kinds)
            and ("layer_types" in self.raw or self.size("max_window_layers", 28) < num_layers)
        )
        if used and window is not None and window < max_seq_len:
            self.problems.append(
                f"sliding_window {window}: supported is null, or {max_seq_len} (max_position_embeddings). "
                f"For texts up to {window} tokens, set max_position_embeddings to {window}"
            )
