"""Evaluation against transformers' logits in a plain loop, and the reference value of a real model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from seedbed.evaluate import evaluate
from seedbed.model.weights import load_decoder
from seedbed.text.tokenizer import Tokenizer, train_bpe

DOCUMENTS = [
    "The quick brown fox jumps over the lazy dog. " * 6,
    "Sphinx of black quartz, judge my vow.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 🦊",
    "x",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(DOCUMENTS, 300)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def reference(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Any:
    torch.manual_seed(0)
    if request.param == "gpt2":
        return gpt2(tokenizer.vocab_size)
    return llama(tokenizer.vocab_size)


def gpt2(vocab_size: int) -> Any:
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel(config)


def llama(vocab_size: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config)


@torch.no_grad()
def plain_loop(model: Any, tokenizer: Tokenizer, documents: list[str], max_seq_len: int, stride: int) -> list[float]:
    """Nats of every predicted token, one window at a time."""
    model.eval()
    nats: list[float] = []
    for document in documents:
        ids = torch.tensor(tokenizer.encode(document))
        done = 0
        while done < len(ids) - 1:
            end = min(done + (stride if done else max_seq_len), len(ids) - 1)
            start = 0 if not done else done + stride - max_seq_len
            logits = model(ids[None, start:end]).logits[0].double()
            losses = cross_entropy(logits, ids[start + 1 : end + 1], reduction="none")
            nats += losses[done - start :].tolist()
            done = end
    return nats


@pytest.mark.parametrize(("max_seq_len", "stride"), [(64, 64), (16, 16), (16, 5), (16, 1)])
def test_nats_are_those_of_transformers(
    reference: Any, tokenizer: Tokenizer, tmp_path: Path, max_seq_len: int, stride: int
) -> None:
    reference.save_pretrained(tmp_path)
    model = load_decoder(tmp_path)
    expected = plain_loop(reference, tokenizer, DOCUMENTS, max_seq_len, stride)
    result = evaluate(model, tokenizer, DOCUMENTS, max_seq_len=max_seq_len, stride=stride, batch_size=3)
    assert result.tokens == len(expected)
    assert result.nats == pytest.approx(sum(expected), rel=1e-6)


@pytest.mark.starter
def test_a_real_model_has_its_reference_perplexity() -> None:
    """SmolLM2-135M-Instruct on WikiText-2; the values are transformers' own, in float32."""
    folder, data = (_folder(name) for name in ("SEEDBED_STARTER", "SEEDBED_TEST_DATA"))
    text = (data / "wikitext-2-valid.txt").read_text(encoding="utf-8")[:60_000]
    result = evaluate(load_decoder(folder), Tokenizer.load(folder), [text], max_seq_len=1024, batch_size=4)
    assert result.tokens == 15_512 - 1  # the first is context only
    assert result.nats_per_token == pytest.approx(2.7593, abs=5e-5)
    assert result.token_ppl == pytest.approx(15.788, abs=5e-4)


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: a folder with the real model, and one with wikitext-2-valid.txt")
    return Path(value)
