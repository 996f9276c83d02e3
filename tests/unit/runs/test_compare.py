"""What differs between runs, and whether it is more than luck."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from seedbed.runs.compare import common_measure, compare, group_by_seed
from seedbed.runs.info import RunInfo
from tests.unit.runs.folders import write_run

TEXT = {"val_bytes": 1000, "val_documents": 10, "val_tokens": 300}


def seeds(folder: Path, name: str, losses: dict[int, float | None], **options: Any) -> list[RunInfo]:
    return [
        write_run(
            folder / f"{name}-seed-{seed}",
            {**options, "seed": seed, "output": f"runs/{name}-{seed}"},
            {"best_val_loss": loss, "bits_per_byte": loss and loss / 2},
        )
        for seed, loss in losses.items()
    ]


def test_seeds_of_real_figures(tmp_path: Path) -> None:
    """The six runs of docs/instruction-results.md."""
    whole = seeds(tmp_path, "whole", {0: 0.7837, 1: 0.7858, 2: 0.7865})
    lora = seeds(tmp_path, "lora", {0: 0.8031, 1: 0.8024, 2: 0.8037}, lora=True)
    found = compare([*whole, *lora])
    assert [(group.name, group.members, group.seeds) for group in found.groups] == [
        ("whole", (0, 1, 2), (0, 1, 2)),
        ("lora", (3, 4, 5), (0, 1, 2)),
    ]
    assert found.groups[0].val_loss == pytest.approx(0.78533, abs=1e-5)
    assert found.groups[0].deviation == pytest.approx(0.00146, abs=1e-5)
    assert found.verdicts == (
        "whole is better than lora by 0.0177 nats per token, 0.7853 ± 0.0015 (3) against 0.8031 ± 0.0007 (3);"
        " that exceeds the seeds' noise (95 % interval 0.0147 to 0.0208).",
    )
    assert found.options.keys() == {"regime", "lora", "learning_rate", "min_lr", "seed"}
    assert found.options["seed"] == (0, 1, 2, 0, 1, 2)
    assert found.measure == "val_loss"
    json.dumps(asdict(found), allow_nan=False)


def test_a_difference_within_the_noise(tmp_path: Path) -> None:
    one = seeds(tmp_path, "one", {0: 1.00, 1: 1.02, 2: 1.04})
    two = seeds(tmp_path, "two", {0: 1.03, 1: 1.01, 2: 1.05}, weight_decay=0.5)
    [verdict] = compare([*one, *two]).verdicts
    assert verdict.startswith(
        "no clear difference: one and two are apart by 0.0100 nats per token, 1.0200 ± 0.0200 (3)"
    )
    assert "that is within the seeds' noise (95 % interval -0.0" in verdict
    assert "better" not in verdict


def test_one_group_lends_its_deviation(tmp_path: Path) -> None:
    one = seeds(tmp_path, "one", {0: 1.00, 1: 1.02, 2: 1.04})
    other = seeds(tmp_path, "other", {0: 0.5}, weight_decay=0.5)
    [verdict] = compare([*one, *other]).verdicts
    assert verdict.startswith("other-seed-0 is better than one by 0.5200 nats per token, 0.5000 against 1.0200 ±")
    assert "exceeds" in verdict
    assert "with the deviation of one for both" in verdict


def test_without_seeds_it_says_what_to_run(tmp_path: Path) -> None:
    one, other = seeds(tmp_path, "one", {0: 1.0}), seeds(tmp_path, "other", {1: 2.0}, weight_decay=0.5)
    [verdict] = compare([*one, *other]).verdicts
    assert verdict.endswith("noise is unknown: run both commands again with --seed 2 and --seed 3.")


def test_rows_of_other_lengths_are_another_ruler(tmp_path: Path) -> None:
    runs = [*seeds(tmp_path, "short", {0: 4.2}, max_seq_len=64), *seeds(tmp_path, "long", {0: 3.8}, max_seq_len=512)]
    [verdict] = compare(runs).verdicts
    assert ", each in rows of its own length (512 and 64); how much of it" in verdict


def test_the_same_seed_twice_is_no_second_seed(tmp_path: Path) -> None:
    one = [*seeds(tmp_path / "a", "one", {0: 1.0}), *seeds(tmp_path / "b", "one", {0: 1.0})]
    [group] = group_by_seed(one)
    assert (group.members, group.seeds, group.deviation) == ((0, 1), (0,), None)


def test_what_is_only_bookkeeping_does_not_split_a_group(tmp_path: Path) -> None:
    runs = [*seeds(tmp_path, "one", {0: 1.0}), *seeds(tmp_path, "one", {1: 1.5}, log_every=1, tensorboard=False)]
    found = compare(runs)
    assert len(found.groups) == 1
    assert found.options.keys() == {"seed"}
    assert found.verdicts == ()


def test_groups_that_begin_alike_keep_their_whole_names(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run-{n}", {"seed": n % 2, "epochs": 1 + n // 2}) for n in range(4)]
    assert [group.name for group in group_by_seed(runs)] == ["run-0 + run-1", "run-2 + run-3"]


def test_runs_that_never_validated(tmp_path: Path) -> None:
    one, none = seeds(tmp_path, "one", {0: 1.0}), seeds(tmp_path, "none", {0: None}, epochs=9)
    assert compare([*one, *none]).verdicts == (
        "one-seed-0 and none-seed-0 do not compare: none-seed-0 has no validation loss.",
    )


def pair(folder: Path, first: dict[str, Any], second: dict[str, Any], *texts: dict[str, Any] | None) -> list[RunInfo]:
    both = zip((first, second), texts or (None, None), strict=True)
    return [
        write_run(folder / str(place), options, {"text": text} if text else {})
        for place, (options, text) in enumerate(both)
    ]


@pytest.mark.parametrize(
    ("first", "second", "measure"),
    [
        ({}, {"learning_rate": 1e-3, "seed": 4}, "val_loss"),
        ({}, {"data": "other.txt"}, None),
        ({}, {"val_split": 0.2}, None),
        ({"val_data": "v.txt"}, {"val_data": "v.txt", "data": "more.txt"}, "val_loss"),
        ({}, {"train_on_prompt": True}, None),
        ({}, {"model": "models/other"}, "bits_per_byte"),
        ({}, {"max_seq_len": 64}, "bits_per_byte"),
    ],
)
def test_what_compares_by_its_options(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], measure: str | None
) -> None:
    one, other = pair(tmp_path, first, second)
    assert common_measure(one, other) == common_measure(other, one) == measure


@pytest.mark.parametrize(
    ("options", "text", "measure"),
    [
        ({"data": "copy-of-book.txt", "model": "models/other"}, TEXT, "val_loss"),
        ({}, TEXT | {"val_bytes": 999}, None),
        ({}, TEXT | {"val_tokens": 200}, "bits_per_byte"),
        ({"train_on_prompt": True}, TEXT | {"val_tokens": 200}, None),
        ({}, {"padding": 0.5}, "val_loss"),
    ],
)
def test_what_compares_by_what_was_counted(
    tmp_path: Path, options: dict[str, Any], text: dict[str, Any], measure: str | None
) -> None:
    one, other = pair(tmp_path, {}, options, TEXT, text)
    assert common_measure(one, other) == common_measure(other, one) == measure


def test_other_tokens_are_compared_in_bits_per_byte(tmp_path: Path) -> None:
    one, other = seeds(tmp_path, "one", {0: 3.0}), seeds(tmp_path, "other", {0: 2.0}, model="models/other")
    found = compare([*one, *other])
    assert "better than one-seed-0 by 0.5000 bits per byte (their tokens may differ" in found.verdicts[0]
    assert found.measure == "bits_per_byte"


def test_options_of_another_regime_count_if_chosen(tmp_path: Path) -> None:
    scratch = write_run(tmp_path / "scratch", {"d_model": 64, "num_heads": 2}, regime="scratch")
    found = compare([scratch, write_run(tmp_path / "tuned", {"lora_r": 4})])
    assert found.options["d_model"] == (64, None)
    assert found.options["lora_r"] == (None, 4)
    assert "lora_dora" not in found.options
    assert "arch" in found.options, "the preset chose it"


def test_figures_that_differ(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", {}, {"hours": 1.0, "judge": {"score": 5.0, "low": 4.0, "high": 6.0}})
    other = write_run(tmp_path / "other", {"epochs": 1}, {"hours": 2.0})
    assert compare([one, other]).figures == {
        "judge": ({"score": 5.0, "low": 4.0, "high": 6.0}, None),
        "time": (1.0, 2.0),
    }


def test_curves_by_tokens(tmp_path: Path) -> None:
    metrics = [{"step": step, "tokens": 10 * step, "val_loss": 9.0 - step} for step in (1, 2, 3)]
    one = write_run(tmp_path / "one", metrics=metrics)
    other = write_run(tmp_path / "other", {"epochs": 1}, metrics=metrics[:2])
    with (one.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "val_lo')
    [curve] = compare([one, other]).curves
    assert (curve.points, curve.values) == ((10.0, 20.0), ((8.0, 7.0), (8.0, 7.0)))


def test_answers_to_the_same_prompts(tmp_path: Path) -> None:
    def sample(step: int, prompt: str, text: str) -> dict[str, Any]:
        return {"step": step, "prompt": prompt, "text": text}

    one = write_run(tmp_path / "one", samples=[sample(1, "Hi", "a"), sample(2, "Hi", "b"), sample(2, "Alone", "c")])
    two = write_run(tmp_path / "two", {"epochs": 1}, samples=[sample(1, "Hi", "d"), {"prompt": "Hi", "odd": 1}])
    three = write_run(tmp_path / "three", {"epochs": 2})
    judged = [{"prompt": "2 + 2?", "answer": "4", "reference": "4."}, "no record", {"prompt": "2 + 2?", "answer": "5"}]
    for run in (two, three):
        (run.path / "judge").mkdir()
        lines = "".join(f"{json.dumps(record)}\n" for record in judged[: 3 if run is two else 1])
        (run.path / "judge" / "answers.jsonl").write_text(lines, encoding="utf-8")
    judge, samples = compare([one, two, three]).answers
    assert (judge.prompt, judge.reference, judge.texts) == ("2 + 2?", "4.", (None, "5", "4"))
    assert (samples.prompt, samples.reference, samples.texts) == ("Hi", None, ("b", "d", None))
