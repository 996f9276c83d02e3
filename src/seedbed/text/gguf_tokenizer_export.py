"""A tokenizer as the metadata of a GGUF file.

Programs that read the file know how to cut text into words by name only (`tokenizer.ggml.pre`), so a tokenizer
that cuts in another way cannot be told to them, and is refused rather than written with other ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from seedbed.errors import ConfigError
from seedbed.text.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    OTHER_ENDS,
    PRE_TOKENIZERS,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS,
    merges_by_score,
)
from seedbed.text.tokenizer import Tokenizer

# Which of several names for the same words is written. Not "default": llama.cpp has other words by that name.
WRITTEN: Final = {PRE_TOKENIZERS[name]: name for name in ("gpt-2", "llama-bpe", "qwen2")}
DIGITS_APART: Final = "smollm"  # GPT-2's words, after every digit was cut off

_NORMALIZED: Final = (
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
)
_FLAGS: Final = ("single_word", "lstrip", "rstrip")


def tokenizer_to_gguf(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Values by key, arrays as lists; `tokenizer_from_gguf` makes a tokenizer of the same ids of them.

    Args:
        vocab_size: rows of the model's embedding; those beyond the tokens get tokens that no text has.

    Raises:
        ConfigError: a kind of tokenizer that GGUF files have no name for; all reasons are listed.
    """
    assert tokenizer.vocab_size <= vocab_size
    content = tokenizer.content
    model = content["model"]
    if model["type"] != "BPE":
        raise ConfigError(f"a tokenizer of type {model['type']}: GGUF files are written of byte-pair encodings only")
    if problems := _problems(content):
        raise ConfigError([f"tokenizer: {problem}; no name in a GGUF file stands for that" for problem in problems])
    tokens, types = _tokens(tokenizer, content, vocab_size)
    merges = [_pair(merge) for merge in model["merges"]]
    keys: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if model["byte_fallback"]:
        keys |= {"model": "llama", "pre": "default", "scores": _scores(tokens, types, merges)}
        keys |= {"add_space_prefix": _puts_space_before(content)}
    else:
        keys |= {"model": "gpt2", "pre": _pre_tokenizer(content, merges)}
        keys |= {"merges": [f"{left} {right}" for left, right in merges]}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (keys | _special(tokenizer, content)).items()}
    metadata |= dict(zip(OTHER_ENDS, sorted(tokenizer.stop_ids - {tokenizer.eos_id}), strict=False))
    if tokenizer.chat_template:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _problems(content: Mapping[str, Any]) -> list[str]:
    """What the names of a GGUF file cannot say, for both kinds of vocabulary."""
    model = content["model"]
    problems = [
        f"{key} {model[key]!r}"
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(key)
    ]
    problems += [
        f"token {token['content']!r} with {flag}"
        for token in content["added_tokens"]
        for flag in _FLAGS
        if token[flag] and not token["special"]  # text never becomes a special token
    ]
    return problems


