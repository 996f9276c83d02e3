"""The table of runs, from folders as training leaves them and as accidents do."""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from seedbed.errors import ConfigError
from seedbed.runs.columns import COLUMNS, SHOWN_BY_DEFAULT, cell, status
from seedbed.runs.folder import RunFolder
from seedbed.runs.parents import changed_options, parent_run
from seedbed.runs.table import default_columns, distinct_names, load_runs, render, table
from seedbed.runs.values import as_json
from tests.unit.runs.folders import write_run


def shown(run: Any) -> dict[str, str]:
    return {name: cell(value, COLUMNS[name]) for name, value in table([run])[0].items()}


def test_a_row_of_document_five(tmp_path: Path) -> None:
    options = {"lora_r": 64, "lora_alpha": 64, "learning_rate": 2.5e-5, "warmup_ratio": 0.3, "batch_size": 4}
    run = write_run(
        tmp_path / "run_16",
        {**options, "weight_decay": 0.1, "min_lr": 1e-5, "seed": 3, "grad_accumulation": 2},
        {
            "trainable_parameters": 31_593_536,
            "train_loss": 1.25,
            "judge": {"score": 51.8, "low": 49.9, "high": 54.1, "model": "m"},
            "notes": "gentle",
            "hours": 0.3445,
        },
    )
    assert shown(run) == {
        "name": "run_16",
        "parent": "",
        "changed": "",
        "model": "models/base",
        "parameters": "135M",
        "trainable": "32M",
        "method": "lora",
        "batch": "4 x 2",
        "epochs": "3",
        "steps": "100",
        "optimizer": "adamw",
        "lr": "2.5e-05",
        "min_lr": "1e-05",
        "warmup": "0.3",
        "weight_decay": "0.1",
        "rank": "64",
        "alpha": "64",
        "train_loss": "1.2500",
        "val_loss": "2.5000",
        "perplexity": "12.18",
        "bits_per_byte": "1.0000",
        "judge": "51.8 ± 2.1",
        "tokens_per_second": "1,234",
        "time": "20.7 min",
        "peak_memory": "2.1 GB",
        "device": "cpu (x86_64, 1 threads)",
        "seed": "3",
        "status": "done",
        "notes": "gentle",
        "path": str(tmp_path / "run_16"),
    }
    raw = table([run])[0]
    assert (raw["lr"], raw["parameters"], raw["time"]) == (2.5e-5, 134_515_008, 0.3445)
    assert raw["judge"] == {"score": 51.8, "low": 49.9, "high": 54.1}


@pytest.mark.parametrize(
    ("regime", "options", "summary", "method"),
    [
        ("scratch", {}, {}, "scratch"),
        ("finetune", {}, {}, "whole"),
        ("finetune", {"last_blocks": 2}, {}, "last 2 blocks"),
        ("finetune", {"freeze": "embeddings"}, {}, "without embeddings"),
        ("finetune", {"lora": True, "last_blocks": 2}, {}, "lora last 2 blocks"),
        ("continue", {"method": "naive"}, {}, "continue naive, whole"),
        ("continue", {"lora": True}, {"method": {"replay": 0.05, "interpolate": True}}, None),
    ],
)
def test_methods_in_words(
    tmp_path: Path, regime: str, options: dict[str, Any], summary: dict[str, Any], method: str | None
) -> None:
    run = write_run(tmp_path / "run", options, summary, regime=regime)
    assert shown(run)["method"] == (method or "continue replay 0.05 + interpolate, lora")


def test_warm_up_in_steps_or_as_a_share(tmp_path: Path) -> None:
    assert shown(write_run(tmp_path / "steps", {"warmup_steps": 30}))["warmup"] == "30 steps"
    assert shown(write_run(tmp_path / "none", {"warmup_steps": 0}))["warmup"] == "0"
    assert shown(write_run(tmp_path / "share", {"warmup_ratio": 0.25}))["warmup"] == "0.25"


def test_what_changed_from_the_parent(tmp_path: Path) -> None:
    """The parent's path starts where the run was begun, wherever the table is made."""
    write_run(tmp_path / "runs" / "one", {"learning_rate": 5e-5, "output": "runs/one"})
    child = write_run(
        tmp_path / "runs" / "two",
        {"learning_rate": 2.5e-5, "seed": 1, "output": "runs/two", "log_every": 7},
        {"parent": "runs/one"},
    )
    assert changed_options(child) == {"learning_rate": (5e-5, 2.5e-5), "seed": (0, 1)}
    assert shown(child)["changed"] == "learning_rate 5e-05 -> 2.5e-05, seed 0 -> 1"
    assert shown(child)["parent"] == "one"


