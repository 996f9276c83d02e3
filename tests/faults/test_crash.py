"""A process that dies between any two calls to the file system leaves a whole checkpoint behind."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seedbed import checkpoint as module
from seedbed.checkpoint import (
    damage,
    link_checkpoint,
    load_model,
    newest_intact,
    read_state,
    remove_leftovers,
    rotate,
    save_checkpoint,
)
from seedbed.disk import write_atomically
from seedbed.errors import SeedbedError
from seedbed.model.decoder import Decoder
from seedbed.text.tokenizer import Tokenizer
from tests.faults.injection import DIED, FileSystem, forked, many

Saving = Callable[[Path], None]


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> tuple[Decoder, Tokenizer]:
    return load_model(tiny_run)


def save(folder: Path, model: tuple[Decoder, Tokenizer], step: int) -> None:
    """A checkpoint whose optimizer and state both know their step."""
    decoder, tokenizer = model
    optimizer = {"moment": torch.full((1000,), float(step))}
    save_checkpoint(folder, decoder, tokenizer, optimizer, {"step": step})


@pytest.fixture
def folder(model: tuple[Decoder, Tokenizer], tmp_path: Path) -> Path:
    """The checkpoints of a run after its second step."""
    checkpoints = tmp_path / "run/checkpoints"
    for step in (1, 2):
        save(checkpoints / f"step-{step}", model, step)
    link_checkpoint(checkpoints / "step-2", checkpoints / "best", {"step": 2})
    return checkpoints


@pytest.fixture
def third_step(model: tuple[Decoder, Tokenizer]) -> Saving:
    """What a run does after its third step, the best so far."""

    def work(checkpoints: Path) -> None:
        save(checkpoints / "step-3", model, 3)
        link_checkpoint(checkpoints / "step-3", checkpoints / "best", {"step": 3})
        rotate(checkpoints, "step", 2)
        write_atomically(checkpoints.parent / "metrics.json", json.dumps({"steps": 3}))

    return work


def crash(folder: Path, work: Saving, dies_at: int = -1, forgets: random.Random | None = None) -> tuple[int, int]:
    """Exit code of the work on `folder`, and how many calls it made."""
    counted = folder.parent.parent / "calls"

    def run() -> int:
        watched = FileSystem(folder.parent, dies_at, forgets)
        work(folder)
        calls = watched.calls
        counted.write_text(str(calls))
        return 0

    code = forked(run)
    return code, int(counted.read_text()) if code == 0 else dies_at


def copied(folder: Path, where: Path) -> Path:
    shutil.copytree(folder.parent, where / "run", dirs_exist_ok=True)
    return where / "run/checkpoints"


def moment(folder: Path) -> float:
    tensor: Tensor = module.read_optimizer(folder)["moment"]
    return float(tensor[0])


def require_whole(checkpoints: Path) -> None:
    """The newest checkpoint is of one step, every byte right, and the best one is there."""
    remove_leftovers(checkpoints)
    newest, remarks = newest_intact(checkpoints)
    assert newest is not None and not remarks
    step = read_state(newest)["step"]
    assert step in (2, 3) and moment(newest) == step
    assert damage(checkpoints / "best") == []
    assert moment(checkpoints / "best") == read_state(checkpoints / "best")["step"]
    assert not list(checkpoints.glob(".*"))


@pytest.fixture
def num_calls(folder: Path, third_step: Saving, tmp_path: Path) -> int:
    code, calls = crash(copied(folder, tmp_path / "counting"), third_step)
    assert code == 0
    return calls


def test_dying_before_any_call(folder: Path, third_step: Saving, num_calls: int, tmp_path: Path) -> None:
    assert num_calls > 40
    for dies_at in range(num_calls):
        checkpoints = copied(folder, tmp_path / f"{dies_at}")
        assert crash(checkpoints, third_step, dies_at) == (DIED, dies_at)
        require_whole(checkpoints)
        third_step(checkpoints)  # the same command again
        require_whole(checkpoints)
        assert sorted(path.name for path in checkpoints.iterdir()) == ["best", "step-2", "step-3"]
        shutil.rmtree(tmp_path / f"{dies_at}")


def test_a_power_cut_before_any_call(folder: Path, third_step: Saving, num_calls: int, tmp_path: Path) -> None:
    """What was not flushed is cut or empty: the newest checkpoint that is whole is taken, and there is one."""
    choose = random.Random(0)
    for dies_at in range(num_calls):
        for attempt in range(many(2)):
            where = tmp_path / f"{dies_at}-{attempt}"
            checkpoints = copied(folder, where)
            assert crash(checkpoints, third_step, dies_at, choose) == (DIED, dies_at)
            require_whole(checkpoints)
            shutil.rmtree(where)


@pytest.mark.parametrize("removed", ["flush", "_commit"])
def test_each_protection_is_needed(
    removed: str, folder: Path, third_step: Saving, num_calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without flushing, or without renaming what is whole, the tests above fail."""
    replacements = {"flush": lambda _path: None, "_commit": written_in_place}
    monkeypatch.setattr(module, removed, replacements[removed])
    choose, broken = random.Random(0), 0
    for dies_at in range(num_calls):
        checkpoints = copied(folder, tmp_path / f"{dies_at}")
        if crash(checkpoints, third_step, dies_at, choose)[0] == DIED:
            broken += not stands(checkpoints)
        shutil.rmtree(tmp_path / f"{dies_at}")
    assert broken


