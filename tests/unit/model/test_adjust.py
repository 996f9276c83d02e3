from __future__ import annotations

from typing import Any

import pytest
import torch

from seedbed.model.adjust import grow_vocabulary, set_dropout
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Decoder, num_parameters

IDS = torch.arange(12).reshape(2, 6)


def tiny(arch: str = "llama", **changes: Any) -> Decoder:
    sizes: dict[str, Any] = {"vocab_size": 31, "d_model": 16, "num_layers": 2, "num_heads": 4, "max_seq_len": 8}
    torch.manual_seed(0)
    return Decoder(from_scratch(arch, **(sizes | changes))).eval()


@torch.no_grad()
def logits_of(model: Decoder, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.logits(model(ids))


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_begin_as_the_mean_of_the_known(arch: str, tied: bool) -> None:
    model = tiny(arch, tie_embeddings=tied)
    before, means = logits_of(model), [model.embed_tokens.weight.mean(0), model.head_weight().mean(0)]
    grow_vocabulary(model, 31, 34)
    after = logits_of(model)
    torch.testing.assert_close(after[..., :31], before)
    torch.testing.assert_close(after[..., 31:], before.mean(-1, keepdim=True).expand(-1, -1, 3))
    for table, mean in zip((model.embed_tokens.weight, model.head_weight()), means, strict=True):
        torch.testing.assert_close(table[31:], mean.expand(3, -1))
    assert (model.lm_head is None) == tied
    assert model.config.vocab_size == model.embed_tokens.num_embeddings == 34
    assert sum(p.numel() for p in model.parameters()) == num_parameters(model.config)
    assert torch.isfinite(logits_of(model, torch.tensor([[33, 0, 31]]))).all()


@pytest.mark.parametrize("tied", [True, False])
def test_rows_to_spare_are_used_first(tied: bool) -> None:
    """As Qwen's, whose embedding is larger than its vocabulary: their rows were never learnt."""
    model = tiny(tie_embeddings=tied)
    embedding, head = model.embed_tokens.weight.clone(), model.head_weight().clone()
    grow_vocabulary(model, 28, 30)
    for table, old in ((model.embed_tokens.weight, embedding), (model.head_weight(), head)):
        assert table[:28].equal(old[:28])
        assert table[30:].equal(old[30:])
        torch.testing.assert_close(table[28:30], old[:28].mean(0).expand(2, -1))
    assert model.config.vocab_size == 31
    grow_vocabulary(model, 30, 33)
    assert len(model.head_weight()) == model.config.vocab_size == 33


def test_nothing_new_is_nothing_done() -> None:
    model = tiny()
    table = model.embed_tokens.weight
    for wanted in (31, 20):
        grow_vocabulary(model, 31, wanted)
    assert model.embed_tokens.weight is table


@pytest.mark.parametrize("trained", [True, False])
def test_what_was_frozen_stays_frozen(trained: bool) -> None:
    model = tiny(tie_embeddings=False).requires_grad_(trained)
    grow_vocabulary(model, 31, 33)
    assert all(parameter.requires_grad == trained for parameter in model.parameters())


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_is_as_if_built_with_it(arch: str, dropout: float) -> None:
    """The same random numbers drop the same places as in a model that always had this dropout."""
    changed, built = tiny(arch, dropout=0.1), tiny(arch, dropout=dropout)
    set_dropout(changed, dropout)
    assert changed.config == built.config
    assert changed.load_state_dict(built.state_dict())
    outputs = []
    for model in (changed.train(), built.train()):
        torch.manual_seed(1)
        outputs.append(logits_of(model))
    assert outputs[0].equal(outputs[1])
    assert outputs[0].equal(logits_of(built.eval())) == (dropout == 0)
