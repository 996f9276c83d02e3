from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from seedbed.data.lint import NAMES, SHOWN_CHARS, Conversation, lint, lint_texts
from seedbed.findings import Finding

NUMBERS = [f"number{letter}" for letter in "abcdefghijklmnop"]


def ask(prompt: str, answer: str, system: str = "") -> list[dict[str, str]]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def varied(count: int) -> list[Conversation]:
    """Rows with nothing to find: other openings, other words, other answers."""
    return [ask(f"w{i} x{i} y{i} what is {i}+{i}?", f"The sum of w{i} is {2 * i}.") for i in range(count)]


def named(findings: list[Finding]) -> dict[str, Finding]:
    json.dumps([finding.to_json() for finding in findings])
    names = [finding.name for finding in findings]
    assert set(names) <= set(NAMES)
    assert len(names) == len(set(names))
    return {finding.name: finding for finding in findings}


def look(*rows: Conversation, others: int = 0, validation: tuple[Conversation, ...] = ()) -> dict[str, Finding]:
    return named(lint([*rows, *varied(others)], validation))


def evidence(finding: Finding, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(example[key] for key in keys) for example in finding.evidence["examples"]]


def test_good_data_and_no_data_are_left_in_peace() -> None:
    rows = varied(300)
    assert lint(rows[:250], rows[250:]) == []
    assert lint([]) == []
    assert lint_texts([f"A text of {number}." for number in NUMBERS], ["Another text."]) == []


# Answers


def test_empty_answers_are_counted_and_shown() -> None:
    no_answer: Conversation = [{"role": "user", "content": "Is there?"}]
    finding = look(ask("Yes?", "Yes."), ask("Name it.", " \n"), ask("Say.", ""), no_answer)["empty_answers"]
    assert finding.level == "warning"
    assert finding.message == "no answer, or an empty one: 3 of 4 rows (75.0%), first row 2: 'Name it.'"
    assert evidence(finding, "row", "text") == [(2, "Name it."), (3, "Say."), (4, "Is there?")]


def test_a_call_of_a_tool_is_an_answer() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock"}}]}
    assert look([{"role": "user", "content": "What time is it?"}, call]) == {}


def test_an_answer_that_repeats_its_prompt() -> None:
    echoes = ask("What is the capital of Peru?", "what is the capital of Peru? Lima.")
    assert set(look(echoes)) == {"echoed_prompts"}
    assert look(ask("Complete: I am", "Complete: I am here"), ask("Hello there", "Hello there you")) == {}
    assert look(ask("What is the capital of Peru?", "What is the capital? Lima.")) == {}


# Copies


def test_copies_and_other_answers_to_the_same_prompt() -> None:
    rows = (
        ask("Pick a number.", "1"),
        ask("Pick a number.", "2"),
        ask("Pick a number.", "1"),
        ask("Pick a card.", "1"),
    )
    findings = look(*rows)
    assert evidence(findings["duplicates"], "row", "first", "text") == [(3, 1, "Pick a number.")]
    assert evidence(findings["conflicting_answers"], "row", "first") == [(2, 1)]
    assert (findings["duplicates"].level, findings["conflicting_answers"].level) == ("warning", "note")


def test_one_copy_among_many_rows_is_a_note() -> None:
    assert look(ask("Why?", "So."), ask("Why?", "So."), others=200)["duplicates"].level == "note"


def test_the_prompt_of_a_conversation_is_all_before_its_last_answer() -> None:
    first = [*ask("Hello.", "Hi."), *ask("And?", "Good.")]
    other = [*ask("Howdy.", "Hi."), *ask("And?", "Good.")]
    assert look(first, other) == {}
    assert set(look(first, first)) == {"duplicates"}
    assert look(ask("And?", "Good."), ask("And?", "Good.", system="Be brief.")) == {}


# Leaks


def test_prompts_of_validation_that_training_has_too() -> None:
    train = (ask("Name a colour!", "Red."), ask("What is 2*3?", "6"))
    validation = (ask("name  a 'colour'", "Blue."), ask("What is 2+3?", "5"), ask("NAME A COLOUR", "Red."))
    finding = look(*train, validation=validation)["leaked"]
    assert finding.level == "warning"
    assert "2 of 3 rows" in finding.message
    assert evidence(finding, "row", "training_row") == [(1, 1), (3, 1)]


def test_prompts_of_validation_that_are_nearly_in_training() -> None:
    long = " ".join(f"{number}-{tens}" for tens in ("twenty", "thirty") for number in NUMBERS)
    edited = long.replace("numberd-thirty", "4-30")
    finding = look(ask("Another.", "Yes."), ask(long, "Yes."), validation=(ask(edited, "No."), ask("Else?", "No.")))
    assert set(finding) == {"nearly_leaked"}
    assert evidence(finding["nearly_leaked"], "row", "training_row") == [(1, 2)]


def test_a_template_filled_in_otherwise_is_not_a_leak() -> None:
    template = "Classify the given word as a noun, a verb or an adjective: {}"
    assert look(ask(template.format("jump"), "verb"), validation=(ask(template.format("house"), "noun"),)) == {}


# Labels, tokens, entities


