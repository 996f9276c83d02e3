"""Text that is read shard by shard: rows once each, three shards on disk, the exact place after a stop."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from seedbed.cli.app import run
from seedbed.data.python_docs import python_docs
from seedbed.data.rows import PackedRows
from seedbed.data.sources import from_texts
from seedbed.data.store import Reading, open_store
from seedbed.data.streaming import ShardRows, StreamedRows, find_shards
from seedbed.errors import ConfigError, DataError, MissingExtra
from seedbed.runs.info import read_run
from seedbed.text.tokenizer import train_char
from seedbed.train.corpus import open_run_texts
from tests.runs.conftest import RunIt, read_metrics, same_run
from tests.runs.test_distributed import EQUAL, Together, curve
from tests.runs.test_training import build

SHARDS = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JSONL files of real text."""
    folder = tmp_path_factory.mktemp("shards")
    texts = [" ".join(text.split())[:400] for text in python_docs()[: 20 * SHARDS]]
    for number in range(SHARDS):
        lines = [json.dumps({"text": text}) for text in texts[number::SHARDS]]
        (folder / f"part-{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


STREAMING: dict[str, Any] = {"streaming": True, "tokenizer": "char", "vocab_size": None, "max_steps": 200}


@pytest.fixture
def make_rows(tmp_path: Path) -> Callable[..., tuple[StreamedRows, list[int]]]:
    """`make_rows(3, wanted=50)`: rows of so many small shards, and the numbers of those that were opened."""
    reading = Reading(train_char(["abcdefghij 0123456789"]))

    def make(num_shards: int, wanted: int) -> tuple[StreamedRows, list[int]]:
        opened: list[int] = []

        def open_shard(number: int) -> ShardRows:
            opened.append(number)
            texts = from_texts([f"{letter} {number % 10}" * 9 for letter in "abcdef"])
            store = open_store(texts, reading, cache=tmp_path / "cache")
            return ShardRows(PackedRows(store, np.arange(6), 8, seed=1), store.path)

        return StreamedRows(num_shards, open_shard, seed=1, wanted=lambda _targets: wanted), opened

    return make


def test_shards_too_short_for_a_row_are_left_out(run_it: RunIt, shards: Path, tmp_path: Path) -> None:
    """As the last piece of a text that was cut into files of one size."""
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    for name, text in {"empty": "", "blank": '{"text": ""}\n', "short": '{"text": "A few words."}\n'}.items():
        (folder / f"part-{name}.jsonl").write_text(text)
    log = io.StringIO()
    outcome = run_it(tmp_path / "a", data=str(folder), log=log, **STREAMING)
    assert (outcome.exit_code, outcome.summary["steps"]) == (0, 200)
    said = " ".join(log.getvalue().split())
    for name in ("empty", "blank", "short"):
        assert said.count(f"part-{name}.jsonl is left out: ") == 1


def test_each_pass_has_every_row_of_every_shard_once(make_rows: Callable[..., Any]) -> None:
    rows, _ = make_rows(SHARDS, wanted=10_000)
    a_shard = rows.num_ready
    labels = np.concatenate([rows.row(0, index).labels for index in range(2 * SHARDS * a_shard)])
    assert rows.found == [a_shard] * (2 * SHARDS)
    first, second = np.split(labels, 2)
    assert (np.sort(first) == np.sort(second)).all()
    assert (first != second).any()
    numbers = [str(number) for number in range(SHARDS)]
    by_shard = [Counter(first)[token] for token in train_char(["abcdefghij 0123456789"]).encode("".join(numbers))]
    assert set(by_shard) == {6 * 9}


def test_few_shards_are_on_disk_at_once(make_rows: Callable[..., Any], tmp_path: Path) -> None:
    rows, _ = make_rows(8, wanted=10_000)
    for index in range(6 * rows.num_ready):
        rows.row(0, index)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) <= 3


def test_a_place_is_found_without_the_shards_before_it(make_rows: Callable[..., Any]) -> None:
    rows, _ = make_rows(8, wanted=10_000)
    place = 5 * rows.num_ready + 3
    expected = rows.row(0, place).input_ids
    again, opened = make_rows(8, wanted=10_000)
    again.found = list(rows.found)
    assert (again.row(0, place).input_ids == expected).all()
    assert len(set(opened)) <= 4  # the first, what was begun after it, its own, the one after that


def test_a_run_goes_on_at_its_place(run_it: RunIt, shards: Path, tmp_path: Path) -> None:
    options = {**STREAMING, "data": str(shards), "max_seq_len": 16, "dropout": 0.1, "save_every": 60}
    run_it(tmp_path / "straight", **options)
    for step in (5, 130):
        assert run_it(tmp_path / "stopped", stop_at=step, **options).exit_code == 130
    assert run_it(tmp_path / "stopped", **options).exit_code == 0
    same_run(tmp_path / "stopped", tmp_path / "straight")
    assert len(shard_rows(tmp_path / "straight")) > 1


