"""The built-in corpus: the documentation that ships inside the user's own Python.

Nothing is downloaded, and no module is run to be read: docstrings are found by parsing the standard library.
"""

from __future__ import annotations

import ast
import gc
import importlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

from seedbed.errors import DataError

# Folders of the standard library that hold tests, generated tables, other people's packages or a second
# program; their docstrings are missing, repeated, or not about Python.
SKIPPED = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"}
    | {"ensurepip", "lib-dynload", "site-packages", "dist-packages", "__pycache__"}
)

AT_LEAST_BYTES = 100_000
REPEATABLE_CHARS = 80  # below this a paragraph is a phrase such as "Return a copy." that anyone may repeat

# What is not sentences: rule lines under titles, grammar productions, the prompts of interpreter sessions,
# and a line that is a signature alone.
RULE_LINE = re.compile(r"\s*([*=\-~^#+_.])\1{2,}[*=\-~^#+_.\s]*")
GRAMMAR = re.compile(r"\s*[\w.-]+\s*::=")
PROMPT = re.compile(r"\s*(>>>|\.\.\.)(\s|$)")
SIGNATURE = re.compile(r"[\w.]+\(.*\)\s*(->.*|--.*)?")


@cache
def python_docs() -> tuple[str, ...]:
    """One document for each language topic and each module: the same for one interpreter, every time.

    Raises DataError when this Python came without its documentation (some minimal builds strip it).
    """
    seen: set[str] = set()
    documents: list[str] = []
    for title, parts in _all_parts():
        sections = [title]
        for name, text in parts:
            if fresh := _drop_repeated(text, seen):
                sections.append(f"{name}\n{fresh}" if name else fresh)
        if len(sections) > 1:
            documents.append("\n\n".join(sections))
    num_bytes = sum(len(text.encode()) for text in documents)
    if num_bytes < AT_LEAST_BYTES:
        raise DataError(
            f"python-docs found only {num_bytes:,} bytes of documentation in {sysconfig.get_path('stdlib')}: "
            "this Python was built without it. Use another Python, or give --data a text file"
        )
    return tuple(documents)


def _drop_repeated(text: str, seen: set[str]) -> str:
    """A part without the paragraphs that occurred before, short ones excepted; nothing if that is too little.

    Topics quote each other and docstrings are inherited and copied, and a paragraph that is in two documents
    could be trained on in one and be held out in the other.
    """
    if not _is_new(text, seen):
        return ""
    paragraphs = text.split("\n\n")
    short = {paragraph for paragraph in paragraphs if len(paragraph) < REPEATABLE_CHARS}
    fresh = [
        paragraph for paragraph in paragraphs if paragraph in short or paragraph == text or _is_new(paragraph, seen)
    ]
    return "\n\n".join(fresh) if len(fresh) == len(paragraphs) or not short.issuperset(fresh) else ""


def _is_new(text: str, seen: set[str]) -> bool:
    words = " ".join(text.split())
    new = words not in seen
    seen.add(words)
    return new


def _all_parts() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each document's title and its parts, (qualified name or nothing, prose)."""
    for title, text in _topics():
        yield title, [("", text)]
    # Parsing makes a million small objects; looking for garbage among them costs a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        root = Path(sysconfig.get_path("stdlib"))
        for path in sorted(root.rglob("*.py")):
            folders = path.relative_to(root).parent.parts
            if SKIPPED.isdisjoint(folders):
                module = ".".join([*folders, path.stem]).removesuffix(".__init__")
                yield f"The module {module}", _module_parts(path)
    finally:
        if collecting:
            gc.enable()
    for name in ["builtins", *sorted(sys.builtin_module_names)]:
        yield f"The built-in module {name}", _builtin_parts(importlib.import_module(name))


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):  # the long ones quote the others
        title, _, text = topics[name].strip().partition("\n")
        prose = _prose(text)
        if prose:
            yield title, prose


def _module_parts(path: Path) -> list[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # a file for another version of Python
        return []
    return [(name, prose) for name, doc in _docstrings(tree, "") if (prose := _prose(doc))]


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Docstrings of a module, its classes and functions, in the order of the file, with qualified names."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node)
        if doc:
            yield name, doc
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child, f"{name}.{child.name}" if name else child.name)


def _builtin_parts(module: ModuleType) -> list[tuple[str, str]]:
    """Docstrings of a module written in C, of its functions and classes, and of their methods."""
    found = [("", module.__doc__)]
    for name, value in sorted(vars(module).items()):
        if isinstance(value, type):
            found.append((name, value.__doc__))
            found += [
                (f"{name}.{key}", getattr(method, "__doc__", None)) for key, method in sorted(vars(value).items())
            ]
        elif callable(value):
            found.append((name, getattr(value, "__doc__", None)))
    return [(name, prose) for name, doc in found if isinstance(doc, str) and (prose := _prose(doc))]


def _prose(doc: str) -> str:
    """The sentences of a docstring: its paragraphs without sessions, grammar, rules and bare signatures."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(doc))
    kept = [text for paragraph in paragraphs if (text := _clean_paragraph(paragraph))]
    text = "\n\n".join(kept)
    return text if len(text.split()) >= 3 else ""


def _clean_paragraph(paragraph: str) -> str:
    lines = [line.rstrip() for line in paragraph.splitlines()]
    if any(PROMPT.match(line) or GRAMMAR.match(line) for line in lines):
        return ""
    kept = "\n".join(line for line in lines if not RULE_LINE.fullmatch(line) and not SIGNATURE.fullmatch(line))
    letters = sum(character.isalpha() or character.isspace() for character in kept)
    if letters < 0.85 * len(kept) and not kept.endswith((".", "!", "?", ":")):
        return ""  # lines of code
    return kept
