"""What a model answers, written once: for the same weights, options and prompt it is found in the transcript."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from seedbed import distributed
from seedbed.checkpoint import load_model
from seedbed.config import SamplingOptions
from seedbed.generate import generate
from seedbed.judge.questions import Question
from seedbed.judge.references import chrf, exact_match
from seedbed.judge.transcript import Transcript
from seedbed.model.decoder import Decoder
from seedbed.runs.info import was_taught_to_answer
from seedbed.text.template import find_template
from seedbed.text.tokenizer import Tokenizer

NO_ROOM: Final = "no_room"  # the question is longer than the model's context; its answer is empty


@dataclass(frozen=True)
class Asking:
    """How models are asked."""

    format: str
    """Of the conversations, one of `data.conversations.FORMATS`."""
    options: SamplingOptions
    chat_template: str | None = None
    batch_size: int = 16
    device: str = "auto"


@dataclass(frozen=True)
class Answer:
    """What a model answered to a question, beside the reference."""

    question: Question
    text: str
    finish_reason: str
    """As `generate` says it, or `no_room`."""
    exact_match: bool
    chrf: float


def answer_questions(
    model: str,
    folder: Path,
    questions: Sequence[Question],
    asking: Asking,
    transcript: Transcript,
    on_answer: Callable[[int], None],
    template_source: str | None = None,
) -> list[Answer]:
    """The model's answers in the order of the questions; `on_answer` is told how many there are so far.

    Args:
        model: its name in the transcript.
        folder: a checkpoint, a run or a transformers folder.
        template_source: the chat template of a model that has none, as one that was not tuned yet.

    Raises:
        CheckpointError, ConfigError: the model cannot be used; see `checkpoint.load_model`.
        MissingExtra: the library for the reference metrics is not installed.
    """
    decoder, tokenizer = load_model(folder, asking.device)
    if tokenizer.chat_template is None and template_source is not None:
        tokenizer = tokenizer.with_chat_template(template_source)
    taught = was_taught_to_answer(folder)
    template = find_template(tokenizer, asking.chat_template, asking.format, taught=taught)
    prompts = [template.prompt_ids(question.messages) for question in questions]
    facts = json.dumps(["answer 1", weights_digest(decoder), asking.options.model_dump()])
    keys = [hashlib.sha256(f"{facts} {prompt}".encode()).hexdigest() for prompt in prompts]
    missing = {key: place for place, key in enumerate(keys) if not transcript.find(key)}
    order = sorted(missing, key=lambda key: len(prompts[missing[key]]))  # rows of one length waste no padding
    at_once = asking.batch_size * distributed.size()
    for first in range(0, len(order), at_once):
        on_answer(len(questions) - len(order) + first)
        batch = order[first : first + at_once]
        asked = [prompts[missing[key]] for key in batch]
        written = distributed.each_a_part(asked, partial(_write, decoder, tokenizer, asking))
        for key, (text, reason) in zip(batch, written, strict=True):
            question = questions[missing[key]]
            transcript.add({"key": key, "id": question.id, "model": model, **_facts(question, text, reason)})
    on_answer(len(questions))
    return [_read(question, transcript, key) for question, key in zip(questions, keys, strict=True)]


def weights_digest(model: Decoder) -> str:
    """SHA-256 over the weights in use, adapters among them."""
    digest = hashlib.sha256()
    for name, weights in sorted(model.state_dict().items()):
        digest.update(f"{name} {weights.dtype} {list(weights.shape)}\n".encode())
        digest.update(weights.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(model: Decoder, tokenizer: Tokenizer, asking: Asking, prompts: Sequence[list[int]]) -> list[tuple[str, str]]:
    """An answer to each prompt, and why it ends."""
    fitting = [prompt for prompt in prompts if len(prompt) <= model.config.max_seq_len]
    completions = iter(generate(model, tokenizer, fitting, asking.options, batch_size=asking.batch_size))
    written = []
    for prompt in prompts:
        done = next(completions) if len(prompt) <= model.config.max_seq_len else None
        written.append((done.text.strip(), str(done.finish_reason)) if done else ("", NO_ROOM))
    return written


def _facts(question: Question, text: str, reason: str) -> dict[str, object]:
    return {
        "prompt": question.text,
        "reference": question.reference,
        "answer": text,
        "finish_reason": reason,
        "exact_match": exact_match(text, question.reference),
        "chrf": round(chrf(text, question.reference), 3),
    }


def _read(question: Question, transcript: Transcript, key: str) -> Answer:
    record = transcript.find(key)[-1]
    return Answer(question, record["answer"], record["finish_reason"], record["exact_match"], record["chrf"])
