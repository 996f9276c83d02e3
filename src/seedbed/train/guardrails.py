"""What is likely to go wrong with a run, said before its first step.

Each rule looks at the facts and yields what it finds. The ranges are of AdamW: from the field's recipes, and from
runs in which a rate for training from scratch ruined a pretrained model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from seedbed.config import FLAGS, REGIMES, Config, rate_range
from seedbed.findings import Finding, Level

NAMES = (
    "learning_rate",
    "max_seq_len",
    "warmup",
    "epochs",
    "few_steps",
    "all_masked",
    "eos_masked",
    "truncated",
    "lora_alpha",
    "lora_scaling",
)
"""Every finding that `check` can make."""

SHORT_CONTEXT = 256  # tokens; and less than a quarter of what the model was trained with
FEW_STEPS = 20  # optimizer updates, after which a loss curve is still noise
RATHER_FEW_STEPS = 100  # and a pretrained model has hardly moved
FEW_EXAMPLES = 1000
MANY_EPOCHS = 10
MANY_EPOCHS_OF_FEW = 5
LORA_SCALES = (0.5, 4.0)  # alpha / r
USUAL_ALPHA = 32.0


@dataclass(frozen=True)
class Facts:
    """What is known of a run before it starts; None is unknown, and rules that need it say nothing."""

    config: Config
    model_max_seq_len: int | None = None
    """Positions of the pretrained model; None from scratch."""
    trained_at: float | None = None
    """Peak learning rate of the run that made the model, when that is known."""
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    warmup_steps: int | None = None
    documents: int | None = None
    """Training documents or examples."""
    truncated: int | None = None
    """Examples of more than `max_seq_len` tokens that are cut."""
    longest: int | None = None
    """Tokens of the longest example before any cut."""
    untrained: int | None = None
    """Examples without a single target left."""
    end_masked: int | None = None
    """Examples whose answer's end is not a target."""
    trained_tokens: int | None = None


def check(facts: Facts) -> list[Finding]:
    """Everything to say about a run with these facts; nothing for a sound one."""
    rules = (_learning_rate, _context, _warmup, _epochs, _few_steps, _all_masked, _eos_masked, _truncated, _lora)
    return [finding for rule in rules for finding in rule(facts)]


def _learning_rate(facts: Facts) -> Iterator[Finding]:
    training = facts.config.training
    rate, (low, high) = training.learning_rate, rate_range(facts.config.regime, facts.trained_at)
    if training.optimizer in ("sgd", "muon") or low <= rate <= high:
        return
    above = rate > high
    factor = rate / high if above else low / rate
    times = f"{factor:,.0f}" if factor >= 10 else f"{factor:.2g}"
    doing = REGIMES[facts.config.regime].doing
    side = f"{times} times the top of" if above else f"{times} times below the bottom of"
    yield Finding(
        "learning_rate",
        "warning" if above or factor > 10 else "note",
        f"--learning_rate {_short(rate)} is {side} the range for {doing} ({_short(low)} to {_short(high)}); "
        f"{_place(facts, 'learning_rate')}",
        {"learning_rate": rate, "range": [low, high], "regime": facts.config.regime},
        f"{'Lower' if above else 'Raise'} it, or pass --allow learning_rate to keep it{_own_rate(facts)}.",
    )


def _own_rate(facts: Facts) -> str:
    """What a small model that was made here may bear, whatever large ones do."""
    if facts.trained_at is None or facts.config.regime != "finetune":
        return ""
    return f" (this model was made with {_short(facts.trained_at)}, and may bear as much again)"


def _context(facts: Facts) -> Iterator[Finding]:
    """Short rows show a pretrained model less than it can look back at, unless the examples are that short."""
    length, positions = facts.config.data.max_seq_len, facts.model_max_seq_len
    if positions is None or length >= SHORT_CONTEXT or length >= positions / 4:
        return
    if facts.longest is not None and facts.longest <= length:
        return
    yield Finding(
        "max_seq_len",
        "warning",
        f"--max_seq_len {length} is far below the {positions:,} positions the model was trained with; "
        f"{_place(facts, 'max_seq_len')}",
        {"max_seq_len": length, "model_max_seq_len": positions, "longest": facts.longest},
        f"Set --max_seq_len {min(positions, 512)} with a smaller --batch_size, or pass --allow max_seq_len to keep it.",
    )


