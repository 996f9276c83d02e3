"""What went wrong in a run, and what to change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import click

from seedbed.cli.console import json_option, print_json, print_lines, wrapped
from seedbed.cli.verb import Verb, refuse_unknown
from seedbed.findings import Finding


@click.command("diagnose", cls=Verb, epilog="Example: seedbed diagnose runs/book")
@click.argument("folder", metavar="RUN")
@json_option
@click.pass_context
def diagnose(ctx: click.Context, /, folder: str, as_json: bool) -> None:
    """Say what went wrong in a run, which numbers show it, and which flags to change; of a healthy run, nothing.

    RUN is a run folder or one of its checkpoints. The run may still be going on.
    """
    refuse_unknown(ctx)
    from seedbed.runs.diagnose import find, read_facts

    facts = read_facts(folder)
    findings = find(facts)
    looked_at = {
        "status": facts.status,
        "steps": len(facts.train),
        "validations": len(facts.val),
        "samples": len(facts.texts),
        "events": len(facts.events),
    }
    if as_json:
        shown = [finding.to_json() for finding in findings]
        print_json({"run": str(facts.run.path), "findings": shown, "looked_at": looked_at})
        return
    print_lines(_lines(findings, looked_at))


def _lines(findings: Sequence[Finding], looked_at: dict[str, Any]) -> Iterator[str]:
    """A paragraph a finding; where there is none, what was looked at. Before them, that the summary is damaged."""
    damaged = looked_at["status"] == "unreadable"
    if damaged:
        yield from wrapped(
            "Warning: metrics.json is damaged, so how the run ended is unknown, and only its records were looked at. "
            "Put a copy of it back, or start the run's command again: it goes on, and writes a new one."
        )
        yield ""
    for number, finding in enumerate(findings):
        if number:
            yield ""
        yield from wrapped(f"{finding.level.capitalize()} ({finding.name}): {finding}")
    if not findings:
        figures = ", ".join(f"{count:,} {what}" for what, count in looked_at.items() if what != "status")
        healthy = "of its records" if damaged else "the run looks healthy"
        verdict = healthy if looked_at["steps"] else "the run has not made a step"
        yield from wrapped(f"Nothing to say: {verdict} ({figures}; status {looked_at['status']})")
