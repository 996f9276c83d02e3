"""What cannot be fine-tuned: bad rows, templates, models and options, each named, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from seedbed.cli.app import run
from tests.faults.test_bad_input import Fails, copy_model

FLAGS = "--max_seq_len=32 --batch_size=4 --max_steps=1 --precision=fp32 --device=cpu --no_tensorboard --output=run"


def write_rows(path: Path, *rows: dict[str, Any]) -> str:
    """A file of ten good questions, and then these rows."""
    good = [{"question": f"Is it {i}?", "answer": f"{i}."} for i in range(10)]
    path.write_text(json.dumps([*good, *rows]), encoding="utf-8")
    return str(path)


@pytest.fixture
def base(tiny_run: Path, tmp_path: Path) -> Path:
    """A model folder of another program, with 32 positions and 300 tokens; every test has its own."""
    return copy_model(tiny_run, tmp_path / "base")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with questions that can be learnt."""
    folder = tmp_path / "work"
    folder.mkdir()
    write_rows(folder / "good.json")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def tune(base: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """`tune(code, flags)`: fine-tuning must end with this exit code, a message, and no new file."""

    def check(code: int, flags: list[str]) -> str:
        before = {path: path.stat().st_size for path in work.rglob("*")}
        capsys.readouterr()
        words = {"--data": "good.json", "--model": str(base)}
        given = [word for name, value in words.items() if name not in flags for word in (name, value)]
        assert run(["finetune", *FLAGS.split(), *given, *flags]) == code
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert "Traceback" not in message
        assert {path: path.stat().st_size for path in work.rglob("*")} == before
        return message

    return check


def train_adapter(base: Path, output: Path) -> Path:
    """The checkpoint of a LoRA run on `base`."""
    flags = ["finetune", *FLAGS.split(), "--data=good.json", f"--model={base}", "--lora", f"--output={output}"]
    assert run(flags) == 0
    return output / "checkpoints" / "final"


# Rows


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "Why?"}, ("nothing for 'answer'", "remove the row")),
        ({"question": "Why?", "answer": None}, ("an empty value for 'answer'",)),
        ({"question": "Why?", "answer": 7}, ("'answer' holds a int", "text is expected")),
        ({"prompt": "Why?", "completion": "So."}, ("nothing for 'question'", "prompt, completion")),
    ],
)
def test_a_row_that_is_not_a_question_and_its_answer(
    row: dict[str, Any], words: tuple[str, ...], work: Path, tune: Fails
) -> None:
    message = tune(3, ["--data", write_rows(work / "rows.json", row)])
    assert "rows.json, row 11" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("Why?", ("no list of messages",)),
        ([{"role": "user", "content": "Why?"}], ("no message of the assistant", "remove it")),
        ([{"role": "judge", "content": "Why?"}], ("message 1", "'judge'", "assistant")),
        ([{"role": "user"}], ("message 1", "'content'")),
    ],
)
def test_a_row_that_is_no_conversation(messages: Any, words: tuple[str, ...], work: Path, tune: Fails) -> None:
    (work / "chat.jsonl").write_text(json.dumps({"messages": messages}), encoding="utf-8")
    message = tune(3, ["--data", "chat.jsonl"])
    assert "chat.jsonl, line 1" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.json", '[{"question": "Why?", "answer": ', "rows.json"),
        ("rows.jsonl", '{"question": "Why?", "answer": "So."}\n{"question": \n', "rows.jsonl, line 2"),
        ("rows.json", "[]", "no rows"),
        ("rows.jsonl", '{"body": "Why?"}', "instruction, input, output"),
        ("pairs.txt", "QUESTION: Why?\nANSWER: So.\nQUESTION: How?\n", "pairs.txt, line 3"),
    ],
)
def test_a_file_that_is_broken(name: str, content: str, words: str, work: Path, tune: Fails) -> None:
    (work / name).write_text(content, encoding="utf-8")
    assert words in tune(3, ["--data", name])


