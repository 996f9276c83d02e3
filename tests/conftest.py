"""What all tests share: a cache of their own, one thread, a real text, and the flags of a run of seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it once, when it is first imported

MakeText = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tokenized texts go to a temporary folder, never to the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEEDBED_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Several workers share the cores. Most tests need no torch and must not import it for this."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_text(tmp_path_factory: pytest.TempPathFactory) -> MakeText:
    """`make_text(num_bytes)`: a file of about so much real English, its documents between blank lines."""
    from seedbed.data.python_docs import python_docs

    made: dict[int, Path] = {}

    def make(num_bytes: int) -> Path:
        if num_bytes not in made:
            parts: list[str] = []
            size = 0
            for document in python_docs():
                parts.append(document)
                size += len(document.encode()) + 2
                if size >= num_bytes:
                    break
            text = "\n\n".join(parts).encode()[:num_bytes].decode(errors="ignore")
            made[num_bytes] = tmp_path_factory.mktemp("text") / f"docs-{num_bytes}.txt"
            made[num_bytes].write_text(text, encoding="utf-8")
        return made[num_bytes]

    return make


@pytest.fixture(scope="session")
def text_file(make_text: MakeText) -> Path:
    """A few hundred kilobytes of real English."""
    return make_text(300_000)


@pytest.fixture(scope="session")
def small_text_file(make_text: MakeText) -> Path:
    """Enough text for a few dozen steps of a tiny model, and little to validate on."""
    return make_text(20_000)


TINY = (
    "--model tiny --num_layers 2 --d_model 32 --num_heads 2 --d_ff 64 --max_seq_len 32 --batch_size 4 "
    "--vocab_size 300 --precision fp32 --device cpu --no_tensorboard --no_report"
)


@pytest.fixture
def tiny_flags() -> list[str]:
    """Flags of a run whose steps take milliseconds; add --data, --output and a number of steps or epochs."""
    return TINY.split()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, small_text_file: Path) -> Path:
    """A finished run of six steps, with checkpoints best, step-3, step-6 and final. To be read, not changed."""
    from seedbed.cli.app import run

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    steps = ["--max_steps", "6", "--save_every", "3", "--eval_every", "3"]
    assert run(["pretrain", "--data", str(small_text_file), "--output", str(folder), *TINY.split(), *steps]) == 0
    return folder
