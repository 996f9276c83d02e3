from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seedbed.config import DOMAIN_NAME
from seedbed.errors import CheckpointError
from seedbed.runs.history import (
    BASE,
    FILE,
    Figure,
    History,
    Stage,
    find_history,
    read_documents,
    read_history,
    read_history_file,
    write_documents,
    write_history,
)

LAW = Stage(
    "law",
    "/runs/law/checkpoints/best",
    "ab" * 32,
    run="/runs/law",
    data="gesetze.txt",
    method={"replay": 0.05, "learning_rate": 2e-5},
    why="es gibt gespeicherten Text, größer als nötig",
    max_seq_len=256,
    held_out_documents=12,
    held_out_bytes=34_567,
    steps=300,
    tokens=614_400,
    hours=0.25,
    peak_memory_mb=812.5,
    before={"base": Figure(3.0, 1.0), "law": Figure(4.0, 1.5)},
    after={"base": Figure(3.03, 1.01), "law": Figure(3.0, 1.2)},
)
HISTORY = History((Stage(BASE, "/models/base", "cd" * 32), LAW))


def model_folder(path: Path, history: History) -> Path:
    write_history(path / "seedbed" / FILE, history)
    return path


def test_a_history_comes_back_as_it_was(tmp_path: Path) -> None:
    assert read_history(model_folder(tmp_path, HISTORY)) == HISTORY
    text = (tmp_path / "seedbed" / FILE).read_text(encoding="utf-8")
    assert "größer" in text
    assert json.loads(text) == HISTORY.to_json()
    assert [path.name for path in (tmp_path / "seedbed").iterdir()] == [FILE]


def test_a_model_without_a_history(tmp_path: Path) -> None:
    assert read_history(tmp_path) is None
    assert find_history(tmp_path) is None
    assert read_history_file(tmp_path / FILE) is None


def test_stages_are_found_added_and_replaced() -> None:
    assert HISTORY.domains == ["base", "law"]
    assert HISTORY.stage("law") is LAW
    assert HISTORY.stage("medicine") is None
    medicine = Stage("medicine", "", "")
    longer = HISTORY.with_stage(medicine)
    assert longer.domains == ["base", "law", "medicine"]
    done = replace(medicine, model="/runs/medicine/checkpoints/final")
    assert longer.with_stage(done).stages == (*HISTORY.stages, done)
    assert HISTORY.domains == ["base", "law"]


@pytest.mark.parametrize("name", ["law", "a", "C4", "en-US.v2_final", "x" * 64])
def test_names_of_domains(name: str) -> None:
    assert DOMAIN_NAME.fullmatch(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".law", "-law", "a/b", "a\\b", "a b", "law\n", "größe", "x" * 65])
def test_names_that_are_no_folders(name: str) -> None:
    values = HISTORY.to_json()
    values["stages"][1]["domain"] = name
    with pytest.raises(CheckpointError, match=r"stages\.1\.domain"):
        History.from_json(values)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", 1.5, "steps"),
        ("steps", True, "steps"),
        ("steps", -1, "steps"),
        ("hours", "long", "hours"),
        ("hours", float("nan"), "JSON"),
        ("run", 3, "run"),
        ("method", ["replay"], "method"),
        ("why", None, "why"),
        ("pace", 3, "pace"),
        ("before", {"../law": {"loss": 1.0, "bits_per_byte": 1.0}}, "before"),
        ("after", {"law": {"loss": 1.0}}, r"after\.law\.bits_per_byte"),
        ("after", {"law": {"loss": 1.0, "bits_per_byte": -1.0}}, r"after\.law\.bits_per_byte"),
    ],
)
def test_a_stage_of_another_form_is_refused(key: str, value: Any, message: str) -> None:
    values = copy.deepcopy(HISTORY.to_json())
    values["stages"][1][key] = value
    with pytest.raises(CheckpointError, match=message):
        History.from_json(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "expected a JSON object"),
        ({"stages": []}, "version"),
        ({"version": "1", "stages": []}, "version"),
        ({"version": 0, "stages": []}, "version"),
        ({"version": 2, "pages": []}, "version 2.* install a newer"),
        ({"version": 1}, "stages"),
        ({"version": 1, "stages": []}, "`base` first"),
        ({**HISTORY.to_json(), "more": 1}, "more"),
        ({"version": 1, "stages": HISTORY.to_json()["stages"][::-1]}, "`base` first"),
        ({"version": 1, "stages": HISTORY.to_json()["stages"] * 2}, "each domain once"),
    ],
)
def test_a_history_of_another_form_is_refused(values: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        History.from_json(values)


@pytest.mark.parametrize("content", ["", "{", "\udcff", "[" * 100_000, '{"version": 7}'])
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    path = model_folder(tmp_path, HISTORY) / "seedbed" / FILE
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError) as caught:
        read_history(tmp_path)
    assert str(path) in str(caught.value)
    assert "copy the folder again" in str(caught.value)


def test_where_the_history_of_a_run_is(tmp_path: Path) -> None:
    """Of the best model, else the final one, else the one under way."""
    run = tmp_path / "run"
    for number, folder in enumerate(("history", "checkpoints/final/seedbed", "checkpoints/best/seedbed"), start=1):
        history = History((HISTORY.stages[0], replace(LAW, steps=number)))
        write_history(run / folder / FILE, history)
        assert find_history(run) == history
    assert find_history(run / "checkpoints" / "final") == History((HISTORY.stages[0], replace(LAW, steps=2)))


# Stored text

DOCUMENTS = ["Zwei\nZeilen\r\nund mehr", "", "größer", 'a "quote" \\ and \u2028 separators \x85\x0b', "🌱" * 3]


def test_documents_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "domains" / "law" / "held_out.jsonl"
    assert write_documents(path, iter(DOCUMENTS)) == sum(len(document.encode()) for document in DOCUMENTS)
    assert list(read_documents(path)) == DOCUMENTS
    content = path.read_bytes()
    assert content.count(b"\n") == len(DOCUMENTS)
    assert "größer".encode() in content
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "reserve.jsonl"
    assert write_documents(path, []) == 0
    assert list(read_documents(path)) == []


def test_half_written_documents_replace_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[str]:
        yield "new"
        raise OSError(28, "No space left on device")

    path = tmp_path / "reserve.jsonl"
    write_documents(path, ["old"])
    with pytest.raises(OSError, match="No space"):
        write_documents(path, broken())
    assert list(read_documents(path)) == ["old"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("line", ["", "3", '{"text": "a"}', '"half', r'"\ud83d"', "[" * 100_000])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "reserve.jsonl"
    path.write_text(f'"whole"\n{line}\n', encoding="utf-8")
    documents = read_documents(path)
    assert next(documents) == "whole"
    with pytest.raises(CheckpointError, match=r"reserve\.jsonl, line 2: expected a document"):
        next(documents)


def test_text_that_is_missing_or_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(read_documents(path))
    path.write_bytes(b'"gr\xf6\xdfer"\n')
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(read_documents(path))
