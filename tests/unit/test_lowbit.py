from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from seedbed.errors import ConfigError, MissingExtra
from seedbed.lora import add_adapter, find_targets
from seedbed.lowbit import NF4Weight, quantize_frozen
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Adapter, Decoder

CPU = torch.device("cpu")


def make_model(arch: str = "llama") -> Decoder:
    torch.manual_seed(0)
    config = from_scratch(arch, vocab_size=128, d_model=128, num_layers=2, num_heads=4, num_kv_heads=4, max_seq_len=32)
    return Decoder(config)


def adapted(*, dora: bool = False) -> Decoder:
    model = make_model()
    targets = find_targets(model.config, "all-linear")
    add_adapter(
        model, Adapter(r=4, alpha=8, dropout=0, rslora=False, dora=dora, modules=targets, train_embeddings=False)
    )
    return model


def packed_layer(arch: str = "llama") -> tuple[nn.Linear, Tensor]:
    """A layer with an NF4 weight, and the weight it was made from."""
    model = make_model(arch).requires_grad_(False)
    layer = model.get_submodule("blocks.0.mlp.up_proj")
    assert isinstance(layer, nn.Linear)
    weight = layer.weight.detach().clone()
    quantize_frozen(model, CPU)
    return layer, weight


def nf4(model: Decoder) -> dict[str, NF4Weight]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, NF4Weight)}


def test_a_weight_is_within_half_a_step_of_its_levels() -> None:
    """The widest step between two of the 16 levels is 0.304 of a block's largest magnitude."""
    layer, weight = packed_layer()
    assert isinstance(layer.weight, NF4Weight)
    error = (layer.weight.unpack() - weight).view(-1, 64)
    largest = weight.view(-1, 64).abs().amax(1, keepdim=True)
    assert (error.abs() <= 0.16 * largest).all()
    assert 0.05 < float(error.norm() / weight.norm()) < 0.1
    assert all(block.unique().numel() <= 16 for block in layer.weight.unpack().view(-1, 64))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_forward_and_backward_are_those_of_the_unpacked_weight(arch: str) -> None:
    layer, weight = packed_layer(arch)
    assert isinstance(layer.weight, NF4Weight)
    assert (layer.bias is not None) == (arch == "gpt2")
    x = torch.randn(2, 5, 128, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, layer.weight.unpack(), layer.bias))
    exact = F.linear(x, weight, layer.bias)
    assert float((y - exact).detach().norm() / exact.detach().norm()) < 0.1
    gradient = torch.randn_like(y)
    y.backward(gradient)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, gradient @ layer.weight.unpack())


def test_under_autocast_products_are_bfloat16() -> None:
    layer, _ = packed_layer("gpt2")
    assert isinstance(layer.weight, NF4Weight)
    x = torch.randn(2, 5, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        same = F.linear(x, layer.weight.unpack(), layer.bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, same, atol=2e-2, rtol=2e-2)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.unpack().sum(0).expand(2, 5, 128), atol=2e-2, rtol=2e-2)


def test_only_frozen_matrices_of_the_blocks_are_packed() -> None:
    model = make_model("gpt2").requires_grad_(False)
    model.blocks[1].requires_grad_(True)
    quantize_frozen(model, CPU)
    layers = [f"attention.{n}_proj" for n in "qkvo"] + ["mlp.up_proj", "mlp.down_proj"]
    assert set(nf4(model)) == {f"blocks.0.{layer}.weight" for layer in layers}


def test_weights_take_a_seventh_of_the_memory() -> None:
    model = make_model().requires_grad_(False)
    plain = sum(p.nbytes for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    quantize_frozen(model, CPU)
    weights = nf4(model).values()
    assert 7.5 < plain / sum(weight.packed_bytes() for weight in weights) < 8
    assert sum(weight.numel() * 4 for weight in weights) == plain


def test_no_unpacked_weight_waits_for_the_backward_pass() -> None:
    layer, weight = packed_layer()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        layer(torch.randn(2, 128, requires_grad=True))
        assert all(tensor.numel() < weight.numel() for tensor in kept)
        F.linear(torch.randn(2, 128, requires_grad=True), layer.weight.clone())
        assert any(tensor.numel() == weight.numel() for tensor in kept), "a plain weight does wait"


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_lora_trains_beside_packed_weights(dora: bool, autocast: bool) -> None:
    model = adapted(dora=dora)
    quantize_frozen(model, CPU)
    assert len(nf4(model)) == 14
    before = {name: weight.unpack() for name, weight in nf4(model).items()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    tokens = torch.randint(0, 128, (4, 16))
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model.logits(model(tokens))
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.roll(-1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
    assert optimizer.state.keys() == set(trainable)
    assert all(torch.equal(weight.unpack(), before[name]) for name, weight in nf4(model).items())


def test_other_functions_see_a_plain_tensor_and_none_can_write() -> None:
    layer, _ = packed_layer()
    weight = layer.weight
    assert isinstance(weight, NF4Weight)
    assert type(weight + 1) is Tensor
    assert torch.equal(weight.clone(), weight.unpack())
    assert isinstance(layer.state_dict()["weight"], NF4Weight)
    with pytest.raises(RuntimeError, match="four bits"):
        weight.data.zero_()


def test_a_device_without_kernels_is_refused() -> None:
    with torch.device("meta"):
        model = make_model().requires_grad_(False)
    with pytest.raises(ConfigError, match="--base_precision nf4: there are no kernels for meta"):
        quantize_frozen(model, torch.device("meta"))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"4-bit weights need the extra 'lowbit': pip install 'seedbed\[lowbit\]'"):
        quantize_frozen(make_model().requires_grad_(False), CPU)


def test_the_library_is_imported_quietly_and_fetches_nothing(tmp_path: Path) -> None:
    """With a package `kernels` there, it would download code for this CPU and run it."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    code = "from seedbed.lowbit import import_bitsandbytes as load; load('4-bit weights'); import kernels"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.strip() == "kernels was imported", "only by the last statement"
    assert done.stdout == ""
