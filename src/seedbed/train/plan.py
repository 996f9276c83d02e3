"""What a run will be, worked out before it starts: its length, its learning rate, and what may go wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seedbed.config import TRAINED_HERE, Config
from seedbed.data import WholeRows
from seedbed.data.conversations import from_document
from seedbed.data.lint import NAMES as LINT_NAMES
from seedbed.data.lint import lint, lint_texts
from seedbed.data.overlap import NAME as OVERLAP
from seedbed.device import describe, keep_memory, pick_device, pick_precision
from seedbed.findings import Finding, check_allowed
from seedbed.model.decoder import num_parameters
from seedbed.model.shape import ASSUMED_VOCAB, decoder_config
from seedbed.schedule import Schedule
from seedbed.text.tokenizer import Tokenizer
from seedbed.train.continual.memory import known_stages, trained_with
from seedbed.train.continual.methods import inherit_learning_rate
from seedbed.train.corpus import CHANGED
from seedbed.train.estimate.footprint import parse_size
from seedbed.train.estimate.forecast import NAME as MEMORY
from seedbed.train.estimate.forecast import fitting, forecast
from seedbed.train.estimate.workload import Workload
from seedbed.train.finetune import base_folder, fit_context, planned_shape, prepare_finetune
from seedbed.train.guardrails import NAMES as GUARDRAIL_NAMES
from seedbed.train.guardrails import Facts, check
from seedbed.train.ingredients import Prepared
from seedbed.train.length import length, make_schedule, steps_per_epoch
from seedbed.train.progress import Display
from seedbed.train.scratch import prepare_scratch


@dataclass(frozen=True)
class _Planned:
    """A run as far as it can be known without its weights."""

    workload: Workload
    vocab_size: int
    parameters: int
    findings: list[Finding]


def plan_run(config: Config, display: Display, memory_limit: str | None = None) -> dict[str, Any]:
    """What a run will be and take, and what may go wrong; with `--data`, of the data as well.

    No weights are read; a preset's name or a folder with a `config.json` is enough for `--model`.

    Args:
        config: the run's, as resolved.
        display: shows what takes a while.
        memory_limit: such as 8GB; the largest batch that fits is found for it.

    Raises:
        SeedbedError: what would stop the run.
    """
    require_known_findings(config)
    limit = None if memory_limit is None else parse_size(memory_limit)
    device = pick_device(config.training.device)
    precision = pick_precision(config.training.precision, device)
    config = config.update("this machine", precision=precision)
    planned = _pretraining(config, display) if config.regime == "scratch" else _finetuning(config, display)
    processes, sharded = config.training.processes or 1, config.training.parallel == "fsdp"
    if not sharded:
        keep_memory()  # as the run will
    with display.working("Measuring"):
        expected = forecast(replace(planned.workload, processes=processes, sharded=sharded))
    findings = [*planned.findings, *expected.findings()]
    return {
        "parameters": planned.parameters,
        "trainable_parameters": expected.trainable_parameters,
        "parameters_mb": round(planned.parameters * 4 / 2**20, 2),
        "vocab_size": planned.vocab_size,
        "device": describe(device),
        "precision": precision,
        **expected.to_json(),
        **({} if limit is None else fitting(expected, limit).to_json()),
        "findings": _shown(config, findings),
    }


def _pretraining(config: Config, display: Display) -> _Planned:
    data, tokenizer = config.data, config.data.tokenizer
    assert tokenizer is not None
    if data.data is None:
        trained_here = tokenizer in TRAINED_HERE
        vocab_size = (data.vocab_size or ASSUMED_VOCAB) if trained_here else Tokenizer.load(tokenizer).vocab_size
        shape = decoder_config(config.model, data, vocab_size)
        return _Planned(Workload(config, shape), vocab_size, num_parameters(shape), check(Facts(config)))
    return _with_data(prepare_scratch(config, display))


def _finetuning(config: Config, display: Display) -> _Planned:
    model = config.model.model
    if config.data.data is None:
        shape = planned_shape(model)
        config = fit_context(config, shape)
        findings = check(Facts(config, model_max_seq_len=shape.max_seq_len))
        return _Planned(Workload(config, shape), shape.vocab_size, num_parameters(shape), findings)
    folder = base_folder(model)
    if config.continues:
        config = inherit_learning_rate(config, known_stages(folder, config.keeping.rollback_to)[1])
    stored = float(sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    return _with_data(prepare_finetune(config, folder, display), stored)


def _with_data(prepared: Prepared, stored_bytes: float = 0.0) -> _Planned:
    """The run with its rows and its length, and what the guardrails say of it."""
    config, shape, corpus = prepared.config, prepared.shape, prepared.corpus
    _, steps = length(config, corpus.rows)
    workload = Workload(
        config,
        replace(shape, vocab_size=max(shape.vocab_size, prepared.tokenizer.vocab_size)),
        rows=corpus.rows,
        held_out=() if corpus.validation is None else (corpus.validation.rows,),
        steps=steps,
        stored_bytes=stored_bytes,
    )
    overlap = [] if config.continues else prepared.texts.overlap()
    findings = [*look_ahead(prepared, make_schedule(config.training, steps)), *overlap]
    return _Planned(workload, shape.vocab_size, num_parameters(shape), findings)


def _shown(config: Config, findings: list[Finding]) -> list[dict[str, Any]]:
    allow = config.watching.allow
    return [finding.to_json() for finding in findings if finding.level == "error" or finding.name not in allow]


def require_known_findings(config: Config) -> None:
    """Raise ConfigError when `--allow` names what is no finding."""
    check_allowed(config.watching.allow, (*GUARDRAIL_NAMES, *LINT_NAMES, OVERLAP, MEMORY, CHANGED))


def _peak_of(model: str) -> float | None:
    """The learning rate that a model was made with, where it was made here."""
    if not Path(model).is_dir():  # the hub's
        return None
    rate = trained_with(base_folder(model)).get("learning_rate")
    return rate if isinstance(rate, float) else None


def look_ahead(prepared: Prepared, schedule: Schedule) -> list[Finding]:
    """What the guardrails and the data's own mistakes say about a run before it starts."""
    config, texts, corpus = prepared.config, prepared.texts, prepared.corpus
    rows, from_scratch = corpus.rows, config.regime == "scratch"
    facts = Facts(
        config=config,
        model_max_seq_len=None if from_scratch else prepared.shape.max_seq_len,
        trained_at=None if from_scratch else _peak_of(config.model.model),
        total_steps=schedule.total_steps,
        warmup_steps=schedule.warmup_steps,
        documents=corpus.num_documents,
        steps_per_epoch=steps_per_epoch(config.training, rows),
        truncated=rows.truncated_documents if isinstance(rows, WholeRows) else 0,
        untrained=rows.untrained_documents if isinstance(rows, WholeRows) else 0,
        longest=corpus.longest if isinstance(rows, WholeRows) else None,
        end_masked=corpus.without_end,
        trained_tokens=rows.num_targets,
    )
    findings = check(facts)
    if from_scratch:
        return findings
    train, held_out = texts.training_documents(), texts.held_out_documents()
    numbers, held_out_numbers = texts.row_numbers()
    if not texts.are_conversations:
        return findings + lint_texts(train, held_out, rows=numbers, validation_rows=held_out_numbers)
    conversations, questions = map(from_document, train), map(from_document, held_out)
    return findings + lint(conversations, questions, rows=numbers, validation_rows=held_out_numbers)
