"""seedbed runs list, note, report, and show beside --lineage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from seedbed.cli.app import run
from seedbed.runs.folder import RunFolder, read_summary
from tests.unit.runs.folders import write_run


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(["runs", *words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    assert run(["runs", *words]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_table_of_what_is_below_runs(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("runs/b"), {"learning_rate": 1e-3}, {"best_val_loss": 1.5})
    write_run(Path("runs/deep/a"), {}, {"status": "running"})
    lines = printed(capsys, "list", "--sort", "val_loss").splitlines()
    assert lines[0].split() == ["run", "model", "method", "batch", "epochs", "lr", "val", "loss", "bits/byte", "time",
                                "memory", "status"]  # fmt: skip
    assert [line.split()[0] for line in lines[1:]] == ["b", "a"]
    assert lines[2].endswith("killed")
    assert len(printed(capsys, "list", "runs/deep", "runs/b", "runs").splitlines()) == 3


def test_columns_filters_and_forms(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("runs/a"), {"learning_rate": 1e-3})
    write_run(Path("runs/b"))
    words = ["list", "--columns", "name, lr", "--filter", "lr<1e-4", "--filter", "status=done"]
    assert printed(capsys, *words) == "run     lr\nb    2e-05\n"
    assert printed(capsys, *words, "--format", "csv") == "name,lr\nb,2e-05\n"
    assert printed(capsys, *words, "--format", "markdown") == "| run | lr |\n| --- | ---: |\n| b | 2e-05 |\n"
    assert json.loads(printed(capsys, *words, "--json")) == {"runs": [{"name": "b", "lr": 2e-5, "path": "runs/b"}]}
    everything = json.loads(printed(capsys, "list", "--json"))["runs"]
    assert everything[0]["lr"] == 1e-3
    assert {"parent", "changed", "peak_memory", "status"} <= everything[0].keys()


def test_a_table_without_rows(capsys: pytest.CaptureFixture[str]) -> None:
    empty = printed(capsys, "list")
    assert str(Path("runs").absolute()) in empty
    assert "seedbed pretrain" in empty
    assert json.loads(printed(capsys, "list", "--json")) == {"runs": []}
    write_run(Path("runs/a"))
    assert "None of the 1 runs" in printed(capsys, "list", "--filter", "lr>1")
    assert "nowhere: no such folder" in refused(capsys, 2, "list", "nowhere")


def test_what_is_misspelt(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("runs/a"))
    assert "did you mean val_loss?" in refused(capsys, 2, "list", "--columns", "name,valloss")
    assert "did you mean status?" in refused(capsys, 2, "list", "--filter", "statu=done")
    assert "unknown option --sorted; did you mean sort?" in refused(capsys, 2, "list", "--sorted", "lr")
    assert "did you mean runs/a?" in refused(capsys, 2, "show", "run/a")


def test_notes(capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(Path("runs/a")).path
    printed(capsys, "note", "a", "gentle, and | better")
    assert read_summary(folder)["notes"] == "gentle, and | better"
    assert read_summary(folder)["best_val_loss"] == 2.5
    assert "gentle, and | better" in printed(capsys, "list")
    printed(capsys, "note", "runs/a", "")
    assert read_summary(folder)["notes"] == ""


def test_notes_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(Path("runs/a")).path
    writer = RunFolder(folder)
    assert "another process" in refused(capsys, 5, "note", "a", "text")
    writer.close()
    (folder / "metrics.json").write_text("{", encoding="utf-8")
    assert "not readable" in refused(capsys, 2, "note", "a", "text")
    assert (folder / "metrics.json").read_text(encoding="utf-8") == "{"
    Path("empty").mkdir()
    assert "holds no run" in refused(capsys, 2, "note", "empty", "text")
    assert list(Path("empty").iterdir()) == []


def test_one_run_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = [{"step": step, "val_loss": loss} for step, loss in ((50, 2.5), (100, 2.75))]
    guardrail = {"event": "guardrail", "step": 0, "level": "note", "message": "no warm-up", "remedy": "Set it."}
    finding = {"event": "finding", "step": 1234, "level": "warning", "message": "it forgets", "remedy": "Replay."}
    write_run(
        Path("runs/a"),
        {"learning_rate": 1e-3, "lora_r": 4},
        {
            "best_step": 50,
            "train_loss": 2.0,
            "forecast": {"peak_memory_mb": 2000.0, "hours": 1.0},
            "text": {"train_documents": 12_345, "padding": 0.25, "val_bytes": None},
        },
        metrics=metrics,
        events=[guardrail, finding],
    )
    lines = [" ".join(line.split()) for line in printed(capsys, "show", "a").splitlines()]
    for expected in (
        "Best validation loss 2.5000 nats per token at step 50",
        "Last validation loss 2.7500 nats per token at step 100",
        "peak memory 2.0 GB 2.1 GB +3%",
        "time 1.0 h 30.0 min -50%",
        "training documents 12,345",
        "padding 25.0%",
        "learning_rate 0.001 the command line",
        "note (before the first step): no warm-up. Set it.",
        "warning (step 1,234): it forgets. Replay.",
    ):
        assert expected in lines
    assert not any("weight_decay" in line for line in lines), "nobody chose it"
    assert "Options that differ from the defaults:" in lines
    facts = json.loads(printed(capsys, "show", "runs/a", "--json"))
    assert facts["options"]["lora_r"] == 4
    assert facts["sources"]["lora_r"] == "the command line"
    assert facts["findings"] == [guardrail, finding]
    assert facts["best_val_loss"] == 2.5


def test_what_somebody_chose_comes_before_what_a_preset_says(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("runs/a"), {"model": "tiny", "epochs": 2, "seed": 4}, regime="scratch")
    lines = printed(capsys, "show", "a").splitlines()
    rows = lines[lines.index("Options that differ from the defaults:") + 2 :]
    sources = ["preset" if "preset tiny" in row else "chosen" for row in rows]
    assert sources == sorted(sources) and set(sources) == {"chosen", "preset"}


def test_a_damaged_summary_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(Path("runs/a"), {}, {}, metrics=[{"step": 1, "train_loss": 2.0}]).path
    (folder / "metrics.json").write_text("{", encoding="utf-8")
    lines = [" ".join(line.split()) for line in printed(capsys, "show", "a").splitlines()]
    assert lines[1:3] == ["Status unreadable", "Reason metrics.json is damaged"]
    assert json.loads(printed(capsys, "show", "a", "--json"))["status"] == "unreadable"
    assert json.loads(printed(capsys, "list", "--json"))["runs"][0]["status"] == "unreadable"


def test_a_killed_run_is_not_shown_as_running(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("runs/a"), {}, {"status": "running"})
    assert "Status" in printed(capsys, "show", "a")
    assert json.loads(printed(capsys, "show", "a", "--json"))["status"] == "killed"


def test_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    for name, options, loss in (("a", {"seed": 0}, 2.0), ("b", {"seed": 1}, 2.1), ("c", {"epochs": 1}, 1.0)):
        metrics = [{"step": step, "tokens": step * 64, "val_loss": loss + 1 / step} for step in (10, 20)]
        sample = {"step": 20, "prompt": "Hello", "text": f"said {name}"}
        write_run(Path("runs") / name, options, {"best_val_loss": loss}, metrics=metrics, samples=[sample])
    text = printed(capsys, "compare", "a", "b", "c")
    for expected in (
        "seed    0  1  0",
        "val loss  2.0000  2.1000  1.0000 *",
        "a + b  2.0500 ± 0.0707 (2)",
        "no clear difference: c and a + b are apart by 1.0500 nats per token",
        "run     640   1,280",
        "  c  said c",
    ):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 100
    markdown = printed(capsys, "compare", "a", "b", "c", "--markdown", "--axis", "step")
    assert "| c | 1.1000 | 1.0500 |" in markdown
    assert "**Hello**" in markdown
    facts = json.loads(printed(capsys, "compare", "a", "b", "c", "--json"))
    assert facts["names"] == ["a", "b", "c"]
    assert facts["options"] == {"epochs": [3, 3, 1], "seed": [0, 1, 0]}


def test_many_runs_side_by_side_stay_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"run-with-a-long-name-{number}" for number in range(12)]
    for number, name in enumerate(names):
        write_run(Path("runs") / name, {"weight_decay": number / 10}, {"best_val_loss": 2 + number / 10})
    text = printed(capsys, "compare", *names)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("is better than") == 11, "those of the best run; --json has all 66"
    assert "55 comparisons of pairs more" in text


def test_only_finished_runs_that_compare_are_best(capsys: pytest.CaptureFixture[str]) -> None:
    text = {"val_bytes": 1000, "val_documents": 10, "val_tokens": 300}
    summaries: dict[str, dict[str, object]] = {
        "a": {"best_val_loss": 2.0, "bits_per_byte": 1.2, "hours": 3.0, "text": text},
        "b": {"best_val_loss": 1.0, "bits_per_byte": 1.3, "hours": 2.0, "text": text | {"val_tokens": 600}},
        "c": {"status": "failed", "best_val_loss": None, "bits_per_byte": None, "hours": 0.1, "text": text},
    }
    for number, (name, summary) in enumerate(summaries.items(), 1):
        write_run(Path("runs") / name, {"epochs": number}, summary)
    lines = printed(capsys, "compare", "a", "b", "c").splitlines()
    figures = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in lines if "  " in line}
    assert figures["val loss"].split() == ["2.0000", "1.0000", "-"]
    assert figures["bits/byte"].split() == ["1.2000", "*", "1.3000", "-"]
    assert figures["time"] == "3.0 h  2.0 h *  6.0 min"


def test_what_looks_the_same_is_not_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    for name, memory, hours in (("a", 1401.0, 3.0), ("b", 1402.0, 2.0), ("c", 1900.0, 2.5)):
        write_run(Path("runs") / name, {"epochs": ord(name)}, {"peak_memory_mb": memory, "hours": hours})
    lines = [" ".join(line.split()) for line in printed(capsys, "compare", "a", "b", "c").splitlines()]
    assert "memory 1.4 GB 1.4 GB 1.9 GB" in lines
    assert "time 3.0 h 2.0 h * 2.5 h" in lines


def test_of_many_pairs_those_of_the_best_are_shown_also_within_the_noise(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{letter}-{seed}" for letter in "abcdef" for seed in (0, 1)]
    for name in names:
        loss = 2 + (ord(name[0]) - 97) / 1000 + int(name[2]) / 10
        write_run(Path("runs") / name, {"epochs": ord(name[0]), "seed": int(name[2])}, {"best_val_loss": loss})
    text = printed(capsys, "compare", *names)
    assert text.count("no clear difference: a and ") == 5
    assert "10 comparisons of pairs more" in text


def test_what_does_not_compare(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("runs/a"))
    assert "two or more different runs" in refused(capsys, 2, "compare", "a", "runs/a")
    assert "two or more different runs" in refused(capsys, 2, "compare")
    assert "nowhere" in refused(capsys, 2, "compare", "a", "nowhere")
    assert "unknown option --axes" in refused(capsys, 2, "compare", "a", "a", "--axes", "step")


def test_reports(capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        write_run(Path("runs") / name, {"seed": ord(name)}, metrics=[{"step": 1, "tokens": 9, "val_loss": 2.5}])
    assert printed(capsys, "report", "a").strip() == "runs/a/report.html"
    assert json.loads(printed(capsys, "report", "a", "--json")) == {"page": "runs/a/report.html"}
    assert "<html" in Path("runs/a/report.html").read_text(encoding="utf-8")
    assert printed(capsys, "report", "a", "b", "--output", "both.html").strip() == "both.html"
    assert printed(capsys, "compare", "a", "b", "--report", "again.html").splitlines()[-1] == "again.html"
    assert Path("both.html").is_file()
    assert Path("again.html").is_file()


TERMINAL = """
import os, pty, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.executable, [sys.executable, "-m", "seedbed", "runs", "list"])
text = b""
try:
    while block := os.read(terminal, 65536):
        text += block
except OSError:
    pass
os.waitpid(pid, 0)
sys.stdout.buffer.write(text)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_narrow_terminal_shows_what_fits_and_says_what_does_not() -> None:
    write_run(Path("runs/a"), {}, {"notes": "a note"})
    environment = {**os.environ, "COLUMNS": "60"}
    done = subprocess.run([sys.executable, "-c", TERMINAL], capture_output=True, timeout=60, env=environment, text=True)
    first, second, *_ = done.stdout.splitlines()
    assert max(len(first), len(second)) <= 60
    assert "Not shown for want of room: " in done.stdout


LIGHT = """
import sys
from seedbed.cli.runs import runs
runs(["list"], standalone_mode=False)
loaded = {"torch", "numpy", "rich.table"} & sys.modules.keys()
sys.exit(", ".join(loaded) or 0)
"""


def test_the_table_needs_nothing_heavy() -> None:
    for number in range(3):
        write_run(Path(f"runs/{number}"))
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, timeout=60, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
