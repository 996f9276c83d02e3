"""The scripts in examples/ run as they are, on real text, with models of a second."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from seedbed.checkpoint import damage
from seedbed.runs.history import find_history
from seedbed.text.tokenizer import Tokenizer
from tests.conftest import MakeText

EXAMPLES = Path(__file__).parents[1] / "examples"
SHAPE = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the examples are shell scripts")


def start(script: str, folder: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run a script in `folder` with this interpreter's programs."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    values = {name: str(value) for name, value in variables.items()}
    return subprocess.run(
        ["bash", str(EXAMPLES / script)],
        cwd=folder,
        env={**os.environ, "PATH": programs, "OMP_NUM_THREADS": "1", **values},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_continual_pipeline_ends_with_a_model_of_two_domains(make_text: MakeText, tmp_path: Path) -> None:
    text = make_text(30_000).read_text()
    (tmp_path / "train.txt").write_text(text[:24_000])
    (tmp_path / "valid.txt").write_text(text[24_000:])
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape/config.json").write_text(json.dumps(SHAPE))
    sizes = {"VOCAB": 300, "CONTEXT": 32, "STEPS": 20, "DOMAIN_STEPS": 10, "DOMAIN_BYTES": 30_000}
    done = start("continual_pipeline.sh", tmp_path, TRAIN="train.txt", VALID="valid.txt", MODEL="shape", **sizes)
    assert done.returncode == 0, done.stderr

    output = tmp_path / "runs/continual"
    assert Tokenizer.load(output / "tokenizer").vocab_size == 300
    for run in (output / "general", output / "python-source"):
        assert damage(run / "checkpoints/best") == []
        assert json.loads((run / "metrics.json").read_text())["status"] == "done"
    modules = [ast.parse(code) for code in (output / "python-source.txt").read_text().split("<|endoftext|>")]
    assert len(modules) > 1 and not any(ast.get_docstring(module) for module in modules)

    history = find_history(output / "python-source")
    assert history is not None and history.domains == ["base", "python-source"]
    learnt = history.stages[1]
    assert learnt.steps == 10 and learnt.method["replay"] == 0.05
    assert learnt.after["python-source"].bits_per_byte < learnt.before["python-source"].bits_per_byte
    before, after = learnt.before["base"].bits_per_byte, learnt.after["base"].bits_per_byte
    assert f"{before:.4f}" in done.stdout and f"{after:.4f}" in done.stdout
    assert "* python-source  replay 5 %" in done.stdout and "Backward transfer" in done.stdout


def test_the_continual_pipeline_wants_a_name_for_a_domain_of_yours(tmp_path: Path) -> None:
    refused = start("continual_pipeline.sh", tmp_path, DOMAIN_TEXT="medical.txt")
    assert refused.returncode != 0 and "DOMAIN: name what DOMAIN_TEXT is about" in refused.stderr
    assert list(tmp_path.iterdir()) == []
