"""Questions and answers: files in several formats to conversations, and conversations as documents.

A conversation is a list of messages, each with a role and a content. Through the data path it goes as a document:
a text like any other, so that what is held out, counted or cached is so for conversations, too. That text is the
conversation as JSON, written in one way only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from seedbed.data.documents import split_lines
from seedbed.data.files import TABLE_SUFFIXES, Row, clean_text, read_rows, read_text
from seedbed.errors import DataError
from seedbed.parsing import parse_json
from seedbed.text.template import Message

FORMATS = ("auto", "text", "alpaca", "qa", "chat", "completion")

EXPECTED = (
    "alpaca (instruction, input, output), qa (question, answer), chat (messages, or conversations), "
    "completion (prompt, completion)"
)

# The column that tells a format.
TELLING = {
    "messages": "chat",
    "conversations": "chat",
    "instruction": "alpaca",
    "question": "qa",
    "prompt": "completion",
}

# What others call Alpaca's columns: Dolly has instruction, context and response.
ALSO_CALLED = {"input": "context", "output": "response"}

ROLES = ("system", "user", "assistant", "tool")
ROLE_OF_SPEAKER = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}

# What else of a message templates know; other columns are somebody's notes.
BESIDE_CONTENT = ("name", "tool_calls", "tool_call_id", "reasoning_content")

# A label begins a line. Which pair a file uses, its first line says; the other pair is text in it.
LABELS = {"question": "answer", "q": "a"}
LABEL = re.compile(r"(Q|A|[A-Za-z]{2,})[ \t]*:(.*)", re.DOTALL)


def to_document(messages: list[Message]) -> str:
    """The conversation as its one text: JSON without spaces, the keys of messages sorted.

    What is nested in a message keeps its order, in which templates print it.
    """
    ordered = [dict(sorted(message.items())) for message in messages]
    return json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))


def from_document(document: str) -> list[Message]:
    """The conversation that `to_document` wrote."""
    messages: list[Message] = json.loads(document)
    return messages


EDGES = ".,;:!?…\"'“”‘’()[]{}«»*_`"  # what stands around words


def asked_words(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The words of what the user says, as `words_of` gives them."""
    return words_of(" ".join(message["content"] for message in messages if message["role"] == "user"))


def words_of(text: str) -> list[str]:
    """The words of a text, by which texts are compared: without case, white space and the signs around words."""
    return [word for word in (piece.strip(EDGES) for piece in text.casefold().split()) if word]


def split_key(document: str) -> bytes:
    """What decides on which side of a split a conversation goes: the words that are asked, whatever the answers.

    So rows that ask the same are never divided between training and validation.
    """
    return " ".join(asked_words(from_document(document))).encode()


def read_conversations(path: Path, format: str) -> Iterator[str]:
    """The conversations of a file of one format, as documents.

    Raises DataError with the line or the row of what is missing, empty or of another kind.
    """
    if path.suffix.lower() not in TABLE_SUFFIXES:
        if format != "qa":
            raise DataError(f"{path} is a text file, and {format} needs rows: {', '.join(TABLE_SUFFIXES)}")
        yield from map(to_document, _read_pairs(path))
        return
    empty = True
    for where, row in read_rows(path):
        empty = False
        columns = {column.lower(): value for column, value in row.items()}
        messages = _with_tools(_OF_ROW[format](columns, where), columns, where)
        try:
            document = to_document(messages)
        except TypeError as error:  # Parquet has dates and bytes
            raise DataError(
                f"{where}: a message holds what is neither text nor number ({error}); write it as text"
            ) from None
        yield clean_text(document, where)
    if empty:
        raise DataError(f"{path} has no rows; expected {EXPECTED}")