def _tokens(tokenizer: Tokenizer, content: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id."""
    model = content["model"]
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], USER_DEFINED
    numbers = {token: number for number, token in enumerate(tokens)}
    if len(numbers) < len(tokens):
        raise ConfigError("tokenizer: several tokens have one text; a GGUF file has room for each text once")
    for token in tokenizer.special_tokens:
        if token in numbers:
            types[numbers[token]] = CONTROL
    if model["byte_fallback"]:
        for byte in range(256):
            if (token := f"<0x{byte:02X}>") not in numbers:
                raise ConfigError(f"tokenizer: byte_fallback without a token {token}; expected one for every byte")
            types[numbers[token]] = BYTE
        if model["unk_token"] in numbers:
            types[numbers[model["unk_token"]]] = UNKNOWN
    return tokens, types


def _special(tokenizer: Tokenizer, content: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of the tokens that have a name, and whether the first and the last are put around a text."""
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {token["content"]: token["id"] for token in content["added_tokens"]} | content["model"]["vocab"]
    named = tokenizer.special_tokens_map
    keys: dict[str, Any] = {f"{names[name]}_token_id": ids[token] for name, token in named.items() if token in ids}
    around = _template(content["post_processor"])
    for name, place in (("bos", 0), ("eos", -1)):
        said = tokenizer.setting(f"add_{name}_token")
        token = named.get(f"{name}_token")
        framed = bool(around) and token is not None and around[place] == token
        keys[f"add_{name}_token"] = token is not None and (said if isinstance(said, bool) else framed)
    return keys


def _template(post_processor: Mapping[str, Any] | None) -> list[str | None]:
    """What stands around a single text: special tokens, and None for the text; empty without such a template."""
    steps = [] if post_processor is None else post_processor.get("processors", [post_processor])
    single: list[dict[str, Any]] = next((step["single"] for step in steps if step["type"] == "TemplateProcessing"), [])
    return [part["SpecialToken"]["id"] if "SpecialToken" in part else None for part in single]


def _pre_tokenizer(content: Mapping[str, Any], merges: list[tuple[str, str]]) -> str:
    """The name of how text is cut into words.

    Raises:
        ConfigError: there is none.
    """
    name = _name_of_words(content["pre_tokenizer"])
    normalizer = content["normalizer"]
    if name is None or (normalizer is not None and normalizer["type"] != "NFC"):
        raise ConfigError(
            "tokenizer: its normalizer or pre-tokenizer is none of those that GGUF files have a name for; "
            f"supported are the words of {', '.join([*WRITTEN.values(), DIGITS_APART])}, on bytes"
        )
    model = content["model"]
    whole = bool(model.get("ignore_merges"))
    if whole != (name in WHOLE_WORDS) and (token := _token_that_merges_do_not_make(content, merges)):
        raise ConfigError(
            f"tokenizer: ignore_merges {whole} with the words of {name}: programs that read the file would "
            f"choose otherwise for {token!r}"
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if model["unk_token"] is not None and (missing := [byte for byte in alphabet if byte not in model["vocab"]]):
        raise ConfigError(
            f"tokenizer: unk_token {model['unk_token']!r} for {len(missing)} bytes without a token: programs that read "
            "the file would leave them out; expected a token for every byte"
        )
    return name


def _name_of_words(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    before, use_regex = steps[:-1], steps[-1]["use_regex"]
    if use_regex:
        digits = {"type": "Digits", "individual_digits": True}
        return {0: WRITTEN[None], 1: DIGITS_APART if before == [digits] else None}.get(len(before))
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    for words, name in WRITTEN.items():
        if before == [split | {"pattern": {"Regex": words}}]:
            return name
    return None


def _token_that_merges_do_not_make(content: Mapping[str, Any], merges: list[tuple[str, str]]) -> str | None:
    """A token that is a whole word of some text, and that its merges do not lead to."""
    model = models.BPE(vocab=content["model"]["vocab"], merges=merges)
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.ByteLevel()
    cut = tokenizers.Tokenizer.from_str(json.dumps(content)).pre_tokenizer
    for token, number in content["model"]["vocab"].items():
        if len(model.tokenize(token)) != 1:
            words = cut.pre_tokenize_str(backend.decode([number], skip_special_tokens=False))
            if [word for word, _ in words] == [token]:
                return str(token)
    return None


def _puts_space_before(content: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text.

    Raises:
        ConfigError: SentencePiece would not treat spaces so, or would make other choices.
    """
    normalizer, pre = content["normalizer"], content["pre_tokenizer"]
    if content["model"].get("ignore_merges"):
        raise ConfigError("tokenizer: ignore_merges with byte_fallback: no name in a GGUF file stands for that")
    if normalizer is None and pre is not None and pre["type"] == "Metaspace":
        if pre["replacement"] == SPACE and not pre.get("split", True):
            return bool(pre["prepend_scheme"] != "never")
    elif normalizer is not None and pre is None:
        steps = normalizer.get("normalizers", [normalizer])
        if steps in (list(_NORMALIZED), list(_NORMALIZED[1:])):
            return len(steps) == len(_NORMALIZED)
    raise ConfigError(
        "tokenizer: its normalizer or pre-tokenizer is not SentencePiece's; expected spaces written as "
        f"{SPACE!r}, and no cutting into words"
    )


def _scores(tokens: Sequence[str], types: Sequence[int], merges: list[tuple[str, str]]) -> list[float]:
    """The earlier a token's merges, the higher its score.

    Raises:
        ConfigError: no scores lead to these merges.
    """
    kinds = dict(zip(tokens, types, strict=True))
    apart = (UNKNOWN, CONTROL, BYTE)
    merges = [pair for pair in merges if all(kinds.get(t) not in apart for t in (*pair, "".join(pair)))]
    made = ["".join(pair) for pair in merges]
    ranks = _ranks(made)
    for token in tokens:
        if kinds[token] not in apart:
            ranks.setdefault(token, len(ranks))
    scores = [-float(ranks.get(token, 0)) for token in tokens]
    expected = merges_by_score(list(tokens), scores, list(types))
    if set(expected) != set(merges) or ["".join(pair) for pair in expected] != made:
        raise ConfigError(
            "tokenizer: its merges are not those of a SentencePiece vocabulary, and a GGUF file keeps only a score "
            "for each token; expected every way to make a token of two others, token by token"
        )
    return scores


def _ranks(made: Sequence[str]) -> dict[str, int]:
    """Each token's place among what the merges make; tokens by turns have one place, since their scores are equal.

    >>> _ranks(["er", "in", "in", "aaa", "aa", "aaa", "the"])
    {'er': 0, 'in': 1, 'aaa': 2, 'aa': 2, 'the': 3}
    """
    last = {token: place for place, token in enumerate(made)}
    ranks: dict[str, int] = {}
    rank = end = -1
    for place, token in enumerate(made):
        if place > end:
            rank += 1
        end = max(end, last[token])
        ranks[token] = rank
    return ranks


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge as tokenizer.json has it, in one string or two."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
