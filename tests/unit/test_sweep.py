"""What a sweep's file stands for, how far its runs are, who goes on after a rung."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from seedbed.errors import ConfigError
from seedbed.runs.info import read_run
from seedbed.sweep.children import Children, make_slots, visible_gpus
from seedbed.sweep.halving import judge
from seedbed.sweep.plan import Plan, changes, make_plan
from seedbed.sweep.results import show_results, what_it_means
from seedbed.sweep.run import Sweep, folder_of
from seedbed.sweep.standing import has_ended, has_reached, read_progress, validation_loss
from seedbed.sweep.watch import Watch
from seedbed.train.stopping import StopRequest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "sweeps").glob("*.yaml"))
PRETRAIN = "verb: pretrain\nbase: {data: book.txt, model: tiny}\n"

MakePlan = Callable[[str], Plan]


@pytest.fixture
def plan_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakePlan:
    """What a file stands for, in a folder with the texts that files here name."""
    monkeypatch.chdir(tmp_path)
    for name in ("book.txt", "q.json", "a b.txt", "a/b.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"question": "1 + 1?", "answer": "2"}' if name == "q.json" else "text")

    def plan(text: str) -> Plan:
        path = tmp_path / "sweep.yaml"
        path.write_text(text, encoding="utf-8")
        return make_plan(path)

    return plan


# Names, parents, flags


def test_a_grid_is_every_combination_with_every_seed(plan_of: MakePlan) -> None:
    plan = plan_of(
        "verb: finetune\nbase: {model: gpt2, data: q.json, lora: yes}\n"
        "grid: {lora_r: [16, 32], learning_rate: [5e-5, 2e-4]}\nseeds: [0, 1]\n"
    )
    assert list(plan.runs)[:4] == [
        "lora_r-16_learning_rate-5e-05_seed-0",
        "lora_r-16_learning_rate-0.0002_seed-0",
        "lora_r-32_learning_rate-5e-05_seed-0",
        "lora_r-32_learning_rate-0.0002_seed-0",
    ]
    assert len(plan.runs) == 8
    first, last = plan.runs["lora_r-16_learning_rate-5e-05_seed-0"], list(plan.runs.values())[-1]
    assert (first.parent, last.parent) == (None, "lora_r-16_learning_rate-5e-05_seed-1")
    assert first.flags["learning_rate"] == 5e-5
    assert last.config.regime == "lora" and last.config.training.seed == 1
    assert plan.varying() == ["lora_r", "learning_rate", "seed"]
    assert {run.settings for run in plan.runs.values()} == {run.settings for run in list(plan.runs.values())[:4]}


def test_runs_of_a_list_inherit_and_come_after_their_parents(plan_of: MakePlan) -> None:
    plan = plan_of(
        PRETRAIN + "runs:\n"
        "  c: {from: b, warmup-steps: 5}\n"
        "  b: {from: a, epochs: 2}\n"
        "  a: {warmup_ratio: 0.2, batch_size: 4}\n"
    )
    assert list(plan.runs) == ["a", "b", "c"]
    assert plan.runs["c"].parent == "b"
    c = plan.runs["c"].flags
    assert (c["epochs"], c["batch_size"], c["warmup_steps"]) == (2, 4, 5)
    assert "warmup_ratio" not in c, "warm-up in steps takes the place of the inherited ratio"


def test_the_command_line_of_a_run(plan_of: MakePlan) -> None:
    plan = plan_of(
        "verb: finetune\nbase: {model: gpt2, data: a b.txt, packing: no, allow: [epochs, warmup], lora: true}\n"
        "runs: {a: {sample_prompt: '-x'}}\n"
    )
    words = plan.runs["a"].words(plan.verb, Path("s/a"), parent=Path("s/b"), stop_at_step=50)
    assert words[0] == "finetune"
    assert {"--data=a b.txt", "--no_packing", "--lora", "--allow=epochs", "--allow=warmup"} <= set(words)
    assert {"--sample_prompt=-x", "--from=s/b", "--output=s/a", "--stop_at_step=50"} <= set(words)


@pytest.mark.parametrize(
    ("budget", "flags"),
    [
        ("max_steps: 20", {"max_steps": 20}),
        ("max_tokens: 2e6", {"max_tokens": 2_000_000}),
        ("hours: 0.5", {"max_training_hours": 0.5, "lr_schedule": "cosine_time"}),
    ],
)
def test_a_budget(plan_of: MakePlan, budget: str, flags: dict[str, Any]) -> None:
    run = plan_of(f"{PRETRAIN}seeds: [0]\nbudget: {{{budget}}}\n").runs["seed-0"]
    assert {name: run.flags[name] for name in flags} == flags


def test_hours_leave_a_schedule_that_was_chosen(plan_of: MakePlan) -> None:
    text = PRETRAIN.replace("tiny", "tiny, lr_schedule: wsd") + "seeds: [0]\nbudget: {hours: 1}\n"
    assert plan_of(text).runs["seed-0"].flags["lr_schedule"] == "wsd"


def test_halving_validates_at_its_rungs(plan_of: MakePlan) -> None:
    plan = plan_of(f"{PRETRAIN}seeds: [0]\nhalving: {{rungs: [50, 150]}}\n")
    assert plan.runs["seed-0"].flags["eval_every"] == 50
    assert plan.halving is not None and plan.halving.keep == 0.5


def test_a_plan_is_a_sweeps_file_itself(plan_of: MakePlan) -> None:
    plan = plan_of(
        f"{PRETRAIN}grid: {{learning_rate: [5e-5, 1e-3], data: [a/b.txt, c.txt]}}\nseeds: [0, 1]\n"
        "halving: {keep: 0.4, rungs: [10]}\n"
    )
    again = plan_of(plan.to_yaml())
    assert {name: run.flags for name, run in again.runs.items()} == {n: run.flags for n, run in plan.runs.items()}
    assert {name: run.parent for name, run in again.runs.items()} == {n: run.parent for n, run in plan.runs.items()}
    assert again.halving == plan.halving
    assert "learning_rate-5e-05_data-a-b.txt_seed-0" in plan.runs


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_shipped_examples_stand_for_runs(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("questions.json").write_text('[{"question": "1 + 1?", "answer": "2"}]', encoding="utf-8")
    assert len(make_plan(example).runs) >= 3


def test_the_shipped_list_has_the_parents_of_the_notes_it_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("questions.json").write_text('[{"question": "1 + 1?", "answer": "2"}]', encoding="utf-8")
    [example] = [path for path in EXAMPLES if path.stem == "instruction-ablations"]
    runs = make_plan(example).runs
    assert {name: run.parent for name, run in runs.items() if run.parent} == {
        "run_6": "run_5",
        "run_10": "run_5",
        "run_11": "run_10",
        "run_12": "run_10",
        "run_13": "run_10",
        "run_14": "run_13",
        "run_15": "run_12",
        "run_16": "run_15",
        "run_17": "run_15",
        "run_18": "run_17",
        "run_19": "run_12",
    }
    assert runs["run_18"].config.training.learning_rate == 1e-4
    assert runs["run_18"].config.training.warmup_ratio == 0


# What changed


def test_a_file_may_grow_and_what_began_stays_as_it_was(plan_of: MakePlan, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    begun = plan_of(PRETRAIN + "runs: {a: {epochs: 1}, b: {epochs: 2}, c: {epochs: 3}}")
    for name in ("a", "c"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.yaml").write_text("", encoding="utf-8")
    assert changes(begun, folder) == []
    (folder / "sweep.yaml").write_text(begun.to_yaml(), encoding="utf-8")
    assert changes(begun, folder) == []

    grown = plan_of(PRETRAIN + "runs: {a: {epochs: 1, log_every: 5}, b: {epochs: 9}, d: {epochs: 4}}")
    assert changes(grown, folder) == [
        "Added since the sweep was begun: d",
        "No longer in the file, left as they are: c",
    ]
    changed = plan_of(PRETRAIN + "runs: {a: {epochs: 7, beta2: 0.9}, b: {epochs: 2}}")
    with pytest.raises(ConfigError) as caught:
        changes(changed, folder)
    epochs, beta2 = caught.value.problems
    assert epochs.startswith("a: --epochs was 1 when the run began and the file now says 7; ")
    assert beta2.startswith("a: --beta2 was not set when the run began and the file now says 0.9; ")


def test_the_folder_is_named_after_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder_of("x/lora-rank.yaml", None) == Path("runs/lora-rank")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder_of("x.yaml", "~/sweep") == tmp_path / "sweep"
    (tmp_path / "config.yaml").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds a run, and a sweep needs a folder of its own"):
        folder_of("x.yaml", tmp_path)


# How far runs are


def write_run(path: Path, losses: dict[int, float], summary: dict[str, Any], **options: Any) -> Path:
    """A run folder as far as a sweep looks: steps, each validated, and how it ended."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump({"regime": "scratch", **options}), encoding="utf-8")
    (path / "metrics.json").write_text(json.dumps(summary), encoding="utf-8")
    with (path / "metrics.jsonl").open("w", encoding="utf-8") as stream:
        for step, loss in losses.items():
            hours = {"elapsed_hours": step / 100, "remaining_hours": 1 - step / 100}
            stream.write(json.dumps({"step": step, "train_loss": loss, **hours}) + "\n")
            stream.write(json.dumps({"step": step, "val_loss": loss}) + "\n")
    return path