def stands(checkpoints: Path) -> bool:
    try:
        require_whole(checkpoints)
    except (AssertionError, SeedbedError):
        return False
    return True


def written_in_place(temporary: Path, folder: Path) -> None:
    """How many programs save: file by file onto the old ones."""
    folder.mkdir(exist_ok=True)
    for path in sorted(temporary.rglob("*")):
        target = folder / path.relative_to(temporary)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            path.replace(target)


def flip(path: Path, choose: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    path.unlink()
    path.write_bytes(data)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def is_refused(folder: Path) -> bool:
    """Whether the folder is known to be damaged before anything in it is used."""
    newest, _ = newest_intact(folder.parent)
    return newest is None


def test_every_flipped_bit_is_found(folder: Path, tmp_path: Path) -> None:
    choose, whole = random.Random(0), tmp_path / "one/checkpoints/step-1"
    shutil.copytree(folder / "step-1", whole)
    for number in range(many(1000)):
        path = choose.choice(files_of(whole))
        before = path.read_bytes()
        flip(path, choose)
        assert is_refused(whole), (number, path)
        path.write_bytes(before)
    assert not is_refused(whole)


def test_every_cut_is_found(folder: Path, tmp_path: Path) -> None:
    choose, whole = random.Random(0), tmp_path / "one/checkpoints/step-1"
    shutil.copytree(folder / "step-1", whole)
    for path in files_of(whole):
        before = path.read_bytes()
        size = len(before)
        header = 8 + int.from_bytes(before[:8], "little") if path.suffix == ".safetensors" else size // 2
        lengths = {0, 1, 7, 8, 9, header - 1, header, header + 1, size - 1}
        for length in sorted(lengths | {choose.randrange(size) for _ in range(25)}):
            if length < size:
                path.write_bytes(before[:length])
                assert is_refused(whole), (path, length)
        path.write_bytes(before)
    assert not is_refused(whole)


def test_the_newest_whole_one_is_taken_and_the_damage_told(folder: Path, model: Any) -> None:
    save(folder / "step-3", model, 3)
    flip(folder / "step-3/model.safetensors", random.Random(0))
    newest, [remark] = newest_intact(folder)
    assert newest is not None and newest.name in ("best", "step-2")
    assert "step-3" in remark and "model.safetensors" in remark


def test_without_digests_a_flipped_bit_goes_unseen(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "one/checkpoints/step-1"
    shutil.copytree(folder / "step-1", whole)
    manifest = json.loads((whole / module.MANIFEST).read_text(encoding="utf-8"))
    flip(whole / "model.safetensors", random.Random(0))
    assert is_refused(whole)
    monkeypatch.setattr(
        module, "sha256_of", lambda path: manifest["files"][path.relative_to(whole).as_posix()]["sha256"]
    )
    assert not is_refused(whole)
