"""The checkpoint of a real run in transformers, and what TensorBoard reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seedbed.checkpoint import load_model
from tests.runs.conftest import RunIt

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
def test_transformers_opens_a_checkpoint(run_it: RunIt, tmp_path: Path, arch: str, tokenizer: str) -> None:
    options = {"tokenizer": tokenizer, "vocab_size": 300 if tokenizer == "bpe" else None}
    run_it(tmp_path / "run", arch=arch, max_steps=5, learning_rate=1e-2, **options)
    folder = tmp_path / "run/checkpoints/best"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, ours = load_model(folder)
    text = "If the file is not found, OSError is raised: naïve café 🌱."
    ids = ours.encode(text)
    assert their_tokenizer.encode(text, add_special_tokens=False) == ids
    assert their_tokenizer.decode(ids) == text == ours.decode(ids)
    tokens = torch.tensor([ids])[:, :32]
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens)), theirs(tokens).logits, atol=1e-5, rtol=1e-4)
    assert theirs.generation_config.eos_token_id == ours.eos_id


def test_tensorboard_has_the_documented_points(run_it: RunIt, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_it(tmp_path / "run", max_steps=12, log_every=5, eval_every=4, tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in ("train/loss", "train/perplexity", "train/learning_rate"):
        assert steps[tag] == [5, 10]
    for tag in ("validation/loss", "validation/perplexity"):
        assert steps[tag] == [4, 8, 12]
