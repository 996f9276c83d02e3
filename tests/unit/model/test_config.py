from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from seedbed.errors import ConfigError
from seedbed.model.config import SCRATCH_FAMILIES, DecoderConfig, from_scratch

SIZES: dict[str, Any] = {"vocab_size": 100, "d_model": 96, "num_layers": 2, "num_heads": 6, "max_seq_len": 32}


def problems(arch: str = "llama", **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        from_scratch(arch, **(SIZES | changes))
    return error.value.problems


@pytest.mark.parametrize(
    ("arch", "changes", "says"),
    [
        ("gpt2", {"d_model": 100}, "d_model 100 is not divisible by num_heads 6: take d_model 96"),
        ("llama", {"d_model": 4}, "head_dim 0"),
        (
            "llama",
            {"num_kv_heads": 4},
            "num_heads 6 is not a multiple of num_kv_heads 4: take num_kv_heads from 1, 2, 3, 6",
        ),
        ("gpt2", {"num_kv_heads": 2}, "gpt2 has no grouped heads"),
        ("llama", {"d_model": 90}, "head_dim 15 is odd"),
        ("llama", {"num_layers": 0}, "num_layers 0: expected at least 1"),
        ("llama", {"vocab_size": 2**31, "d_model": 2**22}, "a matrix of 4,194,304 × 2,147,483,648 weights"),
        ("llama", {"vocab_size": -5}, "vocab_size -5"),
        ("llama", {"max_seq_len": 0}, "max_seq_len 0"),
        ("llama", {"d_ff": 0}, "d_ff 0"),
        ("llama", {"num_heads": 0}, "num_heads 0"),
        ("llama", {"num_kv_heads": 0}, "num_kv_heads 0"),
        ("llama", {"dropout": 1.0}, "dropout 1.0: expected 0 or more and less than 1"),
        ("llama", {"dropout": -0.1}, "dropout -0.1"),
        ("llama", {"dropout": float("nan")}, "dropout nan"),
        ("llama", {"rope_theta": 0.0}, "rope_theta 0.0"),
        ("lama", {}, "--arch lama: expected one of gpt2, llama, qwen2, qwen3; did you mean llama?"),
    ],
)
def test_a_contradiction_is_named(arch: str, changes: dict[str, Any], says: str) -> None:
    (problem,) = problems(arch, **changes)
    assert says in problem


def test_all_contradictions_are_listed_at_once() -> None:
    found = problems("gpt2", d_model=100, num_kv_heads=5, dropout=2.0)
    assert [p.split()[0] for p in found] == ["d_model", "num_kv_heads", "dropout"]
    assert len(problems("llama", vocab_size=0, num_layers=0, num_heads=0, dropout=-1.0)) == 4


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("gpt2", {"head_dim": 10}, "head_dim 10: gpt2 has d_model / num_heads = 16 only"),
        ("qwen2", {"head_dim": 10}, "head_dim 10"),
        ("gpt2", {"norm": "rmsnorm"}, "norm rmsnorm: gpt2 has norm layernorm"),
        ("gpt2", {"mlp": "swiglu"}, "mlp swiglu"),
        ("llama", {"position": "learned"}, "position learned"),
        ("llama", {"qkv_bias": True}, "output_bias False: llama has output_bias True"),
        ("llama", {"qk_norm": True}, "qk_norm True"),
        ("qwen2", {"qkv_bias": False}, "qkv_bias False"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias True"),
        ("llama", {"family": "mistral", "mlp_bias": True}, "mlp_bias True"),
        ("llama", {"family": "bert"}, "family bert: expected one of"),
        ("llama", {"norm_eps": 0.0}, "norm_eps 0.0"),
        ("llama", {"init_std": -1.0}, "init_std -1.0"),
    ],
)
def test_what_the_family_cannot_be_is_refused(family: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        replace(from_scratch(family, **SIZES), **changes)
    assert len(error.value.problems) == 1
    assert says in error.value.problems[0]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_head_dim_of_its_own(family: str) -> None:
    assert replace(from_scratch(family, **SIZES), head_dim=10).head_dim == 10


def test_width_and_heads_are_free_of_each_other_where_head_dim_is_given() -> None:
    config = replace(from_scratch("qwen3", **SIZES), head_dim=10)
    assert replace(config, d_model=100).d_model == 100  # 6 heads of 10


def kinds(config: DecoderConfig) -> dict[str, object]:
    names = "norm norm_eps position mlp qkv_bias output_bias mlp_bias qk_norm init_std"
    return {name: getattr(config, name) for name in names.split()}


def test_each_family_has_its_authors_defaults() -> None:
    llama: dict[str, object] = {
        "norm": "rmsnorm",
        "norm_eps": 1e-5,
        "position": "rope",
        "mlp": "swiglu",
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "init_std": 0.02,
    }
    gpt2 = {"norm": "layernorm", "position": "learned", "mlp": "gelu"}
    expected: dict[str, dict[str, object]] = {
        "gpt2": llama | gpt2 | {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
        "llama": llama,
        "qwen2": llama | {"norm_eps": 1e-6, "qkv_bias": True},
        "qwen3": llama | {"norm_eps": 1e-6, "qk_norm": True},
    }
    for arch in SCRATCH_FAMILIES:
        config = from_scratch(arch, **SIZES)
        assert kinds(config) == expected[arch], arch
        assert (config.family, config.num_kv_heads, config.head_dim) == (arch, 6, 16)
        assert config.tie_embeddings


@pytest.mark.parametrize(
    ("arch", "width", "d_ff"),
    [("gpt2", 96, 384), ("llama", 96, 256), ("llama", 768, 2048), ("llama", 384, 1024), ("qwen3", 390, 1088)],
)
def test_the_inner_width_follows_the_width(arch: str, width: int, d_ff: int) -> None:
    assert from_scratch(arch, **(SIZES | {"d_model": width, "num_heads": 3})).d_ff == d_ff


def test_reading_a_config_needs_no_torch() -> None:
    code = "import sys, seedbed.model.config, seedbed.model.families; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
