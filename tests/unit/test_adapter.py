"""Adapter folders, and checkpoints that are adapters. That PEFT reads them is in tests/parity/test_lora.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from seedbed.adapter import base_name, load_adapter, save_adapter
from seedbed.checkpoint import damage, find_model, load_model, save_checkpoint
from seedbed.errors import CheckpointError, StorageError
from seedbed.lora import adapter_state, add_adapter, find_targets
from seedbed.model.adjust import grow_vocabulary
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Adapter, Base, Decoder
from seedbed.model.weights import load_decoder, save_decoder, weights_fingerprint
from seedbed.text.tokenizer import Tokenizer, train_char

IDS = torch.arange(6)[None]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char(["to be or not to be"])


@pytest.fixture
def base(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", tokenizer)


def make_base(folder: Path, tokenizer: Tokenizer, seed: int = 0, **changes: Any) -> Path:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"d_model": 16, "num_layers": 2, "num_heads": 4, "max_seq_len": 8} | changes
    model = Decoder(from_scratch(sizes.pop("arch", "gpt2"), vocab_size=tokenizer.vocab_size, **sizes))
    save_decoder(model, folder, bos_token_id=None, eos_token_id=0)
    tokenizer.save(folder)
    return folder


def adapted(
    base: Path, targets: str = "attention", *, path: str = "", embeddings: bool = False, added: int = 0
) -> Decoder:
    model = load_decoder(base)
    model.base = Base(path or str(base), weights_fingerprint(base))
    grow_vocabulary(model, model.config.vocab_size, model.config.vocab_size + added)
    modules = find_targets(model.config, targets)
    add_adapter(model, Adapter(2, 4.0, 0.1, False, False, modules, embeddings))
    with torch.no_grad():
        for parameter in adapter_state(model).values():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    save_adapter(adapted(base), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace tensors, or take them out with None."""
    tensors: dict[str, Tensor | None] = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


def logits_of(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model.eval().logits(model(IDS))


# The folder


def test_what_is_written(base: Path, folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 4, 0.1)
    assert config["target_modules"] == ["attn.c_proj", "c_attn"]
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"c_attn": 6}, {"c_attn": 12})
    assert config["base_model_name_or_path"] == base_name(folder) == str(base)
    saved = json.loads((folder / "seedbed" / "base.json").read_text())
    assert saved == {"path": str(base), "fingerprint": weights_fingerprint(base)}
    tensors = load_file(folder / WEIGHTS)
    assert tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].shape == (48, 6)


