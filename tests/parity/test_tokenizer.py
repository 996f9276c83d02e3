"""Our tokenizers opened by transformers, beside a config.json of every family we write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from seedbed.text import Tokenizer, train_bpe, train_char

transformers = pytest.importorskip("transformers")

TEXTS = [
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n",
    "Übung 1234 macht's: naïve café — 東京 😀, isn't it? \r\n\t(x == y)  . , ! \n\n\n end",
] * 4
TRAINERS: dict[str, Callable[[], Tokenizer]] = {
    "bpe": lambda: train_bpe(TEXTS, 340),
    "char": lambda: train_char(TEXTS),
}


@pytest.mark.parametrize("family", [None, "gpt2", "llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", list(TRAINERS))
def test_auto_tokenizer_reads_the_same_ids(kind: str, family: str | None, tmp_path: Path) -> None:
    ours = TRAINERS[kind]()
    ours.save(tmp_path)
    if family:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS[:2], "Never seen: Жук, ≈, \u2028, \0 <0x41> 'LL we'll", " leading and trailing "]:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text == ours.decode(ids)
    assert (len(theirs), theirs.eos_token_id) == (ours.vocab_size, ours.eos_id)


def test_a_tokenizer_that_transformers_saved(tmp_path: Path) -> None:
    train_bpe(TEXTS, 340).save(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    theirs.add_special_tokens({"bos_token": "<bos>"})
    theirs.save_pretrained(tmp_path / "theirs")
    again = Tokenizer.load(tmp_path / "theirs")
    assert (again.eos_id, again.bos_id, again.vocab_size) == (0, 340, 341)
    assert again.encode(TEXTS[1]) == theirs(TEXTS[1])["input_ids"]


def test_gpt2_on_wikitext(tmp_path: Path) -> None:
    folder = Path(os.environ.get("SEEDBED_TEST_DATA", "")) / "gpt2-tokenizer"
    if not os.environ.get("SEEDBED_TEST_DATA") or not folder.is_dir():
        pytest.skip("needs GPT-2's vocabulary and WikiText-2 in the folder $SEEDBED_TEST_DATA")
    text = (folder.parent / "wikitext-2-valid.txt").read_text(encoding="utf-8")
    ours = Tokenizer.load(folder)
    ids = ours.encode(text)
    assert len(ids) == 258_659
    assert ours.decode(ids) == text
    ours.save(tmp_path)
    for theirs in (
        transformers.GPT2TokenizerFast.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    ):
        assert theirs(text)["input_ids"] == ids
