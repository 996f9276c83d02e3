"""Figures of a run as columns, whatever the state of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from seedbed.runs.series import CHUNK, read_series


def write(folder: Path, *records: dict[str, Any] | str) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def step(number: int, **figures: Any) -> dict[str, Any]:
    return {"step": number, "epoch": number / 10, "tokens": number * 64, "elapsed_hours": number / 3600, **figures}


def test_figures_stand_where_they_were_measured(tmp_path: Path) -> None:
    records = [step(1, train_loss=3.0, lr=1e-3), step(2, train_loss=2.0, lr=2e-3), step(2, val_loss=2.5)]
    series = read_series(write(tmp_path, *records))
    assert sorted(series) == ["lr", "train_loss", "val_loss"]
    assert series["train_loss"].values.tolist() == [3.0, 2.0]
    assert (series["val_loss"].step.tolist(), series["val_loss"].tokens.tolist()) == ([2], [128])
    late = series["train_loss"][series["train_loss"].step > 1]
    assert (late.values.tolist(), late.epoch.tolist()) == ([2.0], [0.2])


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    assert read_series(tmp_path) == {}
    assert read_series(write(tmp_path)) == {}


def test_a_half_written_record_is_passed_over(tmp_path: Path) -> None:
    whole = json.dumps(step(2, train_loss=2.0))
    for end in range(len(whole) + 1):
        series = read_series(write(tmp_path, step(1, train_loss=3.0), whole[:end]))
        assert series["train_loss"].values.tolist() == [3.0]


def test_lines_that_are_no_record_and_values_that_are_no_number(tmp_path: Path) -> None:
    strange = ["nonsense\n", "[1, 2]\n", '{"step": 3, "train_loss"\n', "null\n", '{"other": 1}\n']
    odd: list[Any] = [
        step(4, train_loss=None),
        step(5, train_loss="x", lr=1.0),
        step(8, train_loss=10**400, lr=2.0),
        '{"step": 6, "train_loss": NaN}\n',
    ]
    series = read_series(write(tmp_path, step(1, train_loss=3.0), *strange, *odd, step(7, train_loss=1.0)))
    assert series["train_loss"].step.tolist() == [1, 7]
    assert series["lr"].step.tolist() == [5, 8]


def test_of_a_step_recorded_twice_the_last_counts(tmp_path: Path) -> None:
    records = [step(number, train_loss=float(number)) for number in (1, 2, 3)]
    again = [step(2, train_loss=20.0), step(3, train_loss=30.0), step(4, train_loss=40.0)]
    series = read_series(write(tmp_path, *records, *again))
    assert series["train_loss"].step.tolist() == [1, 2, 3, 4]
    assert series["train_loss"].values.tolist() == [1, 20, 30, 40]


def test_records_of_several_versions(tmp_path: Path) -> None:
    records = [step(1, train_loss=3.0), step(2, train_loss=2.0, data_share=0.1), {"step": 3, "train_loss": 1.0}]
    series = read_series(write(tmp_path, *records))
    assert series["train_loss"].values.tolist() == [3.0, 2.0, 1.0]
    assert series["data_share"].step.tolist() == [2]


def test_a_file_of_many_chunks(tmp_path: Path) -> None:
    count = 4 * CHUNK // len(json.dumps(step(1, train_loss=1.0)))
    series = read_series(write(tmp_path, *(step(number, train_loss=number / 7) for number in range(count))))
    assert series["train_loss"].step.tolist() == list(range(count))
    assert np.array_equal(series["train_loss"].values, np.arange(count) / 7)


def test_one_line_longer_than_a_chunk(tmp_path: Path) -> None:
    long = step(1, train_loss=1.0, **{f"val_loss/{'x' * 50}{number}": 1.0 for number in range(CHUNK // 50)})
    assert len(read_series(write(tmp_path, long, step(2, train_loss=2.0)))["train_loss"]) == 2
