"""Models go out as GGUF files and come back with the same weights and the same ids; what cannot is refused."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from seedbed.checkpoint import load_model, save_checkpoint
from seedbed.cli.app import run
from seedbed.errors import CheckpointError, ConfigError, StorageError
from seedbed.export import export_merged, export_model_as_gguf
from seedbed.lora import adapter_state, add_adapter, find_targets
from seedbed.model.config import RopeScaling
from seedbed.model.decoder import Adapter, Base, Decoder
from seedbed.model.gguf import import_gguf, read_gguf
from seedbed.model.weights import load_decoder, save_decoder, weights_fingerprint
from seedbed.text.gguf_tokenizer import tokenizer_from_gguf
from seedbed.text.gguf_tokenizer_export import tokenizer_to_gguf
from seedbed.text.tokenizer import Tokenizer, train_bpe, train_char
from tests.unit.model.test_gguf import (
    TEMPLATE,
    TEXTS,
    _documents,
    byte_level_metadata,
    make_model,
    sentencepiece_metadata,
)

ODD = [*TEXTS, " <|endoftext|> <|im_start|> <think> <s> </s>", "a   1  22   333", *map(chr, range(1, 0x2FFF, 97))]
LLAMA3 = RopeScaling(8.0, 1.0, 4.0, 8192)


def byte_level(pre: str = "qwen2") -> Tokenizer:
    return tokenizer_from_gguf(byte_level_metadata(pre), "test")


def save(folder: Path, model: Decoder, tokenizer: Tokenizer) -> Path:
    save_decoder(model, folder, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.end_ids)
    tokenizer.save(folder)
    return folder


def exported(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    export_model_as_gguf(folder, folder.parent / "model.gguf", dtype)
    return folder.parent / "model.gguf"


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2 with a head": ("gpt2", {"tie_embeddings": False}),
    "llama": ("llama", {}),
    "llama with a head": ("llama", {"tie_embeddings": False}),
    "llama with biases": ("llama", {"qkv_bias": True, "output_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", {"head_dim": 64, "rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "mistral": ("llama", {"family": "mistral", "tie_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_embeddings": False}),
}


@pytest.mark.parametrize("case", MODELS)
def test_weights_and_config_come_back(case: str, tmp_path: Path) -> None:
    arch, fields = MODELS[case]
    source = make_model(arch, 712, **fields)  # twelve rows more than tokens
    path = exported(save(tmp_path / "source", source, byte_level()))
    import_gguf(read_gguf(path), tmp_path / "back")
    back = load_decoder(tmp_path / "back")
    family = "llama" if source.config.family == "mistral" else source.config.family
    dropout = 0.1 if arch == "gpt2" else 0.0  # GGUF has no key for it; this is config.json's default
    assert back.config == replace(source.config, family=family, dropout=dropout)
    expected = source.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())
    assert not list(tmp_path.glob(".*"))


def digits_apart() -> Tokenizer:
    tokenizer = byte_level("gpt-2")
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer._backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def older_sentencepiece() -> Tokenizer:
    """Spaces as the first tokenizers of Llama have them: written by the normalizer."""
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(), "test")
    backend = json.loads(tokenizer._backend.to_str()) | {"pre_tokenizer": None}
    made = Backend.from_str(json.dumps(backend))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return Tokenizer(made, "</s>", "<s>", tokenizer._files)


TOKENIZERS: dict[str, tuple[str, Callable[[], Tokenizer]]] = {
    "trained": ("qwen2", lambda: train_bpe(_documents(), 500)),
    "characters": ("qwen2", lambda: train_char(["naïve café, 日本, 🦊"])),
    "ASCII characters": ("qwen2", lambda: train_char(["to be or not to be"])),
    "GPT-2": ("gpt-2", lambda: byte_level("gpt-2")),
    "Llama 3": ("llama-bpe", lambda: byte_level("llama-bpe")),
    "Qwen2": ("qwen2", byte_level),
    "SentencePiece": ("default", lambda: tokenizer_from_gguf(sentencepiece_metadata(), "test")),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_and_special_tokens_come_back(name: str) -> None:
    pre, make = TOKENIZERS[name]
    source = make()
    metadata = tokenizer_to_gguf(source, source.vocab_size + 3)
    assert metadata["tokenizer.ggml.pre"] == pre
    back = tokenizer_from_gguf(metadata, "test")
    assert back.encode_batch(ODD) == source.encode_batch(ODD)
    assert [back.decode(ids) for ids in back.encode_batch(ODD)] == [
        source.decode(ids) for ids in source.encode_batch(ODD)
    ]
    for key in ("eos_id", "bos_id", "stop_ids", "special_tokens_map", "chat_template"):
        assert getattr(back, key) == getattr(source, key), key
    assert metadata["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{source.vocab_size + 2}]"


def test_an_alphabet_that_needs_no_merges_comes_back_from_a_file(tmp_path: Path) -> None:
    source = train_char(["to be or not to be"])
    path = exported(save(tmp_path / "source", make_model("llama", source.vocab_size), source))
    assert read_gguf(path).metadata["tokenizer.ggml.merges"] == []
    import_gguf(read_gguf(path), tmp_path / "back")
    assert Tokenizer.load(tmp_path / "back").encode_batch(ODD) == source.encode_batch(ODD)


def test_words_that_only_other_programs_cut_have_their_name() -> None:
    assert tokenizer_to_gguf(digits_apart(), 700)["tokenizer.ggml.pre"] == "smollm"
    composed = byte_level()
    composed._backend.normalizer = normalizers.NFC()
    assert tokenizer_to_gguf(composed, 700)["tokenizer.ggml.pre"] == "qwen2"


def test_llama_3_keeps_a_word_that_is_a_token_whole() -> None:
    for name, whole in (("llama-bpe", True), ("qwen2", False), ("gpt-2", False)):
        assert byte_level(name).content["model"]["ignore_merges"] == whole


def test_both_spellings_of_sentencepiece_are_one() -> None:
    first, older = (tokenizer_to_gguf(make(), 900) for make in (TOKENIZERS["SentencePiece"][1], older_sentencepiece))
    assert first == older
    scores, expected = first["tokenizer.ggml.scores"], sentencepiece_metadata()["tokenizer.ggml.scores"]
    assert scores[: len(expected)] == expected
    assert first["tokenizer.ggml.add_space_prefix"]


def test_pieces_of_one_score_keep_it() -> None:
    """Llama has added runs of spaces, all with the lowest score."""
    metadata = sentencepiece_metadata()
    runs = ["▁" * length for length in range(2, 9)]
    kept = [place for place, token in enumerate(metadata["tokenizer.ggml.tokens"]) if token not in runs]
    for key, added in (("tokens", runs), ("scores", [-1e9] * len(runs)), ("token_type", [1] * len(runs))):
        values = metadata[f"tokenizer.ggml.{key}"]
        metadata = metadata | {f"tokenizer.ggml.{key}": [values[place] for place in kept] + added}
    source = tokenizer_from_gguf(metadata, "test")
    made = tokenizer_to_gguf(source, source.vocab_size)
    assert len(set(made["tokenizer.ggml.scores"][1 - len(runs) :])) == 1  # the first has only one way to be made
    assert tokenizer_from_gguf(made, "test").content == source.content


def test_types_are_those_that_llama_cpp_knows() -> None:
    tokens = byte_level_metadata("qwen2")["tokenizer.ggml.token_type"]
    assert tokenizer_to_gguf(byte_level(), 700)["tokenizer.ggml.token_type"] == tokens
    pieces = sentencepiece_metadata()["tokenizer.ggml.token_type"]
    made = tokenizer_to_gguf(TOKENIZERS["SentencePiece"][1](), len(pieces))
    assert made["tokenizer.ggml.token_type"] == pieces


@pytest.mark.parametrize(("said", "added"), [(None, True), (False, False)])
def test_a_first_token_is_put_there_as_the_tokenizer_says(said: bool | None, added: bool) -> None:
    tokenizer = tokenizer_from_gguf(byte_level_metadata("qwen2") | {"tokenizer.ggml.add_bos_token": True}, "test")
    settings = json.loads(tokenizer._files["tokenizer_config.json"]) | {"add_bos_token": said}
    tokenizer._files["tokenizer_config.json"] = json.dumps(settings)
    made = tokenizer_to_gguf(tokenizer, 700)
    assert (made["tokenizer.ggml.add_bos_token"], made["tokenizer.ggml.add_eos_token"]) == (added, False)


def test_llama_3_begins_with_its_first_token_where_a_file_is_silent() -> None:
    metadata = {key: value for key, value in byte_level_metadata("llama-bpe").items() if "add_bos" not in key}
    assert tokenizer_to_gguf(tokenizer_from_gguf(metadata, "test"), 700)["tokenizer.ggml.add_bos_token"]


def test_every_end_of_an_answer_comes_back(tmp_path: Path) -> None:
    tokenizer = byte_level().with_stop(698)
    import_gguf(read_gguf(exported(save(tmp_path / "source", make_model("llama", 700), tokenizer))), tmp_path / "back")
    assert Tokenizer.load(tmp_path / "back").stop_ids == {0, 698}
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == TEMPLATE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrices_are_written_as_asked_and_vectors_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    source = make_model("gpt2", 700)
    path = exported(save(tmp_path / "source", source, byte_level()), dtype)
    file = read_gguf(path)
    kept = {name for name, tensor in file.tensors.items() if tensor.tensor_type.name == "F32"}
    assert kept == {name for name, tensor in file.tensors.items() if len(tensor.shape) == 1} | {"position_embd.weight"}
    assert file.metadata["general.file_type"] == {torch.float16: 1, torch.bfloat16: 32}[dtype]
    import_gguf(file, tmp_path / "back")
    back = load_decoder(tmp_path / "back")
    for name, tensor in source.named_parameters():
        rounded = tensor if tensor.ndim == 1 or name.startswith("embed_positions") else tensor.to(dtype).float()
        assert torch.equal(back.get_parameter(name), rounded), name


def train_adapter(base: Path, folder: Path) -> Path:
    model, tokenizer = load_model(base)
    model.base = Base(str(base), weights_fingerprint(base))
    targets = find_targets(model.config, "all-linear,head")
    add_adapter(model, Adapter(2, 4.0, 0.0, False, False, targets, False))
    for tensor in adapter_state(model).values():
        tensor.add_(0.01 * torch.randn_like(tensor))
    save_checkpoint(folder, model, tokenizer, {"step": torch.tensor(1.0)}, {"step": 1})
    return folder


def test_an_adapter_is_merged_on_the_way(tmp_path: Path) -> None:
    adapter = train_adapter(save(tmp_path / "base", make_model("llama", 700), byte_level()), tmp_path / "adapter")
    export_merged(adapter, tmp_path / "merged")
    import_gguf(read_gguf(exported(adapter)), tmp_path / "back")
    merged, back = load_decoder(tmp_path / "merged"), load_decoder(tmp_path / "back")
    assert not back.config.tie_embeddings
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in merged.state_dict().items())


def with_backend(**changes: Any) -> Tokenizer:
    """A byte-level tokenizer whose tokenizer.json says something else."""
    tokenizer = byte_level()
    content = tokenizer.content
    model = content["model"] | changes.pop("model", {})
    return Tokenizer(Backend.from_str(json.dumps(content | changes | {"model": model})), tokenizer.eos_token)


def with_words(words: str) -> Tokenizer:
    tokenizer = byte_level()
    cut = pre_tokenizers.Split(Regex(words), behavior="isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer._backend.pre_tokenizer = pre_tokenizers.Sequence([cut, last])
    return tokenizer


def with_token(**flags: bool) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer._backend.add_tokens([AddedToken("<answer>", **flags)])
    return tokenizer


def with_added(text: str) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer._backend.add_tokens([text])
    return tokenizer


def without_scores() -> Tokenizer:
    """SentencePiece's words with a merge that no scores lead to: one way to make a token is missing."""
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(), "test")
    content = tokenizer.content
    content["model"]["merges"] = content["model"]["merges"][1:]
    return Tokenizer(Backend.from_str(json.dumps(content)), "</s>", "<s>")


