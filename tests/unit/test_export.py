from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seedbed import export
from seedbed.checkpoint import load_model, save_checkpoint
from seedbed.errors import CheckpointError, ConfigError
from seedbed.export import TOLERANCE, export_merged
from seedbed.lora import adapter_state, add_adapter, find_targets
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Adapter, Base, Decoder
from seedbed.model.weights import load_decoder, save_decoder, weights_fingerprint
from seedbed.text.tokenizer import train_char

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(params=["gpt2", "llama"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = train_char(["to be or not to be"])
    config = from_scratch(
        request.param, vocab_size=tokenizer.vocab_size, d_model=16, num_layers=2, num_heads=4, max_seq_len=32
    )
    save_decoder(Decoder(config), tmp_path / "base", bos_token_id=None, eos_token_id=0)
    tokenizer.save(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "base"


def train(base: Path, folder: Path, targets: str = "all-linear", *, dora: bool = False) -> Path:
    """As training leaves it: an adapter that is not zero, with the base's tokenizer."""
    model, tokenizer = load_model(base)
    model.base = Base(str(base), weights_fingerprint(base))
    add_adapter(model, Adapter(2, 4.0, 0.1, False, dora, find_targets(model.config, targets), False))
    for tensor in adapter_state(model).values():
        tensor.add_(0.1 * torch.randn_like(tensor))
    save_checkpoint(folder, model, tokenizer, {"step": torch.tensor(1.0)}, {"step": 1})
    return folder


def logits_of(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model.logits(model(torch.arange(20)[None]))


@pytest.mark.parametrize(("targets", "dora"), [("all-linear", False), ("attention,head", True)])
def test_a_merged_model_is_a_plain_folder(base: Path, tmp_path: Path, targets: str, dora: bool) -> None:
    adapter = train(base, tmp_path / "adapter", targets, dora=dora)
    facts = export_merged(adapter, tmp_path / "merged")
    assert (facts["output"], facts["base"]) == (str(tmp_path / "merged"), str(base))
    assert facts["max_difference"] < facts["tolerance"] == TOLERANCE
    merged, tokenizer = load_model(tmp_path / "merged")
    assert merged.adapter is None
    assert merged.config.tie_embeddings == ("head" not in targets)
    assert facts["parameters"] == sum(p.numel() for p in merged.parameters())
    expected = logits_of(load_model(adapter)[0])
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, logits_of(load_decoder(base)), atol=1e-3)
    assert tokenizer.encode("to be") == load_model(base)[1].encode("to be")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == TEMPLATE
    assert not (tmp_path / "merged" / "seedbed").exists()


def test_a_file_that_says_otherwise_is_not_kept(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = train(base, tmp_path / "adapter")

    def write_something_else(model: Decoder, folder: Path, **tokens: Any) -> None:
        with torch.no_grad():
            model.embed_tokens.weight[5] *= 1.1
        save_decoder(model, folder, **tokens)

    monkeypatch.setattr(export, "save_decoder", write_something_else)
    with pytest.raises(CheckpointError, match=r"differ from the adapter's by \d\.\d\de-0\d .* 1e-04 is allowed"):
        export_merged(adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_weights_that_are_no_numbers_are_not_kept(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(train(base, tmp_path / "adapter"))
    next(iter(adapter_state(model).values())).fill_(float("nan"))
    save_checkpoint(tmp_path / "adapter", model, tokenizer, {"step": torch.tensor(1.0)}, {"step": 1})
    with pytest.raises(CheckpointError, match="by nan of"):
        export_merged(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_output_that_is_taken(base: Path, tmp_path: Path) -> None:
    adapter = train(base, tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    export_merged(adapter, tmp_path / "empty")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export_merged(adapter, tmp_path / "empty")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export_merged(adapter, adapter / "adapter_config.json")


def test_a_whole_model_has_nothing_to_merge(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter to merge"):
        export_merged(base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
