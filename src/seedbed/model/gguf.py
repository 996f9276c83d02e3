"""GGUF files, llama.cpp's format, into model folders of Hugging Face.

A file holds metadata and named tensors, quantized or not; the package `gguf` reads and dequantizes them.
Format and keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors are converted one by one,
so memory grows with the largest, not with the model.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from seedbed.errors import CheckpointError, ConfigError
from seedbed.model.attention import tokens_a_radian
from seedbed.model.config import DecoderConfig, RopeScaling
from seedbed.model.families import config_from_hf, config_to_hf
from seedbed.model.gguf_names import (
    ARCHITECTURES,
    GPT2_KEYS,
    LLAMA_KEYS,
    LLAMA_OPTIONAL_KEYS,
    ROPE_FACTORS,
    StoredWeight,
    as_type,
    require_gguf,
    stored_weights,
)
from seedbed.model.hub import Progress, new_folder
from seedbed.model.weights import WEIGHTS_FILE
from seedbed.text.gguf_tokenizer import tokenizer_from_gguf

_LLAMA3_SCALING: Final = RopeScaling(8.0, 1.0, 4.0, original_max_position_embeddings=8192)

_SAFETENSORS_TYPES: Final = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file says; its tensors stay on the disk until they are used."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]  # gguf.ReaderTensor by name


@dataclass(frozen=True)
class Imported:
    """What was made of a GGUF file."""

    config: DecoderConfig
    num_parameters: int  # a tied head is not counted twice
    quantization: dict[str, int]  # number of weights by their type in the file, the most frequent first


def read_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file and read its metadata and list of tensors, a few seconds for a large vocabulary.

    Raises:
        MissingExtra: without the extra `gguf`.
        ConfigError: there is no such file, or it is one of several parts, or big-endian.
        CheckpointError: damaged, cut short, or no GGUF.
    """
    require_gguf()
    from gguf import GGUFReader

    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; expected a GGUF file")
    try:
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise CheckpointError(f"{path}: not a GGUF file: it does not begin with 'GGUF'")
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        num_parts = int(metadata.get("split.count", 1))
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error}); download it again") from None
    if num_parts > 1:
        raise ConfigError(f"{path}: one of {num_parts} parts; put them together first: llama-gguf-split --merge")
    if reader.byte_order != "I":
        raise ConfigError(f"{path}: its numbers are not in this machine's byte order; take a little-endian file")
    return GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def import_gguf(
    file: GGUFFile,
    output: Path,
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda _done, _total: None,
) -> Imported:
    """Write the model and tokenizer of a GGUF file as a model folder, which appears whole or not at all.

    Args:
        file: from `read_gguf`.
        output: a folder that is not there yet, or empty.
        dtype: of the weights written: float32, bfloat16 or float16.
        progress: called with the bytes written and the bytes in all.

    Raises:
        ConfigError: a model, tokenizer or quantization that is not read (all reasons are listed); `output` is there.
        CheckpointError: keys or tensors are missing, surplus or damaged.
        StorageError: the disk is full or refuses.
    """
    config = config_from_gguf(file)
    weights = stored_weights(config)
    _require_weights(file, weights)
    tokenizer = tokenizer_from_gguf(file.metadata, str(file.path))
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{file.path}: {tokenizer.vocab_size} tokens, and embeddings for {config.vocab_size}; download it again"
        )
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.end_ids}
    with new_folder(output) as folder:
        tokenizer.save(folder)
        _write_json(folder / "config.json", config_to_hf(config, **ids, dtype=str(dtype).removeprefix("torch.")))
        _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
        tensors = (_read_weight(file, weight, dtype) for weight in weights)
        _write_safetensors(folder / WEIGHTS_FILE, weights, tensors, dtype, progress)
    counts: Counter[str] = Counter()
    for weight in weights:
        counts[file.tensors[weight.stored].tensor_type.name] += math.prod(weight.shape)
    return Imported(config, counts.total(), dict(counts.most_common()))


def config_from_gguf(file: GGUFFile) -> DecoderConfig:
    """The decoder that a GGUF file describes.

    Raises:
        ConfigError: an architecture, or a feature of one, that the decoder has not.
        CheckpointError: keys are missing.
    """
    arch = file.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ConfigError(
            f"{file.path}: general.architecture {arch!r}: supported are {', '.join(ARCHITECTURES)} "
            "(Mistral and SmolLM call themselves llama)"
        )
    required = GPT2_KEYS if arch == "gpt2" else LLAMA_KEYS
    missing = [f"{arch}.{key}" for key in required if f"{arch}.{key}" not in file.metadata]
    missing += ["token_embd.weight"] if "token_embd.weight" not in file.tensors else []
    if missing:
        raise CheckpointError(f"{file.path}: no {', '.join(missing)}; take another GGUF of this model")
    raw: dict[str, Any] = {
        "model_type": arch,
        "vocab_size": _shape(file.tensors["token_embd.weight"])[0],
        "tie_word_embeddings": _is_tied(file),
    }
    for key, theirs in (required if arch == "gpt2" else required | LLAMA_OPTIONAL_KEYS).items():
        if (value := file.metadata.get(f"{arch}.{key}")) is not None:
            # A float32 there: 1e-5 is kept as 9.9999997e-06, and its shortest decimal is the author's number.
            raw[theirs] = _shortest(value) if isinstance(value, float) else value
    problems = [] if arch == "gpt2" else _add_llama_keys(raw, file, arch)
    try:
        config = _scaled(config_from_hf(raw), file)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError([f"{file.path}: {problem}" for problem in problems])
    return config


