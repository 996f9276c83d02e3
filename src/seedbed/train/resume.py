"""Which run folder a command means, and whether it goes on with something that is already there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from seedbed import distributed
from seedbed.checkpoint import damage, is_model_folder, newest_intact, read_state, remove_leftovers
from seedbed.config import FREE_TO_CHANGE, OF_ONE_RUN, WITH_LORA, Config
from seedbed.errors import CheckpointError, ConfigError
from seedbed.parsing import parse_yaml
from seedbed.runs.folder import FINISHED, ReadOnlyRunFolder, RunFolder, read_summary
from seedbed.runs.info import is_run

FURTHER = "to train it further, give --resume_from {}/checkpoints/final, more --epochs and a new --output"
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
        "chat_template",
        "add_tokens",
        "last_blocks",
        "freeze",
        "lora",
        "lora_r",
        "lora_alpha",
        "lora_targets",
        "lora_rslora",
        "lora_dora",
        "lora_embeddings",
        "domain",
        "rollback_to",
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
    """The run folder that `config` means and what to go on from; of several processes the first finds them.

    Raises:
        SeedbedError: see `_open`; or the first process's run folder is not there for this one.
    """
    if distributed.size() == 1:
        return _open(config)
    opened: list[Start | AlreadyFinished] = []

    def open_here() -> dict[str, Any]:
        opened.append(_open(config))
        return _start_to_json(opened[0])

    told = distributed.on_first(open_here)
    distributed.together(lambda: _require_shared(Path(told["path"])))
    return opened[0] if opened else _start_from_json(config, told)


def _require_shared(path: Path) -> None:
    if not path.is_dir():
        raise ConfigError(f"--output {path}: not here; it must be on a disk that all machines of a run share")


def _start_to_json(opened: Start | AlreadyFinished) -> dict[str, Any]:
    """What the other processes need to know of what the first one found."""
    if isinstance(opened, AlreadyFinished):
        return {"path": str(opened.path.resolve()), "summary": opened.summary}
    return {
        "path": str(opened.run.path.resolve()),
        "regime": opened.config.regime,
        "values": opened.config.values(),
        "sources": dict(opened.config.sources),
        "checkpoint": opened.checkpoint and str(opened.checkpoint.resolve()),
        "parent": opened.parent,
        "remarks": opened.remarks,
    }


def _start_from_json(config: Config, told: dict[str, Any]) -> Start | AlreadyFinished:
    path = Path(told["path"])
    if "summary" in told:
        return AlreadyFinished(path, told["summary"])
    config = replace(config, regime=told["regime"]).adopt(told["values"], told["sources"])
    checkpoint = Path(told["checkpoint"]) if told["checkpoint"] else None
    return Start(config, ReadOnlyRunFolder(path), checkpoint, told["parent"], tuple(told["remarks"]))


def _open(config: Config) -> Start | AlreadyFinished:
    """Lock the run folder that `config` means and find what to go on from.

    Raises:
        ConfigError: the folder holds another run, or options contradict the run that goes on.
        RunInUseError: another process trains there.
        CheckpointError: `--resume_from` is damaged, or the run has only damaged checkpoints.
    """
    if config.watching.resume_from:
        return _branch(config, Path(config.watching.resume_from))
    path = _destination(config)
    if not is_run(path):
        if any(is_model_folder(checkpoint) for checkpoint in path.glob("checkpoints/*")):
            raise CheckpointError(
                f"{path}: checkpoints, and no config.yaml that says what run they are of; put it back, "
                "or choose another --output"
            )
        return Start(config, RunFolder(path), None, None)
    if not config.watching.resume:
        raise ConfigError(f"--output {path} holds a run and --no_resume forbids to go on; choose another --output")
    config = _adopt(config, path, FREE_TO_CHANGE)
    if _finished(path):
        return AlreadyFinished(path, read_summary(path))
    run = RunFolder(path)
    remove_leftovers(run.checkpoints)
    checkpoint, remarks = newest_intact(run.checkpoints)
    if checkpoint is None and remarks:
        run.close()
        raise CheckpointError(f"{path}: no intact checkpoint to go on from: {'; '.join(remarks)}")
    return Start(config, run, checkpoint, read_summary(path).get("parent"), tuple(remarks))


def _branch(config: Config, checkpoint: Path) -> Start:
    """Go on from a named checkpoint: in its own run if nothing there is newer, else in a run of its own."""
    if not is_model_folder(checkpoint):
        raise ConfigError(
            f"--resume_from {checkpoint}: no checkpoint there; expected one such as runs/NAME/checkpoints/step-1000"
        )
    if problems := damage(checkpoint):
        raise CheckpointError(f"--resume_from {checkpoint}: damaged: {'; '.join(problems)}")
    old = checkpoint.resolve().parent.parent
    config = _adopt(config, old, frozenset(config.values()) - SHAPE)
    newest, _ = newest_intact(old / "checkpoints")
    is_newest = newest is not None and read_state(newest)["step"] == read_state(checkpoint)["step"]
    given = config.watching.output
    path = _destination(config) if given else old if is_newest and not _finished(old) else _next_free(old)
    if path.resolve() == old and is_newest:
        return Start(config, RunFolder(path), checkpoint, read_summary(old).get("parent"))
    if is_run(path):
        raise ConfigError(f"--output {path} holds a run that this would overwrite; choose another --output")
    run = RunFolder(path)
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (old / name).exists():
            shutil.copyfile(old / name, path / name)
    return Start(config, run, checkpoint, str(checkpoint))


def _adopt(config: Config, path: Path, free: frozenset[str]) -> Config:
    """The saved options of the run at `path`, with the explicitly given ones that are `free` to differ."""
    try:
        saved = parse_yaml((path / "config.yaml").read_text(encoding="utf-8"))
        sources = {str(name): str(source) for name, source in saved.pop("sources").items()}
        regime = saved.pop("regime", "scratch")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}/config.yaml is not readable: {error}") from None
    if regime == WITH_LORA.get(config.regime) and config.watching.resume_from:
        config = replace(config, regime=regime)  # the checkpoint knows what it is
    if regime != config.regime:
        raise ConfigError(
            f"{path} holds a run of another kind ({regime}, and this command means {config.regime}); "
            "choose another --output"
        )
    now = config.values()
    given = {name for name in now if config.is_given(name) and now[name] not in (saved.get(name), "auto")}
    if contradictions := sorted(given - free):
        listed = "; ".join(f"--{name} {now[name]} (the run has {saved.get(name)})" for name in contradictions)
        raise ConfigError(
            f"the run {path} was begun with other options: {listed}; "
            f"{FURTHER.format(path) if _finished(path) else 'leave them out to go on with it'}, or choose another "
            "--output for a new run"
        )
    own = OF_ONE_RUN | given
    if given & {"warmup_steps", "warmup_ratio"}:
        own |= {"warmup_steps", "warmup_ratio"}  # one stands for the other
    return config.adopt({name: saved[name] for name in now if name in saved and name not in own}, sources)


def _destination(config: Config) -> Path:
    """The folder that was named; else one named after data and model, the newest that is not finished."""
    if config.watching.output is not None:
        return Path(config.watching.output)
    text = config.keeping.domain or Path(config.data.data or "").stem.replace("*", "") or "text"
    kind = "-lora" if config.with_lora else ""
    path = Path("runs") / f"{text}-{_model_name(config.model.model)}{kind}"
    if not is_run(path):
        return path
    *_, newest = takewhile(Path.exists, _numbered(path))
    return _next_free(path) if _finished(newest) or not config.watching.resume else newest


def _model_name(model: str) -> str:
    """What a model is called: the last part of its path; for a checkpoint, the name of its run."""
    path = Path(model)
    return path.resolve().parent.parent.name if path.resolve().parent.name == "checkpoints" else path.name


def _finished(path: Path) -> bool:
    return read_summary(path).get("status") in FINISHED


def _next_free(path: Path) -> Path:
    return next(candidate for candidate in _numbered(path) if not candidate.exists())


def _numbered(path: Path) -> Iterator[Path]:
    """`path`, `path-2`, `path-3`, ..."""
    yield path
    yield from (path.with_name(f"{path.name}-{number}") for number in count(2))
