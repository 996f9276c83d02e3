"""Text from a model: prompts in batches, and text streamed as it is written.

What a text said before it often says again. So the tokens that followed the newest ones at their last place are read
along with them, and those that the model chooses too are taken in one pass instead of one each (prompt lookup decoding;
Saxena, 2023). The text is the same as without.

B batch   T tokens so far, padded on the left   N tokens read at once   V vocabulary
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from seedbed.config import SamplingOptions
from seedbed.errors import ConfigError
from seedbed.evaluate import evaluation_mode
from seedbed.lookup import Lookup
from seedbed.model.decoder import Decoder
from seedbed.model.decoding import DecodingModel, Rereading
from seedbed.parallel import is_sharded
from seedbed.sampling import looks_back, next_tokens, uniform_rows
from seedbed.text.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]
OnText = Callable[[int, str], None]

MOST_GUESSED: Final = 8
TOKENS_OF_A_PASS: Final = 18  # that take as long as all of a pass that does not grow with them, on a CPU with bf16
UNREADABLE: Final = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt."""

    prompt: str
    text: str  # without the prompt, and without the stop string and what follows it
    token_ids: tuple[int, ...]  # all that were written: those of a stop string, too, but not eos
    finish_reason: FinishReason


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    options: SamplingOptions,
    *,
    batch_size: int = 16,
    on_text: OnText | None = None,
    decoding: DecodingModel | None = None,
) -> list[Completion]:
    """Continue each prompt; completions come in the order of the prompts.

    A prompt is continued as it is; an empty one starts a document, from the tokenizer's bos or else its eos.
    A row ends at an end token, before a stop string, after `options.max_new_tokens`, or when the model has no
    position left for another token. What is written depends on the prompt and the seed, not on the other
    prompts; a prompt given several times gets other random numbers each time.

    Args:
        model: products run in the type of autocast where it is on, else in the model's; its training mode is
            restored. Where every process has a part of it, all of them call this together.
        tokenizer: the one the model was trained with.
        prompts: texts, or token ids (a conversation's, see `Template.prompt_ids`); `batch_size` at a time.
        options: how to choose tokens and when to stop.
        batch_size: prompts written at once.
        on_text: called with a prompt's index and the next piece of its text: whole characters, and never a
            part of a stop string. The pieces add up to `Completion.text`.
        decoding: `model`, laid out for writing; by default that is done anew, which takes its memory once more.

    Raises:
        ConfigError: a prompt has more tokens than the model has positions, or a stop string is empty.
    """
    rows = _rows(model, tokenizer, prompts, options)
    writer = decoding or (Rereading(model) if is_sharded(model) else DecodingModel(model))
    device = model.embed_tokens.weight.device.type
    # What decodes chooses its types itself.
    with evaluation_mode(model), torch.autocast(device, enabled=False):
        for first in range(0, len(rows), batch_size):
            _write(writer, rows[first : first + batch_size], options, on_text)
    return [row.completion() for row in rows]


def check_prompts(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str | Sequence[int]], options: SamplingOptions
) -> None:
    """Raise ConfigError where `generate` would, so that nothing has to be shown before."""
    _rows(model, tokenizer, prompts, options)


def _write(
    decoding: DecodingModel | Rereading, rows: list[_Row], options: SamplingOptions, on_text: OnText | None
) -> None:
    """Read the prompts, then add tokens to every row at a time until the last row ends."""
    # The last token of a row is never fed.
    logits = decoding.read([row.prompt_ids for row in rows], max(len(row.prompt_ids) + row.limit for row in rows) - 1)
    guesses: list[list[int]] = [[] for _ in rows]
    _take(rows, guesses, logits[:, None], options, on_text)
    while going := [row for row in rows if not row.finish_reason]:
        if len(going) <= len(rows) / 2:
            decoding.keep([index for index, row in enumerate(rows) if not row.finish_reason])
            rows = going
        most = worth_guessing([row.lookup.luck for row in going], len(rows))
        guesses = [row.guess(most) for row in rows]
        fed = [[row.lookup.tokens[-1], *guess] for row, guess in zip(rows, guesses, strict=True)]
        added = max(map(len, fed))
        padded = [[*tokens, *[0] * (added - len(tokens))] for tokens in fed]  # (B, N)
        logits = decoding.step(torch.tensor(padded, device=logits.device))  # (B, N, V)
        taken = _take(rows, guesses, logits, options, on_text)
        decoding.forget([added - count for count in taken])


def worth_guessing(lucks: Sequence[float], rows: int) -> int:
    """How many guesses for each of the rows let them write soonest, if they are met as often as of late."""

    def seconds_a_token(guessed: int) -> float:
        met = [sum(luck**place for place in range(guessed + 1)) for luck in lucks]
        return (TOKENS_OF_A_PASS + rows * (1 + guessed)) * sum(1 / tokens for tokens in met)

    return min(range(MOST_GUESSED + 1), key=seconds_a_token)


