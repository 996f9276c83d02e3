"""From a config to a job: the only place that knows by which method a model is trained."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from seedbed import distributed
from seedbed.checkpoint import read_optimizer, read_state
from seedbed.config import Config, WatchOptions
from seedbed.data import WholeRows
from seedbed.data.conversations import from_document
from seedbed.data.streaming import StreamedRows
from seedbed.device import Precision, envelope, keep_memory, pick_device, pick_precision
from seedbed.errors import ConfigError, DataError
from seedbed.findings import Finding, sift
from seedbed.model.config import DecoderConfig
from seedbed.model.decoder import Decoder, num_parameters
from seedbed.model.shape import ASSUMED_VOCAB, decoder_config
from seedbed.optim import build_optimizer, load_optimizer_tensors
from seedbed.parallel import Strategy, spread
from seedbed.runs.folder import RECORD_FILES, RunFolder
from seedbed.schedule import Schedule
from seedbed.text.template import Template
from seedbed.train.announce import describe_corpus, describe_findings, describe_model, describe_schedule
from seedbed.train.board import Board
from seedbed.train.continual.prepare import from_earlier_model
from seedbed.train.corpus import CHANGED, Texts, keep_tokenizer
from seedbed.train.estimate.forecast import NAME as MEMORY
from seedbed.train.estimate.forecast import Forecast, describe_forecast, forecast_run
from seedbed.train.finetune import from_pretrained_weights, hold_frozen, planned_shape
from seedbed.train.ingredients import Ingredients, Prepared
from seedbed.train.job import Job, Prompt
from seedbed.train.length import length, make_schedule, steps_per_epoch
from seedbed.train.plan import look_ahead, require_known_findings
from seedbed.train.progress import Display
from seedbed.train.resume import Start
from seedbed.train.scratch import from_random_weights
from seedbed.train.state import TrainingState

STATE_BYTES = 16  # a weight in float32, its gradient and Adam's moments


def build_job(start: Start, display: Display) -> Job:
    """Everything from the text to the optimizer, checked before the first step; prints the banner.

    Raises:
        ConfigError, DataError, CheckpointError, StorageError: what is wrong, before any training.
    """
    require_known_findings(start.config)
    device = distributed.local_device(pick_device(start.config.training.device))
    precision = pick_precision(start.config.training.precision, device)
    config = settled(start.config, precision)
    strategy = pick_strategy(config, device, precision)
    made = gather(start, config, strategy, display)
    prepared, config = made.prepared, made.prepared.config
    training, watching = config.training, config.watching
    sample = sample_prompt(prepared)

    model = made.model
    make_ready(model, config, device)
    if strategy != "fsdp":
        model.to(device)
    shared = spread(model, strategy, device, precision)
    optimizer = build_optimizer(model, training)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    state = restore(start.checkpoint, model, optimizer, scaler)
    if isinstance(made.rows, StreamedRows) and state.shard_layout == made.rows.layout:
        made.rows.found = list(state.shard_rows)
    tell_of_other_bits(display, state, {**envelope(device), "processes": distributed.size()})
    epochs, total_steps = length(config, made.rows)
    schedule = make_schedule(training, total_steps)
    expected = forecast_run(made, optimizer, state, total_steps)
    findings = say_what_comes(display, made, schedule, expected, look_at_texts(start, prepared, state))
    begin_records(start, prepared, state, findings)
    return Job(
        model=model,
        spread=shared,
        tokenizer=prepared.tokenizer,
        optimizer=optimizer,
        scaler=scaler,
        schedule=schedule,
        rows=made.rows,
        validation=prepared.corpus.validation,
        device=device,
        precision=precision,
        training=training,
        watching=watching,
        run=start.run,
        board=open_board(start.run, watching, state.step),
        state=state,
        epochs=epochs,
        total_steps=total_steps,
        parent=parent_of(start, config),
        sample=sample,
        keeping=made.keeping,
        facts={
            "shape": facts_of_shape(model.config),
            "text": facts_of_text(made),
            "forecast": expected.to_summary(),
        },
    )


def parent_of(start: Start, config: Config) -> str | None:
    """The run, checkpoint or pretrained model that a run begins from; None for one from scratch."""
    if begun_from := start.config.parent or start.parent:
        return begun_from
    return None if config.regime == "scratch" else config.model.model


def open_board(run: RunFolder, watching: WatchOptions, step: int) -> Board:
    """TensorBoard's files of a run, which the first process writes."""
    wanted = watching.tensorboard and distributed.is_first()
    return Board(run.path / "tensorboard" if wanted else None, step)


