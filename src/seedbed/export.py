"""Models for other programs: an adapter merged into its base, checked before it gets its name; GGUF files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from seedbed.adapter import CONFIG_FILE as ADAPTER_FILE
from seedbed.checkpoint import find_model, load_model, require_intact, require_match, tokenizer_folder
from seedbed.errors import CheckpointError, ConfigError
from seedbed.lora import merge_adapter
from seedbed.model.config import DecoderConfig
from seedbed.model.decoder import Decoder, num_parameters
from seedbed.model.families import read_config
from seedbed.model.gguf_export import export_gguf
from seedbed.model.gguf_names import require_gguf
from seedbed.model.hub import Progress, new_folder, require_new, require_new_file
from seedbed.model.weights import Reader, load_decoder, open_weights, save_decoder, tensors_by_name
from seedbed.text.tokenizer import Tokenizer

TOLERANCE: Final = 1e-4  # largest difference of a logit, of the largest logit
_TOKENS: Final = 64  # of a sequence that is compared
_TEXTS: Final = (
    "The quick brown fox jumps over the lazy dog. Then it sleeps until the sun is low.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5\n",
)


def export_merged(model: str | Path, output: Path) -> dict[str, Any]:
    """Merge an adapter into its base in float32 and write the model, with its tokenizer and chat template.

    What was written is read back and must give the logits of base and adapter, or nothing is left at `output`.

    Args:
        model: an adapter's folder, or a run that trained one.
        output: a new or empty folder.

    Returns:
        output, base, parameters, and the largest difference of the logits (`max_difference`), which is relative
        to their largest, beside its `tolerance`.

    Raises:
        ConfigError: `output` is in the way, or `model` has no adapter.
        CheckpointError: a folder is damaged, the base is another one, or the logits differ.
        StorageError: the disk is full or refuses.
    """
    require_new(output)  # said before minutes of work, not after
    decoder, tokenizer = load_model(model)
    if decoder.adapter is None:
        raise ConfigError(f"--model {find_model(model)}: it has no adapter to merge; it is a whole model as it is")
    assert decoder.base is not None
    sequences = _sequences(decoder, tokenizer)
    expected = _logits(decoder, sequences)
    merge_adapter(decoder)
    with new_folder(output) as temporary:
        save_decoder(decoder, temporary, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.end_ids)
        tokenizer.save(temporary)
        difference = _require_close(_logits(load_decoder(temporary), sequences), expected, output)
    return {
        "output": str(output),
        "base": decoder.base.path,
        "parameters": sum(parameter.numel() for parameter in decoder.parameters()),
        "max_difference": difference,
        "tolerance": TOLERANCE,
    }


def export_model_as_gguf(
    model: str | Path,
    output: Path,
    dtype: torch.dtype = torch.float16,
    progress: Progress = lambda _done, _total: None,
) -> dict[str, Any]:
    """Write a model, with its tokenizer and chat template, as a GGUF file; an adapter is merged into its base.

    Args:
        model: a model folder, a run, or an adapter's folder.
        output: a file that is not there yet.
        dtype: of the matrices: float32, float16 or bfloat16.
        progress: called with the bytes written and the bytes in all.

    Returns:
        output, parameters, family, dtype, and the file's size in bytes.

    Raises:
        MissingExtra: without the extra `gguf`.
        ConfigError: `output` is in the way, or GGUF has no keys for the model or its tokenizer.
        CheckpointError: a folder is damaged, or holds numbers that `dtype` cannot.
        StorageError: the disk is full or refuses.
    """
    require_gguf()
    require_new_file(output)
    folder = find_model(model)
    is_adapter = (folder / ADAPTER_FILE).is_file()
    config, weights, tokenizer = _merged(folder, output) if is_adapter else _whole(folder)
    try:
        export_gguf(output, config, weights, tokenizer, Path(model).absolute().name, dtype, progress)
    except ConfigError as error:
        raise ConfigError([f"{folder}: {problem}" for problem in error.problems]) from None
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return {
        "output": str(output),
        "parameters": num_parameters(config),
        "family": config.family,
        "dtype": str(dtype).removeprefix("torch."),
        "size": output.stat().st_size,
    }


def _whole(folder: Path) -> tuple[DecoderConfig, dict[str, Reader], Tokenizer]:
    """A model whose weights stay on the disk until they are used."""
    require_intact(folder)
    config, tokenizer = read_config(folder), Tokenizer.load(tokenizer_folder(folder))
    require_match(config, tokenizer, str(folder))
    return config, open_weights(folder, config), tokenizer


def _merged(folder: Path, output: Path) -> tuple[DecoderConfig, dict[str, Reader], Tokenizer]:
    """An adapter merged into its base in float32, which must give the logits of both."""
    decoder, tokenizer = load_model(folder)
    sequences = _sequences(decoder, tokenizer)
    expected = _logits(decoder, sequences)
    merge_adapter(decoder)
    _require_close(_logits(decoder, sequences), expected, output)
    readers: dict[str, Reader] = {name: partial(_itself, tensor) for name, tensor in tensors_by_name(decoder).items()}
    return decoder.config, readers, tokenizer


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _sequences(model: Decoder, tokenizer: Tokenizer) -> list[Tensor]:
    """Token ids, each (1, T): of real texts, and drawn from the whole vocabulary."""
    length = min(_TOKENS, model.config.max_seq_len)
    draw = torch.Generator().manual_seed(0)
    random = [torch.randint(model.config.vocab_size, (1, length), generator=draw) for _ in range(2)]
    return [torch.tensor([tokenizer.encode(text)[:length]]) for text in _TEXTS] + random


@torch.no_grad()
def _logits(model: Decoder, sequences: list[Tensor]) -> list[Tensor]:
    """(1, T, V) for each (1, T)."""
    return [model.logits(model(ids)) for ids in sequences]


def _require_close(found: list[Tensor], expected: list[Tensor], output: Path) -> float:
    """The difference of the logits, which must not be larger than is allowed."""
    difference = _difference(found, expected)
    if not difference <= TOLERANCE:  # also when it is not a number
        raise CheckpointError(
            f"{output}: not written: the merged model's logits differ from the adapter's by {difference:.2e} of "
            f"the largest, and {TOLERANCE:.0e} is allowed; look for weights that are not finite or very large"
        )
    return difference


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    scale = max(float(logits.abs().max()) for logits in expected)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / scale
