"""Checkpoints on disk: a transformers model folder, and beside it in `seedbed/` what training needs to go on.

    NAME/config.json, model.safetensors, generation_config.json, tokenizer.json, ...
    NAME/adapter_config.json, adapter_model.safetensors instead of the model's, where an adapter was trained
    NAME/seedbed/state.json             step, tokens, best value, patience, seconds used, ...
    NAME/seedbed/optimizer.safetensors  the optimizer's tensors by parameter name; of processes that share a model
                                        optimizer-00001-of-00004.safetensors and so on, one below the other
    NAME/seedbed/manifest.json          size and SHA-256 of every other file; written last

A checkpoint is made in a hidden folder, flushed to the disk and renamed into place, so a folder with
its final name is whole. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seedbed import distributed
from seedbed.adapter import CONFIG_FILE as ADAPTER_FILE
from seedbed.adapter import base_name, load_adapter, save_adapter
from seedbed.device import pick_device
from seedbed.disk import expanded, flush, sha256_of
from seedbed.errors import CheckpointError, ConfigError, StorageError
from seedbed.model.config import DecoderConfig
from seedbed.model.decoder import Base, Decoder
from seedbed.model.hub import find_pretrained
from seedbed.model.weights import load_decoder, save_decoder, weights_fingerprint
from seedbed.parsing import parse_json
from seedbed.text.tokenizer import Tokenizer

STATE = "seedbed/state.json"
OPTIMIZER = "seedbed/optimizer.safetensors"
MANIFEST = "seedbed/manifest.json"
LONGEST_NAME = 255
LARGEST_JSON = 2**28  # bytes of a state or a manifest
LAST_STEP = 2**63
READERS = 2  # files whose digests are worked out at once


def save_checkpoint(
    folder: Path,
    model: Decoder,
    tokenizer: Tokenizer,
    optimizer: Mapping[str, Tensor] | None,
    state: Mapping[str, Any],
    companions: Path | None = None,
) -> None:
    """Write a checkpoint to `folder`, replacing one that is there only once the new one is whole.

    The files below `companions` go along in `seedbed/`; without an `optimizer` its parts are among them.

    Raises:
        StorageError: the disk is full or refuses; `folder` is as it was before.
    """
    weights = (p.nbytes for p in model.parameters() if model.adapter is None or p.requires_grad)
    needed = sum(weights) + sum(tensor.nbytes for tensor in (optimizer or {}).values())
    with _written_whole(folder, needed) as temporary, _sealed(temporary) as begin_with:
        (temporary / "seedbed").mkdir()
        if optimizer is not None:
            save_file(dict(optimizer), temporary / OPTIMIZER)
            begin_with(OPTIMIZER)  # the largest file, while the others are written
        if model.adapter is None:
            save_decoder(model, temporary, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.end_ids)
        else:
            save_adapter(model, temporary)
        tokenizer.save(temporary)
        (temporary / STATE).write_text(json.dumps(state, indent=2, allow_nan=False), encoding="utf-8")
        _add_companions(temporary, companions)


def link_checkpoint(source: Path, folder: Path, state: Mapping[str, Any], companions: Path | None = None) -> None:
    """Save `state` with the model and optimizer of the checkpoint `source`, sharing its files where
    the file system can, so that one step under two names takes the room of one.

    Files below `companions` replace those of the same name that went along with it. `folder` may be `source`.

    Raises:
        StorageError: the disk is full or refuses; `folder` is as it was before.
    """
    with _written_whole(folder) as temporary, _sealed(temporary, {} if companions else _entries_but_state(source)):
        shutil.copytree(source, temporary, copy_function=_link_or_copy, dirs_exist_ok=True)
        for name in (STATE, MANIFEST):
            (temporary / name).unlink()
        (temporary / STATE).write_text(json.dumps(state, indent=2, allow_nan=False), encoding="utf-8")
        _add_companions(temporary, companions)


def damage(folder: Path) -> list[str]:
    """What is wrong with the files of a checkpoint, each file named; empty when every byte is right.

    Raises:
        CheckpointError: it has no readable manifest to check against.
    """
    try:
        files = _manifest_entries(folder)
        expected = [(_inside(name), int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()]
        if STATE not in files or not {"config.json", ADAPTER_FILE} & set(files):
            raise ValueError("files are missing in it")
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no {MANIFEST}; a checkpoint of ours has one, a foreign folder cannot be verified"
        ) from None
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged") from None
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda entry: _damage_of(folder, *entry), expected))
    ours = (path.relative_to(folder).as_posix() for path in (folder / "seedbed").rglob("*") if not path.is_dir())
    found += [f"{name}: not of this checkpoint" for name in sorted(ours) if name not in {MANIFEST, *files}]
    return [problem for problem in found if problem]


def _damage_of(folder: Path, name: str, size: int, digest: str) -> str | None:
    path = folder / name
    try:
        if not path.is_file():
            return f"{name}: missing"
        if path.stat().st_size != size:
            return f"{name}: {path.stat().st_size} bytes instead of {size}"
        return None if sha256_of(path) == digest else f"{name}: its bytes have changed since it was written"
    except OSError as error:  # of the disk, or a name that no file can have
        return f"{name[:LONGEST_NAME]}: cannot be read ({error.strerror})"


def _inside(name: str) -> str:
    """A file's name in a manifest, which never leads out of the folder."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name} leads out of the folder")
    return name