def test_text_beside_conversations(work: Path, tune: Fails) -> None:
    (work / "book.txt").write_text("A text of some words. " * 50, encoding="utf-8")
    message = tune(3, ["--val_data", "book.txt"])
    assert all(word in message for word in ("good.json holds qa", "book.txt text", "both"))


def test_examples_so_long_that_no_answer_is_left(work: Path, tune: Fails) -> None:
    rows = [{"question": f"What is {i}, " + "again and " * 40 + "again?", "answer": "So."} for i in range(5)]
    (work / "long.json").write_text(json.dumps(rows), encoding="utf-8")
    message = tune(3, ["--data", "long.json"])
    assert all(word in message for word in ("every label is masked", "--max_seq_len 32", "Raise it")), message


# Templates


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("{% for message in messages %}\n{{ message.content }}", 2, ("line 2 is not Jinja",)),
        ("{% if %}", 2, ("line 1 is not Jinja",)),
        ("{{ raise_exception('no questions here') }}", 3, ("no questions here", "'Is it ")),
        ("{{ messages[9].content }}", 3, ("fails on the conversation of 2 messages",)),
        ("{{ messages.__class__.__mro__ }}", 2, ("may not", "Do not trust it")),
        ("{{ messages | length }} messages", 3, ("prints nothing of the answers",)),
    ],
)
def test_a_template_that_cannot_be_used(
    source: str, code: int, words: tuple[str, ...], work: Path, tune: Fails
) -> None:
    (work / "mine.jinja").write_text(source, encoding="utf-8")
    message = tune(code, ["--chat_template", "mine.jinja"])
    assert "chat template mine.jinja" in message
    assert all(word in message for word in words), message


def test_a_template_that_is_not_there(tune: Fails) -> None:
    message = tune(2, ["--chat_template", "chatlm"])
    assert all(word in message for word in ("--chat_template chatlm", "chatml?", ".jinja")), message


@pytest.mark.parametrize("flags", [["--chat_template", "chatml"], ["--train_on_prompt"]])
def test_what_is_for_conversations_with_plain_text(flags: list[str], work: Path, tune: Fails) -> None:
    (work / "plain.txt").write_text("Nobody asks here.\n\n" * 200, encoding="utf-8")
    message = tune(2, ["--data", "plain.txt", *flags])
    assert f"{flags[0]} is for conversations" in message


# Models


@pytest.mark.parametrize(
    ("name", "words"),
    [("./nowhere", "--model ./nowhere does not exist"), ("good.json", "--model good.json is a file")],
)
def test_a_model_that_is_not_there(name: str, words: str, tune: Fails) -> None:
    assert words in tune(2, ["--model", name])


def test_a_model_must_be_named(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["finetune", "--data", "good.json", "--output", "run"]) == 2
    message = capsys.readouterr().err
    assert "--model is missing" in message
    assert "HuggingFaceTB/SmolLM2-135M" in message
    assert not (work / "run").exists()


def test_a_gguf_file_is_no_model_folder(work: Path, tune: Fails) -> None:
    (work / "model.gguf").write_bytes(b"GGUF")
    assert "seedbed import model.gguf --output FOLDER" in tune(2, ["--model", "model.gguf"])


def test_a_family_that_is_not_known(base: Path, tune: Fails) -> None:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "model_type": "bert"}), encoding="utf-8")
    message = tune(2, [])
    assert "bert" in message
    assert "llama" in message


def test_a_shard_that_is_missing(base: Path, tune: Fails) -> None:
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    files = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(files.values())):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    (base / "model-00002-of-00002.safetensors").unlink()
    message = tune(4, [])
    assert str(base) in message
    assert "model-00002-of-00002.safetensors is missing" in message


def test_weights_that_are_pickled(base: Path, tune: Fails) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    message = tune(4, [])
    assert "pytorch_model.bin is pickled" in message
    assert "save_pretrained" in message


def test_weights_that_are_cut(base: Path, tune: Fails) -> None:
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "model.safetensors: damaged" in tune(4, ["--lora"])


