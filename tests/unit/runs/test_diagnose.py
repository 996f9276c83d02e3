"""Each rule on curves it must speak of, and on curves that are nearly so; folders as they are found."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from seedbed.errors import ConfigError
from seedbed.findings import Finding
from seedbed.runs.diagnose import LIVE, NAMES, diagnose
from seedbed.runs.diagnose.inputs import share_repeated
from seedbed.schedule import Schedule

STEPS = 400
RATES = {"scratch": 1e-3, "finetune": 2e-5, "lora": 2e-4, "continue": 2e-5}
Values = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Run:
    """A run folder in the making: a healthy run of 400 steps, unless told otherwise."""

    path: Path
    regime: str = "scratch"
    options: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    loss: Callable[[Values], Values] | None = None
    """Training loss at each step, to which noise is added."""
    noise: float = 0.05
    steps: int = STEPS
    total_steps: int = STEPS
    tokens: Values = field(default_factory=lambda: np.full(STEPS, 100.0))
    """Targets of each step."""
    val: Mapping[int, float] = field(default_factory=dict)
    columns: Mapping[str, Values] = field(default_factory=dict)
    events: Iterable[Mapping[str, Any]] = ()
    texts: Iterable[str] = ()

    def write(self) -> Path:
        self.path.mkdir(parents=True)
        options = {
            "learning_rate": RATES[self.regime],
            "warmup_ratio": 0.1,
            "warmup_steps": None,
            "lr_schedule": "cosine",
            "epochs": 2,
            "batch_size": 8,
            "max_seq_len": 256,
            "max_grad_norm": 1.0,
            "early_stopping_patience": 3,
            "optimizer": "adamw",
            "packing": True,
            **self.options,
        }
        steps = np.arange(1, self.steps + 1)
        warmup = options["warmup_steps"]
        schedule = Schedule(
            kind=options["lr_schedule"],
            peak=options["learning_rate"],
            minimum=0.0,
            warmup_steps=round(options["warmup_ratio"] * self.total_steps) if warmup is None else warmup,
            warmup_ratio=0.0,
            total_steps=self.total_steps,
        )
        loss = (self.loss or falling)(steps / self.total_steps)
        loss = loss + np.random.default_rng(0).normal(0, self.noise, self.steps)
        columns = {
            "lr": np.array([schedule.at(step) for step in steps.tolist()]),
            "grad_norm": np.full(self.steps, 0.6),
        }
        columns = {"train_loss": loss, **columns, **self.columns}
        tokens, lines = np.cumsum(np.resize(self.tokens, self.steps)).tolist(), []
        for place, step in enumerate(steps.tolist()):
            axes = {"step": step, "epoch": self.epoch(step), "tokens": tokens[place], "elapsed_hours": step / 3600}
            lines.append({**axes, **{name: float(values[place]) for name, values in columns.items()}})
            if step in self.val:
                lines.append({**axes, "val_loss": self.val[step]})
        write_lines(self.path / "metrics.jsonl", lines)
        write_lines(self.path / "events.jsonl", self.events)
        write_lines(self.path / "samples.jsonl", ({"step": 1, "prompt": "", "text": text} for text in self.texts))
        (self.path / "config.yaml").write_text(yaml.safe_dump({**options, "regime": self.regime}), encoding="utf-8")
        best = min(self.val, key=lambda step: self.val[step]) if self.val else None
        summary = {
            "status": "done",
            "steps": self.steps,
            "total_steps": self.total_steps,
            "best_step": best,
            "best_val_loss": None if best is None else self.val[best],
            "precision": "bf16",
            "parent": None,
            **self.summary,
        }
        (self.path / "metrics.json").write_text(json.dumps(summary), encoding="utf-8")
        return self.path

    def epoch(self, step: int) -> float:
        return 2 * step / self.total_steps

    def diagnose(self) -> list[Finding]:
        return diagnose(self.write())

    def names(self) -> list[str]:
        return [finding.name for finding in self.diagnose()]


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def falling(share: Values) -> Values:
    """Seven nats down to four, steeply and then ever less, as training from scratch does."""
    return 4 + 3 * np.exp(-6 * share)


def fine_tuned(share: Values) -> Values:
    return 1 + 0.3 * np.exp(-6 * share)


def one(findings: list[Finding], name: str) -> Finding:
    assert name in NAMES
    [finding] = [finding for finding in findings if finding.name == name]
    assert finding.message and not finding.message.endswith(".")
    assert finding.remedy.endswith(".")
    json.dumps(finding.to_json(), allow_nan=False)
    return finding


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


HEALTHY: dict[str, dict[str, Any]] = {
    "scratch": {"val": {100: 4.7, 200: 4.2, 300: 4.05, 400: 4.03}},
    "without validation": {},
    "noisy": {"regime": "lora", "loss": fine_tuned, "noise": 0.4, "val": {200: 1.05, 400: 1.04}},
    "fine-tuned": {"regime": "finetune", "loss": fine_tuned, "val": {200: 1.05, 400: 1.04}},
    "of few steps": {"steps": 12, "total_steps": 12},
    "constant rate": {"options": {"lr_schedule": "constant", "learning_rate": 3e-4}, "val": {200: 4.2}},
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_nothing_is_said_of_a_healthy_run(path: Path, kind: str) -> None:
    assert Run(path, **HEALTHY[kind]).diagnose() == []


# Updates that were too large


def climbing(share: Values) -> Values:
    return np.where(share < 0.1, 3.3 - share, 4.5)


def test_a_loss_that_climbs_at_the_peak_and_stays(path: Path) -> None:
    finding = one(
        Run(path, "finetune", {"learning_rate": 3e-4, "max_grad_norm": 0}, loss=climbing).diagnose(),
        "learning_rate_too_high",
    )
    assert finding.level == "error"
    assert "6 times the top of the range" in finding.message
    assert "--learning_rate 2e-5 with --max_grad_norm 1" in finding.remedy
    assert finding.evidence["before"] == pytest.approx(3.25, abs=0.1)
    assert finding.evidence["last"] == pytest.approx(4.5, abs=0.1)


def test_within_the_range_a_climb_that_stays_speaks_for_itself(path: Path) -> None:
    finding = one(Run(path, "finetune", loss=climbing).diagnose(), "learning_rate_too_high")
    assert "range" not in finding.message
    assert "--learning_rate 6.7e-6" in finding.remedy


def test_a_climb_within_the_noise_is_none(path: Path) -> None:
    loss = lambda share: np.where(share < 0.1, 3.3, 3.4)  # noqa: E731
    assert "learning_rate_too_high" not in Run(path, "finetune", loss=loss, noise=0.3).names()


def test_a_far_too_high_rate_gets_nowhere(path: Path) -> None:
    loss = lambda share: 5.3 + np.exp(-60 * share)  # noqa: E731
    finding = one(Run(path, options={"learning_rate": 0.1}, loss=loss).diagnose(), "learning_rate_too_high")
    assert "stayed between" in finding.message
    assert "--learning_rate 7e-4" in finding.remedy


@pytest.mark.parametrize(("rate", "blamed"), [(0.02, False), (0.3, True)])
def test_how_little_is_nowhere_depends_on_the_rate(rate: float, blamed: bool, path: Path) -> None:
    loss = lambda share: 5.3 - 0.65 * share + np.exp(-60 * share)  # noqa: E731
    names = Run(path, options={"learning_rate": rate}, loss=loss).names()
    assert ("learning_rate_too_high" in names) == blamed


def test_a_high_rate_that_does_no_harm_is_not_blamed(path: Path) -> None:
    assert Run(path, options={"learning_rate": 0.03}, val={300: 4.05, 400: 4.0}).names() == []


def test_held_out_text_that_costs_more_than_new_text_did(path: Path) -> None:
    run = Run(path, "finetune", {"learning_rate": 3e-4}, loss=fine_tuned, val={200: 1.4, 400: 1.45})
    assert "best 1.400, at step 200" in one(run.diagnose(), "learning_rate_too_high").message


def test_held_out_text_that_gets_better_at_a_high_rate(path: Path) -> None:
    run = Run(path, "finetune", {"learning_rate": 3e-4}, loss=fine_tuned, val={200: 1.1, 400: 1.09})
    assert "learning_rate_too_high" not in run.names()


def rising(share: Values) -> Values:
    return np.where(share < 0.6, falling(share), 4 + 8 * (share - 0.6))


def test_divergence(path: Path) -> None:
    finding = one(Run(path, loss=rising).diagnose(), "divergence")
    assert finding.level == "error"
    assert finding.evidence["last"] > 6.5
    assert "--learning_rate 3.3e-4" in finding.remedy


def test_a_slight_rise_at_the_end_is_no_divergence(path: Path) -> None:
    loss = lambda share: falling(share) + 0.3 * np.maximum(0, share - 0.8)  # noqa: E731
    assert "divergence" not in Run(path, loss=loss).names()


def test_steps_of_few_and_easy_tokens_are_no_other_curve(path: Path) -> None:
    """Most rows have one word, and a few long ones hold the text."""
    easy = np.random.default_rng(2).random(STEPS) < 0.6
    run = Run(path, loss=lambda share: np.where(easy, 0.2, falling(share)), tokens=np.where(easy, 8.0, 400.0))
    assert run.names() == []


def skipped(*steps: int, rows: list[int] | None = None) -> list[dict[str, Any]]:
    return [{"event": "skipped_step", "step": step, "rows": rows or [step, step]} for step in steps]


def test_updates_that_were_not_finite(path: Path) -> None:
    run = Run(path, events=skipped(50, 51, 250, rows=[8, 15]), summary={"status": "diverged"})
    finding = one(run.diagnose(), "nan")
    assert finding.level == "error"
    assert "3 updates were not finite and left out (steps 50, 51, 250); the run gave up" in finding.message
    assert "Rows 8 to 15" in finding.remedy


def test_float16_looks_for_its_loss_scale(path: Path) -> None:
    assert Run(path, events=skipped(1, 2, 3), summary={"precision": "fp16"}).names() == []


def test_float16_that_overflows_later(path: Path) -> None:
    finding = one(Run(path, events=skipped(1, 300), summary={"precision": "fp16"}).diagnose(), "nan")
    assert finding.level == "warning"
    assert finding.evidence["steps"] == [300]
    assert "--precision bf16" in finding.remedy


def test_the_cause_is_said_and_its_consequences_are_not(path: Path) -> None:
    events = skipped(*range(391, 401))
    norms = {"grad_norm": np.full(STEPS, 30.0)}  # clipped, every one
    summary = {"status": "diverged"}
    run = Run(path, "finetune", {"learning_rate": 1e-2}, loss=climbing, columns=norms, events=events, summary=summary)
    assert run.names() == ["learning_rate_too_high", "nan", "divergence"]


def test_no_warmup(path: Path) -> None:
    loss = lambda share: fine_tuned(share) + np.where((share > 0.003) & (share < 0.03), 0.8, 0)  # noqa: E731
    finding = one(Run(path, "finetune", {"warmup_ratio": 0.0}, loss=loss).diagnose(), "no_warmup")
    assert finding.level == "warning"
    assert finding.remedy == "Set --warmup_ratio 0.1."


def test_gradients_that_jump_without_a_warmup(path: Path) -> None:
    norms = np.where((np.arange(STEPS) > 0) & (np.arange(STEPS) < 5), 30.0, 2.0)
    run = Run(
        path, "finetune", {"warmup_ratio": 0.0, "max_grad_norm": 0}, loss=fine_tuned, columns={"grad_norm": norms}
    )
    assert one(run.diagnose(), "no_warmup").level == "note"


def test_no_warmup_that_did_no_harm(path: Path) -> None:
    assert Run(path, "finetune", {"warmup_ratio": 0.0}, loss=fine_tuned).names() == []


@pytest.mark.parametrize(("ratio", "expected"), [(0.7, ["long_warmup"]), (0.4, [])])
def test_long_warmup(path: Path, ratio: float, expected: list[str]) -> None:
    assert Run(path, options={"warmup_ratio": ratio}, val={200: 4.2, 300: 4.05, 400: 4.03}).names() == expected


@pytest.mark.parametrize(("norm", "expected"), [(30.0, "warning"), (3.0, "note"), (1.2, None)])
def test_clipping(path: Path, norm: float, expected: str | None) -> None:
    findings = Run(path, columns={"grad_norm": np.full(STEPS, norm)}).diagnose()
    assert [(finding.name, finding.level) for finding in findings] == ([("clipping", expected)] if expected else [])


def test_clipping_now_and_then_is_what_it_is_for(path: Path) -> None:
    norms = np.where(np.arange(STEPS) % 2, 5.0, 0.5)
    assert Run(path, columns={"grad_norm": norms}).names() == []


# Spikes


def spiking(step: int, height: float, width: int = 1) -> Callable[[Values], Values]:
    def loss(share: Values) -> Values:
        steps = np.round(share * STEPS)
        return falling(share) + np.where((steps >= step) & (steps < step + width), height, 0)

    return loss


def spike(step: int, **details: Any) -> dict[str, Any]:
    return {"event": "loss_spike", "step": step, "loss": 8.0, "usual": 4.2, "times": 30.0, **details}


def test_a_spike_that_is_over_at_once_is_a_note(path: Path) -> None:
    finding = one(Run(path, loss=spiking(200, 4)).diagnose(), "loss_spike")
    assert finding.level == "note"
    assert finding.evidence["cause"] == "unknown"
    assert finding.evidence["steps"] == [200]
    assert "needs nothing done" in finding.remedy


def test_a_spike_that_lasts_is_a_warning(path: Path) -> None:
    finding = one(Run(path, loss=spiking(200, 4, width=25)).diagnose(), "loss_spike")
    assert finding.level == "warning"
    assert finding.evidence["lasted"] == pytest.approx(23, abs=3)
    assert finding.evidence["cause"] == "updates"
    assert "--learning_rate 5e-4" in finding.remedy


def test_a_spike_where_the_rate_reaches_its_peak(path: Path) -> None:
    finding = one(Run(path, loss=spiking(42, 6, width=20)).diagnose(), "loss_spike")
    assert finding.evidence["cause"] == "peak"
    assert "reached its peak (1e-3) at step 40" in finding.message
    assert "--warmup_ratio 0.2" in finding.remedy


def test_usual_noise_is_no_spike(path: Path) -> None:
    bad_batches = np.random.default_rng(1).exponential(0.5, STEPS)
    assert Run(path, loss=lambda share: falling(share) + bad_batches).names() == []


def test_a_batch_that_did_it(path: Path) -> None:
    rows = [{"row": 1605, "tokens": 212, "loss": 11.2}, {"row": 1606, "tokens": 12, "loss": 6.0}]
    event = spike(
        200, worst_rows=rows, worst_share=0.8, again_loss=7.9, float32_loss=7.8, padding=0.62, max_length=250,
        rows=[1600, 1607],
    )  # fmt: skip
    finding = one(Run(path, loss=spiking(200, 4), events=[event]).diagnose(), "loss_spike")
    assert finding.evidence["cause"] == "batch"
    assert "row 1605 (212 tokens of 11.20 nats)" in finding.message
    assert "62% of its places were padding" in finding.message
    assert "still cost 7.900" in finding.message


def test_a_precision_that_did_it(path: Path) -> None:
    event = spike(200, worst_share=0.2, again_loss=7.9, float32_loss=4.3, rows=[1600, 1607])
    finding = one(Run(path, loss=spiking(200, 4), events=[event]).diagnose(), "loss_spike")
    assert (finding.level, finding.evidence["cause"]) == ("warning", "precision")
    assert "--precision fp32" in finding.remedy


def test_several_spikes_are_one_finding(path: Path) -> None:
    events = [spike(100), spike(200), {**spike(300), "loss": 9.0}, {"event": "loss_spike"}]
    finding = one(Run(path, events=events).diagnose(), "loss_spike")
    assert finding.evidence["steps"] == [100, 200, 300]
    assert "3 spikes" in finding.message and "step 300" in finding.message


# Losses that fall too little, or not for long enough


def test_a_rate_that_teaches_nothing(path: Path) -> None:
    loss = lambda share: 6.2 - 0.05 * share  # noqa: E731
    finding = one(Run(path, options={"learning_rate": 1e-5}, loss=loss).diagnose(), "learning_rate_too_low")
    assert finding.level == "warning"
    assert "10 times below the range" in finding.message
    assert "--learning_rate 7e-4" in finding.remedy


def test_a_low_rate_that_was_enough(path: Path) -> None:
    run = Run(path, options={"learning_rate": 8e-5}, loss=falling, val={200: 4.2, 300: 4.05, 400: 4.03})
    assert "learning_rate_too_low" not in run.names()


def test_slow_within_the_range_is_not_the_rate(path: Path) -> None:
    assert "learning_rate_too_low" not in Run(path, loss=lambda share: 6.2 - 0.05 * share).names()


def flat(share: Values) -> Values:
    return 4 + 3 * np.exp(-30 * share)


def test_a_plateau_at_a_rate_that_does_not_fall(path: Path) -> None:
    finding = one(Run(path, options={"lr_schedule": "constant"}, loss=flat).diagnose(), "plateau")
    assert finding.evidence["from_step"] == 200
    assert "--lr_schedule cosine" in finding.remedy


def test_a_plateau_of_the_text(path: Path) -> None:
    assert "--max_steps" in one(Run(path, loss=flat).diagnose(), "plateau").remedy


def test_a_loss_that_still_falls_is_no_plateau(path: Path) -> None:
    options = {"lr_schedule": "constant"}
    assert Run(path, options=options, loss=lambda share: 4 - 0.2 * share, val={200: 3.9, 400: 3.87}).names() == []


def test_a_plateau_too_noisy_to_be_seen(path: Path) -> None:
    assert Run(path, loss=flat, noise=0.8).names() == []


@pytest.mark.parametrize(("rank", "held_out", "expected"), [(4, 4.02, "lora_capacity"), (64, 4.02, "plateau")])
def test_adapters_that_learn_no_more(path: Path, rank: int, held_out: float, expected: str) -> None:
    run = Run(path, "lora", {"lora_r": rank, "lora_alpha": 8.0}, loss=flat, val={200: held_out, 400: held_out})
    assert run.names() == [expected]


def test_the_rank_to_try(path: Path) -> None:
    run = Run(path, "lora", {"lora_r": 4, "lora_alpha": 8.0}, loss=flat, val={200: 4.02, 400: 4.02})
    assert "--lora_r 16 --lora_alpha 32" in one(run.diagnose(), "lora_capacity").remedy


def test_under_training(path: Path) -> None:
    run = Run(path, loss=lambda share: 7 - 2 * share, val={200: 6.0, 300: 5.5, 400: 5.0})
    finding = one(run.diagnose(), "under_training")
    assert finding.level == "warning"
    assert finding.evidence["gain_of_last_quarter"] == pytest.approx(1 / 11)
    assert finding.remedy == "Set --epochs 4."


def test_under_training_without_validation(path: Path) -> None:
    run = Run(path, options={"max_steps": 400}, loss=lambda share: 7 - 2 * share)
    assert "--max_steps 800" in one(run.diagnose(), "under_training").remedy


def test_a_run_cut_by_its_hours(path: Path) -> None:
    summary = {"status": "time_limit", "reason": "--max_training_hours 1 is used up"}
    options = {"max_training_hours": 1.0}
    run = Run(path, options=options, loss=lambda share: 7 - 2 * share, total_steps=800, summary=summary)
    finding = one(run.diagnose(), "under_training")
    assert finding.level == "note"
    assert "step 400 of 800 (--max_training_hours 1 is used up)" in finding.message
    assert "--max_training_hours 2 goes on" in finding.remedy


def test_a_fall_that_nobody_would_notice_needs_no_more_steps(path: Path) -> None:
    run = Run(path, loss=lambda share: 0.3 - 0.2 * share, val={200: 0.05, 300: 0.02, 400: 0.015})
    assert "under_training" not in run.names()


def test_a_fall_that_is_over_needs_no_more_steps(path: Path) -> None:
    assert Run(path, loss=falling, val={200: 4.2, 300: 4.05, 400: 4.03}).names() == []


def test_early_stopping_that_did_not_wait(path: Path) -> None:
    run = Run(
        path,
        options={"early_stopping_patience": 1},
        summary={"status": "early_stopped"},
        total_steps=1200,
        val={100: 4.7, 200: 4.4, 300: 4.2, 400: 4.205},
    )
    finding = one(run.diagnose(), "stopped_too_soon")
    assert "--early_stopping_patience 3" in finding.remedy
    assert "of its peak" in finding.message


@pytest.mark.parametrize("last", [4.19, 4.6])
def test_early_stopping_that_was_right(path: Path, last: float) -> None:
    run = Run(path, summary={"status": "early_stopped"}, val={100: 4.2, 200: 4.19, 300: 4.3, 400: last})
    assert "stopped_too_soon" not in run.names()


# Held-out text


def by_heart(share: Values) -> Values:
    return 4 - 3 * share


def test_overfitting(path: Path) -> None:
    run = Run(path, loss=by_heart, val={100: 3.6, 200: 3.3, 300: 3.4, 400: 3.7}).write()
    assert "Take the weights of about step 200." in one(diagnose(run), "overfitting").remedy
    best = run / "checkpoints" / "best"
    best.mkdir(parents=True)
    finding = one(diagnose(run), "overfitting")
    assert finding.level == "warning"
    assert finding.evidence["from_step"] == 200
    assert f"Use {best}, of step 200." in finding.remedy
    assert "--epochs 1" in finding.remedy


def test_a_slight_rise_is_a_note(path: Path) -> None:
    run = Run(path, loss=by_heart, val={100: 3.6, 200: 3.3, 300: 3.32, 400: 3.35})
    assert one(run.diagnose(), "overfitting").level == "note"


def test_held_out_noise_is_no_overfitting(path: Path) -> None:
    assert "overfitting" not in Run(path, loss=by_heart, val={100: 3.6, 200: 3.3, 300: 3.31, 400: 3.305}).names()


def test_overfitting_from_a_validation_before_the_first_training_loss(path: Path) -> None:
    """As with --eval_every 1, where float16's first updates are skipped."""
    loss = by_heart(np.arange(1, STEPS + 1) / STEPS)
    loss[:3] = np.nan
    finding = one(Run(path, columns={"train_loss": loss}, val={1: 3.3, 400: 4.2}).diagnose(), "overfitting")
    assert finding.evidence["train_loss"] == pytest.approx([loss[3], 1.0], abs=0.1)


