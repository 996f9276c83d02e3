"""What a model remembers of its domains: the history in its folder, and the texts that are kept with it.

RUN/history/, which every checkpoint of the run carries as its `seedbed/`:
    history.json                        the stages, the one being learnt last; written when the rest is there
    domains/DOMAIN/held_out.jsonl       to measure what is forgotten
    domains/DOMAIN/reserve.jsonl        training text, to replay
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from seedbed.adapter import WEIGHTS_FILE as ADAPTER_WEIGHTS
from seedbed.checkpoint import MANIFEST
from seedbed.config import Config, TextOptions
from seedbed.data import Source
from seedbed.data.conversations import from_document
from seedbed.data.overlap import NAME as OVERLAP
from seedbed.data.overlap import require_no_overlap
from seedbed.data.store import digest
from seedbed.disk import sha256_of
from seedbed.errors import CheckpointError, ConfigError, DataError, SeedbedError
from seedbed.model.hub import copy_pretrained, new_folder
from seedbed.model.weights import weights_fingerprint
from seedbed.parsing import parse_yaml
from seedbed.runs import info
from seedbed.runs.history import (
    BASE,
    FILE,
    History,
    Stage,
    read_documents,
    read_history,
    read_history_file,
    write_documents,
    write_history,
)
from seedbed.train.corpus import Texts, open_run_texts, open_texts
from seedbed.train.finetune import base_folder
from seedbed.train.progress import Display

HELD_OUT_BYTES = 1_000_000  # of each domain: enough for a loss to three digits, and soon measured
SELF_REPLAY_FILE, FISHER_FILE = "self_replay.jsonl", "fisher.safetensors"
"""In the run folder: what is worked out once, before the first step."""


@dataclass(frozen=True)
class Memory:
    """A history and the folder that holds it and the texts of its domains."""

    folder: Path
    history: History
    origin: Path
    """The model that is changed."""

    @property
    def learning(self) -> Stage:
        """The domain that is being learnt."""
        return self.history.stages[-1]

    @property
    def earlier(self) -> tuple[Stage, ...]:
        """What was known before it."""
        return self.history.stages[:-1]

    def held_out(self, domain: str) -> list[str]:
        """Documents that no run learnt from."""
        return self._documents(domain, "held_out")

    def reserve(self, domain: str) -> list[str]:
        """Documents to replay."""
        return self._documents(domain, "reserve")

    def _documents(self, domain: str, kind: str) -> list[str]:
        path = _text_file(self.folder, domain, kind)
        return list(read_documents(path)) if path.exists() else []

    def with_learning(self, stage: Stage) -> Memory:
        """The same with another account of the domain that is being learnt."""
        return replace(self, history=self.history.with_stage(stage))

    def without_learning(self, folder: Path) -> Memory:
        """What was remembered before that domain, in a new `folder`."""
        for stage in self.earlier:
            _copy_texts(self.folder, folder, stage)
        return replace(self, folder=folder, history=History(self.earlier))

    def keep(self) -> None:
        """Write the history, last of all files."""
        write_history(self.folder / FILE, self.history)


def begin_memory(config: Config, run: Path, display: Display) -> Memory:
    """What the model of `config` remembers, and the new domain as a stage without figures.

    The texts are copied into the run; `Memory.keep` makes it one that `recall` finds.

    Raises:
        ConfigError: the domain was learnt before, or there is none of `--rollback_to`.
        CheckpointError: the folder of an earlier stage is missing or has changed.
        DataError: a text cannot be read.
    """
    keeping, data = config.keeping, config.data
    here = base_folder(config.model.model)
    history, origin = known_stages(here, keeping.rollback_to)
    assert keeping.domain is not None
    _require_new(keeping.domain, history, config.model.model)
    folder = run / "history"
    forget(run)
    for stage in history.stages:
        _copy_texts(here / "seedbed", folder, stage)
    history = history.with_stage(_with_general_text(config, history.stages[0], folder, display))
    texts = open_texts(data)
    stage = Stage(
        domain=keeping.domain,
        model="",
        fingerprint="",
        run=str(run.resolve()),
        data=data.data,
        format=texts.train.format,
        max_seq_len=data.max_seq_len,
    )
    history = history.with_stage(_keep_texts(folder, stage, texts, keeping.reserve_mb))
    return Memory(folder, history, origin)


def _require_new(domain: str, history: History, model: str) -> None:
    """Raise ConfigError when the model has learnt a domain of this name, without regard to case, as some disks do."""
    learnt = next((stage for stage in history.stages if stage.domain.lower() == domain.lower()), None)
    if learnt:
        when = f"from {learnt.data}, in {learnt.run}" if learnt.run else "before its first domain"
        raise ConfigError(
            f"--domain {domain}: {model} has learnt a domain of this name already ({when}); "
            "choose another name, or go back to the time before it with --rollback_to"
        )


def forget(run: Path) -> None:
    """Remove what a command that came to nothing has left in the run folder."""
    shutil.rmtree(run / "history", ignore_errors=True)
    for name in (SELF_REPLAY_FILE, FISHER_FILE):
        (run / name).unlink(missing_ok=True)


def recall(run: Path, config: Config) -> Memory | None:
    """The memory of a run that goes on; None when it had not yet got that far."""
    history = read_history_file(run / "history" / FILE) if info.is_run(run) else None
    if history is None:
        return None
    _, origin = known_stages(base_folder(config.model.model), config.keeping.rollback_to)
    memory = Memory(run / "history", history, origin)
    # Whether the stage has ended is for the checkpoint to say, which has these figures only with the weights.
    return memory.with_learning(replace(memory.learning, model="", fingerprint="", after={}))


def known_stages(folder: Path, last: str | None, flag: str = "--rollback_to") -> tuple[History, Path]:
    """The stages of the model in `folder`, up to `last` or all of them, and the folder of the last one.

    `flag` is what `last` was given with, for messages.

    Raises:
        ConfigError: there is no such stage.
        CheckpointError: its folder is missing, or its weights are others.
    """
    history = read_history(folder)
    if history is None:
        if last:
            raise ConfigError(f"{flag} {last}: {folder} has no history of domains; leave it out")
        return History(
            (Stage(domain=BASE, model=str(folder.resolve()), fingerprint=model_fingerprint(folder)),)
        ), folder
    newest = replace(history.stages[-1], model=str(folder.resolve()), fingerprint=model_fingerprint(folder))
    history = history.with_stage(newest)
    if last is None:
        return history, folder
    stage = history.stage(last)
    if stage is None:
        raise ConfigError(f"{flag} {last}: {folder} has learnt no such domain; it knows {', '.join(history.domains)}")
    back = folder if stage == newest else find_stage(folder, stage)
    return History(history.stages[: history.stages.index(stage) + 1]), back


def find_stage(folder: Path, stage: Stage) -> Path:
    """The model folder of a stage in the history of `folder`, checked to be the one that was left there.

    Where it was, or beside the run of `folder`, if all runs were moved together.

    Raises:
        CheckpointError: it is missing, or has changed.
    """
    beside = folder.resolve().parents[:3][-1].joinpath(*Path(stage.model).parts[-3:])  # RUN/checkpoints/best
    there = next((path for path in (Path(stage.model), beside) if stage.model and path.is_dir()), None)
    remedy = f"put the folder back, or name the model of another stage with --model; {folder} itself is untouched"
    if there is None:
        raise CheckpointError(f"{folder}: its stage {stage.domain!r} was {stage.model}, and that is gone; {remedy}")
    if stage.fingerprint and model_fingerprint(there) != stage.fingerprint:
        raise CheckpointError(
            f"{folder}: its stage {stage.domain!r} was {stage.model}, which holds other weights now; {remedy}"
        )
    return there


def stage_folder(model: str, domain: str) -> Path:
    """The model as it was after `domain`, which its history knows.

    Raises:
        ConfigError: it has no history, or there is no such domain in it.
        CheckpointError: that stage's folder is missing, or has changed.
    """
    return known_stages(base_folder(model), domain, "--domain")[1]


def copy_stage(model: str, domain: str, output: Path) -> Path:
    """Copy the model as it was after `domain` to a new folder; returns where it was.

    Raises:
        ConfigError: no such stage, or `output` is there already.
        CheckpointError: the stage's folder is missing, or has changed.
    """
    folder = known_stages(base_folder(model), domain)[1]
    if (folder / MANIFEST).is_file():
        with new_folder(output) as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
    else:
        copy_pretrained(folder, output)
    return folder


def model_fingerprint(folder: Path) -> str:
    """SHA-256 of a folder's weights, or of its adapter's file.

    Raises:
        CheckpointError: files missing or damaged.
    """
    if (folder / "config.json").is_file():
        return weights_fingerprint(folder)
    try:
        return sha256_of(folder / ADAPTER_WEIGHTS)
    except OSError as error:
        raise CheckpointError(f"{folder}: {ADAPTER_WEIGHTS} cannot be read ({error.strerror})") from None


def containing_run(folder: Path) -> Path | None:
    """The run folder that a checkpoint stands in."""
    run = info.run_of(folder)
    return None if run == folder else run


def trained_with(folder: Path) -> dict[str, Any]:
    """The options of the run that made a checkpoint; empty for a model from elsewhere, or when they are damaged."""
    run = containing_run(folder)
    if run is None:
        return {}
    try:
        values = parse_yaml((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _with_general_text(config: Config, base: Stage, folder: Path, display: Display) -> Stage:
    """The stage before any domain with text for what was known by then: `--general_data`, else what it learnt from.

    Raises:
        ConfigError: it has text already.
        DataError: `--general_data` cannot be read, or not be divided.
    """
    name, reserve_mb = config.keeping.general_data, config.keeping.reserve_mb
    if base.held_out_bytes:
        if name:
            raise ConfigError(
                f"--general_data {name}: {config.model.model} remembers general text already ({base.data}); "
                "leave it out"
            )
        return base
    if name:
        options = TextOptions(data=name, val_split=config.data.val_split or 0.1)
        try:
            texts = open_texts(options)
            if texts.validation is None and _is_one_document(texts.train):
                raise DataError(
                    f"--data {name} is one document, and a part of it has to be held out; give text of several"
                )
            return _keep_texts(folder, replace(base, data=name, format=texts.train.format), texts, reserve_mb)
        except DataError as error:
            raise DataError(str(error).replace("--data ", "--general_data ")) from None
    run = containing_run(Path(base.model))
    values = trained_with(Path(base.model))
    if not run or not values.get("data"):
        return base
    try:
        texts = open_run_texts(values, str(run))
        return _keep_texts(folder, replace(base, data=values["data"], format=texts.train.format), texts, reserve_mb)
    except SeedbedError as error:
        display.line(f"Note: the text that {run} learnt from cannot be read now ({error})")
        return base


def _is_one_document(source: Source) -> bool:
    documents = source.documents()
    first = next(documents)
    return all(document == first for document in documents)


def _keep_texts(folder: Path, stage: Stage, texts: Texts, reserve_mb: float) -> Stage:
    """Write a domain's held-out text and its reserve, as much as is kept of them."""
    kept, whole = int(reserve_mb * 1e6), texts.are_conversations
    held_out = some_documents(texts.held_out_documents, HELD_OUT_BYTES, whole=whole) if texts.hold_out else []
    reserve = some_documents(texts.training_documents, kept, whole=whole) if kept else []
    return replace(
        stage,
        held_out_documents=len(held_out),
        held_out_bytes=write_documents(_text_file(folder, stage.domain, "held_out"), held_out),
        reserve_documents=len(reserve),
        reserve_bytes=write_documents(_text_file(folder, stage.domain, "reserve"), reserve),
    )


