from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seedbed import checkpoint as ckpt
from seedbed.checkpoint import (
    damage,
    find_model,
    link_checkpoint,
    load_model,
    newest_intact,
    read_optimizer,
    read_state,
    remove_leftovers,
    require_space,
    rotate,
    save_checkpoint,
)
from seedbed.errors import CheckpointError, ConfigError, StorageError
from seedbed.model import weights
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Decoder
from seedbed.text.tokenizer import Tokenizer, train_char

EXPECTED_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "seedbed/state.json",
    "seedbed/optimizer.safetensors",
    "seedbed/manifest.json",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char(["to be or not to be"])


def make_model(tokenizer: Tokenizer, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    size = tokenizer.vocab_size
    return Decoder(from_scratch("llama", vocab_size=size, d_model=16, num_layers=1, num_heads=2, max_seq_len=8))


def make_optimizer(seed: int = 0) -> dict[str, Tensor]:
    return {"norm.weight/exp_avg": torch.full((16,), float(seed)), "norm.weight/step": torch.tensor(float(seed))}


Save = Callable[..., Path]


@pytest.fixture
def save(tokenizer: Tokenizer, tmp_path: Path) -> Save:
    """`save("best", step=3)` saves a checkpoint whose contents follow from the step."""

    def run(name: str, step: int = 1) -> Path:
        folder = tmp_path / "checkpoints" / name
        save_checkpoint(folder, make_model(tokenizer, step), tokenizer, make_optimizer(step), {"step": step})
        return folder

    return run


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def flip_one_bit(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# Saving and loading


def test_what_is_saved_is_loaded_bit_for_bit(save: Save, tokenizer: Tokenizer) -> None:
    folder = save("best", 3)
    assert files_in(folder) == EXPECTED_FILES
    assert damage(folder) == []
    model, loaded = load_model(folder)
    wanted = make_model(tokenizer, 3).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert loaded.encode("to be") == tokenizer.encode("to be")
    assert read_state(folder) == {"step": 3}
    assert all(torch.equal(read_optimizer(folder)[name], tensor) for name, tensor in make_optimizer(3).items())


def test_saving_again_replaces_and_leaves_nothing_beside(save: Save) -> None:
    save("best", 1)
    folder = save("best", 2)
    assert read_state(folder) == {"step": 2}
    assert damage(folder) == []
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_a_model_folder_of_another_program_needs_no_manifest(save: Save) -> None:
    folder = save("best")
    shutil.rmtree(folder / "seedbed")
    load_model(folder)
    with pytest.raises(CheckpointError, match=r"no seedbed/manifest\.json"):
        damage(folder)


# Damage


@pytest.mark.parametrize("name", sorted(EXPECTED_FILES - {"seedbed/manifest.json"}))
def test_each_damaged_file_is_named(name: str, save: Save) -> None:
    folder = save("best")
    path = folder / name
    size = path.stat().st_size
    flip_one_bit(path, size // 2)
    assert damage(folder) == [f"{name}: its bytes have changed since it was written"]
    path.write_bytes(path.read_bytes()[:-1])
    assert damage(folder) == [f"{name}: {size - 1} bytes instead of {size}"]
    path.unlink()
    assert damage(folder) == [f"{name}: missing"]


def test_a_name_that_no_file_can_have_is_damage(save: Save) -> None:
    folder = save("step-1")
    manifest = folder / "seedbed/manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["x" * 300] = content["files"]["config.json"]
    manifest.write_text(json.dumps(content))
    assert damage(folder) == [f"{'x' * 255}: cannot be read (File name too long)"]


def test_all_damaged_files_are_named_together_and_nothing_is_loaded(save: Save) -> None:
    folder = save("best")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    flip_one_bit(folder / "model.safetensors")
    assert [problem.split(":")[0] for problem in damage(folder)] == ["config.json", "model.safetensors"]
    with pytest.raises(CheckpointError, match=r"config\.json: 2 bytes.*model\.safetensors: its bytes"):
        load_model(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', '{"files": {"a": {}}}', '{"version": 1}'])
def test_a_damaged_manifest_is_named(content: str, save: Save) -> None:
    folder = save("best")
    (folder / "seedbed" / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"seedbed/manifest\.json is damaged"):
        damage(folder)


def test_state_and_optimizer_that_cannot_be_read(save: Save) -> None:
    folder = save("best")
    (folder / "seedbed" / "state.json").write_text("{", encoding="utf-8")
    (folder / "seedbed" / "optimizer.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"state\.json"):
        read_state(folder)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        read_optimizer(folder)


# The newest that is whole


def test_the_newest_whole_checkpoint_is_found_by_its_steps(save: Save) -> None:
    save("step-10", 10)
    newest = save("best", 30)
    save("step-20", 20)
    assert newest_intact(newest.parent) == (newest, [])


def test_damaged_ones_are_passed_over_with_the_reason(save: Save) -> None:
    whole = save("step-10", 10)
    flip_one_bit(save("step-20", 20) / "model.safetensors")
    (save("final", 30) / "seedbed" / "manifest.json").unlink()
    found, remarks = newest_intact(whole.parent)
    assert found == whole
    assert len(remarks) == 2
    assert "final is damaged" in remarks[0]
    assert "no seedbed/manifest.json" in remarks[0]
    assert "step-20 is damaged (model.safetensors: its bytes have changed" in remarks[1]


@pytest.mark.parametrize("state", ["{", '{"step": 15}', '{"step": 1e999}', "[]"])
def test_a_damaged_state_is_told_whatever_it_says(save: Save, state: str) -> None:
    whole = save("step-30", 30)
    (save("step-35", 35) / "seedbed/state.json").write_text(state)
    found, [remark] = newest_intact(whole.parent)
    assert found == whole
    assert "step-35 is damaged (seedbed/state.json" in remark


@pytest.mark.parametrize("name", ["seedbed/state.json", "seedbed/manifest.json"])
def test_what_is_no_file_is_not_waited_for(save: Save, name: str) -> None:
    whole, odd = save("step-30", 30), save("step-35", 35)
    (odd / name).unlink()
    os.mkfifo(odd / name)
    found, [remark] = newest_intact(whole.parent)
    assert found == whole
    assert "step-35 is damaged" in remark


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda manifest: manifest | {"version": 2}, "manifest.json is damaged"),
        (lambda manifest: manifest | {"files": {}}, "manifest.json is damaged"),
        (lambda manifest: {"files": manifest["files"]}, "manifest.json is damaged"),
    ],
)
def test_a_manifest_that_says_too_little_is_damaged(save: Save, change: Callable[[Any], Any], says: str) -> None:
    manifest = save("best") / "seedbed/manifest.json"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))
    with pytest.raises(CheckpointError, match=says):
        damage(manifest.parent.parent)


