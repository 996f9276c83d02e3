"""Every command and every Python example of the README and the pages in docs/ runs, in order, as written."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from seedbed.cli.app import cli, run
from seedbed.cli.reference import reference
from tests.conftest import MakeText

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKES_ITS_RUN = ("README", "pretrain")

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
QUESTIONS = [
    {"instruction": f"Which number comes {word} {NUMBERS[place]}?", "input": "", "output": f"{NUMBERS[place + step]}."}
    for place in range(1, 9)
    for word, step in (("after", 1), ("before", -1))
]

# These have tests of their own, or are other programs.
NOT_HERE = ("make ", "tensorboard ", "pip ")


@pytest.fixture(scope="module")
def book_run(make_text: MakeText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `runs/book` that most pages begin with."""
    folder = tmp_path_factory.mktemp("docs")
    words = f"pretrain --data {make_text(14_000)} --model tiny --epochs 1 --output {folder / 'book'}"
    assert run(words.split()) == 0
    return folder / "book"


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page: Path, make_text: MakeText, book_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(make_text(14_000), "book.txt")
    shutil.copyfile(make_text(30_000), "other.txt")
    later = make_text(50_000).read_text()[32_000:]  # is in neither: what is held out must not be learnt elsewhere
    Path("plays.txt").write_text(later[:8_000])
    Path("articles.txt").write_text(later[8_000:])
    Path("questions.json").write_text(json.dumps(QUESTIONS))
    shutil.copyfile(ROOT / "examples/sweeps/quick.yaml", "quick.yaml")
    if page.stem not in MAKES_ITS_RUN:
        shutil.copytree(book_run, "runs/book")
    for language, content in blocks(page):
        if language == "python":
            exec(compile(content, str(page), "exec"), {})  # noqa: S102
        for line in content.splitlines() if language == "bash" else ():
            if not line.startswith(NOT_HERE):
                program, *words = shlex.split(line, comments=True)
                if program == "torchrun":
                    subprocess.run([sys.executable, "-m", "torch.distributed.run", *words], check=True)
                    continue
                assert program == "seedbed", line
                assert run(words) in (0, 75), line


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        named = {line.split()[1] for _, content in blocks(page) for line in content.splitlines() if line[:5] == "make "}
        assert named and named <= targets


def test_options_page_is_what_the_code_says() -> None:
    assert (ROOT / "docs/options.md").read_text() == reference(), "run `make docs`"


def test_options_page_has_every_option() -> None:
    page = (ROOT / "docs/options.md").read_text()
    shared, _, verbs = page.partition("## Every verb")
    chapters = {chapter.split("`")[1]: chapter for chapter in verbs.split("\n### ")[1:]}
    for path, command in every_verb(cli, "seedbed"):
        chapter = next(text for usage, text in chapters.items() if usage == path or usage.startswith(f"{path} "))
        for option in command.params:
            if isinstance(option, click.Option):
                place = shared + chapter if "Besides the options above" in chapter else chapter
                assert all(f"`{name}`" in place for name in option.opts), f"{path}: {option.name}"


def every_verb(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield path, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        below = command.get_command(context, name)
        assert below
        yield from every_verb(below, f"{path} {name}")


def test_every_page_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme] == []
