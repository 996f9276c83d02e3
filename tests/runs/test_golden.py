"""Loss curves kept from earlier: a refactor reproduces them, a change of the numbers renews them in its own commit.

SEEDBED_RENEW_GOLDEN=1 pytest tests/runs/test_golden.py    writes the curves anew
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.runs.conftest import RunIt, read_metrics

GOLDEN = Path(__file__).with_name("golden.json")
TEXT = Path(__file__).parents[2] / "LICENSE"
ARCHS = ("gpt2", "llama", "qwen2", "qwen3")

# Processors add in different orders: the last digits differ between machines, and grow over the steps.
TOLERANCE = 2e-4


def curve(run_it: RunIt, output: Path, arch: str) -> list[float]:
    options = {"max_steps": 12, "eval_every": 6, "learning_rate": 1e-2, "num_kv_heads": 1 if arch != "gpt2" else 2}
    run_it(output, data=str(TEXT), arch=arch, document="blank_line", dropout=0.1, **options)
    return [float(record.get("train_loss") or record["val_loss"]) for record in read_metrics(output)]


@pytest.mark.parametrize("arch", ARCHS)
def test_curve_is_the_golden_one(run_it: RunIt, tmp_path: Path, arch: str) -> None:
    losses = curve(run_it, tmp_path / "run", arch)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("SEEDBED_RENEW_GOLDEN"):
        GOLDEN.write_text(json.dumps({**golden, arch: [round(loss, 6) for loss in losses]}, indent=1) + "\n")
    else:
        assert losses == pytest.approx(golden[arch], abs=TOLERANCE)
