from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from seedbed.data import Reading, Source, Store, from_texts, held_out, open_source, open_store
from seedbed.data import store as store_module
from seedbed.data.conversations import to_document
from seedbed.data.store import split_long
from seedbed.errors import DataError, StorageError
from seedbed.text import Tokenizer, train_bpe, train_char
from seedbed.text.template import find_template

TEXTS = ["The first document.", "A second one: naïve café, 東京.", "x", "The first document.", "Line\n\nline " * 50]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 300)


def contents(store: Store) -> list[bytes]:
    return [path.read_bytes() for path in sorted(store.path.iterdir())]


def test_a_store_holds_every_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = open_store(from_texts(TEXTS), Reading(tokenizer), cache=tmp_path)
    assert store.num_documents == len(TEXTS)
    for i, text in enumerate(TEXTS):
        assert store.tokens(i).tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    assert store.num_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert store.target_bytes.tolist() == store.num_bytes.tolist()
    assert store.starts.tolist() == [tokenizer.eos_id] * len(TEXTS)
    assert store.mask is None
    assert store.trained(0).all()
    assert store.num_tokens == sum(len(store.tokens(i)) for i in range(len(TEXTS)))
    assert store.digests[0] == store.digests[3]
    assert len(set(store.digests.tolist())) == 4
    assert store.digests[2] == int.from_bytes(hashlib.blake2b(b"x", digest_size=8).digest(), "little")
    assert (store.stream.dtype.name, store.eos_id, store.vocab_size) == ("uint16", 0, 300)
    with pytest.raises(ValueError, match="read-only"):
        store.stream[0] = 1


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    characters = "".join(chr(0x20000 + i) for i in range(66_000))
    tokenizer = train_char([characters])
    store = open_store(from_texts([characters[-3:]]), Reading(tokenizer), cache=tmp_path)
    assert store.stream.dtype.name == "uint32"
    assert tokenizer.decode(store.tokens(0)[:-1].tolist()) == characters[-3:]


