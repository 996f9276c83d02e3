"""The judge behind an address, against a real server that answers, refuses, stalls and cuts."""

from __future__ import annotations

import logging

import pytest

from seedbed.errors import ConfigError, JudgeError
from seedbed.judge.ask import Reply, Request
from seedbed.judge.client import Endpoint, served_model
from tests.unit.judge.server import KEY, Answer, refuse, say, serving

NO_SERVER = "http://127.0.0.1:9/v1"  # the port that discards what it gets; nothing listens there


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEDBED_JUDGE_KEY", KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask(endpoint: Endpoint, count: int = 1) -> list[Reply]:
    replies: dict[int, Reply] = {}
    endpoint.ask([Request("score", f"request {number}") for number in range(count)], replies.__setitem__)
    return [replies[place] for place in sorted(replies)]


def test_replies_tokens_and_what_is_sent() -> None:
    with serving(lambda _, prompt: say(prompt.split()[-1])) as server:
        assert ask(Endpoint(server.url, "m", temperature=0.5), 5) == [Reply(str(n), 100, 2) for n in range(5)]
        assert server.keys == {f"Bearer {KEY}"}
        assert {(body["model"], body["temperature"]) for body in server.bodies} == {("m", 0.5)}
        assert [message["role"] for message in server.bodies[0]["messages"]] == ["user"]


def test_without_a_name_the_first_model_that_is_listed_judges() -> None:
    with serving(lambda *_: say("1")) as server:
        assert served_model(server.url, 5.0) == "default"
        server.models = ["one", "other"]
        assert served_model(server.url, 5.0) == "one"
    assert served_model(NO_SERVER, 5.0) == "default"


def test_so_many_at_once_and_no_more() -> None:
    with serving(lambda *_: Answer(say("1").body, delay=0.05)) as server:
        assert len(ask(Endpoint(server.url, "m", concurrency=3), 12)) == 12
        assert server.most_at_once == 3


def test_it_waits_as_long_as_the_server_says() -> None:
    with serving(lambda n, _: refuse(429, Retry_After="1.2") if n == 0 else say("7")) as server:
        assert ask(Endpoint(server.url, "m", retries=1)) == [Reply("7", 100, 2)]
        assert server.times[1] - server.times[0] >= 1.2


@pytest.mark.parametrize(
    "trouble",
    [refuse(500), refuse(503), Answer(say("7").body, cut=True), Answer(say("7").body, delay=1.0)],
    ids=["500", "503", "cut", "slow"],
)
def test_trouble_that_passes_is_tried_again(trouble: Answer) -> None:
    with serving(lambda n, _: trouble if n == 0 else say("7")) as server:
        assert ask(Endpoint(server.url, "m", retries=2, timeout=0.3)) == [Reply("7", 100, 2)]
        assert len(server.prompts) == 2


def test_what_is_tried_again_is_said() -> None:
    said: list[str] = []
    with serving(lambda n, _: refuse(503, "busy") if n < 2 else say("7")) as server:
        judge = Endpoint(server.url, "m", retries=4, say=said.append)
        judge.ask([Request("score", "x", {})], lambda _place, reply: said.append(str(reply.text)))
    first, second, answer = said
    assert first.startswith("The judge did not answer. Retrying request in 0.") and answer == "7"
    assert "1 of 4" in first and "2 of 4" in second
    assert logging.getLogger("openai._base_client").level == logging.NOTSET


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        (refuse(500, "broken inside"), "broken inside"),
        (refuse(429, "no quota"), "no quota"),
        (refuse(400, "unsupported temperature"), "unsupported temperature"),
        (Answer(say("7").body, delay=0.6), "no reply within 0.2 seconds"),
        (Answer(say("7").body, cut=True), "no connection, or it was cut"),
        (Answer("<html>Welcome</html>"), "not of this protocol"),
        (Answer("{half", headers={"Content-Type": "application/json"}), "not of this protocol"),
        (Answer({"choices": []}), "not of this protocol"),
        (Answer({"choices": None}), "not of this protocol"),
        (Answer({"answer": "42"}), "not of this protocol"),
    ],
)
def test_trouble_that_stays_is_named(trouble: Answer, says: str) -> None:
    with serving(lambda *_: trouble) as server:
        [reply] = ask(Endpoint(server.url, "m", retries=0, timeout=0.2))
    assert reply.text is None
    assert reply.error and says in reply.error


def test_a_message_without_content_or_usage_is_an_empty_reply() -> None:
    with serving(lambda *_: Answer({"choices": [{"message": {"role": "assistant", "content": None}}]})) as server:
        assert ask(Endpoint(server.url, "m")) == [Reply("", 0, 0)]


@pytest.mark.parametrize(("status", "hint"), [(401, "SEEDBED_JUDGE_KEY"), (403, "rights"), (404, "--judge_model")])
def test_what_no_retry_mends_ends_it_at_once_without_showing_the_key(status: int, hint: str) -> None:
    with serving(lambda *_: refuse(status, f"Incorrect API key provided: {KEY}.")) as server:
        with pytest.raises(JudgeError) as caught:
            ask(Endpoint(server.url, "m", concurrency=1), 10)
        assert len(server.prompts) == 1
    assert hint in str(caught.value) and server.url in str(caught.value) and str(status) in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_judge_that_is_down_is_given_up() -> None:
    replies: list[Reply] = []
    with pytest.raises(JudgeError, match=NO_SERVER):
        Endpoint(NO_SERVER, "m", retries=0).ask([Request("score", "x")] * 100, lambda _, reply: replies.append(reply))
    assert len(replies) < 12


def test_failures_that_are_not_in_a_row_are_no_reason_to_give_up() -> None:
    with serving(lambda n, _: refuse(500) if n % 2 else say("7")) as server:
        replies = ask(Endpoint(server.url, "m", retries=0, concurrency=1), 20)
    assert sum(reply.error is None for reply in replies) == 10


def test_the_key_is_nowhere_else(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), serving(lambda *_: say(f"your key is {KEY}")) as server:
        endpoint = Endpoint(server.url, "m")
        assert ask(endpoint) == [Reply("your key is ***", 100, 2)]
    assert KEY not in repr(endpoint) + endpoint.identity
    assert KEY not in caplog.text
    assert KEY not in "".join(capfd.readouterr())


def test_which_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    with serving(lambda *_: say("1")) as server:
        ask(Endpoint(server.url, "m"))
        monkeypatch.delenv("SEEDBED_JUDGE_KEY")
        ask(Endpoint(server.url, "m"))
        monkeypatch.delenv("OPENAI_API_KEY")
        ask(Endpoint(server.url, "m"))
        assert server.keys == {f"Bearer {KEY}", "Bearer sk-other", "Bearer none"}


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://a/v1", "http://", "", "http://u:secret@a/v1", "http://a?key=secret"]
)
def test_an_address_is_no_more_than_an_address(url: str) -> None:
    with pytest.raises(ConfigError, match="judge_url") as caught:
        Endpoint(url, "m")
    assert "secret" not in str(caught.value)
