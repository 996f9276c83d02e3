from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers

from seedbed.errors import CheckpointError, ConfigError, DataError, MissingExtra
from seedbed.text import Tokenizer, bytes_per_token, train_bpe, train_char
from seedbed.text.tokenizer import END_OF_TEXT, batches_of_text

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
    train_bpe(["some words and some more words"] * 9, 270).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "\ud8ff"}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json.*surrogates"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "more": "🦊"}))
    assert Tokenizer.load(tmp_path).eos_token == "<|endoftext|>"


@pytest.mark.parametrize("prefix", ["##", "é" * 40, "\0"])
def test_merges_without_their_prefix_are_refused(tmp_path: Path, prefix: str) -> None:
    train_bpe(["some words and some more words"] * 9, 270).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    assert content["model"]["merges"]
    content["model"]["continuing_subword_prefix"] = prefix
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="lacks the continuing_subword_prefix"):  # the library would abort
        Tokenizer.load(tmp_path)


def test_damage_that_shows_only_in_use_is_told(tmp_path: Path) -> None:
    train_bpe(["some words and some more words"] * 9, 270).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    del content["model"]["vocab"]["æ"]  # stands for the first byte of 木
    content["model"]["unk_token"] = "nowhere"
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path)
    encoders: list[Callable[[str], object]] = [
        tokenizer.encode,
        lambda text: tokenizer.encode_batch([text]),
        tokenizer.encode_with_special_tokens,
        lambda text: tokenizer.encode_with_special_tokens(text, literal=[1]),
    ]
    for encode in encoders:
        with pytest.raises(CheckpointError, match="Unk token `nowhere` not found"):
            encode("木木")


def test_a_pattern_that_would_take_for_ever_ends_in_an_error(tmp_path: Path) -> None:
    train_bpe(["some words and some more words"] * 9, 270).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
    joined = {"type": "Sequence", "decoders": [{"type": "Fuse"}, replace]}
    path.write_text(json.dumps(content | {"pre_tokenizer": split, "decoder": joined}))
    tokenizer, text = Tokenizer.load(tmp_path), "a" * 60 + "b"
    ids = [content["model"]["vocab"][letter] for letter in text]
    attempts: list[Callable[[], object]] = [
        lambda: tokenizer.encode(text),
        lambda: tokenizer.encode_with_special_tokens(text),
        lambda: tokenizer.decode(ids),
    ]
    for attempt in attempts:
        with pytest.raises(CheckpointError, match="the tokenizer is damaged"):
            attempt()


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


def test_special_tokens_are_recognised_where_that_is_asked_for(tokenizer: Tokenizer) -> None:
    text = "naïve <|endoftext|> 😀\n<|endoftext|>"
    ids, offsets = tokenizer.encode_with_special_tokens(text)
    assert ids == [
        *tokenizer.encode("naïve "),
        tokenizer.eos_id,
        *tokenizer.encode(" 😀\n"),
        tokenizer.eos_id,
    ]
    assert [text[begin:end] for token, (begin, end) in zip(ids, offsets, strict=True) if token == 0] == [
        END_OF_TEXT
    ] * 2
    place = text.index(END_OF_TEXT) + 1
    ids, offsets = tokenizer.encode_with_special_tokens(text, [place])
    assert ids == [*tokenizer.encode("naïve <|endoftext|> 😀\n"), tokenizer.eos_id]
    assert (offsets[0][0], offsets[-1]) == (0, (len(text) - len(END_OF_TEXT), len(text)))
    assert all(before <= after for (before, _), (after, _) in pairwise(offsets))
    assert tokenizer.encode_with_special_tokens("") == ([], [])