def test_when_training_text_gets_worse_too_nothing_is_learnt_by_heart(path: Path) -> None:
    run = Run(path, loss=lambda share: 4 + share, val={200: 3.3, 300: 3.4, 400: 3.7})
    assert "overfitting" not in run.names()


@pytest.mark.parametrize(("held_out", "level"), [(6.5, "warning"), (5.3, "note"), (3.5, "note"), (4.5, None)])
def test_held_out_text_of_another_kind(path: Path, held_out: float, level: str | None) -> None:
    loss = lambda share: np.full(len(share), 4.4)  # noqa: E731
    findings = Run(path, loss=loss, noise=0.3, val={200: held_out, 400: held_out}).diagnose()
    assert [finding.level for finding in findings if finding.name == "train_validation_mismatch"] == (
        [level] if level else []
    )


def test_a_gap_that_opens_within_the_first_epoch_is_no_other_kind(path: Path) -> None:
    run = Run(path, loss=by_heart, val={40: 3.7, 200: 3.6})
    assert "train_validation_mismatch" not in run.names()


def test_a_gap_that_opens_in_later_epochs_is_no_other_kind(path: Path) -> None:
    run = Run(path, loss=by_heart, val={400: 3.3})
    assert "train_validation_mismatch" not in run.names()


def parent_and_run(tmp_path: Path, loss: float, val_bytes: int = 1000, **parents: Any) -> list[Finding]:
    text = {"text": {"val_bytes": 1000}}
    options = {"data": "book.txt", "val_split": 0.1, "save_every": 100, **parents}
    parent = Run(tmp_path / "parent", options=options, val={400: 4.0}, summary=text).write()
    return Run(
        tmp_path / "run",
        options={**options, **(dict.fromkeys(parents) or {"learning_rate": 3e-4}), "save_every": 50},
        val={400: loss},
        summary={"parent": str(parent), "text": {"val_bytes": val_bytes}},
    ).diagnose()