def gather(start: Start, config: Config, strategy: Strategy, display: Display) -> Ingredients:
    """The texts, rows and weights of a run, the same texts in all processes."""
    if distributed.size() == 1 and config.is_given("parallel"):
        display.line("One process: --parallel has nothing to share; start several with torchrun (docs/distributed.md)")
    if strategy == "ddp":  # parts of weights come and go in sizes that never fit again
        keep_memory()
    with distributed.weights_in_first_only(strategy == "fsdp"):
        made = gatherer(config)(start, config, display)
    require_same_text(made.prepared.texts)
    return made


def require_same_text(texts: Texts) -> None:
    """Raise DataError when a process, on another machine perhaps, reads other text than the first."""
    here = texts.fingerprint()
    first = distributed.on_first(lambda: here)

    def compare() -> None:
        if here != first:
            raise DataError(f"--data {texts.train.name}: not the text that the first process reads; copy it there")

    distributed.together(compare)


def settled(config: Config, precision: Precision) -> Config:
    """The config with what this machine decides written into it."""
    if config.training.precision == "auto":
        config = config.update("this machine", precision=precision)
    if config.training.processes is None:
        config = config.update("this machine", processes=distributed.size())
    return config


def pick_strategy(config: Config, device: torch.device, precision: Precision) -> Strategy:
    """How the processes share the model; for `auto` whole, unless its training state fills more than half a GPU.

    Raises:
        ConfigError: what several processes cannot do yet.
    """
    if distributed.size() == 1:
        return "ddp"
    if config.watching.async_save:
        raise ConfigError("--async_save is for one process; leave it out, or start without torchrun")
    if config.training.parallel == "fsdp" and precision == "fp16":
        raise ConfigError(
            f"--parallel fsdp: {device} takes fp16, which has no loss scaling there; choose --precision fp32, or ddp"
        )
    if config.training.parallel != "auto":
        return config.training.parallel
    if (
        device.type != "cuda"
        or precision == "fp16"
        or config.with_lora
        or config.continues
        or config.training.optimizer != "adamw"
    ):
        return "ddp"
    scratch = config.regime == "scratch"
    shape = decoder_config(config.model, config.data, ASSUMED_VOCAB) if scratch else planned_shape(config.model.model)
    fits = STATE_BYTES * num_parameters(shape) < torch.cuda.get_device_properties(device).total_memory / 2
    return "ddp" if fits else "fsdp"


def make_ready(model: Decoder, config: Config, device: torch.device) -> None:
    """Put on the model what the options ask of it, before it is on its device: frozen weights are smaller then."""
    training = config.training
    if config.with_lora:
        hold_frozen(model, config, device)
    model.gradient_checkpointing = training.gradient_checkpointing
    if training.neftune_alpha:
        add_embedding_noise(model, training.neftune_alpha)
    if training.compile:
        compile_blocks(model, device)


def begin_records(start: Start, prepared: Prepared, state: TrainingState, findings: Sequence[Finding]) -> None:
    """Bring the run folder's files to where the run begins, or goes on."""
    run = start.run
    run.truncate(state.records or dict.fromkeys(RECORD_FILES, 0))
    distributed.on_first(lambda: keep_tokenizer(prepared.tokenizer, run.path))
    run.write_config(prepared.config.to_yaml())
    for finding in findings:
        if start.checkpoint is None or finding.name == CHANGED:  # the others were told when the run began
            run.event("guardrail", state.step, **finding.to_json())


def tell_of_other_bits(display: Display, state: TrainingState, now: dict[str, Any]) -> None:
    """Say what makes a run that goes on end with other last bits than one that was never stopped."""
    changed = [
        f"{name} {now.get(name)}, was {before}" for name, before in state.envelope.items() if now.get(name) != before
    ]
    if changed:
        display.line(f"Not bit-exact: {'; '.join(changed)}. The run goes on, with other rounding than without the stop")
    state.envelope = now


def look_at_texts(start: Start, prepared: Prepared, state: TrainingState) -> list[Finding]:
    """Warnings of text that is not the one the run began with, and of held-out text that is also learnt.

    From now on the state remembers the text as it is.
    """
    texts, begun_from = prepared.texts, state.text
    state.text = texts.fingerprint()
    is_new = start.checkpoint is None and not prepared.config.continues
    return [*texts.changed_since(begun_from), *(texts.overlap() if is_new else [])]


def say_what_comes(
    display: Display, made: Ingredients, schedule: Schedule, expected: Forecast, noticed: Sequence[Finding]
) -> list[Finding]:
    """The first screen: text, model, schedule, forecast, and what was noticed or may go wrong, which is returned.

    Raises:
        ConfigError: what is wrong beyond a warning; with `--strict` a warning too.
        OutOfMemoryError: it needs far more memory than there is.
    """
    prepared, config = made.prepared, made.prepared.config
    describe_corpus(display, prepared.corpus, prepared.texts, config.training.batch_size)
    describe_model(display, made.model)
    describe_schedule(display, schedule)
    describe_forecast(display, expected)
    findings = [*look_ahead(prepared, schedule), *noticed, *expected.findings()]
    findings = sift(findings, strict=config.watching.strict, allow=config.watching.allow)
    if MEMORY not in config.watching.allow:
        expected.require_memory()
    describe_findings(display, findings)
    display.line()
    display.line("Starting training...")
    return findings


