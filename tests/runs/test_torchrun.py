"""The real torchrun: it starts the processes again when one dies, and finds those of another host over a network."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seedbed.runs.folder import read_summary
from tests.runs.conftest import events
from tests.runs.processes import free_port
from tests.runs.test_distributed import OPTIONS, Together, arguments, same_curve, wait_until

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LENGTH: dict[str, Any] = {
    "learning_rate": 3e-4,
    "max_steps": 200,
    "epochs": 20,
    "early_stopping_patience": 0,
    "eval_every": 100,
    "save_every": 10,
}
LOST_AFTER = "8"
OVER_TIME = 1e-3  # rounding grows from step to step
HOSTS = {"sbed-a": "10.77.0.1", "sbed-b": "10.77.0.2"}


@pytest.fixture(scope="module")
def alone(small_text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    together = Together(small_text_file, folder / "logs")
    assert together(1, folder / "run", batch_size=8, **LENGTH) == [0]
    return folder / "run"


def training(data: Path, run: Path) -> list[str]:
    """`-m seedbed pretrain` of so many steps of eight rows, by two processes."""
    options = {**OPTIONS, **LENGTH, "batch_size": 4, "data": data, "output": run}
    return ["-m", "seedbed", "pretrain", *arguments(options)]


def children_of(pid: int) -> list[int]:
    """The processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start(data: Path, run: Path, restarts: int = 0) -> subprocess.Popen[str]:
    """torchrun with two processes, in a session of its own, as in a terminal."""
    options = ["--nproc-per-node", "2", "--master-port", str(free_port()), "--max-restarts", str(restarts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SEEDBED_LOST_AFTER": LOST_AFTER}
    command = [*TORCHRUN, *options, *training(data, run)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_ctrl_c_at_torchrun_is_saved_and_goes_on(small_text_file: Path, alone: Path, tmp_path: Path) -> None:
    """A terminal sends it to torchrun alone, whose processes are in sessions of their own; it sends it on."""
    run = tmp_path / "run"
    agent = start(small_text_file, run)
    wait_until(run, 12)
    children = children_of(agent.pid)
    os.killpg(agent.pid, signal.SIGINT)
    _, said = agent.communicate(timeout=60)
    assert agent.returncode, said
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    stopped = read_summary(run)["steps"]
    assert 12 <= stopped < 200, said
    agent = start(small_text_file, run)
    _, said = agent.communicate(timeout=120)
    assert agent.returncode == 0, said
    assert [event["step"] for event in events(run, "resume")] == [stopped]
    same_curve(run, alone, OVER_TIME)


def test_torchrun_starts_again_what_died(small_text_file: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    agent = start(small_text_file, run, restarts=2)
    wait_until(run, 12)
    os.kill(children_of(agent.pid)[1], signal.SIGKILL)
    _, said = agent.communicate(timeout=120)
    assert agent.returncode == 0, said
    assert len(events(run, "resume")) == 1
    same_curve(run, alone, OVER_TIME)


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Two network namespaces with a link between them: the address of each, by its name."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("making networks takes root and the program ip")

    def ip(command: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["ip", *command.split()], check=False, capture_output=True)

    a, b = HOSTS
    if ip(f"netns add {a}").returncode:
        pytest.skip("networks cannot be made here")
    try:
        ip(f"netns add {b}")
        ip("link add sbed-va type veth peer name sbed-vb")
        for name, device in ((a, "sbed-va"), (b, "sbed-vb")):
            ip(f"link set {device} netns {name}")
            ip(f"-n {name} address add {HOSTS[name]}/24 dev {device}")
            ip(f"-n {name} link set {device} up")
            ip(f"-n {name} link set lo up")
        yield HOSTS
    finally:
        for name in HOSTS:
            ip(f"netns delete {name}")


def start_on_hosts(hosts: dict[str, str], data: Path, run: Path, tmp_path: Path) -> list[subprocess.Popen[bytes]]:
    """torchrun on each host, each with a cache of its own; what a host prints goes to `tmp_path/HOST`."""
    a, _ = hosts
    agents = []
    for name, address in hosts.items():
        device = "sbed-va" if name == a else "sbed-vb"
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[a]}:29411", "--rdzv-id", "seedbed"]
        # Names lead to a host everywhere but in a bare namespace.
        rendezvous += ["--rdzv-conf", f"is_host={name == a}"]
        options = ["--nnodes", "2", "--nproc-per-node", "1", "--local-addr", address, *rendezvous]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": device,
            "SEEDBED_LOST_AFTER": LOST_AFTER,
            "SEEDBED_CACHE": str(tmp_path / f"cache-{name}"),
        }
        with (tmp_path / name).open("wb") as log:
            command = ["ip", "netns", "exec", name, *TORCHRUN, *options, *training(data, run)]
            agents.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return agents


def test_two_hosts_over_a_network(hosts: dict[str, str], small_text_file: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    agents = start_on_hosts(hosts, small_text_file, run, tmp_path)
    assert [agent.wait(timeout=120) for agent in agents] == [0, 0], (tmp_path / "sbed-a").read_text()
    same_curve(run, alone, OVER_TIME)
    assert all(list((tmp_path / f"cache-{name}").rglob("*")) for name in hosts)


def test_a_link_that_is_cut_ends_both_sides(
    hosts: dict[str, str], small_text_file: Path, alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    agents = start_on_hosts(hosts, small_text_file, run, tmp_path)
    try:
        wait_until(run, 5)
        assert read_summary(run)["status"] == "running"
        subprocess.run(["ip", "-n", "sbed-a", "link", "set", "sbed-va", "down"], check=True)
        began = time.monotonic()
        logs = [tmp_path / name for name in hosts]
        while not all("error: " in log.read_text(errors="replace") for log in logs):
            assert time.monotonic() - began < 60, [log.read_text() for log in logs]
            time.sleep(0.2)
        assert "process 1 of 2 died, or no longer answers" in logs[0].read_text()
        assert "the connection to the others broke" in logs[1].read_text()
        assert read_summary(run)["status"] == "failed"
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    assert Together(small_text_file, tmp_path / "logs")(2, run, batch_size=4, **LENGTH) == [0, 0]
    same_curve(run, alone, OVER_TIME)
