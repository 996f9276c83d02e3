from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from seedbed.config import FLAGS, Layer, TrainingOptions, resolve
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Decoder
from seedbed.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors, set_learning_rate


def options(**values: Any) -> TrainingOptions:
    return resolve("scratch", [Layer(FLAGS, {"learning_rate": 1e-2, "weight_decay": 0.1, **values})]).training


def make_model(arch: str = "gpt2") -> Decoder:
    torch.manual_seed(0)
    return Decoder(from_scratch(arch, vocab_size=50, d_model=16, num_layers=2, num_heads=2, max_seq_len=8))


def train(model: Decoder, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        tokens = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(step))
        loss: torch.Tensor = model.logits(model(tokens)).logsumexp(-1).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen3"])
def test_decay_is_on_matrices_only(arch: str) -> None:
    model = make_model(arch)
    optimizer = build_optimizer(model, options())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2
        assert decay[id(parameter)] == (0.1 if is_matrix else 0.0), name
        assert is_matrix != (name.endswith(".bias") or "norm" in name), name


def test_frozen_parameters_are_not_optimized() -> None:
    model = make_model()
    model.embed_tokens.weight.requires_grad = False
    optimizer = build_optimizer(model, options())
    assert all(p is not model.embed_tokens.weight for group in optimizer.param_groups for p in group["params"])


def test_steps_equal_torchs_plain_adamw() -> None:
    ours, theirs = make_model(), make_model()
    optimizer = build_optimizer(ours, options(beta1=0.8, beta2=0.97, epsilon=1e-6))
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    others = [p for p in theirs.parameters() if p.dim() < 2]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.8, 0.97),
        eps=1e-6,
        fused=False,
        foreach=False,
    )
    train(ours, optimizer, 5)
    train(theirs, reference, 5)
    moved = make_model()
    for (name, a), b, start in zip(ours.named_parameters(), theirs.parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6, msg=name)
        assert not torch.equal(a, start), name


def test_decay_is_decoupled_from_the_gradient() -> None:
    """With no gradient a matrix shrinks by lr x decay; were decay part of the gradient, Adam would rescale it."""
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, options())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before * (1 - 1e-2 * 0.1))


def test_sgd_has_momentum() -> None:
    ours, theirs = make_model(), make_model()
    train(ours, build_optimizer(ours, options(optimizer="sgd", weight_decay=0.0)), 3)
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=1e-2, momentum=0.9, fused=False), 3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_set_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(make_model(), options())
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_state_comes_back_bit_for_bit_through_a_file(kind: str, tmp_path: Path) -> None:
    model = make_model()
    optimizer = build_optimizer(model, options(optimizer=kind))
    train(model, optimizer, 3)
    saved = optimizer_tensors(model, optimizer)
    expected = {"exp_avg", "exp_avg_sq", "step"} if kind == "adamw" else {"momentum_buffer"}
    assert {name.rpartition("/")[2] for name in saved} == expected
    save_file(saved, tmp_path / "optimizer.safetensors")

    twin = make_model()
    twin.load_state_dict(model.state_dict())
    restored = build_optimizer(twin, options(optimizer=kind))
    load_optimizer_tensors(twin, restored, load_file(tmp_path / "optimizer.safetensors"))
    again = optimizer_tensors(twin, restored)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], saved[name]) for name in saved)

    train(model, optimizer, 3, first=3)
    train(twin, restored, 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
