"""Text from a model: prompts in batches, and text streamed as it is written.

B batch   T tokens of the prompts, padded on the left   V vocabulary
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from seedbed.config import SamplingOptions
from seedbed.errors import ConfigError
from seedbed.evaluate import evaluation_mode
from seedbed.model.decoder import Decoder
from seedbed.model.decoding import DecodingModel
from seedbed.sampling import next_tokens, uniform_rows
from seedbed.text.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]
OnText = Callable[[int, str], None]

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
            restored.
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
    decoding = decoding or DecodingModel(model)
    device = model.embed_tokens.weight.device.type
    # What decodes chooses its types itself.
    with evaluation_mode(model), torch.autocast(device, enabled=False):
        for first in range(0, len(rows), batch_size):
            _write(decoding, rows[first : first + batch_size], options, on_text)
    return [row.completion() for row in rows]


def _write(decoding: DecodingModel, rows: list[_Row], options: SamplingOptions, on_text: OnText | None) -> None:
    """Read the prompts, then add a token to every row at a time until the last row ends."""
    steps = max(row.limit for row in rows)
    # The last token of a row is never fed.
    logits = decoding.read([row.prompt_ids for row in rows], max(len(row.prompt_ids) + row.limit for row in rows) - 1)
    device = logits.device
    tokens, real = _pad_left([row.prompt_ids for row in rows])  # (B, T)
    width = tokens.shape[1]
    history = pad(tokens, (0, steps)).to(device)  # (B, T + steps)
    real = pad(real, (0, steps), value=True).to(device)
    uniform = None
    if not options.greedy:
        uniform = uniform_rows(options.seed, [row.repeat for row in rows], steps).to(device)
    for step in range(steps):
        now = width + step
        draws = None if uniform is None else uniform[:, step]
        chosen = next_tokens(logits, history[:, :now], real[:, :now], options, draws)  # (B,)
        history[:, now] = chosen
        for row, token in zip(rows, chosen.tolist(), strict=True):
            text = "" if row.finish_reason else row.add(token)
            if text and on_text:
                on_text(row.index, text)
        if all(row.finish_reason for row in rows):
            return
        logits = decoding.step(chosen)  # (B, V)


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
        stop: tuple[str, ...],
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.prompt_ids = prompt_ids
        self.repeat = repeat  # how often the same prompt came before: its own random numbers
        self.limit = limit
        self.finish_reason: FinishReason | None = None
        self._stop_ids = tokenizer.stop_ids
        self._token_ids: list[int] = []
        self._output = TextStream(tokenizer, prompt_ids, stop)
        self._text: list[str] = []

    def add(self, token: int) -> str:
        """Take the next token; give back the text that can be shown now."""
        if token in self._stop_ids:
            self.finish_reason = "eos"
            text = ""
        else:
            self._token_ids.append(token)
            text = self._output.push(token)
        if self._output.stopped:
            self.finish_reason = "stop"
        elif self.finish_reason or len(self._token_ids) == self.limit:
            text += self._output.close()
            self.finish_reason = "stop" if self._output.stopped else self.finish_reason or "length"
        self._text.append(text)
        return text

    def completion(self) -> Completion:
        """The finished row."""
        assert self.finish_reason
        return Completion(self.prompt, "".join(self._text), tuple(self._token_ids), self.finish_reason)


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
        row = _Row(
            index,
            prompt if isinstance(prompt, str) else tokenizer.decode(prompt),
            ids,
            repeat=times[tuple(ids)],
            # Every token but the last takes a position.
            limit=min(options.max_new_tokens, positions - len(ids) + 1),
            tokenizer=tokenizer,
            stop=options.stop,
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
        self._stop = stop
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
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]  # of the stop string that is complete first
        cut = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the beginning of `stop`."""
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))
