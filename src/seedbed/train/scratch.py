"""What training from scratch begins with: a tokenizer of its own text, and weights drawn with the seed."""

from __future__ import annotations

from pathlib import Path

import torch

from seedbed import distributed
from seedbed.checkpoint import require_match
from seedbed.config import Config
from seedbed.errors import ConfigError
from seedbed.model.config import DecoderConfig
from seedbed.model.decoder import Decoder, num_parameters
from seedbed.model.families import read_config
from seedbed.model.shape import ASSUMED_VOCAB, decoder_config
from seedbed.model.weights import load_decoder
from seedbed.optim import compiler_beside
from seedbed.text.tokenizer import Tokenizer
from seedbed.train.announce import banner
from seedbed.train.corpus import make_tokenizer, open_training_texts, tokenize
from seedbed.train.ingredients import Ingredients, Prepared, reading_of, require_room, saved_tokenizer
from seedbed.train.progress import Display
from seedbed.train.resume import Start


def from_random_weights(start: Start, config: Config, display: Display) -> Ingredients:
    """Rows in tokens of their own, and fresh weights or those of the checkpoint."""
    prepared = prepare_scratch(config, display, start)
    shape = prepared.shape
    parameters = num_parameters(shape)
    require_room(start.run.path, parameters, parameters, adapter=False)
    with compiler_beside():
        model = initial_model(shape, start.checkpoint, prepared.tokenizer, config.training.seed)
    return Ingredients(prepared, model, prepared.corpus.rows)


def prepare_scratch(config: Config, display: Display, start: Start | None = None) -> Prepared:
    """Texts, tokenizer and rows as the options have them; of a run that starts, the banner is shown.

    Raises:
        ConfigError, DataError: what is wrong with the options or the text.
    """
    data = config.data
    wanted = decoder_config(config.model, data, data.vocab_size or ASSUMED_VOCAB)  # contradictions first
    if start is not None and start.checkpoint is not None:
        require_positions(start.checkpoint, wanted.max_seq_len)
    texts = open_training_texts(data)
    if start is not None:
        banner(display, config, texts, start.run.path)
    tokenizer = saved_tokenizer(start) or make_tokenizer(data, texts, display)
    reading = reading_of(config, texts, tokenizer)
    corpus = tokenize(texts, reading, data, config.training, display)
    shape = decoder_config(config.model, data, reading.tokenizer.vocab_size)
    return Prepared(with_shape(config, shape), shape, texts, tokenizer, reading, corpus)


def require_positions(checkpoint: Path, wanted: int) -> None:
    """Raise ConfigError where the checkpoint has learnt positions, and another number of them."""
    saved = read_config(checkpoint)
    if saved.position == "learned" and saved.max_seq_len != wanted:
        shorter = f"; for shorter rows: seedbed finetune --model {checkpoint} --max_seq_len {wanted}"
        raise ConfigError(
            f"--max_seq_len {wanted}: {checkpoint} has learnt {saved.max_seq_len} positions, which stay as many; "
            f"leave it out{shorter if wanted < saved.max_seq_len else ''}"
        )


def with_shape(config: Config, shape: DecoderConfig) -> Config:
    """The config with the sizes that were worked out written into it."""
    return config.update(
        f"model {config.model.model}",
        **{
            name: value
            for name, value in {
                "num_kv_heads": shape.num_kv_heads,
                "d_ff": shape.d_ff,
                "dropout": shape.dropout,
                "tie_embeddings": shape.tie_embeddings,
            }.items()
            if getattr(config.model, name) is None
        },
    )


def initial_model(shape: DecoderConfig, checkpoint: Path | None, tokenizer: Tokenizer, seed: int) -> Decoder:
    """Fresh weights drawn with the seed, or those of the checkpoint."""
    if checkpoint is None:
        torch.manual_seed(seed)
        with torch.device("meta" if distributed.without_weights() else "cpu"):
            return Decoder(shape)
    saved = load_decoder(checkpoint)
    require_match(saved.config, tokenizer, str(checkpoint))
    with torch.device("meta"):  # nothing is drawn that is thrown away
        model = Decoder(shape)
    model.load_state_dict(saved.state_dict(), assign=True)
    return model
