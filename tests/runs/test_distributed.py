"""Several processes on one run: the same curve as one, the same decisions, and an end with a cause when one fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from seedbed import checkpoint, distributed
from seedbed.cli import app
from seedbed.config import FLAGS, Layer, resolve
from seedbed.errors import ConfigError
from seedbed.generate import generate
from seedbed.runs.folder import read_records, read_summary
from seedbed.train import loop, saving, step
from seedbed.train.build import pick_strategy
from seedbed.train.spikes import RecentLosses, Usual
from tests.runs.conftest import KEEPING, TINY, events
from tests.runs.processes import start_together, wait_for

OPTIONS: dict[str, Any] = {**TINY, "eval_every": 4, "save_every": 4, "max_steps": 10, "learning_rate": 3e-3}
EQUAL = 1e-5  # nats, and of the gradient's norm, in float32: what another order of sums may make


def arguments(options: dict[str, Any]) -> list[str]:
    """The options as flags."""
    flags = []
    for name, value in options.items():
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no_'}{name}")
        else:
            flags += [f"--{name}", str(value)]
    return flags


class Together:
    """`together(2, output, parallel="fsdp")`: one sitting of a run by so many processes; their exit codes."""

    def __init__(self, data: Path, logs: Path) -> None:
        self.data, self.logs = data, logs

    def __call__(self, size: int, output: Path, verb: str = "pretrain", **more: Any) -> list[int]:
        return wait_for(self.start(size, output, verb, **more))

    def start(self, size: int, output: Path, verb: str = "pretrain", **more: Any) -> list[int]:
        """Their process ids."""
        begun = OPTIONS if verb == "pretrain" else {}
        options = {**begun, "data": self.data, "output": output, **more}
        command = [verb, *arguments(options)]
        return start_together(size, lambda _rank: app.run(command), self.logs)

    def said(self, rank: int) -> str:
        """What a process of the last sitting printed."""
        return (self.logs / str(rank)).read_text()


@pytest.fixture
def together(small_text_file: Path, tmp_path: Path) -> Together:
    return Together(small_text_file, tmp_path / "logs")


@pytest.fixture(scope="module")
def alone(small_text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that takes eight rows at once."""
    folder = tmp_path_factory.mktemp("alone")
    assert Together(small_text_file, folder / "logs")(1, folder / "run", batch_size=8) == [0]
    return folder / "run"


def curve(run: Path) -> dict[tuple[int, str], float]:
    """Losses, norms and counted tokens of a run by step."""
    names = ("train_loss", "val_loss", "grad_norm", "tokens")
    records = read_records(run / "metrics.jsonl")
    return {(r["step"], name): r[name] for r in records for name in names if name in r}


def samples(run: Path) -> list[str]:
    """What the model wrote at each validation."""
    return [record["text"] for record in read_records(run / "samples.jsonl")]


def same_curve(run: Path, other: Path, tolerance: float = EQUAL) -> None:
    """Require that two runs learnt the same."""
    assert curve(run) == pytest.approx(curve(other), abs=tolerance)
    assert read_summary(run)["status"] == read_summary(other)["status"]


SHARED = [
    (2, {"batch_size": 4, "parallel": "ddp"}),
    (2, {"batch_size": 2, "grad_accumulation": 2, "parallel": "fsdp"}),
    (4, {"batch_size": 2, "parallel": "ddp"}),
    (4, {"batch_size": 2, "parallel": "fsdp", "gradient_checkpointing": True}),
    (3, {"batch_size": 8, "processes": 1}),  # 3, 3 and 2 rows
]


@pytest.mark.parametrize(("size", "options"), SHARED)
def test_the_same_curve_however_many_processes(
    together: Together, alone: Path, tmp_path: Path, size: int, options: dict[str, Any]
) -> None:
    assert together(size, tmp_path / "run", **options) == [0] * size
    same_curve(tmp_path / "run", alone)
    assert samples(tmp_path / "run") == samples(alone)
    assert not any(together.said(rank) for rank in range(1, size))


