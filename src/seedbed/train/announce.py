"""What a run says of itself before its first step."""

from __future__ import annotations

from pathlib import Path

import torch

from seedbed.config import Config
from seedbed.data import PaddedRows
from seedbed.device import describe
from seedbed.model.config import DecoderConfig
from seedbed.model.decoder import num_parameters
from seedbed.schedule import Schedule
from seedbed.train.corpus import Corpus, Texts
from seedbed.train.progress import Display


def banner(display: Display, config: Config, texts: Texts, device: torch.device, run: Path) -> None:
    """The settings that matter most, before anything slow."""
    data, training = config.data, config.training
    if texts.validation is None:
        validation = f"{data.val_split:.0%} split" if data.val_split else "none"
    else:
        validation = data.val_data or f"{data.data} ({texts.validation.split} split)"
    warmup = f"{training.warmup_ratio:.0%} of the run" if training.warmup_steps is None else training.warmup_steps
    display.banner(
        "Pre-training a language model",
        {
            "Device": f"{describe(device)}, {training.precision}",
            "Data": data.data,
            "Validation": validation,
            "Tokenizer": data.tokenizer,
            "Batch size": training.batch_size,
            "Gradient accumulation": training.grad_accumulation,
            "Learning rate": f"{training.learning_rate:g}",
            "Epochs": training.epochs if training.max_steps is None else f"until step {training.max_steps}",
            "Warmup steps": warmup,
            "Early stopping patience": config.watching.early_stopping_patience or "off",
            "Run folder": run,
        },
    )


def describe_corpus(display: Display, corpus: Corpus, texts: Texts) -> None:
    """How much text there is, and what packing or padding does to it."""
    held, rows = corpus.validation, corpus.rows
    size = f"{corpus.num_bytes / 1e6:.2f} MB"
    display.line()
    display.line(f"Loaded {corpus.num_documents:,} training documents, {size} of {texts.train.name}")
    if held is not None:
        display.line(f"Validation: {held.num_documents:,} documents, {held.num_bytes / 1e6:.2f} MB")
    display.line(
        f"Training samples: {len(rows):,} rows of {rows.max_seq_len} tokens, {rows.num_targets:,} tokens an epoch"
    )
    if isinstance(rows, PaddedRows):
        display.line(
            f"  {rows.padding:.1%} of them is padding; {rows.truncated_documents:,} documents were cut, "
            f"{rows.truncated_tokens:,} tokens lost (packing wastes none)"
        )


def describe_model(display: Display, shape: DecoderConfig) -> None:
    """The sizes of the decoder and what it weighs."""
    facts = {
        "Architecture": shape.family,
        "Vocabulary": f"{shape.vocab_size:,}",
        "Model dim": shape.d_model,
        "Layers": shape.num_layers,
        "Query heads": shape.num_heads,
        "KV heads": shape.num_kv_heads,
        "Feed-forward": shape.d_ff,
        "Context": shape.max_seq_len,
    }
    display.line()
    display.line("Model configuration:")
    for name, value in facts.items():
        display.line(f"  {name}: {value}")
    parameters = num_parameters(shape)
    display.line()
    display.line(f"Model created: {parameters:,} parameters ({parameters * 4 / 2**20:,.1f} MB in float32)")


def describe_schedule(display: Display, schedule: Schedule) -> None:
    """How long the run is and how its learning rate goes."""
    name = "warmup-stable-decay" if schedule.kind == "wsd" else f"{schedule.kind} decay"
    display.line()
    if schedule.total_steps is not None:
        display.line(f"Total training steps: {schedule.total_steps:,}")
    if schedule.kind == "cosine_time":
        display.line("Learning rate schedule: cosine decay that ends when the hours run out")
    else:
        display.line(f"Learning rate schedule: warmup {schedule.warmup_steps} steps, then {name}")
    if schedule.total_steps is not None and schedule.warmup_steps >= schedule.total_steps:
        display.line(
            f"Warning: --warmup_steps {schedule.warmup_steps} is not shorter than the run of {schedule.total_steps} "
            "steps, so the peak learning rate is never reached; try a tenth of the run"
        )
    display.line()
    display.line("Starting training...")
