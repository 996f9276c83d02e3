from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest

from seedbed.errors import ConfigError, DataError
from seedbed.text import Tokenizer, train_bpe, train_char
from seedbed.text.template import BUILT_IN, Message, Template, find_template

TEXTS = [
    "Once upon a time the answer was yes. What is the capital of France? Paris, of course: 42 people said so.\n",
    "def add(a, b):\n    return a + b\n\nNaïve café — Ωμέγα 東京 😀. USER: ASSISTANT: QUESTION: ANSWER: user model\n",
] * 3


@dataclass(frozen=True)
class Style:
    """A way real models write conversations, and what must be learnt of an answer in it."""

    source: str
    end: str  # what follows an answer and is learnt with it
    tokens: tuple[str, ...]
    strips: bool = False  # whether it takes the white space off an answer
    before: str = ""  # learnt before the answer
    knows_system: bool = True


CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA_2 = """\
{% set offset = 0 %}
{% if messages[0]['role'] == 'system' %}
  {% set offset = 1 %}
  {% set opening = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
{% endif %}
{% for message in messages[offset:] %}
  {% if message['role'] == 'user' %}
    {% set content = opening + message['content'] if loop.first and opening is defined else message['content'] %}
    {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
  {% else %}
    {{- ' ' + message['content'].strip() + ' ' + eos_token -}}
  {% endif %}
{% endfor %}"""

LLAMA_3 = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] }}"
    "{{- '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% else %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' ~ message.content ~ '[/INST]' }}
    {%- else %}
        {{- ' ' ~ message.content ~ eos_token }}
    {%- endif %}
{%- endfor %}"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

PHI = """\
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}"""

QWEN_25 = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

