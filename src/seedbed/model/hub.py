"""Pretrained models by name: a folder here, or an id on Hugging Face's hub.

Only configs, safetensors, tokenizers and chat templates are fetched; nothing that is pickled.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from seedbed.disk import replacing
from seedbed.errors import CheckpointError, ConfigError, StorageError
from seedbed.model.families import read_config
from seedbed.parsing import parse_json
from seedbed.text.hub import HUB_ID, download
from seedbed.text.tokenizer import TOKENIZER_FILES

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
MODEL_FILES = (*TOKENIZER_FILES, *WEIGHT_FILES)

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def find_pretrained(name: str, flag: str = "--model") -> Path:
    """The folder of a pretrained model: `name` itself, or the hub's, fetched into its cache.

    Args:
        name: a folder, or a hub id (`gpt2`, `owner/name`). A folder is not looked into.
        flag: what the user gave the name to; begins every message.

    Raises:
        ConfigError: neither a folder nor on the hub, private, or the hub cannot be asked; or a GGUF file.
        MissingExtra: a hub id without the extra `hub`.
        CheckpointError: the hub has no `config.json` or no safetensors for it.
    """
    if name and Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        if name.lower().endswith(".gguf"):
            raise ConfigError(
                f"{flag} {name}: a GGUF file; make a folder of it first: seedbed import {name} --output FOLDER"
            )
        raise ConfigError(f"{flag} {name} is a file; expected a model folder, or a hub id (owner/name)")
    if not HUB_ID.fullmatch(name):
        raise ConfigError(f"{flag} {name} does not exist; expected a model folder, or a hub id (owner/name)")
    folder = download(name, MODEL_FILES, flag)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{flag} {name}: no config.json on the hub; expected a transformers model")
    if not any(folder.glob("model*.safetensors")):
        raise CheckpointError(
            f"{flag} {name}: no safetensors on the hub; pickled weights are not read, for unpickling runs whatever "
            "code they hold. If you trust them, let transformers write a folder and give that: "
            f"AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(FOLDER), and the same with AutoTokenizer"
        )
    return folder


def copy_pretrained(
    source: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda _done, _total: None,
) -> None:
    """Copy the files of a model folder that this program reads; `output` appears whole or not at all.

    Args:
        source: from `find_pretrained`.
        output: a folder that is not there yet, or empty.
        dtype: of the weights written; None copies them as they are.
        progress: called with the bytes copied and the bytes in all.

    Raises:
        ConfigError: a model the decoder cannot be, or `output` is there and not an empty folder.
        CheckpointError: files missing or damaged.
        StorageError: the disk is full or refuses.
    """
    from seedbed.model.weights import load_decoder, save_decoder

    read_config(source)
    patterns = MODEL_FILES if dtype is None else TOKENIZER_FILES
    files = sorted(path for path in source.iterdir() if any(fnmatch(path.name, pattern) for pattern in patterns))
    total = sum(path.stat().st_size for path in files)
    done = 0
    with new_folder(output) as folder:
        for path in files:
            shutil.copyfile(path, folder / path.name)
            done += path.stat().st_size
            progress(done, total)
        if dtype is not None:
            generation = folder / "generation_config.json"
            kept = generation.read_bytes() if generation.is_file() else None
            raw = parse_json((source / "config.json").read_text(encoding="utf-8"))
            ids = {name: raw.get(name) for name in ("bos_token_id", "eos_token_id")}
            save_decoder(load_decoder(source, dtype), folder, **ids)
            if kept is not None:
                generation.write_bytes(kept)


def stored_types(folder: Path) -> dict[str, int]:
    """Number of weights in a folder's safetensors by their type (`F32`, `BF16`), the most frequent first.

    Raises:
        CheckpointError: a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    counts: Counter[str] = Counter()
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    tensor = file.get_slice(name)
                    counts[tensor.get_dtype()] += math.prod(tensor.get_shape())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); copy the file again") from error
    return dict(counts.most_common())


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` to write into; takes that name at the end, or goes away on an error.

    Raises:
        ConfigError: `output` is there and not an empty folder.
        StorageError: the disk is full or refuses.
    """
    require_new(output)
    temporary = output.absolute().with_name(f".{output.absolute().name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if output.exists():  # it is empty, and stays: it may be the working folder, or a disk of its own
            for part in temporary.iterdir():
                shutil.move(part, output)
        else:
            temporary.rename(output)
    except OSError as error:
        raise StorageError(f"{output}: could not be written ({error}); free space, or choose another") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """A temporary file beside `output` to write; at the end it is on the disk and takes that name, or goes away.

    Raises:
        ConfigError: `output` is there.
        StorageError: the disk is full or refuses.
    """
    require_new_file(output)
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replacing(output.absolute()) as temporary:
            yield temporary
    except OSError as error:
        why = error.strerror or "the disk took a part of it only"  # numpy gives no reason
        raise StorageError(f"{output}: could not be written ({why}); free space, or choose another") from error


def require_new_file(output: Path) -> None:
    """Raise ConfigError when something of this name is there."""
    if output.exists():
        raise ConfigError(f"{output} is there already; choose another name")


def require_new(output: Path) -> None:
    """Raise ConfigError when `output` is there and not an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is there already and not an empty folder; choose another")
