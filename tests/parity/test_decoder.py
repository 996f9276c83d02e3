"""The decoder against transformers: tiny random models of every family, in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from seedbed.loss import linear_cross_entropy
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Decoder
from seedbed.model.decoding import DecodingModel
from seedbed.model.families import config_from_hf
from seedbed.model.weights import load_decoder, save_decoder

TOLERANCE = 1e-5
V, T = 97, 12


def gpt2(**changes: Any) -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V,
            n_positions=32,
            n_embd=24,
            n_layer=3,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
            **changes,
        )
    )


def llama_like(name: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
        **changes,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "gpt2 untied, narrow mlp": lambda: gpt2(tie_word_embeddings=False, n_inner=40),
    "llama": lambda: llama_like("Llama"),
    "llama tied, biased, theta": lambda: llama_like(
        "Llama",
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_theta": 500.0, "rope_type": "default"},
    ),
    "llama 3, each kind of pair": lambda: llama_like("Llama", head_dim=16, rope_parameters=LLAMA3_ROPE),
    "mistral": lambda: llama_like("Mistral", sliding_window=None, head_dim=10),
    "qwen2": lambda: llama_like("Qwen2", tie_word_embeddings=True),
    "qwen3": lambda: llama_like("Qwen3", head_dim=10),
}


@pytest.fixture(params=MODELS)
def reference(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for parameter in model.parameters():  # weights as they come hide mistakes: zero biases, unit norms
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model.eval()


@pytest.fixture
def folder(reference: Any, tmp_path: Path) -> Path:
    reference.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))


def reopen(folder: Path) -> Any:
    """The folder in transformers, which must find every weight and no other."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    return model.eval()


def logits_of(model: Decoder, ids: Tensor, **inputs: Any) -> Tensor:
    return model.logits(model(ids, **inputs))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_logits(reference: Any, folder: Path, ids: Tensor) -> None:
    assert_close(logits_of(load_decoder(folder), ids), reference(ids).logits)


def test_gradients(reference: Any, folder: Path, ids: Tensor, tmp_path: Path) -> None:
    model = load_decoder(folder)
    targets = ids[:, 1:].reshape(-1)
    hidden = model(ids)[:, :-1].reshape(len(targets), -1)
    loss = linear_cross_entropy(hidden, model.head_weight(), targets) / len(targets)
    theirs = reference(ids, labels=ids).loss
    assert_close(loss, theirs)
    loss.backward()  # type: ignore[no-untyped-call]
    theirs.backward()

    # Gradients take the road of weights: written under Hugging Face's names and compared there.
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    save_decoder(model, tmp_path / "gradients", bos_token_id=0, eos_token_id=0)
    gradients = load_file(tmp_path / "gradients" / "model.safetensors")
    expected = {name: p.grad for name, p in reference.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name])


def test_left_padding_by_positions_and_segments(reference: Any, folder: Path, ids: Tensor) -> None:
    pad = 4
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = reference(ids, attention_mask=mask, position_ids=positions).logits
    ours = logits_of(load_decoder(folder), ids, position_ids=positions, segment_ids=mask)
    assert_close(ours[mask.bool()], theirs[mask.bool()])


def test_packed_documents_are_as_if_alone(reference: Any, folder: Path, ids: Tensor) -> None:
    model, lengths = load_decoder(folder), [5, 1, 6]
    segments = torch.repeat_interleave(torch.tensor([7, 8, 7 + 2]), torch.tensor(lengths)).expand(3, T)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(3, T)
    packed = logits_of(model, ids, position_ids=positions, segment_ids=segments)
    alone = [reference(document).logits for document in torch.split(ids, lengths, dim=1)]
    assert_close(packed, torch.cat(alone, dim=1))


def test_decoding_prompts_of_unequal_lengths(reference: Any, folder: Path, ids: Tensor) -> None:
    lengths, steps = (2, 7, 4), 5
    with torch.inference_mode():
        model = DecodingModel(load_decoder(folder), torch.float32)
        rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
        logits = [model.read(rows, T)]
        for step in range(steps):
            logits.append(model.step(ids[range(3), [length + step for length in lengths]][:, None])[:, 0])
        for row, length in enumerate(lengths):
            theirs = reference(ids[row : row + 1]).logits[0, length - 1 : length + steps]
            assert_close(torch.stack(logits, dim=1)[row], theirs)


def test_import_export_import_bit_for_bit(reference: Any, folder: Path, tmp_path: Path) -> None:
    first = load_decoder(folder)
    save_decoder(first, tmp_path / "ours", bos_token_id=0, eos_token_id=0)
    second = load_decoder(tmp_path / "ours")
    assert second.config == first.config
    state = second.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in first.state_dict().items())
    theirs, ours = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "ours"))
    assert ours.keys() == theirs.keys() == {n for n, _ in reference.named_parameters()}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_our_folder_opens_in_transformers(reference: Any, folder: Path, ids: Tensor, tmp_path: Path) -> None:
    model = load_decoder(folder)
    save_decoder(model, tmp_path / "ours", bos_token_id=3, eos_token_id=5)
    again = reopen(tmp_path / "ours")
    assert type(again) is type(reference)
    assert_close(logits_of(model, ids), again(ids).logits)
    for config in (again.config, again.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (3, 5)
    changed = {
        key
        for key, value in again.config.to_dict().items()
        if value != reference.config.to_dict()[key] and "token_id" not in key and key != "_name_or_path"
    }
    assert changed <= {"architectures", "dtype", "layer_types", "max_window_layers"}, changed


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_from_scratch_opens_in_transformers(arch: str, tied: bool, ids: Tensor, tmp_path: Path) -> None:
    kv = None if arch == "gpt2" else 2
    config = from_scratch(
        arch,
        vocab_size=V,
        d_model=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=kv,
        max_seq_len=16,
        tie_embeddings=tied,
    )
    model = Decoder(config).eval()
    save_decoder(model, tmp_path, bos_token_id=None, eos_token_id=1)
    again = reopen(tmp_path)
    assert again.generation_config.bos_token_id is None
    assert_close(logits_of(model, ids), again(ids).logits)


def test_a_half_precision_model_keeps_its_type(folder: Path, ids: Tensor, tmp_path: Path) -> None:
    model = load_decoder(folder, torch.bfloat16)
    save_decoder(model, tmp_path / "ours", bos_token_id=0, eos_token_id=0)
    again = reopen(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    torch.testing.assert_close(logits_of(model, ids), again(ids).logits, atol=0.2, rtol=0.05)


def test_a_config_of_transformers_4_is_read_alike(folder: Path) -> None:
    new = json.loads((folder / "config.json").read_text())
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    rope = new.get("rope_parameters", {"rope_theta": 10000.0})  # GPT-2 has none, and must not mind
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    old |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling if "factor" in scaling else None}
    assert config_from_hf(old) == config_from_hf(new)