@pytest.mark.parametrize(
    ("summary", "options", "ended"),
    [
        ({"status": "done"}, {}, True),
        ({"status": "early_stopped"}, {}, True),
        ({"status": "diverged"}, {}, True),
        ({"status": "failed"}, {}, False),
        ({"status": "interrupted"}, {}, False),
        ({"status": "running"}, {}, False),
        ({"status": "stopped_by_halving"}, {}, False),
        ({"status": "time_limit", "steps": 9}, {"max_training_hours": 12.0}, True),
        ({"status": "time_limit", "steps": 9}, {"max_training_hours": 1.0}, False),
        ({"status": "time_limit", "steps": 10}, {"max_training_hours": 12.0, "stop_at_step": 10}, False),
        ({"status": "time_limit", "steps": 9}, {"max_training_hours": 12.0, "stop_at_step": 10}, True),
        ({}, {}, False),
    ],
)
def test_what_has_ended(
    plan_of: MakePlan, tmp_path: Path, summary: dict[str, Any], options: dict[str, Any], ended: bool
) -> None:
    run = plan_of(PRETRAIN + "seeds: [0]").runs["seed-0"]
    assert has_ended(write_run(tmp_path / "run", {}, summary, **options), run) is ended


def test_progress_is_read_from_the_end_of_the_records(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", dict.fromkeys(range(1, 200), 2.5), {"total_steps": 400})
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 200, "train_lo')
    progress = read_progress(run)
    assert progress is not None
    assert (progress.step, progress.total_steps, progress.loss) == (199, 400, 2.5)
    assert read_progress(tmp_path / "none") is None


def test_the_loss_at_a_rung_is_the_last_one_by_then(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {5: 3.0, 10: 2.0, 15: 1.0}, {})
    assert [validation_loss(run, step) for step in (4, 5, 12, 99)] == [None, 3.0, 2.0, 1.0]
    assert has_reached(run, 15) and not has_reached(run, 16)


# Halving


def test_the_better_settings_go_on_by_the_mean_of_their_seeds(plan_of: MakePlan, tmp_path: Path) -> None:
    plan = plan_of(PRETRAIN + "grid: {epochs: [1, 2, 3]}\nseeds: [0, 1]\nhalving: {rungs: [10]}")
    losses = {1: (3.0, 3.0), 2: (1.0, 4.0), 3: (2.0, 9.0)}
    for epochs, pair in losses.items():
        for seed, loss in enumerate(pair):
            write_run(tmp_path / f"epochs-{epochs}_seed-{seed}", {10: loss, 20: 0.1}, {})
    judged = judge(list(plan.runs.values()), tmp_path, 10, 0.5)
    assert set(judged.better) == {"epochs-1_seed-0", "epochs-1_seed-1", "epochs-2_seed-0", "epochs-2_seed-1"}
    assert judged.stopped == dict.fromkeys(
        ["epochs-3_seed-0", "epochs-3_seed-1"],
        "stopped by halving at step 10: validation loss 5.5000, number 3 of 3",
    )


def test_a_setting_of_which_a_run_failed_does_not_go_on(plan_of: MakePlan, tmp_path: Path) -> None:
    plan = plan_of(PRETRAIN + "grid: {epochs: [1, 2]}\nseeds: [0, 1]\nhalving: {keep: 0.9, rungs: [10]}")
    for name in ("epochs-1_seed-0", "epochs-2_seed-0", "epochs-2_seed-1"):
        write_run(tmp_path / name, {10: 1.0 if "epochs-1" in name else 2.0}, {})
    judged = judge(list(plan.runs.values()), tmp_path, 10, 0.9)
    assert judged.better == ("epochs-2_seed-0", "epochs-2_seed-1")


@pytest.mark.parametrize(
    ("status", "hours", "goes_on"),
    [
        ("diverged", 12.0, False),
        ("failed", 12.0, False),
        ("time_limit", 1.0, False),
        ("time_limit", 12.0, True),
        ("early_stopped", 12.0, True),
    ],
)
def test_a_loss_from_before_the_rung_counts_only_where_the_run_came_to_its_end(
    plan_of: MakePlan, tmp_path: Path, status: str, hours: float, goes_on: bool
) -> None:
    plan = plan_of(PRETRAIN + "grid: {epochs: [1, 2]}\nhalving: {rungs: [10, 20]}")
    write_run(tmp_path / "epochs-1", {10: 1.0}, {"status": status, "steps": 15}, max_training_hours=hours)
    write_run(tmp_path / "epochs-2", {10: 2.0, 20: 2.0}, {"status": "time_limit", "steps": 20}, stop_at_step=20)
    judged = judge(list(plan.runs.values()), tmp_path, 20, 0.5)
    assert judged.better == ("epochs-1" if goes_on else "epochs-2",)


def test_that_a_run_was_stopped_is_written_into_its_summary_unless_that_is_damaged(
    plan_of: MakePlan, tmp_path: Path
) -> None:
    plan = plan_of(PRETRAIN + "grid: {epochs: [1, 2, 3]}\nhalving: {keep: 0.3, rungs: [10]}")
    for epochs in (1, 2, 3):
        write_run(tmp_path / f"epochs-{epochs}", {10: float(epochs)}, {"status": "time_limit"}, stop_at_step=10)
    (tmp_path / "epochs-3" / "metrics.json").write_text("{", encoding="utf-8")
    watch = Watch(Console(quiet=True), plan, tmp_path, 1)
    sweep = Sweep(plan, tmp_path, Children([]), watch, StopRequest())
    assert sweep.keep_better(list(plan.runs), 10) == ["epochs-1"]
    assert read_run(tmp_path / "epochs-2").summary["status"] == "stopped_by_halving"
    assert (tmp_path / "epochs-3" / "metrics.json").read_text(encoding="utf-8") == "{"


# The machine


def test_slots_divide_cores_and_hand_out_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert make_slots(None, {"auto"}) == [{}]
    assert make_slots(3, {"cpu"}) == [{"OMP_NUM_THREADS": "2"}] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert make_slots(None, {"auto", "cuda"}) == [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "3"}]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in make_slots(3, {"cuda"})] == ["2", "3", "2"]
    assert make_slots(None, {"auto", "cpu"}) == [{}], "a run that names its device is not given another"

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho 'GPU 1: A (UUID: y)'\n", encoding="utf-8")
    program.chmod(0o755)
    assert visible_gpus() == ["0", "1"]


