"""Chat templates rendered and tokenized by transformers: the same text, the same ids, the same marks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from seedbed.errors import DataError
from seedbed.text import Tokenizer
from seedbed.text.template import BUILT_IN, Message, Template, find_template
from tests.unit.text.test_template import (
    CONVERSATIONS,
    IM,
    STYLES,
    WITH_GENERATION,
    assistant,
    system,
    tokenizer_of,
    user,
)

transformers = pytest.importorskip("transformers")

# What templates do beside printing messages.
ODDITIES = {
    "tojson": "{{ {'b': '<&é>', 'a': [1, none]} | tojson }}{{ messages | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}\n{{ m.content }}\n{% endfor %}",
    "white space": "  {% if messages %}\n  x\n\n  {%- endif %}\n  {# no #}\n{{ messages[0].content }}\n\n",
    "undefined": "{{ messages[0].name }}{{ nothing }}{% if tools is none and documents is none %}none{% endif %}",
    "named tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}",
    "today": "{{ strftime_now('%d %b %Y') }}",
    "slices": "{{ messages[::-1] | map(attribute='content') | join(',') }}{{ messages[-1]['content'][:3] | upper }}",
}


def saved(tokenizer: Tokenizer, folder: Path, source: str) -> Any:
    """The same tokenizer and template as transformers reads them from a folder that we saved."""
    tokenizer.with_chat_template(source).save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_same(ours: Template, theirs: Any, messages: list[Message]) -> None:
    for prompt in (False, True):
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception:  # noqa: BLE001  whatever a template raises there
            with pytest.raises(DataError):
                ours.render(messages, add_generation_prompt=prompt)
            continue
        assert ours.render(messages, add_generation_prompt=prompt) == expected
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert (ours.prompt_ids(messages) if prompt else ours.example(messages).token_ids) == ids


@pytest.mark.parametrize("name", list(STYLES))
def test_templates_of_real_models(name: str, tmp_path: Path) -> None:
    style = STYLES[name]
    theirs = saved(tokenizer_of("bpe", style.tokens), tmp_path, style.source)
    ours = find_template(Tokenizer.load(tmp_path), None, "chat")
    thinking = [user("a"), assistant("<think>\nhm\n</think>\n\nYes."), user("b"), assistant("<think>c</think>No.")]
    refused = [system("a"), system("b"), user("c"), user("d"), assistant("e")]
    for messages in [*CONVERSATIONS.values(), thinking, refused]:
        assert_same(ours, theirs, messages)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bpe", IM)
    ours = find_template(tokenizer, name, "chat")
    theirs = saved(tokenizer, tmp_path, ours.source)
    with_input: Message = {"role": "user", "content": "Add.\n\n1, 2", "instruction": "Add.", "input": "1, 2"}
    for messages in [*CONVERSATIONS.values(), [with_input, assistant("3")]]:
        assert_same(ours, theirs, messages)


@pytest.mark.parametrize("name", list(ODDITIES))
def test_what_else_templates_do(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bpe", ("<s>", "</s>"))
    theirs = saved(tokenizer, tmp_path, ODDITIES[name])
    ours = Template(Tokenizer.load(tmp_path), name, ODDITIES[name])
    messages = [user("One\n"), assistant("Two <&é>"), user("Three") | {"name": None}]
    for prompt in (False, True):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ours.render(messages, add_generation_prompt=prompt) == expected


def test_tools_are_given_to_the_template(tmp_path: Path) -> None:
    source = "{% if tools %}{{ tools | tojson(indent=4) }}{% endif %}{{ messages | tojson }}"
    theirs = saved(tokenizer_of("bpe", IM), tmp_path, source)
    tools = [{"type": "function", "function": {"name": "add", "description": "<&é>"}}]
    expected = theirs.apply_chat_template([user("1 + 2"), assistant("3")], tools=tools, tokenize=False)
    ours = find_template(Tokenizer.load(tmp_path), None, "chat")
    assert ours.render([user("1 + 2") | {"tools": tools}, assistant("3")]) == expected


def test_marks_of_generation_blocks(tmp_path: Path) -> None:
    theirs = saved(tokenizer_of("bpe", IM), tmp_path, WITH_GENERATION)
    ours = find_template(Tokenizer.load(tmp_path), None, "chat")
    for messages in CONVERSATIONS.values():
        expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert ours.example(messages).trained == [bool(mark) for mark in expected["assistant_masks"]]


@pytest.mark.parametrize("family", [None, "gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_added_tokens_open_beside_a_model_of_any_family(family: str | None, tmp_path: Path) -> None:
    if family:
        (tmp_path / "config.json").write_text(f'{{"model_type": "{family}"}}', encoding="utf-8")
    ours = tokenizer_of("bpe", ()).with_tokens(IM, eos_token="<|im_end|>")
    template = find_template(ours, "chatml", "chat")
    theirs = saved(ours, tmp_path, template.source)
    assert (len(theirs), theirs.eos_token, theirs.eos_token_id) == (ours.vocab_size, "<|im_end|>", ours.eos_id)
    for messages in CONVERSATIONS.values():
        assert_same(template, theirs, messages)


def test_tokens_added_to_a_tokenizer_that_transformers_saved(tmp_path: Path) -> None:
    first = saved(tokenizer_of("bpe", ("<s>", "</s>")), tmp_path / "ours", STYLES["llama-3"].source)
    first.add_special_tokens({"pad_token": "<pad>"})
    first.save_pretrained(tmp_path / "theirs")
    loaded = Tokenizer.load(tmp_path / "theirs")
    assert loaded.chat_template == STYLES["llama-3"].source
    grown = loaded.with_tokens(IM, eos_token="<|im_end|>")
    assert grown.vocab_size == loaded.vocab_size + 2
    theirs = saved(grown, tmp_path / "grown", STYLES["chatml"].source)
    assert theirs.special_tokens_map.items() >= {"eos_token": "<|im_end|>", "pad_token": "<pad>"}.items()
    assert_same(Template(grown, "chatml", STYLES["chatml"].source), theirs, CONVERSATIONS["system and turns"])


@pytest.mark.starter
def test_a_real_tokenizer() -> None:
    folder = os.environ.get("SEEDBED_STARTER")
    if not folder:
        pytest.skip("SEEDBED_STARTER is not set: a folder with the real model")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = find_template(Tokenizer.load(folder), None, "chat")
    for messages in CONVERSATIONS.values():
        assert_same(ours, theirs, messages)
