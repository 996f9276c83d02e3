from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from seedbed.data import from_texts, open_source, open_whole, sources
from seedbed.data.files import CHUNK_BYTES
from seedbed.data.named import NAMED, HubRows, hub_documents
from seedbed.errors import ConfigError, DataError, MissingExtra


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(spec: Path | str, **options: Any) -> list[str]:
    return list(open_source(str(spec), **options).documents())


def error(spec: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        texts(spec, **options)
    return str(caught.value)


def test_a_text_file_of_any_name(tmp_path: Path) -> None:
    path = write(tmp_path / "notes.log", "\ufeffone\r\ntwo\n\nthree\r\n")
    source = open_source(str(path), document="blank_line")
    assert list(source.documents()) == ["one\ntwo", "three"]
    assert list(source.documents()) == ["one\ntwo", "three"]
    assert source.num_bytes == path.stat().st_size
    assert (source.split, source.has_split("train"), source.has_split("validation")) == ("train", True, False)


def test_newlines_and_characters_on_the_border_of_a_chunk(tmp_path: Path) -> None:
    for shift in range(4):
        text = "é" * (CHUNK_BYTES // 2 - 2) + "x" * shift + "\r\n€€\r\nlast\r"
        path = write(tmp_path / "a.txt", text)
        assert texts(path, document="file") == [text.replace("\r\n", "\n")]


def test_a_folder_has_its_text_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a.rst", "code.py", ".hidden/x.txt", "image.png", "about.json"):
        write(tmp_path / name, f"text of {name}\n")
    write(tmp_path / "rows.jsonl", '{"text": "a row"}\n')
    assert texts(tmp_path) == ["text of a.rst", "text of a/z.md", "text of b.txt", "a row"]
    assert texts(tmp_path / "*.txt") == ["text of b.txt"]
    assert texts(tmp_path / "**" / "*.md") == ["text of a/z.md"]


def test_file_boundaries_always_separate(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "no newline at the end")
    write(tmp_path / "b.txt", "another file")
    assert texts(tmp_path) == ["no newline at the end", "another file"]


def test_rows_of_json_lines(tmp_path: Path) -> None:
    rows = [{"text": "one\r\n\r\ntwo", "id": 1}, {"text": "é — 😀"}, {"text": "  "}]
    content = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    assert texts(write(tmp_path / "a.jsonl", content)) == ["one\n\ntwo", "é — 😀"]
    assert texts(write(tmp_path / "a.json", json.dumps(rows, indent=1))) == ["one\n\ntwo", "é — 😀"]
    long = write(tmp_path / "long.jsonl", json.dumps({"body": "x" * 3_000_000}))
    assert [len(text) for text in texts(long, text_column="body")] == [3_000_000]


def test_rows_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "two\r\n"], "n": [1, 2, 3]}), path)
    assert texts(path) == ["one", "two\n"]
    assert "no column 'body'; it has: text, n" in error(path, text_column="body")
    assert "'n' holds int64" in error(path, text_column="n")
    assert "cannot be read as Parquet" in error(write(tmp_path / "b.parquet", "PAR1 this is not one"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"seedbed\[parquet\]"):
        texts(path)


def test_missing_files_come_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "shakespeare.txt", "text")
    assert "did you mean wikitext-2?" in error("wikitxt-2")
    assert f"did you mean {tmp_path / 'shakespeare.txt'}?" in error(tmp_path / "shakspeare.txt")
    assert "python-docs" in error(tmp_path / "quite" / "other")
    assert "no file matches" in error(tmp_path / "*.csv")
    (tmp_path / "empty").mkdir()
    assert "no text files" in error(tmp_path / "empty")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    assert "is empty" in error(write(tmp_path / "a.txt", ""))
    assert "every document is empty" in error(write(tmp_path / "a.txt", " \n\n"))
    with pytest.raises(DataError, match=r"binary file.*byte 4"):
        open_source(str(write(tmp_path / "a.txt", b"text\0more")))
    late = b"x\n" * 100_000 + b"\0"
    assert "byte 200000" in error(write(tmp_path / "a.txt", late))
    assert "UTF-16" in error(write(tmp_path / "a.txt", "text".encode("utf-16")))


@pytest.mark.parametrize("before", [0, 10, CHUNK_BYTES - 14, CHUNK_BYTES - 13, 2 * CHUNK_BYTES])
def test_invalid_utf8_says_where(tmp_path: Path, before: int) -> None:
    content = b"a" * before + b"\nline two\n\xc3\xa9 caf\xe9 au lait"
    message = error(write(tmp_path / "a.txt", content))
    assert f"{tmp_path / 'a.txt'} is not UTF-8: 0xe9 at byte {before + 16}, line 3" in message
    assert "iconv" in message


