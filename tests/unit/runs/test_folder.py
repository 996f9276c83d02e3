from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from seedbed.disk import write_atomically
from seedbed.errors import RunInUseError, StorageError
from seedbed.runs.folder import RunFolder, read_records, read_summary


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(tmp_path / "runs" / "one")
    yield folder
    folder.close()


TRY = """
import sys
from pathlib import Path
from seedbed.errors import RunInUseError
from seedbed.runs.folder import RunFolder
try:
    RunFolder(Path(sys.argv[1]))
except RunInUseError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_one_process_writes_at_a_time(run: RunFolder) -> None:
    words = [sys.executable, "-c", TRY, str(run.path)]
    busy = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert busy.returncode == RunInUseError.exit_code == 5, busy.stderr
    assert str(run.path) in busy.stdout
    run.close()
    assert subprocess.run(words, capture_output=True, timeout=60).returncode == 0


def test_the_lock_of_a_killed_process_is_gone(tmp_path: Path) -> None:
    die = TRY + "\nimport os\nhold = RunFolder(Path(sys.argv[1]))\nos.kill(os.getpid(), 9)\n"
    done = subprocess.run([sys.executable, "-c", die, str(tmp_path / "run")], capture_output=True, timeout=60)
    assert done.returncode == -9
    RunFolder(tmp_path / "run").close()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match="choose another --output"):
        RunFolder(tmp_path / "file" / "run")


# Records


def test_records_are_lines_of_json(run: RunFolder) -> None:
    run.append("metrics.jsonl", {"step": 1, "train_loss": 2.5})
    run.append("metrics.jsonl", {"step": 2, "val_loss": 2.25})
    run.event("resume", 2, checkpoint="step-2")
    # Written at once, not when the run ends.
    assert list(read_records(run.path / "metrics.jsonl")) == [
        {"step": 1, "train_loss": 2.5},
        {"step": 2, "val_loss": 2.25},
    ]
    assert list(read_records(run.path / "events.jsonl")) == [{"event": "resume", "step": 2, "checkpoint": "step-2"}]


def test_numbers_that_json_has_no_name_for_are_our_mistake(run: RunFolder) -> None:
    with pytest.raises(ValueError, match="JSON"):
        run.append("metrics.jsonl", {"train_loss": float("nan")})


def test_a_half_written_last_line_is_passed_over(run: RunFolder) -> None:
    run.append("metrics.jsonl", {"step": 1})
    run.close()
    path = run.path / "metrics.jsonl"
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 2, "tra')
    assert list(read_records(path)) == [{"step": 1}]
    assert list(read_records(run.path / "absent.jsonl")) == []


def test_writing_on_after_a_crash_harms_no_record(run: RunFolder) -> None:
    run.event("resume", 1)
    run.close()
    with (run.path / "events.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"event": "skip')
    again = RunFolder(run.path)
    again.event("resume", 2)
    again.event("resume", 3)
    again.close()
    steps = [record["step"] for record in read_records(run.path / "events.jsonl")]
    assert steps == [1, 2, 3]


def test_truncate_forgets_what_came_after_a_checkpoint(run: RunFolder) -> None:
    run.append("metrics.jsonl", {"step": 1})
    run.append("samples.jsonl", {"step": 1})
    run.event("skipped_step", 1)
    kept = run.positions()
    assert kept == {
        "metrics.jsonl": (run.path / "metrics.jsonl").stat().st_size,
        "samples.jsonl": (run.path / "samples.jsonl").stat().st_size,
    }
    run.append("metrics.jsonl", {"step": 2})
    run.event("skipped_step", 2)
    run.truncate(kept)
    run.append("metrics.jsonl", {"step": 2, "again": True})
    assert list(read_records(run.path / "metrics.jsonl")) == [{"step": 1}, {"step": 2, "again": True}]
    assert list(read_records(run.path / "samples.jsonl")) == [{"step": 1}]
    assert len(list(read_records(run.path / "events.jsonl"))) == 2  # what happened stays told


def test_truncate_also_clears_a_half_written_line(run: RunFolder) -> None:
    run.append("metrics.jsonl", {"step": 1})
    kept = run.positions()
    run.close()
    with (run.path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"st')
    again = RunFolder(run.path)
    again.truncate(kept)
    again.append("metrics.jsonl", {"step": 2})
    assert list(read_records(run.path / "metrics.jsonl")) == [{"step": 1}, {"step": 2}]
    again.close()


def test_truncate_invents_nothing(run: RunFolder) -> None:
    run.append("metrics.jsonl", {"step": 1})
    run.truncate({"metrics.jsonl": 10_000, "samples.jsonl": 0})
    assert list(read_records(run.path / "metrics.jsonl")) == [{"step": 1}]
    assert not (run.path / "samples.jsonl").exists()


# Whole files


def test_the_summary_is_replaced_whole(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write_summary({"status": "running"})
    assert read_summary(run.path) == {"status": "running"}

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        run.write_summary({"status": "done"})
        assert run.unwritten is not None and "No space" in str(run.unwritten)
    assert read_summary(run.path) == {"status": "running"}
    assert not list(run.path.glob(".metrics*"))
    run.write_summary({"status": "done"})
    assert read_summary(run.path) == {"status": "done"} and run.unwritten is None


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_summary_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.json").write_text(content, encoding="utf-8")
    assert read_summary(tmp_path) == {}
    assert read_summary(tmp_path / "nowhere") == {}


def test_write_atomically_leaves_only_the_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "config.yaml", "a: 1\n")
    write_atomically(tmp_path / "config.yaml", "a: 2\n")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == "a: 2\n"


# A run that never began


def test_a_folder_made_for_nothing_is_removed(run: RunFolder) -> None:
    run.discard_if_empty()
    assert not run.path.exists()


def test_a_run_that_began_stays(run: RunFolder) -> None:
    run.write_config("seed: 0\n")
    run.discard_if_empty()
    assert (run.path / "config.yaml").exists()


def test_what_was_in_the_folder_before_is_never_removed(tmp_path: Path) -> None:
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter-1.txt").write_text("years of work", encoding="utf-8")
    (output / "checkpoints").mkdir()
    (output / "checkpoints" / "mine.txt").write_text(json.dumps({}), encoding="utf-8")
    run = RunFolder(output)
    run.discard_if_empty()
    run.close()
    left = {path.relative_to(output).as_posix() for path in output.rglob("*")}
    assert left - {".lock"} == {"chapter-1.txt", "checkpoints", "checkpoints/mine.txt"}