def unigram() -> Tokenizer:
    backend = Backend(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, "</s>")


REFUSED: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "kind": (unigram, "type Unigram"),
    "words": (lambda: with_words(r"\w+|\W+"), "supported are the words of gpt-2, llama-bpe, qwen2, smollm"),
    "no words": (lambda: with_backend(pre_tokenizer=None), "supported are the words"),
    "space before": (
        lambda: with_backend(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
        "supported are the words",
    ),
    "lower case": (lambda: with_backend(normalizer={"type": "Lowercase"}), "normalizer"),
    "dropout": (lambda: with_backend(model={"dropout": 0.1}), "dropout 0.1"),
    "a token that takes spaces": (lambda: with_token(lstrip=True), "'<answer>' with lstrip"),
    "whole words": (lambda: with_backend(model={"ignore_merges": True, "merges": []}), "ignore_merges True"),
    "unknown bytes": (
        lambda: with_backend(
            model={
                "unk_token": "<|endoftext|>",
                "merges": [],
                "vocab": {"<|endoftext|>": 0, "a": 1},
            },
            added_tokens=[],
        ),
        "255 bytes without a token",
    ),
    "a text twice": (lambda: with_added("[PAD701]"), "several tokens have one text"),
    "no scores": (without_scores, "merges are not those of a SentencePiece"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_without_a_name_is_refused(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    tokenizer = make()
    folder = save(tmp_path / "source", make_model("llama", tokenizer.vocab_size + 1), tokenizer)
    with pytest.raises(ConfigError, match=message) as caught:
        exported(folder)
    assert all(problem.startswith(f"{folder}: ") for problem in caught.value.problems)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def break_file(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"
UP = "model.layers.1.mlp.up_proj.weight"
BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda tensors: tensors.pop(NORM), f"{NORM} is missing"),
    "surplus": (lambda tensors: tensors.update(new=torch.ones(2)), "model.new is not a weight"),
    "shape": (lambda tensors: tensors.update({NORM: torch.ones(5)}), rf"{NORM} has shape \[5\].*expected \[32\]"),
    "another head": (lambda tensors: tensors.update({"lm_head.weight": torch.ones(700, 32)}), "differs from the embed"),
    "large": (lambda tensors: tensors[UP].fill_(1e6), f"{UP} holds numbers that float16 cannot; take --dtype bfloat16"),
    "no numbers": (lambda tensors: tensors[NORM].fill_(float("nan")), f"{NORM} holds numbers that float32 cannot"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_weights_that_do_not_fit_leave_no_file(case: str, tmp_path: Path) -> None:
    change, message = BROKEN[case]
    folder = save(tmp_path / "source", make_model("llama", 700), byte_level())
    break_file(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        exported(folder, torch.float16)
    assert str(caught.value).startswith(f"{folder}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("arch", "fields", "message"),
    [
        ("qwen3", {"qkv_bias": True, "output_bias": True}, "attention_bias true"),
        ("qwen2", {"rope_scaling": LLAMA3}, "rope_type 'llama3'"),
    ],
)
def test_models_that_no_reader_knows_are_refused(
    arch: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        exported(save(tmp_path / "source", make_model(arch, 700, **fields), byte_level()))


def test_a_second_copy_of_a_tied_head_is_left_out(tmp_path: Path) -> None:
    folder = save(tmp_path / "source", make_model("llama", 700), byte_level())
    break_file(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert "output.weight" not in read_gguf(exported(folder)).tensors


@pytest.mark.parametrize(
    ("cause", "error"),
    [(OSError(errno.ENOSPC, "No space left"), StorageError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_full_disk_or_an_end_on_the_way_leaves_no_file(
    cause: BaseException, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "source", make_model("llama", 700), byte_level())
    write, written = gguf.GGUFWriter.write_tensor_data, []

    def fail_at_the_fifth(writer: gguf.GGUFWriter, tensor: Any) -> None:
        written.append((tmp_path / ".model.gguf.tmp").stat().st_size)
        if len(written) == 5:
            raise cause
        write(writer, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail_at_the_fifth)
    with pytest.raises(error):
        exported(folder)
    assert written[-1] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    folder = save(tmp_path / "source", make_model("llama", 700), byte_level())
    (tmp_path / "model.gguf").write_text("precious")
    with pytest.raises(ConfigError, match="is there already"):
        exported(folder)
    assert (tmp_path / "model.gguf").read_text() == "precious"


def test_the_command(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "tiny.gguf"
    assert run(["export", str(tiny_run), "--gguf", "--output", str(output), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {
        "output": str(output),
        "parameters": sum(parameter.numel() for parameter in load_model(tiny_run)[0].parameters()),
        "family": "llama",
        "dtype": "float16",
        "size": output.stat().st_size,
    }
    assert read_gguf(output).metadata["general.name"] == tiny_run.name
    assert run(["export", str(tiny_run), "--gguf", "--output", str(tmp_path / "b.gguf"), "--dtype", "bfloat16"]) == 0
    assert "bfloat16" in capsys.readouterr().out
    assert run(["import", str(output), str(tmp_path / "back")]) == 0
    tokenizers = [load_model(path)[1] for path in (tiny_run, tmp_path / "back")]
    assert tokenizers[0].encode_batch(ODD) == tokenizers[1].encode_batch(ODD)


def test_the_command_says_what_it_needs(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["export", str(tiny_run), "--output", str(tmp_path / "out.gguf")]
    for flags, message in (
        ([], "--merge"),
        (["--merge", "--gguf"], "one of the two"),
        (["--merge", "--dtype", "float16"], "goes with --gguf"),
    ):
        assert run([*given, *flags]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert run([*given, "--gguf"]) == 2
    assert "seedbed[gguf]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", refuse)
    assert run(["export", str(tiny_run), "--gguf", "--output", str(tmp_path / "out.gguf")]) == StorageError.exit_code
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
