from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from seedbed.data import open_source, open_whole
from seedbed.data.conversations import FORMATS, detect_format, from_document, read_conversations, to_document
from seedbed.errors import ConfigError, DataError
from seedbed.text.template import Message


def write(path: Path, content: object) -> Path:
    """Text as it is, a list of rows as JSON lines or as one array."""
    if isinstance(content, list):
        as_lines = "\n".join(json.dumps(row) for row in content) + "\n"
        content = json.dumps(content, indent=1) if path.suffix == ".json" else as_lines
    assert isinstance(content, str)
    path.write_text(content, encoding="utf-8")
    return path


def conversations(path: Path, format: str | None = None) -> list[list[Message]]:
    return [from_document(text) for text in read_conversations(path, format or detect_format(path))]


def turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_a_document_is_one_text_for_one_conversation() -> None:
    messages = [{"role": "user", "content": 'é "😀"\n'}, {"content": "", "role": "assistant"}]
    document = to_document(messages)
    assert document == '[{"content":"é \\"😀\\"\\n","role":"user"},{"content":"","role":"assistant"}]'
    assert from_document(document) == messages
    assert to_document(from_document(document)) == document


def test_alpaca(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1,\r\n2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "La."},
        {"instruction": "Sing.", "output": "", "system": "You sing.", "id": 7},
        {"instruction": "Sing.", "input": None, "output": "La.", "system": None},
    ]
    with_input = {"role": "user", "content": "Add.\n\n1,\n2", "instruction": "Add.", "input": "1,\n2"}
    expected = [
        [with_input, {"role": "assistant", "content": "3"}],
        turn("Sing.", "La."),
        [{"role": "system", "content": "You sing."}, *turn("Sing.", "")],
        turn("Sing.", "La."),
    ]
    for name in ("a.json", "a.jsonl"):
        path = write(tmp_path / name, rows)
        assert detect_format(path) == "alpaca"
        assert conversations(path) == expected


def test_alpaca_as_others_write_it(tmp_path: Path) -> None:
    """Dolly's names of the columns, and LLaMA-Factory's earlier turns."""
    rows = [
        {"instruction": "Who?", "context": "By Ann.", "response": "Ann.", "text": "Who? By Ann. Ann."},
        {"instruction": "Sing.", "context": "", "response": "La.", "category": "art"},
        {"instruction": "a", "input": "b", "context": "c", "output": "d", "response": "e"},
        {"instruction": "c", "input": "", "output": "d", "history": [["a", "b\r\n"]], "system": "Be brief."},
        {"instruction": "c", "output": "d", "history": []},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    assert detect_format(path) == "alpaca"
    dolly, without, both, later, first = conversations(path)
    assert dolly[0] == {"role": "user", "content": "Who?\n\nBy Ann.", "instruction": "Who?", "input": "By Ann."}
    assert (dolly[1], without) == (turn("", "Ann.")[1], turn("Sing.", "La."))
    assert [message["content"] for message in both] == ["a\n\nb", "d"]
    assert later == [{"role": "system", "content": "Be brief."}, *turn("a", "b\n"), *turn("c", "d")]
    assert first == turn("c", "d")


def test_rows_of_questions_and_of_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"Question": "a", "ANSWER": "b"}, {"question": "c", "answer": " d"}])
    assert detect_format(path) == "qa"
    assert conversations(path) == [turn("a", "b"), turn("c", " d")]
    path = write(tmp_path / "b.jsonl", [{"prompt": "a ", "completion": "b"}])
    assert detect_format(path) == "completion"
    assert conversations(path) == [turn("a ", "b")]


def test_chat(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}], "weight": 1}
    messages = [*turn("a", "b"), call, {"role": "tool", "content": "3", "name": "add"}]
    path = write(tmp_path / "a.jsonl", [{"messages": messages, "prompt": "a"}])
    assert detect_format(path) == "chat"
    kept = [
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]},
        {"role": "tool", "content": "3", "name": "add"},
    ]
    assert conversations(path) == [[*turn("a", "b"), *kept]]
    spoken = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b\r\n"}]
    path = write(tmp_path / "b.json", [{"id": "x", "conversations": spoken}])
    assert detect_format(path) == "chat"
    assert conversations(path) == [[{"role": "system", "content": "s"}, *turn("a", "b\n")]]