@pytest.mark.parametrize(
    ("targets", "last_blocks", "expected"),
    [
        ("attention", None, ["attn.c_proj", "c_attn"]),
        ("all-linear,head", None, ["c_attn", "c_fc", "c_proj", "lm_head"]),
        ("mlp", 1, ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"]),
    ],
)
def test_targets_have_the_shortest_names_that_mean_them(
    targets: str, last_blocks: int | None, expected: list[str], base: Path, tmp_path: Path
) -> None:
    model = load_decoder(base)
    add_adapter(model, Adapter(2, 4.0, 0.0, False, False, find_targets(model.config, targets, last_blocks), False))
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"] == expected


def test_an_adapter_is_described_as_it_was_made(base: Path, folder: Path) -> None:
    model = load_decoder(base)
    load_adapter(model, folder)
    assert model.adapter == Adapter(2, 4.0, 0.1, False, False, find_targets(model.config, "attention"), False)


@pytest.mark.parametrize("targets", ["attention", "attention,head"])
@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_were_added_come_back(targets: str, tied: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tokenizer, tie_embeddings=tied)
    model = adapted(base, targets, embeddings=True, added=3)
    save_adapter(model, tmp_path / "adapter")
    again = load_decoder(base)
    load_adapter(again, tmp_path / "adapter")
    assert again.config == model.config
    assert logits_of(again).equal(logits_of(model))


def test_a_folder_that_cannot_be_written(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        save_adapter(adapted(base), tmp_path / "file" / "adapter")


# Refused


def test_another_base_is_refused(base: Path, folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", tokenizer, seed=1)
    model = load_decoder(other)
    model.base = Base(str(other), weights_fingerprint(other))
    with pytest.raises(CheckpointError) as error:
        load_adapter(model, folder)
    assert "an adapter for another base" in str(error.value)
    assert str(base) in str(error.value)
    assert str(other) in str(error.value)
    assert model.adapter is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"bias": "all"}, "bias 'all'"),
        ({"lora_bias": True}, "lora_bias True: not supported"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices \[1\]: not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"something_of_tomorrow": "on"}, "something_of_tomorrow 'on': not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base"),
        ({"r": 0}, "r 0: expected a whole number"),
        ({"lora_alpha": "high"}, "lora_alpha 'high': expected a number"),
        ({"lora_dropout": 1}, "lora_dropout 1: expected"),
        ({"rank_pattern": {"c_attn": "6"}}, "rank_pattern .* expected numbers"),
        ({"rank_pattern": {"c_attn": 5}}, r"c_attn has rank 5 by rank_pattern: supported is 2"),
        ({"rank_pattern": {"(c_attn": 6}}, "supported is a module's name"),
        ({"alpha_pattern": {"([a-z._0-9]+)+!": 6}}, "supported is a module's name"),  # would take hours to match
        ({"alpha_pattern": {"c_proj": 5}}, "c_proj has rank 2 and alpha 5: supported is one scaling"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str, base: Path, folder: Path) -> None:
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(load_decoder(base), folder)


def test_every_problem_of_the_tensors_is_named(base: Path, folder: Path) -> None:
    layer = "base_model.model.transformer.h.1.attn.c_proj"
    rewrite(
        folder,
        {
            f"{layer}.lora_A.weight": torch.zeros(2, 15),
            f"{layer}.lora_B.weight": None,
            "base_model.model.transformer.h.9.attn.c_proj.lora_A.weight": torch.zeros(2, 16),
            "base_model.model.transformer.wte.lora_embedding_A": torch.zeros(2, 16),
        },
    )
    with pytest.raises(CheckpointError) as error:
        load_adapter(load_decoder(base), folder)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "transformer.h.1.attn.c_proj.lora_A.weight has shape [2, 15], expected [2, 16]",
        "transformer.h.1.attn.c_proj.lora_B.weight is missing",
        "transformer.h.9.attn.c_proj.lora_A.weight is not a tensor of an adapter for this model",
        "transformer.wte.lora_embedding_A is not a tensor of an adapter for this model",
    ]


