"""Adding a domain to what a model knows: the run begins with its memory, and with what holds it to that.

Each way of holding on is a part of the job that the loop knows nothing of: rows that replay, anchors that pull,
weights interpolated at the end. Learning rates are warmed up again and decay again, as in any run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from seedbed.adapter import CONFIG_FILE as ADAPTER_FILE
from seedbed.checkpoint import find_base
from seedbed.config import STRENGTHS, Config, SamplingOptions, TrainingOptions
from seedbed.data import Reading
from seedbed.data.replay import MixedRows, replay_rows, replay_targets
from seedbed.data.rows import Rows
from seedbed.device import Precision, autocast, pick_device
from seedbed.errors import ConfigError
from seedbed.generate import generate
from seedbed.model.decoder import Decoder
from seedbed.runs.history import BASE, read_documents, write_documents
from seedbed.text.template import find_template
from seedbed.train.anchors import PredictionAnchor, WeightAnchor, diagonal_fisher
from seedbed.train.conclude import Conclusion
from seedbed.train.corpus import store_documents, validation_rows
from seedbed.train.finetune import Prepared, load_prepared, prepare
from seedbed.train.ingredients import Ingredients, saved_tokenizer
from seedbed.train.job import Earlier, Keeping, Validation, batches_of
from seedbed.train.measure import Meter, measure
from seedbed.train.memory import (
    FISHER_FILE,
    SELF_REPLAY_FILE,
    Memory,
    begin_memory,
    recall,
    refuse_overlap,
    run_of,
    trained_with,
)
from seedbed.train.progress import Display
from seedbed.train.resume import Start
from seedbed.train.stopping import StopRequest

OWN_TEXT = SamplingOptions(temperature=1.0, top_k=0, repetition_penalty=1.0)
"""How a model writes text that stands for what it knew: exactly as it would predict it."""
WRITTEN_AT_ONCE = 32
WITH_STORED_TEXT: dict[str, float | bool] = {"replay": 0.05, "l2_sp": 0.01}
WITHOUT_STORED_TEXT: dict[str, float | bool] = {"self_replay": 0.1, "l2_sp": 0.02}
FISHER_TOKENS = 8192


def from_earlier_model(start: Start, config: Config, display: Display) -> Ingredients:
    """A pretrained model as for fine-tuning, the new domain's rows and earlier text among them, and its anchors.

    Raises:
        ConfigError, DataError, CheckpointError: what is wrong, before any training.
    """
    run = start.run.path
    memory = recall(run, config)
    begun = memory is not None
    memory = memory or begin_memory(config, run, display)
    folder = _weights_below(memory.origin) if config.with_lora else memory.origin
    if not begun:
        config = inherit_learning_rate(config, memory.origin)
        config, why = choose_methods(config, memory)
        refuse_overlap(memory, config, display)
        memory = memory.with_learning(replace(memory.learning, why=why, method=_account(config)))
    made = prepare(config, folder, display, saved_tokenizer(start), run)
    config = made.config
    device = pick_device(config.training.device)

    def load_old() -> Decoder:
        return load_prepared(replace(start, checkpoint=None), made, folder, display).to(device)

    model = load_prepared(start, made, folder, display).to(device)
    known = {
        stage.domain: _held_out(memory, stage.domain, stage.format, made, display) for stage in memory.history.stages
    }
    texts = {domain: held_out for domain, held_out in known.items() if held_out is not None}
    if not begun:
        with display:
            old = load_old() if start.checkpoint else model
            figures = measure(Meter(old, device, config.training), texts, StopRequest(), display)
        learning = replace(memory.learning, before=figures or {}, max_seq_len=config.data.max_seq_len)
        memory = memory.with_learning(learning)
    _announce(memory, texts, display)
    rows = _rows(made, memory, load_old if start.checkpoint else lambda: model, run, display)
    anchors = _anchors(load_old, config, model, texts, memory, run, display)
    memory.keep()
    before = memory.learning.before
    keeping = Keeping(
        weight_anchors=anchors.of_weights,
        prediction_anchors=anchors.of_predictions,
        earlier=tuple(
            Earlier(stage.domain, texts[stage.domain], before[stage.domain].loss)
            for stage in memory.earlier
            if stage.domain in texts
        ),
        max_forgetting=_limit(config),
        on_forgetting=config.keeping.on_forgetting,
        companions=memory.folder,
        conclude=Conclusion(
            memory,
            texts,
            load_old,
            bool(config.keeping.interpolate),
            _limit(config),
        ),
    )
    return Ingredients(config, made.texts, made.tokenizer, made.template, made.corpus, model, rows, keeping)


@dataclass(frozen=True)
class Anchors:
    """What pulls the model back while it learns."""

    of_weights: Sequence[WeightAnchor]
    of_predictions: Sequence[PredictionAnchor]


def inherit_learning_rate(config: Config, origin: Path) -> Config:
    """A model trained here is warmed up again to half the rate it was trained with, unless a rate was chosen.

    Ibrahim et al. (2024) warm up to the whole rate; half of it learns nearly as much and forgets less.
    """
    values = trained_with(origin)
    rate, regime = values.get("learning_rate"), values.get("regime", "scratch")
    if not isinstance(rate, float) or config.with_lora or config.is_given("learning_rate"):
        return config
    if regime == "scratch":
        return config.update(f"half the peak of {run_of(origin)}", learning_rate=rate / 2)
    return config.update(f"the peak of {run_of(origin)}", learning_rate=rate) if regime == "continue" else config


def choose_methods(config: Config, memory: Memory) -> tuple[Config, str]:
    """The config with the strengths of all that `--method` names; for `auto`, why it was chosen.

    Raises:
        ConfigError: a method needs text that is not there.
    """
    keeping = config.keeping
    named = [part.strip() for part in keeping.method.split(",")]
    given = [name for name in STRENGTHS if getattr(keeping, name)]
    why = ""
    chosen = {name: STRENGTHS[name] for name in named if name in STRENGTHS and not getattr(keeping, name)}
    if named == ["auto"] and not given:
        chosen, why = _automatic(config, memory)
    config = config.update(f"--method {keeping.method}", **chosen) if chosen else config
    _require_texts(config, memory)
    return config, why


def _automatic(config: Config, memory: Memory) -> tuple[dict[str, float | bool], str]:
    """What measured best with the texts at hand (docs/continual-results.md), less what was switched off; and why."""
    off = {name for name in STRENGTHS if getattr(config.keeping, name) in (0, False)}
    if config.with_lora:
        off.add("l2_sp")
    stored = [stage.domain for stage in memory.earlier if stage.reserve_bytes]
    if stored and "replay" not in off:
        chosen, why = WITH_STORED_TEXT, f"there is stored text of {', '.join(stored)}, a little of which holds the rest"
    else:
        reason = "replay is switched off" if stored else "there is no stored text of what the model knew"
        writes = "it writes some itself" if "self_replay" not in off else "nothing is replayed"
        chosen, why = WITHOUT_STORED_TEXT, f"{reason}, so {writes}"
    return {name: value for name, value in chosen.items() if name not in off}, why


def _can_measure(memory: Memory) -> bool:
    """Whether there is held-out text of anything that the model knew."""
    return any(stage.held_out_bytes for stage in memory.earlier)


def _require_texts(config: Config, memory: Memory) -> None:
    """Raise ConfigError for methods that need text of what the model knew where there is none."""
    keeping, problems = config.keeping, []
    model = config.model.model
    if keeping.replay and not any(stage.reserve_bytes for stage in memory.earlier):
        problems.append(
            f"--replay {keeping.replay:g}: no text of what {model} knew is stored with it; name some with "
            "--general_data, or let the model write it: --self_replay"
        )
    if not _can_measure(memory):
        needing = [name for name in ("ewc", "interpolate") if getattr(keeping, name)]
        needing += [] if keeping.max_forgetting is None else ["max_forgetting"]
        problems += [
            f"--{name} needs held-out text of what {model} knew, and there is none; name some with --general_data"
            for name in needing
        ]
    if keeping.interpolate and not memory.learning.held_out_bytes:
        problems.append("--interpolate needs held-out text of the new domain; give --val_data or a --val_split")
    if problems:
        raise ConfigError(problems)


def _account(config: Config) -> dict[str, object]:
    """What the history says of how this domain is learnt."""
    keeping, adapt = config.keeping, config.adapt
    method: dict[str, object] = {name: value for name in STRENGTHS if (value := getattr(keeping, name))}
    if config.with_lora:
        method["lora"] = adapt.lora_r
    method |= {name: value for name in ("last_blocks", "freeze") if (value := getattr(adapt, name))}
    return {**method, "learning_rate": config.training.learning_rate}


def _weights_below(origin: Path) -> Path:
    """A new adapter stands beside the ones of earlier domains, on the base that they have in common."""
    return find_base(origin) if (origin / ADAPTER_FILE).is_file() else origin


def _limit(config: Config) -> float:
    limit = config.keeping.max_forgetting
    return float("inf") if limit is None else limit


def _reading(stage_format: str, made: Prepared) -> Reading:
    """How stored documents of a format are read by the model as it is now."""
    if stage_format == "text":
        return Reading(made.tokenizer)
    if made.template is not None:
        return Reading(made.tokenizer, made.template, made.config.data.train_on_prompt)
    return Reading(made.tokenizer, find_template(made.tokenizer, None, stage_format))


def _held_out(memory: Memory, domain: str, stage_format: str, made: Prepared, display: Display) -> Validation | None:
    """Rows to measure a domain on; None when nothing of it was kept."""
    documents = memory.held_out(domain)
    if not documents:
        return None
    store = store_documents(documents, stage_format, _reading(stage_format, made), f"held-out {domain}", display)
    return validation_rows(store, made.config.data, made.config.training.seed)


def _announce(memory: Memory, texts: dict[str, Validation], display: Display) -> None:
    learning = memory.learning
    display.line()
    if len(memory.history.stages) == 2:
        display.line(f"{memory.origin} has no history of domains; one begins here")
    for stage in memory.earlier:
        if stage.domain not in texts:
            display.line(
                "Nothing measures what the model knew before its first domain; --general_data names text for that"
                if stage.domain == BASE
                else f"Nothing of {stage.domain} was held out, so nothing measures whether it is forgotten"
            )
    for domain, figure in learning.before.items():
        display.line(f"Before: {domain} {figure.loss:.4f} nats a token, {figure.bits_per_byte:.4f} bits per byte")
    if learning.why:
        display.line(f"Method chosen: {learning.why}")


def _rows(made: Prepared, memory: Memory, load_old: Callable[[], Decoder], run: Path, display: Display) -> Rows:
    """The new domain's rows, and beside them in their shares the stored text and the model's own."""
    config, new = made.config, made.corpus.rows
    keeping, data, seed = config.keeping, config.data, config.training.seed
    stored = [stage for stage in memory.earlier if stage.reserve_bytes] if keeping.replay else []
    replay, self_replay = keeping.replay or 0.0, keeping.self_replay or 0.0
    if not replay and not self_replay:
        return new
    # Of the tokens that are not the other kind's, so that both have their shares of all.
    targets = replay_targets(new.num_targets, replay / (1 - self_replay), len(stored)) if stored else []
    parts = [new]
    for stage, num_targets in zip(stored, targets, strict=True):
        reading = _reading(stage.format, made)
        documents = memory.reserve(stage.domain)
        store = store_documents(documents, stage.format, reading, f"the reserve of {stage.domain}", display)
        if num_targets:
            everything = np.arange(store.num_documents)
            parts.append(replay_rows(store, everything, data.max_seq_len, seed, num_targets, packing=data.packing))
    if self_replay:
        [num_targets] = replay_targets(new.num_targets, self_replay / (1 - replay), 1)
        needed = math.ceil(num_targets * _share_of_epoch(config.training, len(new)))
        documents = own_texts(made, load_old, needed, run / SELF_REPLAY_FILE, display)
        store = store_documents(documents, "text", Reading(made.tokenizer), "the model's own text", display)
        everything = np.arange(store.num_documents)
        parts.append(replay_rows(store, everything, data.max_seq_len, seed, num_targets))
    mixed = MixedRows(parts, seed)
    old = sum(part.num_targets for part in parts[1:])
    display.line(f"Replayed: {old:,} tokens an epoch, {old / mixed.num_targets:.2%} of all")
    return mixed


def _share_of_epoch(training: TrainingOptions, num_rows: int) -> float:
    """How much of an epoch a run of few steps gets to see."""
    steps = math.ceil(num_rows / (training.batch_size * training.grad_accumulation))
    return min(1.0, (training.max_steps or steps) / steps)


def own_texts(
    made: Prepared, load_old: Callable[[], Decoder], num_tokens: int, path: Path, display: Display
) -> list[str]:
    """Texts that a model writes from the beginning of a document, of `num_tokens` together; written once a run.

    They come from the model alone: no text of any data leads them.

    Raises:
        ConfigError: it ends every document at once.
    """
    if path.exists():
        return list(read_documents(path))
    training, model = made.config.training, load_old()
    length = min(made.config.data.max_seq_len, model.config.max_seq_len)
    texts: list[str] = []
    written, batch = 0, 0
    with display.counting_tokens("Writing text to replay", num_tokens) as report:
        while written < num_tokens:
            options = OWN_TEXT.model_copy(update={"max_new_tokens": length, "seed": training.seed + batch})
            with autocast(next(model.parameters()).device, _precision(training)):
                made_now = generate(model, made.tokenizer, [""] * WRITTEN_AT_ONCE, options, batch_size=WRITTEN_AT_ONCE)
            completions = [completion for completion in made_now if completion.text.strip()]
            if not completions:
                raise ConfigError(
                    f"--self_replay: {made.config.model.model} writes nothing when it begins a document; name text of "
                    "what it knew with --general_data, and replay that: --replay"
                )
            written += sum(len(completion.token_ids) for completion in completions)
            texts += [completion.text for completion in completions]
            batch += 1
            report(min(written, num_tokens))
    write_documents(path, texts)
    return texts


def _anchors(
    load_old: Callable[[], Decoder],
    config: Config,
    model: Decoder,
    texts: dict[str, Validation],
    memory: Memory,
    run: Path,
    display: Display,
) -> Anchors:
    """What pulls the model back to the old one."""
    keeping, training = config.keeping, config.training
    device, precision = pick_device(training.device), _precision(training)
    if not (keeping.l2_sp or keeping.ewc or keeping.kl):
        return Anchors((), ())
    old = load_old()
    weights = {name: parameter.detach() for name, parameter in old.named_parameters()}
    pulls = []
    if keeping.l2_sp:
        pulls.append(WeightAnchor(model, weights, keeping.l2_sp))
    if keeping.ewc:
        earlier = [texts[stage.domain] for stage in memory.earlier if stage.domain in texts]
        fisher = _fisher(old, earlier, training, run / FISHER_FILE, display)
        pulls.append(
            WeightAnchor(model, weights, keeping.ewc, {name: value.to(device) for name, value in fisher.items()})
        )
    predictions = [PredictionAnchor(model, old, keeping.kl, device, precision)] if keeping.kl else []
    return Anchors(pulls, predictions)


def _fisher(
    old: Decoder, earlier: Sequence[Validation], training: TrainingOptions, path: Path, display: Display
) -> dict[str, Tensor]:
    """What each weight means to the held-out text of what was known, each domain alike; worked out once a run."""
    if path.exists():
        return load_file(path)
    total: dict[str, Tensor] = {}
    device, precision = pick_device(training.device), _precision(training)
    for held_out in earlier:
        rows = held_out.rows
        count = min(len(rows), max(1, FISHER_TOKENS // rows.max_seq_len))
        with display.counting_tokens("Estimating what weights matter", count * rows.max_seq_len) as report:
            some = diagonal_fisher(
                old,
                batches_of(rows, 0, 0, count, 1),
                device=device,
                precision=precision,
                seed=training.seed,
                progress=report,
            )
        for name, value in some.items():
            share = value.cpu() / len(earlier)
            total[name] = total[name] + share if name in total else share
    save_file(total, path)
    return total


def _precision(training: TrainingOptions) -> Precision:
    assert training.precision != "auto", "found out before anything is gathered"
    return training.precision
