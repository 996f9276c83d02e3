"""Chat templates: from a conversation to its text, its token ids, and which of them are learnt.

A template is Jinja source as model folders keep it (chat_template.jinja). It renders as in transformers, in a
sandbox: it can neither reach Python's insides nor change what it is given.

Which tokens are the answers' is found for any template. One that says it, between `{% generation %}` and
`{% endgeneration %}`, is believed. Otherwise the conversation is rendered once more with characters that no text
has around each answer; where they come out, the answers are. Where a template does more with an answer than print
it, the renders of the conversation up to the answer and with the answer are compared.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, final

import jinja2
import jinja2.nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro

from seedbed.disk import expanded
from seedbed.errors import ConfigError, DataError, did_you_mean
from seedbed.text.sandbox import Sandbox
from seedbed.text.tokenizer import Tokenizer

Message = dict[str, Any]
"""`role` and `content`, both text, what else the template may know, and for an answer not to be learnt `weight` 0.

The first one of a conversation may have `tools`, a list of objects, which the template gets beside the messages.
"""

Span = tuple[int, int]
"""From a character (or token) to the one after the last."""

BUILT_IN = ("alpaca", "qa", "chatml", "plain")
OF_FORMAT = {"alpaca": "alpaca", "qa": "qa", "chat": "alpaca", "completion": "plain"}

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

# Parts of an answer beside its content; where a message has one, its content alone is not the answer.
ANSWER_PARTS = ("tool_calls", "reasoning_content")

PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))

WIDEST_INDENT = 16  # of JSON
LONGEST_SOURCE = 2**20  # characters; the longest that models come with have some 20,000

# The variable by which a render asks for marks around `{% generation %}` blocks.
GENERATION_MARKS = "_generation_marks"


@final
@dataclass(frozen=True)
class Example:
    """A conversation as tokens; both lists have one entry a token."""

    token_ids: list[int]
    trained: list[bool]
    """Whether the token is a target of the loss."""

    ends: bool
    """Whether every answer ends with a special token that is a target; a model without one never stops by itself."""

    answers: list[str]
    """What the assistant says: contents, and where a message has more to it all that the template writes of it."""


def find_template(tokenizer: Tokenizer, choice: str | None, format: str, *, taught: bool = False) -> Template:
    """The template to read conversations of a format with.

    choice: `alpaca`, `qa`, `chatml`, `plain`, or the path of a .jinja file. None takes the tokenizer's own, and if
        it has none the one of the format; prompts with completions are joined by `plain`, whatever the tokenizer has,
        unless the model was `taught` with that.

    Raises ConfigError for a template that does not exist or is not Jinja.
    """
    assert format in OF_FORMAT, format
    if choice is None and (taught or format != "completion") and tokenizer.chat_template is not None:
        return Template(tokenizer, "tokenizer", tokenizer.chat_template)
    name = choice or OF_FORMAT[format]
    if name in BUILT_IN:
        packed = resources.files("seedbed.text").joinpath("templates", f"{name}.jinja")
        return Template(tokenizer, name, packed.read_text(encoding="utf-8"))
    path = Path(expanded(name))
    try:
        return Template(tokenizer, name, path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--chat_template {name} cannot be read ({error.strerror}){did_you_mean(name, BUILT_IN)}; "
            f"expected {', '.join(BUILT_IN)}, or the path of a .jinja file"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"--chat_template {name} is not text in UTF-8; expected a file with Jinja source") from None


@final
class Template:
    """A chat template with the tokenizer whose tokens it writes. Made by `find_template`."""

    def __init__(self, tokenizer: Tokenizer, name: str, source: str) -> None:
        self.name = name
        self.source = source
        self._tokenizer = tokenizer
        self._sandbox = _sandbox()
        self._jinja = _compiled(self._sandbox, name, source)
        self._has_generation = re.search(r"{%[-+]?\s*generation\b", source) is not None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the source and of the tokens it writes by name, in hexadecimal."""
        facts = ["template 3", self.source, self._tokenizer.special_tokens_map]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def new_tokens(self) -> tuple[str, ...]:
        """Special tokens that the template needs and the tokenizer lacks; add them with `Tokenizer.with_tokens`."""
        needed = CHATML_TOKENS if self.name == "chatml" else ()
        return tuple(token for token in needed if token not in self._tokenizer.special_tokens)

    @cached_property
    def end_id(self) -> int | None:
        """The special token that ends an answer, where one does: there a model that learns it has to stop."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            example = self.example(turns)
        except DataError:  # it wants more of a conversation
            return None
        learnt = [token for token, trained in zip(example.token_ids, example.trained, strict=True) if trained]
        return learnt[-1] if learnt and example.ends else None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as text, with `add_generation_prompt` up to where the next answer begins.

        Raises:
            DataError: the template refuses the conversation, or fails on it.
            ConfigError: the template does what the sandbox forbids.
        """
        return self._render(messages, add_generation_prompt)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation up to where the next answer begins. Raises as `render`."""
        text = self._render(messages, True)
        ids, _ = self._tokenizer.encode_with_special_tokens(text, self._literal_places(messages, text, True))
        return ids

    def example(self, messages: Sequence[Message], train_on_prompt: bool = False) -> Example:
        """The conversation's tokens, and which are learnt: those of the answers and the token that ends each.

        A token that is part of an answer and part of what stands around it is learnt; an answer whose message has the
        `weight` 0 is not. With `train_on_prompt` all tokens are. An answer with nothing after it is ended with the
        tokenizer's end of text.

        Raises:
            DataError: the template fails on the conversation, or it cannot be told which text is the answers'.
            ConfigError: the template does what the sandbox forbids.
        """
        text = self._render(messages)
        try:
            answers = self._answers(messages, text)
        except DataError:
            if not train_on_prompt:
                raise
            answers = []
        ids, offsets = self._tokenizer.encode_with_special_tokens(text, self._literal_places(messages, text, False))
        special = [text[begin:end].strip() in self._tokenizer.special_tokens for begin, end in offsets]
        spans, ends, open_end = _with_ends(text, answers, offsets, special)
        counts = [bool(message.get("weight", 1)) for message in _answering(messages)]
        if not all(counts) and not train_on_prompt:
            if len(counts) != len(spans):
                self._refuse_to_guess(messages)
            spans = [span for span, count in zip(spans, counts, strict=True) if count]
        trained = [True] * len(ids) if train_on_prompt else _overlapping(spans, offsets, special)
        if open_end:
            ids, trained = [*ids, self._tokenizer.eos_id], [*trained, train_on_prompt or counts[-1]]
        said = [answer for answer, count in zip(self._said(messages, text, answers), counts, strict=True) if count]
        return Example(ids, trained, ends, said)

    def _said(self, messages: Sequence[Message], text: str, answers: Sequence[Span]) -> list[str]:
        said = [message["content"] for message in _answering(messages)]
        for place, (message, (begin, end)) in enumerate(zip(_answering(messages), answers, strict=False)):
            if _has_more(message):
                said[place] = self._end.sub("", text[begin:end].strip())
                if not said[place]:
                    raise DataError(
                        f"chat template {self.name} prints nothing of an answer's {' or '.join(ANSWER_PARTS)} in "
                        f"{_describe(messages)}; choose a --chat_template that does, or leave such rows out"
                    )
        return said

    @cached_property
    def _end(self) -> re.Pattern[str]:
        """A special token's name at the end of a text."""
        return re.compile(f"(?:{'|'.join(map(re.escape, self._tokenizer.special_tokens))})$")

    def _render(self, messages: Sequence[Message], prompt: bool = False, generation: tuple[str, str] = ("", "")) -> str:
        tools = messages[0].get("tools") if messages else None
        if tools and not re.search(r"\btools\b", self.source):
            raise DataError(
                f"chat template {self.name} prints no tools, and a row offers some: {_describe(messages)}; choose a "
                "--chat_template that does, or take the column 'tools' out"
            )
        variables = {
            "messages": [
                {key: value for key, value in message.items() if value is not None and key != "tools"}
                for message in messages
            ],
            "add_generation_prompt": prompt,
            "tools": tools,
            "documents": None,
            GENERATION_MARKS: generation,
        }
        try:
            return self._sandbox.write(self._jinja, variables | self._tokenizer.special_tokens_map)
        except jinja2.exceptions.SecurityError as error:
            raise ConfigError(
                f"chat template {self.name} does what a template may not: {error}. Do not trust it; choose another "
                "with --chat_template"
            ) from None
        except Exception as error:  # noqa: BLE001  a template is a program, and can fail in every way programs do
            raise DataError(
                f"chat template {self.name} fails on {_describe(messages)}: {error or type(error).__name__}. "
                "Correct that conversation, or choose another template with --chat_template"
            ) from None

    def _literal_places(self, messages: Sequence[Message], text: str, prompt: bool) -> list[int]:
        """Places within names of special tokens that come from what somebody said, not from the template."""
        [mark] = _unused_characters(text, 1)
        marked = [
            {
                key: self._names.sub(rf"\1{mark}", value) if isinstance(value, str) and key != "role" else value
                for key, value in message.items()
            }
            for message in messages
        ]
        if marked == list(messages):
            return []
        places = self._places(marked, text, [mark], prompt)
        # A template may look for such a name in a message itself, as for the end of a thought. Then it means it.
        return places[0] if places else []

    def _places(
        self,
        messages: Sequence[Message],
        text: str,
        marks: Sequence[str],
        prompt: bool = False,
        generation: tuple[str, str] = ("", ""),
    ) -> list[list[int]] | None:
        """Where each mark comes out when the conversation is rendered with them.

        None if they change how it is rendered: without the marks, the render must be `text`.
        """
        try:
            marked = self._render(messages, prompt, generation)
        except DataError:
            return None
        plain, places = _take_out(marked, marks)
        return places if plain == text else None

    @cached_property
    def _names(self) -> re.Pattern[str]:
        """The first character of every special token's name in a text, of overlapping ones, too."""
        return re.compile(f"(?=(?:{'|'.join(map(re.escape, self._tokenizer.special_tokens))}))(.)", re.DOTALL)

    def _answers(self, messages: Sequence[Message], text: str) -> list[Span]:
        """Where in the rendered text the answers are, in order."""
        first, last = _unused_characters(text, 2)
        if self._has_generation:
            places = self._places(messages, text, (first, last), generation=(first, last))
            if places and len(places[0]) == len(places[1]) > 0:
                self._require_printed(messages, text, first)
                return list(zip(*places, strict=True))
        if not any(map(_has_more, _answering(messages))):
            # A template that strips contents prints the marks, too, only if the white space is outside of them.
            for strip in (False, True):
                found = self._marked_answers(messages, text, first, last, strip)
                if found is not None:
                    return found
        return self._answers_by_turns(messages, text, last)

    def _require_printed(self, messages: Sequence[Message], text: str, mark: str) -> None:
        """Raise DataError for a template that writes the same whatever the answers are."""
        if any(map(_has_more, _answering(messages))):
            return
        changed = _with_answers(messages, lambda content: mark + content + mark)
        try:
            is_same = self._render(changed) == text
        except DataError:  # it looks into the answers
            return
        if is_same:
            raise DataError(
                f"chat template {self.name} prints nothing of the answers of {_describe(messages)}; correct it, or "
                "choose another with --chat_template"
            )

    def _marked_answers(
        self, messages: Sequence[Message], text: str, first: str, last: str, strip: bool
    ) -> list[Span] | None:
        """The answers as marks around their contents show them, or None if the marks change the render."""

        def marked(content: str) -> str:
            kept = content.strip() if strip else content
            begin = content.index(kept)
            return content[:begin] + first + kept + last + content[begin + len(kept) :]

        places = self._places(_with_answers(messages, marked), text, (first, last))
        if places is None or any(len(found) != len(_answering(messages)) for found in places):
            return None
        return list(zip(*places, strict=True))

    def _answers_by_turns(self, messages: Sequence[Message], text: str, mark: str) -> list[Span]:
        """The answers by what the render up to each one lacks.

        An answer goes from the end of its generation prompt to where the render up to it ends, or, where later
        turns change how it is written, to where its content does.
        """
        self._require_printed(messages, text, mark)
        marked = _with_answers(messages, lambda content: content.rstrip() + mark)
        places = self._places(marked, text, [mark])
        ends = places[0] if places and len(places[0]) == len(_answering(messages)) else None
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before, through = self._render(messages[:number], True), self._render(messages[: number + 1])
            except DataError:
                self._refuse_to_guess(messages)
            if not text.startswith(before):
                self._refuse_to_guess(messages)
            if text.startswith(through) and through.startswith(before):
                spans.append((len(before), max(len(before), len(through.rstrip()))))
            elif ends is not None and ends[len(spans)] >= len(before):
                spans.append((len(before), ends[len(spans)]))
            else:
                self._refuse_to_guess(messages)
            if message["content"].strip() and spans[-1][0] == spans[-1][1]:  # it prints no answer at all
                self._refuse_to_guess(messages)
        return spans

    def _refuse_to_guess(self, messages: Sequence[Message]) -> NoReturn:
        raise DataError(
            f"chat template {self.name} rewrites {_describe(messages)}, so it cannot be told which text is the "
            "answers'. Put {% generation %} and {% endgeneration %} around the answer in a template of your own "
            "(--chat_template FILE.jinja), or learn the whole text with --train_on_prompt"
        )


