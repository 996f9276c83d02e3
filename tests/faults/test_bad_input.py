"""Bad input: each a clear error that names the culprit, the right exit code, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from seedbed.cli.app import run
from seedbed.runs.folder import RunFolder

Fails = Callable[..., str]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def fails(work: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """`fails(code, words)`: the verb must end with this exit code, a message, and no new file; gives the message."""

    def check(code: int, words: list[str], folder: Path = work) -> str:
        before = {path: path.stat().st_size for path in folder.rglob("*")}
        capsys.readouterr()
        assert run(words) == code
        message = capsys.readouterr().err
        assert message.startswith(("error: ", "Usage: "))
        assert "Traceback" not in message
        assert {path: path.stat().st_size for path in folder.rglob("*")} == before
        return message

    return check


@pytest.fixture
def pretrain(fails: Fails, tiny_flags: list[str], work: Path) -> Fails:
    """`pretrain(code, flags)`: a tiny run that must fail before it begins."""

    def check(code: int, flags: list[str], output: str = "run") -> str:
        return fails(code, ["pretrain", *tiny_flags, "--output", str(work / output), "--max_steps", "2", *flags])

    return check


def copy_model(tiny_run: Path, folder: Path) -> Path:
    """A model folder as other programs write it, without our manifest."""
    shutil.copytree(tiny_run / "checkpoints" / "best", folder)
    shutil.rmtree(folder / "seedbed")
    return folder


# Text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ("is empty",)),
        ("blank.txt", b" \n\n \t\n" * 100, ("no text",)),
        ("photo.txt", b"\x89PNG\r\n" + b"words \0" * 100, ("binary", "byte 12")),
        ("latin.txt", b"good line\n" * 20_000 + b"caf\xe9\n", ("not UTF-8", "0xe9", "line 20001")),
        ("utf16.txt", "words ".encode("utf-16") * 50, ("UTF-16",)),
        ("short.txt", b"One.\n\nTwo.\n", ("short.txt",)),
    ],
)
@pytest.mark.parametrize("trained", [False, True], ids=["trains a tokenizer", "has a tokenizer"])
def test_text_that_cannot_be_learnt(
    name: str,
    content: bytes,
    words: tuple[str, ...],
    trained: bool,
    tiny_run: Path,
    tiny_flags: list[str],
    work: Path,
    fails: Fails,
) -> None:
    (work / name).write_bytes(content)
    flags = [*tiny_flags, "--data", name, "--output", "run"]
    if trained:
        place = flags.index("--vocab_size")
        flags[place : place + 2] = ["--tokenizer", str(tiny_run / "tokenizer")]
    message = fails(3, ["pretrain", *flags])
    assert name in message
    assert all(word in message for word in words), message


def test_text_shorter_than_one_context(small_text_file: Path, work: Path, pretrain: Fails) -> None:
    text = small_text_file.read_text(encoding="utf-8")[:600]
    (work / "short.txt").write_text(text, encoding="utf-8")
    message = pretrain(3, ["--data", "short.txt", "--max_seq_len", "2000"])
    assert "--max_seq_len" in message
    assert "2000" in message.replace(",", "")


def test_one_document_cannot_be_split(work: Path, pretrain: Fails) -> None:
    (work / "one.txt").write_text("One paragraph only. " * 500, encoding="utf-8")
    assert "--val_split 0" in pretrain(3, ["--data", "one.txt"])


def test_a_missing_file_is_answered_with_the_nearest(work: Path, pretrain: Fails) -> None:
    (work / "book.txt").write_text("words", encoding="utf-8")
    assert "--data bok.txt" in (message := pretrain(3, ["--data", "bok.txt"]))
    assert "book.txt?" in message
    assert "python-docs?" in pretrain(3, ["--data", "pythn-docs"])
    assert "no file matches" in pretrain(3, ["--data", "*.csv"])
    (work / "folder").mkdir()
    assert "no text files in folder" in pretrain(3, ["--data", "folder"])


def test_val_data_is_checked_as_data_is(small_text_file: Path, work: Path, pretrain: Fails) -> None:
    (work / "empty.txt").write_bytes(b"")
    assert "empty.txt" in pretrain(3, ["--data", str(small_text_file), "--val_data", "empty.txt"])
    assert "--val_data nowhere.txt" in pretrain(3, ["--data", str(small_text_file), "--val_data", "nowhere.txt"])


def test_data_must_be_given(pretrain: Fails) -> None:
    assert "--data is missing" in pretrain(2, [])


GOOD_ROW = json.dumps({"text": "A row with enough words in it to be a row. " * 20}) + "\n"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": "cut of', ("not a JSON object", "column")),
        ('["a", "list"]', ("list", "not an object")),
        ('{"body": "in another column"}', ("no column 'text'", "body", "--text_column")),
        ('{"text": 7}', ("column 'text'", "int")),
        ('{"text": null}', ("column 'text'", "NoneType")),
        ('{"text": "\\ud800"}', ("surrogate",)),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(row: str, words: tuple[str, ...], work: Path, pretrain: Fails) -> None:
    (work / "rows.jsonl").write_text(GOOD_ROW * 6 + row + "\n" + GOOD_ROW, encoding="utf-8")
    message = pretrain(3, ["--data", "rows.jsonl"])
    assert "rows.jsonl, line 7" in message
    assert all(word in message for word in words), message


def test_a_table_that_is_none(work: Path, pretrain: Fails) -> None:
    (work / "rows.parquet").write_bytes(b"PAR1 but not really")
    assert "rows.parquet" in pretrain(3, ["--data", "rows.parquet"])


def test_a_parquet_file_without_the_column(work: Path, pretrain: Fails) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["a", "b"]}), work / "rows.parquet")
    message = pretrain(3, ["--data", "rows.parquet"])
    assert "rows.parquet has no column 'text'" in message
    assert "body" in message


# Options


def test_unknown_flags_and_keys_are_listed_together(work: Path, pretrain: Fails) -> None:
    (work / "my.yaml").write_text("lerning_rate: 1\nepochs: yes\n", encoding="utf-8")
    message = pretrain(2, ["--config", "my.yaml", "--num_layer", "3"])
    assert "unknown option lerning_rate in my.yaml; did you mean learning_rate?" in message
    assert "unknown option --num_layer; did you mean num_layers?" in message
    assert "--epochs True (from my.yaml)" in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--d_model", "50", "--num_heads", "4"], ("d_model 50", "num_heads 4")),
        (["--num_heads", "4", "--num_kv_heads", "3"], ("num_heads 4", "num_kv_heads 3")),
        (["--arch", "gpt2", "--num_kv_heads", "1"], ("num_kv_heads 1", "gpt2")),
        (["--d_model", "6", "--num_heads", "2"], ("head_dim 3", "even")),
        (["--device", "toaster"], ("--device toaster",)),
        (["--device", "cuda:99"], ("--device cuda:99", "no such device")),
        (["--model", "tinny"], ("--model tinny", "tiny?")),
        (["--config", "nowhere.yaml"], ("--config nowhere.yaml",)),
        (["--sample_prompt", "word " * 200], ("--sample_prompt", "context")),
        (["--document", "chapter"], ("--document chapter",)),
    ],
)
def test_options_that_cannot_be(
    flags: list[str], words: tuple[str, ...], small_text_file: Path, pretrain: Fails
) -> None:
    message = pretrain(2, ["--data", str(small_text_file), *flags])
    assert all(word in message for word in words), message


def test_a_tokenizer_that_is_not_there(small_text_file: Path, tiny_flags: list[str], fails: Fails) -> None:
    place = tiny_flags.index("--vocab_size")
    tiny_flags[place : place + 2] = ["--tokenizer", "./nowhere"]
    words = ["pretrain", "--data", str(small_text_file), "--output", "run", *tiny_flags]
    assert "tokenizer ./nowhere does not exist" in fails(2, words)


def test_cuda_where_there_is_none(
    small_text_file: Path, pretrain: Fails, monkeypatch: pytest.MonkeyPatch, tiny_run: Path, fails: Fails
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "--device cuda" in pretrain(2, ["--data", str(small_text_file), "--device", "cuda"])
    words = ["--model", str(tiny_run), "--device", "cuda"]
    assert "--device cuda" in fails(2, ["evaluate", "--data", str(small_text_file), *words])
    assert "--device cuda" in fails(2, ["generate", *words])


def test_a_context_above_the_positions_of_a_models_folder(
    tiny_run: Path, small_text_file: Path, work: Path, fails: Fails
) -> None:
    folder = copy_model(tiny_run, work / "model")
    words = ["--model", str(folder), "--max_seq_len", "64", "--device", "cpu", "--vocab_size", "300"]
    message = fails(2, ["pretrain", "--data", str(small_text_file), "--output", "run", *words])
    assert "--max_seq_len 64 is above the 32 positions" in message
    assert "--max_seq_len 64 is above the 32 positions" in fails(2, ["plan", "pretrain", *words])
    message = fails(2, ["evaluate", "--model", str(folder), "--data", str(small_text_file), "--max_seq_len", "64"])
    assert "64" in message
    assert "32" in message


def test_files_that_were_in_the_output_folder_stay(work: Path, pretrain: Fails) -> None:
    """`fails` compares every file before and after."""
    (work / "mine").mkdir()
    (work / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    pretrain(3, ["--data", "nowhere.txt"], output="mine")
    pretrain(2, ["--d_model", "50", "--num_heads", "4", "--data", "x"], output="mine")


# The disk


def test_no_room_for_the_first_checkpoint(
    small_text_file: Path, pretrain: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=10**9, free=1000))
    message = pretrain(8, ["--data", str(small_text_file)])
    assert "first checkpoint" in message
    assert "--output" in message


def test_an_output_that_cannot_be_a_folder(small_text_file: Path, work: Path, pretrain: Fails) -> None:
    (work / "file").write_text("in the way", encoding="utf-8")
    assert "--output" in pretrain(8, ["--data", str(small_text_file)], output="file/run")
    assert "--output" in pretrain(8, ["--data", str(small_text_file)], output="file")


def test_a_run_folder_in_use(small_text_file: Path, work: Path, pretrain: Fails) -> None:
    other = RunFolder(work / "run")
    try:
        assert f"{work / 'run'}: another process" in pretrain(5, ["--data", str(small_text_file)])
    finally:
        other.close()


def test_an_unfinished_run_in_use(tiny_run: Path, work: Path, fails: Fails) -> None:
    shutil.copytree(tiny_run, work / "run")
    summary = json.loads((work / "run" / "metrics.json").read_text(encoding="utf-8"))
    (work / "run" / "metrics.json").write_text(json.dumps({**summary, "status": "interrupted"}), encoding="utf-8")
    other = RunFolder(work / "run")
    try:
        config = str(work / "run" / "config.yaml")
        fails(5, ["pretrain", "--config", config, "--output", str(work / "run")])
    finally:
        other.close()


# Going on from checkpoints


def test_resume_from_nowhere(small_text_file: Path, pretrain: Fails) -> None:
    message = pretrain(2, ["--data", str(small_text_file), "--resume_from", "runs/gone/checkpoints/step-9"])
    assert "--resume_from runs/gone/checkpoints/step-9" in message


def test_resume_from_a_damaged_checkpoint(tiny_run: Path, work: Path, fails: Fails) -> None:
    shutil.copytree(tiny_run, work / "run")
    weights = work / "run" / "checkpoints" / "step-3" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    weights.unlink()  # it shares its bytes with other names
    content[-1] ^= 1
    weights.write_bytes(content)
    message = fails(4, ["pretrain", "--resume_from", "run/checkpoints/step-3", "--output", "new"])
    assert "--resume_from run/checkpoints/step-3" in message
    assert "model.safetensors" in message


def test_resume_from_a_folder_of_another_program(tiny_run: Path, work: Path, fails: Fails) -> None:
    copy_model(tiny_run, work / "model")
    assert "manifest" in fails(4, ["pretrain", "--resume_from", "model", "--output", "new"])


def test_resume_from_with_another_tokenizer(tiny_run: Path, small_text_file: Path, work: Path, fails: Fails) -> None:
    words = ["tokenizer", "train", "--data", str(small_text_file), "--vocab_size", "290", "--output"]
    assert run([*words, str(work / "other")]) == 0
    shutil.copytree(tiny_run, work / "run")
    start = ["pretrain", "--resume_from", "run/checkpoints/step-3", "--output", "new"]
    message = fails(2, [*start, "--tokenizer", "other"])
    assert "--tokenizer other" in message
    message = fails(2, [*start, "--vocab_size", "400"])
    assert "--vocab_size 400 (the run has 300)" in message


def test_a_run_with_only_damaged_checkpoints(tiny_run: Path, work: Path, fails: Fails) -> None:
    shutil.copytree(tiny_run, work / "run")
    summary = json.loads((work / "run" / "metrics.json").read_text(encoding="utf-8"))
    (work / "run" / "metrics.json").write_text(json.dumps({**summary, "status": "interrupted"}), encoding="utf-8")
    for folder in (work / "run" / "checkpoints").iterdir():
        (folder / "config.json").unlink()
    (work / "run" / ".lock").touch()
    config = str(work / "run" / "config.yaml")
    message = fails(4, ["pretrain", "--config", config, "--output", "run"])
    assert "no intact checkpoint" in message
    assert all(name in message for name in ("best", "final", "step-3", "step-6"))


def test_the_same_folder_with_other_options(tiny_run: Path, work: Path, fails: Fails) -> None:
    shutil.copytree(tiny_run, work / "run")
    config = str(work / "run" / "config.yaml")
    message = fails(2, ["pretrain", "--config", config, "--output", "run", "--learning_rate", "0.5", "--seed", "9"])
    assert "--learning_rate 0.5 (the run has 0.002)" in message
    assert "--seed 9 (the run has 0)" in message


# Models that are evaluated


def test_a_tokenizer_larger_than_the_model(tiny_run: Path, text_file: Path, work: Path, fails: Fails) -> None:
    folder = copy_model(tiny_run, work / "model")
    assert run(["tokenizer", "train", "--data", str(text_file), "--vocab_size", "400", "--output", "larger"]) == 0
    for path in (work / "larger").iterdir():
        shutil.copy(path, folder / path.name)
    for words in (["evaluate", "--data", str(text_file)], ["generate"]):
        message = fails(2, [*words, "--model", str(folder)])
        assert "400" in message
        assert "300" in message
        assert str(folder) in message


def test_pickled_weights_are_refused(tiny_run: Path, text_file: Path, work: Path, fails: Fails) -> None:
    folder = copy_model(tiny_run, work / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = fails(4, ["evaluate", "--model", str(folder), "--data", str(text_file)])
    assert "pytorch_model.bin is pickled" in message
    assert "save_pretrained" in message


def test_evaluate_outside_a_run_needs_data(tiny_run: Path, work: Path, fails: Fails) -> None:
    folder = copy_model(tiny_run, work / "model")
    message = fails(2, ["evaluate", "--model", str(folder)])
    assert "--data is missing" in message
    assert str(folder) in message


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_models_that_are_none(verb: str, text_file: Path, work: Path, fails: Fails) -> None:
    data = ["--data", str(text_file)] if verb == "evaluate" else []
    assert "--model nowhere" in fails(2, [verb, "--model", "nowhere", *data])
    (work / "empty").mkdir()
    assert "empty" in fails(4, [verb, "--model", "empty", *data])
    (work / "empty" / "config.json").write_text("{", encoding="utf-8")
    assert "config.json" in fails(4, [verb, "--model", "empty", *data])


def test_evaluate_on_text_that_is_none(tiny_run: Path, work: Path, fails: Fails) -> None:
    (work / "empty.txt").write_bytes(b"")
    (work / "photo.txt").write_bytes(b"\0" * 50)
    for name in ("empty.txt", "photo.txt", "nowhere.txt"):
        assert name in fails(3, ["evaluate", "--model", str(tiny_run), "--data", name])


def test_a_damaged_checkpoint_is_not_evaluated(tiny_run: Path, text_file: Path, work: Path, fails: Fails) -> None:
    folder = work / "best"
    shutil.copytree(tiny_run / "checkpoints" / "best", folder)
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    message = fails(4, ["evaluate", "--model", "best", "--data", str(text_file)])
    assert "best: damaged: model.safetensors" in message


def test_a_prompt_longer_than_the_context(tiny_run: Path, fails: Fails) -> None:
    message = fails(2, ["generate", "--model", str(tiny_run), "--prompt", "many words " * 60])
    assert "32" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("few.jsonl", b'{"text": "a"}\n{"text": ', "line 2"),
        ("few.txt", b"ab\xff", "byte 2"),
        ("nul.txt", b"a\0b", "NUL"),
    ],
)
def test_what_is_broken_comes_before_what_is_short(
    name: str, content: bytes, words: str, work: Path, pretrain: Fails
) -> None:
    (work / name).write_bytes(content)
    message = pretrain(3, ["--data", name])
    assert name in message and words in message


def test_all_that_is_wrong_is_said_though_a_file_cannot_be_read(fails: Fails) -> None:
    words = ["pretrain", "--config", "nothere.yaml", "--lerning_rate", "3", "--epochs", "two"]
    lines = fails(2, words).splitlines()
    assert [line.split()[1] for line in lines] == ["--config", "unknown", "--epochs"]


def test_text_and_model_are_missed_together(fails: Fails) -> None:
    assert [line.split()[1] for line in fails(2, ["finetune"]).splitlines()] == ["--data", "--model"]


def test_sizes_are_looked_at_with_everything_else(fails: Fails) -> None:
    lines = fails(2, ["pretrain", "--d_model", "50", "--num_heads", "4", "--min_lr", "1"]).splitlines()
    assert [line.split()[1] for line in lines] == ["--data", "--min_lr", "d_model"]


@pytest.mark.parametrize("verb", [["pretrain", "--data", "a.txt"], ["plan", "pretrain"], ["plan", "finetune"]])
def test_a_preset_that_is_no_model(fails: Fails, verb: list[str]) -> None:
    assert "a preset without a shape; give it with --config" in fails(2, [*verb, "--model", "data-limited"])


def test_a_preset_where_weights_are_needed(fails: Fails, work: Path) -> None:
    (work / "a.txt").write_text("Some words. " * 100)
    message = fails(2, ["finetune", "--model", "tiny", "--data", "a.txt", "--output", "out"])
    assert "--model tiny is a preset for pretrain" in message


def test_a_finished_run_says_how_to_go_further(
    fails: Fails, tiny_run: Path, small_text_file: Path, tmp_path: Path
) -> None:
    run_folder = tmp_path / "Run"
    shutil.copytree(tiny_run, run_folder)
    words = ["pretrain", "--data", str(small_text_file), "--epochs", "99", "--output", str(run_folder)]
    assert f"--resume_from {run_folder}/checkpoints/final" in fails(2, words)