def _add_llama_keys(raw: dict[str, Any], file: GGUFFile, arch: str) -> list[str]:
    """What follows from several keys or from the tensors that are there; gives back what is not supported."""

    def value(key: str) -> Any:
        return file.metadata.get(f"{arch}.{key}")

    problems = []
    if value("expert_count"):
        problems.append(f"{arch}.expert_count {value('expert_count')}: mixtures of experts are not supported")
    window = value("attention.sliding_window")
    if window and window != raw["max_position_embeddings"]:
        problems.append(f"{arch}.attention.sliding_window {window}: attention that does not see all is not supported")
    if (scaling := value("rope.scaling.type") or "none") != "none":
        raw["rope_scaling"] = {"rope_type": scaling}
    if arch == "llama":
        raw["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        raw["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    if "head_dim" not in raw and isinstance(heads, int) and isinstance(width, int) and heads > 0:
        raw["head_dim"] = width // heads
    turned = value("rope.dimension_count")
    if turned is not None and turned != raw.get("head_dim"):
        problems.append(f"{arch}.rope.dimension_count {turned}: supported is the whole head, {raw.get('head_dim')}")
    return problems


def _scaled(config: DecoderConfig, file: GGUFFile) -> DecoderConfig:
    """With the scaling of positions that Llama 3's files keep as the divisors it comes to, pair by pair."""
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None or (tensor.data == 1).all():
        return config
    scaled = replace(config, rope_scaling=replace(_LLAMA3_SCALING, factor=float(tensor.data.max())))
    expected = (tokens_a_radian(scaled) / tokens_a_radian(config)).numpy()
    if expected.shape != tensor.data.shape or not abs(expected / tensor.data - 1).max() <= 1e-3:
        raise ConfigError(f"{ROPE_FACTORS}: supported is the scaling of positions of Llama 3.1 and 3.2")
    return scaled


def _is_tied(file: GGUFFile) -> bool:
    """True without a head of its own; files of GPT-2 may repeat the embedding as one."""
    head, embedding = file.tensors.get("output.weight"), file.tensors["token_embd.weight"]
    if head is None:
        return True
    return bool(head.tensor_type == embedding.tensor_type and (head.data == embedding.data).all())


def _require_weights(file: GGUFFile, weights: list[StoredWeight]) -> None:
    """Name every tensor that is missing, surplus or of the wrong shape, and every type that cannot be read."""
    problems = []
    for weight in weights:
        tensor = file.tensors.get(weight.stored)
        if tensor is None:
            problems.append(f"{weight.stored} is missing")
        elif _shape(tensor) != weight.shape:
            problems.append(f"{weight.stored} has shape {list(_shape(tensor))}, expected {list(weight.shape)}")
    known = {weight.stored for weight in weights} | {"output.weight", ROPE_FACTORS}
    problems += [f"{name} is not a weight of this model" for name in file.tensors if name not in known]
    if problems:
        raise CheckpointError(
            f"{file.path}: the tensors do not fit its metadata; take another GGUF of this model\n  "
            + "\n  ".join(problems)
        )
    types = {file.tensors[weight.stored].tensor_type for weight in weights}
    if unreadable := sorted(kind.name for kind in types if not _can_dequantize(kind)):
        raise ConfigError(
            f"{file.path}: quantization {', '.join(unreadable)} is not read; take another file of this model, "
            "such as Q8_0 or F16"
        )


def _can_dequantize(kind: Any) -> bool:
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    _, num_bytes = GGML_QUANT_SIZES[kind]
    try:
        dequantize(np.zeros((1, num_bytes), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _read_weight(file: GGUFFile, weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    """One tensor as the folder holds it."""
    import numpy as np
    from gguf.quants import dequantize

    stored = file.tensors[weight.stored]
    values = np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32)
    tensor = torch.from_numpy(values).reshape(weight.shape)  # (out, in) or (out,)
    if weight.num_heads is not None:
        tensor = _as_halves(tensor, weight.num_heads)
    if weight.transposed:
        tensor = tensor.T  # (in, out)
    return as_type(tensor, dtype, f"{file.path}: {weight.stored}", "download it again")


def _as_halves(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from llama.cpp's order to Hugging Face's, (out, ...) to the same.

    Rotary positions turn the rows (2i, 2i + 1) together there, and (i, i + E/2) here, for heads of E rows.
    """
    pairs = tensor.view(num_heads, -1, 2, *tensor.shape[1:])  # (H, E/2, 2, ...)
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _write_safetensors(
    path: Path, weights: list[StoredWeight], tensors: Iterator[Tensor], dtype: torch.dtype, progress: Progress
) -> None:
    """A safetensors file tensor by tensor: length of the header, header, data (the library wants them all at once).

    Format: https://github.com/huggingface/safetensors#format.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for weight in weights:
        start, total = total, total + math.prod(weight.shape) * dtype.itemsize
        header[weight.theirs] = {
            "dtype": _SAFETENSORS_TYPES[dtype],
            "shape": list(weight.folder_shape),
            "data_offsets": [start, total],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        done = 0
        for tensor in tensors:
            done += stream.write(tensor.flatten().view(torch.uint8).numpy().data)
            progress(done, total)


def _shape(tensor: Any) -> tuple[int, ...]:
    """Rows first; GGUF counts the other way round."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _shortest(value: float) -> float:
    import numpy as np

    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
