"""Tokenizers: train one, load any `tokenizer.json`, save it so that transformers reads the same ids.

The work is done by the `tokenizers` library (byte-pair encoding: Sennrich et al., 2016, on bytes as in
GPT-2, Radford et al., 2019). What is here is the policy: text never turns into a special token, no special
token is added by itself, and any UTF-8 text decodes to itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from seedbed.errors import CheckpointError, ConfigError, DataError
from seedbed.parsing import parse_json, require_plain_files
from seedbed.text.hub import HUB_ID, download

END_OF_TEXT = "<|endoftext|>"

HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
PANIC = "PanicException"  # of the library in Rust; not an Exception, and nowhere to be imported from

# Names of the end of a text, tried in this order when a folder does not say which one it uses.
COMMON_EOS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>")

# How Qwen2 cuts text into words before merging. Chosen over GPT-2's pattern because transformers insists on
# it for `model_type: qwen2`, whatever tokenizer.json says; every other family reads what the file says. So
# one tokenizer gives the same ids beside a config.json of any family.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word, with the space or sign before it
    r"|\p{N}"  # single digits
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation, with the line ends after it
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # white space
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)

# Code points that Unicode reserves for the inside of a program.
BOUNDARY = "\ufdd0\ufdd1\ufdd0"

# The library makes an object per token while it encodes, so a call is given a few megabytes at most.
BATCH_CHARS = 2**21


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of `vocab_size` tokens (fewer when the text has no more pairs to merge).

    Token 0 is `<|endoftext|>`, then the 256 bytes, then the merges. The texts are read once, as a stream;
    memory grows with the number of distinct words. The same texts give the same tokenizer.

    Raises ConfigError for a vocabulary too small for the bytes, DataError when there is no text.
    """
    smallest = 257
    if vocab_size < smallest:
        raise ConfigError(
            f"a byte-level vocabulary of {vocab_size} tokens is too small: it needs at least {smallest} "
            "(256 bytes and the end of text). Give a larger one, or train characters (--type char)."
        )
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_require_text(texts), trainer)
    return Tokenizer(backend, END_OF_TEXT)


def train_char(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer with one token for each character of the texts; any other character becomes its bytes.

    Token 0 is `<|endoftext|>`, then the 256 bytes (ASCII characters are one byte), then the other
    characters, sorted. It is a byte-level BPE whose only merges put together the bytes of one character, so
    every tool that reads GPT-2's tokenizer reads this one. (A character of three or four bytes is merged in
    steps: its first bytes are a token as well.)

    Raises DataError when there is no text.
    """
    characters: set[str] = set()
    for text in _require_text(texts):
        characters.update(text)
    symbol = _symbol_of_byte()
    vocab = {END_OF_TEXT: 0}
    for byte in range(256):
        vocab[symbol[byte]] = len(vocab)
    merges: list[tuple[str, str]] = []
    for character in sorted(characters):
        symbols = [symbol[byte] for byte in character.encode()]
        for length in range(2, len(symbols) + 1):
            token = "".join(symbols[:length])
            if token not in vocab:
                vocab[token] = len(vocab)
                merges.append(("".join(symbols[: length - 1]), symbols[length - 1]))
    backend = _byte_level(models.BPE(vocab=vocab, merges=merges))
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend, END_OF_TEXT)


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes of the texts over their number of tokens: how much text one token stands for."""
    num_bytes = num_tokens = 0
    for batch in batches_of_text(texts):
        num_bytes += sum(len(text.encode()) for text in batch)
        num_tokens += sum(len(ids) for ids in tokenizer.encode_batch(batch))
    if num_tokens == 0:
        raise DataError("there is no text to measure bytes per token on; give a text that is not empty")
    return num_bytes / num_tokens