def some_documents(read: Callable[[], Iterator[str]], limit: int, *, whole: bool = False) -> list[str]:
    """Documents of at most `limit` bytes together, chosen by the digest of their text and in their order.

    Any document alone above the limit is passed over; when all are, the beginning of the first is taken, or nothing
    where only `whole` documents mean something.
    """
    facts = np.array([(digest(raw), len(raw)) for raw in (text.encode() for text in read())], dtype=np.uint64)
    order = np.argsort(facts[:, 0], kind="stable")  # (documents,)
    order = order[facts[order, 1] <= limit]
    chosen = set(order[np.cumsum(facts[order, 1]) <= limit].tolist())
    if not chosen:
        beginning = "" if whole else next(read()).encode()[:limit].decode(errors="ignore")
        return [beginning] if beginning.strip() else []
    return [text for number, text in enumerate(read()) if number in chosen]


def _plain(documents: Iterable[str], format: str) -> Iterator[str]:
    """Texts as they are; of conversations what is said in them, but for system prompts, which rows share."""
    for document in documents:
        if format == "text":
            yield document
        else:
            yield "\n".join(said["content"] for said in from_document(document) if said["role"] != "system")


def refuse_overlap(memory: Memory, config: Config, display: Display) -> None:
    """Raise DataError when a figure would be measured on text that is learnt, now or again."""
    if OVERLAP in config.watching.allow:
        return
    texts, learning, val_data = open_texts(config.data), memory.learning, config.data.val_data
    with display.working("Comparing held-out text with the training text"):
        for stage in memory.history.stages:
            held_out = list(_plain(memory.held_out(stage.domain), stage.format))
            is_new = stage == learning
            what = f"held-out text of {stage.domain} ({(val_data if is_new else None) or stage.data})"
            if held_out and (val_data or not is_new):
                train = _plain(texts.training_documents(), learning.format)
                require_no_overlap(train, held_out, what=what, where=f"--data {config.data.data}")
            for other in memory.earlier if held_out and config.keeping.replay else ():
                # As new text it was compared with all that was measured then, and when it was replayed as well.
                if other != stage and stage.domain not in other.before and not stage.method.get("replay"):
                    reserve = _plain(memory.reserve(other.domain), other.format)
                    where = f"replayed from {other.domain} ({other.data})"
                    require_no_overlap(reserve, held_out, what=what, where=where)


def _text_file(folder: Path, domain: str, kind: str) -> Path:
    return folder / "domains" / domain / f"{kind}.jsonl"


def _copy_texts(source: Path, folder: Path, stage: Stage) -> None:
    """Link or copy what is kept of a stage.

    Raises:
        CheckpointError: it is missing, or damaged.
    """
    for kind, num_bytes in (("held_out", stage.held_out_bytes), ("reserve", stage.reserve_bytes)):
        old, new = _text_file(source, stage.domain, kind), _text_file(folder, stage.domain, kind)
        if not num_bytes:
            continue
        for _ in read_documents(old):
            pass
        new.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            os.link(old, new)
            continue
        shutil.copyfile(old, new)
