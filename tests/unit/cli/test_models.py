"""pretrain, evaluate and generate on the command line: one JSON object there, everything else elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seedbed.cli.app import run


def run_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert run([*words, "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    result = json.loads(printed)
    assert isinstance(result, dict)
    return result


def test_pretrain_prints_its_summary(
    small_text_file: Path, tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    words = ["pretrain", "--data", str(small_text_file), "--output", str(output), "--max_steps", "2", *tiny_flags]
    assert run([*words, "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts.pop("run") == str(output)
    assert facts == json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    assert facts["status"] == "done"
    assert facts["steps"] == 2
    assert "Training complete!" in captured.err


@pytest.mark.parametrize("share", ["0", "0.1"])
def test_the_demo_measures_what_was_held_out_if_anything_was(
    share: str, small_text_file: Path, tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    words = ["demo", "--data", str(small_text_file), "--output", str(output), "--max_steps", "2", "--val_split", share]
    assert run([*words, *tiny_flags]) == 0
    said = capsys.readouterr().out
    assert ("tokens it has never seen" in said) == (share != "0")
    assert (f"evaluate --model {output} --data" in said) == (share == "0")
    assert Path(said.rpartition("from_pretrained('")[2].partition("'")[0]).is_dir()


def test_a_finished_run_is_left_alone(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file()}
    assert run(["pretrain", "--config", str(tiny_run / "config.yaml")]) == 0
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file()} == before


def test_the_config_of_a_run_repeats_it(
    small_text_file: Path, tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    # One step an epoch: more steps than the regime's epochs have, because only the steps were chosen.
    batch = ["--batch_size", "1000", "--max_steps", "5"]
    words = ["pretrain", "--data", str(small_text_file), *tiny_flags, *batch]
    ran = run_json([*words, "--output", str(first)], capsys)
    repeated = run_json(["pretrain", "--config", str(first / "config.yaml"), "--output", str(second)], capsys)
    assert ran["steps"] == repeated["steps"] == 5
    assert repeated["best_val_loss"] == ran["best_val_loss"]


def test_evaluate_on_a_text_and_on_what_the_run_held_out(
    tiny_run: Path, small_text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = run_json(["evaluate", "--model", str(tiny_run), "--data", str(small_text_file)], capsys)
    assert set(facts) == {
        "nats_per_token",
        "token_ppl",
        "word_ppl",
        "bits_per_byte",
        "tokens",
        "words",
        "bytes",
        "max_seq_len",
        "stride",
        "cut",
        "left_out",
        "model",
        "data",
    }
    assert facts["bytes"] == small_text_file.stat().st_size
    assert facts["max_seq_len"] == facts["stride"] == 32
    held_out = run_json(["evaluate", "--model", str(tiny_run), "--stride", "16"], capsys)
    assert held_out["stride"] == 16
    assert 0 < held_out["bytes"] < facts["bytes"] / 4
    assert held_out["data"] == f"held out by {tiny_run}"
    same = run_json(["evaluate", "--model", str(tiny_run / "checkpoints" / "best"), "--stride", "16"], capsys)
    assert same["nats_per_token"] == held_out["nats_per_token"]
    rounded = run_json(["evaluate", "--model", str(tiny_run), "--stride", "16", "--precision", "bf16"], capsys)
    assert 0 < abs(rounded["nats_per_token"] - held_out["nats_per_token"]) < 0.02


def test_evaluate_for_people(tiny_run: Path, small_text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", "--model", str(tiny_run), "--data", str(small_text_file)]) == 0
    text = capsys.readouterr().out
    for name in ("Nats per token", "Token perplexity", "Word perplexity", "Bits per byte", "Context", "Stride"):
        assert name in text


def test_evaluate_refuses_flags_that_mean_nothing(
    tiny_run: Path, small_text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["evaluate", "--model", str(tiny_run)]
    assert run([*model, "--format", "qa", "--document=line"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" has no meaning without --data")[0] for line in lines] == [
        "error: --format",
        "error: --document",
    ]
    assert run([*model, "--data", str(small_text_file), "--chat_template", "qa"]) == 2
    assert "--chat_template qa is for conversations" in capsys.readouterr().err
    assert run(["judge", "--model", str(tiny_run), "--format", "qa"]) == 2
    assert "--format has no meaning without --data" in capsys.readouterr().err


def test_generate_is_seeded_and_streams_what_it_returns(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", str(tiny_run), "--prompt", "The ", "--max_new_tokens", "12", "--seed", "3"]
    facts = run_json(words, capsys)
    [completion] = facts["completions"]
    assert completion["prompt"] == "The "
    assert completion["finish_reason"] in ("length", "eos", "stop")
    assert run_json(words, capsys) == facts
    assert run(words) == 0
    assert capsys.readouterr().out == f"The {completion['text']}\n"
    other = run_json([*words[:-1], "4"], capsys)
    assert other != facts


def test_generate_answers_a_batch_and_a_file(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("From a file", encoding="utf-8")
    words = ["generate", "--model", str(tiny_run), "--prompt", "One", "--prompt", "Another", "--prompt_file", str(path)]
    facts = run_json([*words, "--max_new_tokens", "4", "--greedy"], capsys)
    assert [completion["prompt"] for completion in facts["completions"]] == ["One", "Another", "From a file"]


def test_generate_lists_every_wrong_option(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--temperature", "0", "--top_p", "2", "--max_new_tokens", "some"]
    assert run(["generate", "--model", str(tiny_run), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["--max_new_tokens", "--temperature", "--top_p"]
    assert lines[1].endswith("; --greedy takes the likeliest token each time")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("evaluate --stride 0 --batch_size x", ["'--model'", "'--stride'", "'--batch_size'"]),
        ("evaluate --model x --formt qa --split test", ["--formt", "--split"]),
        ("generate --model x --topp 1 --system a --top_p 2", ["--topp", "--system", "--top_p"]),
        ("chat --model x --topp 1 --top_p 2", ["--topp", "--top_p"]),
        (
            "judge --model x --repeats 0 --split a --format qa --top_k 3",
            ["--split", "--format", "--repeats", "--top_k"],
        ),
        ("tokenizer train --output . --type x --val_split 3", ["--val_split", "--type", "--output"]),
    ],
)
def test_all_that_is_wrong_is_said_at_once(words: str, named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(named)
    assert all(line.startswith("error: ") and name in line for line, name in zip(lines, named, strict=True)), lines


def test_a_prompt_that_is_too_long_is_not_shown(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--model", str(tiny_run), "--prompt", "Many words. " * 50]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: Prompt 1 has ") and captured.err.count("\n") == 1


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_flags_that_mean_nothing_with_greedy_are_refused(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--greedy", "--top_k", "50", "--temperature", "0.8", "--seed", "1"]
    assert run([verb, "--model", "nowhere", *words]) == 2
    says = "has no meaning with --greedy; leave one of them out"
    assert capsys.readouterr().err.splitlines() == [f"error: --temperature {says}", f"error: --top_k {says}"]


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_prompt_file_that_cannot_be_read(
    content: bytes | None, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    assert run(["generate", "--model", str(tiny_run), "--prompt_file", str(path)]) == 3
    assert str(path) in capsys.readouterr().err


def test_a_model_that_was_not_taught_to_answer_does_not_chat(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["chat"], ["generate", "--chat", "--prompt", "Hello"]):
        assert run([*words, "--model", str(tiny_run)]) == 2
        assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory: 9 bytes\nframe #0")]
)
def test_memory_that_runs_out_outside_of_training(
    tiny_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr("seedbed.evaluate.evaluate", fail)
    assert run(["evaluate", "--model", str(tiny_run)]) == 7
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory (")
    monkeypatch.setattr("seedbed.evaluate.evaluate", lambda *_args, **_options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(["evaluate", "--model", str(tiny_run)])


def test_verbs_know_the_home_folder(
    small_text_file: Path,
    tiny_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shell leaves `--output=~/x` as it is."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    text = ["--data", str(small_text_file)]
    assert run(["tokenizer", "train", *text, "--vocab_size", "300", "--output=~/tokens"]) == 0
    words = ["demo", *text, *tiny_flags, "--max_steps", "1", "--output=~/run"]
    assert run(words) == 0
    assert run(["data", "show", *text, "--max_seq_len", "32", "--model=~/run"]) == 0
    assert run(["data", "show", *text, "--max_seq_len", "32", "--tokenizer=~/tokens"]) == 0
    assert run(["evaluate", "--model=~/run"]) == 0
    assert run(["import", str(home / "run/checkpoints/final"), "--output=~/copy"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert {path.name for path in home.iterdir()} >= {"tokens", "run", "copy"}


def test_evaluate_says_that_a_runs_text_has_changed(
    small_text_file: Path, tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(small_text_file.read_bytes())
    assert run(["pretrain", "--data", str(text), *tiny_flags, "--max_steps", "1", "--output", str(tmp_path / "a")]) == 0
    words = ["evaluate", "--model", str(tmp_path / "a")]
    assert run(words) == 0
    assert "Warning" not in capsys.readouterr().err
    text.write_bytes(small_text_file.read_bytes() * 2)
    assert run(words) == 0
    assert f"Warning: {text} is not the text that {tmp_path / 'a'} learnt from" in capsys.readouterr().err