def test_an_embedding_that_left_its_tied_head_behind(base: Path, folder: Path) -> None:
    embedding = torch.zeros_like(load_decoder(base).embed_tokens.weight)
    rewrite(folder, {"base_model.model.transformer.wte.weight": embedding})
    edit(folder, modules_to_save=["wte"])
    with pytest.raises(CheckpointError, match=r"transformer\.wte without lm_head"):
        load_adapter(load_decoder(base), folder)
    rewrite(folder, {"base_model.model.lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        load_adapter(load_decoder(base), folder)
    rewrite(folder, {"base_model.model.transformer.wte.weight": None, "base_model.model.lm_head.weight": None})
    with pytest.raises(CheckpointError, match=r"transformer\.wte\.weight is missing"):
        load_adapter(load_decoder(base), folder)


def test_a_frozen_head_of_another_base(base: Path, tmp_path: Path) -> None:
    save_adapter(adapted(base, "head"), tmp_path / "adapter")
    head = load_decoder(base).embed_tokens.weight.detach()
    rewrite(tmp_path / "adapter", {"base_model.model.lm_head.base_layer.weight": head.clone()})
    load_adapter(load_decoder(base), tmp_path / "adapter")
    rewrite(tmp_path / "adapter", {"base_model.model.lm_head.base_layer.weight": head + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.base_layer\.weight is not the head of this base"):
        load_adapter(load_decoder(base), tmp_path / "adapter")


def test_pickled_tensors_are_refused_unread(base: Path, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        load_adapter(load_decoder(base), folder)
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is pickled.*save_pretrained"):
        load_adapter(load_decoder(base), folder)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_config(content: str, base: Path, folder: Path) -> None:
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_adapter(load_decoder(base), folder)


def test_damaged_tensors(base: Path, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: damaged"):
        load_adapter(load_decoder(base), folder)


# Fingerprints


def test_shards_and_copies_of_a_tied_head_have_one_fingerprint(base: Path) -> None:
    expected = weights_fingerprint(base)
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}, base / "model.safetensors")
    assert weights_fingerprint(base) == expected
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        old_names = {name.removeprefix("transformer."): tensors[name] for name in part}
        save_file(old_names, base / f"part-{i}.safetensors")
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert weights_fingerprint(base) == expected


@pytest.mark.parametrize("change", [lambda t: t.bfloat16(), lambda t: t + 1e-6, lambda t: t.reshape(-1)])
def test_any_other_weights_have_another_fingerprint(change: Any, base: Path) -> None:
    expected = weights_fingerprint(base)
    tensors = load_file(base / "model.safetensors")
    tensors["transformer.ln_f.weight"] = change(tensors["transformer.ln_f.weight"]).clone()
    tensors["transformer.wpe.weight"] = change(tensors["transformer.wpe.weight"]).clone()
    save_file(tensors, base / "model.safetensors")
    assert weights_fingerprint(base) != expected


# Checkpoints


def save(folder: Path, model: Decoder, tokenizer: Tokenizer) -> Path:
    save_checkpoint(folder, model, tokenizer, {"step": torch.tensor(1.0)}, {"step": 1})
    return folder


def test_a_checkpoint_of_an_adapter(base: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = adapted(base, "all-linear,head")
    folder = save(tmp_path / "run" / "checkpoints" / "final", model, tokenizer)
    assert damage(folder) == []
    assert not (folder / "config.json").exists()
    assert not (folder / "model.safetensors").exists()
    assert find_model(tmp_path / "run") == find_model(folder) == folder
    loaded, again = load_model(tmp_path / "run")
    assert loaded.adapter == model.adapter
    assert loaded.base == model.base
    assert not loaded.training
    assert logits_of(loaded).equal(logits_of(model))
    assert again.encode("to be") == tokenizer.encode("to be")
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: its bytes have changed"):
        load_model(folder)


def test_a_folder_of_peft_takes_the_tokenizer_of_its_base(folder: Path, tokenizer: Tokenizer) -> None:
    shutil.rmtree(folder / "seedbed")
    assert load_model(folder)[1].encode("to be") == tokenizer.encode("to be")


def test_a_relative_base_is_found_from_here_and_from_the_adapter(
    base: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_here = save(tmp_path / "one", adapted(base, path="base"), tokenizer)
    beside = save(tmp_path / "two", adapted(base, path="../base"), tokenizer)
    monkeypatch.chdir(tmp_path)
    load_model(from_here)
    monkeypatch.chdir("/")
    load_model(beside)


def test_a_base_that_is_gone_or_another_one(base: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", adapted(base), tokenizer)
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match=r"its base model .*base is not here.*Put that model's folder"):
        load_model(folder)
    make_base(base, tokenizer, seed=1)
    with pytest.raises(CheckpointError, match="an adapter for another base"):
        load_model(folder)


def test_an_adapter_on_an_adapter_is_refused(base: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = save(tmp_path / "first", adapted(base), tokenizer)
    second = save(tmp_path / "second", adapted(base, path=str(first)), tokenizer)
    with pytest.raises(CheckpointError, match="is an adapter itself"):
        load_model(second)


def test_an_adapter_that_names_no_base(folder: Path) -> None:
    edit(folder, base_model_name_or_path=None)
    shutil.rmtree(folder / "seedbed")
    with pytest.raises(CheckpointError, match="base_model_name_or_path None"):
        load_model(folder)
