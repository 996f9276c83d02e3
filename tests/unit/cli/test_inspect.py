"""tokenizer train / show, data list / show, verify: what they print and what they never look at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from seedbed.cli.app import run
from seedbed.config import TextOptions
from seedbed.text.tokenizer import Tokenizer
from seedbed.train.corpus import open_texts


def run_json(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    """Run a verb with --json: its standard output must be one line with one object, and nothing else."""
    capsys.readouterr()
    assert run([*words, "--json"]) == code
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    result = json.loads(printed)
    assert isinstance(result, dict)
    return result


@pytest.fixture
def marked_text(tmp_path: Path) -> Path:
    """JSONL whose every document has a letter of its own, found nowhere else."""
    rows = [{"text": f"Row {number} tells of {chr(0x1000 + number)} and more. " * 5} for number in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_held_out_documents_are_never_seen(
    kind: str, marked_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tokenizer"
    size = ["--vocab_size", "1000"] if kind == "bpe" else []
    words = ["tokenizer", "train", "--type", kind, "--data", str(marked_text), "--output", str(folder), *size]
    facts = run_json(words, capsys)
    assert facts["type"] == kind
    assert facts["bytes_per_token"] > 1
    texts = open_texts(TextOptions(data=str(marked_text)))
    held_out, training = "".join(texts.held_out_documents()), "".join(texts.training_documents())
    held_letters = {character for character in held_out if not character.isascii()}
    seen_letters = {character for character in training if not character.isascii()}
    assert held_letters
    assert not held_letters & seen_letters
    tokenizer = Tokenizer.load(folder)
    assert facts["vocab_size"] == tokenizer.vocab_size
    if kind == "char":
        assert all(len(tokenizer.encode(letter)) == 1 for letter in seen_letters)
    assert all(len(tokenizer.encode(letter)) > 1 for letter in held_letters)
    assert tokenizer.decode(tokenizer.encode(held_out)) == held_out


def test_with_val_data_all_of_data_is_training_text(
    marked_text: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tokenizer"
    words = ["tokenizer", "train", "--type", "char", "--data", str(marked_text), "--output", str(folder)]
    run_json([*words, "--val_data", str(text_file)], capsys)
    assert len(Tokenizer.load(folder).encode("".join(chr(0x1000 + number) for number in range(40)))) == 40


def test_nothing_held_out_means_nothing_measured(
    small_text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tokenizer", "train", "--data", str(small_text_file), "--val_split", "0", "--vocab_size", "300"]
    assert run_json([*words, "--output", str(tmp_path / "a")], capsys)["bytes_per_token"] is None
    assert run([*words, "--output", str(tmp_path / "b")]) == 0
    assert "not measured" in capsys.readouterr().out


def test_the_vocabulary_has_the_size_asked_for(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tokenizer", "train", "--data", str(text_file), "--vocab_size", "700", "--output", str(tmp_path / "t")]
    facts = run_json(words, capsys)
    assert facts["vocab_size"] == 700
    assert 2 < facts["bytes_per_token"] < 5


def test_training_a_tokenizer_replaces_nothing(
    small_text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious.txt").write_text("mine", encoding="utf-8")
    words = ["tokenizer", "train", "--data", str(small_text_file), "--output", str(tmp_path)]
    assert run(words) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_tokenizer_may_go_into_the_working_folder(
    small_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert run(["tokenizer", "train", "--type", "char", "--data", str(small_text_file), "--output", "."]) == 0
    assert "tokenizer.json" in {path.name for path in here.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_tokenizer_that_the_disk_refuses_leaves_nothing(
    small_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tokenizer", "train", "--type", "char", "--data", str(small_text_file), "--output"]
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert run([*words, str(tmp_path / "file" / "t")]) == 8
    assert "choose another" in capsys.readouterr().err
    write = Path.write_text

    def full(path: Path, text: str, **kwargs: Any) -> int:
        if path.name == "tokenizer_config.json":
            raise OSError(28, "No space left on device")
        return write(path, text, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    assert run([*words, str(tmp_path / "t")]) == 8
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--type", "words"], "--type words"),
        (["--type", "char", "--vocab_size", "300"], "--vocab_size"),
        (["--vocab_size", "256"], "257"),
        (["--max_seq_len", "64"], "--max_seq_len"),
        (["--tokenizer", "char"], "--tokenizer"),
    ],
)
def test_flags_that_mean_nothing_to_a_tokenizer_are_refused(
    flags: list[str], word: str, small_text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "t"
    assert run(["tokenizer", "train", "--data", str(small_text_file), "--output", str(output), *flags]) == 2
    assert word in capsys.readouterr().err
    assert not output.exists()


def test_show_tells_size_special_tokens_and_cuts(
    tiny_run: Path, small_text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny_run / "tokenizer")
    facts = run_json(["tokenizer", "show", folder, "--text", "an é", "--data", str(small_text_file)], capsys)
    assert facts["vocab_size"] == 300
    assert facts["eos_id"] == 0
    assert facts["bytes_per_token"] > 1
    assert [token["id"] for token in facts["tokens"]] == Tokenizer.load(folder).encode("an é")
    assert run(["tokenizer", "show", folder, "--text", "an"]) == 0
    text = capsys.readouterr().out
    assert "300 tokens" in text
    assert "<|endoftext|> (0)" in text


def test_show_of_a_folder_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tokenizer", "show", str(tmp_path)]) == 4
    assert str(tmp_path) in capsys.readouterr().err


def test_data_list_names_the_sources(capsys: pytest.CaptureFixture[str]) -> None:
    facts = run_json(["data", "list"], capsys)
    by_name = {source["name"]: source for source in facts["sources"]}
    assert {"python-docs", "wikitext-2", "wikitext-103", "tinystories", "alpaca"} <= set(by_name)
    assert by_name["wikitext-2"]["splits"] == ["train", "validation", "test"]
    assert all(source["about"] and source["size"] for source in by_name.values())
    assert run(["data", "list"]) == 0
    assert "python-docs" in capsys.readouterr().out


def test_data_show_is_what_the_model_sees(
    small_text_file: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_run / "tokenizer"
    words = ["data", "show", "--data", str(small_text_file), "--tokenizer", str(folder), "--max_seq_len", "32"]
    facts = run_json([*words, "--num", "2"], capsys)
    texts = open_texts(TextOptions(data=str(small_text_file)))
    assert facts["documents"] == len(list(texts.training_documents()))
    assert facts["validation_documents"] == len(list(texts.held_out_documents())) > 0
    assert len(facts["examples"]) == 2
    tokenizer = Tokenizer.load(folder)
    for example in facts["examples"]:
        ids, labels, segments = example["input_ids"], example["labels"], example["segment_ids"]
        assert len(ids) == len(labels) == len(segments) == 32
        assert example["text"] == tokenizer.decode(ids)
        assert all(labels[i] == ids[i + 1] for i in range(31) if segments[i] == segments[i + 1])


def test_data_show_has_no_flags_of_training(small_text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max_steps", "10", "--seed", "1", "--device", "cpu", "--sample_prompt", "x", "--streaming"]
    assert run(["data", "show", "--data", str(small_text_file), "--max_seq_len", "one", *flags]) == 2
    said = capsys.readouterr().err
    for flag in ("--max_steps", "--seed", "--device", "--sample_prompt", "--streaming"):
        assert f"unknown option {flag}" in said
    assert "--max_seq_len one (set on the command line): expected a valid integer" in said
    assert said.count("expected") == 1


def test_data_show_marks_padding(small_text_file: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "show", "--data", str(small_text_file), "--tokenizer", str(tiny_run / "tokenizer")]
    facts = run_json([*words, "--no_packing", "--max_seq_len", "2000", "--num", "100"], capsys)
    assert facts["rows"] == facts["documents"] == len(facts["examples"])
    assert all(example["labels"][-1] == -100 for example in facts["examples"])
    targets = sum(label != -100 for example in facts["examples"] for label in example["labels"])
    assert targets == facts["tokens"]


def test_data_show_for_people(small_text_file: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "show", "--data", str(small_text_file), "--tokenizer", str(tiny_run / "tokenizer")]
    assert run([*words, "--num", "1", "--max_seq_len", "64"]) == 0
    text = capsys.readouterr().out
    assert "held out" in text
    assert "Row 0: 64 of 64 tokens predicted" in text
    assert "Row 1" not in text


def test_verify(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = tiny_run / "checkpoints" / "best"
    assert run_json(["verify", str(best)], capsys) == {"checkpoint": str(best), "intact": True, "problems": []}
    assert run_json(["verify", str(tiny_run)], capsys)["checkpoint"] == str(best)
    copy = tmp_path / "copy"
    shutil.copytree(best, copy)
    (copy / "model.safetensors").write_bytes(b"short")
    facts = run_json(["verify", str(copy)], capsys, code=4)
    assert facts["intact"] is False
    assert facts["problems"] == [f"model.safetensors: 5 bytes instead of {(best / 'model.safetensors').stat().st_size}"]
    assert run(["verify", str(copy)]) == 4
    assert "model.safetensors: 5 bytes" in capsys.readouterr().err


def test_verify_looks_at_all_checkpoints_of_a_run(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    assert run(["verify", str(copy)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(list((copy / "checkpoints").iterdir())) > 2
    (copy / "checkpoints/step-3/model.safetensors").write_bytes(b"short")
    facts = run_json(["verify", str(copy)], capsys, code=4)
    [problem] = facts["problems"]
    assert problem.startswith("step-3/model.safetensors: 5 bytes")


def test_verify_of_a_folder_without_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert run(["verify", str(tmp_path)]) == 4
    assert "manifest" in capsys.readouterr().err
    assert run(["verify", str(tmp_path / "nowhere")]) == 2