@pytest.mark.parametrize(
    ("allowed", "each"), [("8,2", "4"), (" 6 ", "3"), ("1", "1"), ("", "5"), ("many", "5"), ("-4", "5")]
)
def test_cores_are_divided_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, allowed: str, each: str
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 10)
    monkeypatch.setenv("OMP_NUM_THREADS", allowed)
    assert make_slots(2, {"cpu"}) == [{"OMP_NUM_THREADS": each}] * 2


def test_the_time_left_follows_from_what_runs_took(plan_of: MakePlan, tmp_path: Path) -> None:
    plan = plan_of(PRETRAIN + "seeds: [0, 1, 2, 3]")
    console = Console(quiet=True)
    assert Watch(console, plan, tmp_path, 1).hours_left() is None
    write_run(tmp_path / "seed-0", {50: 1.0}, {"status": "running", "total_steps": 100})
    left = Watch(console, plan, tmp_path, 2).hours_left()
    assert left is not None and math.isclose(left, (4 * 1.0 - 0.5) / 2)
    halved = plan_of(PRETRAIN + "seeds: [0, 1, 2, 3]\nhalving: {rungs: [50]}")
    left = Watch(console, halved, tmp_path, 1).hours_left()
    assert left is not None and math.isclose(left, 4 * 0.5 + 2 * 0.5 - 0.5), "two of four go past the middle"