def _with_ends(
    text: str, answers: Sequence[Span], offsets: Sequence[Span], special: Sequence[bool]
) -> tuple[list[Span], bool, bool]:
    """Extend each answer over the token that ends it.

    That is the special token after it, white space between them included, or else whatever token is next. Also
    returns whether every answer ends with a special token, and whether the last is in need of one.
    """
    learnt = []
    ends, open_end = True, False
    specials = [span for span, is_special in zip(offsets, special, strict=True) if is_special]
    for begin, end in answers:
        if any(begin <= first and last == end for first, last in specials):
            learnt.append((begin, end))
            continue
        following = next((span for span in specials if span[0] >= begin and span[1] > end), None)
        if following and not text[end : following[0]].strip():
            learnt.append((begin, following[1]))
        elif end == len(text):
            learnt.append((begin, end))
            open_end = True
        else:
            ends = False
            learnt.append((begin, next((last for first, last in offsets if first >= end), len(text))))
    return learnt, ends, open_end


def _overlapping(spans: Iterable[Span], offsets: Sequence[Span], special: Sequence[bool]) -> list[bool]:
    """Whether each token has a character in one of the spans; a special token must begin there.

    (A special token may own white space at both sides, and with it that of an answer.)
    """
    size = max((end for _, end in offsets), default=0) + 1
    painted = bytearray(size)
    for begin, end in spans:
        painted[begin:end] = b"\1" * (min(end, size) - min(begin, size))
    return [
        bool(painted[begin]) if is_special else any(painted[begin:end])
        for (begin, end), is_special in zip(offsets, special, strict=True)
    ]


