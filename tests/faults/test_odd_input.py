"""Files that are no files, rows that are barely rows, and every key of a config misspelt."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seedbed.cli.app import run
from seedbed.config import REGIMES, Layer, resolve
from seedbed.errors import ConfigError

FLAGS = [
    "pretrain",
    "--output=run",
    "--max_steps=1",
    "--device=cpu",
    "--precision=fp32",
    "--no_tensorboard",
    "--no_report",
]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(data: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a run on this text, which must end with 3 soon and leave nothing behind."""
    began = time.monotonic()
    assert run([*FLAGS, "--data", data, "--model", "tiny"]) == 3
    assert time.monotonic() - began < 5
    assert not Path("run").exists()
    return " ".join(capsys.readouterr().err.split())


def test_a_pipe(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(work / "pipe.txt")
    assert "pipe.txt" in refused("pipe.txt", capsys)


def test_a_folder_without_text(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "empty").mkdir()
    assert "empty" in refused("empty", capsys)


def test_a_link_to_itself(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "loop.txt").symlink_to("loop.txt")
    assert "loop.txt" in refused("loop.txt", capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "secret.txt").write_text("words " * 100)
    (work / "secret.txt").chmod(0)
    assert "secret.txt" in refused("secret.txt", capsys)


def test_a_gigabyte_of_nothing(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file with a hole: one line of zeros, refused at the first of them."""
    with (work / "hole.txt").open("wb") as file:
        file.write(b"words ")
        file.truncate(2**30)
    message = refused("hole.txt", capsys)
    assert "binary" in message and "byte 6" in message


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n\n"])
@pytest.mark.parametrize("begin", ["", "\ufeff"])
def test_ends_of_lines_and_a_mark_at_the_beginning_are_no_trouble(end: str, begin: str, work: Path) -> None:
    text = "\r\n\r\n".join(f"Document {number} says {number * 7}." for number in range(400))
    (work / "fine.txt").write_bytes((begin + text + end).encode())
    assert run([*FLAGS, "--data", "fine.txt", "--model", "tiny", "--max_seq_len", "32", "--vocab_size", "300"]) == 0


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("[" * 10_000 + "]" * 10_000, "too deep"),
        ('{"text": ' + '{"a": ' * 10_000 + "1" + "}" * 10_001, "too deep"),
        ('{"text": NaN}', "float"),
        ('{"text": ' + "9" * 5000 + "}", "line 3"),
        ("\x00", "line 3"),
    ],
)
@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_row_that_is_barely_one(
    row: str, words: str, place: int, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"text": f"Row {number}."}) for number in range(5)]
    rows.insert(place, row)
    (work / "rows.jsonl").write_text("\n".join(rows))
    message = refused("rows.jsonl", capsys)
    assert words.replace("line 3", f"line {place + 1}") in message or ("\x00" in row and "rows.jsonl" in message)


def test_a_field_of_ten_megabytes_is_text(work: Path) -> None:
    long = " ".join(str(number) for number in range(1_500_000))
    rows = [json.dumps({"text": text}) for text in (long[:10_000_000], "Short.", "Another.")]
    (work / "rows.jsonl").write_text("\n".join(rows))
    flags = [*FLAGS, "--model", "tiny", "--max_seq_len", "32", "--tokenizer", "char", "--val_split", "0"]
    assert run([*flags, "--data", "rows.jsonl"]) == 0


def misspelt(name: str, choose: random.Random) -> str:
    """One letter left out, doubled, replaced or swapped with the next."""
    place = choose.randrange(len(name))
    letter = choose.choice(string.ascii_lowercase)
    ways = (
        name[:place] + name[place + 1 :],
        name[:place] + name[place] + name[place:],
        name[:place] + letter + name[place + 1 :],
        name[:place] + name[place + 1 : place + 2] + name[place : place + 1] + name[place + 2 :],
    )
    return choose.choice(ways)


@pytest.mark.parametrize("regime", ["scratch", "finetune", "continue"])
def test_every_key_misspelt_is_refused_with_the_right_one(regime: str) -> None:
    names = {name for section in REGIMES[regime].sections for name in section.model_fields}
    choose, tried = random.Random(0), 0
    for name in sorted(names):
        for _ in range(5):
            wrong = misspelt(name, choose)
            if wrong in names or len(name) < 4:
                continue
            with pytest.raises(ConfigError) as refusal:
                resolve(regime, [Layer("file.yaml", {wrong: 1})])
            problem = next(problem for problem in refusal.value.problems if wrong in problem)
            assert "did you mean" in problem and "file.yaml" in problem, problem
            tried += 1
    assert tried > 200


@pytest.mark.parametrize("value", [[], {}, "words", float("nan"), -1, True])
def test_every_number_of_the_wrong_kind_is_refused(value: object) -> None:
    for section in REGIMES["scratch"].sections:
        for name, field in section.model_fields.items():
            if field.annotation not in (int, float):
                continue
            with pytest.raises(ConfigError) as refusal:
                resolve("scratch", [Layer("file.yaml", {"model": "tiny", name: value})])
            assert any(name in problem for problem in refusal.value.problems), (name, value)


@pytest.mark.parametrize("cache", ["text.txt", "text.txt/below", "/proc/none/at/all"])
def test_a_cache_that_cannot_be_made(
    cache: str, work: Path, small_text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "text.txt").write_bytes(small_text_file.read_bytes())
    monkeypatch.setenv("SEEDBED_CACHE", cache)
    assert run([*FLAGS, "--data", "text.txt", "--model", "tiny", "--vocab_size", "300"]) == 8
    assert "$SEEDBED_CACHE" in capsys.readouterr().err
    assert not Path("run").exists()


def test_the_home_of_nobody(work: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: ARG001
    assert "~nobody-by-this-name/text.txt" in refused("~nobody-by-this-name/text.txt", capsys)


def test_a_user_without_a_home(
    work: Path, small_text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a container that runs under a number which no user has."""
    monkeypatch.delenv("SEEDBED_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    assert run([*FLAGS, "--data", str(small_text_file), "--model", "tiny", "--vocab_size", "300"]) == 8
    assert "$SEEDBED_CACHE" in capsys.readouterr().err
    assert not (work / "run").exists()


def test_an_argument_that_is_not_utf8(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the system hands over a name in Latin-1."""
    argument = os.fsdecode(b"caf\xe9.txt")
    assert run([*FLAGS, "--data", argument, "--model", "tiny"]) == 2
    assert "'caf\\udce9.txt': not text in UTF-8" in capsys.readouterr().err
    assert not (work / "run").exists()


def test_an_encoding_that_lacks_characters(work: Path) -> None:
    """As on a Windows console, or with LC_ALL=C: a sample of the model's, or a name, must not end a run."""
    (work / "text.txt").write_text("".join(f"première — ünï ☃ {n}\n\n" for n in range(400)), encoding="utf-8")
    command = [sys.executable, "-m", "seedbed", *FLAGS, "--data=text.txt", "--model=tiny", "--tokenizer=char"]
    command += ["--max_seq_len=32", "--sample_prompt=ü ☃"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"writes: ? ?" in done.stdout
