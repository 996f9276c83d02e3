"""Whole runs in this process: seconds long, on real text, stopped where a test wants."""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from seedbed.config import FLAGS, Config, Layer, resolve
from seedbed.data.python_docs import python_docs
from seedbed.runs.folder import read_records
from seedbed.train import run as running
from seedbed.train.loop import Outcome
from seedbed.train.progress import Display

TINY: dict[str, Any] = {
    "model": "tiny",
    "num_layers": 2,
    "d_model": 32,
    "num_heads": 2,
    "d_ff": 64,
    "max_seq_len": 32,
    "batch_size": 4,
    "vocab_size": 300,
    "precision": "fp32",
    "device": "cpu",
    "tensorboard": False,
    "report": False,
}

TIMINGS = ("elapsed_hours", "remaining_hours", "tokens_per_second", "data_share", "memory_mb")


class StoppingDisplay(Display):
    """Sends this process a real signal once a step has been made."""

    stop_at = 0

    def step(self, step: int, total_steps: int | None, metrics: Any) -> None:
        super().step(step, total_steps, metrics)
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)


RunIt = Callable[..., Outcome]


@pytest.fixture
def run_it(small_text_file: Path, monkeypatch: pytest.MonkeyPatch) -> RunIt:
    """`run_it(output, stop_at=7, epochs=2, ...)`: one sitting of a tiny run; options as the flags have them."""

    def run(output: Path, *, stop_at: int = 0, log: io.StringIO | None = None, **options: Any) -> Outcome:
        values = {"data": str(small_text_file), "output": str(output), **TINY, **options}
        monkeypatch.setattr(StoppingDisplay, "stop_at", stop_at)
        monkeypatch.setattr(running, "Display", StoppingDisplay)
        config = resolve("scratch", [Layer(FLAGS, {name: v for name, v in values.items() if v is not None})])
        return running.run_training(config, Console(file=log or io.StringIO(), width=200))

    return run


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run without what a clock had a hand in."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The saved state of training without the clock's part."""
    state: dict[str, Any] = json.loads((checkpoint / "seedbed" / "state.json").read_text())
    return {k: v for k, v in state.items() if k not in ("seconds", "records")}


def same_weights(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same bytes of weights and of optimizer."""
    files = ("model.safetensors", "seedbed/optimizer.safetensors")
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in files)


def same_run(a: Path, b: Path) -> None:
    """Require that two finished runs hold the same in everything but the time they took."""
    assert same_weights(a / "checkpoints/final", b / "checkpoints/final")
    assert same_weights(a / "checkpoints/best", b / "checkpoints/best")
    assert read_state(a / "checkpoints/final") == read_state(b / "checkpoints/final")
    assert read_metrics(a) == read_metrics(b)
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind that a run recorded, in order."""
    return [event for event in read_records(run / "events.jsonl") if event["event"] == kind]


# Fine-tuning

TUNING: dict[str, Any] = {
    "max_seq_len": 192,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "max_steps": 3,
    "precision": "fp32",
    "device": "cpu",
    "tensorboard": False,
    "report": False,
}

ROWS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "text": lambda question, answer: {"text": f"{question} {answer}"},
    "alpaca": lambda question, answer: {"instruction": question, "input": "", "output": answer},
    "qa": lambda question, answer: {"question": question, "answer": answer},
    "completion": lambda question, answer: {"prompt": f"{question} ", "completion": answer},
    "chat": lambda question, answer: {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] * 2
    },
}
"""A question and its answer as a row of each format."""


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`questions("qa")`: forty questions whose answers differ in length, in a file of that format."""
    folder = tmp_path_factory.mktemp("questions")

    def write(format: str) -> Path:
        path = folder / f"{format}.json"
        if not path.exists():
            pairs = [
                (f"Count from {i} to {i + i % 7}.", " ".join(map(str, range(i, i + i % 7 + 1)))) for i in range(40)
            ]
            path.write_text(json.dumps([ROWS[format](*pair) for pair in pairs]), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory, small_text_file: Path) -> Callable[[str], Path]:
    """`pretrained("llama")`: a checkpoint to fine-tune, of a run of some steps. Llama's head is its own."""
    folder = tmp_path_factory.mktemp("pretrained")

    def train(arch: str) -> Path:
        run = folder / arch
        if not run.exists():
            longer = {"max_seq_len": 192, "vocab_size": 400, "max_steps": 30, "learning_rate": 1e-2, "eval_every": 30}
            options = {**TINY, **longer, "arch": arch, "tie_embeddings": arch == "gpt2"}
            values = {"data": str(small_text_file), "output": str(run), **options}
            running.run_training(resolve("scratch", [Layer(FLAGS, values)]), Console(quiet=True))
        return run / "checkpoints/best"

    return train


