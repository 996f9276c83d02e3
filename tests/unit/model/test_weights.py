from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from seedbed.errors import CheckpointError, StorageError
from seedbed.model.config import DecoderConfig, from_scratch
from seedbed.model.decoder import Decoder
from seedbed.model.weights import load_decoder, save_decoder

WEIGHTS = "model.safetensors"


def tiny(arch: str = "gpt2", **changes: Any) -> DecoderConfig:
    sizes: dict[str, Any] = {"vocab_size": 31, "d_model": 16, "num_layers": 2, "num_heads": 4, "max_seq_len": 8}
    return from_scratch(arch, **(sizes | changes))


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(tiny())


@pytest.fixture
def folder(model: Decoder, tmp_path: Path) -> Path:
    save_decoder(model, tmp_path / "model", bos_token_id=0, eos_token_id=0)
    return tmp_path / "model"


def assert_same(first: Decoder, second: Decoder) -> None:
    state = second.state_dict()
    assert state.keys() == first.state_dict().keys()
    assert all(torch.equal(state[name], weight) for name, weight in first.state_dict().items())


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors, or take them out with None; dots in names are written as two underscores."""
    tensors = load_file(folder / WEIGHTS)
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_loaded_model_evaluates_and_trains(model: Decoder, folder: Path) -> None:
    loaded = load_decoder(folder)
    assert_same(model, loaded)
    assert loaded.config == model.config
    assert not loaded.training
    assert all(p.requires_grad and p.is_contiguous() and not p.is_meta for p in loaded.parameters())
    storages = {p.untyped_storage().data_ptr() for p in loaded.parameters()}
    assert len(storages) == len(list(loaded.parameters()))  # an in-place update touches one weight only
    loaded.train()(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()


def test_the_type_is_the_callers(folder: Path) -> None:
    assert {p.dtype for p in load_decoder(folder, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_tied_head_is_not_stored(folder: Path, tmp_path: Path) -> None:
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    save_decoder(Decoder(tiny(tie_embeddings=False)), tmp_path / "untied", bos_token_id=0, eos_token_id=0)
    assert "lm_head.weight" in load_file(tmp_path / "untied" / WEIGHTS)


def test_a_stored_copy_of_a_tied_head_is_ignored_only_if_it_is_one(model: Decoder, folder: Path) -> None:
    rewrite(folder, lm_head__weight=model.embed_tokens.weight.detach().clone())
    assert_same(model, load_decoder(folder))
    rewrite(folder, lm_head__weight=model.embed_tokens.weight.detach() + 1)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        load_decoder(folder)


def test_old_gpt2_files_without_prefix_and_with_buffers(model: Decoder, folder: Path) -> None:
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, folder / WEIGHTS)
    assert_same(model, load_decoder(folder))


def shard(folder: Path) -> dict[str, str]:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files


def test_shards(model: Decoder, folder: Path) -> None:
    shard(folder)
    assert_same(model, load_decoder(folder))


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        load_decoder(folder)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": "../secret.safetensors"}}',
        '{"weight_map": {"a": 3}}',
    ],
)
def test_a_damaged_index(folder: Path, index: str) -> None:
    shard(folder)
    (folder / f"{WEIGHTS}.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load_decoder(folder)


def test_every_misfit_is_named(folder: Path) -> None:
    rewrite(
        folder,
        transformer__ln_f__weight=None,
        transformer__h__1__attn__c_attn__weight=torch.zeros(16, 40),
        transformer__wpe__weight=torch.zeros(8, 16, dtype=torch.int8),
        transformer__extra=torch.zeros(3),
    )
    with pytest.raises(CheckpointError) as error:
        load_decoder(folder)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "transformer.wpe.weight is torch.int8: expected floating point; quantized weights are not read",
        "transformer.ln_f.weight is missing",
        "transformer.h.1.attn.c_attn.weight has shape [16, 40], expected [16, 48]",
        "transformer.extra is not a weight of this model",
    ]


def test_weights_of_a_deeper_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.ln_1\.weight is not a weight of this model"):
        load_decoder(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, 3000])
def test_a_cut_file(folder: Path, keep: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        load_decoder(folder)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_decoder(folder)


def test_pickled_weights_are_refused_unread(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickled.*save_pretrained"):
        load_decoder(folder)


def test_a_folder_that_cannot_be_written(model: Decoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        save_decoder(model, tmp_path / "file" / "model", bos_token_id=0, eos_token_id=0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk(model: Decoder, tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left"):
        save_decoder(model, tmp_path, bos_token_id=0, eos_token_id=0)
