"""What the benchmark scripts share: commands in processes of their own, the machine, tables put into a page."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from seedbed.train.loop import TIME_LIMIT_EXIT_CODE


def command(words: str) -> dict[str, Any]:
    """Run one `seedbed` command, to its end or to that of its hours, and read what it prints as JSON."""
    sys.stderr.write(f"seedbed {words}\n")
    done = subprocess.run(
        [sys.executable, "-m", "seedbed", *shlex.split(words), "--json"], capture_output=True, text=True
    )
    if done.returncode not in (0, TIME_LIMIT_EXIT_CODE):
        sys.exit(done.stderr)
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def put_between(page: Path, begin: str, tables: str, end: str) -> None:
    """Replace what stands between two marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{tables}\n{end}{after}", encoding="utf-8")
