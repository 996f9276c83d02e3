"""What is asked: conversations up to their last answer, which is the reference."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from seedbed.data.conversations import from_document
from seedbed.errors import DataError
from seedbed.text.template import Message


@dataclass(frozen=True)
class Question:
    """A conversation that waits for an answer, and the answer that is known to be good."""

    id: str
    """Of the conversation with its reference; the same in every file and at every place in it."""
    messages: tuple[Message, ...]
    reference: str

    @property
    def text(self) -> str:
        """What was said so far: the question alone, or every turn with its role."""
        if len(self.messages) == 1:
            return str(self.messages[0]["content"])
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


def read_questions(documents: Iterable[str], limit: int | None = None) -> list[Question]:
    """The questions of conversations, each once, in the order of the documents.

    Args:
        documents: conversations as `data.conversations` writes them.
        limit: keep at most so many. Which ones is decided by their content, so that they are spread over the file and
            a higher limit only adds to them.

    Raises:
        DataError: no conversation has an answer to a question.
    """
    found = {question.id: question for document in documents if (question := _question(document))}
    if not found:
        raise DataError("there is no question with an answer in the data; expected rows such as instruction and output")
    kept = set(sorted(found)[:limit])
    return [question for question in found.values() if question.id in kept]


def _question(document: str) -> Question | None:
    messages = from_document(document)
    last = max((place for place, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    if last == 0 or not str(messages[last]["content"]).strip():
        return None
    digest = hashlib.sha256(document.encode()).hexdigest()
    return Question(digest[:16], tuple(messages[:last]), str(messages[last]["content"]))
