"""Memory that runs out in an update: before it began, in its first half, and what the next try finds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from seedbed.config import FLAGS, Layer, resolve
from seedbed.device import is_out_of_memory
from seedbed.optim import build_optimizer
from seedbed.train.job import Job
from seedbed.train.step import TornUpdateError, let_go, whole_or_torn

MEMORY = RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")


def optimizer_of(name: str) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(80, 80), "more": nn.Linear(80, 80)})
    optimizer = build_optimizer(model, resolve("scratch", [Layer(FLAGS, {"optimizer": name})]).training)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return optimizer


def weights_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter.clone() for group in optimizer.param_groups for parameter in group["params"]]


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Have so many moments be made before there is no memory for the next."""
    real, calls = torch.zeros_like, [0]

    def zeros_like(*given: Any, **named: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == call:
            raise MEMORY
        return real(*given, **named)

    monkeypatch.setattr(torch, "zeros_like", zeros_like)


def test_an_update_that_did_not_begin_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, expected = optimizer_of("adamw"), optimizer_of("adamw")
    expected.step()
    with monkeypatch.context() as patched:
        fail_at(patched, 2)  # a first moment is there and its second is not
        with pytest.raises(RuntimeError, match="MPS backend"), whole_or_torn(optimizer):
            optimizer.step()
    optimizer.step()
    assert all(map(torch.equal, weights_of(optimizer), weights_of(expected)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_an_update_of_some_weights_is_torn(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices have moved when there is no memory for the moments of the rest."""
    made = optimizer_of(optimizer)
    before = weights_of(made)
    fail_at(monkeypatch, {"adamw": 5, "muon": 5, "sgd": 1}[optimizer])
    with pytest.raises(TornUpdateError), whole_or_torn(made):
        made.step()
        raise MEMORY  # SGD makes no zeros
    assert not all(map(torch.equal, weights_of(made), before))


def test_other_errors_are_themselves() -> None:
    with pytest.raises(RuntimeError, match="shapes"), whole_or_torn(optimizer_of("adamw")):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (MEMORY, True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("can't start new thread"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (OSError("out of memory"), False),
        (RuntimeError("shapes do not fit"), False),
    ],
)
def test_what_means_that_memory_ran_out(error: Exception, out_of_memory: bool) -> None:
    assert is_out_of_memory(error) is out_of_memory


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_step_that_failed_may_be_scaled_again(unscaled: bool) -> None:
    """float16's scaler refuses to unscale twice; what failed between the two leaves it there."""
    optimizer = optimizer_of("adamw")
    scaler = torch.amp.GradScaler("cpu")
    if unscaled:
        scaler.scale(torch.zeros(()))
        scaler.unscale_(optimizer)
    let_go(cast(Job, SimpleNamespace(optimizer=optimizer, scaler=scaler, device=torch.device("cpu"))))
    optimizer.param_groups[0]["params"][0].square().sum().backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**16