def test_worse_than_its_parent(tmp_path: Path) -> None:
    finding = one(parent_and_run(tmp_path, 4.2), "worse_than_parent")
    assert "--learning_rate 1e-3 to 3e-4" in finding.message
    assert "save_every" not in finding.message
    assert "or to --learning_rate 1e-3" in finding.remedy


def test_an_option_that_one_of_them_does_not_set_is_unset(tmp_path: Path) -> None:
    finding = one(parent_and_run(tmp_path, 4.2, warmup_steps=5), "worse_than_parent")
    assert "what changed is --warmup_steps 5 to unset" in finding.message
    assert finding.remedy.endswith("parent, or to --warmup_steps 5.")


def test_a_parent_that_was_moved_along_is_found(tmp_path: Path) -> None:
    parent_and_run(tmp_path / "before", 4.2)
    (tmp_path / "before").rename(tmp_path / "after")
    one(diagnose(tmp_path / "after" / "run"), "worse_than_parent")


def test_a_model_made_here_takes_the_rate_it_was_made_with(tmp_path: Path) -> None:
    origin = Run(tmp_path / "origin", options={"learning_rate": 4e-3}).write()
    options = {"learning_rate": 2e-3, "model": str(origin)}
    held_out = {200: 1.4, 400: 1.45}  # which of a rate for another model's weights would speak
    assert (
        "learning_rate_too_high" not in Run(tmp_path / "a", "continue", options, loss=fine_tuned, val=held_out).names()
    )
    options = {"learning_rate": 2e-2, "model": str(origin)}
    assert "learning_rate_too_high" in Run(tmp_path / "b", "continue", options, loss=fine_tuned, val=held_out).names()