def test_tools_of_a_row_go_with_its_first_message(tmp_path: Path) -> None:
    """As a list or as JSON, in the order in which they are written."""
    tools = [{"type": "function", "function": {"name": "add", "b": 1, "a": 2}}]
    given: list[object] = [tools, json.dumps(tools), None, "", []]
    path = write(tmp_path / "a.jsonl", [{"messages": turn("a", "b"), "tools": offered} for offered in given])
    as_list, as_json, *without = read_conversations(path, "chat")
    assert as_list == as_json
    assert json.dumps(tools, separators=(",", ":")) in as_list
    assert from_document(as_list)[0] == {"role": "user", "content": "a", "tools": tools}
    assert without == [to_document(turn("a", "b"))] * 3


def test_rows_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows: dict[str, list[dict[str, Any]]] = {
        "chat": [{"messages": [*turn("a", "b"), {"role": "tool", "content": "c", "name": "add"}]}] * 3,
        "alpaca": [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "input": "i", "output": "b"}],
    }
    for format, content in rows.items():
        path = tmp_path / f"{format}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(content), path)
        assert detect_format(path) == format
        assert conversations(path) == conversations(write(tmp_path / f"{format}.jsonl", content))
    parquet.write_table(pyarrow.table({"instruction": ["a", "a"], "output": ["b", None]}), path)
    with pytest.raises(DataError, match=r"alpaca\.parquet, row 2 has an empty value for 'output'"):
        conversations(path)


LABELLED = """
QUESTION: What is
this?

Answer: It is
 ANSWR: indented

and more.
Note: a colon, A: and Q: too

QUESTION:Two?
ANSWER:
"""


def test_a_text_of_questions_and_answers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", LABELLED)
    assert detect_format(path) == "qa"
    answer = "It is\n ANSWR: indented\n\nand more.\nNote: a colon, A: and Q: too"
    assert conversations(path) == [turn("What is\nthis?", answer), turn("Two?", "")]
    path = write(tmp_path / "b.txt", "Q: One\r\nA: 1\r\nAnswer: of course\r\nQ: Two\r\nA : 2")
    assert detect_format(path) == "qa"
    assert conversations(path) == [turn("One", "1\nAnswer: of course"), turn("Two", "2")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("QUESTION: a\nANSWER: b\n\nQUESTION: c\n\nQUESTION: d\nANSWER: e", "line 4: a question without an answer"),
        ("QUESTION: a\nANSWER: b\nQUESTION: c\n", "line 3: a question without an answer"),
        ("QUESTION: a\nANSWER: b\nANSWER: c", "line 3: an answer without a question"),
        ("ANSWER: b\nQUESTION: c\nANSWER: c", "line 1: an answer without a question"),
        ("QUESTION: a\nANSWR: b\nQUESTION: c\nANSWER: d", "line 2: ANSWR: looks like a misspelt label; write QUESTION"),
        ("QUESTION: a\nANSWER: b\nQuestoin: c\nANSWER: d", "line 3: Questoin: looks like"),
        ("\nHello\nQUESTION: a\nANSWER: b", "line 2 begins with no label"),
        ("  \n", "no text"),
    ],
)
def test_a_text_of_questions_with_a_mistake_says_where(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        conversations(write(tmp_path / "a.txt", text), "qa")
    assert str(tmp_path / "a.txt") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "Once upon a time", "text"),
        ("a.txt", "QUESTION: only questions\nQUESTION: here", "text"),
        ("a.txt", "What: QUESTION: a\nANSWER: b", "text"),
        ("a.md", "\n\nQuestion: a\nAnswer: b", "qa"),
        ("a.jsonl", '{"text": "a", "instruction": "b", "output": "c"}', "alpaca"),
        ("a.jsonl", '{"text": "a", "instruction": "b"}', "text"),
        ("a.jsonl", '{"text": "a", "prompt": "b", "completion": "c"}', "text"),
        ("a.json", '[{"instruction": "b", "output": "c"}]', "alpaca"),
    ],
)
def test_the_format_is_seen(tmp_path: Path, name: str, content: str, expected: str) -> None:
    assert detect_format(write(tmp_path / name, content)) == expected


