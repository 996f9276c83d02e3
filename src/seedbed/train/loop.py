"""The loop. It sees a job, never the method by which the job was set up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seedbed import distributed
from seedbed.checkpoint import link_checkpoint, read_state
from seedbed.data.rows import Rows
from seedbed.device import autocast, describe, is_out_of_memory, peak_memory_mb
from seedbed.errors import DivergedError, OutOfMemoryError, SeedbedError, StorageError
from seedbed.generate import generate
from seedbed.parallel import with_weights
from seedbed.runs.folder import FINISHED, read_summary
from seedbed.runs.series import NOTHING, read_series
from seedbed.train.guard import Guard
from seedbed.train.job import SAMPLE, Job
from seedbed.train.measure import held_out_loss
from seedbed.train.progress import Display, perplexity
from seedbed.train.recovery import Recovery, nothing_fits
from seedbed.train.saving import Saver
from seedbed.train.spikes import WINDOW, RecentLosses, Usual, look_at_spike
from seedbed.train.step import StepResult, TornUpdateError, take_step
from seedbed.train.stopping import StopRequest, Stopwatch, listen_for_signals
from seedbed.train.verdict import LiveDiagnosis

TIME_LIMIT_EXIT_CODE = 75
MOST_FORGETTING = 1e6  # stands for a loss that is not finite, which JSON has no word for


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `summary` is what stands in its `metrics.json`."""

    path: Path
    exit_code: int
    summary: dict[str, Any]


def train(job: Job, display: Display) -> Outcome:
    """Run `job` until its steps, its patience, its hours or its user end it.

    Raises:
        DivergedError: too many updates in a row had non-finite gradients.
        OutOfMemoryError: the device has no room for a single row.
        StorageError: the last checkpoint, or several one after the other, could not be written.
    """
    loop = Loop(job, display)
    try:
        with listen_for_signals(lambda number: int(distributed.most(number)[0])) as request, display:
            status = loop.run(request)
            if status in FINISHED and not job.keeping.conclude(job, display, request):
                status = "interrupted"
    except SeedbedError as error:
        loop.summarize("diverged" if isinstance(error, DivergedError) else "failed")
        raise
    except (MemoryError, RuntimeError) as error:
        loop.summarize("failed")
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(nothing_fits(job)) from error
    exit_code = 0
    if status == "time_limit":
        exit_code = TIME_LIMIT_EXIT_CODE
    elif status == "interrupted":
        exit_code = request.exit_code
    summary = loop.summarize(status)
    if refused := job.run.unwritten:
        raise StorageError(
            f"{job.run.path}: the run is over, but its last records cannot be written ({refused.strerror}); "
            "free some space and run the same command again"
        )
    display.closing(summary, job.run.path)
    return Outcome(job.run.path, exit_code, summary)


