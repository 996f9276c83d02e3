"""GGUF files written by the package `gguf` become folders with the weights and the tokens they were made of."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from seedbed.data.python_docs import python_docs
from seedbed.errors import CheckpointError, ConfigError, MissingExtra, SeedbedError
from seedbed.model.config import DecoderConfig, RopeScaling, from_scratch
from seedbed.model.decoder import Decoder
from seedbed.model.gguf import import_gguf, read_gguf
from seedbed.model.weights import load_decoder, save_decoder
from seedbed.text.tokenizer import WORDS, Tokenizer, train_bpe

TEXTS = [
    "The quick brown fox doesn't jump over 12 or 3456 dogs; it's 1,234.5 km away.",
    "def f(x):\n    return x **2  # doubles\n\n\tif x != 1_000:\n\t\tprint(f'{x:>8}')\r\n",
    "Ünïcödé: naïve café, 日本語のテキスト, Ελληνικά, русский, 🦊🚀, e\u0301 ﬁ",
    "   leading,  double,   triple spaces and a tab\t\tand trailing   ",
    "\n\n\n  \n x",
    "",
]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}"


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray[Any, Any]],
    kind: Kind = Kind.F32,
) -> Path:
    """A GGUF file; matrices are stored as `kind`, vectors in float32."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer's own
            add[type(value)](key, value)
    for name, values in tensors.items():
        if values.ndim == 2 and kind != Kind.F32:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_model(arch: str, vocab_size: int, tie_embeddings: bool = True, **fields: Any) -> Decoder:
    torch.manual_seed(0)
    config = from_scratch(
        arch,
        vocab_size=vocab_size,
        d_model=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=None if arch == "gpt2" else 2,
        d_ff=64,
        max_seq_len=64,
        tie_embeddings=tie_embeddings,
    )
    model = Decoder(replace(config, **fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


def model_metadata(config: DecoderConfig) -> dict[str, Any]:
    c = config
    norm = "layer_norm_epsilon" if c.family == "gpt2" else "layer_norm_rms_epsilon"
    keys: dict[str, Any] = {
        "block_count": c.num_layers,
        "context_length": c.max_seq_len,
        "embedding_length": c.d_model,
        "feed_forward_length": c.d_ff,
        "attention.head_count": c.num_heads,
        f"attention.{norm}": c.norm_eps,
    }
    if c.family != "gpt2":
        keys |= {"attention.head_count_kv": c.num_kv_heads, "rope.freq_base": c.rope_theta}
        keys |= {"rope.dimension_count": c.head_dim} if c.family == "llama" else {"attention.key_length": c.head_dim}
    return {"general.architecture": c.family} | {f"{c.family}.{key}": value for key, value in keys.items()}


def gguf_tensors(model: Decoder, folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What llama.cpp's converter makes of the folder of a model; names by the package's own table."""
    save_decoder(model, folder, bos_token_id=None, eos_token_id=None)
    c = model.config
    [arch] = [arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == c.family]
    names = gguf.get_tensor_name_map(arch, c.num_layers)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.numpy()
        if c.family == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = c.num_heads if ".q_proj." in name else c.num_kv_heads
            halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if c.family == "gpt2" and ".h." in name and values.ndim == 2:
            values = values.T
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        tensors[stored] = np.ascontiguousarray(values)
    return tensors


@cache
def byte_level_metadata(pre: str) -> dict[str, Any]:
    """A byte-level vocabulary of 700 tokens, the last two of them control and user-defined."""
    trained = json.loads(train_bpe(_documents(), 698)._backend.to_str())
    vocab = sorted(trained["model"]["vocab"], key=trained["model"]["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*vocab, "<|im_start|>", "<think>"],
        "tokenizer.ggml.token_type": [3, *[1] * (len(vocab) - 1), 3, 4],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in trained["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": len(vocab),
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


@cache
def sentencepiece_metadata() -> dict[str, Any]:
    """A vocabulary as SentencePiece trains it: special tokens, bytes, then pieces with falling scores."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex(r"\d"), behavior="isolated")]
    )
    trainer = trainers.BpeTrainer(vocab_size=600, limit_alphabet=90, show_progress=False)
    backend.train_from_iterator(_documents(), trainer)
    trained = json.loads(backend.to_str())["model"]
    characters = sorted(token for token in trained["vocab"] if len(token) == 1)
    pieces = list(dict.fromkeys("".join(pair) for pair in trained["merges"]))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *characters]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces) + len(characters))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _documents() -> Iterable[str]:
    for number, document in enumerate(python_docs()):
        if number == 60:
            return
        yield document