def test_a_parent_of_another_regime_lends_only_what_was_chosen_here(tmp_path: Path) -> None:
    base = write_run(tmp_path / "book", {"output": str(tmp_path / "book")}, regime="scratch")
    tuned = {"model": str(tmp_path / "book"), "data": "/d/questions.json", "epochs": 2}
    child = write_run(tmp_path / "answers", tuned, {"parent": str(base.path / "checkpoints" / "best")})
    assert shown(child)["changed"] == "data book.txt -> questions.json, model small -> book, epochs 3 -> 2"
    child = write_run(tmp_path / "from-run", tuned, {"parent": str(base.path)})
    assert shown(child)["changed"] == "data book.txt -> questions.json, epochs 3 -> 2"


def test_a_parent_that_is_no_run_or_gone_or_damaged(tmp_path: Path) -> None:
    for parent in ("HuggingFaceTB/SmolLM2-135M", str(tmp_path), str(tmp_path / "gone"), str(tmp_path / "child"), 5):
        assert shown(write_run(tmp_path / "child", {}, {"parent": parent}))["changed"] == ""
    write_run(tmp_path / "damaged").path.joinpath("config.yaml").write_text("a: [", encoding="utf-8")
    assert shown(write_run(tmp_path / "child", {}, {"parent": str(tmp_path / "damaged")}))["changed"] == ""


@pytest.mark.parametrize("output", ["runs/child", None])
def test_a_model_on_the_hub_is_no_run_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"output": output} if output else {}
    for name in ("gpt2", "SmolLM2-135M"):
        write_run(tmp_path / "runs" / name, {"seed": 1})
    for parent in ("gpt2", "HuggingFaceTB/SmolLM2-135M"):
        child = write_run(tmp_path / "runs" / "child", options, {"parent": parent})
        assert parent_run(child) is None
        monkeypatch.chdir(tmp_path / "runs")
        assert parent_run(child) is None
        monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("parent", "output"),
    [("runs/one", "runs/two"), ("runs/one", None), ("sweep/one", "sweep/two"), ("one", "two"), ("/gone/one", "x/two")],
)
def test_a_parent_that_was_moved_beside_its_child_is_found(tmp_path: Path, parent: str, output: str | None) -> None:
    write_run(tmp_path / "moved" / "one")
    child = write_run(tmp_path / "moved" / "two", {"output": output} if output else {}, {"parent": parent})
    found = parent_run(child)
    assert found is not None and found.name == "one"


def test_running_or_killed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {}, {"status": "running"})
    assert status(run) == "killed"
    writer = RunFolder(run.path)
    assert status(run) == "running"
    assert status(run) == "running", "looking at a run does not disturb it"
    writer.close()
    assert status(run) == "killed"
    (run.path / ".lock").unlink()
    assert status(run) == "killed"
    (run.path / "metrics.json").unlink()
    [info] = load_runs([run.path])
    assert status(info) == "not begun"


def test_damaged_folders_are_rows_or_passed_over(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    damaged = write_run(tmp_path / "damaged").path
    (damaged / "config.yaml").write_text("learning_rate: [", encoding="utf-8")
    odd = write_run(tmp_path / "odd").path
    (odd / "config.yaml").write_text("learning_rate: high\nseed: .inf\nmodel: [a, b]\n", encoding="utf-8")
    summary = {"best_val_loss": "low", "hours": None, "parameters": [1], "notes": 3, "judge": 7, "steps": True}
    (odd / "metrics.json").write_text(json.dumps(summary), encoding="utf-8")
    half = write_run(tmp_path / "half").path
    (half / "metrics.json").write_text('{"status": "do', encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "metrics.json").write_text("{}", encoding="utf-8")
    found = load_runs([tmp_path, tmp_path / "good", tmp_path / "nowhere"])
    rows = {row["name"]: row for row in table(found)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "damaged": "unreadable",
        "good": "done",
        "half": "unreadable",
        "odd": "not begun",
    }
    assert rows["damaged"]["val_loss"] == 2.5
    assert (rows["odd"]["lr"], rows["odd"]["val_loss"], rows["odd"]["steps"]) == ("high", None, None)
    json.dumps(list(rows.values()), allow_nan=False)
    for form in ("table", "markdown", "csv"):
        assert "high" in render(list(rows.values()), ["all"], form)


def test_what_cannot_be_looked_into_hides_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "private", "z"):
        write_run(tmp_path / name)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "linked").symlink_to("a")
    (tmp_path / "notes.txt").write_text("", encoding="utf-8")
    is_file = Path.is_file

    def of_another_user(path: Path) -> bool:
        if path.parent.name == "private":
            raise PermissionError(13, "Permission denied")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", of_another_user)
    assert [run.name for run in load_runs([tmp_path])] == ["a", "z"]


