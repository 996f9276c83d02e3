"""What fine-tuning begins with: pretrained weights and their tokenizer, some of them frozen, perhaps with adapters."""

from __future__ import annotations

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
from seedbed.train.corpus import open_training_texts, tokenize
from seedbed.train.ingredients import Ingredients, Prepared, reading_of, require_room, saved_tokenizer, template_for
from seedbed.train.progress import Display
from seedbed.train.resume import Start


def from_pretrained_weights(start: Start, config: Config, display: Display) -> Ingredients:
    """Texts and rows in the model's own tokens; its weights, frozen where asked, or those of the checkpoint."""
    folder = base_folder(config.model.model)
    prepared = prepare_finetune(config, folder, display, start)
    return Ingredients(prepared, load_prepared(start, prepared, folder, display), prepared.corpus.rows)


def load_prepared(start: Start, prepared: Prepared, folder: Path, display: Display) -> Decoder:
    """The model of `folder` as it is prepared for the run, or that of the checkpoint to go on from."""
    load = _adapted_model if prepared.adapter else _whole_model
    with display.working(f"Loading {prepared.config.model.model}"), compiler_beside():
        model = load(start, prepared, folder)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    require_room(start.run.path, num_parameters(model.config), trained, adapter=prepared.adapter is not None)
    return model


def prepare_finetune(config: Config, folder: Path, display: Display, start: Start | None = None) -> Prepared:
    """Texts and rows as the model in `folder` will see them; of a run that starts, the banner is shown.

    Raises:
        ConfigError, DataError: what is wrong with the options, the text or the model.
    """
    shape = base_shape(folder)
    config = fit_context(config, shape)
    data = config.data
    adapter = make_adapter(shape, config.adapt) if config.with_lora else None
    texts = open_training_texts(data)
    if start is not None:
        banner(display, config, texts, start.run.path)
    known = Tokenizer.load(data.tokenizer or tokenizer_folder(folder))
    if (folder / "config.json").is_file():  # an adapter may have brought tokens of its own to its base
        require_match(shape, known, config.model.model)
    tokenizer = saved_tokenizer(start) or known
    if adapter:
        _require_trained_tokens(adapter, template_for(config, texts, tokenizer))
    reading = reading_of(config, texts, tokenizer)
    corpus = tokenize(texts, reading, data, config.training, display)
    return Prepared(config, shape, texts, known, reading, corpus, adapter)


def _require_trained_tokens(adapter: Adapter, template: Template | None) -> None:
    if not adapter.train_embeddings and template and template.new_tokens:
        raise ConfigError(
            f"--chat_template {template.name} adds {', '.join(template.new_tokens)} to the vocabulary, and new tokens "
            "learn nothing while the embeddings are frozen; add --lora_embeddings, or choose --chat_template alpaca"
        )


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


def _whole_model(start: Start, prepared: Prepared, folder: Path) -> Decoder:
    adapt, known, wanted = prepared.config.adapt, prepared.base_tokenizer.vocab_size, prepared.tokenizer.vocab_size
    if start.checkpoint is not None:
        model = load_decoder(start.checkpoint)
    else:
        model, _ = load_model(folder)
        if model.adapter is not None:
            merge_adapter(model)
        require_match(model.config, prepared.base_tokenizer, prepared.config.model.model)
        grow_vocabulary(model, known, wanted)
    model.requires_grad_(True)
    _fit(model, prepared)
    freeze(model, adapt.freeze, adapt.last_blocks)
    if wanted > known and not model.embed_tokens.weight.requires_grad:
        raise ConfigError(
            "new tokens learn nothing while the embeddings are frozen; leave --last_blocks and --freeze embeddings "
            "out, or add no tokens (--chat_template alpaca needs none)"
        )
    return model


def _adapted_model(start: Start, prepared: Prepared, folder: Path) -> Decoder:
    assert prepared.adapter is not None
    name = prepared.config.model.model
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model {name} is an adapter, and an adapter on an adapter cannot be kept; merge it first: "
            f"seedbed export --model {name} --merge --output FOLDER"
        )
    model, _ = load_model(folder)
    fingerprint = distributed.on_first(lambda: weights_fingerprint(folder))
    model.base = Base(str(folder.resolve()) if Path(name).exists() else name, fingerprint)
    grow_vocabulary(model, prepared.base_tokenizer.vocab_size, prepared.tokenizer.vocab_size)
    _fit(model, prepared)
    if start.checkpoint is not None:
        load_adapter(model, start.checkpoint)
    else:
        torch.manual_seed(prepared.config.training.seed)
        add_adapter(model, prepared.adapter)
    return model


def _fit(model: Decoder, prepared: Prepared) -> None:
    require_match(model.config, prepared.tokenizer, prepared.config.model.model)
    if prepared.config.model.dropout is not None:
        set_dropout(model, prepared.config.model.dropout)


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
