from __future__ import annotations

import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from seedbed.data.conversations import to_document
from seedbed.errors import ConfigError, DataError
from seedbed.evaluate import Evaluation, evaluate, windows
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Decoder
from seedbed.text.template import find_template
from seedbed.text.tokenizer import Tokenizer, train_char

TEXT = "to be, or not to be: that is the question"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char([TEXT])


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    torch.manual_seed(0)
    config = from_scratch(
        "llama",
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        num_layers=2,
        num_heads=2,
        max_seq_len=32,
        dropout=0.5,
    )
    model = Decoder(config)
    for p in model.parameters():  # so that predictions depend on the context
        p.data.mul_(8.0) if p.ndim > 1 else None
    return model


@pytest.mark.parametrize(("length", "max_seq_len"), [(2, 5), (6, 5), (7, 5), (23, 5), (23, 1), (5, 9)])
def test_every_token_but_the_first_is_scored_once(length: int, max_seq_len: int) -> None:
    tokens = np.arange(length, dtype=np.int32)
    for stride in range(1, max_seq_len + 1):
        scored: list[int] = []
        for number, (window, last) in enumerate(windows(tokens, max_seq_len, stride)):
            assert len(window) <= max_seq_len + 1
            assert number == 0 or last <= stride
            scored += window[-last:].tolist()
        assert scored == list(range(1, length))


def test_a_smaller_stride_keeps_at_least_the_promised_context() -> None:
    for window, last in list(windows(np.arange(100, dtype=np.int32), 10, 4))[1:]:
        assert len(window) - 1 - last >= 10 - 4


def test_values_by_hand() -> None:
    result = Evaluation(nats=20.0, tokens=10, words=4, bytes=40, max_seq_len=8, stride=4)
    assert result.nats_per_token == 2.0
    assert result.token_ppl == pytest.approx(math.exp(2))
    assert result.word_ppl == pytest.approx(math.exp(5))
    assert result.bits_per_byte == pytest.approx(0.5 / math.log(2))
    assert result.to_json(model="m", data="d") == {
        "nats_per_token": 2.0,
        "token_ppl": result.token_ppl,
        "word_ppl": result.word_ppl,
        "bits_per_byte": result.bits_per_byte,
        "tokens": 10,
        "words": 4,
        "bytes": 40,
        "max_seq_len": 8,
        "stride": 4,
        "cut": 0,
        "left_out": 0,
        "model": "m",
        "data": "d",
    }


def test_values_too_large_for_json_are_null() -> None:
    text_without_spaces = Evaluation(nats=9e4, tokens=10_000, words=1, bytes=30_000, max_seq_len=8, stride=8)
    assert text_without_spaces.word_ppl == math.inf
    printed = json.loads(json.dumps(text_without_spaces.to_json("m", "d"), allow_nan=False))
    assert printed["word_ppl"] is None
    assert printed["nats_per_token"] == 9.0
    blank = Evaluation(nats=math.nan, tokens=2, words=0, bytes=3, max_seq_len=8, stride=8)
    assert blank.to_json("m", "d")["nats_per_token"] is None
    assert blank.word_ppl == math.inf


def test_words_bytes_and_tokens_are_counted(model: Decoder, tokenizer: Tokenizer) -> None:
    result = evaluate(model, tokenizer, ["to  be\u00a0or\n", "", "t", "né €😀"], max_seq_len=4)
    # Characters the tokenizer does not know are their bytes; one of a single token predicts nothing.
    assert result.words == 3 + 2
    assert result.bytes == 11 + 11
    assert result.tokens == sum(len(tokenizer.encode(text)) - 1 for text in ("to  be\u00a0or\n", "né €😀"))
    assert (result.max_seq_len, result.stride) == (4, 4)


def test_batches_do_not_change_the_result(model: Decoder, tokenizer: Tokenizer) -> None:
    documents = [TEXT[:n] for n in (41, 3, 17, 2, 30)] * 5
    one = evaluate(model, tokenizer, documents, max_seq_len=16, batch_size=1)
    many = evaluate(model, tokenizer, documents, max_seq_len=16, batch_size=7)
    assert one.tokens == many.tokens == sum(len(d) - 1 for d in documents)
    assert one.nats == pytest.approx(many.nats, rel=1e-6)