def test_a_table_that_is_none_of_ours_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "instruction,output\na,b\n")
    with pytest.raises(DataError, match=r"a\.csv is a table, .*--format text"):
        open_source(str(path))
    assert open_source(str(path), format="text").format == "text"


def test_a_system_beside_the_turns(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "Be brief."}
    opening = {"role": "system", "content": "Be brief."}
    assert conversations(write(tmp_path / "a.jsonl", [row])) == [[opening, *turn("a", "b")]]
    row["conversations"].insert(0, {"from": "system", "value": "Be long."})  # type: ignore[attr-defined]
    assert conversations(write(tmp_path / "b.jsonl", [row]))[0][0]["content"] == "Be long."


def test_dates_and_bytes_in_messages_are_told(tmp_path: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": b"c"}]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 1: a message holds what is neither text nor number"):
        conversations(tmp_path / "a.parquet")


def test_columns_that_nobody_knows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"body": "a", "title": "b"}])
    assert detect_format(path, text_column="body") == "text"
    with pytest.raises(DataError, match=r"line 1 has no column 'text'; it has: body, title\. .*alpaca.*qa.*chat"):
        detect_format(path)
    with pytest.raises(DataError, match="has no rows"):
        detect_format(write(tmp_path / "a.json", "[]"))
    with pytest.raises(DataError, match="has no rows"):
        conversations(tmp_path / "a.json", "chat")
    with pytest.raises(DataError, match=r"a\.txt is a text file, and chat needs rows"):
        conversations(write(tmp_path / "a.txt", "text"), "chat")


