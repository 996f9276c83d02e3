"""What a run says of itself while it goes and at its end: the diagnosis, and the page that shows everything."""

from __future__ import annotations

import time
from pathlib import Path

from seedbed.errors import SeedbedError
from seedbed.runs.diagnose import LIVE, diagnose
from seedbed.runs.folder import RunFolder
from seedbed.runs.report import write_report
from seedbed.train.announce import describe_findings
from seedbed.train.progress import Display

SHARE = 0.02  # of the time since a run was last looked at that looking at it again may take


class LiveDiagnosis:
    """Says what is clearly wrong with a run while it goes, each finding once."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._not_before = 0.0

    def look(self, run: RunFolder, display: Display) -> None:
        began = time.monotonic()
        if began < self._not_before:
            return
        try:
            found = [finding for finding in diagnose(run.path) if finding.name in LIVE and finding.level != "note"]
        except SeedbedError:  # a folder that is gone: what cannot be written there will be told
            return
        new = [finding for finding in found if finding.name not in self._said]
        self._said.update(finding.name for finding in new)
        describe_findings(display, new)
        ended = time.monotonic()
        self._not_before = ended + (ended - began) / SHARE


def look_back(run: Path, display: Display, *, report: bool) -> None:
    """Print what was wrong with a run that ended, however it did, and write its `report.html`."""
    try:
        describe_findings(display, diagnose(run))
        if report:
            display.line(f"Report: {write_report([run])}")
    except SeedbedError as error:  # not instead of what ended the run
        display.line(f"Warning: no report was written: {error}")