def _take(
    rows: list[_Row],
    guesses: list[list[int]],
    logits: Tensor,
    options: SamplingOptions,
    on_text: OnText | None,
) -> list[int]:
    """Give each row the tokens that the model chooses, (B, N, V), up to where it departs from the guess.

    Returns:
        How many each row was given.
    """
    taken = [0] * len(rows)
    going = [not row.finish_reason for row in rows]
    for place, here in enumerate(logits.unbind(1)):  # (B, V) each
        if not any(going):
            break
        history, real = _pad_left([row.lookup.tokens if looks_back(options) else [] for row in rows])  # (B, T)
        draws = None if options.greedy else torch.tensor([row.draw() for row in rows]).to(here.device)
        chosen = next_tokens(here, history.to(here.device), real.to(here.device), options, draws).tolist()  # B
        for index in (index for index, goes in enumerate(going) if goes):
            row, token = rows[index], chosen[index]
            taken[index] += 1
            text = row.add(token, at_once=on_text is not None)
            if text and on_text:
                on_text(row.index, text)
            going[index] = guesses[index][place : place + 1] == [token] and not row.finish_reason
    return taken


def _pad_left(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) with zeros on the left, and a mask (B, T), true where they are real."""
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(width) >= width - lengths[:, None]


class _Row:
    """One prompt and what has been written after it."""

    def __init__(
        self,
        index: int,
        prompt: str,
        prompt_ids: list[int],
        *,
        repeat: int,
        limit: int,
        tokenizer: Tokenizer,
        options: SamplingOptions,
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.prompt_ids = prompt_ids
        self.limit = limit
        self.lookup = Lookup(prompt_ids)  # with what has been written, without eos
        self.finish_reason: FinishReason | None = None
        self._stop_ids = tokenizer.stop_ids
        self._output = TextStream(tokenizer, prompt_ids, options.stop)
        self._text: list[str] = []
        # Other numbers for each time that the same prompt comes again.
        [self._draws] = uniform_rows(options.seed, [repeat], limit + 1)

    def draw(self) -> float:
        """The random number, in [0, 1), that chooses the next token."""
        return float(self._draws[self._written])

    def guess(self, most: int) -> list[int]:
        """Tokens to read along with the last one, whose successors still have a place."""
        return [] if self.finish_reason else self.lookup.guess(min(most, self.limit - self._written - 1))

    @property
    def _written(self) -> int:
        return len(self.lookup.tokens) - len(self.prompt_ids)

    def add(self, token: int, *, at_once: bool) -> str:
        """Take the next token; give back the text that can be shown now, or at the end all of it."""
        if token in self._stop_ids:
            self.finish_reason = "eos"
            text = ""
        else:
            self.lookup.add(token)
            text = self._output.push(token) if at_once or self._output.stop else self._output.hold(token)
        if self._output.stopped:
            self.finish_reason = "stop"
        elif self.finish_reason or self._written == self.limit:
            text += self._output.close()
            self.finish_reason = "stop" if self._output.stopped else self.finish_reason or "length"
        self._text.append(text)
        return text

    def completion(self) -> Completion:
        """The finished row."""
        assert self.finish_reason
        return Completion(
            self.prompt, "".join(self._text), tuple(self.lookup.tokens[len(self.prompt_ids) :]), self.finish_reason
        )


def _rows(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str | Sequence[int]], options: SamplingOptions
) -> list[_Row]:
    """The prompts as tokens, all problems with them reported together."""
    positions = model.config.max_seq_len
    times: Counter[tuple[int, ...]] = Counter()
    rows: list[_Row] = []
    problems = []
    if "" in options.stop:
        problems.append("A stop string is empty, which would end every text at once; give a character or more.")
    for index, prompt in enumerate(prompts):
        ids = _prompt_ids(tokenizer, prompt)
        if len(ids) > positions:
            problems.append(
                f"Prompt {index + 1} has {len(ids):,} tokens; the model has {positions:,} positions. "
                f"Shorten it to at most {positions:,} tokens, or use a model with a longer context."
            )
            continue
        row = _Row(
            index,
            prompt if isinstance(prompt, str) else tokenizer.decode(prompt),
            ids,
            repeat=times[tuple(ids)],
            # Every token but the last takes a position.
            limit=min(options.max_new_tokens, positions - len(ids) + 1),
            tokenizer=tokenizer,
            options=options,
        )
        rows.append(row)
        times[tuple(ids)] += 1
    if problems:
        raise ConfigError(problems)
    return rows


def _prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return (tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)) or [start]


class TextStream:
    """Tokens in, text out: whole characters only, and nothing that may become part of a stop string.

    A character may be split over several tokens, and some decoders treat the first token they see
    differently; so a few tokens are decoded together, and only what the newest adds is new.
    """

    def __init__(self, tokenizer: Tokenizer, context_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self.stop = stop
        self._window = list(context_ids)
        self._context = len(self._window)  # tokens of the window whose text is complete and known
        self._read = len(self._decode())  # characters of the window's text already taken
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Take a token; give back the text that is certain now, often a word and sometimes nothing."""
        self._window.append(token)
        text = self._decode()
        whole = text.rstrip(UNREADABLE)
        new = whole[self._read :]
        self._read = max(self._read, len(whole))
        if new and whole == text:
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._read = len(self._decode())
        return self._release(new)

    def hold(self, token: int) -> str:
        """Take a token whose text may wait for `close`, where there is nothing to stop at."""
        self._window.append(token)
        return ""

    def close(self) -> str:
        """No more tokens: give back what was held, unfinished characters as U+FFFD."""
        text = self._release(self._decode()[self._read :])
        held, self._held = self._held, ""
        return text + held

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True)

    def _release(self, new: str) -> str:
        """Text up to a stop string, or up to where one may have begun."""
        text = self._held + new
        found = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]  # of the stop string that is complete first
        cut = len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the beginning of `stop`."""
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))
