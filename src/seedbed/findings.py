"""What the program noticed: before training (guardrails, a look at the data) or after it (diagnosis)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from seedbed.errors import ConfigError, did_you_mean

Level = Literal["note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing noticed, what speaks for it, and what to do.

    >>> print(Finding("warmup", "note", "there is no warm-up", {"warmup_steps": 0}, "Set --warmup_ratio 0.1."))
    there is no warm-up. Set --warmup_ratio 0.1.
    """

    name: str
    """The option or the fact it concerns, in snake case; `--allow` takes it."""
    level: Level
    message: str
    """A sentence without its full stop: what, where, and what was expected."""
    evidence: dict[str, Any]
    """The numbers behind the message; JSON can hold them."""
    remedy: str
    """One or two whole sentences."""

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_allowed(allow: Iterable[str], known: Sequence[str]) -> None:
    """Refuse names in `--allow` that no finding has.

    Raises:
        ConfigError: every unknown name, with the nearest known one.
    """
    unknown = [name for name in allow if name not in known]
    if unknown:
        raise ConfigError([f"--allow {name}: no finding has this name{did_you_mean(name, known)}" for name in unknown])


def sift(findings: Iterable[Finding], *, strict: bool, allow: Collection[str]) -> list[Finding]:
    """The findings to show: all but the notes and warnings that `allow` names.

    Raises:
        ConfigError: every error, which cannot be allowed, and with `strict` every warning too.
    """
    shown = [finding for finding in findings if finding.level == "error" or finding.name not in allow]
    fatal = ("error", "warning") if strict else ("error",)
    if problems := [str(finding) for finding in shown if finding.level in fatal]:
        raise ConfigError(problems)
    return shown