def test_a_store_is_made_once(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_store(from_texts(TEXTS), Reading(tokenizer), cache=tmp_path)
    monkeypatch.setattr(store_module, "_build", None)
    again = open_store(from_texts(TEXTS, name="other name"), Reading(tokenizer), cache=tmp_path)
    assert again.path == first.path


def test_another_text_or_tokenizer_is_another_store(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = train_bpe(TEXTS, 290)
    pairs = [(TEXTS, tokenizer), (TEXTS[1:], tokenizer), (TEXTS, other)]
    assert len({open_store(from_texts(texts), Reading(by), cache=tmp_path).path for texts, by in pairs}) == 3


def test_the_cache_is_where_the_environment_says(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEEDBED_CACHE", str(tmp_path / "here"))
    assert open_store(from_texts(TEXTS), Reading(tokenizer)).path.parent == tmp_path / "here"
    monkeypatch.delenv("SEEDBED_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_store(from_texts(TEXTS), Reading(tokenizer)).path.parent == tmp_path / "home/.cache/seedbed"


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "target_bytes.bin", "store.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_a_damaged_store_is_made_again(tokenizer: Tokenizer, tmp_path: Path, name: str, damage: str) -> None:
    store = open_store(from_texts(TEXTS), Reading(tokenizer), cache=tmp_path)
    good = contents(store)
    file = store.path / name
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 8)
    elif damage == "gone":
        file.unlink()
    else:
        content = file.read_bytes()
        place = content.index(b'"eos_id": 0') + 10 if name == "store.json" else len(content) // 2
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.warns(UserWarning, match="damaged"):
        again = open_store(from_texts(TEXTS), Reading(tokenizer), cache=tmp_path)
    assert contents(again) == good


def test_broken_text_leaves_nothing_behind(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine text\n" * 500_000 + b"\xff")
    with pytest.raises(DataError, match="byte 5000000"):
        open_store(open_source(str(path)), Reading(tokenizer), cache=tmp_path / "cache")
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_full_disk(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module, "_flush", full)
    with pytest.raises(StorageError, match=r"No space left.*SEEDBED_CACHE"):
        open_store(from_texts(TEXTS), Reading(tokenizer), cache=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_progress_ends_with_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    texts = ["some words in a row " * 5000] * 60
    open_store(
        from_texts(texts), Reading(tokenizer), cache=tmp_path, progress=lambda done, total: seen.append((done, total))
    )
    total = sum(len(text) for text in texts)
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_a_document_in_pieces_has_the_tokens_of_the_whole() -> None:
    rng = random.Random(0)
    words = ["It's", "the", "naïve", "東京", "3.14", "end.\n\n", "(yes)", "  ", "don't", "\ttab", "x"]
    text = " ".join(rng.choice(words) for _ in range(30_000))
    pieces = split_long(text, 5000)
    assert "".join(pieces) == text
    assert len(pieces) > 20
    tokenizer = train_bpe([text[:20_000]], 400)
    assert [i for ids in tokenizer.encode_batch(pieces) for i in ids] == tokenizer.encode(text)
    assert split_long("short", 5000) == ["short"]
    assert "".join(split_long("y" * 12_001, 5000)) == "y" * 12_001


def test_long_documents_are_stored_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["before", "many words of text " * 40_000, "after"]
    store = open_store(from_texts(texts), Reading(tokenizer), cache=tmp_path)
    assert [tokenizer.decode(store.tokens(i)[:-1].tolist()) for i in range(3)] == texts


def test_no_document_is_on_both_sides(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [f"Document number {i % 70} says something of its own." for i in range(100)]
    store = open_store(from_texts(texts), Reading(tokenizer), cache=tmp_path)
    chosen = held_out(store.digests, store.num_bytes, 0.2)
    held = {text for text, out in zip(texts, chosen, strict=True) if out}
    kept = {text for text, out in zip(texts, chosen, strict=True) if not out}
    assert held
    assert kept
    assert not held & kept


# A process that says when the first batch is done, and then waits for a line on its input.
BUILDER = """
import sys
from pathlib import Path
from seedbed.data import Reading, from_texts, open_store
from seedbed.text import Tokenizer

def wait(done, total):
    if done < total:
        print("begun", flush=True)
        sys.stdin.readline()

texts = ["some words in a row " * 5000] * 45
store = open_store(from_texts(texts), Reading(Tokenizer.load(sys.argv[1])), cache=Path(sys.argv[2]), progress=wait)
print("tokens", store.num_tokens, flush=True)
"""


def start(tokenizer: Tokenizer, folder: Path) -> subprocess.Popen[str]:
    tokenizer.save(folder / "tokenizer")
    command = [sys.executable, "-c", BUILDER, str(folder / "tokenizer"), str(folder / "cache")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def big_source() -> Source:
    return from_texts(["some words in a row " * 5000] * 45)


def test_two_processes_at_once_make_one_store(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, second = start(tokenizer, tmp_path), start(tokenizer, tmp_path)
    for process in (first, second):  # both before waiting for either: one of them waits for the other
        assert process.stdin is not None
        process.stdin.write("\n\n\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0].split() for process in (first, second)]
    assert outputs[0][-2:] == outputs[1][-2:]
    assert outputs[0][-2] == "tokens"
    assert sorted(len(output) for output in outputs) != [2, 2]  # one of them made it
    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(folders) == 1
    store = open_store(big_source(), Reading(tokenizer), cache=tmp_path / "cache")
    assert [store.path] == folders


def test_a_killed_process_leaves_no_half_store(tokenizer: Tokenizer, tmp_path: Path) -> None:
    process = start(tokenizer, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    cache = tmp_path / "cache"
    (half,) = cache.glob("*.tmp")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert half.exists()
    other = open_store(from_texts(TEXTS), Reading(tokenizer), cache=cache)  # any build cleans up what is dead
    assert not half.exists()
    store = open_store(big_source(), Reading(tokenizer), cache=cache)
    assert store.num_documents == 45
    assert {path for path in cache.iterdir() if path.is_dir()} == {other.path, store.path}


def test_a_living_build_is_left_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    process = start(tokenizer, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    open_store(from_texts(TEXTS), Reading(tokenizer), cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.tmp"))) == 1
    output, _ = process.communicate("\n\n\n", timeout=60)
    assert output.split()[-2] == "tokens"
    assert process.returncode == 0


def test_the_facts_are_written_for_people_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = open_store(from_texts(TEXTS, name="mine"), Reading(tokenizer), cache=tmp_path)
    facts = json.loads((store.path / "store.json").read_text())
    assert (facts["source"], facts["documents"], facts["tokens"]) == ("mine", len(TEXTS), store.num_tokens)
    assert facts["bytes"] == sum(store.num_bytes)


# Conversations


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CONVERSATIONS = [turn("Who?", "The naïve one."), turn("Where is it?", "東京") + turn("And now?", "Line"), turn("x", "")]


def conversation_store(
    tokenizer: Tokenizer, cache: Path, template: str = "qa", train_on_prompt: bool = False, chats: object = None
) -> Store:
    reading = Reading(tokenizer, find_template(tokenizer, template, "qa"), train_on_prompt)
    documents = [to_document(messages) for messages in (chats or CONVERSATIONS)]  # type: ignore[attr-defined]
    return open_store(from_texts(documents), reading, cache=cache)


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_a_store_holds_conversations_and_what_is_learnt(
    tokenizer: Tokenizer, tmp_path: Path, train_on_prompt: bool
) -> None:
    store = conversation_store(tokenizer, tmp_path, train_on_prompt=train_on_prompt)
    template = find_template(tokenizer, "qa", "qa")
    assert store.mask is not None
    assert len(store.mask) == store.num_tokens
    for i, messages in enumerate(CONVERSATIONS):
        example = template.example(messages)
        assert [store.starts[i], *store.tokens(i)] == example.token_ids
        learnt = [True] * len(store.tokens(i)) if train_on_prompt else example.trained[1:]
        assert store.trained(i).tolist() == learnt
        said = [m["content"] for m in messages if train_on_prompt or m["role"] == "assistant"]
        assert store.target_bytes[i] == sum(len(text.encode()) for text in said)
        assert store.num_bytes[i] == len(to_document(messages).encode())
    learnt_text = tokenizer.decode(store.tokens(0)[store.trained(0)].tolist(), skip_special_tokens=True)
    assert learnt_text.endswith("ANSWER: The naïve one." if train_on_prompt else " The naïve one.")
    assert learnt_text.startswith(" The") != train_on_prompt
    assert store.without_end == 0


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_an_answer_that_begins_a_text_is_learnt_from_its_first_token(
    tokenizer: Tokenizer, tmp_path: Path, train_on_prompt: bool
) -> None:
    """Before it stands the end of text, unless the first token is only seen because there is no question."""
    store = conversation_store(tokenizer, tmp_path, "plain", train_on_prompt, [turn("", "The first")])
    ids = [*tokenizer.encode("The first"), tokenizer.eos_id]
    assert [int(store.starts[0]), *store.tokens(0).tolist()] == (ids if train_on_prompt else [tokenizer.eos_id, *ids])
    assert store.trained(0).all()


def test_answers_without_an_end_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "endless.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}", encoding="utf-8")
    assert conversation_store(tokenizer, tmp_path, str(path)).without_end == 3


def test_another_template_or_mask_is_another_store(tokenizer: Tokenizer, tmp_path: Path) -> None:
    kinds = [("qa", False), ("qa", True), ("alpaca", False)]
    assert len({conversation_store(tokenizer, tmp_path, *kind).path for kind in kinds}) == 3


def test_a_damaged_mask_is_made_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = conversation_store(tokenizer, tmp_path)
    good = contents(store)
    os.truncate(store.path / "mask.bin", store.num_tokens - 1)
    with pytest.warns(UserWarning, match="damaged"):
        again = conversation_store(tokenizer, tmp_path)
    assert contents(again) == good


def test_more_conversations_than_are_read_at_once(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(conversation_store(tokenizer, tmp_path / "a"))
    monkeypatch.setattr(store_module, "CONVERSATIONS_AT_ONCE", 2)
    assert contents(conversation_store(tokenizer, tmp_path / "b")) == whole
