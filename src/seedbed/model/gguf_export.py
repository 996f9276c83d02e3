"""Models as GGUF files, llama.cpp's format; the counterpart of `seedbed.model.gguf`.

Format and keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors are read, turned and written one
by one, so memory grows with the largest, not with the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from seedbed.errors import CheckpointError, ConfigError
from seedbed.model.attention import tokens_a_radian
from seedbed.model.config import DecoderConfig
from seedbed.model.families import config_to_hf
from seedbed.model.gguf_names import (
    GPT2_KEYS,
    LLAMA_KEYS,
    LLAMA_OPTIONAL_KEYS,
    ROPE_FACTORS,
    StoredWeight,
    as_type,
    require_gguf,
    stored_weights,
)
from seedbed.model.hub import Progress, new_file
from seedbed.model.weights import Reader
from seedbed.text.gguf_tokenizer_export import tokenizer_to_gguf
from seedbed.text.tokenizer import Tokenizer

# Values of general.file_type.
_FILE_TYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
_TYPES: Final = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_QUANTIZATION_VERSION: Final = 2


def export_gguf(
    output: Path,
    config: DecoderConfig,
    weights: Mapping[str, Reader],
    tokenizer: Tokenizer,
    name: str,
    dtype: torch.dtype = torch.float16,
    progress: Progress = lambda _done, _total: None,
) -> None:
    """Write a model and its tokenizer as a GGUF file, which appears whole or not at all.

    Args:
        output: a file that is not there yet.
        weights: by Hugging Face's names; a tied head is not among them.
        name: of the model, for whoever reads the file.
        dtype: of the matrices: float32, float16 or bfloat16. Vectors and positions stay in float32.
        progress: called with the bytes written and the bytes in all.

    Raises:
        MissingExtra: without the extra `gguf`.
        ConfigError: a model or tokenizer that GGUF has no keys for; `output` is there.
        CheckpointError: weights are missing, surplus or of the wrong shape, or hold what `dtype` cannot.
        StorageError: the disk is full or refuses.
    """
    require_gguf()
    import numpy as np
    from gguf import GGMLQuantizationType

    config = _as_gguf(config)
    stored = stored_weights(config)
    _require_names(stored, weights)
    metadata = _metadata(config, name, dtype) | tokenizer_to_gguf(tokenizer, config.vocab_size)
    factors = _rope_factors(config)
    types = {weight.stored: _type(weight, dtype) for weight in stored}
    total = sum(math.prod(weight.shape) * types[weight.stored].itemsize for weight in stored)
    done = 0
    with new_file(output) as temporary, closing(_writer(temporary, config.family)) as writer:
        _add_metadata(writer, metadata)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, np.dtype(np.float32), factors.nbytes)
        for weight in stored:
            kind, size = types[weight.stored], math.prod(weight.shape) * types[weight.stored].itemsize
            raw = GGMLQuantizationType[_TYPES[kind]]
            writer.add_tensor_info(weight.stored, weight.shape, np.dtype(np.float32), size, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for weight in stored:
            tensor = _turned(weights[weight.theirs](), weight, types[weight.stored])
            writer.write_tensor_data(tensor.flatten().view(torch.uint8).numpy())
            done += tensor.nbytes
            progress(done, total)


def _as_gguf(config: DecoderConfig) -> DecoderConfig:
    """The same model under the name that GGUF files have for it.

    Raises:
        ConfigError: programs that read GGUF files do not know a part of it.
    """
    if config.family == "mistral":
        return replace(config, family="llama")
    problems = []
    if config.family == "qwen3" and config.qkv_bias:
        problems.append("attention_bias true: GGUF files of Qwen3 have no such biases")
    if config.family != "llama" and config.rope_scaling:
        problems.append(f"rope_type 'llama3': GGUF files of {config.family} have no such scaling of positions")
    if problems:
        raise ConfigError(problems)
    return config


def _metadata(config: DecoderConfig, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Values by key, but for the tokenizer's."""
    arch = config.family
    raw = config_to_hf(config, bos_token_id=None, eos_token_id=None, dtype="float32")
    raw["n_inner"] = config.d_ff  # which config.json may leave to be worked out
    table = GPT2_KEYS if arch == "gpt2" else LLAMA_KEYS | LLAMA_OPTIONAL_KEYS
    keys = {key: raw[theirs] for key, theirs in table.items() if theirs in raw}
    keys["vocab_size"] = config.vocab_size
    if config.position == "rope":
        keys["rope.dimension_count"] = config.head_dim
    if "attention.key_length" in keys:
        keys["attention.value_length"] = config.head_dim
    general = {
        "type": "model",
        "name": name,
        "file_type": _FILE_TYPES[dtype],
        "quantization_version": _QUANTIZATION_VERSION,
    }
    return {f"general.{key}": value for key, value in general.items()} | {
        f"{arch}.{key}": value for key, value in keys.items()
    }


