"""How long the parts of a run take, and what follows for the whole: its hours, its arithmetic, its checkpoints."""

from __future__ import annotations

from seedbed.config import WatchOptions
from seedbed.data.rows import NO_TARGET
from seedbed.model.decoder import Decoder
from seedbed.train.estimate.trial import Costs, block_flops, head_flops, kinds_of
from seedbed.train.estimate.workload import TypicalBatch, Workload, sizes_of, ways_to_keep
from seedbed.train.job import SAMPLE
from seedbed.train.length import steps_per_epoch

STEP_SECONDS = 1e-3  # of every step: its record, the clock, the display
SAVED_PER_SECOND = 350e6  # bytes of a checkpoint, written, flushed and hashed
LINKED_PER_SECOND = 1.5e9  # and under a second name, where they are only hashed


class Pace:
    """How long the parts of a run take, and what follows for the whole."""

    def __init__(self, run: Workload, model: Decoder, costs: Costs, typical: TypicalBatch) -> None:
        self.run, self.training, self.watching = run, run.config.training, run.config.watching
        parameters, trained = sizes_of(model)
        kinds = list(zip(kinds_of(model), costs.blocks, strict=True))
        wider = typical.width / typical.batch.input_ids.shape[1]
        training = costs.ends.seconds + sum(kind.count * cost.seconds for kind, cost in kinds)
        forward = costs.ends.forward_seconds + sum(kind.count * cost.forward_seconds for kind, cost in kinds)
        if run.config.continues and "kl" in ways_to_keep(run.config):
            training += forward + costs.ends.seconds
        rows = self.rows_per_step / self.training.batch_size / run.processes
        self.step = rows * (wider * training + typical.seconds) + trained * costs.update_seconds + STEP_SECONDS
        batches = sum(len(held_out) for held_out in run.held_out) / typical.batch.input_ids.shape[0]
        self.validation = batches * (wider * forward + typical.seconds) + SAMPLE.max_new_tokens * costs.token_seconds
        self.checkpoint_bytes = costs.state_bytes * trained + 4.0 * (trained if model.adapter else parameters)
        targets = float((typical.batch.labels != NO_TARGET).float().mean())
        per_row = sum(kind.count * block_flops(kind, typical.width, training=True) for kind, _ in kinds)
        per_row += head_flops(model, typical.width * targets, training=True)
        self.flops = None if run.steps is None else float(f"{run.steps * self.rows_per_step * per_row:.4g}")

    @property
    def steps_per_epoch(self) -> int | None:
        if self.run.rows is None:
            return None
        return steps_per_epoch(self.training, self.run.rows)

    @property
    def rows_per_step(self) -> float:
        """On average; the last step of an epoch may have fewer."""
        full = self.training.rows_per_step
        return len(self.run.rows) / self.steps_per_epoch if self.run.rows and self.steps_per_epoch else full

    @property
    def tokens_per_step(self) -> float:
        rows = self.run.rows
        if rows is None:
            return self.rows_per_step * self.run.config.data.max_seq_len
        return rows.num_targets / len(rows) * self.rows_per_step

    @property
    def hours(self) -> float | None:
        """To the end, earlier sittings counted; the hours that are allowed, where only they end it."""
        if self.run.rows is None:
            return None
        allowed = self.training.max_training_hours
        if self.run.steps is None:
            return allowed
        last = min(self.run.steps, self.watching.stop_at_step or self.run.steps)
        left = self.seconds_until(last, last) - self.seconds_until(self.run.steps_done, last)
        return round(min(allowed, (self.run.seconds_used + left) / 3600), 6)

    @property
    def first_result_hours(self) -> float | None:
        """To the first validation, or the end of the first epoch."""
        if self.steps_per_epoch is None:
            return None
        first = min(self.watching.eval_every, self.steps_per_epoch, self.run.steps or self.steps_per_epoch)
        return round((first * self.step + self.validation) / 3600, 6)

    def seconds_until(self, step: int, last: int) -> float:
        """From the first step to `step` of a run that ends at `last`: steps, validations and checkpoints."""
        validated, saved, linked = (len([at for at in some if at <= step]) for some in self.events(last))
        saving = saved * self.checkpoint_bytes / SAVED_PER_SECOND + linked * self.checkpoint_bytes / LINKED_PER_SECOND
        return step * self.step + validated * self.validation + saving

    def events(self, last: int) -> tuple[set[int], set[int], list[int]]:
        """Steps with a validation, with a checkpoint, and those with a second name for theirs."""
        epochs = _multiples(self.steps_per_epoch or last, last)
        validated = _multiples(self.watching.eval_every, last) | epochs | {last}
        saved = _multiples(self.watching.save_every, last) | epochs | {last}
        linked = [*sorted(epochs), last]
        return validated, (validated | saved) if self.run.held_out else saved, linked

    def kept_checkpoints(self) -> int:
        """How many different steps have a checkpoint at the end; the best one is counted as one of its own."""
        best = int(bool(self.run.held_out) or self.run.rows is None)
        if self.run.steps is None or self.steps_per_epoch is None:
            keep: WatchOptions = self.watching
            return 2 * keep.keep_checkpoints + 1 + best
        last = min(self.run.steps, self.watching.stop_at_step or self.run.steps)
        newest = -self.watching.keep_checkpoints if self.watching.keep_checkpoints else 0
        epochs = sorted(_multiples(self.steps_per_epoch, last))[newest:]
        steps = sorted(_multiples(self.watching.save_every, last) - set(epochs))[newest:]
        validated = self.events(last)[0]
        kept = {*epochs, *steps, last}
        return len(kept) + (best if validated - kept else 0)


def _multiples(every: int, last: int) -> set[int]:
    return set(range(every, last + 1, every))