@pytest.mark.parametrize("lora", [[], ["--lora"]])
def test_a_checkpoint_of_ours_that_has_changed(lora: list[str], tiny_run: Path, tmp_path: Path, tune: Fails) -> None:
    folder = tmp_path / "best"
    shutil.copytree(tiny_run / "checkpoints" / "best", folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    message = tune(4, ["--model", str(folder), *lora])
    assert f"{folder}: damaged: model.safetensors" in message


def test_a_tokenizer_with_more_tokens_than_the_model(base: Path, text_file: Path, tmp_path: Path, tune: Fails) -> None:
    larger = tmp_path / "larger"
    words = ["tokenizer", "train", "--data", str(text_file), "--vocab_size", "400", "--output", str(larger)]
    assert run(words) == 0
    message = tune(2, ["--tokenizer", str(larger)])
    assert all(word in message for word in (str(base), "400 tokens", "knows 300"))
    assert "leave it out" in tune(2, ["--tokenizer", "bpe"])


def test_an_adapter_for_another_base(base: Path, work: Path, tmp_path: Path, tune: Fails) -> None:
    adapter = train_adapter(base, tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    message = tune(4, ["--model", str(adapter)])
    assert "an adapter for another base" in message
    assert str(base) in message
    shutil.rmtree(base)
    assert "its base model" in tune(4, ["--model", str(adapter)])
    assert work.exists()


def test_an_adapter_on_an_adapter(base: Path, tmp_path: Path, tune: Fails) -> None:
    adapter = train_adapter(base, tmp_path / "adapter")
    message = tune(2, ["--model", str(adapter), "--lora"])
    assert f"seedbed export --model {adapter} --merge" in message


# Options


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max_seq_len", "64"], ("--max_seq_len 64 is above the 32 positions",)),
        (["--lora_targets", "q_porj"], ("lora_targets q_porj", "q_proj?", "all-linear")),
        (["--lora_targets", "all-linear,c_attn"], ("lora_targets c_attn",)),
        (["--freeze", "embedings"], ("--freeze embedings", "embeddings?")),
        (["--freeze", "head"], ("--freeze head", "name embeddings")),
        (["--freeze", "*"], ("nothing is left to train", "name fewer")),
        (["--freeze", "embeddings,attention,mlp,norms"], ("nothing is left to train",)),
        (["--last_blocks", "3"], ("--last_blocks 3", "2 blocks")),
        (["--lora", "--last_blocks", "3"], ("last_blocks 3", "2")),
        (["--lora", "--freeze", "mlp"], ("--freeze mlp", "--lora_targets")),
        (["--no_lora", "--lora_r", "4"], ("--lora_r 4", "add --lora")),
        (["--base_precision", "nf4"], ("--base_precision nf4", "add --lora")),
        (["--lora", "--base_precision", "bf16"], ("--base_precision bf16", "--precision bf16")),
        (["--lora", "--add_tokens", "<|x|>"], ("--add_tokens", "--lora_embeddings")),
        (["--lora", "--chat_template", "chatml"], ("<|im_start|>", "--lora_embeddings")),
        (["--last_blocks", "1", "--chat_template", "chatml"], ("new tokens", "leave --last_blocks")),
        (["--freeze", "embeddings", "--add_tokens", "<|x|>"], ("new tokens", "--freeze embeddings")),
        (["--d_model", "64"], ("--d_model has no meaning when fine-tuning",)),
        (["--sample_prompt", "word " * 100], ("--sample_prompt", "context is 32", "shorten")),
        (["--allow", "lerning_rate"], ("--allow lerning_rate", "learning_rate?")),
        (["--format", "alpaca"], ("'instruction'",)),
    ],
)
def test_options_that_cannot_be(flags: list[str], words: tuple[str, ...], tune: Fails) -> None:
    message = tune(3 if "--format" in flags else 2, flags)
    assert all(word in message for word in words), message