def detect_format(path: Path, text_column: str = "text") -> str:
    """One of `FORMATS` but `auto`: by the columns of the first row, or the first line of a text.

    Raises DataError for a table without rows or with columns of no format.
    """
    if path.suffix.lower() in (".csv", ".tsv"):
        raise DataError(
            f"{path} is a table, and tables are read from {', '.join(TABLE_SUFFIXES)}; write its rows as JSON, a line "
            "each, or learn it as the text that it is with --format text"
        )
    if path.suffix.lower() not in TABLE_SUFFIXES:
        return "qa" if _has_labels(path) else "text"
    first = next(read_rows(path), None)
    if first is None:
        raise DataError(f"{path} has no rows; expected a column {text_column!r}, or {EXPECTED}")
    where, row = first
    if path.suffix.lower() == ".parquet":
        where = str(path)  # whose rows all have the same columns
    columns = {column.lower() for column in row}
    # A `text` beside all of an instruction's columns is the same in one string, as Stanford's Alpaca has it.
    is_alpaca = "instruction" in columns and not columns.isdisjoint(("output", ALSO_CALLED["output"]))
    if text_column in row and not (text_column == "text" and is_alpaca):
        return "text"
    for column, format in TELLING.items():
        if column in columns:
            return format
    raise DataError(
        f"{where} has no column {text_column!r}; it has: {', '.join(row) or 'none'}. Name one with --text_column, or "
        f"give conversations: {EXPECTED}"
    )


def _alpaca(row: Row, where: str) -> list[Message]:
    instruction, answer = _text(row, "instruction", where), _text(row, _column(row, "output"), where)
    more = _text_if_any(row, _column(row, "input"), where)
    question: Message = {"role": "user", "content": instruction}
    if more.strip():
        question = {"role": "user", "content": f"{instruction}\n\n{more}", "instruction": instruction, "input": more}
    return [*_opening(row, where), *_history(row, where), question, {"role": "assistant", "content": answer}]


def _column(row: Row, name: str) -> str:
    """The column of that name, or the one that holds the same elsewhere."""
    return ALSO_CALLED[name] if row.get(name) is None and row.get(ALSO_CALLED[name]) is not None else name


def _history(row: Row, where: str) -> list[Message]:
    """The turns before that of the row."""
    turns = row.get("history") or []
    if not isinstance(turns, list) or not all(map(_is_pair, turns)):
        raise DataError(f"{where}: 'history' is not what was said before; expected [[question, answer], ...], or []")
    return [said for pair in turns for said in _turn(*(text.replace("\r\n", "\n") for text in pair))]


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def _opening(row: Row, where: str) -> list[Message]:
    """What a column beside the turns tells the model to be."""
    system = _text_if_any(row, "system", where)
    return [{"role": "system", "content": system}] if system.strip() else []


def _qa(row: Row, where: str) -> list[Message]:
    return _turn(_text(row, "question", where), _text(row, "answer", where))


def _completion(row: Row, where: str) -> list[Message]:
    return _turn(_text(row, "prompt", where), _text(row, "completion", where))


def _chat(row: Row, where: str) -> list[Message]:
    column = "messages" if row.get("messages") is not None else "conversations"
    turns = row.get(column)
    if not isinstance(turns, list):
        raise DataError(f"{where} has no list of messages; expected a column 'messages' or 'conversations'")
    messages = [_message(turn, f"{where}, message {number}") for number, turn in enumerate(turns, start=1)]
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
        raise DataError(f"{where} has no message of the assistant to learn; remove it")
    return messages if messages[0]["role"] == "system" else [*_opening(row, where), *messages]