@pytest.fixture
def tune_it(
    pretrained: Callable[[str], Path], questions: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> RunIt:
    """`tune_it(output, data="alpaca", lora=True, ...)`: one sitting of fine-tuning; by default a Llama, on `qa`."""

    def tune(
        output: Path, *, data: str = "qa", stop_at: int = 0, log: io.StringIO | None = None, **options: Any
    ) -> Outcome:
        values = {"data": data, "model": "llama", "output": str(output), **TUNING, **options}
        if data in ROWS:
            values["data"] = str(questions(data))
        if values["model"] in ("llama", "gpt2"):
            values["model"] = str(pretrained(values["model"]))
        monkeypatch.setattr(StoppingDisplay, "stop_at", stop_at)
        monkeypatch.setattr(running, "Display", StoppingDisplay)
        config = resolve("finetune", [Layer(FLAGS, {name: v for name, v in values.items() if v is not None})])
        return running.run_training(config, Console(file=log or io.StringIO(), width=200))

    return tune


# Continual adaptation

KEEPING: dict[str, Any] = {
    "max_seq_len": 64,
    "batch_size": 4,
    "max_steps": 4,
    "precision": "fp32",
    "device": "cpu",
    "tensorboard": False,
    "report": False,
}


@pytest.fixture(scope="session")
def domain_text(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`domain_text("code")`: twelve kilobytes of real Python without its docstrings, little like what models are
    pretrained on here; `"docs"`: as much of the documentation that they did not see."""
    folder = tmp_path_factory.mktemp("domains")

    def documents(name: str) -> list[str]:
        if name == "docs":
            return list(python_docs()[::-1])
        tree = ast.parse(inspect.getsource(argparse))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        return [ast.unparse(node) for node in tree.body]

    def write(name: str) -> Path:
        path = folder / f"{name}.txt"
        if not path.exists():
            text = "\n\n".join(documents(name)).encode()[:12_000].decode(errors="ignore")
            path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def keeping(
    pretrained: Callable[[str], Path], questions: Callable[[str], Path], domain_text: Callable[[str], Path]
) -> Callable[..., Config]:
    """`keeping(output, data="code", model=..., replay=0.1)`: the config of `continue`, by default from a Llama."""

    def make(output: Path, *, data: str = "code", **options: Any) -> Config:
        values = {"data": data, "domain": data, "model": "llama", "output": str(output), **KEEPING, **options}
        if data in ("code", "docs", *ROWS):
            values["data"] = str(domain_text(data) if data in ("code", "docs") else questions(data))
        if values["model"] in ("llama", "gpt2"):
            values["model"] = str(pretrained(values["model"]))
        return resolve("continue", [Layer(FLAGS, {name: v for name, v in values.items() if v is not None})])

    return make


@pytest.fixture
def keep_it(keeping: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> RunIt:
    """`keep_it(output, data="code", stop_at=2, ...)`: one sitting of `continue`."""

    def keep(output: Path, *, stop_at: int = 0, log: io.StringIO | None = None, **options: Any) -> Outcome:
        monkeypatch.setattr(StoppingDisplay, "stop_at", stop_at)
        monkeypatch.setattr(running, "Display", StoppingDisplay)
        return running.run_training(keeping(output, **options), Console(file=log or io.StringIO(), width=200))

    return keep