@pytest.mark.parametrize("change", [{"max_seq_len": 64}, {"val_split": 0.5}, {"packing": False}, {"seed": 7}])
def test_a_branch_with_other_rows_counts_them_anew(
    run_it: RunIt, shards: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    options = {**STREAMING, "data": str(shards), "max_seq_len": 16, "max_steps": 150}
    run_it(tmp_path / "a", **options)
    branch = {**options, "resume_from": str(tmp_path / "a/checkpoints/final"), "max_steps": 160}
    run_it(tmp_path / "b", **{**branch, **change})
    run_it(tmp_path / "straight", **{**options, **change, "max_steps": 160})
    counted = [shard_rows(tmp_path / name) for name in ("b", "straight")]
    assert counted[0] == counted[1] != shard_rows(tmp_path / "a")


def test_a_branch_with_the_same_rows_does_not_count_them_anew(run_it: RunIt, shards: Path, tmp_path: Path) -> None:
    options = {**STREAMING, "max_seq_len": 16, "max_steps": 150}
    run_it(tmp_path / "a", data=str(shards), **options)
    branch = {**options, "resume_from": str(tmp_path / "a/checkpoints/final"), "max_steps": 160, "learning_rate": 1e-4}
    job = build(tmp_path / "b", shards, **branch)
    assert isinstance(job.rows, StreamedRows)
    assert job.rows.found == shard_rows(tmp_path / "a")
    assert len(job.rows.found) > 1


def shard_rows(run: Path) -> list[int]:
    rows: list[int] = json.loads((run / "checkpoints/final/seedbed/state.json").read_text())["shard_rows"]
    return rows


def test_what_a_run_held_out_is_of_the_shard_that_it_divided(
    run_it: RunIt, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of all files together other documents would be held out, most of which it learnt."""
    outcome = run_it(tmp_path / "run", **{**STREAMING, "data": str(shards), "max_steps": 3, "max_seq_len": 16})
    held_out = list(open_run_texts(read_run(tmp_path / "run").options, "run").held_out_documents())
    first = [json.loads(line)["text"] for line in (shards / "part-0.jsonl").read_text().splitlines()]
    assert set(held_out) <= set(first)
    assert len(held_out) == outcome.summary["text"]["val_documents"]
    capsys.readouterr()
    assert run(["evaluate", "--model", str(tmp_path / "run"), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["bytes"] == sum(len(text.encode()) for text in held_out)
    assert "Warning" not in printed.err


def test_several_processes_stream_the_same(shards: Path, tmp_path: Path) -> None:
    together = Together(shards, tmp_path / "logs")
    options = {**STREAMING, "max_seq_len": 16, "max_steps": 120, "eval_every": 60, "learning_rate": 1e-4}
    options = {name: value for name, value in options.items() if value is not None}
    from tests.runs import test_distributed

    kept = {name: value for name, value in test_distributed.OPTIONS.items() if name != "vocab_size"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_distributed, "OPTIONS", kept)
        assert together(1, tmp_path / "one", batch_size=8, **options) == [0]
        assert together(2, tmp_path / "two", batch_size=4, **options) == [0, 0]
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=10 * EQUAL)


def test_an_address_is_read_like_files(run_it: RunIt, shards: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in shards.iterdir():
        store.pipe(f"/bucket/{path.name}", path.read_bytes())
    options = {**STREAMING, "max_seq_len": 16, "max_steps": 60}
    run_it(tmp_path / "here", data=str(shards), **options)
    run_it(tmp_path / "there", data="memory://bucket/part-*.jsonl", **options)
    assert read_metrics(tmp_path / "here") == read_metrics(tmp_path / "there")


def test_what_is_wrong_with_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="there is nothing there"):
        find_shards("memory://nowhere/*.jsonl")
    with pytest.raises(ConfigError, match="nosuch"):
        find_shards("nosuch://bucket/*.jsonl")
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(MissingExtra, match=re.escape("seedbed[streaming]")):
        find_shards("memory://bucket/*.jsonl")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_steps": None}, "give --max_steps or --max_tokens"),
        ({"epochs": 3}, "--epochs 3"),
        ({"augment_word_swap": True}, "--augment_word_swap"),
    ],
)
def test_what_contradicts_streaming(
    run_it: RunIt, shards: Path, tmp_path: Path, options: dict[str, Any], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        run_it(tmp_path / "run", data=str(shards), **{**STREAMING, **options})
