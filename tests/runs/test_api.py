"""seedbed without a shell."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import seedbed
from seedbed.config import Layer, resolve
from tests.runs.conftest import TINY, TUNING

PROMPTS = ["The file", "A list", "When", "Return the"]


@pytest.fixture
def model(tiny_run: Path) -> seedbed.LanguageModel:
    return seedbed.load(tiny_run, device="cpu", precision="fp32")


def write(model: seedbed.LanguageModel, prompt: str = PROMPTS[0]) -> str:
    return model.generate(prompt, max_new_tokens=16, greedy=True)


def test_pretrain_load_generate_evaluate(
    small_text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {**TINY, "max_steps": 5}
    run = seedbed.pretrain(data=str(small_text_file), output=str(tmp_path / "run"), quiet=True, **options)
    assert capsys.readouterr().out == ""
    assert (run.status, run.exit_code, run.path) == ("done", 0, tmp_path / "run")
    model = run.load()
    assert model.path == tmp_path / "run/checkpoints/best"
    one = model.generate("The file", max_new_tokens=8)
    assert isinstance(one, str)
    assert model.generate(["The file", "A list"], max_new_tokens=8)[0] == one
    result = model.evaluate(str(small_text_file))
    assert result.bytes == small_text_file.stat().st_size
    assert 0 < result.bits_per_byte < 8
    more_context = model.evaluate(str(small_text_file), stride=8)
    assert more_context.tokens == result.tokens and more_context.nats != result.nats


def test_trainer(small_text_file: Path, tmp_path: Path) -> None:
    trainer = seedbed.Trainer(data=str(small_text_file), output=str(tmp_path / "run"), quiet=True, max_steps=3, **TINY)
    with pytest.raises(seedbed.SeedbedError, match="call train"):
        trainer.generate("x")
    assert trainer.train().status == "done"
    text = trainer.generate("The file", max_new_tokens=5)
    other = seedbed.Trainer().load_model(tmp_path / "run")
    assert other.generate("The file", max_new_tokens=5) == text
    assert other.evaluate(str(small_text_file)).token_ppl == trainer.evaluate(str(small_text_file)).token_ppl


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lerning_rate": 1}, "did you mean learning_rate"),
        ({"epochs": 0, "batch_size": "many"}, "--batch_size many"),
        ({"model": "tinny"}, "did you mean tiny"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(seedbed.SeedbedError, match=message) as caught:
        seedbed.pretrain(data="nowhere.txt", **options)
    assert getattr(caught.value, "exit_code", None) == 2


def test_wrong_sampling_options_are_named(tiny_run: Path) -> None:
    with pytest.raises(seedbed.SeedbedError, match="temperature"):
        seedbed.load(tiny_run).generate("x", temperature=-1)


def test_threads_share_a_model(model: seedbed.LanguageModel) -> None:
    alone = [write(model, prompt) for prompt in PROMPTS]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda prompt: write(model, prompt), PROMPTS * 5))
    assert together == alone * 5


def test_changed_weights_are_written_with(model: seedbed.LanguageModel, tiny_run: Path) -> None:
    fresh, before = seedbed.load(tiny_run, device="cpu", precision="fp32"), write(model)
    with torch.no_grad():
        for changed in (model, fresh):
            for weight in changed.decoder.blocks.parameters():
                weight.mul_(-3)
    after = write(model)
    assert after != before
    assert after == write(fresh) == write(dataclasses.replace(model))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_writes_the_same(
    again: Callable[[seedbed.LanguageModel], seedbed.LanguageModel], model: seedbed.LanguageModel
) -> None:
    text = write(model)
    other = again(model)
    assert other.decoder is not model.decoder
    assert write(other) == text
    assert (other.path, other.precision) == (model.path, model.precision)


def test_paths_and_devices_as_objects(small_text_file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "quiet": True, "device": torch.device("cpu")}
    first = seedbed.pretrain(data=small_text_file, output=tmp_path / "first", **{**TINY, **options})
    assert (first.status, first.path) == ("done", tmp_path / "first")
    own = {"data": small_text_file, "model": first.path, "output": tmp_path / "second", "max_seq_len": 32}
    second = seedbed.finetune(**{**TUNING, **options, **own})
    assert (second.status, second.path) == ("done", tmp_path / "second")
    model = second.load()
    assert model.evaluate(small_text_file) == model.evaluate(str(small_text_file))


def test_a_trainers_method_and_the_option_of_that_name() -> None:
    trainer = seedbed.Trainer("continue", method="replay", domain="code")
    assert (trainer.method, trainer.options) == ("continue", {"method": "replay", "domain": "code"})
    with pytest.raises(seedbed.SeedbedError, match="did you mean finetune") as caught:
        seedbed.Trainer("fine-tune")  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


def test_options_that_contradict_each_other(tmp_path: Path) -> None:
    contradictions: dict[str, dict[str, Any]] = {
        "min_lr": {"lr_schedule": "constant", "min_lr": 1e-5},
        "vocab_size": {"tokenizer": "char", "vocab_size": 300},
        "beta2": {"optimizer": "sgd", "beta2": 0.9},
    }
    for name, options in contradictions.items():
        with pytest.raises(seedbed.SeedbedError, match=rf"--{name} .* \(from the call\)") as caught:
            seedbed.pretrain(data="nowhere.txt", output=tmp_path / "run", **options)
        assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_an_unknown_option_of_sampling(model: seedbed.LanguageModel) -> None:
    with pytest.raises(seedbed.SeedbedError) as caught:
        model.generate("x", max_tokens=3, temperature=-1)
    unknown, wrong = str(caught.value).splitlines()
    assert unknown == "unknown option max_tokens in the call; did you mean max_new_tokens?"
    assert wrong.startswith("--temperature -1")


def test_a_stop_alone_is_a_list_of_one(model: seedbed.LanguageModel) -> None:
    text = write(model)
    one = model.generate(PROMPTS[0], max_new_tokens=16, greedy=True, stop=text[1])
    assert one == model.generate(PROMPTS[0], max_new_tokens=16, greedy=True, stop=[text[1]])
    assert one == text[: text.index(text[1])] != text


def test_going_back_needs_data(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(seedbed.SeedbedError, match="data is missing") as caught:
        seedbed.continue_training(model=tiny_run, rollback_to="base", output=tmp_path / "run", quiet=True)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("lora", "regime"), [("no", "finetune"), ("false", "finetune"), ("yes", "lora")])
def test_words_switch_lora(lora: str, regime: str) -> None:
    config = resolve("finetune", [Layer("x.yaml", {"model": "m", "data": "d", "lora": lora})])
    assert config.regime == regime
    assert config.adapt.lora is (regime == "lora")


def test_an_unknown_precision(tiny_run: Path) -> None:
    with pytest.raises(seedbed.SeedbedError, match=r"--precision float32: .*bf16") as caught:
        seedbed.load(tiny_run, precision="float32")  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


def test_a_window_of_nothing(model: seedbed.LanguageModel, small_text_file: Path) -> None:
    with pytest.raises(seedbed.SeedbedError, match="max_seq_len 0") as caught:
        model.evaluate(small_text_file, max_seq_len=0)
    assert caught.value.exit_code == 2


def test_a_table_is_evaluated(model: seedbed.LanguageModel, tmp_path: Path) -> None:
    texts = ["The list is sorted.", "A file is read, line by line."]
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps({"id": text[:3], "body": text}) + "\n" for text in texts), encoding="utf-8")
    result = model.evaluate(table, text_column="body")
    assert result.bytes == sum(map(len, texts))
    with pytest.raises(seedbed.SeedbedError, match="text_column"):
        model.evaluate(table)


@pytest.mark.parametrize("surroundings", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_training_leaves_its_surroundings_alone(
    surroundings: Callable[[], contextlib.AbstractContextManager[None]], small_text_file: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with surroundings():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        run = seedbed.pretrain(data=small_text_file, output=tmp_path / "run", quiet=True, max_steps=2, **TINY)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
    assert run.status == "done"
    assert torch.get_rng_state().equal(before)


def test_empty_names(small_text_file: Path) -> None:
    with pytest.raises(seedbed.SeedbedError, match="no such folder"):
        seedbed.load("")
    for name in ("data", "output"):
        options = {**TINY, "data": small_text_file, name: ""}
        with pytest.raises(seedbed.SeedbedError, match=f"--{name} "):
            seedbed.pretrain(quiet=True, max_steps=1, **options)


def test_a_run_below_the_home_folder(small_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run = seedbed.pretrain(data=small_text_file, output="~/run", quiet=True, max_steps=1, **TINY)
    assert run.path == tmp_path / "home/run"
    assert write(seedbed.load("~/run"))
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("question", [[], [("user", "Hello?")], [{"role": "user"}]])
def test_what_is_no_conversation(question: list[Any], model: seedbed.LanguageModel) -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model = dataclasses.replace(model, tokenizer=model.tokenizer.with_chat_template(template))
    turn = {"role": "user", "content": "Hello?"}
    assert model.chat([turn], max_new_tokens=2) == model.chat("Hello?", max_new_tokens=2)
    with pytest.raises(seedbed.SeedbedError, match=re.escape("a list of messages with `role` and `content`")) as caught:
        model.chat(question)
    assert caught.value.exit_code == 2