def test_the_time_left_counts_what_runs_take_to_start_and_to_end(
    plan_of: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("seedbed.sweep.watch.time.monotonic", lambda: clock[0])
    watch = Watch(Console(quiet=True), plan_of(PRETRAIN + "seeds: [0, 1, 2, 3]"), tmp_path, 1)
    watch.started("seed-0", None)
    write_run(tmp_path / "seed-0", {100: 1.0}, {"status": "done", "total_steps": 100})
    clock[0] += 1.25 * 3600
    watch.stopped("seed-0", "done", ended=True)
    left = watch.hours_left()
    assert left is not None and math.isclose(left, 3 * 1.25), "an hour of training and a quarter beside it"


# What it means


def test_the_table_is_not_cut_where_nobody_watches(plan_of: MakePlan, tmp_path: Path) -> None:
    plan = plan_of(PRETRAIN + "grid: {learning_rate: [1e-3, 5e-3], batch_size: [4, 8], weight_decay: [0.1], seed: [7]}")
    for name in plan.runs:
        write_run(tmp_path / name, {}, {"status": "done", "best_val_loss": 1.0})
    said = StringIO()
    show_results(plan, tmp_path, {}, Console(file=said, width=80))
    words = said.getvalue().split()
    assert set(plan.runs) <= set(words) and not any(word.endswith("...") for word in words)


def test_settings_are_said_best_first_with_the_spread_of_their_seeds(tmp_path: Path) -> None:
    losses = {
        ("good", 0): 1.0,
        ("good", 1): 1.2,
        ("bad", 0): 0.9,
        ("bad", 1): 4.0,
        ("worst", 0): 5.0,
        ("worst", 1): 5.1,
    }
    rates = {"good": 1e-3, "bad": 1e-2, "worst": 1e-1}
    runs = [
        read_run(
            write_run(
                tmp_path / f"{name}_seed-{seed}", {}, {"best_val_loss": loss}, seed=seed, learning_rate=rates[name]
            )
        )
        for (name, seed), loss in losses.items()
    ]
    said = what_it_means(runs)
    assert [line.split(":")[0].split()[1] for line in said[:3]] == ["good", "bad", "worst"]
    assert said[0].endswith("validation loss 1.1000 ± 0.1414 (2)")
    assert len(said) == 5 and all("good" in verdict for verdict in said[3:]), "each is compared with the best"
    assert what_it_means(runs[::2]) == [
        "Differences may be luck: with `seeds: [0, 1, 2]` in the file, their spread tells."
    ]
    assert what_it_means(runs[:2]) == []
