"""What holds a model to what it knew: earlier text among its rows, and anchors to its old weights and predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from seedbed.config import Config, SamplingOptions, TrainingOptions
from seedbed.data import Reading
from seedbed.data.replay import MixedRows, replay_rows, replay_targets
from seedbed.data.rows import Rows
from seedbed.device import Precision, autocast, pick_device
from seedbed.errors import ConfigError
from seedbed.generate import generate
from seedbed.model.decoder import Decoder
from seedbed.runs.history import BASE, Stage, read_documents, write_documents
from seedbed.runs.info import was_taught_to_answer
from seedbed.text.template import find_template
from seedbed.train.continual.anchors import PredictionAnchor, WeightAnchor, diagonal_fisher
from seedbed.train.continual.memory import FISHER_FILE, SELF_REPLAY_FILE, Memory
from seedbed.train.corpus import store_documents
from seedbed.train.ingredients import Prepared
from seedbed.train.job import Validation, batches_of
from seedbed.train.length import step_limit, steps_per_epoch
from seedbed.train.progress import Display

OWN_TEXT = SamplingOptions(temperature=1.0, top_k=0, repetition_penalty=1.0)
"""How a model writes text that stands for what it knew: exactly as it would predict it."""
WRITTEN_AT_ONCE = 32
FISHER_TOKENS = 8192  # of each domain


def reading_of_stored(stage: Stage, reading: Reading) -> Reading:
    """How the stored documents of a stage become tokens, where the run's own are read so."""
    if stage.format == "text":
        return Reading(reading.tokenizer)
    if reading.template is not None:
        return reading
    taught = stage.domain != BASE or was_taught_to_answer(Path(stage.model))
    return Reading(reading.tokenizer, find_template(reading.tokenizer, None, stage.format, taught=taught))


def rows_with_replay(
    prepared: Prepared, memory: Memory, load_old: Callable[[], Decoder], run: Path, display: Display
) -> Rows:
    """The new domain's rows, and beside them in their shares the stored text and the model's own."""
    config, new = prepared.config, prepared.corpus.rows
    keeping, data, seed = config.keeping, config.data, config.training.seed
    stored = [stage for stage in memory.earlier if stage.reserve_bytes] if keeping.replay else []
    replay, self_replay = keeping.replay or 0.0, keeping.self_replay or 0.0
    if not replay and not self_replay:
        return new
    # Of the tokens that are not the other kind's, so that both have their shares of all.
    targets = replay_targets(new.num_targets, replay / (1 - self_replay), len(stored)) if stored else []
    parts = [new]
    for stage, num_targets in zip(stored, targets, strict=True):
        reading = reading_of_stored(stage, prepared.reading)
        documents = memory.reserve(stage.domain)
        store = store_documents(documents, stage.format, reading, f"the reserve of {stage.domain}", display)
        if num_targets:
            everything = np.arange(store.num_documents)
            parts.append(replay_rows(store, everything, data.max_seq_len, seed, num_targets, packing=data.packing))
    if self_replay:
        [num_targets] = replay_targets(new.num_targets, self_replay / (1 - replay), 1)
        needed = math.ceil(num_targets * _share_of_epoch(config.training, new))
        documents = own_texts(prepared, load_old, needed, run / SELF_REPLAY_FILE, display)
        store = store_documents(documents, "text", Reading(prepared.tokenizer), "the model's own text", display)
        everything = np.arange(store.num_documents)
        parts.append(replay_rows(store, everything, data.max_seq_len, seed, num_targets))
    mixed = MixedRows(parts, seed)
    old = sum(part.num_targets for part in parts[1:])
    display.line(f"Replayed: {old:,} tokens an epoch, {old / mixed.num_targets:.2%} of all")
    return mixed


def _share_of_epoch(training: TrainingOptions, rows: Rows) -> float:
    """How much of an epoch a run of few steps gets to see."""
    steps = steps_per_epoch(training, rows)
    return min(1.0, (step_limit(training, rows) or steps) / steps)


def own_texts(
    prepared: Prepared, load_old: Callable[[], Decoder], num_tokens: int, path: Path, display: Display
) -> list[str]:
    """Texts that a model writes from the beginning of a document, of `num_tokens` together; written once a run.

    They come from the model alone: no text of any data leads them.

    Raises:
        ConfigError: it ends every document at once.
    """
    if path.exists():
        return list(read_documents(path))
    config, training, model = prepared.config, prepared.config.training, load_old()
    length = min(config.data.max_seq_len, model.config.max_seq_len)
    texts: list[str] = []
    written, batch = 0, 0
    with display.counting_tokens("Writing text to replay", num_tokens) as report:
        while written < num_tokens:
            options = OWN_TEXT.model_copy(update={"max_new_tokens": length, "seed": training.seed + batch})
            with autocast(next(model.parameters()).device, _precision(training)):
                written_now = generate(
                    model, prepared.tokenizer, [""] * WRITTEN_AT_ONCE, options, batch_size=WRITTEN_AT_ONCE
                )
            completions = [completion for completion in written_now if completion.text.strip()]
            if not completions:
                raise ConfigError(
                    f"--self_replay: {config.model.model} writes nothing when it begins a document; name text of "
                    "what it knew with --general_data, and replay that: --replay"
                )
            written += sum(len(completion.token_ids) for completion in completions)
            texts += [completion.text for completion in completions]
            batch += 1
            report(min(written, num_tokens))
    write_documents(path, texts)
    return texts


@dataclass(frozen=True)
class Anchors:
    """What pulls the model back while it learns."""

    of_weights: Sequence[WeightAnchor]
    of_predictions: Sequence[PredictionAnchor]


def make_anchors(
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