def test_white_space_keeps_its_place_whatever_the_file_says() -> None:
    """GPT-2's post-processor takes it out of the offsets of a token."""
    tokenizer = train_bpe(TEXTS, 320)
    tokenizer._backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    text = "a\n\n b<|endoftext|>\n"
    _, offsets = tokenizer.encode_with_special_tokens(text)
    assert "".join(text[begin:end] for begin, end in offsets) == text


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_name_as_text_in_the_middle_begins_no_new_text(scheme: str) -> None:
    """SentencePiece's way puts a space before a text, and some tokenizers do so only at its very beginning."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator([*TEXTS, "</s>"], trainer)
    tokenizer = Tokenizer(backend, "</s>", "<s>")
    text = "<s>The </s> store</s>The"
    ids, offsets = tokenizer.encode_with_special_tokens(text, [text.index("</s>") + 1])
    plain, _ = tokenizer.encode_with_special_tokens("<s>The x store</s>The")
    assert (ids[0], ids.count(tokenizer.eos_id)) == (tokenizer.bos_id, 1)
    assert ids[ids.index(tokenizer.eos_id) :] == plain[plain.index(tokenizer.eos_id) :]
    assert ids[:2] == plain[:2]
    assert "".join(dict.fromkeys(text[begin:end] for begin, end in offsets if begin < 3)) == "<s>"


def test_tokens_are_added_after_the_last(tokenizer: Tokenizer, tmp_path: Path) -> None:
    size = tokenizer.vocab_size
    grown = tokenizer.with_tokens(["<|a|>", END_OF_TEXT, "<|b|>"], eos_token="<|b|>")
    assert (grown.vocab_size, tokenizer.vocab_size) == (size + 2, size)
    assert grown.encode_with_special_tokens("<|a|><|b|><|endoftext|>")[0] == [size, size + 1, 0]
    assert (grown.eos_id, grown.stop_ids) == (size + 1, frozenset({0, size + 1}))
    assert grown.special_tokens == {"<|a|>", "<|b|>", END_OF_TEXT}
    assert grown.encode(TEXTS[1] + "<|a|>") == tokenizer.encode(TEXTS[1] + "<|a|>")
    assert grown.fingerprint != tokenizer.fingerprint
    grown.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.fingerprint, loaded.eos_token) == (grown.fingerprint, "<|b|>")


def test_added_tokens_are_in_all_settings(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train_bpe(TEXTS, 300).save(first)
    listed = {"0": {"content": END_OF_TEXT, "special": True}}
    settings = {"eos_token": {"content": END_OF_TEXT}, "added_tokens_decoder": listed, "custom": 1}
    (first / "tokenizer_config.json").write_text(json.dumps(settings))
    (first / "special_tokens_map.json").write_text(json.dumps({"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}))
    Tokenizer.load(first).with_tokens(["<|b|>"], eos_token="<|b|>").save(second)
    saved = json.loads((second / "tokenizer_config.json").read_text())
    assert (saved["eos_token"], saved["custom"]) == ("<|b|>", 1)
    assert {place: token["content"] for place, token in saved["added_tokens_decoder"].items()} == {
        "0": END_OF_TEXT,
        "300": "<|b|>",
    }
    again = json.loads((second / "special_tokens_map.json").read_text())
    assert again == {"eos_token": "<|b|>", "pad_token": END_OF_TEXT}
    assert Tokenizer.load(second).special_tokens_map == {"eos_token": "<|b|>", "pad_token": END_OF_TEXT}


def test_where_a_chat_template_is(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 300)
    assert tokenizer.chat_template is None
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    for template, expected in [
        ("one", "one"),
        ([{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}], "three"),
        ([{"name": "tool_use", "template": "two"}], None),
        (None, None),
    ]:
        path.write_text(json.dumps({"eos_token": END_OF_TEXT, "chat_template": template}))
        assert Tokenizer.load(tmp_path).chat_template == expected
    path.write_text(json.dumps({"eos_token": END_OF_TEXT, "chat_template": "one"}))
    (tmp_path / "chat_template.jinja").write_text("four")
    assert Tokenizer.load(tmp_path).chat_template == "four"


def test_a_chat_template_takes_the_place_of_another(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train_bpe(TEXTS, 300).with_chat_template("new").save(first)
    assert Tokenizer.load(first).chat_template == "new"
    (first / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT, "chat_template": "old"}))
    Tokenizer.load(first).with_chat_template("newer").with_tokens(["<|a|>"]).save(second)
    assert Tokenizer.load(second).chat_template == "newer"
    assert "chat_template" not in json.loads((second / "tokenizer_config.json").read_text())


@pytest.mark.parametrize(("ids", "expected"), [([3, 2, 99, "x"], {2, 3}), (3, {2, 3}), (None, {2})])
def test_a_model_may_stop_at_several_tokens(tmp_path: Path, ids: object, expected: set[int]) -> None:
    write_backend(tmp_path, ["</s>", "<x>"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.stop_ids == expected
    assert tokenizer.with_chat_template("a").stop_ids == expected


def test_half_a_surrogate_pair_is_refused() -> None:
    tokenizer = train_char(["ab"])
    for encode in (tokenizer.encode, tokenizer.encode_with_special_tokens):
        with pytest.raises(DataError, match="no character"):
            encode("a\ud800")


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


def test_the_end_of_text_is_kept_when_only_the_model_s_files_name_it(tmp_path: Path) -> None:
    """A folder whose tokenizer_config.json is silent, then saved without a model."""
    tokenizer = train_bpe(["some text to learn from " * 20], 300).with_tokens(["<|im_end|>"])
    tokenizer.save(tmp_path / "model")
    (tmp_path / "model/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    end = tokenizer.encode_with_special_tokens("<|im_end|>")[0][0]
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"eos_token_id": [end, tokenizer.eos_id]}))
    loaded = Tokenizer.load(tmp_path / "model")
    assert loaded.eos_id == end
    loaded.save(tmp_path / "alone")
    again = Tokenizer.load(tmp_path / "alone")
    assert (again.eos_id, again.stop_ids) == (loaded.eos_id, loaded.stop_ids)
    assert loaded.stop_ids == frozenset([end, tokenizer.eos_id])