def _with_tools(messages: list[Message], row: Row, where: str) -> list[Message]:
    """The conversation with the tools that a column offers; its first message carries them to the template."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools:  # so that Parquet can hold tools of any shape
        try:
            tools = parse_json(tools)
        except ValueError as error:
            raise DataError(f"{where}: 'tools' is text that is not JSON ({error}); correct it, or empty it") from None
    if not tools:
        return messages
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: 'tools' is no list of objects, nor one as JSON; correct it, or empty it")
    return [messages[0] | {"tools": tools}, *messages[1:]]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{where} is a {type(turn).__name__}, not an object with a role and a content")
    if "from" in turn and "role" not in turn:
        speaker = _text(turn, "from", where)
        content = _text(turn, "value", where)
    else:
        speaker = _text(turn, "role", where)
        # Who calls a tool may say nothing.
        content = "" if turn.get("tool_calls") and turn.get("content") is None else _text(turn, "content", where)
    if speaker not in ROLE_OF_SPEAKER:
        raise DataError(f"{where} has the role {speaker!r}; expected {', '.join(ROLE_OF_SPEAKER)}")
    others = {name: turn[name] for name in BESIDE_CONTENT if turn.get(name) is not None}
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(f"{where} has the weight {weight!r}; expected 1, or 0 for an answer that is not learnt")
    if weight == 0:
        others["weight"] = 0
    return {"role": ROLE_OF_SPEAKER[speaker], "content": content, **others}


_OF_ROW: dict[str, Callable[[Row, str], list[Message]]] = {
    "alpaca": _alpaca,
    "qa": _qa,
    "chat": _chat,
    "completion": _completion,
}


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text_if_any(row: Row, column: str, where: str) -> str:
    return "" if row.get(column) is None else _text(row, column, where)


def _text(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if value is None:
        what = "an empty value" if column in row else "nothing"
        raise DataError(
            f"{where} has {what} for {column!r}; its columns: {', '.join(row) or 'none'}. Add it, or remove the row"
        )
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} holds a {type(value).__name__}, and text is expected")
    return value.replace("\r\n", "\n")


def _has_labels(path: Path) -> bool:
    """Whether a text begins with the label of a question and has the label of an answer."""
    lines = (line for line in split_lines(read_text(path)) if not line.isspace())
    question = _label(next(lines, ""))
    return question in LABELS and any(_label(line) == LABELS[question] for line in lines)


def _label(line: str) -> str:
    found = LABEL.match(line)
    return found[1].lower() if found else ""


def _read_pairs(path: Path) -> Iterator[list[Message]]:
    """The pairs of a text of labelled questions and answers."""
    question: tuple[int, str] | None = None
    empty = True
    for label, number, text in _labelled_parts(path):
        empty = False
        if label in LABELS:
            if question:
                _refuse_unanswered(path, question[0])
            question = (number, text)
        elif question is None:
            raise DataError(f"{path}, line {number}: an answer without a question before it; add it, or remove both")
        else:
            yield _turn(question[1], text)
            question = None
    if question:
        _refuse_unanswered(path, question[0])
    if empty:
        raise DataError(f"there is no text in {path}; expected lines that begin with QUESTION: and ANSWER:")


def _refuse_unanswered(path: Path, number: int) -> NoReturn:
    raise DataError(f"{path}, line {number}: a question without an answer after it; add it, or remove the question")


def _labelled_parts(path: Path) -> Iterator[tuple[str, int, str]]:
    """Each label, the number of its line, and the text from there to the next label, stripped."""
    labels: tuple[str, ...] = ()
    label, start, said = "", 0, list[str]()
    for number, line in enumerate(split_lines(read_text(path), longest=2**63), start=1):
        if line.isspace() and not labels:
            continue
        found = LABEL.match(line)
        word = found[1].lower() if found else ""
        if not labels:
            labels = next((pair for pair in LABELS.items() if word in pair), ())
            if not labels:
                raise DataError(
                    f"{path}, line {number} begins with no label; expected QUESTION: and, after it, ANSWER:"
                )
        if found and word in labels:
            if label:
                yield label, start, "".join(said).strip()
            label, start, said = word, number, [found[2]]
            continue
        if found and get_close_matches(word, labels, n=1, cutoff=0.8):
            raise DataError(
                f"{path}, line {number}: {found[1]}: looks like a misspelt label; write "
                f"{' or '.join(known.upper() for known in labels)}, or begin the line with a space if it is text"
            )
        said.append(line)
    if label:
        yield label, start, "".join(said).strip()