@pytest.mark.parametrize(("loss", "val_bytes"), [(4.01, 1000), (4.2, 2000)])
def test_not_worse_than_its_parent_within_the_noise_or_on_other_text(
    tmp_path: Path, loss: float, val_bytes: int
) -> None:
    assert "worse_than_parent" not in [finding.name for finding in parent_and_run(tmp_path, loss, val_bytes)]


def test_what_the_run_itself_found(path: Path) -> None:
    found = Finding(
        "forgetting", "warning", "learning law, plays costs 6.5% more", {"forgetting": {"plays": 0.065}}, "Replay."
    )
    run = Run(path, events=[{"event": "finding", "step": 400, **found.to_json()}])
    assert one(run.diagnose(), "forgetting") == found


# What goes in, and what comes out


def of_texts(longest: int, positions: int = 1024) -> dict[str, Any]:
    return {"shape": {"max_seq_len": positions}, "text": {"longest": longest}}


@pytest.mark.parametrize(
    ("regime", "length", "longest", "expected"),
    [
        ("finetune", 64, 900, ["short_context"]),
        ("finetune", 64, 60, []),
        ("finetune", 256, 900, []),
        ("scratch", 64, 900, []),
    ],
)
def test_short_context(path: Path, regime: str, length: int, longest: int, expected: list[str]) -> None:
    findings = Run(path, regime, {"max_seq_len": length, "batch_size": 16}, of_texts(longest)).diagnose()
    assert [finding.name for finding in findings] == expected
    if expected:
        assert "--max_seq_len 512 --batch_size 2" in findings[0].remedy


