"""Adapters against PEFT: the same functions, gradients, updates and folders, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from seedbed.adapter import load_adapter, save_adapter
from seedbed.errors import CheckpointError
from seedbed.lora import LoraLinear, add_adapter, find_targets, merge_adapter
from seedbed.loss import linear_cross_entropy
from seedbed.model.decoder import Adapter, Decoder
from seedbed.model.weights import load_decoder
from tests.parity.test_decoder import T, V, gpt2, llama_like

# PEFT warns of the tied heads and turned matrices that are tested here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

TOLERANCE = 1e-5


def gpt2_without_dropout() -> Any:
    return gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2_without_dropout,
    "llama": lambda: llama_like("Llama"),
    "qwen2 tied": lambda: llama_like("Qwen2", tie_word_embeddings=True),
}


@pytest.fixture(params=MODELS, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, in transformers' own folder."""
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    return path


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    targets: str = "all-linear"
    rslora: bool = False
    dora: bool = False
    last_blocks: int | None = None
    embeddings: bool = False


CASES = {
    "plain": Case(),
    "rslora": Case(rslora=True),
    "dora": Case(dora=True),
    "head": Case("attention,head"),
    "head, both": Case("all-linear,head", rslora=True, dora=True),
    "last two blocks": Case(last_blocks=2, rslora=True),
    "some of query, key and value": Case("q_proj,v_proj"),
    "some of them, dora": Case("k_proj,down_proj", dora=True, last_blocks=1),
    "embeddings": Case("attention", embeddings=True),
    "embeddings and head": Case("mlp,head", dora=True, embeddings=True),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def base_of(folder: Path) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


def adapted(folder: Path, case: Case) -> Decoder:
    """Our model with an adapter that has learnt something."""
    model = load_decoder(folder)
    modules = find_targets(model.config, case.targets, case.last_blocks)
    add_adapter(model, Adapter(3, 7.0, 0.0, case.rslora, case.dora, modules, case.embeddings))
    disturb(model)
    return model


@torch.no_grad()
def disturb(model: torch.nn.Module) -> None:
    """Move every trained number, each a little."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))


def opened_by_peft(folder: Path, adapter: Path) -> Any:
    model: Any = peft.PeftModel.from_pretrained(base_of(folder), str(adapter), is_trainable=True)
    return model.eval()


def logits_of(model: Decoder, ids: Tensor) -> Tensor:
    return model.logits(model(ids))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def trained_by_peft(model: Any) -> dict[str, Tensor]:
    """Every number PEFT trains, by the name it is saved under."""
    return {
        name.replace(".modules_to_save.default", "")
        .replace("magnitude_vector.default.weight", "magnitude_vector")
        .replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def assert_same_tensors(model: Decoder, theirs: dict[str, Tensor], folder: Path) -> None:
    """What we save is theirs, except in a fused module what has no adapter here: beside the blocks of B, and a
    magnitude of a part without one."""
    save_adapter(model, folder)
    ours = load_file(folder / "adapter_model.safetensors")
    assert theirs.keys() <= ours.keys()
    assert all("lm_head" in name for name in ours.keys() - theirs.keys())  # a head that is not trained
    assert model.adapter is not None
    for name, tensor in theirs.items():
        adapted = torch.ones_like(tensor)
        if "c_attn" in name:
            block = name.rpartition(".attn.")[0].rpartition(".")[2]
            parts = [f"blocks.{block}.attention.{x}_proj" in model.adapter.modules for x in "qkv"]
            if name.endswith("lora_B.weight"):
                adapted = torch.block_diag(*[torch.full((24, 3), float(part)) for part in parts])  # type: ignore[no-untyped-call]
            elif name.endswith("magnitude_vector"):
                adapted = torch.tensor(parts).repeat_interleave(24).float()
        assert_close(ours[name] * adapted, tensor * adapted)


def test_peft_opens_our_folder(folder: Path, case: Case, ids: Tensor, tmp_path: Path) -> None:
    model = adapted(folder, case)
    save_adapter(model, tmp_path)
    assert_close(logits_of(model, ids), opened_by_peft(folder, tmp_path)(ids).logits)


def test_our_own_folder_comes_back_exactly(folder: Path, case: Case, tmp_path: Path) -> None:
    model = adapted(folder, case)
    save_adapter(model, tmp_path)
    again = load_decoder(folder)
    load_adapter(again, tmp_path)
    assert again.adapter == model.adapter
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(state[name].equal(tensor) for name, tensor in model.state_dict().items())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in again.named_parameters() if parameter.requires_grad}


def test_gradients_and_an_update(folder: Path, case: Case, ids: Tensor, tmp_path: Path) -> None:
    model = adapted(folder, case).train()
    save_adapter(model, tmp_path / "start")
    reference = opened_by_peft(folder, tmp_path / "start")
    targets = ids[:, 1:].reshape(-1)
    hidden = model(ids)[:, :-1].reshape(len(targets), -1)
    loss = linear_cross_entropy(hidden, model.head_weight(), targets) / len(targets)
    theirs = reference(ids, labels=ids).loss
    assert_close(loss, theirs)
    optimizers = [
        # The epsilon keeps a gradient that is nothing but rounding from making a whole step.
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1, eps=1e-5)
        for m in (model, reference)
    ]
    loss.backward()  # type: ignore[no-untyped-call]
    theirs.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name

    # Gradients take the road of weights: saved under PEFT's names and compared there.
    trained = trained_by_peft(reference)
    values = [p.detach().clone() for p in model.parameters()]
    set_all(model, [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()])
    assert_same_tensors(model, {k: p.grad for k, p in trained.items() if p.grad is not None}, tmp_path / "gradients")
    set_all(model, values)
    for optimizer in optimizers:
        optimizer.step()
    assert_same_tensors(model, {name: p.detach() for name, p in trained.items()}, tmp_path / "updated")


@torch.no_grad()
def set_all(model: Decoder, values: list[Tensor]) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.copy_(value)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "use_dora": True}], ids=["plain", "rslora, dora"])
@pytest.mark.parametrize("targets", ["all-linear", "head", "embeddings", "last block", "regular expression"])
def test_a_folder_of_peft(folder: Path, targets: str, options: dict[str, Any], ids: Tensor, tmp_path: Path) -> None:
    base = base_of(folder)
    is_gpt2, tied = base.config.model_type == "gpt2", base.config.tie_word_embeddings
    attention = ["c_attn", "c_proj"] if is_gpt2 else ["q_proj", "v_proj", "down_proj"]
    more: dict[str, dict[str, Any]] = {
        "all-linear": {"target_modules": "all-linear"},
        "head": {"target_modules": [*attention, "lm_head"]},
        "embeddings": {
            "target_modules": attention,
            "modules_to_save": ["wte" if is_gpt2 else "embed_tokens", *(["lm_head"] if tied else [])],
            "ensure_weight_tying": tied,
        },
        "last block": {"target_modules": attention, "layers_to_transform": [2]},
        "regular expression": {"target_modules": rf".*\.[12]\..*({'|'.join(attention)})"},
    }
    reference: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, **more[targets], **options)).eval()
    disturb(reference)
    reference.save_pretrained(str(tmp_path))
    model = load_decoder(folder)
    load_adapter(model, tmp_path)
    assert_close(logits_of(model, ids), reference(ids).logits)
    merge_adapter(model)
    assert_close(logits_of(model, ids), reference(ids).logits)


def test_an_adapter_of_peft_that_trained_on(folder: Path, ids: Tensor, tmp_path: Path) -> None:
    """A fused B that got numbers beside its blocks is another function than three adapters of rank r."""
    model = adapted(folder, CASES["plain"])
    save_adapter(model, tmp_path / "ours")
    reference = opened_by_peft(folder, tmp_path / "ours")
    disturb(reference)
    reference.save_pretrained(tmp_path / "theirs")
    again = load_decoder(folder)
    if model.config.family == "gpt2":
        with pytest.raises(CheckpointError, match=r"c_attn has rank 9 and other modules 3"):
            load_adapter(again, tmp_path / "theirs")
    else:
        load_adapter(again, tmp_path / "theirs")
        assert_close(logits_of(again, ids), reference(ids).logits)


@pytest.mark.parametrize("folder", ["gpt2"], indirect=True)
def test_a_magnitude_that_peft_trained_alone_is_refused(folder: Path, tmp_path: Path) -> None:
    """Zeros stand for a layer without an adapter, which has no magnitude of its own."""
    model = adapted(folder, CASES["some of them, dora"])
    save_adapter(model, tmp_path)
    load_adapter(load_decoder(folder), tmp_path)
    reference = opened_by_peft(folder, tmp_path)
    for name, parameter in reference.named_parameters():
        if "magnitude" in name:
            parameter.data += 0.1
    reference.save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"q_proj has a magnitude of its own"):
        load_adapter(load_decoder(folder), tmp_path)


def test_merged(folder: Path, case: Case, ids: Tensor) -> None:
    model = adapted(folder, case)
    expected = logits_of(model, ids)
    merge_adapter(model)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert_close(logits_of(model, ids), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_falls_where_it_does_in_peft(folder: Path, dora: bool, ids: Tensor, tmp_path: Path) -> None:
    model = load_decoder(folder)
    # GPT-2's query, key and value share one dropout there, and have three here.
    modules = find_targets(model.config, "o_proj,mlp" if model.config.family == "gpt2" else "all-linear")
    add_adapter(model, Adapter(3, 7.0, 0.4, False, dora, modules, False))
    disturb(model)
    save_adapter(model, tmp_path)
    reference = opened_by_peft(folder, tmp_path)
    torch.manual_seed(5)
    ours = logits_of(model.train(), ids)
    torch.manual_seed(5)
    assert_close(ours, reference.train()(ids).logits)
    assert (ours - logits_of(model.eval(), ids)).abs().max() > 0.01


def test_the_first_a_is_drawn_as_in_peft() -> None:
    layer = torch.nn.Linear(400, 300)
    ours = LoraLinear(layer, Adapter(16, 8.0, 0.0, False, False, ("x",), False))
    wrapped = torch.nn.Sequential(torch.nn.Linear(400, 300))
    theirs = peft.get_peft_model(wrapped, peft.LoraConfig(r=16, target_modules=["0"]))
    a = theirs.get_parameter("base_model.model.0.lora_A.default.weight")
    assert float(ours.lora_A.detach().abs().max()) == pytest.approx(float(a.detach().abs().max()), rel=1e-2)
    assert float(ours.lora_A.std()) == pytest.approx(float(a.std()), rel=0.05)
    assert not ours.lora_B.any()


def test_dora_starts_as_the_layer_was() -> None:
    layer = torch.nn.Linear(8, 5)
    x = torch.randn(4, 8)
    torch.testing.assert_close(LoraLinear(layer, Adapter(2, 4.0, 0.0, False, True, ("x",), False))(x), layer(x))
