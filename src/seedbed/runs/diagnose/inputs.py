"""Rules about what goes in, and what comes out: rows, padding, the making of batches, samples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from seedbed.findings import Finding
from seedbed.runs.diagnose.facts import Facts, number

SHORT_CONTEXT = 256  # tokens; and less than a quarter of the model's positions
SLOW, VERY_SLOW = 0.2, 0.4  # share of a step spent on making its batches
MUCH_PADDING, MOSTLY_PADDING = 0.3, 0.6
WORDS = 4  # that come again together
FEW_WORDS = 12
REPEATED, MOSTLY_REPEATED = 0.2, 0.5
ENOUGH_STEPS = 20


def short_context(facts: Facts) -> Iterator[Finding]:
    """Rows far shorter than a pretrained model can look back, of texts that are longer."""
    length, positions = facts.option("max_seq_len"), number(facts.part("shape"), "max_seq_len")
    if not facts.pretrained or not length or not positions:
        return
    longest = _longest(facts)
    if length >= SHORT_CONTEXT or length >= positions / 4 or longest is None or longest <= length:
        return
    longer = max(2, int(min(positions, 512)))
    batch = facts.option("batch_size") or 8
    yield Finding(
        "short_context",
        "warning",
        f"rows of --max_seq_len {length:.0f} show the model {length / positions:.1%} of the {positions:,.0f} positions "
        f"it was trained with, and texts are longer (up to {longest:,.0f} tokens)",
        {"max_seq_len": length, "model_max_seq_len": positions, "longest": longest},
        f"Set --max_seq_len {longer} --batch_size {max(1, int(batch * length // longer))}: as many tokens a step.",
    )


def slow_input(facts: Facts) -> Iterator[Finding]:
    """Steps that wait for their batches."""
    shares = facts.series.get("data_share")
    if shares is None or len(shares) < ENOUGH_STEPS:
        return
    share = float(np.median(shares.values[len(shares) // 10 :]))
    if share <= SLOW:
        return
    batch = int(facts.option("batch_size") or 8)
    yield Finding(
        "slow_input",
        "warning" if share > VERY_SLOW else "note",
        f"making batches took {share:.0%} of a usual step, in which nothing was learnt",
        {"data_share": share, "steps": len(shares)},
        f"Put the cache of tokenized text on a fast local disk (the environment variable SEEDBED_CACHE), or make fewer "
        f"and larger batches: --batch_size {2 * batch}.",
    )


def padding(facts: Facts) -> Iterator[Finding]:
    """Places of rows that hold nothing."""
    share, length = number(facts.part("text"), "padding"), facts.option("max_seq_len")
    if share is None or share <= MUCH_PADDING or length is None:
        return
    if facts.run.options.get("packing") is False:
        remedy = "Leave out --no_packing: several texts then share a row and do not see each other."
    else:
        longest = number(facts.part("text"), "longest")
        fits = f"--max_seq_len {longest:.0f}" if longest and longest < length else f"--max_seq_len {length / 2:.0f}"
        remedy = f"Set {fits}, which holds what there is in fewer places."
    yield Finding(
        "padding",
        "warning" if share > MOSTLY_PADDING else "note",
        f"{share:.0%} of the places in the rows are padding, which is computed and teaches nothing",
        {"padding": share, "max_seq_len": length},
        remedy,
    )


def repetition(facts: Facts) -> Iterator[Finding]:
    """The last samples say the same words over and over."""
    texts = [words for text in facts.texts if len(words := text.split()) >= FEW_WORDS]
    shares = [share_repeated(words) for words in texts]
    if not shares or max(shares[-1], float(np.median(shares))) <= REPEATED:
        return
    share = shares[-1]
    if share <= REPEATED:
        return
    place = facts.checkpoint("best", "final") or facts.run.path
    yield Finding(
        "repetition",
        "warning" if share > MOSTLY_REPEATED and facts.finished else "note",
        f"{share:.0%} of the runs of {WORDS} words in the last sample stood in it before. It was drawn with "
        "--repetition_penalty 1.1 and --top_k 50, which hold back repetition, so it is the model that repeats: it has "
        "learnt too little yet, or its text repeats itself",
        {"repeated": share, "samples": len(shares)},
        f"To hold the sampler back further: seedbed generate --model {place} --repetition_penalty 1.3 "
        f"--no_repeat_ngram {WORDS}.",
    )


def share_repeated(words: list[str]) -> float:
    """The share of all runs of four words that stood in the text before."""
    runs = list(zip(*(words[place:] for place in range(WORDS)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _longest(facts: Facts) -> float | None:
    """Tokens of the longest text; where only sums are known, of the mean one."""
    text = facts.part("text")
    longest, tokens, documents = (number(text, name) for name in ("longest", "tokens_per_epoch", "train_documents"))
    if longest is not None:
        return longest
    return tokens / documents if tokens and documents else None