@pytest.mark.parametrize(("share", "level"), [(0.6, "warning"), (0.3, "note"), (0.1, None)])
def test_slow_input(path: Path, share: float, level: str | None) -> None:
    findings = Run(path, columns={"data_share": np.full(STEPS, share)}).diagnose()
    assert [finding.level for finding in findings if finding.name == "slow_input"] == ([level] if level else [])


@pytest.mark.parametrize(("share", "level"), [(0.7, "warning"), (0.4, "note"), (0.2, None)])
def test_padding(path: Path, share: float, level: str | None) -> None:
    findings = Run(path, options={"packing": False}, summary={"text": {"padding": share}}).diagnose()
    assert [finding.level for finding in findings if finding.name == "padding"] == ([level] if level else [])


PROSE = "It was a bright cold day in April, and the clocks were striking thirteen while people of the town walked on."


def test_repetition(path: Path) -> None:
    finding = one(Run(path, texts=[PROSE, "to the king of the king " * 12]).diagnose(), "repetition")
    assert finding.level == "warning"
    assert finding.evidence["repeated"] > 0.8
    assert "--repetition_penalty 1.3" in finding.remedy


@pytest.mark.parametrize("texts", [["to the king of " * 12, PROSE], ["to to to to to"], [""], []])
def test_samples_that_do_not_repeat_or_are_too_short(path: Path, texts: list[str]) -> None:
    assert Run(path, texts=texts).names() == []


