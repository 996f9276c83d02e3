"""The loss on held-out rows while a model trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from seedbed import distributed
from seedbed.config import TrainingOptions
from seedbed.data.batches import Batch
from seedbed.data.rows import Rows
from seedbed.device import Precision, autocast
from seedbed.evaluate import evaluation_mode
from seedbed.loss import token_losses
from seedbed.model.decoder import Decoder
from seedbed.runs.history import Figure
from seedbed.train.job import Job, Validation, own_batches
from seedbed.train.progress import Display
from seedbed.train.stopping import StopRequest


@dataclass(frozen=True)
class Meter:
    """What measuring needs of a job, before there is one."""

    model: Decoder
    device: torch.device
    training: TrainingOptions

    @property
    def precision(self) -> Precision:
        assert self.training.precision != "auto"
        return self.training.precision

    @property
    def micro_batch_size(self) -> int:
        return self.training.batch_size


def measure(
    job: Job | Meter, texts: Mapping[str, Validation], request: StopRequest, display: Display
) -> dict[str, Figure] | None:
    """The figures of each domain's held-out text; None when a signal came in between."""
    figures = {}
    for domain, held_out in texts.items():
        loss = held_out_loss(job, held_out.rows, request, display)
        if loss is None:
            return None
        figures[domain] = Figure(loss, held_out.bits_per_byte(loss))
    return figures


def held_out_loss(job: Job | Meter, rows: Rows, request: StopRequest, display: Display) -> float | None:
    """Nats per target over all `rows`, of which each process takes a part, without dropout; None after a signal."""
    own_sum = 0.0
    batches = own_batches(rows, 0, 0, len(rows), job.micro_batch_size)
    with evaluation_mode(job.model):
        for batch in display.watch_validation(batches, distributed.largest_share(len(rows))):
            if request.heard():
                return None
            own_sum += float(per_token_losses(job, batch.to(job.device), job.precision).cpu().double().sum())
    return distributed.total(own_sum) / rows.num_targets


def per_token_losses(job: Job | Meter, batch: Batch, precision: Precision) -> Tensor:
    """Nats at each position of a batch, 0 where nothing is predicted: (B, T) float32."""
    with autocast(job.device, precision):
        hidden = job.model(batch.input_ids, batch.position_ids, batch.segment_ids)  # (B, T, D)
        losses = token_losses(hidden.flatten(0, 1), job.model.head_weight(), batch.labels.flatten())
    return losses.view_as(batch.labels)
