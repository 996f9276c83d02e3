"""How a domain is learnt when nothing else is said: which ways of keeping what was known, and the learning rate."""

from __future__ import annotations

from pathlib import Path

from seedbed.config import STRENGTHS, Config
from seedbed.errors import ConfigError
from seedbed.train.continual.memory import Memory, containing_run, trained_with

WITH_STORED_TEXT: dict[str, float | bool] = {"replay": 0.05, "l2_sp": 0.02}
WITHOUT_STORED_TEXT: dict[str, float | bool] = {"self_replay": 0.1, "l2_sp": 0.02}


def choose_methods(config: Config, memory: Memory) -> tuple[Config, str]:
    """The config with the strengths of all that `--method` names; for `auto`, why it was chosen.

    Raises:
        ConfigError: a method needs text that is not there.
    """
    keeping = config.keeping
    named = [part.strip() for part in keeping.method.split(",")]
    given = [name for name in STRENGTHS if getattr(keeping, name)]
    why = ""
    chosen = {name: STRENGTHS[name] for name in named if name in STRENGTHS and not getattr(keeping, name)}
    if named == ["auto"] and not given:
        chosen, why = _automatic(config, memory)
    config = config.update(f"--method {keeping.method}", **chosen) if chosen else config
    _require_texts(config, memory)
    return config, why


def _automatic(config: Config, memory: Memory) -> tuple[dict[str, float | bool], str]:
    """What measured best with the texts at hand (docs/continual-results.md), less what was switched off; and why."""
    off = {name for name in STRENGTHS if getattr(config.keeping, name) in (0, False)}
    if config.with_lora:
        off.add("l2_sp")
    stored = [stage.domain for stage in memory.earlier if stage.reserve_bytes]
    if stored and "replay" not in off:
        chosen, why = WITH_STORED_TEXT, f"there is stored text of {', '.join(stored)}, a little of which holds the rest"
    else:
        reason = "replay is switched off" if stored else "there is no stored text of what the model knew"
        writes = "it writes some itself" if "self_replay" not in off else "nothing is replayed"
        chosen, why = WITHOUT_STORED_TEXT, f"{reason}, so {writes}"
    return {name: value for name, value in chosen.items() if name not in off}, why


def _can_measure(memory: Memory) -> bool:
    """Whether there is held-out text of anything that the model knew."""
    return any(stage.held_out_bytes for stage in memory.earlier)


def _require_texts(config: Config, memory: Memory) -> None:
    """Raise ConfigError for methods that need text of what the model knew where there is none."""
    keeping, problems = config.keeping, []
    model = config.model.model
    if keeping.replay and not any(stage.reserve_bytes for stage in memory.earlier):
        problems.append(
            f"--replay {keeping.replay:g}: no text of what {model} knew is stored with it; name some with "
            "--general_data, or let the model write it: --self_replay"
        )
    if not _can_measure(memory):
        needing = [name for name in ("ewc", "interpolate") if getattr(keeping, name)]
        needing += [] if keeping.max_forgetting is None else ["max_forgetting"]
        problems += [
            f"--{name} needs held-out text of what {model} knew, and there is none; name some with --general_data"
            for name in needing
        ]
    if keeping.interpolate and not memory.learning.held_out_bytes:
        problems.append("--interpolate needs held-out text of the new domain; give --val_data or a --val_split")
    if problems:
        raise ConfigError(problems)


def inherit_learning_rate(config: Config, origin: Path) -> Config:
    """A model trained here is warmed up again to half the rate it was trained with, unless a rate was chosen.

    Ibrahim et al. (2024) warm up to the whole rate; half of it learns nearly as much and forgets less.
    """
    values = trained_with(origin)
    rate, regime = values.get("learning_rate"), values.get("regime", "scratch")
    if not isinstance(rate, float) or config.with_lora or config.is_given("learning_rate"):
        return config
    if regime == "scratch":
        return config.update(f"half the peak of {containing_run(origin)}", learning_rate=rate / 2)
    if regime == "continue":
        return config.update(f"the peak of {containing_run(origin)}", learning_rate=rate)
    return config