def newest_intact(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint with the most steps that is whole, and why newer ones were passed over."""
    remarks: list[str] = []
    for folder in sorted(_folders(checkpoints), key=_step_of, reverse=True):
        try:
            problems = damage(folder)
        except CheckpointError as error:
            problems = [str(error)]
        if not problems:
            return folder, remarks
        remarks.append(f"{folder} is damaged ({'; '.join(problems)})")
    return None, remarks


def is_model_folder(folder: Path) -> bool:
    """Whether a model's files are here, or an adapter's."""
    return (folder / "config.json").is_file() or (folder / ADAPTER_FILE).is_file()


def find_model(path: str | Path, named: str = "--model") -> Path:
    """The model folder meant by `path`: itself, or for a run folder its best, final or newest checkpoint.

    named: what messages call the path.

    Raises:
        ConfigError: there is no such folder.
        CheckpointError: a run without a checkpoint, or a folder without a model.
    """
    folder = Path(expanded(path))
    if str(path) and is_model_folder(folder):
        return folder
    if not str(path) or not folder.is_dir():
        raise ConfigError(f"{named} {path}: no such folder; expected a model folder, a checkpoint or a run")
    checkpoints = folder / "checkpoints"
    for name in ("best", "final"):
        if is_model_folder(checkpoints / name):
            return checkpoints / name
    newest, remarks = newest_intact(checkpoints)
    if newest is None:
        why = "; ".join(remarks) or f"neither a config.json, an {ADAPTER_FILE} nor a run's checkpoints"
        raise CheckpointError(f"{folder}: holds no model ({why})")
    return newest


def load_model(path: str | Path, device: str = "cpu") -> tuple[Decoder, Tokenizer]:
    """The model and tokenizer of a checkpoint, a run or a transformers folder, every byte of ours checked.

    The model comes in float32, in evaluation mode, on `device` (as `--device` names it). The folder of an
    adapter gives its base with the adapter on it, not merged, and the base's tokenizer if it has none itself.

    Raises:
        CheckpointError: a damaged or incomplete folder, or an adapter whose base is missing or another one.
        ConfigError: no such folder, or a tokenizer with more tokens than the model.
    """
    folder = find_model(path)
    require_intact(folder)
    if (folder / ADAPTER_FILE).is_file():
        base = find_base(folder)
        model = _load_base(base)
        load_adapter(model, folder)
    else:
        model = load_decoder(folder)
    tokenizer = Tokenizer.load(tokenizer_folder(folder))
    require_match(model.config, tokenizer, str(folder))
    return (model if distributed.without_weights() else model.to(pick_device(device))).eval(), tokenizer


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a model folder is: PEFT leaves an adapter's with its base."""
    own = any((folder / name).is_file() for name in ("config.json", "tokenizer.json", "vocab.json"))
    return folder if own else find_base(folder)


def find_base(folder: Path) -> Path:
    """The model folder of an adapter's base: where its config says, from here or from its own folder, or on the hub.

    Raises:
        CheckpointError: it is not there, or is an adapter itself.
    """
    name = base_name(folder)
    there = next((path for path in (Path(name), folder / name) if path.is_dir()), None)
    if there is None:
        try:
            there = find_pretrained(name, "base_model_name_or_path")
        except ConfigError as error:
            raise CheckpointError(
                f"{folder}: an adapter, and its base model {name} is not here ({error}). Put that model's folder, or a "
                "link to it, where this path leads from the current folder or from the adapter's"
            ) from None
    base = find_model(there)
    if (base / ADAPTER_FILE).is_file():
        raise CheckpointError(f"{folder}: its base {base} is an adapter itself; merge that one into a model first")
    return base


def _load_base(folder: Path) -> Decoder:
    require_intact(folder)
    model = load_decoder(folder)
    model.base = Base(str(folder), weights_fingerprint(folder))
    return model


def require_intact(folder: Path) -> None:
    """Check every byte of a folder of ours; another program's has nothing to check against.

    Raises:
        CheckpointError: damaged; names a checkpoint beside it that is whole.
    """
    if ((folder / MANIFEST).exists() or (folder / STATE).exists()) and (problems := damage(folder)):
        whole = newest_intact(folder.parent)[0] if folder.parent.name == "checkpoints" else None
        instead = f"; {whole} is whole" if whole else ""
        raise CheckpointError(f"{folder}: damaged: {'; '.join(problems)}{instead}")


def require_match(config: DecoderConfig, tokenizer: Tokenizer, name: str) -> None:
    """Raise ConfigError when `tokenizer` has tokens that the model has no embedding for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{name}: the tokenizer has {tokenizer.vocab_size} tokens and the model knows {config.vocab_size}, "
            "so they do not match; use the tokenizer that the model was trained with"
        )


def read_state(folder: Path) -> dict[str, Any]:
    """The training state kept with a checkpoint.

    Raises:
        CheckpointError: missing or unreadable.
    """
    try:
        state = parse_json(_read_small(folder / STATE).decode())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no readable {STATE}: training cannot go on from it ({error})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder}: {STATE} is not an object: training cannot go on from it")
    return state


def save_optimizer_part(folder: Path, optimizer: Mapping[str, Tensor], rank: int, size: int) -> None:
    """Write what process `rank` of `size` has of the optimizer's tensors, some rows of each, into a new folder.

    Raises:
        StorageError: the disk is full or refuses.
    """
    path = folder / f"optimizer-{rank + 1:05}-of-{size:05}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in optimizer.items()}, path)
    except (OSError, SafetensorError) as error:
        raise _storage_error(folder, error) from error


def read_optimizer(folder: Path) -> Mapping[str, Tensor]:
    """The optimizer's tensors kept with a checkpoint, each read when it is asked for.

    Raises:
        CheckpointError: missing or unreadable.
    """
    paths = sorted(folder.glob("seedbed/optimizer*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder}: there is no {OPTIMIZER}: training cannot go on from it")
    try:
        return _Parts([safe_open(path, framework="pt") for path in paths])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {OPTIMIZER} is not readable: {error}") from None


class _Parts(Mapping[str, Tensor]):
    """Tensors of several files, which have some rows each; what has no rows is in the first file only."""

    def __init__(self, files: Sequence[Any]) -> None:
        self._files = [(file, frozenset(file.keys())) for file in files]

    def __getitem__(self, name: str) -> Tensor:
        rows = [file.get_tensor(name) for file, names in self._files if name in names]
        if not rows:
            raise KeyError(name)
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(frozenset().union(*(names for _, names in self._files))))

    def __len__(self) -> int:
        return len(list(iter(self)))


def remove_leftovers(checkpoints: Path) -> None:
    """Clear what a killed save left behind; put back a checkpoint that was about to be replaced."""
    for old in checkpoints.glob(".*.old"):
        final = checkpoints / old.name[1:].removesuffix(".old")
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)
    for temporary in checkpoints.glob(".*.tmp"):
        shutil.rmtree(temporary)


def rotate(checkpoints: Path, kind: str, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints called `KIND-N`; 0 keeps all."""
    named = [folder for folder in checkpoints.glob(f"{kind}-*") if folder.name.removeprefix(f"{kind}-").isdecimal()]
    numbered = sorted(named, key=lambda folder: int(folder.name.removeprefix(f"{kind}-")))
    for folder in numbered[:-keep] if keep else []:
        doomed = folder.with_name(f".{folder.name}.tmp")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise StorageError when the disk that holds `folder` has less than `num_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise StorageError(
            f"{folder}: the first checkpoint needs {num_bytes / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free; "
            "free some space, or choose another --output"
        )


@contextmanager
def _written_whole(folder: Path, needed: int = 0) -> Iterator[Path]:
    """A hidden empty folder to fill with about `needed` bytes, which is renamed to `folder` at the end.

    A folder that is there is replaced only then. On an error it is as it was, and nothing is left beside it.

    Raises:
        StorageError: the disk is full or refuses.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _commit(temporary, folder)
    except (OSError, SafetensorError, StorageError) as error:
        raise _storage_error(folder, error, needed) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _add_companions(folder: Path, companions: Path | None) -> None:
    for path in sorted(companions.rglob("*")) if companions else ():
        target = folder / "seedbed" / path.relative_to(companions)  # type: ignore[arg-type]
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            _link_or_copy(str(path), str(target))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _manifest_entries(folder: Path) -> dict[str, dict[str, Any]]:
    manifest = parse_json(_read_small(folder / MANIFEST).decode())
    if manifest["version"] != 1:
        raise ValueError(f"version {manifest['version']}")
    entries: dict[str, dict[str, Any]] = manifest["files"]
    return entries


def _read_small(path: Path) -> bytes:
    """The bytes of a small regular file; whatever else has its name is refused."""
    if path.exists() and not (path.is_file() and path.stat().st_size <= LARGEST_JSON):
        raise ValueError(f"{path.name} is no such file")
    return path.read_bytes()


def _entries_but_state(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: entry for name, entry in _manifest_entries(folder).items() if name != STATE}


@contextmanager
def _sealed(
    folder: Path, known: Mapping[str, dict[str, Any]] = MappingProxyType({})
) -> Iterator[Callable[[str], None]]:
    """At the end, flush every file below `folder` to the disk and write their manifest.

    Yields a function that begins with one file at once. Digests are worked out while the disk is busy; those that are
    `known` are of files that were linked: whatever happened to their bytes since, the digest is of what was meant.
    """
    begun: dict[str, tuple[Future[None], Future[Mapping[str, Any]]]] = {}

    def entry(name: str) -> Mapping[str, Any]:
        return known.get(name) or {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}

    with ThreadPoolExecutor(1) as disk, ThreadPoolExecutor(READERS) as readers:

        def begin_with(name: str) -> None:
            begun[name] = disk.submit(flush, folder / name), readers.submit(entry, name)

        yield begin_with
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        for name in names:
            if name not in begun:
                begin_with(name)
        files = {name: begun[name][1].result() for name in names}
        for flushed, _ in begun.values():
            flushed.result()
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=2), encoding="utf-8")
    for path in [folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        flush(path)


def _commit(temporary: Path, folder: Path) -> None:
    """Rename what is sealed; a folder in the way steps aside first."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _storage_error(folder: Path, error: Exception, needed: int = 0) -> StorageError:
    cause = error.__cause__ if isinstance(error, StorageError) and error.__cause__ else error
    free, takes = shutil.disk_usage(folder.parent).free, f"it takes {needed / 1e6:,.1f} MB, and " if needed else ""
    return StorageError(
        f"{folder}: the checkpoint could not be written ({cause}); {takes}{free / 1e6:,.1f} MB are free. "
        "Free some space and run the same command again"
    )


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run, by name; none where it is no run."""
    return sorted(path for path in _folders(run / "checkpoints") if is_model_folder(path))


def _folders(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    return [path for path in checkpoints.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _step_of(folder: Path) -> int:
    """The step of a checkpoint; `LAST_STEP` where it looks damaged, so that it is reported, -1 where it is not ours."""
    if not (folder / MANIFEST).exists() and not (folder / STATE).exists():
        return -1
    try:
        state = _read_small(folder / STATE)
        if hashlib.sha256(state).hexdigest() == _manifest_entries(folder)[STATE]["sha256"]:
            return int(parse_json(state)["step"])
    except (OSError, KeyError, TypeError, ValueError, OverflowError, AttributeError):
        pass
    return LAST_STEP
