"""From a config to a job: the only place that knows how training from scratch is set up."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from seedbed.checkpoint import read_optimizer, read_state, require_match, require_space
from seedbed.config import Config, DataOptions, ModelOptions, TrainingOptions
from seedbed.device import pick_device, pick_precision
from seedbed.errors import ConfigError
from seedbed.model.config import DecoderConfig, from_scratch
from seedbed.model.decoder import Decoder, num_parameters
from seedbed.model.weights import load_decoder, read_config
from seedbed.optim import build_optimizer, load_optimizer_tensors
from seedbed.schedule import Schedule
from seedbed.text.tokenizer import Tokenizer
from seedbed.train.announce import banner, describe_corpus, describe_model, describe_schedule
from seedbed.train.board import Board
from seedbed.train.corpus import keep_tokenizer, make_tokenizer, open_texts, require_a_row, tokenize
from seedbed.train.job import Job
from seedbed.train.progress import Display
from seedbed.train.resume import Start
from seedbed.train.state import TrainingState

BYTES_PER_PARAMETER_SAVED = 12  # the weight and AdamW's two moments, in float32
ASSUMED_VOCAB = 8000


def build_pretraining(start: Start, display: Display) -> Job:
    """Everything from the text to the optimizer, checked before the first step; prints the banner.

    Raises:
        ConfigError, DataError, CheckpointError, StorageError: what is wrong, before any training.
    """
    run, checkpoint = start.run, start.checkpoint
    device = pick_device(start.config.training.device)
    precision = pick_precision(start.config.training.precision, device)
    config = start.config.update("this machine", precision=precision)
    training, watching = config.training, config.watching
    decoder_config(config.model, config.data, config.data.vocab_size or ASSUMED_VOCAB)  # contradictions first
    texts = open_texts(config.data)
    require_a_row(texts, config.data.max_seq_len)
    banner(display, config, texts, device, run.path)

    tokenizer = saved_tokenizer(start) or make_tokenizer(config.data, texts, display)
    corpus = tokenize(texts, tokenizer, config.data, training.seed, display)
    shape = decoder_config(config.model, config.data, tokenizer.vocab_size)
    require_space(run.path, BYTES_PER_PARAMETER_SAVED * num_parameters(shape))
    check_prompt(watching.sample_prompt, tokenizer, shape)

    model = initial_model(shape, checkpoint, tokenizer, training).to(device)
    forward = compiled(model) if training.compile else model
    optimizer = build_optimizer(model, training)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    state = restore(checkpoint, model, optimizer, scaler)
    epochs, total_steps = length(config, len(corpus.rows))
    schedule = make_schedule(training, total_steps)
    describe_corpus(display, corpus, texts)
    describe_model(display, shape)
    describe_schedule(display, schedule)

    run.truncate(state.records or {"metrics.jsonl": 0, "samples.jsonl": 0})
    keep_tokenizer(tokenizer, run.path)
    run.write_config(with_shape(config, shape).to_yaml())
    return Job(
        model=model,
        forward=forward,
        tokenizer=tokenizer,
        optimizer=optimizer,
        scaler=scaler,
        schedule=schedule,
        rows=corpus.rows,
        validation=corpus.validation,
        device=device,
        precision=precision,
        training=training,
        watching=watching,
        run=run,
        board=Board(run.path / "tensorboard" if watching.tensorboard else None, state.step),
        state=state,
        epochs=epochs,
        total_steps=total_steps,
        parent=start.parent,
    )


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


def saved_tokenizer(start: Start) -> Tokenizer | None:
    """The tokenizer of the run that goes on, if it got as far as having one."""
    folder = start.checkpoint or start.run.path / "tokenizer"
    return Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None


def initial_model(
    shape: DecoderConfig, checkpoint: Path | None, tokenizer: Tokenizer, options: TrainingOptions
) -> Decoder:
    """Fresh weights drawn with the seed, or those of the checkpoint."""
    torch.manual_seed(options.seed)
    model = Decoder(shape)
    if checkpoint is not None:
        saved = load_decoder(checkpoint)
        require_match(saved, tokenizer, str(checkpoint))
        model.load_state_dict(saved.state_dict())
    model.gradient_checkpointing = options.gradient_checkpointing
    return model


def restore(
    checkpoint: Path | None, model: Decoder, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> TrainingState:
    """Put the optimizer and the loss scaler back as they were, and return the rest of the state."""
    if checkpoint is None:
        return TrainingState()
    state = TrainingState.from_json(read_state(checkpoint))
    load_optimizer_tensors(model, optimizer, read_optimizer(checkpoint))
    scaler.load_state_dict(state.scaler)
    return state


def length(config: Config, num_rows: int) -> tuple[int | None, int | None]:
    """Epochs and steps of the run; None where only the clock ends it.

    A regime's number of epochs gives way to a limit the user chose: steps, or hours with `cosine_time`.
    """
    training = config.training
    steps_per_epoch = math.ceil(num_rows / (training.batch_size * training.grad_accumulation))
    limited = training.max_steps is not None or training.lr_schedule == "cosine_time"
    if limited and not config.is_given("epochs"):
        return None, training.max_steps
    steps = training.epochs * steps_per_epoch
    return training.epochs, min(steps, training.max_steps or steps)


def make_schedule(options: TrainingOptions, total_steps: int | None) -> Schedule:
    by_time = options.lr_schedule == "cosine_time"
    ratio = options.warmup_ratio or 0.0
    steps = options.warmup_steps
    if steps is None:
        steps = 0 if by_time else round(ratio * (total_steps or 0))
    return Schedule(
        kind=options.lr_schedule,
        peak=options.learning_rate,
        minimum=options.min_lr,
        warmup_steps=steps,
        warmup_ratio=ratio if by_time else 0.0,
        total_steps=total_steps,
    )


def compiled(model: Decoder) -> Callable[..., Any]:
    """The decoder through torch.compile.

    Raises:
        ConfigError: a CPU without a C++ compiler.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        raise ConfigError(
            "--compile needs a C++ compiler on a CPU and there is none; install one (g++) or leave it out"
        )
    return torch.compile(model)


def check_prompt(prompt: str, tokenizer: Tokenizer, shape: DecoderConfig) -> None:
    tokens = len(tokenizer.encode(prompt))
    if tokens >= shape.max_seq_len:
        raise ConfigError(
            f"--sample_prompt is {tokens} tokens long and the context is {shape.max_seq_len}; shorten the prompt"
        )