def _warmup(facts: Facts) -> Iterator[Finding]:
    training, warmup, total = facts.config.training, facts.warmup_steps, facts.total_steps
    name = "warmup_ratio" if training.warmup_steps is None else "warmup_steps"
    value = getattr(training, name) or 0
    if value == 0 and facts.config.regime != "scratch":
        yield Finding(
            "warmup",
            "note",
            f"--{name} {value:g}: the first steps have the full learning rate, before AdamW knows how large the "
            f"gradients are; {_place(facts, name)}",
            {"warmup_steps": 0},
            "Set --warmup_ratio 0.1 for a smoother start.",
        )
    if warmup and total and warmup > total / 2:
        reached = "has less than half of itself left after it" if warmup < total else "never leaves the warm-up"
        yield Finding(
            "warmup",
            "warning",
            f"--{name} {value:g} is {warmup:,} steps of warm-up, and the run of {total:,} steps {reached}; "
            f"{_place(facts, name)}",
            {"warmup_steps": warmup, "total_steps": total},
            "Set --warmup_ratio 0.1, or pass --allow warmup to keep it.",
        )


def _epochs(facts: Facts) -> Iterator[Finding]:
    """A pretrained model soon knows a small text by heart; from scratch, many passes are usual."""
    config, epochs = facts.config, _planned_epochs(facts)
    if config.regime == "scratch" or epochs is None:
        return
    patience = config.watching.early_stopping_patience if config.data.val_data or config.data.val_split else 0
    few = facts.documents is not None and facts.documents < FEW_EXAMPLES
    limit = MANY_EPOCHS_OF_FEW if few and not patience else MANY_EPOCHS
    if epochs <= limit:
        return
    name = _limit(facts)
    data = f"{facts.documents:,} examples" if few else "the same examples"
    stopping = f"on, after {patience} epochs without progress" if patience else "off"
    yield Finding(
        "epochs",
        "note" if patience else "warning",
        f"--{name} {getattr(config.training, name)} is {epochs:.3g} passes over {data}, and after about {limit} a "
        f"pretrained model learns them by heart; {_place(facts, name)}; early stopping is {stopping}",
        {"epochs": epochs, "documents": facts.documents, "early_stopping_patience": patience},
        "The checkpoint best/ keeps what generalised; lower it to save time."
        if patience
        else "Lower it, or hold data out and set --early_stopping_patience 3, or pass --allow epochs to keep it.",
    )


def _few_steps(facts: Facts) -> Iterator[Finding]:
    training, steps = facts.config.training, facts.total_steps
    enough = FEW_STEPS if facts.config.regime == "scratch" else RATHER_FEW_STEPS
    if steps is None or steps >= enough or _limit(facts) != "epochs":
        return
    rows = training.rows_per_step
    yield Finding(
        "few_steps",
        "warning" if steps < FEW_STEPS else "note",
        f"the run is {steps} steps of {rows} rows, too few to learn much (at least {enough} are usual); "
        f"--batch_size {training.batch_size}, {_place(facts, 'batch_size')}; --epochs {training.epochs}, "
        f"{_place(facts, 'epochs')}",
        {"total_steps": steps, "batch_size": training.batch_size, "grad_accumulation": training.grad_accumulation},
        "Lower --batch_size or --grad_accumulation (a packed row holds many short examples), raise --epochs, or give "
        "--data more text.",
    )


def _all_masked(facts: Facts) -> Iterator[Finding]:
    untrained, documents = facts.untrained, facts.documents
    nothing = facts.trained_tokens == 0 or (untrained is not None and documents and untrained == documents)
    if not nothing and not (untrained and documents):
        return
    if nothing:
        level: Level = "error"
        message = "no token of the training data is a target, so there is nothing to learn"
    else:
        assert untrained and documents
        level = _level(untrained, documents)
        message = f"{_share(untrained, documents)} have no target at all and teach nothing"
    answer = "An answer is missing in those rows, or the mask hides it: `seedbed data show` prints it."
    yield Finding(
        "all_masked",
        level,
        message,
        {"untrained": untrained, "documents": documents, "trained_tokens": facts.trained_tokens},
        f"The questions alone fill the row. {_longer_rows(facts)}" if facts.truncated else answer,
    )


def _eos_masked(facts: Facts) -> Iterator[Finding]:
    masked, documents = facts.end_masked, facts.documents
    if not masked or not documents:
        return
    cut = masked <= (facts.truncated or 0)
    template = "End every answer of --chat_template with the end of text, inside what is trained on."
    yield Finding(
        "eos_masked",
        _level(masked, documents),
        f"the end of the answer is not a target in {_share(masked, documents)}, so the model does not learn there to "
        "stop",
        {"end_masked": masked, "documents": documents, "truncated": facts.truncated},
        _longer_rows(facts) if cut else template,
    )


