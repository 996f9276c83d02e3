from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seedbed.errors import CheckpointError, ConfigError
from seedbed.model.config import FAMILIES, DecoderConfig, RopeScaling, from_scratch
from seedbed.model.families import canonical_name, config_from_hf, config_to_hf, read_config, weight_names

# config.json as published, less what a decoder has no use for.
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_type": "cls_index", "vocab_size": 50257,
}  # fmt: skip
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 49152,
}  # fmt: skip
MISTRAL = {
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "vocab_size": 32768,
}  # fmt: skip
QWEN2 = {
    "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
QWEN3 = {
    "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2": GPT2, "llama": SMOLLM2, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3,
}  # fmt: skip


def sizes(config: DecoderConfig) -> tuple[int, ...]:
    c = config
    return (c.d_model, c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, c.d_ff, c.max_seq_len)


def test_published_configs() -> None:
    read = {family: config_from_hf(raw) for family, raw in PUBLISHED.items()}
    assert {family: sizes(config) for family, config in read.items()} == {
        "gpt2": (768, 12, 12, 12, 64, 3072, 1024),
        "llama": (576, 30, 9, 3, 64, 1536, 8192),
        "mistral": (4096, 32, 32, 8, 128, 14336, 32768),
        "qwen2": (896, 24, 14, 2, 64, 4864, 32768),
        "qwen3": (1024, 28, 16, 8, 128, 3072, 40960),
    }
    assert read["gpt2"].tie_embeddings  # the family's default, as the file is silent
    assert read["gpt2"].dropout == 0.1
    assert read["llama"].rope_theta == 100000.0
    assert read["llama"].init_std == pytest.approx(1 / 24)
    assert read["llama"].norm_eps == 1e-5
    assert read["qwen2"].qkv_bias
    assert not read["qwen2"].output_bias
    assert read["qwen3"].qk_norm


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family: str) -> None:
    config = config_from_hf(PUBLISHED[family])
    changed = replace(config, dropout=0.25, tie_embeddings=not config.tie_embeddings, d_ff=320, norm_eps=2e-6)
    for c in (config, changed):
        raw = config_to_hf(c, bos_token_id=None, eos_token_id=[1, 2], dtype="float32")
        assert config_from_hf(json.loads(json.dumps(raw))) == c
        assert raw["bos_token_id"] is None
        assert raw["eos_token_id"] == [1, 2]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500.0},
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_theta": 500}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 7.0},
        {"rope_parameters": None, "rope_theta": 500.0},
    ],
)
def test_rotary_base_of_old_and_new_files(rope: dict[str, Any]) -> None:
    raw = {key: value for key, value in SMOLLM2.items() if not key.startswith("rope")}
    assert config_from_hf(raw | rope).rope_theta == 500.0
    assert config_from_hf(raw).rope_theta == 10000.0