def _answering(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message["role"] == "assistant"]


def _has_more(message: Message) -> bool:
    """Whether there is more to an answer than its content."""
    return any(map(message.get, ANSWER_PARTS))


def _with_answers(messages: Sequence[Message], change: Callable[[str], str]) -> list[Message]:
    """The conversation with the contents of its answers changed."""
    return [
        message | {"content": change(message["content"])} if message["role"] == "assistant" else message
        for message in messages
    ]


def _unused_characters(text: str, count: int) -> list[str]:
    """Private-use characters that the text does not have."""
    taken = set(text)
    unused = (chr(code) for code in PRIVATE_USE if chr(code) not in taken)
    return [next(unused) for _ in range(count)]


def _take_out(marked: str, marks: Sequence[str]) -> tuple[str, list[list[int]]]:
    """The text without the marks, and the places in it where each of them stood."""
    places: dict[str, list[int]] = {mark: [] for mark in marks}
    pieces = []
    length = 0
    for piece in re.split(f"([{''.join(marks)}])", marked):
        if piece in places:
            places[piece].append(length)
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), list(places.values())


def _describe(messages: Sequence[Message]) -> str:
    """The conversation in a few words, for messages."""
    said = next((message["content"] for message in messages if message.get("content")), "")
    beginning = said if len(said) <= 60 else said[:60] + "…"
    return f"the conversation of {len(messages)} messages that begins {beginning!r}"


def _sandbox() -> Sandbox:
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return sandbox


def _compiled(sandbox: Sandbox, name: str, source: str) -> jinja2.Template:
    try:
        if len(source) > LONGEST_SOURCE:
            raise ValueError(f"it has {len(source):,} characters, expected at most {LONGEST_SOURCE:,}")
        return sandbox.compiled(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"chat template {name}, line {error.lineno} is not Jinja: {error.message}; correct it there"
        ) from None
    except Exception as error:  # noqa: BLE001  Python's own compiler refuses what nests too deep, in several ways
        raise ConfigError(
            f"chat template {name} cannot be compiled: {error or type(error).__name__}; choose another"
        ) from None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int) and indent > WIDEST_INDENT:
        raise jinja2.exceptions.SecurityError(f"it indents by {indent}")
    # Jinja's own filter writes for HTML, with & and < escaped.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@final
class Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`: what a model writes. Prints its body, marked if that is asked for."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, context: Context, caller: Macro) -> str:
        first, last = context.get(GENERATION_MARKS, ("", ""))
        return f"{first}{caller()}{last}"
