"""Runs that were stopped under released versions: this one reads their checkpoints, and goes on as they would have.

SEEDBED_RENEW_GOLDEN=1 pytest tests/runs/test_versions.py    keeps a run of the version at hand, once for each release
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

import pytest

import seedbed
from seedbed.checkpoint import damage
from tests.runs.conftest import RunIt, read_metrics
from tests.runs.test_golden import TEXT, TOLERANCE

VERSIONS: Final = Path(__file__).with_name("versions")
STOPPED, STEPS = 5, 10
OPTIONS: Final[dict[str, Any]] = {
    "data": "text.txt",
    "document": "blank_line",
    "tokenizer": "char",
    "vocab_size": None,
    "num_layers": 1,
    "d_model": 16,
    "d_ff": 32,
    "max_seq_len": 24,
    "max_steps": STEPS,
    "eval_every": 4,
    "dropout": 0.1,
    "grad_accumulation": 2,
    "learning_rate": 1e-2,
}


def losses(run: Path) -> list[float]:
    """Of the steps and validations after the stop."""
    records = [record for record in read_metrics(run) if record["step"] > STOPPED]
    return [float(record.get("train_loss") or record["val_loss"]) for record in records]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the text, which the runs know by its name alone."""
    shutil.copy(TEXT, tmp_path / OPTIONS["data"])
    monkeypatch.chdir(tmp_path)


@pytest.mark.skipif("SEEDBED_RENEW_GOLDEN" not in os.environ, reason="SEEDBED_RENEW_GOLDEN is not set")
def test_keep_a_run(run_it: RunIt) -> None:
    run_it(Path("run"), stop_at=STOPPED, **OPTIONS)
    kept = shutil.copytree("run", VERSIONS / seedbed.__version__, ignore=shutil.ignore_patterns("best", ".lock"))
    run_it(Path("run"), **OPTIONS)
    (kept / "expected.json").write_text(json.dumps([round(loss, 6) for loss in losses(Path("run"))]) + "\n")


@pytest.mark.parametrize("version", sorted(path.name for path in VERSIONS.iterdir()))
def test_a_run_of_an_old_version_goes_on(run_it: RunIt, version: str) -> None:
    run = shutil.copytree(VERSIONS / version, Path("run"))
    [checkpoint] = (run / "checkpoints").glob("step-*")
    assert damage(checkpoint) == []
    run_it(run, **OPTIONS)
    assert losses(run) == pytest.approx(json.loads((run / "expected.json").read_text()), abs=TOLERANCE)
