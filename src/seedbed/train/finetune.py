"""What fine-tuning begins with: pretrained weights and their tokenizer, some of them frozen, perhaps with adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from seedbed import distributed
from seedbed.adapter import load_adapter
from seedbed.checkpoint import find_base, find_model, load_model, require_match, tokenizer_folder
from seedbed.config import AdaptOptions, Config, preset_names, read_preset
from seedbed.errors import ConfigError
from seedbed.freeze import freeze
from seedbed.lora import add_adapter, find_targets, merge_adapter
from seedbed.model.adjust import grow_vocabulary, set_dropout
from seedbed.model.config import DecoderConfig, from_scratch
from seedbed.model.decoder import Adapter, Base, Decoder, num_parameters
from seedbed.model.families import read_config
from seedbed.model.hub import find_pretrained
from seedbed.model.weights import load_decoder, weights_fingerprint
from seedbed.optim import compiler_beside
from seedbed.text.template import Template
from seedbed.text.tokenizer import Tokenizer
from seedbed.train.announce import banner
from seedbed.train.corpus import Corpus, Texts, open_training_texts, require_a_row, tokenize
from seedbed.train.ingredients import Ingredients, reading_of, require_room, saved_tokenizer, template_for
from seedbed.train.progress import Display
from seedbed.train.resume import Start


@dataclass(frozen=True)
class Prepared:
    """All of a fine-tuning run that needs no weights."""

    config: Config
    shape: DecoderConfig
    adapter: Adapter | None
    texts: Texts
    known: Tokenizer
    """The tokenizer as the model came with it."""
    tokenizer: Tokenizer
    """With new tokens and the template."""
    template: Template | None
    corpus: Corpus


def from_pretrained_weights(start: Start, config: Config, display: Display) -> Ingredients:
    """Texts and rows in the model's own tokens; its weights, frozen where asked, or those of the checkpoint."""
    folder = base_folder(config.model.model)
    made = prepare(config, folder, display, saved_tokenizer(start), start.run.path)
    model = load_prepared(start, made, folder, display)
    return Ingredients(made.config, made.texts, made.tokenizer, made.template, made.corpus, model, made.corpus.rows)


def load_prepared(start: Start, made: Prepared, folder: Path, display: Display) -> Decoder:
    """The model of `folder` as it is prepared for the run, or that of the checkpoint to go on from."""
    with display.working(f"Loading {made.config.model.model}"), compiler_beside():
        model = _adapted_model(start, made, folder) if made.adapter else _whole_model(start, made, folder)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    require_room(start.run.path, num_parameters(model.config), trained, adapter=made.adapter is not None)
    return model


def prepare(config: Config, folder: Path, display: Display, saved: Tokenizer | None, run: Path | None) -> Prepared:
    """Read the texts as the model in `folder` will see them; with a run, its banner is shown."""
    shape = base_shape(folder)
    config = fit_context(config, shape)
    data, adapt = config.data, config.adapt
    adapter = make_adapter(shape, adapt) if config.with_lora else None
    texts = open_training_texts(data)
    require_a_row(texts, data.max_seq_len)
    if run is not None:
        banner(display, config, texts, run)
    known = Tokenizer.load(data.tokenizer or tokenizer_folder(folder))
    if (folder / "config.json").is_file():  # an adapter may have brought tokens of its own to its base
        require_match(shape, known, config.model.model)
    template = template_for(config, texts, saved or known)
    if adapter and not adapter.train_embeddings and template and template.new_tokens:
        raise ConfigError(
            f"--chat_template {template.name} adds {', '.join(template.new_tokens)} to the vocabulary, and new tokens "
            "learn nothing while the embeddings are frozen; add --lora_embeddings, or choose --chat_template alpaca"
        )
    reading = reading_of(config, texts, saved or known, adapt.add_tokens)
    corpus = tokenize(texts, reading, data, config.training, display)
    return Prepared(config, shape, adapter, texts, known, reading.tokenizer, reading.template, corpus)


def base_folder(name: str) -> Path:
    """The folder of the pretrained model that `--model` means: a folder, a run's best checkpoint, a hub id."""
    if Path(name).is_dir():
        return find_model(name)
    if name in preset_names() and "gpt2" not in name:  # those names are the hub's, too
        raise ConfigError(f"--model {name} is a preset for pretrain; name a model folder, a run or a hub id")
    return find_pretrained(name)


def base_shape(folder: Path) -> DecoderConfig:
    """The decoder in a model folder, or beneath the adapter in one."""
    if (folder / "config.json").is_file():
        return read_config(folder)
    return read_config(find_base(folder))


def planned_shape(name: str) -> DecoderConfig:
    """The decoder that `--model` means, without its weights: a preset's name is enough."""
    if name not in preset_names() or Path(name).exists():
        return base_shape(base_folder(name))
    values = read_preset(name)
    if "arch" not in values:
        raise ConfigError(f"--model {name} is a preset without a shape; give it with --config, and a --model beside it")
    sizes = ("d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff", "max_seq_len")
    known = {key: values[key] for key in sizes if key in values}
    return from_scratch(values["arch"], vocab_size=values.get("vocab_size", 50257), **known)


def fit_context(config: Config, shape: DecoderConfig) -> Config:
    """The config with a context that the model has.

    Raises:
        ConfigError: the context that was asked for is longer.
    """
    if config.data.max_seq_len <= shape.max_seq_len:
        return config
    if config.is_given("max_seq_len"):
        raise ConfigError(
            f"--max_seq_len {config.data.max_seq_len} is above the {shape.max_seq_len} positions of "
            f"{config.model.model}; lower it"
        )
    return config.update(f"model {config.model.model}", max_seq_len=shape.max_seq_len)


def make_adapter(shape: DecoderConfig, options: AdaptOptions) -> Adapter:
    """The adapters that the options describe, for a model of this shape."""
    return Adapter(
        r=options.lora_r,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        rslora=options.lora_rslora,
        dora=options.lora_dora,
        modules=find_targets(shape, options.lora_targets, options.last_blocks),
        train_embeddings=options.lora_embeddings,
    )


def _whole_model(start: Start, made: Prepared, folder: Path) -> Decoder:
    if start.checkpoint is not None:
        model = load_decoder(start.checkpoint)
    else:
        model, _ = load_model(folder)
        if model.adapter is not None:
            merge_adapter(model)
        require_match(model.config, made.known, made.config.model.model)
        grow_vocabulary(model, made.known.vocab_size, made.tokenizer.vocab_size)
    model.requires_grad_(True)
    _fit(model, made)
    freeze(model, made.config.adapt.freeze, made.config.adapt.last_blocks)
    if made.tokenizer.vocab_size > made.known.vocab_size and not model.embed_tokens.weight.requires_grad:
        raise ConfigError(
            "new tokens learn nothing while the embeddings are frozen; leave --last_blocks and --freeze embeddings "
            "out, or add no tokens (--chat_template alpaca needs none)"
        )
    return model


def _adapted_model(start: Start, made: Prepared, folder: Path) -> Decoder:
    assert made.adapter is not None
    name = made.config.model.model
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model {name} is an adapter, and an adapter on an adapter cannot be kept; merge it first: "
            f"seedbed export --model {name} --merge --output FOLDER"
        )
    model, _ = load_model(folder)
    fingerprint = distributed.on_first(lambda: weights_fingerprint(folder))
    model.base = Base(str(folder.resolve()) if Path(name).exists() else name, fingerprint)
    grow_vocabulary(model, made.known.vocab_size, made.tokenizer.vocab_size)
    _fit(model, made)
    if start.checkpoint is not None:
        load_adapter(model, start.checkpoint)
    else:
        torch.manual_seed(made.config.training.seed)
        add_adapter(model, made.adapter)
    return model


def _fit(model: Decoder, made: Prepared) -> None:
    require_match(model.config, made.tokenizer, made.config.model.model)
    if made.config.model.dropout is not None:
        set_dropout(model, made.config.model.dropout)


def hold_frozen(model: Decoder, config: Config, device: torch.device) -> None:
    """Keep the frozen matrices of the blocks in the type they are multiplied in; or in 4 bits, then on `device`."""
    kind = config.adapt.base_precision
    if kind == "auto":
        kind = "bf16" if config.training.precision == "bf16" else "fp32"
    if kind == "nf4":
        from seedbed.lowbit import quantize_frozen

        quantize_frozen(model, device)
    elif kind == "bf16":
        if config.training.precision != "bf16":
            raise ConfigError(
                f"--base_precision bf16 needs --precision bf16, and this run has {config.training.precision}; "
                "leave it out, or give both"
            )
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.weight.data = module.weight.data.bfloat16()