def facts_of_shape(shape: DecoderConfig) -> dict[str, Any]:
    """The sizes of a decoder that tables and diagnoses name."""
    names = ("family", "vocab_size", "d_model", "num_layers", "num_heads", "max_seq_len")
    return {name: getattr(shape, name) for name in names}


def facts_of_text(made: Ingredients) -> dict[str, Any]:
    """How much text there is, and what became of it in rows."""
    prepared, corpus, rows = made.prepared, made.prepared.corpus, made.rows
    held = corpus.validation
    whole = corpus.rows if isinstance(corpus.rows, WholeRows) else None
    return {
        "conversations": prepared.texts.are_conversations,
        "train_documents": corpus.num_documents,
        "train_bytes": corpus.num_bytes,
        "train_rows": len(rows),
        "tokens_per_epoch": rows.num_targets,
        "steps_per_epoch": steps_per_epoch(prepared.config.training, rows),
        "padding": round(whole.padding(prepared.config.training.batch_size), 4) if whole else 0.0,
        "truncated_documents": whole.truncated_documents if whole else 0,
        "truncated_tokens": whole.truncated_tokens if whole else 0,
        "longest": corpus.longest,
        "val_documents": held.num_documents if held else 0,
        "val_bytes": held.num_bytes if held else 0,
        "val_tokens": held.rows.num_targets if held else 0,
    }


def gatherer(config: Config) -> Callable[[Start, Config, Display], Ingredients]:
    """What knows the texts and the weights that a run of this kind begins with."""
    if config.continues:
        return from_earlier_model
    return from_random_weights if config.regime == "scratch" else from_pretrained_weights


def restore(
    checkpoint: Path | None, model: Decoder, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> TrainingState:
    """Put the optimizer and the loss scaler back as they were, and return the rest of the state."""
    if checkpoint is None:
        return TrainingState()
    state = TrainingState.from_json(read_state(checkpoint))
    load_optimizer_tensors(model, optimizer, read_optimizer(checkpoint))
    if state.scaler:  # none of a run in other precision
        scaler.load_state_dict(state.scaler)
    return state


def compile_blocks(model: Decoder, device: torch.device) -> None:
    """Put every block through torch.compile: they are alike, so one is compiled and all use it.

    Raises:
        ConfigError: a CPU without a C++ compiler.
    """
    if device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        raise ConfigError(
            "--compile needs a C++ compiler on a CPU and there is none; install one (g++) or leave it out"
        )
    for block in model.blocks:
        block.compile()


def add_embedding_noise(model: Decoder, alpha: float) -> None:
    """NEFTune (Jain et al., 2023): while training, embeddings (B, T, D) get uniform noise up to alpha / sqrt(T D)."""

    def add_noise(module: torch.nn.Module, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        size = alpha / math.sqrt(embedded.shape[1] * embedded.shape[2])
        return embedded + torch.empty_like(embedded).uniform_(-size, size)

    model.embed_tokens.register_forward_hook(add_noise)


def sample_prompt(prepared: Prepared) -> Prompt:
    """What the model writes on at each validation: the prompt, or for conversations a question by default.

    Raises:
        ConfigError: the prompt is longer than the context.
    """
    text, template = prepared.config.watching.sample_prompt, prepared.reading.template
    positions = prepared.shape.max_seq_len
    if template is not None and not text:
        return first_question(prepared.texts, template, positions)
    given = text if template is None else template.prompt_ids([{"role": "user", "content": text}])
    tokens = len(prepared.tokenizer.encode(given) if isinstance(given, str) else given)
    if tokens >= positions:
        raise ConfigError(f"--sample_prompt is {tokens} tokens long and the context is {positions}; shorten the prompt")
    return Prompt(text, given)


def first_question(texts: Texts, template: Template, positions: int) -> Prompt:
    """The first held-out conversation (or of all) up to its first answer that fits; an empty one where none does."""
    for document in texts.held_out_documents() if texts.hold_out else texts.training_documents():
        messages = from_document(document)
        first_answer = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
        if messages := messages[:first_answer]:
            given = template.prompt_ids(messages)
            if len(given) < positions:
                return Prompt(messages[-1]["content"], given)
    return Prompt("", template.prompt_ids([{"role": "user", "content": ""}]))