def batches_of_text(texts: Iterable[str], max_chars: int = BATCH_CHARS) -> Iterator[list[str]]:
    """The texts in lists of about `max_chars` characters (a longer text is a list of its own)."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > max_chars:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


@final
class Tokenizer:
    """Text to token ids and back. Make one with `train_bpe`, `train_char` or `Tokenizer.load`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_token: str,
        bos_token: str | None = None,
        files: dict[str, str] | None = None,
        stop_ids: Iterable[int] = (),
    ) -> None:
        # Whatever the file says about limits and padding belongs to some other program's batches.
        backend.no_truncation()
        backend.no_padding()
        # "<|endoftext|>" in somebody's text is thirteen characters of text and must not end a document.
        backend.encode_special_tokens = True
        eos_id = backend.token_to_id(eos_token)
        assert eos_id is not None, eos_token
        self._backend = backend
        self._files = files or {}  # settings of a tokenizer that was loaded, saved again as they were
        self.eos_token = eos_token
        self.bos_token = bos_token
        self.eos_id: int = eos_id
        self.bos_id: int | None = None if bos_token is None else backend.token_to_id(bos_token)
        self.stop_ids: frozenset[int] = frozenset([eos_id, *stop_ids])
        """Every token at which the model ends what it writes: eos, and those of generation_config.json."""

    @property
    def end_ids(self) -> int | list[int]:
        """`stop_ids` as a config.json has them: a number, or a list of several."""
        return self.eos_id if len(self.stop_ids) == 1 else sorted(self.stop_ids)

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, those added to the vocabulary included; every id is below it."""
        vocab = self._backend.get_vocab(with_added_tokens=True)
        return max(len(vocab), max(vocab.values()) + 1)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical tokenizer.json, in hexadecimal."""
        return hashlib.sha256(self._backend.to_str(pretty=False).encode()).hexdigest()

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """The texts of all special tokens."""
        added = self._backend.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special) | set(self.special_tokens_map.values())

    @cached_property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens that have a name: eos_token and, where the tokenizer has them, bos, unk and pad."""
        found = {"eos_token": self.eos_token}
        if self.bos_token is not None:
            found["bos_token"] = self.bos_token
        for name in ("unk_token", "pad_token"):
            token = _token_text(self._saved("tokenizer_config.json").get(name)) or _token_text(
                self._saved("special_tokens_map.json").get(name)
            )
            if token is not None and self._backend.token_to_id(token) is not None:
                found[name] = token
        return found

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja source of the tokenizer's own chat template; of several named ones, `default`."""
        if "chat_template.jinja" in self._files:
            return self._files["chat_template.jinja"]
        template = self._saved("tokenizer_config.json").get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def with_tokens(self, tokens: Sequence[str], eos_token: str | None = None, *, special: bool = True) -> Tokenizer:
        """The same tokenizer with these tokens as well; new ids follow the last, known tokens keep theirs.

        eos_token: which token ends a text from now on; it must be known or among `tokens`.
        special: only a template writes them; otherwise they are found in every text.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        added = [AddedToken(token, normalized=False, special=special) for token in tokens]
        backend.add_special_tokens(added) if special else backend.add_tokens(added)
        eos_token = eos_token or self.eos_token
        files = dict(self._files)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if name in files:
                settings = self._saved(name) | {"eos_token": eos_token}
                if "added_tokens_decoder" in settings:
                    settings["added_tokens_decoder"] |= _added_tokens(backend, tokens, special)
                files[name] = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        return Tokenizer(backend, eos_token, self.bos_token, files, self.stop_ids)

    def with_stop(self, token_id: int) -> Tokenizer:
        """The same tokenizer, for a model that also ends what it writes with this token."""
        return Tokenizer(self._backend, self.eos_token, self.bos_token, self._files, {*self.stop_ids, token_id})

    def with_chat_template(self, source: str) -> Tokenizer:
        """The same tokenizer, which is saved with this chat template in place of its own."""
        files = dict(self._files)
        settings = self._saved("tokenizer_config.json")
        if settings.pop("chat_template", None) is not None:
            files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        files["chat_template.jinja"] = source
        return Tokenizer(self._backend, self.eos_token, self.bos_token, files, self.stop_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, and only of the text: nothing is added at either end.

        Raises:
            CheckpointError: the tokenizer was loaded from a damaged file, which shows only now.
            DataError: the text holds what is no character.
        """
        return list(_encode(self._backend, text).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, computed on all cores. Raises as `encode` does."""
        with _damage_is_told():
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_special_tokens(
        self, text: str, literal: Sequence[int] = ()
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text whose special tokens count as such, and the characters (from, to) of each token.

        literal: places in the text; a special token's name across one of them is text like any other.
        Raises as `encode` does.
        """
        if not literal:
            encoding = _encode(self._recognising, text)
            return encoding.ids, encoding.offsets
        characters = list(text)
        for place in literal:
            characters[place - 1] = "\ufffd"  # only so that the special tokens that do count are found
        masked = "".join(characters)
        encoding = _encode(self._recognising, masked)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        section: list[tuple[int, tuple[int, int]]] = []  # tokens since the last special one
        start = 0
        for token, (begin, end) in [*zip(encoding.ids, encoding.offsets, strict=True), (-1, (len(text), len(text)))]:
            is_special = masked[begin:end].strip() in self.special_tokens
            if not is_special and token >= 0:
                section.append((token, (begin, end)))
                continue
            if cuts := [place for place in literal if start < place <= begin]:
                section = self._encode_literally(text, start, begin)
                if any(text[first:last].strip() in self.special_tokens for _, (first, last) in section):
                    # The vocabulary can spell the name as that very token, unless it is cut.
                    pieces = pairwise([start, *cuts, begin])
                    section = [token for piece in pieces for token in self._encode_literally(text, *piece)]
            if is_special:
                section.append((token, (begin, end)))
            ids += [token for token, _ in section]
            offsets += [span for _, span in section]
            section, start = [], end
        return ids, offsets

    def _encode_literally(self, text: str, start: int, end: int) -> list[tuple[int, tuple[int, int]]]:
        """Tokens of a part of the text without special ones, as they are where they stand."""
        # Some tokenizers add a space where a text begins; a token before the part shows that it does not begin here.
        before = BOUNDARY if start else ""
        encoding = _encode(self._literal, before + text[start:end])
        first, shift = (1 if start else 0), start - len(before)
        moved = [(begin + shift, end + shift) for begin, end in encoding.offsets[first:]]
        return list(zip(encoding.ids[first:], moved, strict=True))

    @cached_property
    def _recognising(self) -> tokenizers.Tokenizer:
        """A copy that finds special tokens in a text."""
        backend = self._copy()
        backend.encode_special_tokens = False
        return backend

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """A copy that finds none, but one more token, `BOUNDARY`."""
        backend = self._copy()
        backend.encode_special_tokens = True
        backend.add_tokens([AddedToken(BOUNDARY, normalized=False)])
        return backend

    def _copy(self) -> tokenizers.Tokenizer:
        """A copy whose offsets are those of the text, and which has all special tokens that the settings name."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.post_processor = None  # GPT-2's takes white space out of the offsets
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        missing = sorted(set(self.special_tokens_map.values()) - known)
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in missing])
        return backend

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD. Raises as `encode` does."""
        with _damage_is_told():
            text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and its settings into `folder`, as AutoTokenizer reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Written by Python: the library's own save raises a bare Exception when the disk is full.
        backend = {"tokenizer.json": self._backend.to_str(pretty=True)}
        for name, content in (backend | {"tokenizer_config.json": self._settings()} | self._files).items():
            (folder / name).write_text(content, encoding="utf-8")
        generation = folder / "generation_config.json"
        if len(self.stop_ids) > 1 and not generation.exists():  # a model folder has its own
            generation.write_text(json.dumps({"eos_token_id": self.end_ids}) + "\n", encoding="utf-8")

    @property
    def content(self) -> dict[str, Any]:
        """What its tokenizer.json says."""
        content: dict[str, Any] = parse_json(self._backend.to_str())
        return content

    def setting(self, name: str) -> Any:
        """What the tokenizer_config.json that it was loaded with says of `name`; None where it is silent."""
        return self._saved("tokenizer_config.json").get(name)

    def _saved(self, name: str) -> dict[str, Any]:
        """One of the settings files that the tokenizer was loaded with; empty when there was none."""
        content: dict[str, Any] = parse_json(self._files.get(name, "{}"))
        return content

    def _settings(self) -> str:
        settings: dict[str, Any] = {
            # The class that reads tokenizer.json as it is; transformers 4 and 5 both know this name.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
        }
        if self.bos_token is not None:
            settings["bos_token"] = self.bos_token
        return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def load(folder_or_hub_id: str | Path) -> Tokenizer:
        """The tokenizer of a folder (tokenizer.json, or GPT-2's vocab.json and merges.txt) or of a hub id.

        Raises ConfigError for a name that is neither, MissingExtra for a hub id without the extra `hub`,
        CheckpointError for a folder whose tokenizer is missing, damaged or has no end of text.
        """
        folder = Path(folder_or_hub_id)
        if not folder.is_dir():
            name = str(folder_or_hub_id)
            if not HUB_ID.fullmatch(name):
                what = "is a file, not a folder" if Path(name).is_file() else "does not exist"
                raise ConfigError(
                    f"tokenizer {name} {what}; give a folder with a tokenizer.json, or a hub id (owner/name)"
                )
            folder = download(name, TOKENIZER_FILES, "tokenizer")
        require_plain_files(folder)
        settings = {name: _read_json(folder / name) for name in TOKENIZER_FILES[1:5]}
        backend = _read_backend(folder, settings["tokenizer_config.json"])
        eos_token = _find_eos(backend, settings)
        if eos_token is None:
            raise CheckpointError(
                f"the tokenizer in {folder} does not say which token ends a text, and has none of "
                f'{", ".join(COMMON_EOS)}; add "eos_token" to its tokenizer_config.json'
            )
        bos_token = _token_text(settings["tokenizer_config.json"].get("bos_token")) or _token_text(
            settings["special_tokens_map.json"].get("bos_token")
        )
        if bos_token is not None and backend.token_to_id(bos_token) is None:
            bos_token = None
        stop_ids = [i for i in _eos_ids(settings["generation_config.json"]) if backend.id_to_token(i) is not None]
        files = _files_to_keep(folder)
        own = settings["tokenizer_config.json"]
        if "tokenizer_config.json" in files and _token_text(own.get("eos_token")) is None:
            # The folder says it elsewhere, in files of the model that may not be there next time.
            files["tokenizer_config.json"] = (
                json.dumps(own | {"eos_token": eos_token}, indent=2, ensure_ascii=False) + "\n"
            )
        return Tokenizer(backend, eos_token, bos_token, files, stop_ids)


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _symbol_of_byte() -> list[str]:
    """The printable character by which GPT-2's vocabulary writes each of the 256 bytes.

    Bytes that print in Latin-1 stand for themselves; the others follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols |= {byte: chr(0x100 + place) for place, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


def _require_text(texts: Iterable[str]) -> Iterator[str]:
    found = False
    for text in texts:
        found = found or bool(text)
        yield text
    if not found:
        raise DataError("there is no text to train a tokenizer on; give --data a text that is not empty")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = parse_json(text)
        if HALF_CHARACTER.search(text):
            json.dumps(content, ensure_ascii=False).encode()  # fails where the other half is missing
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); copy it again from its origin") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold one JSON object; copy it again from its origin")
    return content


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == PANIC


@contextmanager
def _damage_is_told() -> Iterator[None]:
    """The library raises bare Exception for a tokenizer that it cannot use, or panics."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and not _is_panic(error):
            raise
        raise CheckpointError(f"the tokenizer is damaged ({error}); copy it again from its origin") from None


def _encode(backend: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    with _damage_is_told():
        try:
            return backend.encode(text, add_special_tokens=False)
        except TypeError:  # what the library says of a string that UTF-8 cannot write
            raise DataError("the text holds half a surrogate pair, which is no character; take it out") from None


def _require_whole_merges(content: dict[str, Any]) -> None:
    """Refuse merges that lack the prefix of their second part: the library would end the process.

    Raises:
        ValueError: there are such merges.
    """
    model = content.get("model")
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(prefix, str) or not prefix:
        return
    merges = model.get("merges")
    for merge in merges if isinstance(merges, list) else ():
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(parts, list) and parts and str(parts[-1]).startswith(prefix)):
            raise ValueError(f"merge {merge!r} lacks the continuing_subword_prefix {prefix!r}")


def _read_backend(folder: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            _require_whole_merges(_read_json(whole))
            return tokenizers.Tokenizer.from_file(str(whole))
        if not (vocab.is_file() and merges.is_file()):
            raise CheckpointError(
                f"there is no tokenizer in {folder}: expected tokenizer.json, or vocab.json and merges.txt"
            )
        name = str(settings.get("tokenizer_class", "GPT2Tokenizer"))
        if name.removesuffix("Fast") not in ("GPT2Tokenizer", "PreTrainedTokenizer"):
            raise CheckpointError(
                f"{folder} holds only the vocab.json and merges.txt of a {name}, and only GPT-2's can be "
                "read that way; save it from transformers with AutoTokenizer, which writes tokenizer.json"
            )
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except CheckpointError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise CheckpointError(
            f"the tokenizer in {folder} is damaged ({error}); copy it again from its origin"
        ) from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    return backend


def _find_eos(backend: tokenizers.Tokenizer, settings: dict[str, dict[str, Any]]) -> str | None:
    """The end-of-text token: as the folder's settings name it, or one of the common names."""
    candidates: list[str | None] = [
        _token_text(settings[name].get("eos_token")) for name in ("tokenizer_config.json", "special_tokens_map.json")
    ]
    for name in ("generation_config.json", "config.json"):
        candidates += [backend.id_to_token(i) for i in _eos_ids(settings[name])[:1]]
    candidates += COMMON_EOS
    known = (token for token in candidates if token and backend.token_to_id(token) is not None)
    return next(known, None)


def _eos_ids(settings: dict[str, Any]) -> list[int]:
    """`eos_token_id` of a model's settings: one id, a list of them, or nothing."""
    ids = settings.get("eos_token_id")
    return [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int) and 0 <= i < 2**31]


def _added_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], special: bool) -> dict[str, dict[str, Any]]:
    """These tokens as `added_tokens_decoder` of tokenizer_config.json lists them."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": special}
    return {str(backend.token_to_id(token)): {"content": token, **flags} for token in tokens}


def _token_text(token: object) -> str | None:
    """A token as transformers writes it: a string, or an object with its content and its flags."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _files_to_keep(folder: Path) -> dict[str, str]:
    """What stands beside tokenizer.json and must be saved with it: settings and the chat template."""
    names = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    try:
        return {name: (folder / name).read_text(encoding="utf-8") for name in names if (folder / name).is_file()}
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"a file beside the tokenizer in {folder} cannot be read ({error}); copy it again from its origin"
        ) from None
