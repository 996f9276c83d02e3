"""What a run says of itself before its first step."""

from __future__ import annotations

from pathlib import Path

from seedbed import distributed
from seedbed.config import REGIMES, Config, KeepOptions, TrainingOptions
from seedbed.data import WholeRows
from seedbed.data.streaming import StreamedRows
from seedbed.device import describe, pick_device
from seedbed.findings import Finding
from seedbed.model.decoder import Decoder
from seedbed.schedule import Schedule
from seedbed.train.corpus import Corpus, Texts
from seedbed.train.progress import Display


def banner(display: Display, config: Config, texts: Texts, run: Path) -> None:
    """The settings that matter most, before anything slow."""
    data, training, adapt = config.data, config.training, config.adapt
    if texts.validation is None:
        validation = f"{data.val_split:.0%} split" if data.val_split else "none"
    else:
        validation = data.val_data or f"{data.data} ({texts.validation.split} split)"
    warmup = f"{training.warmup_ratio:.0%} of the run" if training.warmup_steps is None else training.warmup_steps
    what: dict[str, object] = {"Tokenizer": data.tokenizer} if data.tokenizer else {}
    if config.regime != "scratch":
        what = {"Model": config.model.model, **what}
    if config.with_lora:
        what["LoRA"] = f"rank {adapt.lora_r}, alpha {adapt.lora_alpha:g}, on {adapt.lora_targets}"
    if config.continues:
        what["Domain"] = config.keeping.domain
        what["Keeping what it knew by"] = ways_of_keeping(config.keeping)
    display.banner(
        REGIMES[config.regime].title,
        {
            "Device": f"{describe(pick_device(training.device))}, {training.precision}",
            **what,
            "Data": f"{data.data} ({texts.train.format})",
            "Validation": validation,
            "Batch size": training.batch_size,
            "Gradient accumulation": training.grad_accumulation,
            **processes(training),
            "Learning rate": f"{training.learning_rate:g}",
            **how_long(training),
            "Warmup steps": warmup,
            "Early stopping patience": config.watching.early_stopping_patience or "off",
            "Run folder": run,
        },
    )


def processes(training: TrainingOptions) -> dict[str, object]:
    """How many there are, and how they share the rows of an update."""
    there, meant = distributed.size(), training.processes or 1
    if there == meant == 1:
        return {}
    share = f"the {training.rows_per_step} rows of an update as {meant} would take them"
    return {"Processes": there if there == meant else f"{there}, sharing {share}"}


def how_long(training: TrainingOptions) -> dict[str, object]:
    """The limit that was set, or the epochs."""
    if training.max_steps is not None:
        return {"Epochs": f"until step {training.max_steps:,}"}
    if training.max_tokens is not None:
        return {"Epochs": f"until {training.max_tokens:,} tokens"}
    return {"Epochs": training.epochs}


def ways_of_keeping(keeping: KeepOptions) -> str:
    """The methods that are on, in words."""
    words = {
        "replay": "replay {:.3g} of stored text",
        "self_replay": "replay {:.3g} of its own text",
        "l2_sp": "L2-SP {:g}",
        "ewc": "EWC {:g}",
        "kl": "KL {:g}",
        "interpolate": "interpolation of old and new weights",
    }
    chosen = {name: getattr(keeping, name) for name in words}
    return ", ".join(words[name].format(value) for name, value in chosen.items() if value) or "nothing (naive)"


def describe_corpus(display: Display, corpus: Corpus, texts: Texts, batch_size: int) -> None:
    """How much text there is, and what packing or padding does to it."""
    held, rows = corpus.validation, corpus.rows
    size = f"{corpus.num_bytes / 1e6:.2f} MB"
    display.line()
    kind = "conversations" if texts.are_conversations else "documents"
    display.line(f"Loaded {corpus.num_documents:,} training {kind}, {size} of {texts.train.name}")
    if held is not None:
        display.line(f"Validation: {held.num_documents:,} {kind}, {held.num_bytes / 1e6:.2f} MB")
    display.line(
        f"Training samples: {len(rows):,} rows of {rows.max_seq_len} tokens, {rows.num_targets:,} tokens an epoch"
    )
    if isinstance(rows, StreamedRows):
        display.line(
            f"  of {rows.num_shards:,} files, one after another; the first stands for all in what is said here"
        )
    if isinstance(rows, WholeRows):
        cut = f"{rows.truncated_documents:,} {kind} are cut, {rows.truncated_tokens:,} tokens lost"
        display.line(f"  {rows.padding(batch_size):.1%} of the places is padding; {cut}")
    if texts.are_conversations:
        share = rows.num_targets / max(1, corpus.all_tokens)
        display.line(f"  {share:.1%} of the conversations' tokens are learnt; the rest is only read")


def describe_findings(display: Display, findings: list[Finding]) -> None:
    """What may go wrong, before it does."""
    for finding in findings:
        display.line()
        display.line(f"{finding.level.capitalize()} ({finding.name}): {finding}")


def describe_model(display: Display, model: Decoder) -> None:
    """The sizes of the decoder, what it weighs, and how much of it is trained."""
    shape = model.config
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
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trainable = sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
    added = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    base = total - added
    display.line()
    display.line(f"Model created: {base:,} parameters ({base * 4 / 2**20:,.1f} MB in float32)")
    if trainable < total:
        display.line(f"Trainable parameters: {base:,} before, {trainable:,} now ({trainable / base:.2%} of the model)")


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
