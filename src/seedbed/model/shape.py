"""The shape of a new model, from the options of a run. Needs no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from seedbed.config import Config, DataOptions, ModelOptions
from seedbed.errors import ConfigError
from seedbed.model.config import DecoderConfig, from_scratch
from seedbed.model.families import read_config
from seedbed.runs.info import is_run

ASSUMED_VOCAB: Final = 8000
"""Of a tokenizer that is not trained yet; no other size contradicts it."""


def contradictions(config: Config) -> list[str]:
    """What contradicts itself in the sizes of a new model, where they are known without a look into another folder."""
    output = config.watching.output
    goes_on = config.watching.resume_from or (output and is_run(Path(output)))  # with the sizes that it has
    if config.regime == "scratch" and config.model.arch and not goes_on:
        try:
            decoder_config(config.model, config.data, config.data.vocab_size or ASSUMED_VOCAB)
        except ConfigError as error:
            return error.problems
    return []


def decoder_config(model: ModelOptions, data: DataOptions, vocab_size: int) -> DecoderConfig:
    """The shape of the decoder that the options describe; a folder's `config.json` may stand for them.

    Raises:
        ConfigError: sizes that contradict each other, or a context above the positions of the folder's model.
    """
    if model.arch is None:
        return _from_folder(model, data, vocab_size)
    missing = [name for name in ("d_model", "num_layers", "num_heads") if getattr(model, name) is None]
    if missing:
        raise ConfigError([f"--{name} is missing and --model {model.model} does not give it" for name in missing])
    assert model.d_model and model.num_layers and model.num_heads
    return from_scratch(
        model.arch,
        vocab_size=vocab_size,
        d_model=model.d_model,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        d_ff=model.d_ff,
        max_seq_len=data.max_seq_len,
        dropout=model.dropout or 0.0,
        tie_embeddings=model.tie_embeddings is not False,
    )


def _from_folder(model: ModelOptions, data: DataOptions, vocab_size: int) -> DecoderConfig:
    shape = read_config(Path(model.model))
    if data.max_seq_len > shape.max_seq_len:
        raise ConfigError(
            f"--max_seq_len {data.max_seq_len} is above the {shape.max_seq_len} positions of {model.model}; lower it"
        )
    given = model.model_dump(exclude={"model", "arch"}, exclude_none=True)
    if "d_model" in given or "num_heads" in given:
        given["head_dim"] = given.get("d_model", shape.d_model) // given.get("num_heads", shape.num_heads)
    return replace(shape, vocab_size=vocab_size, **{"dropout": 0.0, **given})
