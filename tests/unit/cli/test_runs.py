"""seedbed runs show: what a run did, and what its model learnt."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seedbed.cli.app import run
from seedbed.runs.history import BASE, FILE, Figure, History, Stage, write_history

SUMMARY = {
    "status": "done",
    "steps": 1200,
    "total_steps": 1200,
    "best_val_loss": 2.5,
    "best_val_ppl": 12.1825,
    "bits_per_byte": 1.0123,
    "hours": 0.5,
    "device": "cpu",
    "parent": "runs/book/checkpoints/best",
    "notes": "",
}


def figures(**bits_per_byte: float) -> dict[str, Figure]:
    return {domain: Figure(2 * bits, bits) for domain, bits in bits_per_byte.items()}


def make_run(path: Path, history: History | None) -> Path:
    """A run folder as training leaves it, as far as this verb looks."""
    best = path / "checkpoints" / "best"
    best.mkdir(parents=True)
    (path / "metrics.json").write_text(json.dumps(SUMMARY), encoding="utf-8")
    if history:
        write_history(best / "seedbed" / FILE, history)
    return path


@pytest.fixture
def history(tmp_path: Path) -> History:
    """Three stages; the folder of law is there, the one of medicine is not."""
    base = tmp_path / "base"
    law = tmp_path / "law"
    for folder in (base, law):
        folder.mkdir()
    replay = {"replay": 0.05, "learning_rate": 2e-5}
    return History(
        (
            Stage(BASE, str(base), ""),
            Stage(
                "law",
                str(law / "checkpoints" / "best"),
                "",
                run=str(law),
                method=replay,
                before=figures(base=1.0, law=1.5),
                after=figures(base=1.1, law=1.1),
            ),
            Stage(
                "medicine",
                str(tmp_path / "gone" / "checkpoints" / "best"),
                "",
                run=str(tmp_path / "gone"),
                method=replay | {"kl": 0.3},
                why="nothing was stored of the base",
                before=figures(base=1.1, law=1.1, medicine=2.0),
                after=figures(base=1.3, law=1.2, medicine=1.0),
            ),
        )
    )


@pytest.fixture
def adapted(tmp_path: Path, history: History) -> Path:
    return make_run(tmp_path / "medicine", history)


@pytest.fixture
def naive(tmp_path: Path, history: History) -> Path:
    """Gained a fifth less than it might have, and forgot twice as much."""
    medicine = history.stages[2]
    learnt = replace(medicine, method={}, after=figures(base=1.5, law=1.3, medicine=0.75))
    return make_run(tmp_path / "naive", history.with_stage(learnt))


def show(words: list[str | Path], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["runs", "show", *map(str, words)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def show_json(words: list[str | Path], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    printed = show([*words, "--json"], capsys)
    assert printed.count("\n") == 1
    result = json.loads(printed)
    assert isinstance(result, dict)
    return result


def refused(words: list[str | Path], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["runs", "show", *map(str, words)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_the_summary_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", None)
    printed = show([folder], capsys)
    facts = {name: value for name, _, value in (line.partition("  ") for line in printed.splitlines())}
    assert {name: value.strip() for name, value in facts.items()} == {
        "Run": str(folder),
        "Status": "done",
        "Steps": "1,200 of 1,200",
        "Best validation loss": "2.5000 nats per token",
        "Perplexity": "12.182",
        "Bits per byte": "1.0123",
        "Hours": "0.500",
        "Device": "cpu",
        "Parent": "runs/book/checkpoints/best",
    }
    assert show_json([folder], capsys) == {"run": str(folder), **SUMMARY}


def test_a_checkpoint_stands_for_its_run(adapted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = adapted / "checkpoints" / "best"
    assert show([best], capsys) == show([adapted], capsys)
    assert show([best, "--lineage"], capsys) == show([adapted, "--lineage"], capsys)
    assert show_json([best, "--lineage"], capsys) == show_json([adapted, "--lineage"], capsys)


def test_a_summary_with_odd_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", None)
    odd = {"status": "running", "steps": "many", "best_val_loss": None, "hours": [1]}
    (folder / "metrics.json").write_text(json.dumps(odd), encoding="utf-8")
    assert [line.split()[0] for line in show([folder], capsys).splitlines()] == ["Run", "Status"]


def test_the_lineage_for_people(adapted: Path, naive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = show([adapted, "--lineage", "--baseline", naive], capsys)
    assert printed.splitlines() == [
        f"* base      {tmp_path}/base",
        "|",
        "* law       replay 5 %, whole model, peak rate 2e-05",
        "|           1.5000 -> 1.1000 bits per byte; forgetting: base +10.0 %",
        f"|           {tmp_path}/law (its model is missing: {tmp_path}/law/checkpoints/best)",
        "|",
        "* medicine  replay 5 %, KL 0.3, whole model, peak rate 2e-05",
        "            auto: nothing was stored of the base",
        "            2.0000 -> 1.0000 bits per byte; forgetting: base +18.2 %, law +9.1 %",
        f"            {tmp_path}/gone (missing)",
        "",
        "Bits per byte of held-out text (nats per token) after each stage:",
        "                     base              law         medicine",
        "base      1.0000 (2.0000)  1.5000 (3.0000)                -",
        "law       1.1000 (2.2000)  1.1000 (2.2000)                -",
        "medicine  1.3000 (2.6000)  1.2000 (2.4000)  1.0000 (2.0000)",
        "",
        "Backward transfer: -0.2000 bits per byte; below zero is forgetting.",
        "Of each gain there is left: law 75.0 %, medicine 100.0 %.",
        *wrapped_sentence(naive, "80.0 % of its gain on medicine, and 50.0 % of its forgetting avoided."),
    ]


def wrapped_sentence(naive: Path, shares: str) -> list[str]:
    from textwrap import wrap

    return wrap(f"Against {naive}: {shares}", 100, break_long_words=False, break_on_hyphens=False)


def test_the_lineage_for_programs(
    adapted: Path, naive: Path, history: History, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = show_json([adapted, "--lineage"], capsys)
    assert facts["status"] == "done"
    assert facts["stages"] == history.to_json()["stages"]
    assert [row["domain"] for row in facts["matrix"]] == ["base", "law", "medicine"]
    assert facts["matrix"][0]["figures"]["law"] == {"loss": 3.0, "bits_per_byte": 1.5}
    assert facts["backward_transfer"] == pytest.approx(-0.2)
    assert facts["gain_kept"] == {"law": pytest.approx(0.75), "medicine": pytest.approx(1.0)}
    assert facts["gain_share"] is None
    assert facts["forgetting_avoided"] is None
    facts = show_json([adapted, "--lineage", "--baseline", naive], capsys)
    assert facts["gain_share"] == pytest.approx(0.8)
    assert facts["forgetting_avoided"] == pytest.approx(0.5)


def test_a_baseline_is_looked_for_below_runs_too(
    tmp_path: Path, history: History, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("kept", "naive"):
        make_run(tmp_path / "runs" / name, history)
    assert "Against runs/naive: 100.0 % of its gain" in show(["kept", "--lineage", "--baseline", "naive"], capsys)
    assert "--baseline naif: no such folder" in refused(["kept", "--lineage", "--baseline", "naif"], 2, capsys)


def test_many_domains_with_long_names_fit_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{'field-of-study-' * 3}{number}" for number in range(8)]
    stages = [Stage(BASE, "/", "")]
    for number, name in enumerate(names):
        known = figures(base=1.0, **dict.fromkeys(names[: number + 1], 1.25))
        stages.append(Stage(name, "/", "", method={"replay": 0.1}, before=known, after=known, why="because " * 30))
    folder = make_run(tmp_path / "run", History(tuple(stages)))
    lines = show([folder, "--lineage"], capsys).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.count("1.2500 (2.5000)") for line in lines) == 1 + sum(range(1, 9))


def test_a_run_under_way(tmp_path: Path, history: History, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", None)
    law = replace(history.stages[1], model="", after={})
    write_history(folder / "history" / FILE, History((history.stages[0], law)))
    printed = show([folder, "--lineage"], capsys)
    assert "peak rate 2e-05 (being learnt)" in printed
    assert "Backward transfer: unknown" in printed
    assert "nothing was gained and measured" in printed
    assert show_json([folder, "--lineage"], capsys)["gain_kept"] == {"law": None}


def test_control_characters_of_a_file_stay_out_of_the_terminal(
    tmp_path: Path, history: History, capsys: pytest.CaptureFixture[str]
) -> None:
    law = replace(history.stages[1], why="\x1b[2Jno\u202ething", run="\x1b]0;title\x07")
    folder = make_run(tmp_path / "run", History((history.stages[0], law)))
    printed = show([folder, "--lineage"], capsys)
    assert printed.replace("\n", "").isprintable()


def test_a_baseline_that_is_no_measure(
    adapted: Path, tmp_path: Path, history: History, capsys: pytest.CaptureFixture[str]
) -> None:
    medicine = history.stages[2]
    useless = make_run(tmp_path / "useless", history.with_stage(replace(medicine, after={})))
    printed = show([adapted, "--lineage", "--baseline", useless], capsys)
    assert "no comparison" in " ".join(printed.split())  # lines are wrapped where the folder's name lets them
    mild = replace(medicine, after=figures(base=1.1, law=1.1, medicine=1.5))
    keeping = make_run(tmp_path / "keeping", history.with_stage(mild))
    printed = show([adapted, "--lineage", "--baseline", keeping], capsys)
    assert "200.0 % of its gain" in " ".join(printed.split())
    assert "rough" not in printed
    assert "forgot nothing itself" in " ".join(printed.split())
    elsewhere = replace(mild, before=figures(base=1.0, law=1.1, medicine=2.0))
    other = make_run(tmp_path / "elsewhere", history.with_stage(elsewhere))
    assert "the comparison is rough" in " ".join(show([adapted, "--lineage", "--baseline", other], capsys).split())


def test_what_cannot_be_shown(adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refused([tmp_path / "nowhere"], 2, capsys)
    assert "metrics.json" in refused([tmp_path], 2, capsys)
    assert "seedbed continue" in refused([make_run(tmp_path / "plain", None), "--lineage"], 4, capsys)
    assert "--lineage" in refused([adapted, "--baseline", adapted], 2, capsys)
    assert "no such folder" in refused([adapted, "--lineage", "--baseline", tmp_path / "nowhere"], 2, capsys)
    base_only = make_run(tmp_path / "other", History((Stage(BASE, "/", ""), Stage("law", "/", ""))))
    error = refused([adapted, "--lineage", "--baseline", base_only], 2, capsys)
    assert "learnt base, law; expected a run that learnt medicine" in error
    (adapted / "checkpoints" / "best" / "seedbed" / FILE).write_text("{", encoding="utf-8")
    assert FILE in refused([adapted, "--lineage"], 4, capsys)


SHOW = """
import sys
from seedbed.cli.app import run
code = run(sys.argv[1:])
sys.exit(code or "torch" in sys.modules)
"""


def test_no_torch_and_no_terminal_are_needed(adapted: Path) -> None:
    words = [sys.executable, "-c", SHOW, "runs", "show", str(adapted), "--lineage"]
    done = subprocess.run(words, capture_output=True, timeout=60, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout
