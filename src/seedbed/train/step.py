"""One update: the gradients of a step's micro-batches together, and the weights after them."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seedbed import distributed
from seedbed.data.batches import Batch
from seedbed.data.rows import NO_TARGET
from seedbed.device import autocast, empty_cache, is_out_of_memory
from seedbed.loss import linear_cross_entropy
from seedbed.optim import is_8bit, set_learning_rate
from seedbed.parallel import whole
from seedbed.train.job import Job


@dataclass(frozen=True)
class StepResult:
    """One update: nats summed over its target tokens, and the gradient's norm before clipping."""

    loss_sum: float
    tokens: int
    learning_rate: float
    grad_norm: float
    data_seconds: float
    """Spent on making the batches."""
    objection: str
    """Why the weights are as they were; empty where they followed."""

    @property
    def loss(self) -> float:
        return self.loss_sum / self.tokens

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss_sum) and math.isfinite(self.grad_norm)


class TornUpdateError(MemoryError):
    """Memory ran out when some weights had followed the gradient and others had not."""


def take_step(job: Job, budget_used: float) -> StepResult:
    """One update from all micro-batches of the step, of all processes, which count together by their tokens.

    Raises:
        RuntimeError, MemoryError: `is_out_of_memory` knows those that mean it; the weights are as they were.
        TornUpdateError: they are not.
    """
    began = time.perf_counter()
    batches = job.micro_batches(job.state.step)
    data_seconds = time.perf_counter() - began
    tokens = int(distributed.total(sum(int((batch.labels != NO_TARGET).sum()) for batch in batches)))
    own_nats = []
    for number, batch in enumerate(batches):
        torch.manual_seed(dropout_seed(job.training.seed, job.state.step, number, distributed.rank()))
        job.spread.add_up(number == len(batches) - 1)
        nats, objective = batch_objective(job, batch.to(job.device, non_blocking=True))
        mean = objective * distributed.size() / tokens  # of which the processes' mean is the gradient
        job.scaler.scale(mean).backward()  # type: ignore[no-untyped-call]
        own_nats.append(nats.detach())
    loss_sum = distributed.total(sum(map(float, own_nats)))  # not read before, as a GPU's work would be waited for
    learning_rate = job.schedule.at(job.state.step + 1, budget_used) * job.state.learning_rate_factor
    set_learning_rate(job.optimizer, learning_rate)
    job.scaler.unscale_(job.optimizer)
    for anchor in job.keeping.weight_anchors:
        anchor.add_gradients()
    norm = nn.utils.clip_grad_norm_(job.model.parameters(), job.training.max_grad_norm or math.inf)
    grad_norm = float(whole(norm))
    objection = job.guard.objection(loss_sum / tokens, grad_norm)
    if not objection:
        with whole_or_torn(job.optimizer):
            job.scaler.step(job.optimizer)
        job.guard.taken(loss_sum / tokens, grad_norm)
    job.scaler.update()
    job.optimizer.zero_grad(set_to_none=True)
    return StepResult(loss_sum, tokens, learning_rate, grad_norm, data_seconds, objection)


def batch_objective(job: Job, batch: Batch) -> tuple[Tensor, Tensor]:
    """Nats summed over the targets of one micro-batch, and what is minimised: they and the pull of the anchors."""
    with autocast(job.device, job.precision):
        hidden = job.spread.forward(batch.input_ids, batch.position_ids, batch.segment_ids)  # (B, T, D)
        nats = linear_cross_entropy(
            hidden.flatten(0, 1), job.model.head_weight(), batch.labels.flatten(), compiled=job.training.compile
        )
        return nats, sum((anchor(hidden, batch) for anchor in job.keeping.prediction_anchors), nats)


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int = 0) -> int:
    """Seed of the random numbers inside one micro-batch: a pure function, so there is no state to save."""
    key = f"{seed}/{step}/{micro_batch}/{rank}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


@contextlib.contextmanager
def whole_or_torn(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Tells an update that ran out of memory before it began from one that did so half-way."""
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    tensors = [*(parameter for group in optimizer.param_groups for parameter in group["params"]), *states]
    before, known = [tensor._version for tensor in tensors], set(optimizer.state)
    unseen = is_8bit(optimizer) or isinstance(optimizer, torch.optim.SGD)  # their kernels leave versions as they are
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        new = set(optimizer.state) - known
        begun = any(float(optimizer.state[parameter].get("step", 0)) > 0 for parameter in new)
        if unseen or begun or before != [tensor._version for tensor in tensors]:
            raise TornUpdateError("out of memory in the middle of an update") from error
        for parameter in new:
            del optimizer.state[parameter]  # half made, and the next try would take it for whole
        raise


def let_go(job: Job) -> None:
    """Give back what a step that failed left behind."""
    job.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    empty_cache(job.device)
    job.scaler.scale(torch.zeros((), device=job.device))  # has a scale from here on, if it had none
    job.scaler.update(job.scaler.get_scale())  # forgets that gradients were unscaled
