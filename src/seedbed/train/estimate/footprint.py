"""The memory that a step takes, by what it is for, and how that grows with the rows of a micro-batch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from seedbed.device import peak_memory_mb
from seedbed.errors import ConfigError
from seedbed.model.config import DecoderConfig

MIB = 2**20
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([mgt])(?:i?b)?", re.IGNORECASE)
LARGEST_BATCH = 2**16
CODE_BYTES = 30 * MIB
"""Of the libraries and their buffers, what only the whole of a step on a CPU brings into memory."""
UNUSED = 0.2
"""Of what comes and goes in a step, the share that a CPU's allocator holds beyond it."""
SCATTERED = 3.0
"""How often it holds what a block's backward pass needs, whose tensors come and go in sizes that do not fit."""


@dataclass(frozen=True)
class Footprint:
    """Bytes; those of `row_...` for each row of a micro-batch.

    Activations grow while the gradients of the step are not there yet, and shrink while these come. So the peak is
    that of the worst moment, and less than all parts together.
    """

    program: float
    """The process itself, on a CPU; a GPU's allocator knows nothing of it."""
    weights: float
    """With the old ones that anchors hold on to."""
    gradients: float
    optimizer: float
    cache: float
    """Copies of weights in the type of the products."""
    row_activations: float
    row_working: float
    """What a block's backward pass needs beyond them, as often as the allocator holds it."""
    row_tokens: int
    vocab_size: int
    chunk_tokens: int
    """The most tokens that have their logits at once."""
    logit_bytes: int
    """Of each of these, with what is made of it on the way."""
    head: float
    """The head's gradient, which is there before all others; with a tied head, beside that of the embedding."""
    accumulates: bool
    """Gradients of earlier micro-batches stand beside all that."""
    updating: float
    """What the optimizer needs while it updates the largest parameter."""
    loading: float
    """Weights in float32 and the files that they are read from."""
    saving: float
    """A copy of the weights, in the order of the file."""
    writing: float
    """A copy of the weights laid out to write samples, in the type of the products."""
    beside: float = 0.0
    """What is copied to be written beside training."""
    unused: float = 0.0
    """The allocator's share of what comes and goes."""

    def logits(self, rows: int) -> float:
        """Those of a chunk."""
        return float(self.logit_bytes * min(rows * self.row_tokens, self.chunk_tokens) * self.vocab_size)

    def activations(self, rows: int) -> float:
        return rows * self.row_activations

    def peak(self, rows: int) -> float:
        """The most bytes at any moment, with so many rows in a micro-batch."""
        earlier = self.gradients if self.accumulates else 0.0
        forward = earlier + self.activations(rows) + self.cache + self.logits(rows) + self.head
        backward = earlier + self.activations(rows) + self.cache + rows * self.row_working + self.head
        end = self.gradients + self.head + rows * self.row_working
        if self.updating:  # a CPU's allocator has not given back yet what the backward pass freed
            end = self.gradients + self.activations(rows) + self.cache + self.updating
        moving = max(forward, backward, end) * (1 + self.unused)
        step = self.weights + self.optimizer + moving
        saving = self.saving + self.beside
        training = step + saving if self.beside else step
        between = self.weights + self.optimizer + max(saving, self.writing)
        return self.program + max(training, self.loading, between)

    def sharded(self, processes: int, block: float, ends: float) -> Footprint:
        """That of one of several processes among which the model is sharded, with what it gathers to use it.

        Args:
            processes: how many.
            block: bytes of the largest block's weights, of which two are gathered at once.
            ends: bytes of what is around the blocks.
        """
        return replace(
            self,
            weights=self.weights / processes + 2 * block + ends,
            gradients=self.gradients / processes + block + ends,
            optimizer=self.optimizer / processes,
            cache=0.0,
            saving=self.saving + self.weights,  # in the first process
            writing=0.0,
        )

    def parts_mb(self, rows: int) -> dict[str, float]:
        """Each part and the peak, in MB of 2^20 bytes."""
        parts = {
            "program": self.program,
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations(rows),
            "logits": self.logits(rows),
            "cache": self.cache,
            "peak": self.peak(rows),
        }
        return {name: round(size / MIB, 1) for name, size in parts.items()}

    def largest_batch(self, limit: float) -> int:
        """The most rows whose peak is within `limit` bytes; 0 when not even one is."""
        low, high = 0, LARGEST_BATCH
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.peak(middle) <= limit else (low, middle - 1)
        return low

    def savings(self, shape: DecoderConfig, *, lora: int | None) -> dict[str, float]:
        """Bytes that the peak of one row falls by, for each option that helps; `lora` weights would adapters train."""
        residual = 4 * self.row_tokens * shape.d_model
        layer = self.row_activations / shape.num_layers
        changed = {
            "--gradient_checkpointing": replace(
                self, row_activations=shape.num_layers * residual, row_working=self.row_working + layer
            ),
            "--optimizer adamw8bit": replace(self, optimizer=min(self.optimizer, self.gradients / 2)),
            f"--max_seq_len {self.row_tokens // 2}": replace(
                self,
                row_activations=self.row_activations / 2,
                row_working=self.row_working / 2,
                row_tokens=self.row_tokens // 2,
            ),
        }
        if lora is not None:
            changed["--lora"] = replace(self, gradients=4.0 * lora, optimizer=8.0 * lora, head=0.0, saving=0.0)
        saved = {option: self.peak(1) - footprint.peak(1) for option, footprint in changed.items()}
        return {option: size for option, size in saved.items() if size > MIB}


