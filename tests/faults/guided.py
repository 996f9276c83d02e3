"""Fuzzing that looks at which lines an input reaches (atheris), over every kind of file that is read.

    pip install atheris
    python -m tests.faults.guided [--seconds 7200] [--targets manifest,rows]

Each kind gets an equal part of the time, in a process of its own. The first input that brings an error which is not one
of ours, or takes more than 5 seconds or 1 GB, is kept under `.fuzz/`, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
KEPT: Final = ROOT / ".fuzz"
TEXT: Final = ROOT / "LICENSE"
LIMITS: Final = ("-timeout=5", "-rss_limit_mb=4096", "-print_final_stats=1")


def fuzz(target: str, seconds: int) -> None:
    """Fuzz one kind of file in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["seedbed"]):
        from seedbed.cli.app import run
        from seedbed.errors import SeedbedError
        from tests.conftest import TINY
        from tests.faults.mutation import damaged, odd_json
        from tests.faults.test_fuzz import TARGETS, is_json, lay_out

    folder = Path(tempfile.mkdtemp())
    steps = ["--max_steps", "6", "--save_every", "3", "--eval_every", "3"]
    assert run(["pretrain", "--data", str(TEXT), "--output", str(folder / "run"), *TINY.split(), *steps]) == 0
    name, read = TARGETS[target]
    path = lay_out(folder / "run", folder / "copy") / name
    before = path.read_bytes() if path.exists() else b'{"event": "resume", "step": 3}\n'
    (folder / "corpus").mkdir()
    (folder / "corpus/whole").write_bytes(before)

    def once(data: bytes) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        with contextlib.suppress(SeedbedError):
            read(path)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        choose = random.Random(seed)
        kind = choose.randrange(3)
        with contextlib.suppress(RecursionError, ValueError):
            if kind == 0 and is_json(data):
                return odd_json(data, choose)[:most]
        return damaged(data, choose)[:most] if kind == 1 else bytes(atheris.Mutate(data, most))

    KEPT.mkdir(exist_ok=True)
    kept = f"-artifact_prefix={KEPT}/{target.replace(' ', '-')}-"
    longest = f"-max_len={max(4096, 2 * len(before))}"
    atheris.Setup(
        [sys.argv[0], *LIMITS, longest, kept, f"-max_total_time={seconds}", str(folder / "corpus")],
        once,
        custom_mutator=mutate,
    )
    atheris.Fuzz()


def fuzz_all(targets: list[str], seconds: int) -> int:
    """Fuzz one kind after another, each in a process of its own; how many brought what must not be."""
    failed = 0
    for target in targets:
        command = [sys.executable, "-m", "tests.faults.guided", "--one", target]
        done = subprocess.run(
            [*command, "--seconds", str(seconds // len(targets))],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        tried = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        reached = re.findall(r"cov: (\d+)", done.stderr)
        sys.stdout.write(f"{target}: {tried[1] if tried else '?'} inputs, {reached[-1] if reached else '?'} places\n")
        if done.returncode:
            failed += 1
            said = (done.stdout + done.stderr).splitlines()
            sys.stdout.writelines(f"{line}\n" for line in said if not line.startswith(("#", "INFO:")))
        sys.stdout.flush()
    return failed


def main() -> None:
    parser: Any = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=7200)
    parser.add_argument("--targets", help="of those in test_fuzz.py; by default all")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        fuzz(flags.one, flags.seconds)
        return
    from tests.faults.test_fuzz import TARGETS

    sys.exit(fuzz_all(flags.targets.split(",") if flags.targets else list(TARGETS), flags.seconds) > 0)


if __name__ == "__main__":
    main()
