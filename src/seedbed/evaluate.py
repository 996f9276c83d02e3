"""How well a model predicts text: nats per token, perplexities with their unit, bits per byte.

B windows of a batch   T tokens of the longest of them   D d_model   V vocabulary
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from seedbed import distributed
from seedbed.data.conversations import from_document
from seedbed.data.rows import NO_TARGET
from seedbed.data.store import split_long
from seedbed.errors import ConfigError, DataError
from seedbed.loss import token_losses
from seedbed.model.decoder import Decoder
from seedbed.parallel import is_sharded
from seedbed.text.template import Template
from seedbed.text.tokenizer import Tokenizer, batches_of_text

Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Window = tuple[Tokens, Mask]  # (n + 1,) tokens, and which of the last n are scored (n,)

SORTED_BATCHES: Final = 16  # so many batches of windows are sorted by length at once, to waste little on padding

# The tokenizers library holds some 450 bytes a token while it encodes; a longer text is given to it in pieces.
PIECE_CHARS: Final = 2**21


@dataclass(frozen=True)
class Evaluation:
    """A model's loss on a text, and the counts that give it a unit.

    Token perplexity compares models under one tokenizer only; word perplexity and bits per byte compare
    across tokenizers.
    """

    nats: float  # the sum over all predicted tokens
    tokens: int  # predicted; the first of each document is not
    words: int  # separated by white space
    bytes: int  # of the text in UTF-8
    max_seq_len: int
    stride: int
    cut: int = 0  # conversations longer than the context, of which only the beginning counts
    left_out: int = 0  # documents in which nothing is predicted, and which no count above has

    @property
    def nats_per_token(self) -> float:
        """The mean loss."""
        return self.nats / self.tokens

    @property
    def token_ppl(self) -> float:
        """The exponential of the nats per token; infinite when that is too large for a float."""
        return _exp(self.nats_per_token)

    @property
    def word_ppl(self) -> float:
        """The exponential of the nats per word; infinite when that is too large, or there is no word."""
        return _exp(self.nats / self.words) if self.words else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits the model needs for a byte of the text."""
        return self.nats / math.log(2) / self.bytes

    def to_json(self, model: str, data: str) -> dict[str, Any]:
        """What `evaluate --json` prints; a value that is not finite is None.

        Args:
            model: which model was evaluated.
            data: on which text.
        """
        values = {
            "nats_per_token": self.nats_per_token,
            "token_ppl": self.token_ppl,
            "word_ppl": self.word_ppl,
            "bits_per_byte": self.bits_per_byte,
        }
        return {
            **{name: value if math.isfinite(value) else None for name, value in values.items()},
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
            "max_seq_len": self.max_seq_len,
            "stride": self.stride,
            "cut": self.cut,
            "left_out": self.left_out,
            "model": model,
            "data": data,
        }


