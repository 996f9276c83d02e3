"""seedbed diagnose: paragraphs for people, JSON for programs, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from seedbed.cli.diagnose import diagnose
from seedbed.errors import ConfigError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that learnt its text by heart and left much of its rows empty."""
    folder = tmp_path / "book"
    best = folder / "checkpoints" / "best"
    best.mkdir(parents=True)
    (folder / "config.yaml").write_text("regime: scratch\nlearning_rate: 0.001\nepochs: 9\nmax_seq_len: 64\n")
    summary = {"status": "done", "best_step": 40, "text": {"padding": 0.4}}
    (folder / "metrics.json").write_text(json.dumps(summary))
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in range(1, 101):
            record = {"step": step, "epoch": step / 12, "train_loss": 5 - step / 25}
            stream.write(json.dumps(record) + "\n")
            if step % 20 == 0:
                stream.write(json.dumps({"step": step, "epoch": step / 12, "val_loss": 4 + abs(step - 40) / 50}) + "\n")
    return folder


def invoke(*words: str | Path) -> Result:
    return CliRunner().invoke(diagnose, [str(word) for word in words])


def test_a_paragraph_a_finding(run: Path) -> None:
    done = invoke(run)
    assert done.exit_code == 0
    worst, other = done.output.split("\n\n")
    assert worst.startswith("Warning (overfitting): from step 40")
    assert other.startswith("Note (padding): 40% of the places")
    assert f"{run}/checkpoints/best" in worst.replace("\n", " ")
    assert all(len(line) <= 100 or str(run) in line for line in done.output.splitlines())


def test_a_checkpoint_stands_for_its_run(run: Path) -> None:
    assert invoke(run / "checkpoints" / "best").output == invoke(run).output


def test_json(run: Path) -> None:
    done = invoke(run, "--json")
    told = json.loads(done.output)
    assert [finding["name"] for finding in told["findings"]] == ["overfitting", "padding"]
    assert set(told["findings"][0]) == {"name", "level", "message", "evidence", "remedy"}
    assert told["looked_at"] == {"status": "done", "steps": 100, "validations": 5, "samples": 0, "events": 0}


def test_nothing_to_say(run: Path) -> None:
    (run / "metrics.json").write_text('{"status": "running"}')
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "train_loss": 3.0}}\n' for step in range(1, 10)))
    done = invoke(run)
    assert done.output.startswith("Nothing to say: the run looks healthy (9 steps, 0 validations")
    (run / "metrics.jsonl").unlink()
    assert invoke(run).output.startswith("Nothing to say: the run has not made a step")


def test_a_damaged_summary_is_not_healthy(run: Path) -> None:
    (run / "metrics.json").write_text("{")
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "train_loss": 3.0}}\n' for step in range(1, 10)))
    done = invoke(run)
    assert done.output.startswith("Warning: metrics.json is damaged, so how the run ended is unknown")
    assert "healthy" not in done.output
    assert json.loads(invoke(run, "--json").output)["looked_at"]["status"] == "unreadable"


def test_what_a_run_says_cannot_write_to_the_terminal(run: Path) -> None:
    event = {
        "event": "finding",
        "step": 1,
        "name": "forgetting",
        "message": "learning \x1b[31mlaw",
        "remedy": "Replay.",
    }
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert "\x1b" not in invoke(run).output


def test_no_run(tmp_path: Path) -> None:
    assert isinstance(invoke(tmp_path).exception, ConfigError)
    assert isinstance(invoke(tmp_path / "none").exception, ConfigError)


def test_a_misspelt_flag(run: Path) -> None:
    with pytest.raises(ConfigError, match="unknown option --jsn"):
        diagnose([str(run), "--jsn"], standalone_mode=False)


def test_it_needs_no_torch(run: Path) -> None:
    look = f"import sys; from seedbed.cli.diagnose import diagnose; diagnose([{str(run)!r}], standalone_mode=False)"
    done = subprocess.run(
        [sys.executable, "-c", f"{look}; print('torch' in sys.modules)"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr
