"""What a run will be, worked out before it starts: its length, its learning rate, and what may go wrong."""

from __future__ import annotations

import math
from typing import Any

import torch

from seedbed.config import TRAINED_HERE, Config, TrainingOptions
from seedbed.data import WholeRows
from seedbed.data.conversations import from_document
from seedbed.data.lint import NAMES as LINT_NAMES
from seedbed.data.lint import lint, lint_texts
from seedbed.data.overlap import NAME as OVERLAP
from seedbed.findings import Finding, check_allowed
from seedbed.freeze import freeze
from seedbed.lora import num_trainable
from seedbed.model.config import DecoderConfig
from seedbed.model.decoder import Decoder, num_parameters
from seedbed.schedule import Schedule
from seedbed.text.tokenizer import Tokenizer
from seedbed.train.corpus import Corpus, Texts
from seedbed.train.finetune import Prepared, base_folder, fit_context, make_adapter, planned_shape, prepare
from seedbed.train.guardrails import NAMES as GUARDRAIL_NAMES
from seedbed.train.guardrails import Facts, check
from seedbed.train.memory import known_stages, trained_with
from seedbed.train.methods import inherit_learning_rate
from seedbed.train.progress import Display
from seedbed.train.scratch import ASSUMED_VOCAB, decoder_config


def plan_pretraining(config: Config) -> dict[str, Any]:
    """The parameters of the model and the memory that they take; needs no data and no weights."""
    tokenizer = config.data.tokenizer
    assert tokenizer is not None
    if tokenizer in TRAINED_HERE:
        vocab_size = config.data.vocab_size or ASSUMED_VOCAB
    else:
        vocab_size = Tokenizer.load(tokenizer).vocab_size
    parameters = num_parameters(decoder_config(config.model, config.data, vocab_size))
    return {
        "parameters": parameters,
        "trainable_parameters": parameters,
        "parameters_mb": round(parameters * 4 / 2**20, 2),
        "vocab_size": vocab_size,
    }


def plan_finetuning(config: Config, display: Display) -> dict[str, Any]:
    """Parameters before and after, and the findings of the guardrails; with `--data`, of the data as well.

    Without data a preset's name is enough for `--model`, and no weights are read in any case.
    """
    require_known_findings(config)
    prepared = None
    if config.data.data is None:
        shape = planned_shape(config.model.model)
        config = fit_context(config, shape)
    else:
        if config.continues:
            origin = known_stages(base_folder(config.model.model), config.keeping.rollback_to)[1]
            config = inherit_learning_rate(config, origin)
        prepared = prepare(config, base_folder(config.model.model), display, None, None)
        config, shape = prepared.config, prepared.shape
    parameters = num_parameters(shape)
    return {
        "parameters": parameters,
        "trainable_parameters": _trainable(config, shape),
        "parameters_mb": round(parameters * 4 / 2**20, 2),
        "vocab_size": shape.vocab_size,
        **_run_of(config, shape, prepared),
    }


def _trainable(config: Config, shape: DecoderConfig) -> int:
    if config.with_lora:
        return num_trainable(shape, make_adapter(shape, config.adapt))
    with torch.device("meta"):
        model = Decoder(shape)
    freeze(model, config.adapt.freeze, config.adapt.last_blocks)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _run_of(config: Config, shape: DecoderConfig, prepared: Prepared | None) -> dict[str, Any]:
    if prepared is None:
        facts = Facts(config, model_max_seq_len=shape.max_seq_len)
        return {"findings": _shown(config, check(facts))}
    training, rows = config.training, prepared.corpus.rows
    _, steps = length(config, len(rows))
    schedule = make_schedule(training, steps)
    findings = look_ahead(config, prepared.texts, prepared.corpus, schedule, shape.max_seq_len)
    return {
        "tokens": rows.num_targets,
        "steps_per_epoch": math.ceil(len(rows) / (training.batch_size * training.grad_accumulation)),
        "steps": steps,
        "findings": _shown(config, findings),
    }


def _shown(config: Config, findings: list[Finding]) -> list[dict[str, Any]]:
    allow = config.watching.allow
    return [finding.to_json() for finding in findings if finding.level == "error" or finding.name not in allow]


def require_known_findings(config: Config) -> None:
    """Raise ConfigError when `--allow` names what is no finding."""
    check_allowed(config.watching.allow, (*GUARDRAIL_NAMES, *LINT_NAMES, OVERLAP))


def look_ahead(
    config: Config, texts: Texts, corpus: Corpus, schedule: Schedule, model_max_seq_len: int | None
) -> list[Finding]:
    """What the guardrails and the data's own mistakes say about a run before it starts."""
    rows = corpus.rows
    facts = Facts(
        config=config,
        model_max_seq_len=model_max_seq_len,
        trained_at=trained_with(base_folder(config.model.model)).get("learning_rate") if config.continues else None,
        total_steps=schedule.total_steps,
        warmup_steps=schedule.warmup_steps,
        documents=corpus.num_documents,
        steps_per_epoch=math.ceil(len(rows) / (config.training.batch_size * config.training.grad_accumulation)),
        truncated=rows.truncated_documents if isinstance(rows, WholeRows) else 0,
        untrained=rows.untrained_documents if isinstance(rows, WholeRows) else 0,
        longest=corpus.longest if isinstance(rows, WholeRows) else None,
        end_masked=corpus.without_end,
        tokens=rows.num_targets,
        trained_tokens=rows.num_targets,
        all_tokens=corpus.all_tokens,
    )
    findings = check(facts)
    if config.regime == "scratch":
        return findings
    train, held_out = texts.training_documents(), texts.held_out_documents()
    numbers, held_out_numbers = texts.rows()
    if not texts.are_conversations:
        return findings + lint_texts(train, held_out, rows=numbers, validation_rows=held_out_numbers)
    conversations, questions = map(from_document, train), map(from_document, held_out)
    return findings + lint(conversations, questions, rows=numbers, validation_rows=held_out_numbers)


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
    """The learning rate's way; a floor that was not chosen never stands above the peak."""
    by_time = options.lr_schedule == "cosine_time"
    ratio = options.warmup_ratio or 0.0
    steps = options.warmup_steps
    if steps is None:
        steps = 0 if by_time else round(ratio * (total_steps or 0))
    return Schedule(
        kind=options.lr_schedule,
        peak=options.learning_rate,
        minimum=min(options.min_lr, options.learning_rate),
        warmup_steps=steps,
        warmup_ratio=ratio if by_time else 0.0,
        total_steps=total_steps,
    )
