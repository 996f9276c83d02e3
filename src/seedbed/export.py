"""An adapter merged into its base: a plain model folder, checked before it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from seedbed.checkpoint import find_model, load_model
from seedbed.errors import CheckpointError, ConfigError
from seedbed.lora import merge_adapter
from seedbed.model.decoder import Decoder
from seedbed.model.hub import new_folder, require_new
from seedbed.model.weights import load_decoder, save_decoder
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
        difference = _difference(_logits(load_decoder(temporary), sequences), expected)
        if not difference <= TOLERANCE:  # also when it is not a number
            raise CheckpointError(
                f"{output}: not written: the merged model's logits differ from the adapter's by {difference:.2e} of "
                f"the largest, and {TOLERANCE:.0e} is allowed; look for weights that are not finite or very large"
            )
    return {
        "output": str(output),
        "base": decoder.base.path,
        "parameters": sum(parameter.numel() for parameter in decoder.parameters()),
        "max_difference": difference,
        "tolerance": TOLERANCE,
    }


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


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    scale = max(float(logits.abs().max()) for logits in expected)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / scale
