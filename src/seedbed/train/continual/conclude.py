"""How a run that added a domain ends: old and new weights mixed if asked for, domains measured, the history kept."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from seedbed import distributed, parallel
from seedbed.adapter import CONFIG_FILE as ADAPTER_FILE
from seedbed.checkpoint import link_checkpoint, load_model, read_optimizer, read_state, save_checkpoint
from seedbed.device import peak_memory_mb
from seedbed.findings import Finding
from seedbed.model.decoder import Decoder
from seedbed.runs.history import Figure, Stage, read_history
from seedbed.runs.lineage import forgetting
from seedbed.text.tokenizer import Tokenizer
from seedbed.train.continual.memory import Memory, model_fingerprint
from seedbed.train.job import Job, Validation
from seedbed.train.measure import held_out_loss, measure
from seedbed.train.progress import Display
from seedbed.train.stopping import StopRequest

NOTICEABLE = 0.02  # a rise of bits per byte by which a text is predicted visibly worse
MUCH_REPLAY = 0.25  # what a strong shift of the text takes (Ibrahim et al., 2024)

SHARES = tuple(tenth / 10 for tenth in range(11))
"""Shares of the new weights that are tried; 0 is the model as it was."""


@dataclass(frozen=True)
class Conclusion:
    """What is left to do once the last step is done. Called with the job; doing it twice does it once."""

    memory: Memory
    texts: Mapping[str, Validation]
    """Held-out text by domain, the new one's among them."""
    load_old: Callable[[], Decoder]
    """The model as it was when the run began."""
    interpolate: bool
    max_forgetting: float

    def __call__(self, job: Job, display: Display, request: StopRequest) -> bool:
        """Leave `best/` and `final/` as the model of this stage; False when a signal cut it short."""
        best = job.run.checkpoints / "best"
        stage = self._concluded(best)
        if stage is None:
            stage = self._conclude(job, display, request)
            if stage is None:
                return False
            report(stage, display)
            for finding in forgotten(stage):
                job.run.event("finding", job.state.step, **finding.to_json())
        distributed.on_first(lambda: link_checkpoint(best, best.with_name("final"), read_state(best)))
        job.results.update(results(stage))
        return True

    def _concluded(self, best: Path) -> Stage | None:
        """The stage as an earlier sitting left it in `best/`, after which the process was killed."""
        history, learning = read_history(best), self.memory.learning
        stage = history.stage(learning.domain) if history else None
        if history and stage is None:  # rolled back to the model as it was
            return replace(learning, after=learning.before)
        return stage if stage and stage.after else None

    def _conclude(self, job: Job, display: Display, request: StopRequest) -> Stage | None:
        """Mix, measure, and write `best/` with the history; None when a signal cut it short.

        Where no checkpoint was within the limit, `best/` is the model as it was, its history too.
        """
        best = job.run.checkpoints / "best"
        folder = next((path for path in (best, best.with_name("final")) if path.exists()), None)
        share = self._settle(job, folder, display, request)
        after = measure(job, self.texts, request, display) if share is not None else None
        if share is None or after is None:
            return None
        method = {**self.memory.learning.method, **({"interpolate": share} if self.interpolate else {})}
        stage = replace(
            self.memory.learning,
            model=str(best.resolve()),
            method=method,
            steps=job.state.step,
            tokens=job.state.tokens,
            hours=job.state.seconds / 3600,
            peak_memory_mb=peak_memory_mb(job.device),
            after=after,
        )
        if folder is not None and share == 1:
            distributed.on_first(lambda: self._publish(folder, best, read_state(folder), stage))
            return stage
        if job.validation is not None:
            loss = held_out_loss(job, job.validation.rows, request, display)
            if loss is None:
                return None
            job.state.best_val_loss = loss
        # A run that goes on from these weights must not train them any more: the state is that of the last step.
        job.state.best_step = read_state(folder)["step"] if folder else 0
        job.state.records = job.run.positions()
        distributed.on_first(lambda: self._write(job, folder, best, stage))
        return stage

    def _write(self, job: Job, folder: Path | None, best: Path, stage: Stage) -> None:
        """Make `best/` of the current weights; without a checkpoint they are those of the model as it was."""
        model, tokenizer = (job.model, job.tokenizer) if folder else self._as_it_was(job)
        optimizer = read_optimizer(folder) if folder else {}
        made = best.with_name(".concluded.tmp")
        try:
            save_checkpoint(made, model, tokenizer, optimizer, job.state.to_json())
            self._publish(made, best, job.state.to_json(), stage if folder else None)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _settle(self, job: Job, folder: Path | None, display: Display, request: StopRequest) -> float | None:
        """Give the job's model the weights to end with; returns the share of the new ones, None after a signal."""
        if folder is None:
            parallel.load(job.model, self.load_old())
            return 0.0
        parallel.load(job.model, load_model(folder)[0])
        return self._mix(job, display, request) if self.interpolate else 1.0

    def _as_it_was(self, job: Job) -> tuple[Decoder, Tokenizer]:
        """The model to roll back to: a new adapter gives way to the one that stood in its place."""
        if job.model.adapter is not None and (self.memory.origin / ADAPTER_FILE).is_file():
            return load_model(self.memory.origin)
        return job.model, job.tokenizer

    def _publish(self, source: Path, best: Path, state: Mapping[str, Any], stage: Stage | None) -> None:
        """Make `best/` of a checkpoint, with the history that ends with `stage`, or without it before that."""
        if stage is not None:
            memory = self.memory.with_learning(replace(stage, fingerprint=model_fingerprint(source)))
            memory.keep()
            link_checkpoint(source, best, state, memory.folder)
            return
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=best.parent) as folder:
            memory = self.memory.without_learning(Path(folder))
            memory.keep()
            link_checkpoint(source, best, state, memory.folder)

    def _mix(self, job: Job, display: Display, request: StopRequest) -> float | None:
        """Find the best share of the new weights (WiSE-FT: Wortsman et al., 2022), and leave the model with it.

        Best is the lowest sum of what held-out text costs in bits per byte, each relative to before: of the new
        domain, and of the mean of the earlier ones, which count together as much. Only shares that keep every
        earlier domain within the limit are taken.
        """
        new = {name: p.detach().clone() for name, p in job.model.named_parameters() if p.requires_grad}
        old = old_weights(self.load_old(), new)
        before, domain = self.memory.learning.before, self.memory.learning.domain
        scores: dict[float, float] = {}
        for share in SHARES:
            set_share(job.model, old, new, share)
            now = measure(job, self.texts, request, display) if share else dict(before)
            if now is None:
                set_share(job.model, old, new, 1.0)
                return None
            rises = {name: forgetting(before[name], now[name]) for name in now}
            gain = rises.pop(domain)
            display.line(
                f"  {share:.0%} of the new weights: {domain} {gain:+.2%}, "
                + ", ".join(f"{name} {rise:+.2%}" for name, rise in rises.items())
            )
            scores[share] = gain + fmean(rises.values()) if max(rises.values()) <= self.max_forgetting else math.inf
        best = min(scores, key=lambda share: scores[share])
        set_share(job.model, old, new, best)
        display.line(f"Interpolated: {best:.0%} of the new weights, {1 - best:.0%} of the old ones")
        return best