def tiny_gguf(
    folder: Path,
    arch: str = "llama",
    kind: Kind = Kind.F32,
    *,
    model: Decoder | None = None,
    changes: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray[Any, Any] | None] | None = None,
) -> Path:
    """A GGUF file of a small model; `changes` and `tensors` replace what it holds, None leaves it out."""
    tokenizer = byte_level_metadata("qwen2")
    model = model or make_model(arch, len(tokenizer["tokenizer.ggml.tokens"]))
    metadata = model_metadata(model.config) | tokenizer | dict(changes or {})
    stored = gguf_tensors(model, folder / "source") | dict(tensors or {})
    return write_gguf(
        folder / "model.gguf",
        {key: value for key, value in metadata.items() if value is not None},
        {key: value for key, value in stored.items() if value is not None},
        kind,
    )


def imported(path: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    import_gguf(read_gguf(path), path.parent / "out", dtype)
    return load_decoder(path.parent / "out", dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gpt2"])
def test_weights_and_config_come_back(arch: str, tied: bool, tmp_path: Path) -> None:
    source = make_model(arch, 700, tied)
    read = imported(tiny_gguf(tmp_path, model=source))
    dropout = 0.1 if arch == "gpt2" else 0.0  # GGUF has no key for it; this is config.json's default
    assert read.config == replace(source.config, dropout=dropout)
    expected = source.state_dict()
    assert read.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.state_dict().items())


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_1, Kind.F16, Kind.BF16])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_quantized_weights_come_back_as_the_package_reads_them(arch: str, kind: Kind, tmp_path: Path) -> None:
    source = make_model(arch, 700)
    read = imported(tiny_gguf(tmp_path, kind=kind, model=source))
    for name, tensor in read.named_parameters():
        plain = source.get_parameter(name).detach()
        if plain.ndim == 2:
            # A row is quantized by itself, so that the order of rows does not matter.
            plain = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(plain.numpy(), kind), kind))
        assert torch.equal(tensor, plain), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_written_as_asked(dtype: torch.dtype, tmp_path: Path) -> None:
    source = make_model("llama", 700)
    read = imported(tiny_gguf(tmp_path, model=source), dtype)
    assert all(torch.equal(read.get_parameter(n), p.to(dtype)) for n, p in source.named_parameters())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_it_says_what_it_made(tmp_path: Path) -> None:
    made = import_gguf(read_gguf(tiny_gguf(tmp_path, kind=Kind.Q8_0)), tmp_path / "out")
    parameters = sum(p.numel() for p in make_model("llama", 700).parameters())
    assert (made.config.family, made.num_parameters) == ("llama", parameters)
    assert list(made.quantization) == ["Q8_0", "F32"]
    assert sum(made.quantization.values()) == parameters
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_repeated_embedding_is_a_tied_head(tmp_path: Path) -> None:
    source = make_model("gpt2", 700)
    embedding = source.embed_tokens.weight.detach().numpy()
    assert imported(tiny_gguf(tmp_path, model=source, tensors={"output.weight": embedding})).config.tie_embeddings


