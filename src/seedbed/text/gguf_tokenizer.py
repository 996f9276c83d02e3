"""The tokenizer inside a GGUF file, as the `tokenizer.json` that transformers makes of the same file.

GGUF keeps tokens, their types and merges or scores; how text is cut into words before merging it only names
(`tokenizer.ggml.pre`). Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from seedbed.errors import CheckpointError, ConfigError, SeedbedError
from seedbed.text.tokenizer import WORDS, Tokenizer

# Values of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"  # how SentencePiece writes a space

# Llama 3's words: those of Qwen2, but digits in groups of up to three.
LLAMA3_WORDS: Final = WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

# What `tokenizer.ggml.pre` names; None is GPT-2's own pattern, which the library has built in.
# For smollm, transformers takes GPT-2's, and so do we. llama.cpp and the model's authors cut every digit off
# first, which differs only where several spaces stand before a digit.
PRE_TOKENIZERS: Final[Mapping[str, str | None]] = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": LLAMA3_WORDS,
    "llama3": LLAMA3_WORDS,
    "llama-v3": LLAMA3_WORDS,
    "qwen2": WORDS,
    "deepseek-r1-qwen": WORDS,
}

# Names with which a word that is a token stays whole, whatever the merges say.
WHOLE_WORDS: Final = ("llama-bpe", "llama3", "llama-v3")

# Tokens that end a text beside eos: of a turn, of a message.
OTHER_ENDS: Final = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer described by the metadata of a GGUF file, with its chat template.

    Args:
        metadata: values by key, arrays as lists.
        source: name of the file, for messages.

    Raises:
        CheckpointError: keys are missing, or contradict each other.
        ConfigError: a kind of tokenizer that is not read.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ConfigError(f"{source}: tokenizer.ggml.model {kind!r}: supported are 'gpt2' and 'llama'")
    needed = ["tokens", "eos_token_id"]
    if "tokenizer.ggml.merges" not in metadata:
        needed.append("merges" if kind == "gpt2" else "scores")
    if missing := [key for key in needed if f"tokenizer.ggml.{key}" not in metadata]:
        raise CheckpointError(
            "\n".join(f"{source}: tokenizer.ggml.{key} is missing; take another GGUF of this model" for key in missing)
        )
    try:
        backend, special = _build(metadata, kind, source)
    except SeedbedError:
        raise
    except Exception as error:  # noqa: BLE001  the library raises bare Exception for a vocabulary it cannot take
        raise CheckpointError(f"{source}: its tokenizer is damaged ({error}); download it again") from None
    files = {"tokenizer_config.json": _settings(metadata, special)}
    if template := metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
    ends = (metadata.get(key) for key in OTHER_ENDS)
    stop_ids = [end for end in ends if isinstance(end, int) and 0 <= end < len(metadata["tokenizer.ggml.tokens"])]
    return Tokenizer(backend, special["eos_token"], special.get("bos_token"), files, stop_ids)


def _build(metadata: Mapping[str, Any], kind: str, source: str) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer, and its special tokens by the names of transformers."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"{source}: {len(tokens)} tokens and {len(types)} token types; download it again")
    special = _special_tokens(metadata, tokens, source)
    backend = _byte_level(metadata, source) if kind == "gpt2" else _sentencepiece(metadata, types)
    _add_tokens(backend, tokens, types, set(special.values()))
    _frame(backend, metadata, special)
    return backend, special


def _special_tokens(metadata: Mapping[str, Any], tokens: list[str], source: str) -> dict[str, str]:
    """Texts of the special tokens that the file gives an id for."""
    special = {}
    for name in ("bos", "eos", "unknown", "padding"):
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is None:
            continue
        if not 0 <= number < len(tokens):
            raise CheckpointError(
                f"{source}: tokenizer.ggml.{name}_token_id {number} is none of its {len(tokens)} tokens; "
                "download it again"
            )
        key = {"unknown": "unk", "padding": "pad"}.get(name, name)
        special[f"{key}_token"] = tokens[number]
    return special


def _byte_level(metadata: Mapping[str, Any], source: str) -> tokenizers.Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise ConfigError(f"{source}: tokenizer.ggml.pre {name!r}: supported are {', '.join(PRE_TOKENIZERS)}")
    vocab = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=_stored_merges(metadata), ignore_merges=name in WHOLE_WORDS)
    )
    words = PRE_TOKENIZERS[name]
    if words is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], types: list[int]) -> tokenizers.Tokenizer:
    """BPE on characters, each that is no token cut into bytes (Kudo and Richardson, 2018; Touvron et al., 2023)."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    vocab = {token: number for number, token in enumerate(tokens)}
    stored = "tokenizer.ggml.merges" in metadata
    merges = _stored_merges(metadata) if stored else merges_by_score(tokens, metadata["tokenizer.ggml.scores"], types)
    unknown = tokens[types.index(UNKNOWN)] if UNKNOWN in types else None
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE, prepend_scheme="first" if prefix else "never", split=False
    )
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if prefix else steps)
    return backend


def _stored_merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.partition(" ") for merge in metadata["tokenizer.ggml.merges"])
    return [(left, right) for left, _, right in pairs]


def merges_by_score(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the best token first.

    SentencePiece merges whichever neighbours make the token of the highest score. Control tokens and bytes
    are never made of text.
    """
    plain = {
        token: score
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind not in (UNKNOWN, CONTROL, BYTE)
    }
    pairs = [
        (score, token[:place], token[place:])
        for token, score in plain.items()
        for place in range(1, len(token))
        if token[:place] in plain and token[place:] in plain
    ]
    pairs.sort(key=lambda pair: (-pair[0], -len(pair[1]), -len(pair[2])))
    return [(left, right) for _, left, right in pairs]


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int], special: set[str]) -> None:
    """Tokens that stay whole in a text: control tokens, those with a name (bos, unk), and those somebody added."""
    control, added = [], []
    for token, kind in zip(tokens, types, strict=True):
        if kind in (UNKNOWN, CONTROL) or token in special:
            control.append(AddedToken(token, normalized=False))
        elif kind == USER_DEFINED:
            added.append(AddedToken(token, normalized=False))
    backend.add_special_tokens(control)
    backend.add_tokens(added)


def _frame(backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Put the first and last token around a text, for programs that ask for it."""
    bos, eos = (
        special[f"{name}_token"] if _is_added(metadata, name) and f"{name}_token" in special else None
        for name in ("bos", "eos")
    )
    ends = [token for token in (bos, eos) if token is not None]
    if ends:
        backend.post_processor = processors.TemplateProcessing(
            single=[part for part in (bos, "$A", eos) if part is not None],
            special_tokens=[(token, backend.token_to_id(token)) for token in ends],
        )


def _is_added(metadata: Mapping[str, Any], name: str) -> bool:
    default = name == "bos" and (
        metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
    )
    return bool(metadata.get(f"tokenizer.ggml.add_{name}_token", default))


def _settings(metadata: Mapping[str, Any], special: Mapping[str, str]) -> str:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _is_added(metadata, "bos"),
        "add_eos_token": _is_added(metadata, "eos"),
        # Named even where there is none: transformers has tokens of its own for some families.
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token")),
        **special,
    }
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
