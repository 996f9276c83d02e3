"""The verbs that bring models in and take them out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seedbed.checkpoint import load_model
from seedbed.cli.app import run


@pytest.fixture(scope="module")
def adapter_run(tiny_run: Path, small_text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of three steps on the tiny model."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    data = (
        f"--data {small_text_file} --max_seq_len 32 --max_steps 3 --lora --lora_r 2 --precision fp32 --no_tensorboard"
    )
    assert run(["finetune", "--model", str(tiny_run), "--output", str(folder), *data.split()]) == 0
    return folder


def test_a_merged_model_is_the_adapter_s(adapter_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = tmp_path / "merged"
    assert run(["export", "--model", str(adapter_run), "--merge", "--output", str(merged), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["max_difference"] <= facts["tolerance"] == 1e-4
    assert not (merged / "adapter_config.json").exists()
    ids = torch.arange(20)[None]
    (adapted, _), (plain, _) = load_model(adapter_run), load_model(merged)
    torch.testing.assert_close(plain.logits(plain(ids)), adapted.logits(adapted(ids)), atol=1e-5, rtol=1e-4)


def test_export_for_people(adapter_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "--model", str(adapter_run), "--merge", "--output", str(tmp_path / "merged")]) == 0
    out = capsys.readouterr().out
    assert "Logits" in out
    assert str(tmp_path / "merged") in out


def test_export_says_what_it_needs(
    adapter_run: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    assert run(["export", "--model", str(adapter_run), "--output", str(output)]) == 2
    assert "--merge" in capsys.readouterr().err
    assert run(["export", "--model", str(tiny_run), "--merge", "--output", str(output)]) == 2
    assert "no adapter to merge" in capsys.readouterr().err
    assert not output.exists()


def test_import_copies_a_folder_in_another_type(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tiny_run / "checkpoints/best", tmp_path / "half"
    assert run(["import", str(source), "--output", str(output), "--dtype", "bfloat16", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["dtype"], facts["family"]) == ("bfloat16", "llama")
    whole, half = (path / "model.safetensors" for path in (source, output))
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    assert run(["import", str(source), str(output)]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_import_refuses_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing more")
    assert run(["import", str(tmp_path / "broken.gguf"), str(tmp_path / "out")]) == 4
    assert "broken.gguf" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
