"""seedbed without a shell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import seedbed
from tests.runs.conftest import TINY


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
