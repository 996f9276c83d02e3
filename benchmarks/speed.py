"""seedbed and its peers on the same work, side by side in one sitting.

    python benchmarks/speed.py --peers .peers/bin/python --starter FOLDER --data TEXTS [--nanogpt CHECKOUT]
        [--jobs gpt2-124m,char,...] [--repeats 5]

The contenders of a job run one after the other, each a process of its own, and again from the first, `--repeats` times.
TEXTS is a folder with tinyshakespeare.txt, instruction-1100.json and gpt2-tokenizer/; FOLDER holds the model
SmolLM2-135M-Instruct (`tests/starter.py`); the peers are pinned in `benchmarks/peers/requirements.txt`. Figures go to
`benchmarks/results/speed.json` after every round, tables into `docs/performance.md`. Jobs that are not named keep
theirs. All of them take about two hours on two idle cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Final

from commands import machine, put_between
from contenders import JOBS, Contender, Job, Place, prepare
from equality import EQUALITY, compare_losses
from machine import PeakMemory, capabilities
from speed_table import summary, tables

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = ROOT / "benchmarks" / "results" / "speed.json"
PAGE: Final = ROOT / "docs" / "performance.md"
README: Final = ROOT / "README.md"
MOST_SECONDS: Final = 900


def measure(contender: Contender) -> dict[str, Any]:
    """Run a contender to its end: what it printed, its peak memory, and how long it took; or why it failed."""
    began = time.time()
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as said:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "SEEDBED_CACHE": cache}
        process = subprocess.Popen(
            contender.command, stdout=said, stderr=said, env=environment, start_new_session=True, text=True
        )
        with PeakMemory(process.pid) as memory:
            status = wait(process)
        said.seek(0)
        lines = said.read().splitlines()
    if status:
        return {"error": "\n".join(lines[-12:])}
    facts: dict[str, Any] = json.loads(next(line for line in reversed(lines) if line.startswith('{"speed"')))
    if at := facts.pop("first_step_at", None):
        facts["first_step_seconds"] = round(at - began, 2)
    return {**facts, "peak_memory_mb": round(memory.bytes / 2**20), "seconds": round(time.time() - began, 1)}


def wait(process: subprocess.Popen[str]) -> int:
    """Wait for a process, but not for ever, and leave nothing of it behind."""
    try:
        return process.wait(MOST_SECONDS)
    except subprocess.TimeoutExpired:
        return 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def peer_versions(python: Path, nanogpt: Path | None) -> dict[str, str]:
    """Versions of what stands in `requirements.txt`, and nanoGPT's commit."""
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    installed = {package["name"].lower(): package["version"] for package in json.loads(listed.stdout)}
    pinned = (ROOT / "benchmarks" / "peers" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [line.partition("==")[0] for line in pinned if "==" in line]
    versions = {name: installed.get(name, "absent") for name in names}
    return versions if nanogpt is None else {**versions, "nanoGPT": commit(nanogpt)}


def commit(checkout: Path) -> str:
    """Which nanoGPT it is, if its history is there to tell."""
    if not (checkout / ".git").exists():
        return "a checkout without its history"
    found = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def run_job(job: Job, repeats: int, block: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    """Measure the contenders of a job in turn; what there is so far is saved after every round."""
    runs: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in job.contenders}
    peers = {contender.name: contender.is_peer for contender in job.contenders}
    for number in range(1, repeats + 1):
        for contender in job.contenders:
            sys.stderr.write(f"{number}/{repeats} {contender.name}\n")
            runs[contender.name].append(measure(contender))
        contenders = {name: {"is_peer": peers[name], "runs": found} for name, found in runs.items()}
        save({**block, "title": job.title, "unit": job.unit, "contenders": contenders})


def write(results: dict[str, Any]) -> None:
    """Figures and pages, jobs in their order."""
    results = {name: results[name] for name in [*JOBS, EQUALITY] if name in results}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for page, figures in ((PAGE, tables(results)), (README, summary(results))):
        put_between(page, "<!-- figures -->", figures, "<!-- end of figures -->")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="the Python of the peers' environment")
    parser.add_argument("--starter", type=Path, required=True, help="a transformers folder of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="a folder of texts")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT; it is left out without one")
    parser.add_argument("--jobs", default=",".join([*JOBS, EQUALITY]), help="a comma list")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(words)
    options.jobs = options.jobs.split(",")
    if unknown := set(options.jobs) - {*JOBS, EQUALITY}:
        parser.error(f"no such job: {', '.join(sorted(unknown))}; there are {', '.join([*JOBS, EQUALITY])}")
    return options


def main() -> None:
    """Measure what was asked for; keep the rest as it was."""
    options = parse()
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    block = {"date": str(date.today()), "machine": machine() | capabilities()}
    block["peers"] = peer_versions(options.peers, options.nanogpt)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SEEDBED_CACHE"] = folder
        nanogpt = options.nanogpt and options.nanogpt.resolve()
        peers = options.peers.absolute()  # a link that must not be followed: it tells Python its environment
        place = Place(peers, options.starter.resolve(), options.data.resolve(), nanogpt, Path(folder))
        prepare(place, options.jobs)
        for name in options.jobs:

            def save(found: dict[str, Any], name: str = name) -> None:
                results[name] = found
                write(results)

            if name == EQUALITY:
                save({**block, "runs": compare_losses(place)})
            else:
                run_job(JOBS[name](place), options.repeats, block, save)


if __name__ == "__main__":
    main()
