"""What training from scratch begins with: a tokenizer of its own text, and weights drawn with the seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from seedbed import distributed
from seedbed.checkpoint import require_match
from seedbed.config import Config
from seedbed.model.config import DecoderConfig
from seedbed.model.decoder import Decoder, num_parameters
from seedbed.model.shape import ASSUMED_VOCAB, decoder_config
from seedbed.model.weights import load_decoder
from seedbed.optim import compiler_beside
from seedbed.text.template import Template
from seedbed.text.tokenizer import Tokenizer
from seedbed.train.announce import banner
from seedbed.train.corpus import Corpus, Texts, make_tokenizer, open_training_texts, require_a_row, tokenize
from seedbed.train.ingredients import Ingredients, reading_of, require_room, saved_tokenizer
from seedbed.train.progress import Display
from seedbed.train.resume import Start


def from_random_weights(start: Start, config: Config, display: Display) -> Ingredients:
    """Texts, tokenizer and rows as the options have them, and fresh weights or those of the checkpoint."""
    data = config.data
    decoder_config(config.model, data, data.vocab_size or ASSUMED_VOCAB)  # contradictions first
    own = read_own_texts(config, display, saved_tokenizer(start), start.run.path)
    shape = decoder_config(config.model, data, own.tokenizer.vocab_size)
    parameters = num_parameters(shape)
    require_room(start.run.path, parameters, parameters, adapter=False)
    with compiler_beside():
        model = initial_model(shape, start.checkpoint, own.tokenizer, config.training.seed)
    return Ingredients(
        with_shape(config, shape), own.texts, own.tokenizer, own.template, own.corpus, model, own.corpus.rows
    )


@dataclass(frozen=True)
class OwnTexts:
    """All of a run from scratch that needs no weights."""

    texts: Texts
    tokenizer: Tokenizer
    template: Template | None
    corpus: Corpus


def read_own_texts(config: Config, display: Display, saved: Tokenizer | None, run: Path | None) -> OwnTexts:
    """Texts, tokenizer and rows as the options have them; with a run, its banner is shown.

    Raises:
        ConfigError, DataError: what is wrong with the options or the text.
    """
    data = config.data
    texts = open_training_texts(data)
    require_a_row(texts, data.max_seq_len)
    if run is not None:
        banner(display, config, texts, run)
    tokenizer = saved or make_tokenizer(data, texts, display)
    reading = reading_of(config, texts, tokenizer)
    corpus = tokenize(texts, reading, data, config.training, display)
    return OwnTexts(texts, reading.tokenizer, reading.template, corpus)


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