ANSWERED = {"messages": turn("a", "b")}


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("alpaca", {"instruction": "a"}, "has nothing for 'output'; its columns: instruction"),
        ("alpaca", {"instruction": "a", "output": None}, "has an empty value for 'output'"),
        ("alpaca", {"output": "a"}, "has nothing for 'instruction'"),
        ("alpaca", {"instruction": "a", "output": 3}, "'output' holds a int, and text is expected"),
        ("alpaca", {"instruction": "a", "output": "\ud800"}, "is not valid Unicode"),
        ("alpaca", {"instruction": "a", "input": [], "output": "b"}, "'input' holds a list"),
        ("alpaca", {"instruction": "a", "response": 3}, "'response' holds a int"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["a"]]}, "'history' is not .* expected ..question"),
        ("alpaca", {"instruction": "a", "output": "b", "history": "a"}, "'history' is not what was said before"),
        ("qa", {"question": "a"}, "has nothing for 'answer'"),
        ("completion", {"prompt": "a", "completion": None}, "has an empty value for 'completion'"),
        ("chat", {"messages": turn("a", "b")[:1]}, "has no message of the assistant"),
        ("chat", {"messages": []}, "has no message of the assistant"),
        ("chat", {"messages": "a"}, "has no list of messages"),
        ("chat", {"messages": ["a"]}, "message 1 is a str"),
        ("chat", {"messages": [*turn("a", "b"), {"role": "user"}]}, "message 3 has nothing for 'content'"),
        ("chat", {"messages": [{"role": "bot", "content": "a"}]}, "message 1 has the role 'bot'; expected human"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'content' holds a list"),
        ("chat", {"conversations": [{"from": "gpt"}]}, "message 1 has nothing for 'value'"),
        ("chat", {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "message 1 has the weight 0.5"),
        ("chat", {"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "no message of the assistant to"),
        ("chat", ANSWERED | {"tools": "[{"}, "'tools' is text that is not JSON"),
        ("chat", ANSWERED | {"tools": ["add"]}, "'tools' is no list of objects"),
        ("chat", [1], "is a list, not an object"),
    ],
)
def test_a_row_with_a_mistake_says_which(tmp_path: Path, format: str, row: object, expected: str) -> None:
    good = {"alpaca": {"instruction": "a", "output": "b"}, "qa": {"question": "a", "answer": "b"}, "chat": ANSWERED}
    rows = [good.get(format, {"prompt": "a", "completion": "b"}), row]
    for name, place in (("a.jsonl", "line 2"), ("a.json", "row 2")):
        path = write(tmp_path / name, rows)
        with pytest.raises(DataError, match=expected) as caught:
            conversations(path, format)
        assert f"{path}, {place}" in str(caught.value)


def test_an_array_after_empty_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '\n \n[{"prompt": "a", "completion": "b"}]')
    assert conversations(path, "completion") == [turn("a", "b")]


def test_json_that_is_broken(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2 is not a JSON object"):
        conversations(write(tmp_path / "a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": '))
    with pytest.raises(DataError, match="line 1 is not a JSON object: the key 'prompt' stands there twice"):
        conversations(write(tmp_path / "a.jsonl", '{"prompt": "a", "prompt": "c", "completion": "b"}'), "completion")
    with pytest.raises(DataError, match="is not a JSON array"):
        detect_format(write(tmp_path / "a.json", '[{"prompt": "a"'))


def test_sources_of_conversations(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "text": "c"}])
    assert open_source(str(path)).format == "text"
    source = open_source(str(path), format="completion")
    assert source.format == "completion"
    assert list(source.documents()) == [to_document(turn("a", "b"))] * 1
    assert list(source.documents()) == list(open_whole(str(path), format="completion").documents())
    assert source.fingerprint() != open_source(str(path)).fingerprint()
    assert open_source(str(path), text_column="completion").fingerprint() != source.fingerprint()
    labelled = write(tmp_path / "b.txt", LABELLED)
    assert (open_source(str(labelled)).format, open_whole(str(labelled)).format) == ("qa", "qa")
    assert len(list(open_whole(str(labelled)).documents())) == 2
    assert open_whole(str(labelled), format="text").format == "text"
    assert open_source("python-docs").format == "text"


def test_the_files_of_a_source_are_of_one_format(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [ANSWERED])
    write(tmp_path / "b.jsonl", [{"conversations": [{"from": "gpt", "value": "b"}]}])
    assert open_source(str(tmp_path)).format == "chat"
    write(tmp_path / "c.txt", "text")
    with pytest.raises(DataError, match=r"a\.jsonl is chat, .*c\.txt is text\. .*--format"):
        open_source(str(tmp_path))


def test_formats_that_cannot_be(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", [ANSWERED]))
    with pytest.raises(ConfigError, match=r"--format chatt .*did you mean chat\?"):
        open_source(path, format="chatt")
    with pytest.raises(ConfigError, match="--format chat is for files"):
        open_source("python-docs", format="chat")
    with pytest.raises(ConfigError, match="--document line is for text"):
        open_source(str(write(tmp_path / "a.txt", LABELLED)), document="line")
    with pytest.raises(DataError, match="no list of messages"):
        list(open_source(str(write(tmp_path / "b.jsonl", [{"prompt": "a"}])), format="chat").documents())
    assert FORMATS[0] == "auto"


def test_real_instructions() -> None:
    folder = os.environ.get("SEEDBED_TEST_DATA")
    if not folder:
        pytest.skip("needs instruction-1100.json in the folder $SEEDBED_TEST_DATA")
    source = open_source(str(Path(folder) / "instruction-1100.json"))
    documents = list(source.documents())
    assert (source.format, len(documents)) == ("alpaca", 1100)
    assert all([message["role"] for message in from_document(text)] == ["user", "assistant"] for text in documents)
