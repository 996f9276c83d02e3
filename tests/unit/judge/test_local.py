"""What the local judge holds likely is what the model says of the whole text, read at once."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch

from seedbed.judge.ask import Reply, Request, score_request, verdict_request
from seedbed.judge.local import LocalJudge, log_likelihoods
from seedbed.judge.prompts import VERDICTS
from seedbed.judge.questions import Question
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Decoder
from seedbed.model.decoding import DecodingModel
from seedbed.model.weights import save_decoder
from seedbed.text.tokenizer import train_char


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_likelihoods_are_those_of_the_whole_text(arch: str) -> None:
    torch.manual_seed(0)
    config = from_scratch(
        arch, vocab_size=50, d_model=32, num_layers=2, num_heads=4, num_kv_heads=None, d_ff=64, max_seq_len=32
    )
    decoder = Decoder(config).eval()
    prompt, replies = [3, 1, 4, 1, 5], [[9, 2], [6, 5, 3, 2], [9, 5, 2]]
    expected = []
    for reply in replies:
        text = torch.tensor([[*prompt, *reply]])
        with torch.inference_mode():
            shares = decoder.logits(decoder(text)).float().log_softmax(-1)[0]
        expected.append(sum(float(shares[len(prompt) - 1 + place, token]) for place, token in enumerate(reply)))
    with torch.inference_mode():
        decoding = DecodingModel(decoder, torch.float32)
    assert log_likelihoods(decoding, prompt, replies).tolist() == pytest.approx(expected, abs=1e-4)


def judge(folder: Path, max_seq_len: int, seed: int) -> LocalJudge:
    torch.manual_seed(seed)
    tokenizer = train_char([string.printable] * 10)
    sizes: dict[str, Any] = {"d_model": 32, "num_layers": 1, "num_heads": 2, "max_seq_len": max_seq_len}
    decoder = Decoder(from_scratch("llama", vocab_size=tokenizer.vocab_size, **sizes))
    save_decoder(decoder, folder, bos_token_id=None, eos_token_id=tokenizer.eos_id)
    tokenizer.save(folder)
    return LocalJudge("small", folder, "cpu")


def ask(judge: LocalJudge, *requests: Request) -> list[Reply]:
    replies: dict[int, Reply] = {}
    judge.ask(requests, replies.__setitem__)
    return [replies[place] for place in range(len(requests))]


def test_it_scores_prefers_and_says_what_it_cannot_read(tmp_path: Path) -> None:
    question = Question("1", ({"role": "user", "content": "How far?"},), "45 km")
    requests = [score_request(question, "45 km", "m"), verdict_request(question, ("45 km", "1 m"), ("m", "n"))]
    local = judge(tmp_path / "judge", 1024, seed=0)
    score, verdict = ask(local, *requests)
    # Untrained, it holds every reply for about as likely as its length.
    assert score.text is not None and 0 < float(score.text) < 50
    assert verdict.text in VERDICTS
    assert score.prompt_tokens > 500
    too_long, _ = ask(judge(tmp_path / "short", 512, seed=0), *requests)
    assert too_long.text is None and too_long.error and "its context 512" in too_long.error
    assert local.identity != judge(tmp_path / "other", 1024, seed=1).identity
