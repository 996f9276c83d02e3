"""Questions are conversations up to the last answer; a limit takes the same ones wherever they stand."""

from __future__ import annotations

import pytest

from seedbed.data.conversations import to_document
from seedbed.errors import DataError
from seedbed.judge.questions import read_questions


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_the_last_answer_is_the_reference() -> None:
    told = [{"role": "system", "content": "Be brief."}]
    short, long = read_questions(
        [to_document(turn("One?", "1")), to_document([*told, *turn("A?", "a"), *turn("B?", "b")])]
    )
    assert (short.text, short.reference) == ("One?", "1")
    assert long.reference == "b"
    assert [message["role"] for message in long.messages] == ["system", "user", "assistant", "user"]
    assert long.text == "system: Be brief.\n\nuser: A?\n\nassistant: a\n\nuser: B?"


def test_what_follows_the_last_answer_is_left_out_and_doubles_count_once() -> None:
    document = to_document([*turn("A?", "a"), {"role": "user", "content": "Thanks"}])
    [question] = read_questions([document, document])
    assert question.reference == "a"


def test_a_limit_only_adds_and_does_not_depend_on_the_order() -> None:
    documents = [to_document(turn(f"{number}?", str(number))) for number in range(50)]
    ten = read_questions(documents, 10)
    twenty = read_questions(documents, 20)
    assert len(ten) == 10 and len(twenty) == 20
    assert {q.id for q in ten} < {q.id for q in twenty}
    assert {q.id for q in read_questions(documents[::-1], 10)} == {q.id for q in ten}
    numbers = [int(question.reference) for question in twenty]
    assert numbers == sorted(numbers)
    assert max(numbers) > 30
    assert read_questions(documents, 500) == read_questions(documents)


@pytest.mark.parametrize("messages", [[{"role": "assistant", "content": "Hello"}], turn("A?", " ")])
def test_nothing_to_ask(messages: list[dict[str, str]]) -> None:
    with pytest.raises(DataError, match="no question with an answer"):
        read_questions([to_document(messages)])