def parse_size(text: str) -> float:
    """Bytes of a size such as 8GB, 8GiB, 512MB or 8g; a GB has 2^30 bytes, as in everything that is shown.

    Raises:
        ConfigError: anything else.
    """
    match = SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise ConfigError(f"--memory_limit {text}: expected a size such as 8GB, 8GiB or 512MB")
    return float(match[1]) * {"m": 2.0**20, "g": 2.0**30, "t": 2.0**40}[match[2].lower()]


def resident_bytes() -> float:
    """What this process has in memory, freed memory given back; where the system does not say, the most it had."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's
    pages = Path("/proc/self/statm")
    if pages.exists():
        return float(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory_mb(torch.device("cpu")) * MIB


def free_bytes(device: torch.device) -> float | None:
    """What this process may still take: of the GPU, or of the machine and every limit set on it; None where unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or sys.platform != "linux":
        return None
    found = [*_left_of_machine(), *_left_of_groups(), *_left_of_addresses()]
    return min(found) if found else None


def _left_of_machine() -> Iterator[float]:
    with contextlib.suppress(OSError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        yield from (float(kib) * 1024 for kib in re.findall(r"^MemAvailable:\s+(\d+) kB", text, flags=re.MULTILINE))


def _left_of_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """Of the control groups that the process is in (containers, batch systems, systemd's slices)."""
    with contextlib.suppress(OSError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            base = root / "memory" if controllers else root
            names = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
            )
            group = base / path.lstrip("/")
            for folder in [group, *group.parents]:
                yield from _left_of_group(folder, *names)
                if folder == base:
                    break


def _left_of_group(folder: Path, limit: str, used: str) -> Iterator[float]:
    """The page cache counts as used, but is given up first."""
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        most, now = (float((folder / name).read_text(encoding="ascii")) for name in (limit, used))
        stat = (folder / "memory.stat").read_text(encoding="ascii")
        cached = re.search(r"^(?:total_)?inactive_file (\d+)", stat, flags=re.MULTILINE)
        yield most - now + (float(cached[1]) if cached else 0.0)


def _left_of_addresses() -> Iterator[float]:
    """Of `ulimit -v`."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
        yield limit - float(pages) * os.sysconf("SC_PAGE_SIZE")