def old_weights(old: Decoder, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values from which `new` moved away. Of an adapter only B counts: A alone changes nothing."""
    parameters = dict(old.named_parameters())
    return {
        name: tensor if "lora_A" in name else parameters[name].detach().to(tensor.device)
        for name, tensor in new.items()
    }


@torch.no_grad()
def set_share(model: Decoder, old: Mapping[str, Tensor], new: Mapping[str, Tensor], share: float) -> None:
    """Give the trainable weights of `model` the values  (1 - share) · old + share · new."""
    for name, tensor in new.items():
        model.get_parameter(name).copy_(torch.lerp(old[name], tensor, share))


def results(stage: Stage) -> dict[str, object]:
    """What `metrics.json` says of a stage: each domain before and after, and how much worse it became."""
    domains = {
        domain: {
            "before": vars(stage.before[domain]),
            "after": vars(figure),
            "forgetting": forgetting(stage.before[domain], figure),
        }
        for domain, figure in stage.after.items()
    }
    return {"domain": stage.domain, "method": dict(stage.method), "why": stage.why, "domains": domains}


def report(stage: Stage, display: Display) -> None:
    """One line a domain: what its held-out text cost before and costs now."""
    display.line()
    display.line("Held-out text, bits per byte before and after:")
    width = max(map(len, stage.after), default=0)
    learnt = "learnt" if stage.after != stage.before else "not learnt: the model is as it was"
    for domain, figure in stage.after.items():
        before: Figure = stage.before[domain]
        what = learnt if domain == stage.domain else "known before"
        display.line(
            f"  {domain:<{width}}  {before.bits_per_byte:.4f} -> {figure.bits_per_byte:.4f}  "
            f"({forgetting(before, figure):+.2%}, {what})"
        )
    display.line(f"The whole chain: seedbed runs show {stage.run} --lineage")


def forgotten(stage: Stage) -> list[Finding]:
    """What became noticeably worse, and what holds more than was done; nothing where all is well."""
    rises = {
        domain: rise
        for domain, figure in stage.after.items()
        if domain != stage.domain and (rise := forgetting(stage.before[domain], figure)) > NOTICEABLE
    }
    if not rises:
        return []
    what = ", ".join(f"{domain} costs {rise:.1%} more bits per byte" for domain, rise in rises.items())
    kind = "self_replay" if "self_replay" in stage.method else "replay"
    share = float(stage.method.get(kind, 0))
    advice = []
    if "lora" not in stage.method and share < MUCH_REPLAY:
        more = f"--{kind} {MUCH_REPLAY}"
        advice.append(f"Replay more ({more}): the further the new text is from the old, the more it takes.")
    if "interpolate" not in stage.method:
        advice.append("Mix old and new weights within a limit (--interpolate --max_forgetting 0.02).")
    advice.append(f"Lower --learning_rate (it was {stage.method['learning_rate']:g}).")
    evidence = {"forgetting": rises, "method": dict(stage.method)}
    return [Finding("forgetting", "warning", f"learning {stage.domain}, {what}", evidence, " ".join(advice))]
