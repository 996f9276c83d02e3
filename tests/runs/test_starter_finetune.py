"""Fine-tuning a real pretrained model, as a user would: look, train adapters, ask, merge, open elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from seedbed.checkpoint import load_model
from seedbed.cli.app import run

ROWS = [
    {"instruction": "Which city is the capital of this country?", "input": country, "output": f"It is {city}."}
    for country, city in {
        "France": "Paris",
        "Italy": "Rome",
        "Spain": "Madrid",
        "Austria": "Vienna",
        "Norway": "Oslo",
        "Greece": "Athens",
        "Portugal": "Lisbon",
        "Ireland": "Dublin",
        "Poland": "Warsaw",
        "Hungary": "Budapest",
    }.items()
]


@pytest.fixture(scope="module")
def starter() -> str:
    folder = os.environ.get("SEEDBED_STARTER")
    if folder is None:
        pytest.skip("SEEDBED_STARTER is not set: a folder with the real model")
    return folder


@pytest.fixture(scope="module")
def adapted(starter: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of some steps."""
    folder = tmp_path_factory.mktemp("starter")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    words = f"finetune --model {starter} --data {folder}/rows.json --val_data {folder}/rows.json --output {folder}/run"
    flags = "--lora --lora_r 4 --batch_size 1 --max_seq_len 128 --max_steps 6 --warmup_steps 1 --no_tensorboard"
    assert run([*words.split(), *flags.split(), "--precision", "fp32"]) == 0
    return folder / "run"


@pytest.mark.starter
def test_it_learns_what_it_is_asked(starter: str, adapted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {}
    for model in (starter, str(adapted)):
        data = str(adapted.parent / "rows.json")
        assert run(["evaluate", "--model", model, "--data", data, "--max_seq_len", "128", "--json"]) == 0
        losses[model] = json.loads(capsys.readouterr().out)["nats_per_token"]
    assert losses[str(adapted)] < losses[starter] - 0.5
    summary = json.loads((adapted / "metrics.json").read_text())
    assert losses[str(adapted)] == pytest.approx(summary["best_val_loss"], abs=1e-4)


@pytest.mark.starter
def test_it_answers_and_stops(adapted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = "Which city is the capital of this country?\n\nFrance"
    assert run(["generate", "--model", str(adapted), "--chat", "--greedy", "--prompt", question, "--json"]) == 0
    [completion] = json.loads(capsys.readouterr().out)["completions"]
    assert completion["finish_reason"] == "eos"
    assert "Paris" in completion["text"]


@pytest.mark.starter
def test_adapter_and_merged_model_open_elsewhere(starter: str, adapted: Path, tmp_path: Path) -> None:
    ids = torch.arange(1000, 1040)[None]
    ours, _ = load_model(adapted)
    base = transformers.AutoModelForCausalLM.from_pretrained(starter)
    with_peft: Any = peft.PeftModel.from_pretrained(base, str(adapted / "checkpoints/best"))
    with_peft.eval()
    with torch.no_grad():
        expected = ours.logits(ours(ids))
        torch.testing.assert_close(with_peft(ids).logits, expected, atol=2e-4, rtol=1e-4)
        assert run(["export", "--model", str(adapted), "--merge", "--output", str(tmp_path / "merged")]) == 0
        merged: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(ids).logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.starter
def test_it_talks(adapted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two turns, the second of which only makes sense after the first."""
    lines = iter(["Which city is the capital of France?", "And of Italy?", ""])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    assert run(["chat", "--model", str(adapted), "--greedy", "--max_new_tokens", "20", "--precision", "fp32"]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert "Paris" in first
    assert "Rome" in second
