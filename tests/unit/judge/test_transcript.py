"""What was written once is found again, whatever happened in between."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from seedbed.errors import StorageError
from seedbed.judge.transcript import Transcript


def test_records_are_found_by_their_key(tmp_path: Path) -> None:
    path = tmp_path / "judge/scores.jsonl"
    written = Transcript(path)
    for number, key in enumerate("aba"):
        written.add({"key": key, "number": number, "text": "ü\n\ud800"})
    for transcript in (written, Transcript(path)):
        assert [record["number"] for record in transcript.find("a")] == [0, 2]
        assert [record["number"] for record in transcript.find("b")] == [1]
        assert transcript.find("c") == ()


def test_after_half_a_line_whole_ones_follow(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b", "rep')
    Transcript(path).add({"key": "c"})
    again = Transcript(path)
    assert [len(again.find(key)) for key in "abc"] == [1, 0, 1]


def _add(path: Path, key: str) -> None:
    transcript = Transcript(path)
    for number in range(50):
        transcript.add({"key": key, "number": number, "text": "x" * 3000})


def test_several_processes_may_add(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add, args=(path, key)) for key in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(json.loads(line) for line in path.read_text().splitlines() if line)
    transcript = Transcript(path)
    assert [len(transcript.find(key)) for key in "ab"] == [50, 50]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "judge").write_text("a file")
    with pytest.raises(StorageError, match=r"scores\.jsonl cannot be written"):
        Transcript(tmp_path / "judge/scores.jsonl").add({"key": "a"})