def test_share_repeated() -> None:
    assert share_repeated(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)
    assert share_repeated(["a"]) == 0


# The whole


def test_errors_come_first_and_notes_last(path: Path) -> None:
    run = Run(
        path,
        options={"packing": False, "warmup_ratio": 0.7},
        loss=rising,
        summary={"text": {"padding": 0.4}},
    )
    levels = [finding.level for finding in run.diagnose()]
    assert levels == sorted(levels, key=["error", "warning", "note"].index)
    assert set(levels) == {"error", "warning", "note"}


def test_a_run_that_still_goes_is_not_blamed_for_its_end(path: Path) -> None:
    run = Run(path, loss=lambda share: 7 - 2 * share, steps=200, total_steps=800, summary={"status": "running"})
    assert run.names() == []


def test_names() -> None:
    assert set(NAMES) >= LIVE
    assert len(set(NAMES)) == len(NAMES) == 20


@pytest.mark.parametrize("missing", ["metrics.jsonl", "metrics.json", "events.jsonl", "samples.jsonl"])
def test_what_a_killed_run_lacks(path: Path, missing: str) -> None:
    run = Run(path, val={200: 4.2, 400: 4.0}).write()
    (run / missing).unlink()
    assert [finding for finding in diagnose(run) if finding.level != "note"] == []