@pytest.mark.parametrize(
    "content",
    [
        "QUESTION: What is it?",
        "Think.\nANSWER: It is.",
        "### Response:\nIt is.",
        "Below is a task.\n\n### Instruction:\nName it.",
        "assistant\nIt is.",
        "User: Hello",
        "a: It is.",
        "Hello.\nHuman: Bye.",
    ],
)
def test_labels_of_roles(content: str) -> None:
    assert set(look(ask("Say.", content))) == set(look(ask(content, "Yes."))) == {"role_labels"}


@pytest.mark.parametrize(
    "content",
    [
        "The answer: 42.",
        "What does a user: field mean?",
        "# Response times\nThey vary.",
        "Write a dialogue.\nq: unknown",
        "Assistants: three.",
        "Users\nand more",
    ],
)
def test_words_that_are_no_labels(content: str) -> None:
    assert look(ask(content, "Yes.")) == {}


@pytest.mark.parametrize(
    "content",
    [
        "Done.<|im_end|>",
        "<|endoftext|>",
        "[INST] Go [/INST]",
        "<<SYS>> Be kind.",
        "<s> Hi",
        "Bye</s>\n",
        "<start_of_turn>",
    ],
)
def test_special_tokens_of_templates(content: str) -> None:
    assert look(ask("Say.", content), others=1000)["special_tokens"].level == "warning"
    assert set(named(lint_texts([content]))) == {"special_tokens"}


@pytest.mark.parametrize(
    "content", ["a < b | c > d", "x[INSTANT]", "Use <s>old</s> and <b>.", "R&D; AT&T", "if (a && b);"]
)
def test_signs_that_are_no_tokens_or_entities(content: str) -> None:
    assert look(ask("Say.", content)) == {}


def test_html_entities_are_a_note() -> None:
    finding = look(ask("Say.", "Tom &amp; Jerry"), ask("And?", "It&#39;s &#x27;it&#x27;"))["html_entities"]
    assert finding.level == "note"
    assert evidence(finding, "row", "text") == [(1, "&amp; Jerry"), (2, "&#39;s &#x27;it&#x27;")]


def test_examples_are_few_and_short() -> None:
    finding = look(*(ask("Say.", f"QUESTION:\n{i} " + "word " * 100) for i in range(9)))["role_labels"]
    assert finding.evidence["count"] == 9
    assert len(finding.evidence["examples"]) == 3
    assert all(
        len(example["text"]) <= SHOWN_CHARS and "\n" not in example["text"] for example in finding.evidence["examples"]
    )


# Length


def test_rows_far_longer_than_the_others() -> None:
    rows = [*varied(50), ask("Copy this.", "word " * 600), ask("Copy that.", "word " * 500)]
    finding = named(lint(rows))["long_rows"]
    assert finding.level == "note"
    assert evidence(finding, "row", "characters")[:2] == [(51, 3010), (52, 2510)]
    assert finding.evidence["count"] == 2
    assert named(lint(rows, max_chars=2700))["long_rows"].evidence["count"] == 1
    assert lint(rows, max_chars=4000) == []


# Variety


def test_prompts_that_all_begin_alike() -> None:
    rows = [ask(f"Tell me about w{i}.", f"It is v{i}, a thing.") for i in range(100)]
    finding = named(lint(rows))["repeated_openings"]
    assert (finding.level, finding.evidence["most_common"]) == ("note", "tell me about")
    assert lint(rows[:99]) == []


@pytest.mark.parametrize(("same", "level"), [(9, None), (10, "note"), (50, "warning")])
def test_an_answer_given_again_and_again(same: int, level: str | None) -> None:
    rows = varied(100)
    rows[:same] = [ask(row[0]["content"], "I do not know.") for row in rows[:same]]
    finding = named(lint(rows)).get("repeated_answer")
    assert (finding.level if finding else None) == level


def test_a_text_of_few_words() -> None:
    assert set(named(lint_texts([f"{' '.join(NUMBERS)} {i}" for i in range(9)] * 20))) == {"duplicates", "few_words"}


# Documents


def test_copies_and_leaks_of_documents() -> None:
    findings = named(lint_texts(["One text.", "Two texts.", "One text."], ["one text", "Three texts."]))
    assert evidence(findings["duplicates"], "row", "first") == [(3, 1)]
    assert evidence(findings["leaked"], "row", "training_row") == [(1, 1)]


# Real data, and a lot of it


def test_time_grows_with_the_rows_alone() -> None:
    rows = [ask(f"{i} {' '.join(NUMBERS)} {i}", " ".join(NUMBERS)) for i in range(10_000)]
    start = time.perf_counter()
    lint(rows, rows[:5000])
    assert time.perf_counter() - start < 10


def test_real_instructions() -> None:
    folder = os.environ.get("SEEDBED_TEST_DATA")
    if not folder:
        pytest.skip("SEEDBED_TEST_DATA does not name the folder with instruction-1100.json")
    rows = json.loads((Path(folder) / "instruction-1100.json").read_text(encoding="utf-8"))
    talks = [ask(f"{row['instruction']}\n\n{row['input']}".strip(), row["output"]) for row in rows]
    assert set(named(lint(talks))) == {"conflicting_answers"}
    assert named(lint(talks[:990], talks[990:]))["leaked"].evidence["count"] == 6
