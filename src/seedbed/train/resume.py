"""Which run folder a command means, and whether it goes on with something that is already there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from seedbed.checkpoint import damage, newest_intact, read_state, remove_leftovers
from seedbed.config import FREE_TO_CHANGE, Config
from seedbed.errors import CheckpointError, ConfigError
from seedbed.runs.folder import FINISHED, RunFolder, read_summary

SHAPE = frozenset(
    [
        "tokenizer",
        "vocab_size",
        "model",
        "arch",
        "d_model",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "d_ff",
        "tie_embeddings",
    ]
)
"""What cannot change between a checkpoint and the run that goes on from it."""


@dataclass(frozen=True)
class Start:
    """Where a run writes and what it begins from."""

    config: Config
    run: RunFolder
    checkpoint: Path | None
    parent: str | None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class AlreadyFinished:
    """The command names a run that has nothing left to do."""

    path: Path
    summary: dict[str, Any]


def open_run(config: Config) -> Start | AlreadyFinished:
    """Lock the run folder that `config` means and find what to go on from.

    Raises:
        ConfigError: the folder holds another run, or options contradict the run that goes on.
        RunInUseError: another process trains there.
        CheckpointError: `--resume_from` is damaged, or the run has only damaged checkpoints.
    """
    if config.watching.resume_from:
        return _branch(config, Path(config.watching.resume_from))
    path, given = _destination(config), config.watching.output is not None
    status = read_summary(path).get("status")
    begun = (path / "config.yaml").exists()
    if not begun:
        return Start(config, RunFolder(path), None, None)
    if not given and (status in FINISHED or not config.watching.resume):
        return Start(config, RunFolder(_next_free(path)), None, None)
    if not config.watching.resume:
        raise ConfigError(
            f"--output {path} holds a run and --no_resume forbids going on with it; choose another --output"
        )
    config = _adopt(config, path, FREE_TO_CHANGE, "unfinished" if status not in FINISHED else "finished")
    if status in FINISHED:
        return AlreadyFinished(path, read_summary(path))
    run = RunFolder(path)
    remove_leftovers(run.checkpoints)
    checkpoint, remarks = newest_intact(run.checkpoints)
    if checkpoint is None and remarks:
        run.close()
        raise CheckpointError(f"{path}: no intact checkpoint to go on from: {'; '.join(remarks)}")
    parent = read_summary(path).get("parent")
    return Start(config, run, checkpoint, parent, tuple(remarks))


def _branch(config: Config, checkpoint: Path) -> Start:
    """Go on from a named checkpoint: in its own run when that is unfinished and has nothing newer, else in a new one."""
    if not (checkpoint / "config.json").is_file():
        raise ConfigError(
            f"--resume_from {checkpoint}: no checkpoint there; expected a folder such as runs/NAME/checkpoints/step-1000"
        )
    if problems := damage(checkpoint):
        raise CheckpointError(f"--resume_from {checkpoint}: damaged: {'; '.join(problems)}")
    old_run = checkpoint.resolve().parent.parent
    config = _adopt(config, old_run, frozenset(config.values()) - SHAPE, "checkpoint's")
    unfinished = read_summary(old_run).get("status") not in FINISHED
    newest = newest_intact(old_run / "checkpoints")[0]
    is_newest = newest is not None and read_state(newest)["step"] == read_state(checkpoint)["step"]
    if config.watching.output is not None:
        path = Path(config.watching.output)
        if (path / "config.yaml").exists() and path.resolve() != old_run:
            raise ConfigError(f"--output {path} holds another run; choose another")
    else:
        path = checkpoint.parent.parent if unfinished and is_newest else _next_free(checkpoint.parent.parent)
    same = path.resolve() == old_run
    if same and not is_newest:
        raise ConfigError(
            f"--output {path} has newer checkpoints than {checkpoint}; choose another --output, nothing is overwritten"
        )
    run = RunFolder(path)
    if not same:
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (old_run / name).exists():
                shutil.copyfile(old_run / name, path / name)
        shutil.copytree(old_run / "tokenizer", path / "tokenizer", dirs_exist_ok=True)
    return Start(config, run, checkpoint, read_summary(path).get("parent") if same else str(checkpoint))


def _adopt(config: Config, path: Path, free: frozenset[str], kind: str) -> Config:
    """The saved options of the run at `path`, with the explicitly given ones that are `free` to differ."""
    try:
        saved = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        sources = saved.pop("sources")
    except (OSError, yaml.YAMLError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}/config.yaml is not readable: {error}") from None
    now = config.values()
    given = {name for name in now if config.is_given(name) and now[name] not in (saved.get(name), "auto")}
    if contradictions := sorted(given - free):
        listed = "; ".join(f"--{name} {now[name]} (the run has {saved.get(name)})" for name in contradictions)
        raise ConfigError(
            f"{path} is an {kind} run with other options: {listed}. "
            "Leave them out to go on with it, or choose another --output for a new run"
        )
    keep = {
        name: saved[name]
        for name in now
        if name in saved and name not in given and name not in ("resume", "resume_from", "output")
    }
    return config.adopt(keep, sources)


def _destination(config: Config) -> Path:
    if config.watching.output is not None:
        return Path(config.watching.output)
    text = Path(config.data.data or "").stem or "text"
    return Path("runs") / f"{text.replace('*', '')}-{Path(config.model.model).name}"


def _next_free(path: Path) -> Path:
    number = 2
    while path.with_name(f"{path.name}-{number}").exists():
        number += 1
    return path.with_name(f"{path.name}-{number}")
