"""What a run will take: memory by part, time, arithmetic and disk, before its first step.

Memory is counted, except for what a block keeps for its backward pass, which is weighed. Time is measured on one block
of each kind (see `seedbed.train.estimate.trial`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from seedbed import distributed
from seedbed.config import Config
from seedbed.device import Precision, empty_cache, peak_memory_mb, pick_device, pick_precision
from seedbed.errors import OutOfMemoryError
from seedbed.findings import Finding
from seedbed.lora import num_trainable
from seedbed.loss import chunk_tokens
from seedbed.model.config import DecoderConfig
from seedbed.model.decoder import Decoder, num_parameters
from seedbed.optim import optimizer_tensors
from seedbed.parallel import is_sharded, to_local
from seedbed.train.estimate.footprint import CODE_BYTES, MIB, SCATTERED, UNUSED, Footprint, free_bytes, resident_bytes
from seedbed.train.estimate.pace import Pace
from seedbed.train.estimate.scaling import Exchange, Traffic, describe_scaling
from seedbed.train.estimate.trial import Costs, head_learns, kinds_of, outline, tensor_bytes, try_out
from seedbed.train.estimate.workload import TypicalBatch, Workload, sizes_of, typical_batch, ways_to_keep
from seedbed.train.finetune import make_adapter
from seedbed.train.ingredients import Ingredients
from seedbed.train.progress import Display, clock
from seedbed.train.state import TrainingState

NAME = "memory"
"""The finding that a run needs more memory than there is."""
HOPELESS = 1.15
"""Times what is free: beyond what a forecast may be wrong by."""
UNPACKED = 20  # bytes a weight while bitsandbytes updates it on a CPU: both moments, the gradient and the update


@dataclass(frozen=True)
class Forecast:
    """What a run will take."""

    parameters: int
    trainable_parameters: int
    device: torch.device
    shape: DecoderConfig
    config: Config
    footprint: Footprint
    free_bytes: float | None
    """What is left for this process, with what it has already."""
    peak_so_far: float
    step_seconds: float
    tokens_per_second: float
    """Targets of the loss."""
    tokens: int | None
    """Targets in an epoch."""
    steps_per_epoch: int | None
    steps: int | None
    flops: float | None
    hours: float | None
    first_result_hours: float | None
    disk_mb: float
    processes: int
    ways: Mapping[str, tuple[Footprint, Traffic]]
    """How several processes could share the model: what each of them takes, and what it sends in a step."""

    @property
    def peak_bytes(self) -> float:
        return max(self.footprint.peak(self.config.training.batch_size), self.peak_so_far)

    def memory_mb(self) -> dict[str, float]:
        """Memory by part and its peak, in MB of 2^20 bytes."""
        parts = self.footprint.parts_mb(self.config.training.batch_size)
        return {**parts, "peak": round(self.peak_bytes / MIB, 1)}

    def to_summary(self) -> dict[str, float | None]:
        """What stands in `metrics.json`, beside what came."""
        return {"peak_memory_mb": self.memory_mb()["peak"], "hours": self.hours}

    def to_json(self) -> dict[str, Any]:
        """What `plan --json` says of it."""
        return {
            "memory_mb": self.memory_mb(),
            "step_seconds": round(self.step_seconds, 6),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "tokens": self.tokens,
            "steps_per_epoch": self.steps_per_epoch,
            "steps": self.steps,
            "flops": self.flops,
            "hours": self.hours,
            "first_result_hours": self.first_result_hours,
            "disk_mb": self.disk_mb,
            **({"processes": self.processes, "parallel": self.ways_to_share()} if self.processes > 1 else {}),
        }

    def ways_to_share(self) -> dict[str, Any]:
        """Memory of one process, what it sends in a step, and the speed it keeps on different links, DDP and FSDP."""
        rows = self.config.training.batch_size
        return {
            name: {"memory_mb": round(footprint.peak(rows) / MIB, 1), **describe_scaling(traffic)}
            for name, (footprint, traffic) in self.ways.items()
        }

    def require_memory(self) -> None:
        """Refuse a run that the system would kill in the middle.

        Raises:
            OutOfMemoryError: what it needs, what there is, and what would fit.
        """
        if self.free_bytes is not None and self.peak_bytes > HOPELESS * self.free_bytes:
            [finding] = self.findings()
            raise OutOfMemoryError(f"{finding} To try it all the same, add --allow {NAME}.")

    def findings(self) -> list[Finding]:
        """A warning when the run needs more memory than there is."""
        if self.free_bytes is None or self.peak_bytes <= self.free_bytes:
            return []
        needed, free = self.peak_bytes / MIB, self.free_bytes / MIB
        where = "the GPU" if self.device.type == "cuda" else "this machine"
        return [
            Finding(
                NAME,
                "warning",
                f"the run needs about {needed:,.0f} MB and {where} has {free:,.0f} MB for it",
                {"peak_memory_mb": round(needed, 1), "free_mb": round(free, 1)},
                fitting(self, self.free_bytes).sentence,
            )
        ]


@dataclass(frozen=True)
class Fitting:
    """What fits into a limit: rows in a micro-batch, and how many of them make the same update."""

    largest_batch_size: int
    batch_size: int
    grad_accumulation: int
    savings_mb: dict[str, float]
    """What would help when not even one row fits."""
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """What `plan --json` says of a `--memory_limit`."""
        return {
            "largest_batch_size": self.largest_batch_size,
            "same_update": {"batch_size": self.batch_size, "grad_accumulation": self.grad_accumulation},
            "savings_mb": self.savings_mb,
            "fitting": self.sentence,
        }


def fitting(forecast: Forecast, limit: float) -> Fitting:
    """The largest batch whose peak is within `limit` bytes."""
    footprint, training = forecast.footprint, forecast.config.training
    largest, wanted = footprint.largest_batch(limit), training.batch_size * training.grad_accumulation
    within = f"{limit / MIB:,.0f} MB"
    if not largest:
        lora = None
        if not forecast.config.with_lora and forecast.config.regime != "scratch":
            lora = num_trainable(forecast.shape, make_adapter(forecast.shape, forecast.config.adapt))
        savings = footprint.savings(forecast.shape, lora=lora)
        ordered = sorted(savings.items(), key=lambda saving: -saving[1])
        helps = ", ".join(f"{option} saves {size / MIB:,.0f} MB" for option, size in ordered)
        sentence = f"Not even one row fits into {within}: it takes {footprint.peak(1) / MIB:,.0f} MB. "
        sentence += f"What would help: {helps}." if helps else "Only a smaller model would."
        return Fitting(0, 0, 0, {option: round(size / MIB, 1) for option, size in ordered}, sentence)
    accumulation = math.ceil(wanted / min(largest, wanted))
    batch = round(wanted / accumulation)
    same = "the same update" if batch * accumulation == wanted else f"an update of {batch * accumulation} rows"
    sentence = (
        f"Within {within}, --batch_size {largest:,} is the largest that fits; "
        f"--batch_size {batch} --grad_accumulation {accumulation} makes {same}."
    )
    return Fitting(largest, batch, accumulation, {}, sentence)


def forecast_run(
    made: Ingredients, optimizer: torch.optim.Optimizer, state: TrainingState, total_steps: int | None
) -> Forecast:
    """What a run that is about to start, or to go on, will take; its model and its random states stay as they are."""
    config, model = made.prepared.config, made.model
    validations = [made.prepared.corpus.validation, *(known.validation for known in made.keeping.earlier)]
    parameters, trained = sizes_of(model)
    held = (*map(to_local, model.parameters()), *optimizer_tensors(model, optimizer).values())
    workload = Workload(
        config,
        model.config,
        rows=made.rows,
        held_out=[validation.rows for validation in validations if validation is not None],
        steps=total_steps,
        steps_done=state.step,
        seconds_used=state.seconds,
        loaded_bytes=sum(map(tensor_bytes, held)) + anchor_bytes(config, parameters, trained),
        processes=distributed.size(),
        sharded=is_sharded(model),
    )
    return forecast(workload, seconds=0.5)


def forecast(run: Workload, seconds: float = 3.0) -> Forecast:
    """Measure for about this many seconds, and work out the rest."""
    config, training = run.config, run.config.training
    device = pick_device(training.device)
    precision = pick_precision(training.precision, device)
    model = outline(config, run.shape)
    parameters, trained = sizes_of(model)
    on_cpu = device.type == "cpu"
    peak_so_far = peak_memory_mb(device) * MIB if run.loaded_bytes and on_cpu else 0.0
    typical = typical_batch(run)
    costs = try_out(model, config, typical.batch, device, precision, seconds)
    empty_cache(device)  # what torch keeps of it is free too
    program = resident_bytes() - run.loaded_bytes + CODE_BYTES if on_cpu else 0.0
    pace = Pace(run, model, costs, typical)
    whole = _footprint(run, model, costs, device, precision, typical, program)
    ways = _ways_to_share(run, model, whole, costs, pace.step, precision)
    free = free_bytes(device)
    return Forecast(
        parameters=parameters,
        trainable_parameters=trained,
        device=device,
        shape=run.shape,
        config=config,
        footprint=ways["fsdp" if run.sharded else "ddp"][0],
        free_bytes=None if free is None else free + (resident_bytes() if on_cpu else run.loaded_bytes),
        peak_so_far=peak_so_far,
        step_seconds=pace.step,
        tokens_per_second=pace.tokens_per_step / pace.step,
        tokens=run.rows.num_targets if run.rows else None,
        steps_per_epoch=pace.steps_per_epoch,
        steps=run.steps,
        flops=pace.flops,
        hours=pace.hours,
        first_result_hours=pace.first_result_hours,
        disk_mb=round(pace.kept_checkpoints() * pace.checkpoint_bytes / MIB, 1),
        processes=run.processes,
        ways=ways,
    )


def _ways_to_share(
    run: Workload, model: Decoder, whole: Footprint, costs: Costs, step_seconds: float, precision: Precision
) -> dict[str, tuple[Footprint, Traffic]]:
    """What each process takes, and sends in a step, with the model replicated and with the model sharded."""
    product_bytes = 4 if precision == "fp32" else 2
    exchange = Exchange(
        *sizes_of(model),
        processes=run.processes,
        micro_batches=run.micro_batches,
        product_bytes=product_bytes,
        units=run.shape.num_layers + 1,
    )
    block = max(cost.weight_bytes for cost in costs.blocks) * product_bytes / 4
    sharded = whole.sharded(run.processes, block, float(costs.ends.weight_bytes))
    return {"ddp": (whole, exchange.ddp(step_seconds)), "fsdp": (sharded, exchange.fsdp(step_seconds))}


def describe_forecast(display: Display, forecast: Forecast) -> None:
    """The forecast in a few lines, before the first step."""
    memory = forecast.memory_mb()
    parts = ", ".join(f"{name} {memory[name]:,.0f}" for name in memory if name != "peak" and memory[name] >= 0.5)
    display.line()
    display.line("Forecast:")
    display.line(f"  Peak memory: {memory['peak']:,.0f} MB ({parts})")
    display.line(f"  Speed: {forecast.step_seconds:.3g} s a step, {forecast.tokens_per_second:,.0f} tokens/s")
    if forecast.hours is not None and forecast.first_result_hours is not None:
        end, first = clock(forecast.hours), clock(forecast.first_result_hours)
        display.line(f"  Time: {end} to the end, {first} to the first result; {forecast.flops or 0:.3g} FLOPs")
    display.line(f"  Disk: {forecast.disk_mb:,.0f} MB for checkpoints")


def anchor_bytes(config: Config, parameters: int, trained: int) -> float:
    """What the ways of keeping old knowledge hold: old weights, what each of them means, an old model."""
    ways = ways_to_keep(config) if config.continues else set()
    old = 4.0 * trained if ways & {"l2_sp", "ewc"} else 0.0
    if "kl" in ways:
        old = 4.0 * parameters
    return old + (4.0 * trained if "ewc" in ways else 0.0)


def _footprint(
    run: Workload,
    model: Decoder,
    costs: Costs,
    device: torch.device,
    precision: Precision,
    typical: TypicalBatch,
    program: float,
) -> Footprint:
    config, shape = run.config, run.shape
    parameters, trained = sizes_of(model)
    rows, width = typical.batch.input_ids.shape
    wider = typical.widest / width
    kinds = list(zip(kinds_of(model), costs.blocks, strict=True))
    weights = float(costs.ends.weight_bytes) + sum(kind.count * cost.weight_bytes for kind, cost in kinds)
    weights += anchor_bytes(config, parameters, trained)
    on_cpu, unpacks = device.type == "cpu", config.training.optimizer == "adamw8bit"
    tied = run.shape.tie_embeddings or config.training.grad_accumulation > 1
    kept = costs.ends.kept_bytes + sum(kind.count * cost.kept_bytes for kind, cost in kinds)
    return Footprint(
        program=program,
        weights=weights,
        gradients=4.0 * trained,
        optimizer=costs.state_bytes * trained,
        cache=costs.ends.cast_bytes + sum(kind.count * cost.cast_bytes for kind, cost in kinds),
        row_activations=kept * wider / rows,
        row_working=max(cost.working_bytes for cost in costs.blocks) * wider / rows * (SCATTERED if on_cpu else 1.0),
        row_tokens=typical.widest,
        vocab_size=shape.vocab_size,
        chunk_tokens=chunk_tokens(shape.vocab_size, device.type),
        logit_bytes=4 if precision == "fp32" else 2 if on_cpu else 6,
        head=4.0 * shape.vocab_size * shape.d_model if head_learns(model) and tied else 0.0,
        accumulates=config.training.grad_accumulation > 1,
        updating=UNPACKED * max(p.numel() for p in model.parameters() if p.requires_grad) * (unpacks and on_cpu),
        loading=4.0 * parameters + run.stored_bytes if on_cpu else 0.0,
        saving=0.0 if config.with_lora or not on_cpu else 4.0 * parameters,
        writing=(4.0 if precision == "fp32" else 2.0) * num_parameters(shape),
        beside=(4.0 + costs.state_bytes) * trained if config.watching.async_save and on_cpu else 0.0,
        unused=UNUSED if on_cpu else 0.0,
    )