LLAMA3: dict[str, Any] = {  # Llama 3.2 1B
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaled_positions_of_old_and_new_files(key: str) -> None:
    config = config_from_hf(SMOLLM2 | {key: LLAMA3})
    assert config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    raw = config_to_hf(config, bos_token_id=None, eos_token_id=2, dtype="bfloat16")
    assert raw["rope_scaling"] == LLAMA3
    assert raw["rope_parameters"] == LLAMA3 | {"rope_theta": config.rope_theta}
    assert config_from_hf(raw) == config


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("gpt2", {"model_type": "bert"}, "model_type 'bert': supported are gpt2, llama, mistral, qwen2, qwen3"),
        ("gpt2", {"model_type": None}, "model_type None"),
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu': supported is 'gelu_new'"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function 'gelu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True: supported is False"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights False: supported is True"),
        ("gpt2", {"n_embd": None}, "n_embd None: expected a whole number"),
        ("gpt2", {"n_head": "12"}, "n_head '12': expected a whole number"),
        ("gpt2", {"resid_pdrop": "a"}, "resid_pdrop 'a': expected a number"),
        ("gpt2", {"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes': expected true or false"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu': supported is 'silu'"),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": None}}, "rope_type 'llama3': factor None: expected a number"),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": 0.5}}, "rope_scaling factor 0.5: expected 1 or more"),
        ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "low_freq_factor 1.0, high_freq_factor 1.0"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
        ("llama", {"rope_theta": "1e6"}, "rope_theta '1e6': expected a number"),
        ("mistral", {"sliding_window": "4096"}, "sliding_window '4096': expected a whole number"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "layer_types": 5}, "sliding_window 64"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5: supported is 1.0"),
        ("mistral", {"sliding_window": 4096}, "sliding_window 4096: supported is null"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 4}, "sliding_window 64"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]},
            "sliding_window 64",
        ),
    ],
)
def test_what_the_decoder_has_not_is_refused_by_name(family: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_hf(PUBLISHED[family] | changes)
    assert len(error.value.problems) == 1
    assert says in error.value.problems[0]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"activation_function": "gelu_pytorch_tanh"}),
        ("mistral", {"sliding_window": 32768}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 24}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"] * 28}),
        ("llama", {"partial_rotary_factor": 1.0}),
    ],
)
def test_what_changes_nothing_is_accepted(family: str, changes: dict[str, Any]) -> None:
    assert config_from_hf(PUBLISHED[family] | changes) == config_from_hf(PUBLISHED[family])


def test_a_silent_mistral_has_the_window_transformers_gives_it() -> None:
    raw = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    with pytest.raises(ConfigError, match="sliding_window 4096"):
        config_from_hf(raw)


def test_a_silent_qwen3_has_heads_of_128() -> None:
    assert config_from_hf({k: v for k, v in QWEN3.items() if k != "head_dim"}).head_dim == 128


def test_all_problems_are_listed() -> None:
    raw = {key: value for key, value in GPT2.items() if key not in ("n_embd", "vocab_size")}
    with pytest.raises(ConfigError) as error:
        config_from_hf(raw | {"activation_function": "relu"})
    assert sorted(p.split()[0] for p in error.value.problems) == ["activation_function", "n_embd", "vocab_size"]


def test_read_config_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    for damaged in ("{", "[1]", ""):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read_config(tmp_path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)
    path.write_text(json.dumps(GPT2 | {"n_head": 7}))
    with pytest.raises(ConfigError, match=r"config\.json: d_model 768 is not divisible by num_heads 7"):
        read_config(tmp_path)
    path.write_text(json.dumps(GPT2))
    assert read_config(tmp_path) == config_from_hf(GPT2)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_name_is_used_twice(family: str) -> None:
    config = replace(config_from_hf(PUBLISHED[family]), num_layers=3)
    names = weight_names(config)
    theirs, ours = [n.theirs for n in names], [o for n in names for o in n.ours]
    assert len(set(theirs)) == len(theirs)
    assert len(set(ours)) == len(ours)
    assert not any("{" in name for name in theirs + ours)


def test_names_of_old_files() -> None:
    assert canonical_name("gpt2", "wte.weight") == "transformer.wte.weight"
    assert canonical_name("gpt2", "transformer.wte.weight") == "transformer.wte.weight"
    assert canonical_name("gpt2", "lm_head.weight") == "lm_head.weight"
    assert canonical_name("gpt2", "h.11.attn.bias") is None
    assert canonical_name("gpt2", "transformer.h.11.attn.masked_bias") is None
    assert canonical_name("gpt2", "h.11.attn.c_attn.bias") == "transformer.h.11.attn.c_attn.bias"
    assert canonical_name("llama", "model.layers.0.self_attn.rotary_emb.inv_freq") is None


def test_from_scratch_writes_what_it_reads() -> None:
    config = from_scratch("qwen3", vocab_size=10, d_model=16, num_layers=1, num_heads=2, max_seq_len=8)
    assert config_from_hf(config_to_hf(config, bos_token_id=0, eos_token_id=0, dtype="float32")) == config