def test_a_half_written_record(path: Path) -> None:
    run = Run(path, val={200: 4.2, 300: 4.05, 400: 4.03}).write()
    for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl"):
        with (run / name).open("a", encoding="utf-8") as stream:
            stream.write('{"step": 401, "train_lo')
    assert diagnose(run) == []


@pytest.mark.parametrize("records", [0, 1, 2, 5, 9, 30])
def test_a_few_records(path: Path, records: int) -> None:
    run = Run(path, "finetune", {"warmup_ratio": 0.0}, steps=records, val={1: 3.0, 5: 2.0}, loss=fine_tuned)
    assert [finding for finding in run.diagnose() if finding.name not in NAMES] == []


def test_entries_of_other_types(path: Path) -> None:
    """Another version, or a hand, wrote them."""
    odd: dict[str, Any] = {"learning_rate": "fast", "max_seq_len": [1], "epochs": None, "max_grad_norm": "1"}
    run = Run(path, val={200: 4.2, 300: 4.05, 400: 4.03}).write()
    options = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**options, **odd, "regime": "distilling"}))
    summary = {"status": 3, "text": "none", "shape": [], "parent": 7, "total_steps": "many", "best_step": None}
    (run / "metrics.json").write_text(json.dumps(summary))
    events: list[dict[str, Any]] = [
        {"event": "loss_spike", "step": "x"},
        {"event": "skipped_step", "rows": [["a"], 3]},
        {},
    ]
    write_lines(run / "events.jsonl", [*events, spike(200, worst_rows=3, rows="all", worst_share="x")])
    write_lines(run / "samples.jsonl", [{"step": 1, "text": 7}, {}])
    assert {finding.name for finding in diagnose(run)} <= set(NAMES)


@pytest.mark.parametrize("name", ["a\x00b", "a" * 5000, "..", ""])
def test_a_parent_that_no_folder_can_be(path: Path, name: str) -> None:
    run = Run(path, summary={"parent": name}).write()
    assert "worse_than_parent" not in [finding.name for finding in diagnose(run)]


def test_a_checkpoint_stands_for_its_run(path: Path) -> None:
    run = Run(path, loss=rising).write()
    (run / "checkpoints" / "best").mkdir(parents=True)
    assert [finding.name for finding in diagnose(run / "checkpoints" / "best")] == ["divergence"]


@pytest.mark.parametrize("make", [False, True])
def test_a_folder_that_is_no_run(path: Path, make: bool) -> None:
    if make:
        path.mkdir()
    with pytest.raises(ConfigError):
        diagnose(path)


def test_a_long_run_is_read_fast(path: Path) -> None:
    run = Run(path, steps=100_000, total_steps=100_000, val={50_000: 4.1, 100_000: 4.0}).write()
    began = time.perf_counter()
    diagnose(run)
    assert time.perf_counter() - began < 2  # 0.4 s where nothing else runs