def test_names_that_tell_runs_apart(tmp_path: Path) -> None:
    places = ["a/low/seed-0", "a/high/seed-0", "b/high/seed-0", "b/one"]
    runs = [write_run(tmp_path / place) for place in places]
    assert distinct_names(runs) == ["low/seed-0", "a/high/seed-0", "b/high/seed-0", "one"]
    assert distinct_names([]) == []
    assert len(set(distinct_names([runs[0], runs[0]]))) == 1


def test_columns_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--columns val_los: no such column; did you mean val_loss\?") as caught:
        table([write_run(tmp_path / "run")], ["val_los", "name", "colour"])
    assert len(caught.value.problems) == 3


def test_default_columns_are_those_with_values_that_fit(tmp_path: Path) -> None:
    rows = table([write_run(tmp_path / f"run-{number}") for number in range(3)])
    assert "judge" not in default_columns(rows)
    assert "rank" not in default_columns(rows)
    assert default_columns(rows) == [name for name in COLUMNS if name in default_columns(rows)]
    assert len(default_columns(rows, 60)) < len(default_columns(rows, 120)) <= len(default_columns(rows))
    assert {"name", "val_loss", "status"} <= set(default_columns(rows, 40))
    assert set(SHOWN_BY_DEFAULT) <= COLUMNS.keys()
    for width in (40, 80, 120):
        assert max(map(len, render(rows, width=width).splitlines())) <= width


def test_a_full_table_fits_a_usual_terminal(tmp_path: Path) -> None:
    """Everything that can be known is known, and of long names enough remains to know them by."""
    write_run(tmp_path / "parent")
    known = {
        "parent": str(tmp_path / "parent"),
        "notes": "a long note " * 9,
        "judge": {"score": 1.0},
        "train_loss": 1.0,
    }
    rows = table([write_run(tmp_path / f"{'long-' * 5}{n}", {"lora_r": n, "seed": n}, known) for n in range(1, 4)])
    lines = render(rows, width=120).splitlines()
    assert max(map(len, lines)) <= 120
    assert [line.split()[0] for line in lines[1:]] == [f"{'long-' * 5}{n}" for n in range(1, 4)]


def test_names_of_a_grid_stay_apart_on_a_terminal(tmp_path: Path) -> None:
    """The rate is in the middle of names that begin and end alike."""
    names = [f"batch_size-4_lora_r-16_learning_rate-{rate}_weight_decay-0.1_seed-0" for rate in (0.001, 0.005, 0.01)]
    rows = table([write_run(tmp_path / name) for name in names])
    for width in (80, 120):
        lines = render(rows, width=width).splitlines()
        assert max(map(len, lines)) <= width
        assert len({line.split()[0] for line in lines[1:]}) == 3
        assert lines[0].startswith("run ") and "val loss" in lines[0] and "status" in lines[0]
    assert [line.split()[0] for line in render(rows).splitlines()[1:]] == names


def test_markdown_and_csv(tmp_path: Path) -> None:
    rows = table([write_run(tmp_path / "a", {}, {"notes": "x | y\n\x1b[2J", "judge": {"score": 5.5}})])
    markdown = render(rows, ["name", "val_loss", "notes"], "markdown").splitlines()
    assert markdown == ["| run | val loss | notes |", "| --- | ---: | --- |", "| a | 2.5000 | x \\| y ?[2J |"]
    read = list(csv.reader(StringIO(render(rows, ["name", "lr", "notes", "judge", "rank"], "csv"))))
    assert read == [["name", "lr", "notes", "judge", "rank"], ["a", "2e-05", "x | y\n\x1b[2J", "5.5", ""]]


def test_every_column_is_documented() -> None:
    for name, column in COLUMNS.items():
        assert name == column.name
        assert column.about.endswith(".")
    page = (Path(__file__).parents[3] / "docs" / "runs.md").read_text(encoding="utf-8")
    for column in COLUMNS.values():
        assert f"| `{column.name}` | {column.heading} | {column.about} |" in page


def test_values_that_json_has_no_word_for() -> None:
    assert as_json([1, float("inf"), None, True, {"a"}]) == [1, "inf", None, True, "{'a'}"]
