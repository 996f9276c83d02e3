from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from seedbed.errors import CheckpointError, ConfigError, DataError, MissingExtra
from seedbed.text import Tokenizer, bytes_per_token, train_bpe, train_char
from seedbed.text.tokenizer import batches_of_text

TEXTS = [
    "The store keeps its tokens on the disk, and the rows read them from there.\n",
    "Ein Öl-Ofen für 12 €; naïve café, Ωμέγα, 東京 — 😀\r\n\ttabs  and   spaces\n\n\nlines",
] * 3

TRAINERS: dict[str, Callable[[], Tokenizer]] = {
    "bpe": lambda: train_bpe(TEXTS, 320),
    "char": lambda: train_char(TEXTS),
}


@pytest.fixture(params=list(TRAINERS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TRAINERS[request.param]()


def random_text(seed: int, length: int = 200) -> str:
    """Characters from all of Unicode, with the awkward ones often."""
    rng = random.Random(seed)
    planes = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    awkward = ["\0", "\r\n", "  ", "\u2028", "e\u0301", "\ufeff", "<0x41>", "<|endoftext|>", "Ġ", "▁", "\ufffd"]
    characters = [
        rng.choice(awkward) if rng.random() < 0.2 else chr(rng.randint(*rng.choice(planes))) for _ in range(length)
    ]
    return "".join(characters)


def test_any_text_decodes_to_itself(tokenizer: Tokenizer) -> None:
    for seed in range(100):
        text = random_text(seed)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer.vocab_size
        assert tokenizer.encode_batch([text, ""]) == [ids, []]


def test_the_name_of_a_special_token_in_a_text_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_id], skip_special_tokens=True) == "a<|endoftext|>b"


def test_bpe_has_the_size_asked_for_and_begins_with_the_end_of_text() -> None:
    tokenizer = train_bpe(TEXTS, 300)
    assert tokenizer.vocab_size == 300
    assert (tokenizer.eos_id, tokenizer.bos_id) == (0, None)
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 1.3


def test_bpe_reads_a_stream_once() -> None:
    assert train_bpe(iter(TEXTS), 300).fingerprint == train_bpe(TEXTS, 300).fingerprint


def test_training_is_the_same_in_every_process() -> None:
    program = (
        "from seedbed.text import train_bpe, train_char\n"
        f"texts = {TEXTS!r}\n"
        "print(train_bpe(texts, 320).fingerprint, train_char(texts).fingerprint)"
    )
    here = [train_bpe(TEXTS, 320).fingerprint, train_char(TEXTS).fingerprint]
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        result = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert result.stdout.split() == here


def test_a_character_of_the_training_text_is_one_token() -> None:
    tokenizer = train_char(TEXTS)
    for character in set("".join(TEXTS)):
        assert len(tokenizer.encode(character)) == 1
    assert len(tokenizer.encode("東京")) == 2
    assert len(tokenizer.encode("Ж")) == 2  # never seen: its two bytes
    assert len(tokenizer.encode("abc" * 1000)) == 3000


def test_too_small_a_vocabulary_and_no_text_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 257"):
        train_bpe(TEXTS, 200)
    with pytest.raises(DataError, match="no text"):
        train_bpe([], 300)
    with pytest.raises(DataError, match="no text"):
        train_char([""])


def test_saving_and_loading_changes_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert loaded.decode(loaded.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


def test_settings_and_chat_template_of_a_loaded_tokenizer_are_saved_again(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train_bpe(TEXTS, 300).save(first)
    settings = {"eos_token": {"content": "<|endoftext|>"}, "tokenizer_class": "GPT2Tokenizer", "custom": 1}
    (first / "tokenizer_config.json").write_text(json.dumps(settings))
    (first / "chat_template.jinja").write_text("{{ messages }}")
    Tokenizer.load(first).save(second)
    assert json.loads((second / "tokenizer_config.json").read_text()) == settings
    assert (second / "chat_template.jinja").read_text() == "{{ messages }}"


def test_gpt2_layout(tmp_path: Path) -> None:
    vocab = {"a": 0, "b": 1, "Ġ": 2, "ab": 3, "Ġab": 4, "<|endoftext|>": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("ab abb") == [3, 4, 1]
    assert tokenizer.eos_id == 5
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(CheckpointError, match="Qwen2Tokenizer"):
        Tokenizer.load(tmp_path)


def write_backend(folder: Path, special: list[str]) -> tokenizers.Tokenizer:
    """A tokenizer.json alone, with other special tokens than ours."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.add_special_tokens(special)
    backend.enable_truncation(3)
    backend.enable_padding(length=5)
    backend.save(str(folder / "tokenizer.json"))
    return backend


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<x>"}),
        ("special_tokens_map.json", {"eos_token": {"content": "<x>", "lstrip": False}}),
        ("generation_config.json", {"eos_token_id": [3, 2]}),
        ("config.json", {"eos_token_id": 3}),
    ],
)
def test_the_end_of_text_is_what_the_folder_says(tmp_path: Path, name: str, content: dict[str, object]) -> None:
    write_backend(tmp_path, ["</s>", "<x>"])
    assert Tokenizer.load(tmp_path).eos_id == 2  # a common name, when nothing is said
    (tmp_path / name).write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).eos_id == 3


def test_no_end_of_text_is_an_error(tmp_path: Path) -> None:
    write_backend(tmp_path, ["<x>"])
    with pytest.raises(CheckpointError, match="eos_token"):
        Tokenizer.load(tmp_path)


def test_beginning_of_text(tmp_path: Path) -> None:
    write_backend(tmp_path, ["</s>", "<s>"])
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert Tokenizer.load(tmp_path).bos_id == 3
    assert Tokenizer.load(tmp_path).encode("ab") == [0, 1]


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    write_backend(tmp_path, ["</s>"])
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("ababab") == [0, 1] * 3
    assert tokenizer.encode_batch(["a", "ababab"]) == [[0], [0, 1] * 3]


def test_damaged_and_missing_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match="damaged"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_neither_a_folder_nor_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Tokenizer.load(tmp_path / "nothing")
    (tmp_path / "file.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a file"):
        Tokenizer.load(tmp_path / "file.json")


def test_a_hub_id_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"seedbed\[hub\]"):
        Tokenizer.load("some-owner/some-model")


def test_bytes_per_token() -> None:
    tokenizer = train_char(["aé"])
    assert bytes_per_token(tokenizer, ["aaé", "é"]) == pytest.approx(6 / 4)
    with pytest.raises(DataError):
        bytes_per_token(tokenizer, [])


def test_batches_of_text_keep_order_and_size() -> None:
    texts = ["a" * size for size in (3, 4, 20, 1, 1)]
    batches = list(batches_of_text(texts, max_chars=8))
    assert [text for batch in batches for text in batch] == texts
    assert [len(batch) for batch in batches] == [2, 1, 2]
