"""What a history says: what was learnt, what was forgotten, and how that compares with a naive run. Needs no torch.

Bits per byte throughout: fewer are better, and they compare across tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from seedbed.runs.history import Figure, History, Stage


@dataclass(frozen=True)
class MatrixRow:
    """What a model could do after one stage."""

    domain: str
    """The stage."""
    figures: Mapping[str, Figure]
    """By domain; empty while the stage is being learnt."""


@dataclass(frozen=True)
class AgainstNaive:
    """One way to learn a domain against learning it naively."""

    gain_share: float
    """This stage's gain on its own domain / the naive stage's."""
    forgetting_avoided: float | None
    """1 - this stage's mean rise in bits per byte on earlier domains / the naive stage's; None if it forgot nothing."""


def matrix(history: History) -> list[MatrixRow]:
    """For every stage, the base first, the figures of all domains known by then, after it.

    The base's are those at the beginning of the first stage, with the figure of that stage's domain before it was
    learnt.
    """
    rows = [MatrixRow(stage.domain, stage.after) for stage in history.stages]
    if len(rows) > 1:
        rows[0] = MatrixRow(rows[0].domain, {**rows[0].figures, **history.stages[1].before})
    return rows


def forgetting(before: Figure, after: Figure) -> float:
    """The relative rise in bits per byte, (after - before) / before; negative where the text is predicted better.

    >>> forgetting(Figure(2.0, 1.0), Figure(2.5, 1.25))
    0.25
    """
    return after.bits_per_byte / before.bits_per_byte - 1 if before.bits_per_byte else float(after.bits_per_byte > 0)


def backward_transfer(history: History) -> float | None:
    """Mean over earlier domains d of b(d after d) - b(d now), in bits per byte b, so that negative is forgetting.

    `now` is after the newest stage that was learnt to its end. Domains that were not measured at both times are left
    out, and None says that none was. Lopez-Paz and Ranzato (2017) define it so, for accuracies.
    """
    rows = [row for row in matrix(history) if row.figures]
    now = rows[-1].figures if rows else {}
    changes = [
        row.figures[row.domain].bits_per_byte - now[row.domain].bits_per_byte
        for row in rows[:-1]
        if row.domain in row.figures and row.domain in now
    ]
    return fmean(changes) if changes else None


def gain_kept(history: History, domain: str) -> float | None:
    """Of what was gained on a domain as it was learnt, the share that is left: (before - now) / (before - after).

    More than 1 where later domains helped. None when nothing was gained or measured; so for the base.
    """
    stage = history.stage(domain)
    gain = _gain(stage) if stage else None
    now = next((row.figures for row in reversed(matrix(history)) if row.figures), {})
    if not stage or not gain or gain < 0 or domain not in now:
        return None
    return (stage.before[domain].bits_per_byte - now[domain].bits_per_byte) / gain


def against(stage: Stage, naive: Stage) -> AgainstNaive | None:
    """How a stage compares with a naive one that learnt the same domain; both should begin from the same model.

    gain_share = (before - after) / naive (before - after), in bits per byte of their own domain.
    forgetting_avoided = 1 - mean(after - before) / naive mean(after - before), over the earlier domains that both
    measured. None when the domains differ, or the naive stage gained nothing, or there are no figures.
    """
    gain, naive_gain = _gain(stage), _gain(naive)
    if stage.domain != naive.domain or gain is None or not naive_gain or naive_gain < 0:
        return None
    rises, naive_rises = _rises(stage), _rises(naive)
    both = rises.keys() & naive_rises.keys()
    naive_rise = fmean(naive_rises[domain] for domain in both) if both else 0.0
    avoided = 1 - fmean(rises[domain] for domain in both) / naive_rise if naive_rise > 0 else None
    return AgainstNaive(gain / naive_gain, avoided)


def method_in_words(method: Mapping[str, Any]) -> str:
    """How a stage was learnt, from the options that its history gives; `lora` is the rank.

    >>> method_in_words({"replay": 0.05, "learning_rate": 2e-05})
    'replay 5 %, whole model, peak rate 2e-05'
    >>> method_in_words({})
    'naive'
    """
    left = {name: value for name, value in method.items() if value not in (None, 0, "")}  # 0 is also False
    words = [_phrase(phrase, left.pop(name)) for name, phrase in _KEEPING.items() if name in left] or ["naive"]
    if method and not left.keys() & {"lora", "last_blocks", "freeze"}:
        words.append("whole model")
    words += [_phrase(phrase, left.pop(name)) for name, phrase in _TRAINING.items() if name in left]
    words += [_phrase(name.replace("_", " ") + " {value}", value) for name, value in left.items()]
    return ", ".join(words)


_KEEPING = {
    "replay": "replay {share}",
    "self_replay": "self-replay {share}",
    "l2_sp": "L2-SP {value}",
    "ewc": "EWC {value}",
    "kl": "KL {value}",
    "interpolate": "interpolated {value}",
}
_TRAINING = {
    "lora": "LoRA of rank {value}",
    "last_blocks": "last blocks: {value}",
    "freeze": "frozen: {value}",
    "learning_rate": "peak rate {value}",
}


def _phrase(phrase: str, value: Any) -> str:
    share = f"{value * 100:g} %" if isinstance(value, int | float) else value
    number = f"{value:g}" if isinstance(value, int | float) else value
    return phrase.format(value="" if value is True else number, share=share).strip()


def _gain(stage: Stage) -> float | None:
    """By how many bits per byte the stage's own domain is predicted better."""
    if stage.domain not in stage.before or stage.domain not in stage.after:
        return None
    return stage.before[stage.domain].bits_per_byte - stage.after[stage.domain].bits_per_byte


def _rises(stage: Stage) -> dict[str, float]:
    """By how many bits per byte each earlier domain is predicted worse."""
    return {
        domain: stage.after[domain].bits_per_byte - figure.bits_per_byte
        for domain, figure in stage.before.items()
        if domain != stage.domain and domain in stage.after
    }
