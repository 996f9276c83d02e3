"""Everything that is wrong with a sweep's file is said at once, with its place, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from seedbed.errors import ConfigError
from seedbed.sweep import run_sweep

BASE = "verb: pretrain\nbase: {data: book.txt, model: tiny}\n"
TUNE = "verb: finetune\nbase: {data: q.json, model: gpt2}\n"


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the files name is there, but for what a test leaves out."""
    monkeypatch.chdir(tmp_path)
    for name in ("book.txt", "a.txt", "a b.txt", "a-b.txt"):
        Path(name).write_text("a text", encoding="utf-8")
    Path("q.json").write_text('{"question": "1 + 1?", "answer": "2"}', encoding="utf-8")


def problems_of(folder: Path, text: str) -> list[str]:
    """What is said about a file with this text; nothing may be left behind."""
    file = folder / "s.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        run_sweep(file, folder / "out")
    assert not (folder / "out").exists()
    return [problem.removeprefix(str(file)) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": expected keys such as `verb: finetune` and `grid:`"),
        ("- 1\n", ": expected keys such as `verb: finetune`"),
        ("verb: [", ": not readable as YAML"),
        ("verb: pretrain\n", ": the file: expected at least one of grid, runs and seeds: there is nothing that varies"),
        ("verb: train\nseeds: [0]\n", ": verb: expected pretrain, finetune or continue"),
        ("seeds: [0]\n", ": verb is missing; expected pretrain, finetune or continue"),
        (BASE + "gird: {epochs: [1]}\nseeds: [0]", ": unknown key gird; did you mean grid?"),
        (BASE + "grid: {}", ": grid is empty; expected at least one"),
        (BASE + "grid:", ": the file: expected at least one of grid, runs and seeds"),
        (BASE + "grid: {epochs: []}", ": grid.epochs is empty; expected at least one"),
        (BASE + "grid: {epochs: 3}", ": grid.epochs: expected a list of values, such as [16, 32]"),
        (BASE + "grid: {epochs: [1, 2, 1]}", ": grid.epochs: 1 stands there 2 times; leave it once"),
        (BASE + "grid: {epochs: [1, null]}", ": grid.epochs has no value; give one, or leave the flag out"),
        (BASE + "runs: {}", ": runs is empty"),
        (BASE + "runs: {a: 3}", ": runs.a: expected flags in braces, such as {epochs: 2}"),
        (BASE + "runs: {logs: {}}", ": runs.logs: not a name for a folder"),
        (BASE + "runs: {a/b: {}}", ": runs.a/b: not a name for a folder"),
        (BASE + "runs: {a: {from: bb}, b: {}}", ": runs.a.from: there is no run bb in the list; did you mean b?"),
        (BASE + "runs: {a: {from: b}, b: {from: a}}", ": runs.a.from: goes in a circle, a from b from a"),
        (BASE + "runs: {a: {}, b: {}}", ": a and b are the same run; leave one of them out"),
        (BASE + "grid: {data: [a b.txt, a-b.txt]}", ": 2 runs would be called data-a-b.txt"),
        (BASE + "seeds: 3", ": seeds: expected a list, such as [0, 1, 2]"),
        (BASE + "seeds: [0, x]", ": --seed x (from seeds): expected a valid integer"),
        (BASE + "grid: {seed: [1]}\nseeds: [0]", ": grid.seed: seeds sets it too; leave one of them out"),
        (BASE + "seeds: [0]\nbudget: {}", ": budget: expected one of max_steps, max_tokens and hours"),
        (BASE + "seeds: [0]\nbudget: {hours: 1, max_steps: 2}", ": budget: expected one of max_steps"),
        (BASE + "seeds: [0]\nbudget: {steps: 2}", ": unknown key budget.steps; did you mean max_steps?"),
        (
            BASE + "seeds: [0]\nbudget: {hours: much}",
            ": --max_training_hours much (from budget): expected a valid number",
        ),
        (BASE + "grid: {max_steps: [1]}\nbudget: {max_steps: 2}", ": grid.max_steps: budget sets it too"),
        (BASE + "seeds: [0]\nhalving: {keep: 0.5}", ": halving.rungs is missing; expected steps, such as [50, 100]"),
        (BASE + "seeds: [0]\nhalving: {rungs: [9, 3]}", ": halving: expected rungs that rise"),
        (BASE + "seeds: [0]\nhalving: {rungs: [5], keep: 1}", ": halving.keep: expected less than 1"),
        (
            BASE + "seeds: [0]\nbudget: {max_steps: 9}\nhalving: {rungs: [9]}",
            ": halving.rungs: 9 is not before the last",
        ),
        (BASE + "grid: {eval_every: [4, 5]}\nhalving: {rungs: [10]}", ": --eval_every 4: halving compares at step 10"),
        (
            BASE + "grid: {val_split: [0]}\nhalving: {rungs: [10]}",
            ": --val_split 0: halving compares validation losses",
        ),
        (BASE + "runs: {a: {output: x}}", ": runs.a.output: the sweep chooses it for each run; leave it out"),
        (BASE + "runs: {a: {dropuot: 0}}", ": unknown option dropuot in runs.a; did you mean dropout? (run a)"),
        (BASE + "grid: {lora_r: [8]}", ": lora_r in grid has no meaning when training from scratch"),
        (TUNE + "runs: {a: {lora: no, lora_r: 8}}", ": --lora_r 8 (from runs.a) has no meaning without --lora"),
        ("verb: pretrain\nseeds: [0]\nbase: {model: tiny}", ": --data is missing: name a text file"),
        ("verb: finetune\nseeds: [0]\nbase: {data: a.txt}", ": --model is missing: name a model folder"),
        (
            "verb: pretrain\nbase:\n  data: a\n  epochs: 1\n  data: b\nseeds: [0]",
            ": not readable as YAML: line 5: data stands on line 3 too",
        ),
    ],
)
def test_one_mistake(tmp_path: Path, text: str, said: str) -> None:
    problems = problems_of(tmp_path, text)
    assert any(problem.startswith(said) for problem in problems), problems