def test_head_dim_may_differ_from_the_width_by_the_heads(tmp_path: Path) -> None:
    model = make_model("qwen3", 700, head_dim=16)
    assert imported(tiny_gguf(tmp_path, model=model)).config.head_dim == 16


def test_tokens_and_template_come_back(tmp_path: Path) -> None:
    import_gguf(read_gguf(tiny_gguf(tmp_path)), tmp_path / "out")
    read, trained = Tokenizer.load(tmp_path / "out"), train_bpe(_documents(), 698)
    assert [read.encode(text) for text in TEXTS] == [trained.encode(text) for text in TEXTS]
    assert [read.decode(read.encode(text)) for text in TEXTS] == TEXTS
    assert (read.eos_id, read.bos_id, read.vocab_size) == (0, 698, 700)
    assert read.encode("<|im_start|>") != [698]  # text never becomes a control token
    assert read.encode("<think>") == [699]  # what somebody added stays whole
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE


def test_sentencepiece_tokens_come_back_to_the_text(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    model = make_model("llama", len(metadata["tokenizer.ggml.tokens"]))
    path = write_gguf(
        tmp_path / "model.gguf", model_metadata(model.config) | metadata, gguf_tensors(model, tmp_path / "source")
    )
    import_gguf(read_gguf(path), tmp_path / "out")
    read = Tokenizer.load(tmp_path / "out")
    assert (read.eos_id, read.bos_id) == (2, 1)
    for text in TEXTS:
        # No space is put before a text that begins with one, and the first is taken off again, as in transformers.
        assert read.decode(read.encode(text)) == text.removeprefix(" ")
    assert read.encode("🦊")[-4:] == [3 + byte for byte in "🦊".encode()]
    assert not {0, 1, 2} & set(read.encode("a <s> and </s>"))


REFUSED: dict[str, tuple[dict[str, Any], type[SeedbedError], str]] = {
    "architecture": ({"general.architecture": "gemma3"}, ConfigError, "general.architecture 'gemma3'"),
    "missing key": ({"llama.block_count": None}, CheckpointError, "no llama.block_count"),
    "wrong kind of value": ({"llama.block_count": "two"}, ConfigError, "num_hidden_layers 'two'"),
    "scaled positions": ({"llama.rope.scaling.type": "yarn"}, ConfigError, "rope_type 'yarn'"),
    "partial rotation": ({"llama.rope.dimension_count": 4}, ConfigError, "rope.dimension_count 4"),
    "experts": ({"llama.expert_count": 8}, ConfigError, "expert_count 8"),
    "window": ({"llama.attention.sliding_window": 16}, ConfigError, "sliding_window 16"),
    "parts": ({"split.count": 3}, ConfigError, "one of 3 parts"),
    "tokenizer": ({"tokenizer.ggml.model": "t5"}, ConfigError, "tokenizer.ggml.model 't5'"),
    "pre-tokenizer": ({"tokenizer.ggml.pre": "falcon"}, ConfigError, "tokenizer.ggml.pre 'falcon'"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, CheckpointError, "tokenizer.ggml.tokens is missing"),
    "no merges": ({"tokenizer.ggml.merges": None}, CheckpointError, "tokenizer.ggml.merges is missing"),
    "no end": ({"tokenizer.ggml.eos_token_id": None}, CheckpointError, "eos_token_id is missing"),
    "end beyond tokens": ({"tokenizer.ggml.eos_token_id": 700}, CheckpointError, "eos_token_id 700"),
    "too few types": ({"tokenizer.ggml.token_type": [1, 1]}, CheckpointError, "2 token types"),
    "merge of nothing": ({"tokenizer.ggml.merges": ["qqq zzz"]}, CheckpointError, "tokenizer is damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_named_and_nothing_is_left(case: str, tmp_path: Path) -> None:
    changes, error, message = REFUSED[case]
    path = tiny_gguf(tmp_path, changes=changes)
    with pytest.raises(error, match=message):
        import_gguf(read_gguf(path), tmp_path / "out")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["model.gguf", "source"]


def test_every_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    row = np.zeros(32, dtype=np.float32)
    path = tiny_gguf(
        tmp_path,
        tensors={"blk.0.attn_q.weight": None, "blk.1.ffn_norm.weight": row[:16], "blk.0.attn_sinks.weight": row},
    )
    with pytest.raises(CheckpointError) as caught:
        import_gguf(read_gguf(path), tmp_path / "out")
    for problem in (
        "blk.0.attn_q.weight is missing",
        r"blk.1.ffn_norm.weight has shape [16], expected [32]",
        "blk.0.attn_sinks.weight is not a weight",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_positions_are_read_from_their_factors(factor: float, tmp_path: Path) -> None:
    """Llama 3.1 and 3.2 keep of their scaling only what it comes to."""
    scaling = RopeScaling(factor, 1.0, 4.0, 8192)
    vocab_size = len(byte_level_metadata("llama-bpe")["tokenizer.ggml.tokens"])
    model = make_model("llama", vocab_size, head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
    factors = []
    for pair in range(32):
        turns = 8192 / (2 * np.pi * 500000.0 ** (pair / 32))
        smooth = (turns - 1) / 3
        factors.append(1.0 if turns > 4 else factor if turns < 1 else 1 / ((1 - smooth) / factor + smooth))
    assert len(set(factors)) > 3
    path = tiny_gguf(
        tmp_path,
        model=model,
        changes={"llama.attention.key_length": 64},
        tensors={"rope_freqs.weight": np.array(factors, dtype=np.float32)},
    )
    assert imported(path).config == model.config


def test_factors_of_one_change_nothing_and_others_than_llama3s_are_refused(tmp_path: Path) -> None:
    factors = np.ones(4, dtype=np.float32)
    path = tiny_gguf(tmp_path, tensors={"rope_freqs.weight": factors})
    assert imported(path).config.rope_scaling is None
    for others in (factors * 8, factors / 2, factors * np.nan, factors * np.inf, np.full(5, 8, dtype=np.float32)):
        path = tiny_gguf(tmp_path, tensors={"rope_freqs.weight": others})
        with pytest.raises(ConfigError, match=r"model.gguf: rope_(freqs|scaling)"):
            import_gguf(read_gguf(path), tmp_path / "again")


def test_a_type_the_package_cannot_dequantize_is_refused(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, tensors={"output_norm.weight": np.ones(32, dtype=np.float64)})
    with pytest.raises(ConfigError, match="quantization F64 is not read"):
        import_gguf(read_gguf(path), tmp_path / "out")


def test_numbers_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, tensors={"output_norm.weight": np.full(32, 1e6, dtype=np.float32)})
    with pytest.raises(CheckpointError, match=r"output_norm\.weight .* float16 .* --dtype bfloat16"):
        import_gguf(read_gguf(path), tmp_path / "out", torch.float16)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tiny_gguf(tmp_path).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 4, 10, 24, 60, 400, 5_000, len(whole) // 2, len(whole) - 40_000, len(whole) - 64):
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            import_gguf(read_gguf(cut), tmp_path / "out")


def test_a_file_that_is_no_gguf_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        read_gguf(tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match="no such file"):
        read_gguf(tmp_path / "none.gguf")


def test_a_folder_with_something_in_it_is_kept(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="not an empty folder"):
        import_gguf(read_gguf(path), tmp_path / "out")
    assert [child.name for child in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"seedbed\[gguf\]"):
        read_gguf(tmp_path / "model.gguf")


def test_words_of_the_two_patterns_are_those_of_the_source() -> None:
    """Both are spelled out from one pattern; a change of it must not change what old files mean."""
    from seedbed.text.gguf_tokenizer import LLAMA3_WORDS

    assert LLAMA3_WORDS != WORDS
    assert LLAMA3_WORDS.count(r"\p{N}{1,3}") == 1