QWEN_3 = """\
{%- set seen = namespace(last_question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set seen.last_question = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- set thought, said = '', message.content %}
        {%- if '</think>' in said %}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > seen.last_question and thought %}
            {{- '<think>\n' + thought + '\n</think>\n\n' }}
        {%- endif %}
        {{- said }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

DEEPSEEK = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}{%- set ns.system = message['content'] %}{%- endif %}
{%- endfor %}{{ bos_token }}{{ ns.system }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}
{{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""

VICUNA = """\
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% endif %}
{% for message in messages %}
{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'].strip() + ' ' }}
{%- elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'].strip() + eos_token }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

WITH_GENERATION = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

EOS = "<|endoftext|>"
IM = ("<|im_start|>", "<|im_end|>")

STYLES = {
    "chatml": Style(CHATML, "<|im_end|>", IM),
    "llama-2": Style(LLAMA_2, " </s>", ("<s>", "</s>"), strips=True),
    "llama-3": Style(
        LLAMA_3, "<|eot_id|>", ("<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), strips=True
    ),
    "zephyr": Style(ZEPHYR, "</s>", ("<s>", "</s>")),
    "mistral": Style(MISTRAL, "</s>", ("<s>", "</s>", "[INST]", "[/INST]"), knows_system=False),
    "gemma": Style(
        GEMMA, "<end_of_turn>", ("<s>", "<start_of_turn>", "<end_of_turn>"), strips=True, knows_system=False
    ),
    "phi": Style(PHI, "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "qwen-2.5": Style(QWEN_25, "<|im_end|>", IM),
    "qwen-3": Style(QWEN_3, "<|im_end|>", IM),
    "deepseek": Style(
        DEEPSEEK, "<｜end▁of▁sentence｜>", ("<s>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
    ),
    "vicuna": Style(VICUNA, "</s>", ("<s>", "</s>"), strips=True),
    "generation": Style(WITH_GENERATION, "<|im_end|>", IM),
}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


CONVERSATIONS: dict[str, list[Message]] = {
    "one turn": [user("What is the capital of France?"), assistant("Paris, of course.")],
    "three turns": [
        user("One?"),
        assistant("Yes."),
        user("Two?"),
        assistant("No: 42\n\npeople"),
        user("Yes."),
        assistant("Yes."),
    ],
    "system": [system("You answer."), user("Who?"), assistant("I do.")],
    "system and turns": [system("S"), user("a"), assistant("a"), user("a"), assistant("b")],
    "empty answer": [user("Say nothing."), assistant("")],
    "empty answer first": [user(""), assistant(""), user("Really?"), assistant("Really.")],
    "white space around": [user("  Write code\n"), assistant("\n    def add(a, b):\n        return a + b\n")],
    "unicode": [user("Καλημέρα 😀?"), assistant("東京 — naïve café 😀")],
    "very long": [user("w " * 20_000), assistant("Once upon a time. " * 2000 + "End")],
    "answer is in the question": [user("Repeat: the answer"), assistant("the answer")],
    "private use": [user("\ue000\ue001"), assistant("\ue000 and \ue002")],
    "last word is the user's": [user("a"), assistant("b"), user("c")],
}


@cache
def tokenizer_of(kind: str, tokens: tuple[str, ...]) -> Tokenizer:
    tokenizer = train_char(TEXTS) if kind == "char" else train_bpe(TEXTS, 400)
    backend = tokenizer.with_tokens(tokens)._backend
    return Tokenizer(backend, "</s>" if "</s>" in tokens else EOS, "<s>" if "<s>" in tokens else None)


def template_of(style: Style, kind: str = "char") -> Template:
    return Template(tokenizer_of(kind, style.tokens), "test", style.source)


def learnt(template: Template, messages: list[Message], tokenizer: Tokenizer) -> list[str]:
    """The text of each run of tokens that are targets."""
    example = template.example(messages)
    assert len(example.token_ids) == len(example.trained)
    runs = groupby(zip(example.token_ids, example.trained, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for trained, run in runs if trained]


def expected(style: Style, messages: list[Message]) -> list[str]:
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    return [style.before + (text.strip() if style.strips else text) + style.end for text in answers]


@pytest.mark.parametrize("conversation", list(CONVERSATIONS))
@pytest.mark.parametrize("name", list(STYLES))
def test_exactly_the_answers_and_their_ends_are_learnt(name: str, conversation: str) -> None:
    style, messages = STYLES[name], CONVERSATIONS[conversation]
    template = template_of(style)
    if messages[0]["role"] == "system" and not style.knows_system:
        with pytest.raises(DataError, match=r"test fails on the conversation.*(alternate|not supported)"):
            template.example(messages)
        return
    assert learnt(template, messages, tokenizer_of("char", style.tokens)) == expected(style, messages)
    example = template.example(messages)
    assert example.ends
    text = template.render(messages)
    assert tokenizer_of("char", style.tokens).decode(example.token_ids) == text
    # With longer tokens, one may be part of an answer and of the space before it.
    tokenizer = tokenizer_of("bpe", style.tokens)
    runs = learnt(template_of(style, "bpe"), messages, tokenizer)
    assert [run.lstrip() for run in runs] == [run.lstrip() for run in expected(style, messages)]


@pytest.mark.parametrize("conversation", list(CONVERSATIONS))
@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_learn_the_answers_and_their_ends(name: str, conversation: str) -> None:
    tokenizer = tokenizer_of("char", IM)
    template = find_template(tokenizer, name, "chat")
    style = Style("", "<|im_end|>" if name == "chatml" else EOS, IM, before=" " if name == "qa" else "")
    messages = CONVERSATIONS[conversation]
    assert learnt(template, messages, tokenizer) == expected(style, messages)
    # What generation is given is the beginning of what was learnt from.
    question = messages[: next(place for place, said in enumerate(messages) if said["role"] == "assistant")]
    prompt = template.prompt_ids(question)
    example = template.example(messages)
    assert example.token_ids[: len(prompt)] == prompt
    assert example.trained[: len(prompt)] == [False] * len(prompt)
    assert example.trained[len(prompt)]


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("name", list(STYLES))
def test_names_of_special_tokens_in_a_message_stay_text(name: str, kind: str) -> None:
    style = STYLES[name]
    tokenizer = tokenizer_of(kind, style.tokens)
    names = " ".join(style.tokens) + style.tokens[-1] * 2
    messages = [user(f"What is {names}?"), assistant(f"{names} is a token, {style.end}"), user(names), assistant(names)]
    harmless = [message | {"content": "x"} for message in messages]
    template = template_of(style, kind)
    special = {tokenizer.encode_with_special_tokens(token)[0][0] for token in [*style.tokens, EOS]}

    def specials(conversation: list[Message]) -> list[int]:
        return [token for token in template.example(conversation).token_ids if token in special]

    assert specials(messages) == specials(harmless)
    assert tokenizer.decode(template.example(messages).token_ids) == template.render(messages)
    assert [run.lstrip() for run in learnt(template, messages, tokenizer)] == expected(style, messages)
    assert not special & set(template.prompt_ids([user(names)])).difference(template.prompt_ids([user("x")]))
    # In the middle of a text, it is read as that text always is.
    ids = template.example(messages).token_ids
    text = tokenizer.encode(style.tokens[0])
    assert any(ids[place : place + len(text)] == text for place in range(len(ids)))


def test_thoughts_that_later_turns_cut_are_learnt_where_they_stand() -> None:
    style = STYLES["qwen-3"]
    tokenizer, template = tokenizer_of("char", IM), template_of(style)
    thinking = "<think>\nhm\n</think>\n\nYes."
    assert learnt(template, [user("a"), assistant(thinking)], tokenizer) == [thinking + "<|im_end|>"]
    turns = [user("a"), assistant(thinking), user("b"), assistant(thinking)]
    assert learnt(template, turns, tokenizer) == ["Yes.<|im_end|>", thinking + "<|im_end|>"]
    bare = [user("a"), assistant("hm</think>Yes.")]
    assert learnt(template_of(STYLES["deepseek"]), bare, tokenizer_of("char", STYLES["deepseek"].tokens)) == [
        "Yes." + STYLES["deepseek"].end
    ]


def test_calls_of_tools_are_part_of_the_answer() -> None:
    source = CHATML.replace(
        "message['content'] +", "message['content'] + (message.tool_calls | tojson if message.tool_calls else '') +"
    )
    template = Template(tokenizer_of("char", IM), "tools", source)
    call = assistant("") | {"tool_calls": [{"name": "add", "a": "<&é>"}]}
    messages = [user("1 + 2"), call, {"role": "tool", "content": "3"}, assistant("It is 3.")]
    assert learnt(template, messages, tokenizer_of("char", IM)) == [
        '[{"name": "add", "a": "<&é>"}]<|im_end|>',
        "It is 3.<|im_end|>",
    ]


def test_tools_are_only_read() -> None:
    tokenizer, tools = tokenizer_of("char", IM), [{"name": "add"}]
    messages = [user("1 + 2") | {"tools": tools}, assistant("3"), user("2 + 2"), assistant("4")]
    template = Template(tokenizer, "tools", "{{ tools | tojson if tools }}" + CHATML)
    assert template.render(messages).startswith('[{"name": "add"}]<|im_start|>user\n1 + 2')
    assert learnt(template, messages, tokenizer) == ["3<|im_end|>", "4<|im_end|>"]
    with pytest.raises(DataError, match=r"template bare prints no tools.*begins '1 \+ 2'; choose"):
        Template(tokenizer, "bare", CHATML).example(messages)


@pytest.mark.parametrize(
    "printed",
    [
        "{{ m.content | int }}",
        "{{ m.content if m.content in ('1', '2') else raise_exception('a number is expected') }}",
        "{{ m.content ~ m.content | length }}",
        "{{ m.content ~ m.content }}",
    ],
)
def test_templates_that_look_into_what_is_said(printed: str) -> None:
    source = "{% for m in messages %}" + printed + "<|im_end|>\n{% endfor %}"
    tokenizer, messages = tokenizer_of("char", IM), [user("1"), assistant("2"), user("1"), assistant("1")]
    template = Template(tokenizer, "numbers", source)
    lines = template.render(messages).splitlines()
    assert learnt(template, messages, tokenizer) == [lines[1], lines[3]]


def test_an_answer_that_cannot_be_found_is_refused() -> None:
    upper = Template(
        tokenizer_of("char", IM),
        "upper",
        "{% for m in messages %}{{ m.content[:3] }}{{ messages | length }}{% endfor %}{{ '<|im_end|>' }}",
    )
    messages = [user("abc"), assistant("a long answer")]
    with pytest.raises(DataError, match=r"upper rewrites .* begins 'abc'.*generation.*--train_on_prompt"):
        upper.example(messages)
    example = upper.example(messages, train_on_prompt=True)
    assert all(example.trained)


@pytest.mark.parametrize("answer", ["", "OK", "{% generation %}OK{% endgeneration %}"])
def test_a_template_that_writes_nothing_of_the_answers_is_refused(answer: str) -> None:
    source = "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}" + answer + "{% endif %}{% endfor %}"
    template = Template(tokenizer_of("char", ()), "silent", source)
    with pytest.raises(DataError, match="silent prints nothing of the answers of the conversation of 2 messages"):
        template.example([user("a"), assistant("b")])


def test_an_answer_without_an_end() -> None:
    tokenizer = tokenizer_of("char", ())
    colons = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '' if loop.last else '\n' }}{% endfor %}"
    template = Template(tokenizer, "colons", colons)
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    example = template.example(turns)
    assert learnt(template, turns, tokenizer) == ["b\n", "d" + EOS]
    assert example.token_ids[-1] == tokenizer.eos_id
    assert not example.ends
    assert template.example(turns[2:]).ends
    assert template.example(turns[2:], train_on_prompt=True).token_ids[-1] == tokenizer.eos_id
    assert tokenizer.eos_id not in template.example(turns[:3]).token_ids
    unlearnt = template.example([*turns[:3], turns[3] | {"weight": 0}])
    assert (unlearnt.token_ids, unlearnt.trained[-1]) == (example.token_ids, False)


def test_special_tokens_that_own_the_space_around_them() -> None:
    """Phi-3's tokens do: what stands after a header must not make the header a target."""
    from tokenizers import AddedToken

    tokenizer = train_char(TEXTS)
    for token in ("<|user|>", "<|assistant|>", "<|end|>"):
        tokenizer._backend.add_special_tokens([AddedToken(token, rstrip=True, normalized=False)])
    template = Template(tokenizer, "phi", PHI.replace("{{- eos_token -}}", "{{- '' -}}"))
    messages = [user("a <|end|>"), assistant(" \n b "), user("c"), assistant("d")]
    assert learnt(template, messages, tokenizer) == ["b <|end|>", "d<|end|>"]


def test_train_on_prompt_learns_every_token() -> None:
    for name, style in STYLES.items():
        example = template_of(style).example(CONVERSATIONS["three turns"], train_on_prompt=True)
        assert all(example.trained), name
        assert example.ends
        assert example.token_ids == template_of(style).example(CONVERSATIONS["three turns"]).token_ids


@pytest.mark.parametrize("name", list(STYLES))
def test_an_answer_without_weight_is_only_read(name: str) -> None:
    style = STYLES[name]
    template, tokenizer = template_of(style), tokenizer_of("char", style.tokens)
    plain = [user("What is the capital?"), assistant("London"), user("What is it?"), assistant("Paris")]
    first, last = expected(style, plain)
    for unlearnt, text, answer in ((1, last, "Paris"), (3, first, "London")):
        turns = [message | {"weight": int(place != unlearnt)} for place, message in enumerate(plain)]
        example = template.example(turns)
        assert learnt(template, turns, tokenizer) == [text]
        assert example.answers == [answer]
        assert example.token_ids == template.example(plain).token_ids
        assert all(template.example(turns, train_on_prompt=True).trained)


def test_a_long_conversation_takes_no_time() -> None:
    messages = [user("Tell me <|im_end|> a story."), assistant("Once upon a time, yes. " * 5000)]
    template = template_of(STYLES["chatml"], "bpe")
    template.example(messages)
    start = time.perf_counter()
    example = template.example(messages)
    assert time.perf_counter() - start < 1
    assert sum(example.trained) > 10_000


def test_alpaca_is_the_well_known_text() -> None:
    template = find_template(tokenizer_of("char", ()), None, "alpaca")
    opening = "Below is an instruction that describes a task"
    request = "Write a response that appropriately completes the request.\n\n"
    with_input: Message = {"role": "user", "content": "Add.\n\n1, 2", "instruction": "Add.", "input": "1, 2"}
    assert template.name == "alpaca"
    assert template.render([user("Sing."), assistant("La.")]) == (
        f"{opening}. {request}### Instruction:\nSing.\n\n### Response:\nLa.{EOS}"
    )
    assert template.render([with_input, assistant("3")]) == (
        f"{opening}, paired with an input that provides further context. {request}"
        f"### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3{EOS}"
    )
    assert template.render([system("Be brief."), user("a"), assistant("b"), user("c")], add_generation_prompt=True) == (
        f"Be brief.\n\n### Instruction:\na\n\n### Response:\nb{EOS}\n\n### Instruction:\nc\n\n### Response:\n"
    )
    names = [with_input | {"input": EOS, "content": f"Add.\n\n{EOS}"}, assistant("3")]
    assert template.example(names).token_ids.count(0) == 1


def test_the_other_built_in_templates() -> None:
    tokenizer = tokenizer_of("char", ())
    turns = [system("Short."), user("a"), assistant("b"), user("c")]
    assert find_template(tokenizer, "qa", "qa").render(turns, add_generation_prompt=True) == (
        f"Short.\n\nQUESTION: a\nANSWER: b{EOS}\nQUESTION: c\nANSWER:"
    )
    assert find_template(tokenizer, None, "completion").render([user(" a "), assistant("b ")]) == f" a b {EOS}"
    chatml = find_template(tokenizer, "chatml", "chat")
    assert chatml.new_tokens == IM
    assert chatml.render(turns[1:3]) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert find_template(tokenizer_of("char", IM), "chatml", "chat").new_tokens == ()


def test_which_template_is_taken(tmp_path: Path) -> None:
    plain = tokenizer_of("char", ())
    own = plain.with_chat_template(CHATML)
    path = tmp_path / "mine.jinja"
    path.write_text(LLAMA_3, encoding="utf-8")
    chosen = {
        (tokenizer, choice, format): find_template(tokenizer, choice, format).name
        for tokenizer in (plain, own)
        for choice in (None, "qa", str(path))
        for format in ("alpaca", "qa", "chat", "completion")
    }
    defaults = ["alpaca", "qa", "alpaca", "plain"]
    assert [chosen[plain, None, format] for format in ("alpaca", "qa", "chat", "completion")] == defaults
    assert [chosen[own, None, format] for format in ("alpaca", "chat", "completion")] == [
        "tokenizer",
        "tokenizer",
        "plain",
    ]
    assert chosen[own, "qa", "chat"] == "qa"
    assert chosen[own, str(path), "completion"] == str(path)
    assert find_template(own, str(path), "chat").source == LLAMA_3
    with pytest.raises(ConfigError, match=r"alpaka.*did you mean alpaca\?"):
        find_template(plain, "alpaka", "chat")
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        find_template(plain, str(path), "chat")


def test_the_fingerprint_changes_with_what_is_written() -> None:
    plain = tokenizer_of("char", IM)
    first = Template(plain, "a", CHATML).fingerprint
    assert Template(plain, "b", CHATML).fingerprint == first
    assert Template(plain, "a", CHATML + " ").fingerprint != first
    assert Template(plain.with_tokens([], eos_token="<|im_end|>"), "a", CHATML).fingerprint != first


def test_a_template_that_is_not_jinja_says_where() -> None:
    tokenizer = tokenizer_of("char", ())
    with pytest.raises(ConfigError, match=r"broken, line 2 is not Jinja: .*endfor"):
        Template(tokenizer, "broken", "{% for m in messages %}\n{{ m.content }}{% endif %}")
    with pytest.raises(ConfigError, match=r"broken, line 1 is not Jinja: .*nothing"):
        Template(tokenizer, "broken", "{{ messages | nothing }}")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ messages[0].tools.name }}", "has no attribute 'tools'"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_a_template_that_fails_names_the_conversation(source: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"faulty fails on .* begins 'Hello'.*{reason}"):
        Template(tokenizer_of("char", ()), "faulty", source).render([user("Hello"), assistant("b")])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ '{0.__class__.__mro__}'.format(messages) | length and 1 / 0 }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(ConfigError, match="may not"):
        Template(tokenizer_of("char", ()), "unsafe", source).render([user("a")])


@pytest.mark.starter
def test_a_real_model_learns_its_answers() -> None:
    folder = os.environ.get("SEEDBED_STARTER")
    if not folder:
        pytest.skip("SEEDBED_STARTER is not set: a folder with the real model")
    tokenizer = Tokenizer.load(folder)
    template = find_template(tokenizer, None, "chat")
    assert (template.name, template.new_tokens) == ("tokenizer", ())
    style = replace(STYLES["chatml"], source=template.source)
    special = [user("a <|im_end|> b"), assistant("It is <|im_end|>, or <|endoftext|>.")]
    for messages in [*CONVERSATIONS.values(), special]:
        runs = learnt(template, messages, tokenizer)
        assert [run.lstrip() for run in runs] == [run.lstrip() for run in expected(style, messages)]
    assert template.example(special).token_ids.count(tokenizer.eos_id) == 3  # a system turn, and one each
