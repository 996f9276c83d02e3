from __future__ import annotations

import json
from typing import Any

import pytest

from seedbed.config import FLAGS, REGIMES, Config, Layer, preset_names, read_preset, resolve
from seedbed.findings import Finding
from seedbed.train.guardrails import NAMES, Facts, check


def config(regime: str, **values: Any) -> Config:
    model = {"model": "small" if regime == "scratch" else "folder"}
    lora = {"lora": True} if regime == "lora" else {}
    return resolve("scratch" if regime == "scratch" else "finetune", [Layer(FLAGS, {**model, **lora, **values})])


def found(regime: str, facts: dict[str, Any] | None = None, **values: Any) -> dict[str, Finding]:
    findings = check(Facts(config(regime, **values), **(facts or {})))
    assert {finding.name for finding in findings} <= set(NAMES)
    json.dumps([finding.to_json() for finding in findings])
    return {finding.name: finding for finding in findings}


def levels(regime: str, facts: dict[str, Any] | None = None, **values: Any) -> dict[str, str]:
    return {name: finding.level for name, finding in found(regime, facts, **values).items()}


SOUND = {
    "model_max_seq_len": 2048,
    "total_steps": 400,
    "steps_per_epoch": 134,
    "warmup_steps": 40,
    "documents": 1100,
    "truncated": 0,
    "longest": 120,
    "untrained": 0,
    "end_masked": 0,
    "trained_tokens": 40_000,
}


@pytest.mark.parametrize("regime", REGIMES)
def test_the_defaults_of_a_sound_run_are_beyond_reproach(regime: str) -> None:
    assert found(regime, SOUND) == {}
    assert found(regime) == {}, "what is unknown is not guessed"


