"""Limits on memory that somebody else set: they count as what the machine has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from seedbed.train.estimate.footprint import _left_of_groups

CHILD = """
import resource, sys
import torch
from pathlib import Path
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(sys.argv[1]),) * 2)
from seedbed.cli.app import main
main(sys.argv[2:])
"""
LARGE = "--arch llama --num_layers 12 --d_model 768 --num_heads 12 --max_seq_len 64 --batch_size 4 --vocab_size 300"


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_limit_of_addresses_is_kept_to(small_text_file: Path, tmp_path: Path) -> None:
    """85 million weights and their optimizer do not fit into a gigabyte; refused before anything is written."""
    words = ["pretrain", "--data", str(small_text_file), "--model", "tiny", *LARGE.split(), "--max_steps", "1"]
    words += ["--output", str(tmp_path / "run"), "--no_tensorboard", "--device", "cpu", "--precision", "fp32"]
    child = subprocess.run([sys.executable, "-c", CHILD, str(2**30), *words], capture_output=True, text=True)
    assert child.returncode == 7, child.stderr
    assert "needs about" in child.stderr and "--allow memory" in child.stderr
    assert not (tmp_path / "run").exists()


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_dot_", ".")).write_text(content)


def test_the_smallest_limit_of_all_groups_counts(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    stat = "anon 5\ninactive_file 1000\nactive_file 7\n"
    group(root / "slice", memory_dot_max="10000\n", memory_dot_current="4000\n", memory_dot_stat=stat)
    group(root / "slice/job", memory_dot_max="max\n", memory_dot_current="3000\n", memory_dot_stat=stat)
    own = tmp_path / "own"
    own.write_text("0::/slice/job\n")
    assert list(_left_of_groups(root, own)) == [7000.0]


def test_groups_of_the_first_version(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    files = {
        "memory_dot_limit_in_bytes": "10000",
        "memory_dot_usage_in_bytes": "4000",
        "memory_dot_stat": "cache 3\ntotal_inactive_file 500\n",
    }
    group(root / "memory/docker/x", **files)
    own = tmp_path / "own"
    own.write_text("11:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n")
    assert list(_left_of_groups(root, own)) == [6500.0]


def test_no_groups_at_all(tmp_path: Path) -> None:
    assert list(_left_of_groups(tmp_path, tmp_path / "missing")) == []
