"""The templates for batch systems, with the command in them run for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from seedbed.runs.folder import read_summary
from tests.runs.conftest import TINY
from tests.runs.processes import free_port
from tests.runs.test_distributed import arguments

CLUSTER = Path(__file__).parents[2] / "examples/cluster"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One node of a batch system, as its programs describe it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, does in {
        "srun": 'exec "$@"',
        "scontrol": 'echo "127.0.0.1"',
        "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[1]",
        "PROCESSES_PER_NODE": "2",
        "RDZV_PORT": str(free_port()),
    }


def options(data: Path, run: Path) -> list[str]:
    """A run of two steps."""
    values: dict[str, Any] = {**TINY, "data": data, "output": run, "max_steps": 2}
    return ["pretrain", *arguments(values)]


def test_slurm(environment: dict[str, str], small_text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["bash", str(CLUSTER / "slurm.sh"), *options(small_text_file, run), "--json"]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    assert json.loads(done.stdout)["status"] == "done"  # of one process, whatever the others think
    assert "processes: 2\n" in (run / "config.yaml").read_text()


def test_kubernetes(environment: dict[str, str], small_text_file: Path, tmp_path: Path) -> None:
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    first = f"{job['metadata']['name']}-0.{pod['subdomain']}:{service['spec']['ports'][0]['port']}"
    assert f"--rdzv-endpoint={first}" in container["command"]
    assert f"--nnodes={job['spec']['completions']}" in container["command"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    mounted = {volume["name"] for volume in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    here = {"--nnodes=2": "--nnodes=1", "--nproc-per-node=gpu": "--nproc-per-node=2"}
    here[f"--rdzv-endpoint={first}"] = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    command = [here.get(word, word) for word in container["command"]]
    run = tmp_path / "run"
    subprocess.run([*command, *options(small_text_file, run)], env=environment, check=True)
    assert read_summary(run)["status"] == "done"