def _rope_factors(config: DecoderConfig) -> Tensor | None:
    """How much slower each pair turns for the scaling of positions: (E/2,), float32, for heads of E."""
    if config.rope_scaling is None:
        return None
    return tokens_a_radian(config) / tokens_a_radian(replace(config, rope_scaling=None))  # (E/2,)


def _require_names(stored: list[StoredWeight], weights: Mapping[str, Reader]) -> None:
    expected = {weight.theirs for weight in stored}
    problems = [f"{name} is missing" for name in sorted(expected - weights.keys())]
    problems += [f"{name} is not a weight of this model" for name in sorted(weights.keys() - expected)]
    if problems:
        raise CheckpointError(
            "the weights do not fit the model's config.json; take both from one checkpoint\n  " + "\n  ".join(problems)
        )


def _type(weight: StoredWeight, dtype: torch.dtype) -> torch.dtype:
    """Vectors are float32 in every file, and so are positions: llama.cpp computes with them as they are."""
    return torch.float32 if len(weight.shape) == 1 or weight.stored == "position_embd.weight" else dtype


def _turned(tensor: Tensor, weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    """One tensor as the file holds it."""
    if tuple(tensor.shape) != weight.folder_shape or not tensor.is_floating_point():
        raise CheckpointError(
            f"{weight.theirs} has shape {list(tensor.shape)} and type {tensor.dtype}, expected "
            f"{list(weight.folder_shape)} in floating point; take weights and config.json from one checkpoint"
        )
    if weight.transposed:
        tensor = tensor.T  # (out, in)
    if weight.num_heads is not None:
        tensor = _as_pairs(tensor, weight.num_heads)
    return as_type(tensor, dtype, weight.theirs, "take an earlier checkpoint")


def _as_pairs(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from Hugging Face's order to llama.cpp's, (out, ...) to the same.

    Rotary positions turn the rows (i, i + E/2) together here, and (2i, 2i + 1) there, for heads of E rows.
    """
    halves = tensor.view(num_heads, 2, -1, *tensor.shape[1:])  # (H, 2, E/2, ...)
    return halves.transpose(1, 2).reshape(tensor.shape)


def _writer(path: Path, arch: str) -> Any:
    from gguf import GGUFValueType, GGUFWriter

    class Writer(GGUFWriter):
        """With arrays that may be empty: an alphabet of ASCII alone needs no merges, and readers want the key."""

        def _pack_val(
            self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
        ) -> bytes:
            if vtype == GGUFValueType.ARRAY and len(val) == 0:
                return bytes(self._pack("I", vtype) + self._pack("I", GGUFValueType.STRING) + self._pack("Q", 0))
            return bytes(super()._pack_val(val, vtype, add_vtype, sub_type))

    return Writer(path, arch)


def _add_metadata(writer: Any, metadata: Mapping[str, Any]) -> None:
    from gguf import GGUFValueType

    types = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
        list: GGUFValueType.ARRAY,
    }
    for key, value in metadata.items():
        writer.add_key_value(key, value, types[type(value)])