def test_documents_do_not_see_each_other(model: Decoder, tokenizer: Tokenizer) -> None:
    parts = [evaluate(model, tokenizer, [d], max_seq_len=16).nats for d in (TEXT, TEXT[5:])]
    together = evaluate(model, tokenizer, iter([TEXT, TEXT[5:]]), max_seq_len=16)
    assert together.nats == pytest.approx(sum(parts), rel=1e-6)


def test_a_smaller_stride_gives_more_context(model: Decoder, tokenizer: Tokenizer) -> None:
    no_overlap = evaluate(model, tokenizer, [TEXT], max_seq_len=8)
    overlap = evaluate(model, tokenizer, [TEXT], max_seq_len=8, stride=2)
    assert overlap.tokens == no_overlap.tokens
    assert overlap.stride == 2
    assert overlap.nats != pytest.approx(no_overlap.nats, rel=1e-6)


def test_dropout_is_off_and_the_mode_is_restored(model: Decoder, tokenizer: Tokenizer) -> None:
    model.train()
    state = torch.get_rng_state()
    first = evaluate(model, tokenizer, [TEXT], max_seq_len=8)
    assert model.training
    assert torch.get_rng_state().equal(state)
    model.eval()
    assert evaluate(model, tokenizer, [TEXT], max_seq_len=8) == first
    assert not model.training


def test_of_a_conversation_that_is_cut_only_what_is_scored_counts(model: Decoder, tokenizer: Tokenizer) -> None:
    """The bytes and words of what was cut would make any model look good."""
    template = find_template(tokenizer, "plain", "completion")
    answer = " ".join(["to"] * 9)
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": answer}]
    whole, cut = (
        evaluate(model, tokenizer, [to_document(turns)], max_seq_len=length, template=template) for length in (32, 15)
    )
    assert (whole.cut, cut.cut) == (0, 1)
    assert whole.bytes == len(answer)
    assert cut.bytes / whole.bytes == pytest.approx(cut.tokens / whole.tokens, rel=0.1)
    assert cut.words / whole.words == pytest.approx(cut.tokens / whole.tokens, rel=0.1)
    with pytest.raises(DataError, match=r"none has an answer that begins within 2 tokens\. Raise --max_seq_len"):
        evaluate(model, tokenizer, [to_document(turns)], max_seq_len=2, template=template)


class EnoughError(Exception):
    """Stops an evaluation from its progress callback."""


def test_a_large_text_is_read_a_little_at_a_time(model: Decoder, tokenizer: Tokenizer) -> None:
    read = 0

    def documents() -> Iterator[str]:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield TEXT * 10_000

    def stop(tokens: int) -> None:
        raise EnoughError(tokens)

    with pytest.raises(EnoughError, match="256"):
        evaluate(model, tokenizer, documents(), max_seq_len=32, batch_size=8, progress=stop)
    assert read < 20


def test_bad_windows_are_refused(model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="32 positions"):
        evaluate(model, tokenizer, [TEXT], max_seq_len=33)
    for stride in (0, 9):
        with pytest.raises(ConfigError, match="stride"):
            evaluate(model, tokenizer, [TEXT], max_seq_len=8, stride=stride)
    with pytest.raises(ConfigError) as both:
        evaluate(model, tokenizer, [TEXT], max_seq_len=0, stride=0)
    assert len(both.value.problems) == 2


@pytest.mark.parametrize("documents", [[], [""], ["a", "b"]])
def test_nothing_to_predict_is_an_error(model: Decoder, tokenizer: Tokenizer, documents: list[str]) -> None:
    with pytest.raises(DataError, match="nothing to predict"):
        evaluate(model, tokenizer, documents, max_seq_len=8)


def test_a_long_text_is_tokenized_in_pieces_with_the_same_result(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"{TEXT} " * 600
    whole = evaluate(model, tokenizer, [text, TEXT, text], max_seq_len=32)
    longest = 0
    encode_batch = Tokenizer.encode_batch

    def spy(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        nonlocal longest
        longest = max(longest, *map(len, texts))
        return encode_batch(self, texts)

    monkeypatch.setattr("seedbed.evaluate.PIECE_CHARS", 5000)
    monkeypatch.setattr(Tokenizer, "encode_batch", spy)
    assert evaluate(model, tokenizer, [text, TEXT, text], max_seq_len=32) == whole
    assert longest <= 5000