def evaluate(
    model: Decoder,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    max_seq_len: int,
    stride: int | None = None,
    batch_size: int = 8,
    template: Template | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Predict every token of every document but the first, each once; of conversations, the answers.

    A document is tokenized as one string with nothing added, and its first token is context only; one of a
    single token predicts nothing and is left out of every count. Longer ones than `max_seq_len` are read in
    windows (see `windows`), and no context goes from one window or document to the next. A conversation is one
    window; of a longer one the beginning counts.

    Memory holds one document's tokens and a few batches, never the logits of a batch. Sums are in float64. Of several
    processes, each scores some of the batches.

    Args:
        model: products run in the type of autocast where it is on, else in the model's; its training mode is restored.
        tokenizer: the one the model was trained with.
        documents: the texts, or conversations as `data.conversations` writes them, read once.
        max_seq_len: tokens predicted in one window, and the most that any of them sees.
        stride: targets by which one window is further than the last, `max_seq_len` by default. A smaller
            one gives tokens more context, each at least `max_seq_len - stride` tokens where the document has
            them, and costs `max_seq_len / stride` times as much.
        batch_size: windows predicted at once.
        template: reads the conversations; None for texts.
        progress: called after each batch with the number of tokens predicted so far.

    Raises:
        ConfigError: `max_seq_len` is above the model's positions, or `stride` is not from 1 to `max_seq_len`.
        DataError: no document has two tokens.
    """
    stride = max_seq_len if stride is None else stride
    _check_window(model.config.max_seq_len, max_seq_len, stride)
    count = _Count()
    nats, tokens = 0.0, 0
    if template is None:
        every = _windows(tokenizer, documents, max_seq_len, stride, count)
    else:
        every = _conversations(template, documents, max_seq_len, count)
    with evaluation_mode(model):
        for number, batch in enumerate(_batches(every, batch_size)):
            if number % distributed.size() == distributed.rank():
                nats += _score(model, batch)
            tokens += sum(int(scored.sum()) for _, scored in batch)
            if progress:
                progress(tokens)
    nats = distributed.total(nats)
    if not tokens and template is None:
        raise DataError(
            f"There is nothing to predict: of {count.documents:,} documents none has two tokens. Give a longer text."
        )
    if not tokens:
        raise DataError(
            f"There is nothing to predict: of {count.documents:,} conversations none has an answer that begins within "
            f"{max_seq_len:,} tokens. Raise --max_seq_len, or shorten the questions."
        )
    sizes = round(count.words), max(1, round(count.bytes))
    return Evaluation(nats, tokens, *sizes, max_seq_len, stride, count.cut, count.left_out)


def windows(tokens: Tokens, max_seq_len: int, stride: int) -> Iterator[tuple[Tokens, int]]:
    """Cut a document into windows of up to `max_seq_len` predicted tokens, each `stride` after the last.

    A window is a stretch of tokens, the first of them context only, with how many of its last tokens are
    scored: all it predicts in the first window, and after that those that no window before it reached.

    >>> [(w.tolist(), scored) for w, scored in windows(np.arange(8, dtype=np.int32), max_seq_len=4, stride=2)]
    [([0, 1, 2, 3, 4], 4), ([2, 3, 4, 5, 6], 2), ([4, 5, 6, 7], 1)]
    """
    targets, reached = len(tokens) - 1, 0
    for start in range(0, targets, stride):
        end = min(start + max_seq_len, targets)
        yield tokens[start : end + 1], end - reached
        reached = end
        if reached == targets:
            return


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode inside, and in the mode it was in after."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def evaluation_mode(model: Decoder) -> Iterator[None]:
    """No dropout and no gradients inside."""
    # Weights that FSDP gathers in the first pass stay, and training goes on with them.
    with without_dropout(model), torch.no_grad() if is_sharded(model) else torch.inference_mode():
        yield


@dataclass
class _Count:
    documents: int = 0
    words: float = 0
    bytes: float = 0
    cut: int = 0
    left_out: int = 0

    def add(self, text: str, share: float = 1) -> None:
        """Count the words and bytes of a text of which so much is predicted."""
        self.words += share * sum(1 for _ in re.finditer(r"\S+", text))
        self.bytes += share * len(text.encode())


def _windows(
    tokenizer: Tokenizer, documents: Iterable[str], max_seq_len: int, stride: int, count: _Count
) -> Iterator[Window]:
    """The windows of all documents; their texts are counted on the way."""
    for texts in batches_of_text(documents):
        pieces = [split_long(text, PIECE_CHARS) for text in texts]
        in_batches = batches_of_text(piece for some in pieces for piece in some)
        encoded = (np.array(ids, dtype=np.int32) for batch in in_batches for ids in tokenizer.encode_batch(batch))
        for text, some in zip(texts, pieces, strict=True):
            tokens = np.concatenate(list(islice(encoded, len(some))))
            count.documents += 1
            count.left_out += len(tokens) < 2
            if len(tokens) > 1:
                count.add(text)
                for window, scored in windows(tokens, max_seq_len, stride):
                    yield window, np.arange(len(window) - 1) >= len(window) - 1 - scored


def _conversations(template: Template, documents: Iterable[str], max_seq_len: int, count: _Count) -> Iterator[Window]:
    """One window for each conversation, its answers scored; the answers' words and bytes are counted."""
    for document in documents:
        example = template.example(from_document(document))
        tokens = np.array(example.token_ids[: max_seq_len + 1], dtype=np.int32)
        scored = np.array(example.trained[1 : max_seq_len + 1], dtype=np.bool_)
        count.documents += 1
        count.cut += len(example.token_ids) > len(tokens)
        count.left_out += not scored.any()
        if scored.any():
            for answer in example.answers:
                count.add(answer, int(scored.sum()) / sum(example.trained[1:]))
            yield tokens, scored


def _batches(source: Iterator[Window], batch_size: int) -> Iterator[list[Window]]:
    """Batches of windows of about the same length."""
    while pool := list(islice(source, batch_size * SORTED_BATCHES)):
        pool.sort(key=lambda window: len(window[0]), reverse=True)
        for first in range(0, len(pool), batch_size):
            yield pool[first : first + batch_size]


def _score(model: Decoder, batch: list[Window]) -> float:
    """Sum of the nats of the tokens scored."""
    longest = max(len(tokens) - 1 for tokens, _ in batch)
    inputs = torch.zeros(len(batch), longest, dtype=torch.int64)  # (B, T)
    labels = torch.full_like(inputs, NO_TARGET)
    for row, (tokens, scored) in enumerate(batch):
        size = len(tokens) - 1
        inputs[row, :size] = torch.from_numpy(tokens[:-1])
        labels[row, :size] = torch.from_numpy(np.where(scored, tokens[1:], NO_TARGET))
    weight = model.head_weight()
    hidden = model(inputs.to(weight.device))  # (B, T, D)
    losses = token_losses(hidden.flatten(0, 1), weight, labels.flatten().to(weight.device))  # (B * T,)
    return float(losses.cpu().double().sum())


def _check_window(positions: int, max_seq_len: int, stride: int) -> None:
    problems = []
    if not 1 <= max_seq_len <= positions:
        problems.append(
            f"max_seq_len {max_seq_len:,} does not fit the model, which has {positions:,} positions; "
            f"give a value from 1 to {positions:,}."
        )
    if not 1 <= stride <= max_seq_len:
        problems.append(
            f"stride {stride:,} would skip tokens or stand still; give a value from 1 to max_seq_len, "
            f"which is {max_seq_len:,}."
        )
    if problems:
        raise ConfigError(problems)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