def test_all_mistakes_are_said_at_once_and_whose_they_are(tmp_path: Path) -> None:
    problems = problems_of(
        tmp_path,
        "verb: pretrain\nbase: {data: a.txt, model: tiny, lerning_rate: 1e-3}\n"
        "grid: {batch_size: [4, many]}\nruns: {a: {epochs: 0}, b: {from: a, warmup-ratio: 2}}\nseeds: [0, 1]\n",
    )
    assert problems == [
        ": unknown option lerning_rate in base; did you mean learning_rate? (every run)",
        ": --batch_size many (from grid): expected a valid integer, unable to parse string as an integer "
        "(run batch_size-many_seed-0, batch_size-many_seed-1)",
        ": --epochs 0 (from runs.a): expected greater than 0 (run a_seed-0, b_seed-0, a_seed-1 and 1 more)",
        ": --warmup_ratio 2 (from runs.b): expected less than 1 (run b_seed-0, b_seed-1)",
    ]


def test_what_runs_need_is_looked_for_before_any_starts(tmp_path: Path) -> None:
    Path("nul.txt").write_bytes(b"a\0b")
    problems = problems_of(
        tmp_path,
        "verb: pretrain\nbase: {data: book.txt, model: tiny, num_heads: 2}\n"
        "runs:\n  good: {d_model: 32}\n  bad: {d_model: 33}\n  worse: {d_model: 32, val_data: nowhere.txt}\n"
        "  binary: {data: nul.txt}\n  tokens: {tokenizer: no/such/folder}\n  both: {data: nowhere.txt, d_model: 33}\n"
        "  far: {streaming: true, max_steps: 1, data: 's3://bucket/*.txt'}\n",
    )
    assert [problem.partition("; expected")[0].partition(". Give")[0] for problem in problems] == [
        ": d_model 33 is not divisible by num_heads 2: take d_model 32 or another number of heads (run bad, both)",
        ": --val_data nowhere.txt: there is no such file or named source",
        ": nul.txt is a binary file, not text: it has a NUL byte at byte 1",
        ": --tokenizer no/such/folder: there is no such folder",
        ": --data nowhere.txt: there is no such file or named source",
    ]


@pytest.mark.parametrize("model", ["runs/base", "./gpt2", "q.json"])
def test_a_model_folder_that_is_not_there(tmp_path: Path, model: str) -> None:
    [problem] = problems_of(tmp_path, f"verb: finetune\nbase: {{data: q.json, model: {model}}}\nseeds: [0, 1]")
    assert problem.startswith(f": --model {model}: there is no such folder; expected one of a model or a run")
    assert problem.endswith("(every run)")


def test_runs_that_began_do_not_need_their_texts_for_a_table(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(BASE + "runs: {a: {}, b: {epochs: 2}}", encoding="utf-8")
    Path("book.txt").unlink()
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "config.yaml").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"book\.txt: there is no such file .*\(run b\)"):
        run_sweep(file, tmp_path / "out")


def test_unknown_keys_misplaced_flags_and_wrong_ones_are_said_in_one_round(tmp_path: Path) -> None:
    problems = problems_of(
        tmp_path,
        "verb: pretrain\nsed: 3\nbase: {data: a.txt, model: tiny, output: x, epochs: 0}\n"
        "grid: {seed: [1, 1]}\nbudget: {max_steps: 3, hour: 1}\nruns: {a: {dropuot: 0}}\n",
    )
    assert problems == [
        ": unknown key budget.hour; did you mean hours?",
        ": unknown key sed; did you mean seeds?",
        ": base.output: the sweep chooses it for each run; leave it out",
        ": grid.seed: 1 stands there 2 times; leave it once",
        ": --epochs 0 (from base): expected greater than 0 (every run)",
        ": unknown option dropuot in runs.a; did you mean dropout? (run a)",
    ]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        run_sweep(tmp_path / "none.yaml")


def test_what_only_the_command_line_refuses_is_found_before_the_start(tmp_path: Path) -> None:
    [problem] = problems_of(tmp_path, BASE + "grid: {lr_schedule: [cosine, constant], min_lr: [0]}")
    assert "has no meaning with --lr_schedule constant" in problem
    assert problem.endswith("(run lr_schedule-constant_min_lr-0)")


def test_a_begun_sweep_of_another_verb(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "sweep.yaml").write_text(TUNE + "runs: {a: {}}", encoding="utf-8")
    (tmp_path / "s.yaml").write_text(BASE + "runs: {a: {}}", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds a sweep of seedbed finetune and the file says pretrain"):
        run_sweep(tmp_path / "s.yaml", out)