def test_a_step_whose_loss_jumps_is_looked_at_by_all(
    together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def jumps_at_five(_self: object, step: int, _loss: float, *, taken: bool = True) -> Usual | None:
        return Usual(1.0, 0.1) if step == 5 and taken else None

    monkeypatch.setattr(RecentLosses, "add", jumps_at_five)
    found = []
    for size, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        run = tmp_path / f"{size}-{parallel}"
        assert together(size, run, batch_size=8 // size, parallel=parallel) == [0] * size
        [event] = events(run, "loss_spike")
        found.append({row["row"]: row["loss"] for row in event["worst_rows"]} | {"again": event["again_loss"]})
    assert found[1] == pytest.approx(found[0], abs=2e-4)
    assert found[2] == pytest.approx(found[0], abs=2e-4)


def test_a_run_goes_on_with_other_numbers_of_processes(together: Together, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options: dict[str, Any] = {"batch_size": 2}
    assert together(4, run, parallel="fsdp", stop_at_step=3, **options) == [75] * 4
    assert together(2, run, parallel="ddp", stop_at_step=5, **options) == [75] * 2
    assert together(1, run, stop_at_step=6, **options) == [75]
    assert together(2, run, parallel="fsdp", stop_at_step=8, **options) == [75] * 2
    assert together(4, run, parallel="ddp", **options) == [0] * 4
    same_curve(run, alone)
    assert [event["step"] for event in events(run, "resume")] == [3, 5, 6, 8]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_instructions_with_an_adapter(
    together: Together,
    pretrained: Callable[[str], Path],
    questions: Callable[[str], Path],
    tmp_path: Path,
    parallel: str,
) -> None:
    options: dict[str, Any] = {
        "model": pretrained("llama"),
        "lora": True,
        "max_seq_len": 192,
        "max_steps": 4,
        "eval_every": 2,
        "precision": "fp32",
        "device": "cpu",
        "learning_rate": 1e-3,
        "tensorboard": False,
        "report": False,
        "data": questions("qa"),
    }
    assert together(1, tmp_path / "one", "finetune", batch_size=4, **options) == [0]
    assert together(2, tmp_path / "two", "finetune", batch_size=2, parallel=parallel, **options) == [0, 0]
    same_curve(tmp_path / "two", tmp_path / "one")
    assert checkpoint.load_model(tmp_path / "two")[0].adapter


@pytest.mark.parametrize("method", ["replay,l2_sp,interpolate", "ewc,kl", "self_replay"])
def test_a_domain_is_added(
    together: Together,
    pretrained: Callable[[str], Path],
    domain_text: Callable[[str], Path],
    tmp_path: Path,
    method: str,
) -> None:
    options: dict[str, Any] = {
        "model": pretrained("llama"),
        "data": domain_text("code"),
        "domain": "code",
        "general_data": domain_text("docs"),
        "method": method,
        **KEEPING,
    }
    one, two = tmp_path / "one", tmp_path / "two"
    assert together(1, one, "continue", **{**options, "batch_size": 8}) == [0]
    assert together(2, two, "continue", **options, stop_at_step=2) == [75, 75]
    assert together(2, two, "continue", **options) == [0, 0]
    same_curve(two, one)
    domains, expected = (read_summary(run)["domains"] for run in (two, one))
    assert domains.keys() == expected.keys() == {"base", "code"}
    for name in domains:
        assert domains[name]["after"] == pytest.approx(expected[name]["after"], abs=EQUAL)
    assert checkpoint.damage(two / "checkpoints/final") == []
    assert not list(two.rglob("*.tmp"))


def test_half_precision_and_whole_matrices(together: Together, tmp_path: Path) -> None:
    """bf16 rounds differently with other sums; the curves stay together all the same."""
    for parallel, optimizer in (("ddp", "muon"), ("fsdp", "adamw")):
        options: dict[str, Any] = {"precision": "bf16", "optimizer": optimizer}
        one, two = tmp_path / f"{parallel}-1", tmp_path / f"{parallel}-2"
        assert together(1, one, batch_size=8, **options) == [0]
        assert together(2, two, batch_size=4, parallel=parallel, **options) == [0, 0]
        losses = [[value for (_, name), value in curve(run).items() if name == "val_loss"] for run in (one, two)]
        assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_a_sharded_run_may_validate_before_its_first_step(together: Together, tmp_path: Path) -> None:
    """The first pass of a sitting puts the weights together that later steps train."""
    assert together(2, tmp_path / "a", parallel="fsdp", stop_at_step=5, eval_every=9) == [75, 75]
    checkpoint = tmp_path / "a/checkpoints/time-limit"
    assert together(2, tmp_path / "b", parallel="fsdp", resume_from=checkpoint, eval_every=5) == [0, 0]
    assert read_summary(tmp_path / "b")["steps"] == 10


def test_adapters_on_four_bits(
    together: Together, pretrained: Callable[[str], Path], questions: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    options = {"model": pretrained("llama"), "data": questions("qa"), "lora": True, "base_precision": "nf4"}
    options |= {"max_seq_len": 192, "max_steps": 2, "precision": "fp32", "device": "cpu", "tensorboard": False}
    assert together(1, tmp_path / "one", "finetune", batch_size=4, **options) == [0]
    assert together(2, tmp_path / "two", "finetune", batch_size=2, parallel="ddp", **options) == [0, 0]
    same_curve(tmp_path / "two", tmp_path / "one")


def test_half_precision_without_scaling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without bf16 takes fp16 by itself, and FSDP has no scaling of the loss."""
    monkeypatch.setattr(distributed, "size", lambda: 2)
    for parallel, expected in (("ddp", "ddp"), ("auto", "ddp")):
        config = resolve("scratch", [Layer(FLAGS, {"parallel": parallel})])
        assert pick_strategy(config, torch.device("cuda"), "fp16") == expected
    with pytest.raises(ConfigError, match="--parallel fsdp: cuda takes fp16"):
        pick_strategy(resolve("scratch", [Layer(FLAGS, {"parallel": "fsdp"})]), torch.device("cuda"), "fp16")


def test_all_stop_early_together(together: Together, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 400,
        "early_stopping_patience": 1,
        "learning_rate": 0.3,
        "min_lr": 0.3,
        "batch_size": 16,
    }
    assert together(2, tmp_path / "run", **options) == [0, 0]
    assert read_summary(tmp_path / "run")["status"] == "early_stopped"


def wait_until(run: Path, step: int) -> None:
    """Until a run has recorded a step."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(record["step"] >= step for record in read_records(run / "metrics.jsonl")):
            return
        time.sleep(0.01)
    raise AssertionError("it did not get that far")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_signal_to_one_is_heard_by_all(together: Together, alone: Path, tmp_path: Path, parallel: str) -> None:
    run = tmp_path / "run"
    options: dict[str, Any] = {"batch_size": 4, "parallel": parallel}
    pids = together.start(2, run, **options)
    wait_until(run, 2)
    os.kill(pids[1], signal.SIGTERM)
    assert wait_for(pids) == [143, 143]
    assert read_summary(run)["status"] == "interrupted"
    assert together(2, run, **options) == [0, 0]
    same_curve(run, alone)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_when_one_is_killed_the_others_end_and_say_so(
    together: Together, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: str
) -> None:
    monkeypatch.setattr(distributed, "PATIENCE", 1.0)
    run = tmp_path / "run"
    options: dict[str, Any] = {"batch_size": 4, "parallel": parallel}
    pids = together.start(2, run, **options)
    wait_until(run, 5)
    os.kill(pids[1], signal.SIGKILL)
    assert wait_for(pids) == [1, -signal.SIGKILL]
    assert "process 1 of 2 died" in together.said(0)
    assert together(2, run, **options) == [0, 0]
    same_curve(run, alone)


def test_when_one_hangs_the_others_end(together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "LOST_AFTER", 3.0)
    monkeypatch.setattr(distributed, "PATIENCE", 1.0)
    run = tmp_path / "run"
    pids = together.start(2, run, max_steps=100)
    wait_until(run, 2)
    os.kill(pids[1], signal.SIGSTOP)
    began = time.monotonic()
    assert wait_for(pids[:1]) == [1]
    assert time.monotonic() - began < 15
    assert "process 1 of 2 died, or no longer answers" in together.said(0)
    os.kill(pids[1], signal.SIGKILL)
    wait_for(pids[1:])


def fail_in(rank: int, real: Callable[..., Any], calls: int, failure: Exception) -> Callable[..., Any]:
    """`real`, which fails at a call in one process."""
    count = 0

    def fails(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += distributed.rank() == rank
        if count == calls:
            sys.stderr.write("FIRED\n")
            raise failure
        return real(*arguments, **named)

    return fails


def test_a_slow_one_is_waited_for(
    together: Together, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = step.batch_objective

    def slowly(*given: Any) -> Any:
        time.sleep(0.1 * distributed.rank())
        return real(*given)

    monkeypatch.setattr(step, "batch_objective", slowly)
    assert together(2, tmp_path / "run", batch_size=4) == [0, 0]
    same_curve(tmp_path / "run", alone)


def test_out_of_memory_in_one_ends_all_with_its_cause(
    together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "batch_objective", fail_in(1, step.batch_objective, 3, MemoryError()))
    assert together(2, tmp_path / "run") == [7, 7]
    assert "FIRED" in together.said(1)
    assert "process 1, cpu: out of memory with 4 rows at a time" in together.said(1)
    assert read_summary(tmp_path / "run")["status"] == "failed"


def test_out_of_memory_while_all_write_a_sample(
    together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "generate", fail_in(1, generate, 1, MemoryError()))
    assert together(2, tmp_path / "run", parallel="fsdp") == [7, 7]
    assert "FIRED" in together.said(1)
    assert "process 1, cpu: out of memory while a sample was written" in together.said(1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_refuses_one_part_of_a_checkpoint(
    together: Together, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(saving, "PAUSES", (0.0,))
    failing = fail_in(rank, checkpoint.save_optimizer_part, 1, OSError(28, "No space left on device"))
    monkeypatch.setattr(saving, "save_optimizer_part", failing)
    run = tmp_path / "run"
    assert together(2, run, batch_size=4, parallel="fsdp") == [0, 0]
    assert "FIRED" in together.said(rank)
    assert len(events(run, "save_failed")) == 1
    assert not list(run.glob("checkpoints/.*"))
    same_curve(run, alone)


def test_killed_while_it_saves_its_part(
    together: Together, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, saves = checkpoint.save_optimizer_part, 0

    def dies(*given: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 3 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*given)

    run = tmp_path / "run"
    options: dict[str, Any] = {"batch_size": 4, "parallel": "fsdp"}
    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_optimizer_part", dies)
        patch.setattr(distributed, "LOST_AFTER", 3.0)
        patch.setattr(distributed, "PULSE", 1.0)
        patch.setattr(distributed, "PATIENCE", 1.0)
        codes = together(2, run, **options)
    assert codes == [1, -signal.SIGKILL]
    newest, remarks = checkpoint.newest_intact(run / "checkpoints")
    assert newest is not None
    assert not remarks
    assert together(2, run, **options) == [0, 0]
    same_curve(run, alone)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"parallel": "fsdp", "optimizer": "muon"}, "--optimizer muon"),
        ({"parallel": "fsdp", "precision": "fp16"}, "--precision fp16"),
        ({"async_save": True}, "--async_save"),
        ({"data": "/nowhere.txt"}, "/nowhere.txt"),
    ],
)
def test_what_is_wrong_is_said_once_and_ends_all(
    together: Together, tmp_path: Path, options: dict[str, Any], word: str
) -> None:
    codes = together(2, tmp_path / "run", **options)
    assert codes[0] == codes[1]
    assert codes[0] in (2, 3)
    said = together.said(0) + together.said(1)
    assert word in said
    assert said.count("error: ") == 1
    assert not (tmp_path / "run").exists()


def test_text_that_differs_between_machines_is_told(
    together: Together, tmp_path: Path, small_text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same name, and on another machine another file."""
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    text = small_text_file.read_text(encoding="utf-8")
    (tmp_path / "0/text.txt").write_text(text, encoding="utf-8")
    (tmp_path / "1/text.txt").write_text(text.replace("the", "teh"), encoding="utf-8")
    real = distributed.joined

    @contextlib.contextmanager
    def elsewhere() -> Iterator[None]:
        with real():
            os.chdir(tmp_path / str(distributed.rank()))
            yield

    monkeypatch.setattr(distributed, "joined", elsewhere)
    assert together(2, tmp_path / "run", data="text.txt") == [3, 3]
    said = together.said(0) + together.said(1)
    assert "--data text.txt: not the text that the first process reads" in said
    assert not (tmp_path / "run/checkpoints").exists()


def test_plain_descent_on_a_model_in_parts(together: Together, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer": "sgd", "max_steps": 4}
    assert together(1, tmp_path / "one", batch_size=8, **options) == [0]
    assert together(2, tmp_path / "two", batch_size=4, parallel="fsdp", **options) == [0, 0]
    same_curve(tmp_path / "two", tmp_path / "one")


def test_optimizer_parts_are_what_one_process_has(together: Together, tmp_path: Path) -> None:
    assert together(1, tmp_path / "one", batch_size=8) == [0]
    assert together(2, tmp_path / "two", batch_size=4, parallel="fsdp") == [0, 0]
    one, two = (checkpoint.read_optimizer(tmp_path / name / "checkpoints/final") for name in ("one", "two"))
    assert set(one) == set(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=EQUAL, rtol=0)
    assert checkpoint.damage(tmp_path / "two/checkpoints/final") == []
    manifest = json.loads((tmp_path / "two/checkpoints/final" / checkpoint.MANIFEST).read_text())["files"]
    assert sum("optimizer-" in name for name in manifest) == 2
