"""Training, from a config to the end of the run."""

from __future__ import annotations

from rich.console import Console

from seedbed import distributed
from seedbed.config import Config
from seedbed.streams import outlasting_readers
from seedbed.train.build import build_job
from seedbed.train.loop import Outcome, train
from seedbed.train.progress import Display
from seedbed.train.resume import FURTHER, AlreadyFinished, open_run
from seedbed.train.stopping import leave_on_signals
from seedbed.train.verdict import look_back


def run_training(config: Config, console: Console) -> Outcome:
    """Train as `config` says, or go on with the unfinished run that it means.

    Raises:
        SeedbedError: see `seedbed.errors`; before training begins nothing is left behind.
    """
    with outlasting_readers(), leave_on_signals(), distributed.joined():
        shown = console if distributed.is_first() else Console(quiet=True)
        return _run(config, Display(shown, config.watching.log_every))


def _run(config: Config, display: Display) -> Outcome:
    start = open_run(config)
    if isinstance(start, AlreadyFinished):
        further = FURTHER.format(start.path)
        display.line(f"{start.path} is finished; {further}, or choose another --output for a new run")
        return Outcome(start.path, 0, start.summary)
    try:
        for remark in start.remarks:
            display.line(f"Warning: {remark}; going on from an older checkpoint")
        job = build_job(start, display)
        if start.checkpoint is not None:
            start.run.event("resume", job.state.step, checkpoint=str(start.checkpoint), remarks=list(start.remarks))
            display.line(f"Going on from {start.checkpoint} at step {job.state.step}")
        try:
            return train(job, display)
        except Exception:
            distributed.stay_to_the_end()
            raise
        finally:
            job.board.close()
            if distributed.is_first():
                look_back(job.run.path, display, report=config.watching.report)
    finally:
        start.run.discard_if_empty()
        start.run.close()
