from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from seedbed.config import FLAGS, Layer, TrainingOptions, resolve
from seedbed.errors import ConfigError, MissingExtra
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Decoder
from seedbed.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors, set_learning_rate


def options(**values: Any) -> TrainingOptions:
    return resolve("scratch", [Layer(FLAGS, {"learning_rate": 1e-2, "weight_decay": 0.1, **values})]).training


def make_model(arch: str = "gpt2", *, vocab_size: int = 50, d_model: int = 16) -> Decoder:
    torch.manual_seed(0)
    config = from_scratch(arch, vocab_size=vocab_size, d_model=d_model, num_layers=2, num_heads=2, max_seq_len=8)
    return Decoder(config)


def make_wide_model() -> Decoder:
    """Matrices of 4096 weights and more, norms below; the embedding has a last block of only 64 of 256."""
    return make_model("llama", vocab_size=65, d_model=64)


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


def test_muon_takes_the_matrices_between_hidden_states_and_adamw_the_rest() -> None:
    ours, theirs = make_model(), make_model()
    inside = {name for name, p in theirs.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
    muon = torch.optim.Muon(
        [theirs.get_parameter(name) for name in sorted(inside)],
        lr=1e-2,
        weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )
    rest = [p for name, p in theirs.named_parameters() if name not in inside]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    optimizer = build_optimizer(ours, options(optimizer="muon"))
    for step in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = b.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        muon.step()  # type: ignore[no-untyped-call]
        adamw.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


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


def test_8_bit_moments_resume_bit_for_bit_through_a_file(tmp_path: Path) -> None:
    straight = make_wide_model()
    train(straight, build_optimizer(straight, options(optimizer="adamw8bit")), 10)

    first = make_wide_model()
    optimizer = build_optimizer(first, options(optimizer="adamw8bit"))
    train(first, optimizer, 5)
    saved = optimizer_tensors(first, optimizer)
    save_file(saved, tmp_path / "optimizer.safetensors")

    second = make_wide_model()
    second.load_state_dict(first.state_dict())
    fresh = build_optimizer(second, options(optimizer="adamw8bit"))
    load_optimizer_tensors(second, fresh, load_file(tmp_path / "optimizer.safetensors"))
    again = optimizer_tensors(second, fresh)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], saved[name]) for name in saved)
    train(second, fresh, 5, first=5)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


def test_8_bit_moments_have_names_of_their_own_and_small_ones_the_usual() -> None:
    model = make_wide_model()
    optimizer = build_optimizer(model, options(optimizer="adamw8bit"))
    train(model, optimizer, 1)
    saved = optimizer_tensors(model, optimizer)
    shapes = {key.partition("/")[2]: tuple(value.shape) for key, value in saved.items() if "embed_tokens" in key}
    assert shapes == {
        "step": (),
        "exp_avg.codes": (65, 64),
        "exp_avg.scales": (17,),
        "exp_avg_sq.codes": (65, 64),
        "exp_avg_sq.scales": (17,),
    }
    norm = {key.partition("/")[2]: value.dtype for key, value in saved.items() if key.startswith("final_norm.")}
    assert norm == {"step": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}


def test_8_bit_moments_take_a_quarter_of_the_memory() -> None:
    sizes = {}
    for kind in ("adamw", "adamw8bit"):
        model = make_wide_model()
        optimizer = build_optimizer(model, options(optimizer=kind))
        train(model, optimizer, 1)
        sizes[kind] = sum(value.nbytes for value in optimizer_tensors(model, optimizer).values())
    assert 0.25 < sizes["adamw8bit"] / sizes["adamw"] < 0.27


def test_8_bit_moments_train_about_as_well() -> None:
    """A map of 64 tokens to 64 others, learned by heart; SGD's curve shows that the bound means something."""

    def losses(kind: str) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        optimizer = build_optimizer(model, options(optimizer=kind, learning_rate=3e-3))
        target = torch.randperm(64)
        curve = []
        for _ in range(60):
            loss = nn.functional.cross_entropy(model(torch.arange(64)), target)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            curve.append(loss.item())
        return curve

    exact, rounded, other = (losses(kind) for kind in ("adamw", "adamw8bit", "sgd"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.01)
    assert exact[-1] < 0.01
    assert other[-1] > 3


@pytest.mark.parametrize("trained", ["adamw", "adamw8bit", "muon", "sgd"])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "muon", "sgd"])
def test_the_state_of_another_optimizer_is_refused(trained: str, kind: str) -> None:
    model = make_wide_model()
    optimizer = build_optimizer(model, options(optimizer=trained))
    train(model, optimizer, 1)
    other = build_optimizer(model, options(optimizer=kind))
    if trained == kind:
        load_optimizer_tensors(model, other, optimizer_tensors(model, optimizer))
        return
    with pytest.raises(ConfigError, match="--optimizer"):
        load_optimizer_tensors(model, other, optimizer_tensors(model, optimizer))


def test_8_bit_moments_without_their_library_or_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        nowhere = nn.Linear(64, 64)
    with pytest.raises(ConfigError, match="no kernels for meta; choose adamw"):
        build_optimizer(nowhere, options(optimizer="adamw8bit"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"8-bit optimizers need the extra 'lowbit'"):
        build_optimizer(nn.Linear(64, 64), options(optimizer="adamw8bit"))


def test_the_compiler_is_there_after_the_work_beside_it() -> None:
    code = """
        import sys, torch
        from seedbed.optim import compiler_beside
        assert "torch._dynamo" not in sys.modules
        try:
            with compiler_beside():
                torch.ones(3)
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert "torch._dynamo" in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_moments_from_a_file_are_copies_in_memory(tmp_path: Path) -> None:
    saved = {"weight/step": torch.tensor(1.0), "weight/exp_avg": torch.ones(64), "weight/exp_avg_sq": torch.ones(64)}
    path = tmp_path / "moments.safetensors"
    save_file(saved, path)
    model = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(64))})
    optimizer = build_optimizer(model, options())
    with safe_open(path, framework="pt") as file:
        load_optimizer_tensors(model, optimizer, {name: file.get_tensor(name) for name in saved})
    with path.open("r+b") as stream:
        stream.write(bytes(path.stat().st_size))  # a view of the file would show it
    assert torch.equal(optimizer_tensors(model, optimizer)["weight/exp_avg"], torch.ones(64))