def _truncated(facts: Facts) -> Iterator[Finding]:
    truncated, documents = facts.truncated, facts.documents
    if not truncated or not documents:
        return
    length = facts.config.data.max_seq_len
    longest = "" if facts.longest is None else f"; the longest has {facts.longest:,}"
    yield Finding(
        "truncated",
        _level(truncated, documents, of_concern=0.05),
        f"{_share(truncated, documents)} are cut at --max_seq_len {length} tokens, {_place(facts, 'max_seq_len')}"
        f"{longest}",
        {"truncated": truncated, "documents": documents, "max_seq_len": length, "longest": facts.longest},
        _longer_rows(facts),
    )


def _lora(facts: Facts) -> Iterator[Finding]:
    """Adapters begin as B A with B = 0 (Hu et al., 2021), multiplied by alpha / r.

    Adam's first update of B has entries of plus or minus the learning rate, and the r products add up. So weights
    begin to move with rate · scale · r: with rate · alpha whatever the rank, and with rsLoRA's
    alpha / sqrt(r) (Kalajdzievski, 2023) faster at high ranks.
    """
    config, adapt = facts.config, facts.config.adapt
    if not config.with_lora:
        return
    r, alpha, (low, high) = adapt.lora_r, adapt.lora_alpha, LORA_SCALES
    if not adapt.lora_rslora and not low <= alpha / r <= high:
        yield Finding(
            "lora_alpha",
            "warning" if alpha / r > high else "note",
            f"--lora_alpha {alpha:g} with --lora_r {r} scales the adapters by {alpha / r:.3g}, and {low:g} to {high:g} "
            f"is usual; alpha {_place(facts, 'lora_alpha')}, r {_place(facts, 'lora_r')}",
            {"lora_alpha": alpha, "lora_r": r, "scale": alpha / r, "range": [low, high]},
            f"Set --lora_alpha {2 * r}, or pass --allow lora_alpha to keep it.",
        )
        return
    scale = alpha / math.sqrt(r) if adapt.lora_rslora else alpha / r
    rate, top = config.training.learning_rate, rate_range("lora")[1]
    equivalent = rate * scale * r / USUAL_ALPHA
    if rate <= top < equivalent and config.training.optimizer not in ("sgd", "muon"):
        how = "alpha / sqrt(r)" if adapt.lora_rslora else "alpha / r"
        yield Finding(
            "lora_scaling",
            "note",
            f"--learning_rate {_short(rate)} moves adapters of rank {r} and alpha {alpha:g}, scaled by {how}, as fast "
            f"as {_short(equivalent)} moves those of alpha {USUAL_ALPHA:g}, which is above the usual {_short(top)}; "
            f"{_place(facts, 'learning_rate')}",
            {"learning_rate": rate, "lora_alpha": alpha, "lora_r": r, "equivalent_learning_rate": equivalent},
            f"If the loss jumps at the end of the warm-up, lower --lora_alpha to {alpha * top / equivalent:.0f}.",
        )


def _planned_epochs(facts: Facts) -> float | None:
    """Passes over the data, also where steps limit the run; None where only the clock does."""
    training = facts.config.training
    if facts.total_steps and facts.steps_per_epoch:
        return facts.total_steps / facts.steps_per_epoch
    if training.max_steps or training.max_tokens or training.lr_schedule == "cosine_time":
        return None
    return float(training.epochs)


def _limit(facts: Facts) -> str:
    """The option that says how long the run is."""
    training, steps = facts.config.training, facts.total_steps
    if training.max_steps is not None and training.max_steps == steps:
        return "max_steps"
    by_tokens = training.max_tokens is not None and steps != training.epochs * (facts.steps_per_epoch or 0)
    return "max_tokens" if by_tokens else "epochs"


def _longer_rows(facts: Facts) -> str:
    """What to do about examples that do not fit."""
    length, longest, positions = facts.config.data.max_seq_len, facts.longest, facts.model_max_seq_len
    if positions is not None and length >= positions:
        return f"The model takes no more than {positions:,} tokens: shorten the examples."
    if longest is None:
        return "Raise --max_seq_len, or shorten the examples."
    if positions is None or longest <= positions:
        return f"Set --max_seq_len {longest}, or shorten the examples."
    return f"Set --max_seq_len {positions}, the most the model takes, and shorten what is longer."


def _level(count: int, total: int, of_concern: float = 0.01) -> Level:
    return "warning" if count >= of_concern * total else "note"


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} examples ({count / total:.1%})"


def _place(facts: Facts, name: str) -> str:
    source = facts.config.sources[name]
    return "set on the command line" if source == FLAGS else f"from {source}"


def _short(value: float) -> str:
    """A rate as people write it: 3e-4, 2.5e-5."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
