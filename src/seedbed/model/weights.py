"""Model folders of Hugging Face: `config.json` and safetensors in, and out again bit for bit.

Nothing is unpickled. Names, transposed and fused weights are in the tables of `seedbed.model.families`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seedbed import distributed
from seedbed.errors import CheckpointError, StorageError
from seedbed.model.config import DecoderConfig
from seedbed.model.decoder import Decoder
from seedbed.model.families import Name, canonical_name, config_to_hf, read_config, weight_names
from seedbed.parsing import parse_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Reader = Callable[[], Tensor]
"""Gives one tensor, read when it is asked for."""


def load_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The model in a folder of ours or of transformers, on the CPU, in evaluation mode.

    Args:
        folder: holds `config.json` and `model.safetensors`, or its shards with their index.
        dtype: of the weights in memory.

    Raises:
        CheckpointError: files missing or damaged; weights missing, surplus or of the wrong shape (all named).
        ConfigError: a model this decoder cannot be.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = Decoder(config)
    if distributed.without_weights():
        return model.eval()
    tensors = _read_tensors(folder, config)
    state = _from_hf(tensors, config, model.state_dict(), folder)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return model.eval()


def save_decoder(
    model: Decoder, folder: Path, *, bos_token_id: int | None, eos_token_id: int | list[int] | None
) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` as transformers does.

    A tied head is not stored. The weights keep their type. Files are not written atomically: the caller
    gives a folder nobody reads yet.

    Raises:
        StorageError: the disk is full or refuses.
    """
    tensors = tensors_by_name(model)
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    tokens: dict[str, Any] = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "config.json", config_to_hf(model.config, **tokens, dtype=dtype))
        _write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{folder}: the model could not be written ({error}); free space and save again") from error


def tensors_by_name(model: Decoder) -> dict[str, Tensor]:
    """The weights as a model folder holds them: Hugging Face's names and shapes, a tied head not among them."""
    tensors: dict[str, Tensor] = {}
    state = model.state_dict()
    for name, kind, keys in _pairs(model.config, state):
        parts = [state[key].detach().cpu() for key in keys]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        tensors[f"{name.theirs}.{kind}"] = _turned(whole, name).contiguous()
    assert sum(map(Tensor.numel, tensors.values())) == sum(map(Tensor.numel, state.values())), "unnamed weights"
    return tensors


def open_weights(folder: Path, config: DecoderConfig) -> dict[str, Reader]:
    """The weights of a model folder by Hugging Face's names, none of them read yet; a tied head is not among them.

    Raises:
        CheckpointError: files missing or damaged, or a tied head that differs from the embedding.
    """
    readers = _tensor_readers(folder, config)
    if config.tie_embeddings and "lm_head.weight" in readers:
        ends = ("lm_head.weight", "transformer.wte.weight", "model.embed_tokens.weight")
        if problems := _untie({name: readers[name]() for name in ends if name in readers}):
            raise CheckpointError(f"{folder}: {'; '.join(problems)}")
        del readers["lm_head.weight"]
    return readers


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over the weights of a model folder: name, type, shape and bytes of each, sorted by name.

    The same weights give the same fingerprint in one file or in shards, under old names or new ones, with a
    second copy of a tied head or without.

    Raises:
        CheckpointError: files missing or damaged, or a tied head that differs from the embedding.
        ConfigError: a model this decoder cannot be.
    """
    config = read_config(folder)
    tensors = _read_tensors(folder, config)
    if config.tie_embeddings and (problems := _untie(tensors)):
        raise CheckpointError(f"{folder}: {'; '.join(problems)}")
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _from_hf(
    tensors: dict[str, Tensor], config: DecoderConfig, wanted: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Our weights out of theirs; empties `tensors` on the way, so that both are never held whole."""
    problems = _untie(tensors) if config.tie_embeddings else []
    state: dict[str, Tensor] = {}
    for name, kind, keys in _pairs(config, wanted):
        theirs = f"{name.theirs}.{kind}"
        if theirs not in tensors:
            problems.append(f"{theirs} is missing")
            continue
        whole = _turned(tensors.pop(theirs), name)
        sizes = [len(wanted[key]) for key in keys]
        expected = torch.empty(sum(sizes), *wanted[keys[0]].shape[1:], device="meta")
        if whole.shape != expected.shape:
            found, right = (list(_turned(t, name).shape) for t in (whole, expected))
            problems.append(f"{theirs} has shape {found}, expected {right}")
        elif not whole.is_floating_point():
            problems.append(f"{theirs} is {whole.dtype}: expected floating point; quantized weights are not read")
        else:
            parts = torch.split(whole, sizes)
            state |= zip(keys, (part.clone(memory_format=torch.contiguous_format) for part in parts), strict=True)
    problems += [f"{name} is not a weight of this model" for name in sorted(tensors)]
    if problems:
        raise CheckpointError(
            f"{folder}: the weights do not fit its config.json; take both from one checkpoint\n  "
            + "\n  ".join(problems)
        )
    return state


def _untie(tensors: dict[str, Tensor]) -> list[str]:
    """Drop a head that repeats the embedding; some files hold both."""
    head = tensors.pop("lm_head.weight", None)
    embedding = tensors.get("transformer.wte.weight", tensors.get("model.embed_tokens.weight"))
    if head is None or embedding is None or (head.dtype == embedding.dtype and head.equal(embedding)):
        return []
    return ["lm_head.weight differs from the embedding; set tie_word_embeddings to false in config.json"]


def _pairs(config: DecoderConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[Name, str, list[str]]]:
    """Each of their tensors: its module, weight or bias, and the keys here that it holds."""
    for name in weight_names(config):
        for kind in ("weight", "bias"):
            keys = [key for ours in name.ours if (key := f"{ours}.{kind}") in state]
            if keys:
                yield name, kind, keys


def _turned(tensor: Tensor, name: Name) -> Tensor:
    return tensor.T if name.transposed and tensor.ndim == 2 else tensor


def _read_tensors(folder: Path, config: DecoderConfig) -> dict[str, Tensor]:
    """Every tensor of the folder by the name the family gives it today."""
    return {name: read() for name, read in _tensor_readers(folder, config).items()}


def _tensor_readers(folder: Path, config: DecoderConfig) -> dict[str, Reader]:
    readers: dict[str, Reader] = {}
    for path in _weight_files(folder):
        with _damage_is_told(path):
            file: Any = safe_open(path, framework="pt")
            for stored in file.keys():  # noqa: SIM118 (not a mapping)
                name = canonical_name(config.family, stored)
                if name is not None:
                    readers[name] = partial(_read_tensor, path, file, stored)
    return readers


def _read_tensor(path: Path, file: Any, name: str) -> Tensor:
    with _damage_is_told(path):
        tensor: Tensor = file.get_tensor(name)
    return tensor


@contextmanager
def _damage_is_told(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: {path.name} is missing; copy the folder again") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); copy the file again") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if index.exists():
        try:
            names = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: damaged ({error!r}); copy the file again") from error
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise CheckpointError(f"{index}: expected plain file names in weight_map; copy the file again")
        return [folder / name for name in names]
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder}: {', '.join(pickled)} is pickled, and unpickling runs whatever code it holds. "
            f"Expected {WEIGHTS_FILE}; if you trust the file, let transformers write one: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER)"
        )
    raise CheckpointError(f"{folder}: no {WEIGHTS_FILE}; expected a Hugging Face model folder")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