def test_a_file_that_ends_within_a_character(tmp_path: Path) -> None:
    assert "at byte 3, line 1" in error(write(tmp_path / "a.txt", b"abc\xe2\x82"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "unfinished', "line 2 is not a JSON object: Invalid control character at column 21"),
        ('["text"]', "line 2 is a list"),
        ('{"body": 1, "id": 2}', "line 2 has no column 'text'; it has: body, id"),
        ('{"text": 5}', "line 2: column 'text' holds a int"),
        ('{"text": "\\ud800"}', "line 2 is not valid Unicode"),
    ],
)
def test_a_broken_row_says_which(tmp_path: Path, line: str, expected: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    message = error(path)
    assert expected in message
    assert str(path) in message


def test_the_fingerprint_is_of_the_content_and_the_options(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n\ntwo\n")
    first = open_source(str(path)).fingerprint()
    assert open_source(str(write(tmp_path / "b.txt", "one\n\ntwo\n"))).fingerprint() == first
    assert open_source(str(path), document="line").fingerprint() != first
    assert open_source(str(write(tmp_path / "c.txt", "one\n\ntwo!\n"))).fingerprint() != first
    assert open_source(str(write(tmp_path / "a.jsonl", '{"text": "one\\n\\ntwo"}'))).fingerprint() != first
    assert from_texts(["ab", "c"]).fingerprint() != from_texts(["a", "bc"]).fingerprint()


def test_a_derived_source_has_other_documents_and_its_own_fingerprint(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "a.txt", "one\n\ntwo\n")), document="blank_line")
    shouted = source.derived(lambda: (text.upper() for text in source.documents()), f"upper {source.fingerprint()}")
    assert list(shouted.documents()) == ["ONE", "TWO"]
    assert (shouted.format, shouted.name, shouted.num_bytes) == (source.format, source.name, source.num_bytes)
    assert len({source.fingerprint(), shouted.fingerprint(), source.derived(shouted.documents, "x").fingerprint()}) == 3


def test_the_fingerprint_of_a_text_does_not_change_with_the_program(tmp_path: Path) -> None:
    """Stores in users' caches are found by it."""
    write(tmp_path / "a.txt", "one\n\ntwo\n")
    write(tmp_path / "b.jsonl", '{"text": "three"}\n')
    assert open_source(str(tmp_path)).fingerprint() == (
        "92069e3fca06f019ba58130e3478ddc52fc7ef1f123bbd92e8a7a3818acf1944"
    )


def test_options_that_cannot_be(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    with pytest.raises(ConfigError, match=r"blank_lines.*did you mean blank_line\?"):
        open_source(str(path), document="blank_lines")
    with pytest.raises(ConfigError, match="--val_data"):
        open_source(str(path), split="validation")
    with pytest.raises(ConfigError, match="it has: train"):
        open_source("python-docs", split="validation")
    with pytest.raises(ConfigError, match="each row is a document"):
        open_source(str(write(tmp_path / "a.jsonl", '{"text": "a"}')), document="line")


def test_named_sources_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"seedbed\[hub\]"):
        open_source("wikitext-2", split="test")


def test_wikitext_rows_are_put_together_into_articles(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    lines = ["", " = One = \n", "", " text \n", " = = Part = = \n", "", " more \n", "", " = Two = \n", "", " end \n"]
    table = datasets.Dataset.from_dict({"text": lines})
    asked: list[object] = []

    def load_dataset(repo: str, config: str | None, split: str) -> Any:
        asked.append((repo, config, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("wikitext-2", split="validation")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "validation")]
    assert list(source.documents()) == [" = One = \n\n text \n = = Part = = \n\n more ", " = Two = \n\n end "]
    assert source.has_split("test")
    assert source.fingerprint() == open_source("wikitext-2", split="validation").fingerprint()
    assert list(hub_documents(table, HubRows("any"))) == lines


def test_a_data_set_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = error("tinystories")
    assert "no route to the hub. Check the network" in message


def test_every_named_source_has_a_training_split() -> None:
    assert all("train" in named.splits and named.about and named.size for named in NAMED.values())


def test_what_is_measured_is_whole_and_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "a.txt"
    text.write_text("One.\n\nTwo.\n" * 3000, encoding="utf-8")
    assert len(list(open_whole(str(text)).documents())) == 1
    assert len(list(open_whole(str(text), document="blank_line").documents())) > 1000
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "One."}\n{"text": "Two."}\n', encoding="utf-8")
    assert list(open_whole(str(rows)).documents()) == ["One.", "Two."]
    assert open_whole("python-docs").split == "train"
    with pytest.raises(ConfigError, match="no split 'test'"):
        open_whole("python-docs", split="test")
    opened: list[str] = []
    monkeypatch.setattr(sources, "load_hub_documents", lambda *wanted: opened.append(wanted[-1]))
    assert (open_whole("wikitext-2").split, open_whole("tinystories").split) == ("test", "validation")
    assert opened == ["test", "validation"]
