"""GGUF files read and written, against transformers reading the same files: ids, weights, logits."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from seedbed.data.python_docs import python_docs
from seedbed.export import export_model_as_gguf
from seedbed.model.decoder import Decoder
from seedbed.model.gguf import import_gguf, read_gguf
from seedbed.model.weights import load_decoder, save_decoder
from seedbed.text.gguf_tokenizer import tokenizer_from_gguf
from seedbed.text.tokenizer import Tokenizer, train_bpe, train_char
from tests.starter import find_gguf
from tests.unit.model.test_gguf import (
    TEXTS,
    byte_level_metadata,
    gguf_tensors,
    make_model,
    model_metadata,
    sentencepiece_metadata,
    write_gguf,
)

MESSAGES = [{"role": "user", "content": "Hello  there, 42!"}]


def real_texts() -> list[str]:
    """English, code, digits, every kind of white space, other scripts."""
    documents = [document for document, _ in zip(python_docs(), range(40), strict=False)]
    return [*TEXTS, *documents, Path(__file__).read_text(encoding="utf-8"), *map(chr, range(1, 0x2FFF, 7))]


def tokenizer_files(name: str) -> tuple[str, dict[str, Any]]:
    if name == "sentencepiece":
        return "llama", sentencepiece_metadata()
    return {"gpt-2": "gpt2", "qwen2": "qwen2"}.get(name, "llama"), byte_level_metadata(name)


@pytest.mark.parametrize("name", ["gpt-2", "default", "smollm", "llama-bpe", "qwen2", "sentencepiece"])
def test_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    arch, metadata = tokenizer_files(name)
    model = make_model(arch, len(metadata["tokenizer.ggml.tokens"]))
    tensors = gguf_tensors(model, tmp_path / "source")
    path = write_gguf(tmp_path / "model.gguf", model_metadata(model.config) | metadata, tensors)
    import_gguf(read_gguf(path), tmp_path / "out")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    compare_tokenizers(tmp_path / "out", reference, real_texts())


# transformers overlooks some sizes in a file and takes those of the original models.
SIZES: dict[str, dict[str, Any]] = {"gpt2": {"d_ff": 128, "max_seq_len": 1024}, "qwen3": {"head_dim": 128}}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gpt2"])
def test_logits_are_those_of_transformers(arch: str, tmp_path: Path) -> None:
    source = make_model(arch, 700, **SIZES.get(arch, {}))
    metadata = model_metadata(source.config) | byte_level_metadata("gpt-2")
    path = write_gguf(tmp_path / "model.gguf", metadata, gguf_tensors(source, tmp_path / "source"))
    import_gguf(read_gguf(path), tmp_path / "out")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ids = torch.randint(700, (2, 20), generator=torch.Generator().manual_seed(0))
    compare_logits(tmp_path / "out", reference, ids)


@pytest.mark.parametrize(
    ("arch", "tied"),
    [("llama", True), ("mistral", False), ("qwen2", True), ("qwen3", False), ("gpt2", True), ("gpt2", False)],
)
def test_transformers_reads_the_logits_of_an_exported_file(arch: str, tied: bool, tmp_path: Path) -> None:
    fields = {"family": "mistral"} if arch == "mistral" else SIZES.get(arch, {})
    source = make_model("llama" if arch == "mistral" else arch, 700, tied, **fields)
    path = exported(source, tokenizer_from_gguf(byte_level_metadata("gpt-2"), "test"), tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = torch.randint(700, (2, 20), generator=torch.Generator().manual_seed(0))
    compare_logits(tmp_path / "source", reference, ids)


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "sentencepiece", "trained", "characters"])
def test_transformers_reads_the_ids_of_an_exported_file(name: str, tmp_path: Path) -> None:
    if name == "trained":
        arch, tokenizer = "qwen2", train_bpe(real_texts()[:20], 600)
    elif name == "characters":
        arch, tokenizer = "llama", train_char(TEXTS)
    else:
        arch, metadata = tokenizer_files(name)
        tokenizer = tokenizer_from_gguf(metadata, "test")
    path = exported(make_model(arch, tokenizer.vocab_size), tokenizer, tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    compare_ids(tokenizer, reference, real_texts()[::4])


def exported(model: Decoder, tokenizer: Tokenizer, folder: Path) -> Path:
    """A GGUF file alone in a folder: transformers would read what lies beside it."""
    save_decoder(model, folder / "source", bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    tokenizer.save(folder / "source")
    export_model_as_gguf(folder / "source", folder / "file" / "model.gguf", torch.float32)
    return folder / "file" / "model.gguf"


@pytest.fixture(scope="session")
def starter_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in 4 bits, alone in a folder: transformers would read what lies beside it."""
    if (path := find_gguf()) is None:
        pytest.skip("SEEDBED_STARTER is not set: a folder with the real model, made by tests/starter.py")
    link = tmp_path_factory.mktemp("starter") / "model.gguf"
    link.symlink_to(path.resolve())
    return link


@pytest.fixture(scope="session")
def starter_import(starter_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("starter") / "smollm2"
    made = import_gguf(read_gguf(starter_gguf), folder)
    assert made.num_parameters == 134_515_008
    yield folder
    shutil.rmtree(folder)


@pytest.mark.starter
def test_the_real_file_has_the_ids_of_transformers(starter_gguf: Path, starter_import: Path) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(starter_gguf.parent, gguf_file=starter_gguf.name)
    compare_tokenizers(starter_import, reference, real_texts())
    again = transformers.AutoTokenizer.from_pretrained(starter_import)
    assert again.apply_chat_template(MESSAGES, tokenize=False) == reference.apply_chat_template(
        MESSAGES, tokenize=False
    )


@pytest.mark.starter
def test_the_real_file_has_the_weights_and_logits_of_transformers(starter_gguf: Path, starter_import: Path) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        starter_gguf.parent, gguf_file=starter_gguf.name, dtype=torch.float32
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(starter_import, dtype=torch.float32)
    expected = reference.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    ids = torch.tensor([Tokenizer.load(starter_import).encode(TEXTS[0])])
    compare_logits(starter_import, reference, ids)


def compare_tokenizers(folder: Path, reference: Any, texts: list[str]) -> None:
    """Ours reading the folder, and transformers reading it, against transformers reading the GGUF."""
    ours, again = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    compare_ids(ours, reference, texts)
    # For model_type qwen2 transformers composes accents first, whatever tokenizer.json says; not from GGUF.
    composed = [text for text in texts if unicodedata.is_normalized("NFC", text)]
    assert again(composed).input_ids == reference(composed).input_ids
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "all_special_ids"):
        assert getattr(again, name) == getattr(reference, name), name


def compare_ids(ours: Tokenizer, reference: Any, texts: list[str]) -> None:
    expected = reference(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    for text, ids, right in zip(texts, ours.encode_batch(texts), expected, strict=True):
        assert ids == right, text
    assert (ours.eos_id, ours.bos_id) == (reference.eos_token_id, reference.bos_token_id)


def compare_logits(folder: Path, reference: Any, ids: torch.Tensor) -> None:
    model = load_decoder(folder)
    with torch.no_grad():
        expected = reference(ids).logits
        torch.testing.assert_close(model.logits(model(ids)), expected, rtol=1e-4, atol=2e-4)
