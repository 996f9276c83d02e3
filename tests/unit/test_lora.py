from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seedbed.errors import ConfigError
from seedbed.lora import (
    LoraLinear,
    adapter_state,
    add_adapter,
    find_targets,
    merge_adapter,
    num_trainable,
)
from seedbed.loss import linear_cross_entropy
from seedbed.model.config import DecoderConfig, from_scratch
from seedbed.model.decoder import Adapter, Decoder

IDS = torch.arange(12).reshape(2, 6)


def tiny(arch: str = "llama", **changes: Any) -> DecoderConfig:
    sizes: dict[str, Any] = {"vocab_size": 31, "d_model": 16, "num_layers": 3, "num_heads": 4, "max_seq_len": 8}
    return from_scratch(arch, **(sizes | changes))


def make_adapter(config: DecoderConfig, targets: str = "all-linear", **changes: Any) -> Adapter:
    fields: dict[str, Any] = {"r": 2, "alpha": 8.0, "dropout": 0.0, "rslora": False, "dora": False}
    fields |= {"modules": find_targets(config, targets), "train_embeddings": False}
    return Adapter(**(fields | changes))


def adapted(config: DecoderConfig, targets: str = "all-linear", **changes: Any) -> Decoder:
    """A model whose adapter has learnt something."""
    torch.manual_seed(0)
    model = Decoder(config)
    add_adapter(model, make_adapter(config, targets, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def loss_of(model: Decoder) -> Tensor:
    return linear_cross_entropy(model(IDS).flatten(0, 1), model.head_weight(), IDS.flatten())


# The layer


def test_the_example_of_the_module() -> None:
    layer = nn.Linear(2, 3, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    lora = LoraLinear(layer, Adapter(1, 2.0, 0.0, False, False, ("x",), False))
    lora.lora_A.data, lora.lora_B.data = torch.tensor([[2.0, 3]]), torch.tensor([[1.0], [0], [0]])
    wanted = torch.tensor([[5.0, 6], [0, 1], [1, 1]])
    assert lora.effective_weight().equal(wanted)
    assert lora(torch.eye(2)).equal(wanted.T)


def test_scaling() -> None:
    assert make_adapter(tiny(), r=16, alpha=32.0).scaling == 2
    assert make_adapter(tiny(), r=16, alpha=32.0, rslora=True).scaling == 8


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_autocast(dora: bool, frozen: torch.dtype) -> None:
    """The sum that DoRA takes norms of stays in float32, whatever products run in."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    layer.weight.data = layer.weight.data.bfloat16().float()
    exact = LoraLinear(layer, Adapter(4, 8.0, 0.0, False, dora, ("x",), False))
    nn.init.normal_(exact.lora_B, std=0.1)
    x = torch.randn(5, 64)
    wanted = exact(x)
    wanted.sum().backward()
    gradients = [p.grad.clone() for p in (exact.lora_A, exact.lora_B) if p.grad is not None]
    exact.lora_A.grad = exact.lora_B.grad = None
    layer.weight.requires_grad_(False).data = layer.weight.data.to(frozen)
    exact.weight = layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        y = exact(x)
        weight = exact.effective_weight()
    assert (y.dtype, weight.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), wanted, atol=0.05, rtol=0.05)
    torch.testing.assert_close(weight, exact.effective_weight())
    y.float().sum().backward()
    for parameter, gradient in zip((exact.lora_A, exact.lora_B), gradients, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, gradient, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_keeps_the_mean_and_is_off_in_evaluation(dora: bool) -> None:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(16, 4), Adapter(2, 4.0, 0.5, False, dora, ("x",), False))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(1, 16)
    plain = layer.eval()(x)
    dropped = layer.train()(x.expand(20_000, -1))
    assert dropped.std(0).min() > 0.01
    torch.testing.assert_close(dropped.mean(0, keepdim=True), plain, atol=0.1, rtol=0.05)
    torch.testing.assert_close(layer.eval()(x), plain)


# Which layers


def short(modules: tuple[str, ...], block: int = 0) -> list[str]:
    return [name.rpartition(".")[2] for name in modules if name.startswith(f"blocks.{block}.") or name == "lm_head"]


@pytest.mark.parametrize(
    ("arch", "targets", "expected"),
    [
        ("gpt2", "all-linear", "q_proj k_proj v_proj o_proj up_proj down_proj"),
        ("llama", "all-linear", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ("llama", "attention", "q_proj k_proj v_proj o_proj"),
        ("llama", "mlp, head", "gate_proj up_proj down_proj lm_head"),
        ("llama", "v_proj,q_proj,q_proj", "q_proj v_proj"),
        ("gpt2", "c_attn", "q_proj k_proj v_proj"),
        ("gpt2", "c_proj", "o_proj down_proj"),
        ("gpt2", "attn.c_proj,lm_head", "o_proj lm_head"),
        ("llama", "model.layers.0.*", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ("llama", "blocks.?.mlp.up*", "up_proj"),
        ("llama", "layers.1.*,o_proj", "o_proj"),
    ],
)
def test_targets(arch: str, targets: str, expected: str) -> None:
    assert short(find_targets(tiny(arch), targets)) == expected.split()


def test_the_last_blocks_and_the_head() -> None:
    names = find_targets(tiny(), "attention,head", last_blocks=2)
    assert short(names, 0) == ["lm_head"]
    assert len(names) == 2 * 4 + 1
    assert names[-1] == "lm_head"
    with pytest.raises(ConfigError, match="--last_blocks 4: expected from 1 to 3"):
        find_targets(tiny(), "attention", last_blocks=4)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.\*: no linear layer in the last 1 blocks"):
        find_targets(tiny(), "model.layers.0.*", last_blocks=1)


def test_every_target_that_matches_nothing_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        find_targets(tiny(), "q_prj,mlp,embed_tokens,c_attn")
    first, second, third = error.value.problems
    assert "q_prj" in first
    assert "did you mean q_proj?" in first
    assert "gate_proj" in first
    assert "embed_tokens" in second
    assert "c_attn" in third
    with pytest.raises(ConfigError, match="empty"):
        find_targets(tiny(), " , ")


# In a model


@pytest.mark.parametrize(
    ("d_model", "layers", "heads", "r", "expected"),
    [(1024, 24, 16, 16, 7_898_384), (1024, 24, 16, 64, 31_593_536), (1280, 36, 20, 16, 14_095_632)],
)
def test_counts_of_gpt2(d_model: int, layers: int, heads: int, r: int, expected: int) -> None:
    config = from_scratch(
        "gpt2", vocab_size=50257, d_model=d_model, num_layers=layers, num_heads=heads, max_seq_len=1024
    )
    adapter = make_adapter(config, "all-linear,head", r=r)
    assert num_trainable(config, adapter) == expected


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dora", [False, True])
def test_surgery_keeps_weights_names_and_outputs(arch: str, dora: bool) -> None:
    torch.manual_seed(0)
    config = tiny(arch)
    model = Decoder(config).eval()
    before, parameters = model.logits(model(IDS)), dict(model.named_parameters())
    adapter = make_adapter(config, "all-linear,head", dora=dora)
    add_adapter(model, adapter)
    torch.testing.assert_close(model.logits(model(IDS)), before)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert model.adapter == adapter
    trained = {name for name, parameter in after.items() if parameter.requires_grad}
    assert trained == after.keys() - parameters.keys() == adapter_state(model).keys()
    assert model.lm_head is not None
    assert model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize("targets", ["all-linear", "attention,head"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_only_what_is_trained_holds_gradients(targets: str, embeddings: bool) -> None:
    model = adapted(tiny("gpt2"), targets, train_embeddings=embeddings).train()
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == adapter_state(model).keys()
    assert ("embed_tokens.weight" in with_gradient) == embeddings


def test_a_tied_head_beside_a_trained_embedding() -> None:
    """Without an adapter it follows the embedding; with one, its frozen weight is the embedding as it was."""
    follows = adapted(tiny(), "attention", train_embeddings=True)
    assert follows.head_weight() is follows.embed_tokens.weight
    torch.manual_seed(0)
    before = Decoder(tiny()).embed_tokens.weight
    apart = adapted(tiny(), "head", train_embeddings=True)
    assert apart.lm_head is not None
    assert apart.lm_head.weight.equal(before)
    assert not apart.embed_tokens.weight.equal(before)
    assert num_trainable(tiny(), make_adapter(tiny(), "head", train_embeddings=True)) == 2 * (31 + 16) + 31 * 16


@pytest.mark.parametrize("dora", [False, True])
def test_the_head_is_one_for_the_loss_and_for_logits(dora: bool) -> None:
    model = adapted(tiny(), "head", dora=dora)
    hidden = model(IDS)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.head_weight().T)


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(tiny("gpt2"), "all-linear,head", dora=True).train()
        model.gradient_checkpointing = checkpointing
        loss_of(model).backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.equal(recomputed)


def test_moving_and_casting_keep_a_tied_head_tied() -> None:
    model = adapted(tiny(), "head").to(torch.float64).to(torch.float32)
    assert model.lm_head is not None
    assert model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize("targets", ["all-linear", "all-linear,head"])
@pytest.mark.parametrize("dora", [False, True])
def test_merging_leaves_a_plain_model(targets: str, dora: bool) -> None:
    config = tiny("gpt2")
    model = adapted(config, targets, dora=dora).eval()
    before = model.logits(model(IDS))
    embedding = model.embed_tokens.weight.detach().clone()
    merge_adapter(model)
    assert model.adapter is None
    assert model.config.tie_embeddings == ("head" not in targets)
    assert model.state_dict().keys() == Decoder(model.config).state_dict().keys()
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.embed_tokens.weight.equal(embedding)
    torch.testing.assert_close(model.logits(model(IDS)), before, atol=1e-5, rtol=1e-5)