class Loop:
    """One sitting: a job from its start, or from a resume, until it ends or is stopped."""

    def __init__(self, job: Job, display: Display) -> None:
        self.job = job
        self.state = job.state
        self.display = display
        self.watch = Stopwatch(self.state.seconds, job.training.max_training_hours)
        self.first_step = self.state.step
        self.first_second = self.watch.seconds
        self.step_seconds = 0.0  # of a slow recent step
        self.total_step_seconds = 0.0
        self.sitting_tokens = 0
        self.saver = Saver(job, display, self.watch)
        self.recovery = Recovery(job, display, self.saver, self.went_back)
        self.budget_used = 0.0  # share of the hours
        self.told_of_records = False
        self.reason = ""
        self.look_at_records()
        self.of_others = {"judge": None, "notes": "", **others_entries(job.run.path)}
        self.live = LiveDiagnosis()
        self.forget_lost_best()
        self.count_epochs()

    def run(self, request: StopRequest) -> str:
        """Rare events above, the step below; the extra turn at the end needs no second code path."""
        job, state = self.job, self.state
        self.summarize("running")
        job.model.train()
        while True:
            if self.validation_due() and not self.validate(request):
                return self.stop_with("interrupted", f"step-{state.step}")
            if self.epoch_ended():
                self.close_epoch()
            elif self.due(job.watching.save_every):
                self.saver.save_numbered("step", state.step)
            if self.forgot_too_much():
                return self.stop_forgetting()
            if self.ended():
                return self.stop_with("done", "final")
            if self.out_of_patience():
                return self.stop_early()
            if request.heard():
                return self.stop_with("interrupted", f"step-{state.step}")
            if self.told_to_stop() or self.out_of_time():
                return self.stop_with("time_limit", "time-limit")

            if state.step in state.set_aside:
                self.recovery.pass_over()
                continue
            began = self.watch.seconds
            if result := self.update():
                state.step += 1
                self.record(result, self.watch.seconds - began)

    def look_at_records(self) -> None:
        """What is usual, from the records of the steps before."""
        losses, norms = distributed.on_first(self.recorded)
        self.losses, self.job.guard = RecentLosses(losses[-WINDOW:]), Guard(losses, norms)

    def recorded(self) -> list[list[float]]:
        """Losses and gradient norms of the steps so far."""
        series = read_series(self.job.run.path)
        return [series.get(name, NOTHING).values.tolist() for name in ("train_loss", "grad_norm")]

    def forget_lost_best(self) -> None:
        """A run that begins with a checkpoint of another run has no best weights of its own yet."""
        state, best = self.state, self.job.run.checkpoints / "best"
        if state.best_step and not distributed.on_first(best.exists):
            state.best_val_loss, state.best_step, state.epochs_without_improvement = None, 0, 0

    def count_epochs(self) -> None:
        """A run that goes on from a checkpoint with other batches is elsewhere in its epochs."""
        state, steps = self.state, self.job.steps_per_epoch
        if state.steps_per_epoch != steps:
            state.steps_per_epoch, state.closed_epochs = steps, state.step // steps
            state.epoch_loss_sum, state.epoch_tokens = 0.0, 0

    # When things are due

    def due(self, every: int) -> bool:
        return self.state.step > 0 and self.state.step % every == 0

    def ended(self) -> bool:
        return self.job.total_steps is not None and self.state.step >= self.job.total_steps

    def epoch_ended(self) -> bool:
        return self.state.step >= (self.state.closed_epochs + 1) * self.job.steps_per_epoch

    def validation_due(self) -> bool:
        due = self.due(self.job.watching.eval_every) or self.epoch_ended() or self.ended()
        return due and self.state.validated_step < self.state.step

    def out_of_patience(self) -> bool:
        return 0 < self.job.watching.early_stopping_patience <= self.state.epochs_without_improvement

    def told_to_stop(self) -> bool:
        limit = self.job.watching.stop_at_step
        if limit is None or self.state.step < limit:
            return False
        self.reason = f"--stop_at_step {limit}"
        return True

    def out_of_time(self) -> bool:
        """Whether the next step and the save after it could come too late, by the slowest process's clock."""
        left = self.watch.seconds_left - self.step_seconds - 2 * self.saver.seconds
        late, self.budget_used = distributed.most(left < 0, self.watch.share_used)
        return bool(late)

    def forgot_too_much(self) -> bool:
        keeping, worst = self.job.keeping, max(self.state.forgetting.values(), default=0.0)
        return keeping.on_forgetting != "warn" and worst > keeping.max_forgetting

    # What happens then

    def update(self) -> StepResult | None:
        """A step, in smaller micro-batches where memory runs out; None when the run went back instead.

        The next try is outside of the handler, which holds on to what the failed one had in memory.
        """
        while True:
            torn = False
            try:
                return take_step(self.job, self.budget_used)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                torn = isinstance(error, TornUpdateError)
            self.recovery.take_fewer_rows("training")
            if torn:
                self.recovery.undo_torn_update()
                return None

    def went_back(self) -> None:
        """After `Recovery` went back to a checkpoint: forget the steps that were made since."""
        self.first_step, self.first_second = self.state.step, self.watch.seconds
        self.look_at_records()
        self.count_epochs()

    def record(self, result: StepResult, seconds: float) -> None:
        """Count a step, write its record, and give up when updates fail again and again."""
        state = self.state
        self.total_step_seconds += seconds
        self.step_seconds = max(seconds, 0.9 * self.step_seconds)
        if result.objection:
            if result.finite and (usual := self.losses.add(state.step, result.loss, taken=False)):
                self.record_spike(result, usual)
            self.recovery.skip(result.objection)
            return
        state.skipped_in_a_row = 0
        state.tokens += result.tokens
        state.epoch_loss_sum += result.loss_sum
        state.epoch_tokens += result.tokens
        self.sitting_tokens += result.tokens
        metrics = {
            "train_loss": result.loss,
            "train_ppl": perplexity(result.loss),
            "lr": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens_per_second": round(result.tokens / max(seconds, 1e-9), 1),
            "data_share": round(result.data_seconds / max(seconds, 1e-9), 4),
            "memory_mb": round(peak_memory_mb(self.job.device), 1),
            "remaining_hours": self.remaining_hours(),
        }
        self.write(metrics)
        self.display.step(state.step, self.job.total_steps, metrics)
        if usual := self.losses.add(state.step, result.loss):
            self.record_spike(result, usual)

    def record_spike(self, result: StepResult, usual: Usual) -> None:
        """Say and keep what a step was made of whose loss stands far above the others."""
        job, state = self.job, self.state
        found = with_weights(job.model, lambda: look_at_spike(job, state.step - 1))
        job.run.event(
            "loss_spike",
            state.step,
            loss=round(result.loss, 4),
            usual=round(usual.loss, 4),
            times=round((result.loss - usual.loss) / max(usual.deviation, 1e-9), 1),
            grad_norm=round(result.grad_norm, 4),
            learning_rate=result.learning_rate,
            peak_learning_rate=job.schedule.peak,
            **found,
        )
        self.display.line(
            f"Step {state.step}: the loss jumped to {result.loss:.3f} (usual: {usual.loss:.3f}); "
            f"rows {found['rows'][0]} to {found['rows'][1]} of the epoch, see events.jsonl"
        )

    def write(self, metrics: dict[str, float]) -> None:
        """One record of `metrics.jsonl` and, at their frequency, the points of TensorBoard."""
        state = self.state
        record = {
            "step": state.step,
            "epoch": round(state.step / self.job.steps_per_epoch, 6),
            "tokens": state.tokens,
            "elapsed_hours": round(self.watch.hours, 6),
            **metrics,
        }
        self.job.run.append("metrics.jsonl", record)
        self.tell_of_records()
        if "val_loss" in metrics or self.due(self.job.watching.log_every):
            self.job.board.add(state.step, metrics)

    def tell_of_records(self) -> None:
        """Say once that the disk refuses the run's records, which wait in memory."""
        refused = self.job.run.unwritten
        if refused and not self.told_of_records:
            self.display.line(
                f"Step {self.state.step}: the records cannot be written ({refused.strerror}); "
                "they are kept and tried again at every step"
            )
        self.told_of_records = refused is not None

    def validate(self, request: StopRequest) -> bool:
        """Measure the whole held-out set, sample, let `best/` follow; False when a signal cut it short."""
        job, state = self.job, self.state
        losses = self.held_out_losses(request)
        if losses is None:
            return False
        metrics = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
        improved = False
        if job.validation is not None:
            loss, state.val_loss = losses["val_loss"], metrics.get("val_loss")
            improved = loss < (math.inf if state.best_val_loss is None else state.best_val_loss)
            if not self.epoch_ended():  # an epoch has its own lines
                self.display.validation(state.step, loss)
        if state.val_loss is not None and "val_loss" in metrics:
            metrics["val_ppl"] = perplexity(state.val_loss)
        if metrics:
            self.write(metrics)
        if job.keeping.earlier:
            within = self.watch_forgetting(metrics) or job.keeping.on_forgetting == "warn"
            improved = improved and within
        state.validated_step = state.step
        with_weights(job.model, self.sample)
        if improved:
            self.saver.save_best()
        self.summarize("running")
        if distributed.is_first():
            self.live.look(job.run, self.display)
        return True

    def held_out_losses(self, request: StopRequest) -> dict[str, float] | None:
        """Nats per target of the held-out text, and of what was known earlier; None when a signal came in between."""
        held_out = {} if self.job.validation is None else {"val_loss": self.job.validation}
        held_out |= {f"val_loss/{known.domain}": known.validation for known in self.job.keeping.earlier}
        losses = {}
        for name, validation in held_out.items():
            loss = self.held_out_loss(validation.rows, request)
            if loss is None:
                return None
            losses[name] = loss
        return losses

    def held_out_loss(self, rows: Rows, request: StopRequest) -> float | None:
        """As `measure.held_out_loss`, with fewer rows at once where memory runs out."""
        while True:
            try:
                return held_out_loss(self.job, rows, request, self.display)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            self.recovery.take_fewer_rows("validation")

    def watch_forgetting(self, metrics: Mapping[str, float]) -> bool:
        """Say how much worse everything earlier is; whether all of it is within the limit."""
        job, state, limit = self.job, self.state, self.job.keeping.max_forgetting
        for known in job.keeping.earlier:
            now = metrics.get(f"val_loss/{known.domain}", math.inf)
            state.forgetting[known.domain] = min(now / known.loss - 1, MOST_FORGETTING)
        self.display.forgetting(state.step, state.forgetting)
        beyond = {domain: rise for domain, rise in state.forgetting.items() if rise > limit}
        if beyond:
            job.run.event("forgetting", state.step, limit=limit, beyond=beyond)
            worse = ", ".join(f"{domain} is {rise:.1%} worse" for domain, rise in beyond.items())
            self.display.line(f"  Alarm: {worse}; --max_forgetting allows {limit:.1%}")
        return not beyond

    def sample(self) -> None:
        """Let the model continue the fixed prompt: one seed throughout, so that only the weights differ."""
        job, prompt = self.job, self.job.sample
        try:
            with autocast(job.device, job.precision):
                [completion] = generate(job.model, job.tokenizer, [prompt.given], SAMPLE)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.recovery.do_without_sample()
            return
        job.run.append("samples.jsonl", {"step": self.state.step, "prompt": prompt.shown, "text": completion.text})
        if isinstance(prompt.given, str):
            self.display.sample(self.state.step, prompt.shown + completion.text)
        else:
            self.display.sample(self.state.step, completion.text, asked=prompt.shown)

    def close_epoch(self) -> None:
        """Report the epoch, count towards early stopping, save."""
        job, state = self.job, self.state
        epoch, first_step = state.closed_epochs + 1, state.closed_epochs * job.steps_per_epoch
        improved = state.best_step > first_step
        if job.validation is not None:
            state.epochs_without_improvement = 0 if improved else state.epochs_without_improvement + 1
        self.display.epoch(epoch, job.epochs, state)
        state.closed_epochs, state.epoch_loss_sum, state.epoch_tokens = epoch, 0.0, 0
        if folder := self.saver.save_numbered("epoch", epoch):
            self.display.line(f"  Checkpoint {'goes' if job.watching.async_save else 'saved'} to {folder}")
        self.display.line(f"  Elapsed: {self.watch.hours:.2f}h | Remaining: {self.remaining_hours():.2f}h")

    def stop_with(self, status: str, name: str) -> str:
        if self.state.step > 0:
            self.saver.save(name, last=True)
        return status

    def stop_early(self) -> str:
        """End with the best weights, not the last; with the current ones where no validation loss was a number."""
        self.saver.wait()
        best = self.job.run.checkpoints / "best"
        if not distributed.on_first(best.exists):
            return self.stop_with("early_stopped", "final")
        distributed.on_first(lambda: link_checkpoint(best, best.with_name("final"), read_state(best)))
        return "early_stopped"

    def stop_forgetting(self) -> str:
        """End with the best weights within the limit, or with the current ones where they are to stay.

        A run that has none of these is left to `Keeping.conclude`.
        """
        state = self.state
        self.reason = f"--max_forgetting {self.job.keeping.max_forgetting:g} was exceeded"
        if self.job.keeping.on_forgetting == "stop" and state.best_step < state.step:
            self.saver.save_best()
        if distributed.on_first(lambda: (self.job.run.checkpoints / "best").exists()):
            return self.stop_early()
        return "early_stopped"

    def remaining_hours(self) -> float:
        """Until the steps are done at this sitting's pace, or the hours run out, whichever comes first."""
        left = self.watch.seconds_left
        done = self.state.step - self.first_step
        if self.job.total_steps is not None and done > 0:
            pace = (self.watch.seconds - self.first_second) / done
            left = min(left, pace * (self.job.total_steps - self.state.step))
        return round(left / 3600, 6)

    def summarize(self, status: str) -> dict[str, Any]:
        """Write and return `metrics.json`."""
        job, state = self.job, self.state
        best = state.best_val_loss
        parameters, train_loss = list(job.model.parameters()), self.losses.mean
        summary = {
            "status": status,
            "steps": state.step,
            "total_steps": job.total_steps,
            "tokens": state.tokens,
            "train_loss": train_loss,
            "train_ppl": None if train_loss is None else perplexity(train_loss),
            "best_step": state.best_step or None,
            "best_val_loss": best,
            "best_val_ppl": None if best is None else perplexity(best),
            "bits_per_byte": None if best is None or not job.validation else job.validation.bits_per_byte(best),
            "hours": round(self.watch.hours, 6),
            "tokens_per_second": round(self.sitting_tokens / max(self.total_step_seconds, 1e-9), 1),
            "peak_memory_mb": round(peak_memory_mb(job.device), 1),
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "device": describe(job.device),
            "precision": job.precision,
            "seed": job.training.seed,
            "parent": job.parent,
            "reason": self.reason,
            **job.facts,
            **self.of_others,
            **job.results,
        }
        job.run.write_summary(summary)
        return summary


def others_entries(run: Path) -> dict[str, Any]:
    """What a person or a judge wrote into the summary of a run that now goes on."""
    return {name: value for name, value in read_summary(run).items() if name in ("judge", "notes")}
