"""Generation token for token as `transformers.generate`, and each cut of the distribution as its classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.generation import logits_process

from seedbed.config import SamplingOptions
from seedbed.generate import generate
from seedbed.model.decoder import Decoder
from seedbed.model.weights import load_decoder
from seedbed.sampling import (
    apply_temperature,
    forbid_repeated_ngrams,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
)
from seedbed.text.tokenizer import Tokenizer, train_bpe

PROMPTS = ["The quick", "Sphinx of black quartz, judge my vow. Sphinx of", "a", "über 🦊"]
NEW_TOKENS = 24


def gpt2(vocab_size: int) -> Any:
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.4
    )
    return transformers.GPT2LMHeadModel(config)


def llama_like(family: str, vocab_size: int) -> Any:
    options: dict[str, Any] = {"head_dim": 8} if family == "Qwen3" else {}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
        **options,
    )
    return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(PROMPTS, 290)


@pytest.fixture(scope="module", params=["GPT2", "Llama", "Qwen2", "Qwen3"])
def pair(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Decoder]:
    torch.manual_seed(0)
    size = tokenizer.vocab_size
    reference = (gpt2(size) if request.param == "GPT2" else llama_like(request.param, size)).eval()
    folder: Path = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    return reference, load_decoder(folder)


def continued_by_transformers(
    model: Any, tokenizer: Tokenizer, prompts: list[str], options: dict[str, Any]
) -> list[tuple[int, ...]]:
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.eos_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.eos_id,
        **options,
    )
    written = [row[width:].tolist() for row in out]
    eos = tokenizer.eos_id
    return [tuple(row[: row.index(eos)] if eos in row else row) for row in written]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("penalty", "ngram"), [(1.0, 0), (1.3, 0), (1.0, 2), (1.3, 2)])
def test_greedy_text_is_that_of_transformers(
    pair: tuple[Any, Decoder], tokenizer: Tokenizer, penalty: float, ngram: int, batch_size: int
) -> None:
    reference, model = pair
    theirs = {"repetition_penalty": penalty, "no_repeat_ngram_size": ngram}
    groups = [PROMPTS[i : i + batch_size] for i in range(0, len(PROMPTS), batch_size)]
    expected = [row for group in groups for row in continued_by_transformers(reference, tokenizer, group, theirs)]
    options = SamplingOptions(greedy=True, repetition_penalty=penalty, no_repeat_ngram=ngram, max_new_tokens=NEW_TOKENS)
    ours = generate(model, tokenizer, PROMPTS, options, batch_size=batch_size)
    assert [row.token_ids for row in ours] == expected
    assert [row.prompt for row in ours] == PROMPTS


@pytest.fixture(scope="module")
def random_logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(300, (16, 60), generator=generator)
    history[:, 30:] = history[:, :30]  # something to repeat
    return torch.randn(16, 300, generator=generator) * 4, history, torch.ones(16, 60, dtype=torch.bool)


@pytest.mark.parametrize("k", [1, 2, 50, 300, 1000])
def test_top_k(random_logits: tuple[torch.Tensor, ...], k: int) -> None:
    logits, history, _ = random_logits
    assert keep_top_k(logits, k).equal(logits_process.TopKLogitsWarper(k)(history, logits))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p(random_logits: tuple[torch.Tensor, ...], p: float) -> None:
    logits, history, _ = random_logits
    warper = logits_process.TopPLogitsWarper(p)
    assert keep_top_p(logits, p).equal(warper(history, logits))
    cut = keep_top_k(logits, 20)
    assert keep_top_p(cut, p).equal(warper(history, cut))


@pytest.mark.parametrize("temperature", [0.05, 0.8, 1.0, 3.0])
def test_temperature(random_logits: tuple[torch.Tensor, ...], temperature: float) -> None:
    logits, history, _ = random_logits
    theirs = logits_process.TemperatureLogitsWarper(temperature)(history, logits).softmax(-1)
    torch.testing.assert_close(apply_temperature(logits, temperature).softmax(-1), theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("penalty", [0.7, 1.1, 5.0])
def test_repetition_penalty(random_logits: tuple[torch.Tensor, ...], penalty: float) -> None:
    logits, history, mask = random_logits
    theirs = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(history, logits)
    assert penalise_repetition(logits, history, mask, penalty).equal(theirs)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 60, 61])
def test_no_repeat_ngram(random_logits: tuple[torch.Tensor, ...], n: int) -> None:
    logits, history, mask = random_logits
    theirs = logits_process.NoRepeatNGramLogitsProcessor(n)(history, logits)
    assert n > 7 or theirs.isinf().any()
    assert forbid_repeated_ngrams(logits, history, mask, n).equal(theirs)
