"""What was asked is not asked again; what cannot be read is asked for once more, counted, and never a zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from seedbed.errors import JudgeError
from seedbed.judge.ask import Judged, OnReply, Reply, Request, ask_all, score_request, verdict_request
from seedbed.judge.questions import Question
from seedbed.judge.transcript import Transcript

QUESTIONS = [Question(str(n), ({"role": "user", "content": f"Question {n}?"},), f"Reference {n}") for n in range(4)]


class Scripted:
    """A judge that replies as a function says."""

    name = identity = "scripted"
    remedy = "Wake it"

    def __init__(self, reply: Callable[[str], Reply]) -> None:
        self.reply = reply
        self.asked: list[str] = []

    def ask(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        for place, request in reversed(list(enumerate(requests))):
            self.asked.append(request.prompt)
            on_reply(place, self.reply(request.prompt))


def ask(judge: Scripted, requests: Sequence[Request], path: Path) -> list[Judged]:
    return ask_all(judge, requests, Transcript(path), lambda _done: None)


def number(prompt: str) -> int:
    return int(prompt.split("Reference ")[1][0])


@pytest.fixture
def requests() -> list[Request]:
    return [score_request(question, "an answer", "model") for question in QUESTIONS]


def test_scores_come_in_the_order_of_the_requests(requests: list[Request], tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    judge = Scripted(lambda prompt: Reply(str(number(prompt) * 10), 100, 2))
    first = ask(judge, requests, path)
    assert [one.score for one in first] == [0, 10, 20, 30]
    assert sum(one.prompt_tokens for one in first) == 400
    assert ask(judge, requests, path) == first
    assert len(judge.asked) == 4


def test_a_reply_that_cannot_be_read_is_asked_for_once_more(requests: list[Request], tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"

    def reply(prompt: str) -> Reply:
        insisted = prompt.endswith("nothing after it.")
        return Reply({1: "70" if insisted else "fine", 2: "fine"}.get(number(prompt), "50"), 100, 2)

    judge = Scripted(reply)
    judged = ask(judge, requests, path)
    assert [one.score for one in judged] == [50, 70, None, 50]
    assert [one.is_usable for one in judged] == [True, True, False, True]
    assert judged[1].prompt_tokens == judged[2].prompt_tokens == 200
    assert len(judge.asked) == 6
    assert ask(judge, requests, path) == judged
    assert len(judge.asked) == 6


def test_a_request_that_failed_is_asked_the_next_time(requests: list[Request], tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    judged = ask(Scripted(lambda p: Reply(None, error="busy") if number(p) == 2 else Reply("50")), requests, path)
    assert [one.replied for one in judged] == [True, True, False, True]
    later = Scripted(lambda _: Reply("60"))
    assert [one.score for one in ask(later, requests, path)] == [50, 50, 60, 50]
    assert len(later.asked) == 1


def test_the_same_request_is_asked_and_counted_once(requests: list[Request], tmp_path: Path) -> None:
    judge = Scripted(lambda _: Reply("50", 100, 2))
    judged = ask(judge, [*requests, score_request(QUESTIONS[0], "an answer", "another model")], tmp_path / "s.jsonl")
    assert len(judge.asked) == 4
    assert [one.prompt_tokens for one in judged] == [100, 100, 100, 100, 0]
    assert judged[4].score == 50


def test_keys_differ_in_all_that_decides_a_reply() -> None:
    base = score_request(QUESTIONS[0], "answer", "model")
    others = [
        base.key("other judge"),
        score_request(QUESTIONS[1], "answer", "model").key("judge"),
        score_request(QUESTIONS[0], "another", "model").key("judge"),
        score_request(QUESTIONS[0], "answer", "model", 2).key("judge"),
        verdict_request(QUESTIONS[0], ("answer", "b"), ("m", "n")).key("judge"),
    ]
    assert len({base.key("judge"), *others}) == 6
    assert score_request(QUESTIONS[0], "answer", "another model").key("judge") == base.key("judge")


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (Reply("Splendid work!"), "no reply that can be read, such as 'Splendid work!'"),
        (Reply(None, error="it is closed"), "replied to nothing: it is closed. Wake it"),
    ],
)
def test_no_usable_reply_at_all(reply: Reply, says: str, requests: list[Request], tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=says):
        ask(Scripted(lambda _: reply), requests, tmp_path / "scores.jsonl")
