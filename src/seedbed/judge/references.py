"""How near an answer is to the reference, without a judge."""

from __future__ import annotations

from seedbed.data.conversations import words_of
from seedbed.errors import MissingExtra


def exact_match(answer: str, reference: str) -> bool:
    """Whether both have the same words, whatever their case, white space and the signs around words.

    >>> exact_match("Forty-two", " forty-two.")
    True
    """
    return words_of(answer) == words_of(reference)


def chrf(answer: str, reference: str) -> float:
    """Share of character n-grams in common, 0 to 100 (Popović, 2015), as sacrebleu counts it for a sentence.

    Raises:
        MissingExtra: sacrebleu is not installed.
    """
    try:
        from sacrebleu import sentence_chrf
    except ImportError:
        raise MissingExtra("Reference metrics", "judge") from None
    return float(sentence_chrf(answer, [reference]).score)
