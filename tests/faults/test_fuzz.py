"""Damaged and odd files by the thousand: each is refused by one of our errors, soon and in little memory."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from seedbed.adapter import load_adapter
from seedbed.checkpoint import MANIFEST, STATE, damage, newest_intact, read_optimizer, read_state
from seedbed.config import resolve
from seedbed.config.resolve import read_config_file
from seedbed.data import open_whole
from seedbed.device import peak_memory_mb
from seedbed.errors import SeedbedError
from seedbed.model.decoder import Decoder
from seedbed.model.families import read_config
from seedbed.model.gguf import read_gguf
from seedbed.model.weights import load_decoder
from seedbed.parsing import parse_json
from seedbed.runs.diagnose import diagnose
from seedbed.runs.folder import read_records, read_summary
from seedbed.runs.history import read_history_file
from seedbed.sweep.file import read_sweep_file
from seedbed.text.template import Template
from seedbed.text.tokenizer import Tokenizer
from seedbed.train.state import TrainingState
from tests.faults.injection import many
from tests.faults.mutation import damaged, odd_json

TRIES = many(700)  # for each kind of file
SLOWEST = 5.0  # seconds
MOST_MEMORY = 300.0  # MB beyond what was there

Read = Callable[[Path], object]


def read_template(folder: Path) -> object:
    template = Template(Tokenizer.load(folder), "fuzzed", (folder / "chat_template.jinja").read_text(errors="replace"))
    return template.render([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}])


def read_rows(path: Path) -> object:
    source = open_whole(str(path))
    return [len(document) for document in source.documents()]


def read_run(run: Path) -> object:
    return read_summary(run), list(read_records(run / "metrics.jsonl")), diagnose(run)


CHAT = b"""{% for message in messages %}{% if loop.first and message.role == 'system' %}{{ message.content | trim }}
{% else %}<|{{ message['role'] }}|>{{ message.content ~ eos_token }}{% endif %}{% endfor %}
{% macro f(x) %}{{ x }}{% endmacro %}{% set n = namespace(i=0) %}{% set n.i = n.i + 1 %}{{ f(n.i) * 2 }}"""
YAML = b"model: tiny\ndata: text.txt\nlearning_rate: 3e-4\nepochs: 2\nbatch_size: 8\nallow: [warmup]\nlora: false\n"
SWEEP = b"""verb: pretrain
base: {model: tiny, data: text.txt, max_steps: 10}
grid: {learning_rate: [1e-3, 3e-4], batch_size: [4, 8]}
runs: {small: {d_model: 32}, large: {d_model: 64}}
seeds: [1, 2]
"""
ROWS = "\n".join(json.dumps({"question": f"What is {i}?", "answer": f"It is {i}."}) for i in range(12)).encode()
CHATS = json.dumps(
    [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"{i}"}]} for i in range(8)]
).encode()
TEXT = "Ein Text über Bäume.\n\nÜber Bäche auch.\r\n\r\nUnd 木.\n".encode() * 20


@pytest.fixture
def whole(tiny_run: Path, tmp_path: Path) -> Path:
    """A run, with a checkpoint and all that can stand beside one; everything in it is this test's."""
    return lay_out(tiny_run, tmp_path / "run")


def lay_out(tiny_run: Path, run: Path) -> Path:
    """Copy a run and add what else may be there; its checkpoint."""
    shutil.copytree(tiny_run, run)
    folder = run / "checkpoints/step-6"
    extra = {
        "chat_template.jinja": CHAT, "config.yaml": YAML, "sweep.yaml": SWEEP, "rows.jsonl": ROWS, "chats.json": CHATS,
        "text.txt": TEXT,
    }  # fmt: skip
    for name, content in extra.items():
        (folder / name).write_bytes(content)
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none",
               "base_model_name_or_path": "base", "fan_in_fan_out": False, "modules_to_save": None}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "history.json").write_text(json.dumps({"version": 1, "stages": []}))
    write_gguf(folder / "model.gguf")
    return folder


def write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_adapter(path: Path) -> None:
    load_adapter(Decoder(read_config(path.parent)), path.parent)


TARGETS: dict[str, tuple[str, Read]] = {
    "manifest": (MANIFEST, lambda path: (newest_intact(path.parent.parent.parent), damage(path.parent.parent))),
    "state": (STATE, lambda path: TrainingState.from_json(read_state(path.parent.parent))),
    "optimizer": ("seedbed/optimizer.safetensors", lambda path: read_optimizer(path.parent.parent)),
    "weights": ("model.safetensors", lambda path: load_decoder(path.parent)),
    "config.json": ("config.json", lambda path: load_decoder(path.parent)),
    "tokenizer.json": ("tokenizer.json", lambda path: Tokenizer.load(path.parent).encode("Some words, 木.")),
    "tokenizer_config.json": ("tokenizer_config.json", lambda path: Tokenizer.load(path.parent)),
    "chat template": ("chat_template.jinja", lambda path: read_template(path.parent)),
    "adapter_config.json": ("adapter_config.json", read_adapter),
    "history": ("history.json", read_history_file),
    "gguf": ("model.gguf", read_gguf),
    "config": ("config.yaml", lambda path: resolve("scratch", [read_config_file(str(path))])),
    "sweep": ("sweep.yaml", read_sweep_file),
    "rows": ("rows.jsonl", read_rows),
    "conversations": ("chats.json", read_rows),
    "text": ("text.txt", read_rows),
    "metrics": ("../../metrics.jsonl", lambda path: read_run(path.parent)),
    "summary": ("../../metrics.json", lambda path: read_run(path.parent)),
    "events": ("../../events.jsonl", lambda path: read_run(path.parent)),
}  # fmt: skip


def is_json(data: bytes) -> bool:
    with contextlib.suppress(ValueError):
        return isinstance(parse_json(data), dict | list)
    return False


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files_are_refused_by_name(target: str, whole: Path) -> None:
    name, read = TARGETS[target]
    path = whole / name
    before = path.read_bytes() if path.exists() else b'{"event": "resume", "step": 3}\n'
    path.unlink(missing_ok=True)
    fuzz(read, path, before, random.Random(zlib.crc32(target.encode())))


def fuzz(read: Read, path: Path, before: bytes, choose: random.Random) -> None:
    """Read many damaged copies of a file: only our errors, soon, and in little memory."""
    memory = peak_memory_mb_of_cpu()
    for number in range(TRIES):
        change = odd_json if is_json(before) and number % 2 else damaged
        path.write_bytes(data := change(before, choose))
        began = time.monotonic()
        with contextlib.suppress(SeedbedError):
            try:
                read(path)
            except SeedbedError:
                raise
            except BaseException as error:
                raise AssertionError(f"{path.name}, try {number}: {error!r} for {data[:300]!r}") from error
        assert time.monotonic() - began < SLOWEST, (path.name, number, data[:300])
    assert peak_memory_mb_of_cpu() - memory < MOST_MEMORY


def peak_memory_mb_of_cpu() -> float:
    import torch

    return peak_memory_mb(torch.device("cpu"))