def test_a_damaged_model_is_refused_with_one_that_is_whole(save: Save) -> None:
    best, step = save("best", 1), save("step-2", 2)
    flip_one_bit(best / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"best: damaged: model\.safetensors: .*; {step} is whole"):
        load_model(best.parent.parent)


def test_files_beside_those_of_the_manifest_and_none_at_all(save: Save) -> None:
    folder = save("best")
    (folder / "seedbed/optimizer-00002-of-00002.safetensors").write_bytes(b"")
    assert damage(folder) == ["seedbed/optimizer-00002-of-00002.safetensors: not of this checkpoint"]
    (folder / "seedbed/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no seedbed/manifest"):  # whose weights may be any
        load_model(folder)


def test_none_when_there_is_none(save: Save, tmp_path: Path) -> None:
    assert newest_intact(tmp_path / "nowhere") == (None, [])
    folder = save("best")
    (folder / "tokenizer.json").unlink()
    found, [remark] = newest_intact(folder.parent)
    assert found is None
    assert "tokenizer.json: missing" in remark


def test_a_run_stands_for_its_best_then_final_then_newest(save: Save) -> None:
    step = save("step-5", 5)
    run = step.parent.parent
    assert find_model(step) == step
    assert find_model(run) == step
    final = save("final", 6)
    assert find_model(run) == final
    best = save("best", 4)
    assert find_model(str(run)) == best


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        find_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no model"):
        find_model(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(save: Save) -> None:
    folder = save("best")
    train_char(["a larger alphabet: äöüß"]).save(folder)
    shutil.rmtree(folder / "seedbed")
    with pytest.raises(ConfigError, match="do not match"):
        load_model(folder)


# One step under two names


def test_a_linked_checkpoint_shares_files_and_has_its_own_state(save: Save) -> None:
    best = save("best", 7)
    final = best.parent / "final"
    link_checkpoint(best, final, {"step": 7, "closed_epochs": 1})
    assert files_in(final) == EXPECTED_FILES
    for name in EXPECTED_FILES - {"seedbed/state.json", "seedbed/manifest.json"}:
        assert (final / name).stat().st_ino == (best / name).stat().st_ino, name
    assert read_state(final) == {"step": 7, "closed_epochs": 1}
    assert read_state(best) == {"step": 7}
    assert damage(final) == damage(best) == []


def test_replacing_one_name_leaves_the_other_as_it_was(save: Save, tokenizer: Tokenizer) -> None:
    best = save("best", 7)
    link_checkpoint(best, best.parent / "step-7", {"step": 7})
    save("best", 8)
    assert damage(best.parent / "step-7") == []
    weight = load_model(best.parent / "step-7")[0].embed_tokens.weight
    assert torch.equal(weight, make_model(tokenizer, 7).embed_tokens.weight)


def test_a_file_system_without_links_gets_copies(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    best = save("best", 7)
    monkeypatch.setattr(os, "link", refuse)
    link_checkpoint(best, best.parent / "final", {"step": 7})
    assert damage(best.parent / "final") == []


# Room on the disk


def test_rotation_keeps_the_newest_and_never_touches_best_or_final(save: Save) -> None:
    for step in (9, 10, 100, 2):
        save(f"step-{step}", step)
    checkpoints = save("best", 1).parent
    save("final", 1)
    save("epoch-1", 1)
    shutil.copytree(checkpoints / "final", checkpoints / "step-2-copy")  # somebody's own
    rotate(checkpoints, "step", 2)
    shutil.rmtree(checkpoints / "step-2-copy")
    assert {path.name for path in checkpoints.iterdir()} == {"step-10", "step-100", "best", "final", "epoch-1"}
    rotate(checkpoints, "step", 0)
    rotate(checkpoints, "step", 5)
    assert {path.name for path in checkpoints.iterdir()} == {"step-10", "step-100", "best", "final", "epoch-1"}


def test_leftovers_of_a_killed_save_are_cleared(save: Save) -> None:
    best = save("best", 1)
    checkpoints = best.parent
    shutil.copytree(best, checkpoints / ".best.tmp")
    shutil.copytree(best, checkpoints / ".best.old")
    save("step-3", 3).rename(checkpoints / ".step-3.old")  # killed between the two renames of a replacement
    shutil.copytree(best, checkpoints / ".step-3.tmp")
    remove_leftovers(checkpoints)
    assert {path.name for path in checkpoints.iterdir()} == {"best", "step-3"}
    assert read_state(checkpoints / "step-3") == {"step": 3}
    assert damage(checkpoints / "step-3") == []


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        pytest.param(weights, "save_file", id="weights"),
        pytest.param(ckpt, "save_file", id="optimizer"),
        pytest.param(ckpt, "sha256_of", id="digest"),
        pytest.param(ckpt, "flush", id="flush"),
        pytest.param(Tokenizer, "save", id="tokenizer"),
    ],
)
def test_a_save_that_fails_half_way_leaves_the_older_one(
    module: Any, name: str, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save("best", 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, no_space)
        with pytest.raises(StorageError, match="No space left on device") as caught:
            save("best", 2)
        assert caught.value.exit_code == 8
        assert str(folder.parent) in str(caught.value)
        with pytest.raises(StorageError):
            save("step-2", 2)
    assert read_state(folder) == {"step": 1}
    assert damage(folder) == []
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_a_swap_that_fails_puts_the_older_one_back(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("best", 1)
    rename = Path.rename

    def fail_for_the_new_one(path: Path, target: Path) -> Path:
        if path.name == ".best.tmp":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_for_the_new_one)
        with pytest.raises(StorageError, match="Input/output error"):
            save("best", 2)
    assert read_state(folder) == {"step": 1}
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_a_tokenizer_that_cannot_be_written_is_a_storage_error(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizers library raises a bare Exception where Python raises OSError."""
    folder = save("best", 1)

    with monkeypatch.context() as patch:
        # A folder of that name is in the way.
        patch.setattr(ckpt, "save_decoder", lambda _, path, **__: (path / "tokenizer.json").mkdir())
        with pytest.raises(StorageError):
            save("best", 2)
    assert read_state(folder) == {"step": 1}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["best"]


def test_a_link_that_fails_half_way_leaves_the_older_one(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    best = save("best", 1)
    link_checkpoint(best, best.parent / "final", {"step": 1})
    monkeypatch.setattr(ckpt, "sha256_of", no_space)
    with pytest.raises(StorageError):
        link_checkpoint(best, best.parent / "final", {"step": 2})
    assert read_state(best.parent / "final") == {"step": 1}
    assert {path.name for path in best.parent.iterdir()} == {"best", "final"}


@pytest.mark.parametrize("writes", ["save_decoder", "save_file"])
def test_a_full_disk_is_told_with_what_is_needed_and_free(
    save: Save, monkeypatch: pytest.MonkeyPatch, writes: str
) -> None:
    home = weights if writes == "save_decoder" else ckpt
    monkeypatch.setattr(home, "save_file", no_space)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    says = r"/best: the checkpoint could not be written \(.*No space.*\); it takes 0\.\d MB, and 2\.0 MB are free"
    with pytest.raises(StorageError, match=says):
        save("best")


def test_room_for_the_first_checkpoint_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    require_space(tmp_path, 2_000_000)
    with pytest.raises(StorageError, match=r"needs 3\.0 MB and 2\.0 MB are free"):
        require_space(tmp_path, 3_000_000)


def test_no_file_is_a_pickle(save: Save) -> None:
    folder = save("best")
    for name in files_in(folder):
        content = (folder / name).read_bytes()
        if name.endswith(".safetensors"):
            header = int.from_bytes(content[:8], "little")
            json.loads(content[8 : 8 + header])
        else:
            json.loads(content)
