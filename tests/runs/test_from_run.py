"""A run that begins with another's options, and runs that are cut by steps or tokens."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

import seedbed
from seedbed.cli.app import run
from seedbed.runs.folder import read_summary, update_summary
from tests.conftest import TINY
from tests.runs.conftest import RunIt, read_metrics, read_state, same_weights


def begin(text: Path, output: Path, *flags: str) -> int:
    return run(["pretrain", "--data", str(text), "--output", str(output), *TINY.split(), *flags])


def test_a_child_has_its_parents_options_and_the_change(small_text_file: Path, tmp_path: Path) -> None:
    parent, child = tmp_path / "parent", tmp_path / "child"
    assert begin(small_text_file, parent, "--max_steps", "4", "--learning_rate", "1e-3") == 0
    assert run(["pretrain", "--from", str(parent), "--seed", "1", "--output", str(child)]) == 0
    old, new = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (parent, child))
    assert {name for name in old if old[name] != new[name]} == {"seed", "output", "sources"}
    assert new["sources"]["learning_rate"] == str(parent / "config.yaml")
    assert new["sources"]["epochs"] == old["sources"]["epochs"] == "regime scratch"
    assert read_summary(child)["parent"] == str(parent)


def test_what_was_not_chosen_follows_from_what_is_chosen_now(small_text_file: Path, tmp_path: Path) -> None:
    """The feed-forward width that was worked out for one width is no choice for another."""
    parent, child = tmp_path / "parent", tmp_path / "child"
    flags = TINY.replace("--d_ff 64", "").split()
    assert run(["pretrain", "--data", str(small_text_file), "--output", str(parent), "--max_steps", "2", *flags]) == 0
    assert run(["pretrain", "--from", str(parent), "--d_model", "64", "--output", str(child)]) == 0
    old, new = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (parent, child))
    assert old["d_ff"] != new["d_ff"]


def test_a_grandchild_inherits_what_the_parent_inherited(small_text_file: Path, tmp_path: Path) -> None:
    assert begin(small_text_file, tmp_path / "a", "--max_steps", "2", "--learning_rate", "1e-3") == 0
    for older, younger in ("ab", "bc"):
        assert run(["pretrain", "--from", str(tmp_path / older), "--output", str(tmp_path / younger)]) == 0
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "c")


def test_the_same_from_python(small_text_file: Path, tmp_path: Path) -> None:
    assert begin(small_text_file, tmp_path / "a", "--max_steps", "2") == 0
    child = seedbed.pretrain(from_run=str(tmp_path / "a"), seed=3, output=str(tmp_path / "b"), quiet=True)
    assert (child.metrics["parent"], child.metrics["seed"]) == (str(tmp_path / "a"), 3)


def test_bad_parents(small_text_file: Path, tmp_path: Path) -> None:
    assert run(["pretrain", "--from", str(tmp_path), "--data", str(small_text_file)]) == 2
    assert begin(small_text_file, tmp_path / "a", "--max_steps", "1") == 0
    assert run(["finetune", "--from", str(tmp_path / "a"), "--output", str(tmp_path / "b")]) == 2
    (tmp_path / "a/config.yaml").write_text("a: [1,")
    assert run(["pretrain", "--from", str(tmp_path / "a"), "--output", str(tmp_path / "b")]) == 2
    assert not (tmp_path / "b").exists()


def test_stop_at_step_goes_on_bit_for_bit(run_it: RunIt, tmp_path: Path) -> None:
    whole = run_it(tmp_path / "whole", max_steps=12, eval_every=4)
    for limit, status in ((4, "time_limit"), (8, "time_limit"), (None, "done")):
        outcome = run_it(tmp_path / "parts", max_steps=12, eval_every=4, stop_at_step=limit)
        assert (outcome.exit_code, outcome.summary["status"]) == (75 if limit else 0, status)
        assert outcome.summary["steps"] == (limit or 12)
        assert outcome.summary["reason"] == (f"--stop_at_step {limit}" if limit else "")
    assert whole.summary["train_loss"] == outcome.summary["train_loss"]
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "parts")
    final = [tmp_path / name / "checkpoints/final" for name in ("whole", "parts")]
    assert same_weights(*final) and read_state(final[0]) == read_state(final[1])


def test_max_tokens(run_it: RunIt, tmp_path: Path) -> None:
    outcome = run_it(tmp_path / "a", max_tokens="2e3")
    assert 2000 <= outcome.summary["tokens"] < 2000 + 4 * 32
    fewer = run_it(tmp_path / "b", max_tokens=2000, max_steps=5)
    assert fewer.summary["steps"] == 5


def test_notes_and_judgements_stay_when_a_run_goes_on(run_it: RunIt, tmp_path: Path) -> None:
    run_it(tmp_path / "a", max_steps=6, stop_at_step=3)
    update_summary(tmp_path / "a", notes="mine", judge={"score": 50})
    outcome = run_it(tmp_path / "a", max_steps=6, stop_at_step=None)
    assert outcome.summary["status"] == "done"
    assert (outcome.summary["notes"], outcome.summary["judge"]) == ("mine", {"score": 50})


def test_the_summary_says_what_was_trained_on_what(run_it: RunIt, tmp_path: Path) -> None:
    summary = json.loads(((run_it(tmp_path / "a", max_steps=3)).path / "metrics.json").read_text())
    shape, text = summary["shape"], summary["text"]
    assert (shape["d_model"], shape["num_layers"], shape["max_seq_len"], shape["vocab_size"]) == (32, 2, 32, 300)
    assert text["train_documents"] > 0 and text["val_tokens"] > 0 and not text["conversations"]
    assert text["steps_per_epoch"] == -(-text["train_rows"] // 4)
    losses = [record["train_loss"] for record in read_metrics(tmp_path / "a") if "train_loss" in record]
    assert summary["train_loss"] == sum(losses) / len(losses)