@pytest.mark.parametrize("preset", preset_names())
def test_no_preset_is_found_fault_with(preset: str) -> None:
    values = read_preset(preset)
    steps = values.get("max_steps", 5000)
    options = {"model": preset} if "arch" in values else values
    assert found("scratch", {"total_steps": steps, "warmup_steps": steps // 20}, **options) == {}


# The learning rate


def test_a_learning_rate_for_scratch_on_pretrained_weights() -> None:
    finding = found("finetune", learning_rate="3e-4")["learning_rate"]
    assert finding.level == "warning"
    assert str(finding) == (
        "--learning_rate 3e-4 is 6 times the top of the range for fine-tuning pretrained weights (1e-5 to 5e-5); "
        "set on the command line. Lower it, or pass --allow learning_rate to keep it."
    )
    assert finding.evidence == {"learning_rate": 3e-4, "range": [1e-5, 5e-5], "regime": "finetune"}


@pytest.mark.parametrize(
    ("regime", "rate", "expected"),
    [
        ("finetune", "1e-5", None),
        ("finetune", "5e-5", None),
        ("finetune", "5.1e-5", "warning"),
        ("finetune", "5e-6", "note"),
        ("finetune", "5e-7", "warning"),
        ("lora", "3e-4", None),
        ("lora", "2e-3", "warning"),
        ("lora", "1e-5", "note"),
        ("scratch", "3e-4", None),
        ("scratch", "5e-3", None),
        ("scratch", "0.1", "warning"),
        ("scratch", "5e-5", "note"),
    ],
)
def test_each_regime_has_its_range(regime: str, rate: str, expected: str | None) -> None:
    assert levels(regime, learning_rate=rate, min_lr="0").get("learning_rate") == expected


def test_how_far_below_the_range_and_where_from() -> None:
    below = resolve("scratch", [Layer("my.yaml", {"model": "small", "learning_rate": 2.5e-6, "min_lr": 0})])
    [finding] = check(Facts(below))
    assert "--learning_rate 2.5e-6 is 40 times below the bottom of the range" in finding.message
    assert finding.message.endswith("; from my.yaml")
    assert finding.remedy.startswith("Raise it")


def test_the_ranges_are_of_adamw() -> None:
    assert found("finetune", learning_rate="0.1", optimizer="sgd", beta1="0") == {}


# The context


def test_a_context_far_below_the_model() -> None:
    finding = found("finetune", {"model_max_seq_len": 1024}, max_seq_len="64")["max_seq_len"]
    assert finding.level == "warning"
    assert "--max_seq_len 64 is far below the 1,024 positions the model was trained with" in finding.message
    assert "--max_seq_len 512" in finding.remedy


@pytest.mark.parametrize(
    ("length", "facts"),
    [
        ("256", {"model_max_seq_len": 8192}),
        ("64", {"model_max_seq_len": 256}),
        ("64", {"model_max_seq_len": 1024, "longest": 64}),
        ("64", {}),
    ],
)
def test_a_context_that_is_long_enough(length: str, facts: dict[str, int]) -> None:
    assert found("finetune", facts, max_seq_len=length) == {}


def test_short_rows_matter_when_examples_do_not_fit() -> None:
    facts = {"model_max_seq_len": 1024, "longest": 65}
    assert set(found("finetune", facts, max_seq_len="64")) == {"max_seq_len"}


# The warm-up


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(
    ("warmup", "words"),
    [(2000, "never leaves the warm-up"), (500, "never leaves"), (300, "less than half of itself left"), (250, None)],
)
def test_a_warm_up_against_the_length_of_the_run(regime: str, warmup: int, words: str | None) -> None:
    facts = {"total_steps": 500, "warmup_steps": warmup}
    findings = found(regime, facts, warmup_steps=str(warmup))
    if words is None:
        assert findings == {}
    else:
        message = findings["warmup"].message
        assert f"--warmup_steps {warmup}" in message
        assert "500 steps" in message
        assert words in message


def test_no_warm_up_is_a_note_for_pretrained_weights_only() -> None:
    assert levels("finetune", warmup_ratio="0") == {"warmup": "note"}
    assert levels("lora", warmup_steps="0") == {"warmup": "note"}
    assert levels("scratch", warmup_steps="0") == {}


# Epochs and steps


@pytest.mark.parametrize(
    ("values", "documents", "expected"),
    [
        ({"epochs": "3"}, 100, None),
        ({"epochs": "11"}, 100_000, "note"),
        ({"epochs": "11", "early_stopping_patience": "0"}, 100_000, "warning"),
        ({"epochs": "11", "val_split": "0"}, 100_000, "warning"),
        ({"epochs": "10", "early_stopping_patience": "0"}, 1000, None),
        ({"epochs": "6", "early_stopping_patience": "0"}, 999, "warning"),
        ({"epochs": "6"}, 999, None),
        ({"epochs": "11"}, None, "note"),
    ],
)
def test_many_passes_over_little_data(values: dict[str, str], documents: int | None, expected: str | None) -> None:
    finding = found("finetune", {"documents": documents}, **values).get("epochs")
    assert (finding.level if finding else None) == expected
    if finding:
        assert ("early stopping is on" in finding.message) == (expected == "note")


def test_passes_are_counted_where_steps_limit_the_run() -> None:
    facts = {"total_steps": 5000, "steps_per_epoch": 171, "documents": 40}
    message = found("finetune", facts, max_steps="5000", val_split="0")["epochs"].message
    assert "--max_steps 5000 is 29.2 passes over 40 examples" in message
    assert found("finetune", max_steps="5000", val_split="0") == {}
    assert found("scratch", facts, max_steps="5000", val_split="0") == {}


def test_a_run_of_a_few_steps() -> None:
    finding = found("finetune", {"total_steps": 6}, grad_accumulation="4")["few_steps"]
    assert "6 steps of 32 rows" in finding.message
    assert levels("scratch", {"total_steps": 19}) == {"few_steps": "warning"}
    assert levels("scratch", {"total_steps": 20}) == {}
    assert levels("scratch", {"total_steps": 6}, max_steps="6") == {}, "a run that was asked to be short"


# What is a target


@pytest.mark.parametrize("facts", [{"trained_tokens": 0}, {"untrained": 50, "documents": 50}])
def test_nothing_to_learn_is_an_error(facts: dict[str, int]) -> None:
    finding = found("finetune", facts)["all_masked"]
    assert finding.level == "error"
    assert "data show" in finding.remedy


def test_examples_without_a_target() -> None:
    assert levels("finetune", {"untrained": 9, "documents": 1000}) == {"all_masked": "note"}
    cut = {"untrained": 10, "documents": 1000, "truncated": 30, "longest": 700, "model_max_seq_len": 1024}
    finding = found("finetune", cut)["all_masked"]
    assert finding.level == "warning"
    assert "10 of 1,000 examples (1.0%)" in finding.message
    assert "--max_seq_len 700" in finding.remedy


def test_an_end_that_is_not_learnt() -> None:
    template = found("finetune", {"end_masked": 1000, "documents": 1000, "truncated": 20})["eos_masked"]
    assert template.level == "warning"
    assert "1,000 of 1,000 examples (100.0%)" in template.message
    assert "--chat_template" in template.remedy
    cut = found("finetune", {"end_masked": 20, "documents": 1000, "truncated": 20})["eos_masked"]
    assert "--max_seq_len" in cut.remedy


@pytest.mark.parametrize(
    ("positions", "longest", "remedy"),
    [
        (2048, 900, "Set --max_seq_len 900, or shorten the examples."),
        (2048, 5000, "Set --max_seq_len 2048, the most the model takes, and shorten what is longer."),
        (512, 900, "The model takes no more than 512 tokens: shorten the examples."),
        (None, 900, "Set --max_seq_len 900, or shorten the examples."),
        (2048, None, "Raise --max_seq_len, or shorten the examples."),
    ],
)
def test_how_to_make_room_for_what_is_cut(positions: int | None, longest: int | None, remedy: str) -> None:
    facts = {"truncated": 60, "documents": 1000, "longest": longest, "model_max_seq_len": positions}
    finding = found("finetune", facts)["truncated"]
    assert (finding.level, finding.remedy) == ("warning", remedy)
    assert "60 of 1,000 examples (6.0%) are cut at --max_seq_len 512 tokens, from regime finetune" in finding.message


def test_a_few_that_are_cut_are_a_note() -> None:
    assert levels("finetune", {"truncated": 49, "documents": 1000}) == {"truncated": "note"}


# LoRA


@pytest.mark.parametrize(
    ("r", "alpha", "expected"),
    [(16, 32, {}), (16, 16, {}), (8, 32, {}), (16, 65, {"lora_alpha": "warning"}), (64, 16, {"lora_alpha": "note"})],
)
def test_how_adapters_are_scaled(r: int, alpha: int, expected: dict[str, str]) -> None:
    assert levels("lora", lora_r=str(r), lora_alpha=str(alpha)) == expected


def test_a_high_rank_with_the_usual_scale_moves_faster() -> None:
    """Of GPT-2 medium, rank 64 and alpha 64 spiked at a rate that rank 16 and alpha 16 learned at."""
    finding = found("lora", lora_r="64", lora_alpha="128", learning_rate="2e-4")["lora_scaling"]
    assert finding.level == "note"
    assert "as fast as 8e-4 moves those of alpha 32" in finding.message
    assert "lower --lora_alpha to 80" in finding.remedy
    assert "lora_scaling" not in found("lora", lora_r="64", lora_alpha="32", learning_rate="2e-4")
    assert "lora_scaling" in found("lora", lora_r="64", lora_rslora=True, learning_rate="2e-4")
