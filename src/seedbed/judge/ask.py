"""Requests to a judge: asked once, asked again when a reply cannot be read, and kept whatever comes of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Protocol

from seedbed.errors import JudgeError
from seedbed.judge.prompts import AGAIN, Verdict, preference_prompt, read_score, read_verdict, score_prompt
from seedbed.judge.questions import Question
from seedbed.judge.transcript import Transcript

ATTEMPTS: Final = 2
SHOWN: Final = 120  # characters of a reply in a message


@dataclass(frozen=True)
class Request:
    """One thing to judge."""

    kind: Literal["score", "verdict"]
    prompt: str
    about: Mapping[str, Any] = field(default_factory=dict)
    """For the transcript: the question's id, and whose answer it is."""
    repeat: int = 1

    def key(self, judge: str) -> str:
        """By which a reply to it is found again: the judge, all that it reads, and which repeat it is."""
        return hashlib.sha256(json.dumps(["judge 1", judge, self.prompt, self.repeat]).encode()).hexdigest()

    def read(self, reply: str) -> float | Verdict | None:
        """What a reply means; None when it cannot be read."""
        return read_score(reply) if self.kind == "score" else read_verdict(reply)


@dataclass(frozen=True)
class Reply:
    """What came back; `text` is None when nothing did, and `error` then says why."""

    text: str | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


OnReply = Callable[[int, Reply], None]
"""Takes the place of a request among those asked, and its reply."""


class Judge(Protocol):
    """A model that judges."""

    @property
    def name(self) -> str:
        """As it is shown."""

    @property
    def remedy(self) -> str:
        """What to look at when it does not reply."""

    @property
    def identity(self) -> str:
        """What a reply depends on beside the request: a name, or weights."""

    def ask(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        """Hand each reply over as it comes, in any order.

        Raises:
            JudgeError: there is no use in asking on.
        """


@dataclass(frozen=True)
class Judged:
    """What became of a request."""

    score: float | None
    verdict: Verdict | None
    """Like the score, None when it was not asked for, or no reply came, or none that can be read."""
    replied: bool
    prompt_tokens: int
    completion_tokens: int

    @property
    def is_usable(self) -> bool:
        """Whether a reply could be read."""
        return self.score is not None or self.verdict is not None


def score_request(question: Question, answer: str, model: str, repeat: int = 1) -> Request:
    """Asks for the score of a model's answer."""
    return Request("score", score_prompt(question, answer), {"id": question.id, "model": model}, repeat)


def verdict_request(question: Question, answers: Sequence[str], models: Sequence[str]) -> Request:
    """Asks which of the answers of two models is better; the first is shown first."""
    about = {"id": question.id, "model": models[0], "against": models[1]}
    return Request("verdict", preference_prompt(question, answers[0], answers[1]), about)


def ask_all(
    judge: Judge, requests: Sequence[Request], transcript: Transcript, on_progress: Callable[[int], None]
) -> list[Judged]:
    """What the judge says to each request; `on_progress` is told to how many it did.

    Replies that are in the transcript are not asked for again. One that cannot be read is asked for once more, and a
    request that got none the next time this is called. The tokens of requests that are the same stand at the first.

    Raises:
        JudgeError: there is no use in asking on, or no reply at all can be used; all of them are in the transcript.
    """
    keys = [request.key(judge.identity) for request in requests]
    different = dict(zip(keys, requests, strict=True))
    for attempt in range(1, ATTEMPTS + 1):
        due = [key for key in different if _is_due(transcript.find(key), attempt)]
        on_progress(len(different) - len(due))
        if due:
            again = AGAIN if attempt > 1 else ""
            asked = [replace(different[key], prompt=different[key].prompt + again) for key in due]
            keep = _Keeper(judge.name, due, asked, attempt, transcript, on_progress, len(different) - len(due))
            judge.ask(asked, keep)
    judged = {key: _judged(transcript.find(key)) for key in different}
    if not any(one.is_usable for one in judged.values()):
        raise JudgeError(_nothing_usable(judge, [record for key in different for record in transcript.find(key)]))
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    free = {key: replace(one, prompt_tokens=0, completion_tokens=0) for key, one in judged.items()}
    return [(judged if first[key] == place else free)[key] for place, key in enumerate(keys)]


@dataclass
class _Keeper:
    """Writes each reply of a round into the transcript."""

    judge: str
    keys: Sequence[str]
    requests: Sequence[Request]
    attempt: int
    transcript: Transcript
    on_progress: Callable[[int], None]
    done: int

    def __call__(self, place: int, reply: Reply) -> None:
        request = self.requests[place]
        value = None if reply.text is None else request.read(reply.text)
        self.transcript.add(
            {
                "key": self.keys[place],
                "judge": self.judge,
                **request.about,
                "repeat": request.repeat,
                "attempt": self.attempt,
                "reply": reply.text,
                request.kind: value,
                "prompt_tokens": reply.prompt_tokens,
                "completion_tokens": reply.completion_tokens,
                "error": reply.error,
            }
        )
        self.done += 1
        self.on_progress(self.done)


def _is_due(records: Sequence[Mapping[str, Any]], attempt: int) -> bool:
    """Whether this attempt is the next: every one before it brought a reply, and none that can be read."""
    replies = [record for record in records if record["reply"] is not None]
    return len(replies) == attempt - 1 and not _judged(replies).is_usable


def _judged(records: Sequence[Mapping[str, Any]]) -> Judged:
    def last(kind: str) -> Any:
        return next((record[kind] for record in reversed(records) if record.get(kind) is not None), None)

    return Judged(
        score=last("score"),
        verdict=last("verdict"),
        replied=any(record["reply"] is not None for record in records),
        prompt_tokens=sum(record["prompt_tokens"] for record in records),
        completion_tokens=sum(record["completion_tokens"] for record in records),
    )


def _nothing_usable(judge: Judge, records: Sequence[Mapping[str, Any]]) -> str:
    if errors := [record["error"] for record in records if record["error"]]:
        return f"the judge {judge.name} replied to nothing: {errors[-1]}. {judge.remedy}"
    reply = records[-1]["reply"][:SHOWN] if records else ""
    return (
        f"the judge {judge.name} gave no reply that can be read, such as {reply!r}; expected a score from 0 to 100 or "
        "a verdict alone. Choose a model that follows instructions better"
    )
