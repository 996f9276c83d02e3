"""How well `seedbed diagnose` tells: a run of every trouble in examples/troubles, its sound twin, and healthy runs.

    python benchmarks/diagnosis.py --output DIR
    python benchmarks/diagnosis.py --output DIR --only overfitting padding

Every run is real, of a model so small that it takes seconds, and needs no network: its text is the documentation and
the code inside this Python. Runs that are finished in the folder are passed over. Results go to
benchmarks/results/diagnosis.json, and as tables into docs/diagnosis-results.md.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import random
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from commands import machine, put_between
from seedbed.cli import app
from seedbed.data.python_docs import python_docs
from seedbed.errors import DivergedError
from seedbed.runs.diagnose import NAMES, diagnose
from seedbed.runs.folder import read_summary

ROOT = Path(__file__).parents[1]
TROUBLES = ROOT / "examples/troubles"
RESULTS = ROOT / "benchmarks/results/diagnosis.json"
PAGE = ROOT / "docs/diagnosis-results.md"

BEGIN, END = "<!-- tables made by benchmarks/diagnosis.py -->", "<!-- end of tables -->"

AT_ONCE = 2
ENDED = ("done", "early_stopped", "diverged")


@dataclass(frozen=True)
class Recipe:
    """One run: what is typed, and what is to be said of it."""

    name: str
    verb: str
    flags: Mapping[str, Any]
    """Without their dashes. Paths that begin with `texts/` or `runs/` are below the folder in which runs are made."""
    expect: str = ""
    """The trouble that it shows; nothing where it is sound."""
    also: tuple[str, ...] = ()
    """What may rightly be said besides."""


# Recipes


def read_recipes() -> list[Recipe]:
    """Healthy runs, then every trouble with its sound twin behind it; of runs with the same flags the first alone."""
    common = _read("common.yaml")
    recipes = [
        Recipe(name, run["verb"], _given({**common[run["verb"]], **run["with"]}))
        for name, run in _read("healthy.yaml").items()
    ]
    for path in sorted(TROUBLES.glob("*.yaml")):
        if path.name not in ("common.yaml", "healthy.yaml"):
            recipes += _read_trouble(path, common)
    different: list[Recipe] = []
    for recipe in recipes:
        if not any((recipe.verb, recipe.flags) == (other.verb, other.flags) for other in different):
            different.append(recipe)
    return different


def _read_trouble(path: Path, common: Mapping[str, Any]) -> list[Recipe]:
    trouble = _read(path.name)
    verb = trouble["verb"]
    flags = {**common[verb], **trouble["with"]}
    return [
        Recipe(path.stem, verb, _given(flags), trouble["expect"], tuple(trouble.get("also", ()))),
        Recipe(f"{path.stem}-without", verb, _given({**flags, **trouble["without"]})),
    ]


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that stand for a default."""
    return {name: value for name, value in flags.items() if value is not None}


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((TROUBLES / name).read_text(encoding="utf-8"))
    return content


def needed_by(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The runs that some of these begin with."""
    named = {value for recipe in recipes for value in recipe.flags.values() if isinstance(value, str)}
    return [recipe for recipe in read_recipes() if f"runs/{recipe.name}" in named]


# Texts


def docs(num_chars: int, skip: int = 0) -> Iterator[str]:
    """Documentation, real English."""
    return _up_to(num_chars, (text[:4000] for text in python_docs()[skip:]))


def code(num_chars: int) -> Iterator[str]:
    """Python without its comments and docstrings, little like its documentation."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return _up_to(num_chars, (_without_prose(path)[:4000] for path in paths))


def _up_to(num_chars: int, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield text
        num_chars -= len(text)
        if num_chars <= 0:
            return


def _without_prose(path: Path) -> str:
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def questions(count: int) -> Iterator[dict[str, str]]:
    """What parts of Python do, answered with the first paragraph of documentation that stands in no other text here."""
    for document in python_docs()[340:]:
        title, *sections = document.split("\n\n")
        for section in sections if title.startswith("The module ") else ():
            name, _, text = section.partition("\n")
            if text and name.replace(".", "").replace("_", "").isalnum():
                yield {"question": f"What does {name} of {title.removeprefix('The module ')} do?", "answer": text}
                count -= 1
                if count == 0:
                    return


def answers(count: int, num_chars: int = 60) -> list[dict[str, str]]:
    """Questions with an answer of a few words."""
    return [{**row, "answer": row["answer"][:num_chars]} for row in questions(count)]


def uneven(count: int) -> list[dict[str, str]]:
    """Questions with an answer of a word or two, and every tenth with a page."""
    long = docs(10_000_000)
    return [{**row, "answer": next(long)[:900]} if at % 10 == 0 else row for at, row in enumerate(answers(count, 15))]


def poisoned(count: int) -> list[dict[str, str]]:
    """Questions with an answer of a few words, three of which are noise: signs in no order."""
    drawn = random.Random(0)
    rows = answers(count)
    for at in range(count // 6, count, count // 3):
        rows[at]["answer"] = "".join(chr(drawn.randrange(33, 127)) for _ in range(600))
    return rows


def numbers(count: int) -> list[str]:
    """Digits in no order."""
    drawn = random.Random(0)
    return ["".join(drawn.choices("0123456789", k=1000)) for _ in range(count)]


def chants(count: int) -> list[str]:
    """One of eight sentences, over and over."""
    sentences = [text.replace("\n", " ") for text in " ".join(docs(100_000)).split(". ") if 30 < len(text) < 60]
    return [f"{sentences[at % 8]}.\n" * (20 + at % 30) for at in range(count)]


def _text(documents: Iterable[str]) -> str:
    return "\n<|endoftext|>\n".join(documents)


def _rows(rows: Iterable[Mapping[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


TEXTS: dict[str, Callable[[], str]] = {
    "docs.txt": lambda: _text(docs(400_000)),
    "more.txt": lambda: _text(docs(200_000, skip=240)),
    "little.txt": lambda: _text(docs(40_000)),
    "tiny.txt": lambda: _text(docs(10_000)),
    "code.txt": lambda: _text(code(200_000)),
    "chants.txt": lambda: _text(chants(400)),
    "numbers.txt": lambda: _text(numbers(300)),
    "questions.jsonl": lambda: _rows(questions(1500)),
    "answers.jsonl": lambda: _rows(answers(600)),
    "poisoned.jsonl": lambda: _rows(poisoned(600)),
    "uneven.jsonl": lambda: _rows(uneven(600)),
}


def write_texts(recipes: Iterable[Recipe], folder: Path) -> None:
    """Write the texts of these recipes below a folder, what is there already excepted."""
    (folder / "texts").mkdir(parents=True, exist_ok=True)
    for name in texts_of(recipes):
        path = folder / "texts" / name
        if not path.exists():
            path.write_text(TEXTS[name](), encoding="utf-8")


def texts_of(recipes: Iterable[Recipe]) -> list[str]:
    """Names in `TEXTS`."""
    values = {f"{value}" for recipe in recipes for value in recipe.flags.values()}
    return sorted(value.removeprefix("texts/") for value in values if value.startswith("texts/"))


# Runs


def make_run(recipe: Recipe, folder: Path) -> Path:
    """Make the run with the command that a user would type, unless it is there.

    Raises:
        RuntimeError: the command failed; that a run diverges is no failure.
    """
    path = folder / "runs" / recipe.name
    if read_summary(path).get("status") in ENDED:
        return path
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        exit_code = app.run([recipe.verb, *_typed(recipe.flags, folder), "--output", str(path)])
    if exit_code not in (0, DivergedError.exit_code):
        raise RuntimeError(f"{recipe.name}: {said.getvalue()}")
    return path


def _typed(flags: Mapping[str, Any], folder: Path) -> Iterator[str]:
    for name, value in flags.items():
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no_{name}"
        else:
            below = isinstance(value, str) and value.startswith(("texts/", "runs/"))
            yield f"--{name}={folder / value if below else value}"


def make_runs(recipes: Sequence[Recipe], folder: Path) -> None:
    """Make these runs, and before them those that they begin with; some at once, a thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers read it when they import torch
    first = needed_by(recipes)
    with ProcessPoolExecutor(AT_ONCE, get_context("spawn")) as workers:
        for some in (first, [recipe for recipe in recipes if recipe not in first]):
            for made in as_completed([workers.submit(make_run, recipe, folder) for recipe in some]):
                sys.stderr.write(f"{made.result().name}\n")


# What is said of them


def look(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """A run with what is found in it."""
    path = folder / "runs" / recipe.name
    summary = read_summary(path)
    return {
        "name": recipe.name,
        "verb": recipe.verb,
        "expect": recipe.expect,
        "also": recipe.also,
        "status": summary.get("status"),
        "steps": summary.get("steps"),
        "seconds": round(3600 * summary.get("hours", 0.0), 1),
        "findings": [
            {"name": finding.name, "level": finding.level, "text": f"{finding}".replace(f"{folder}/", "")}
            for finding in diagnose(path)
        ],
    }


def level_of(run: Mapping[str, Any], rule: str) -> str:
    """How seriously a rule takes a run; nothing where it says nothing."""
    return next((finding["level"] for finding in run["findings"] if finding["name"] == rule), "")


def alarms(run: Mapping[str, Any]) -> list[str]:
    """Rules that say more than a note."""
    return [finding["name"] for finding in run["findings"] if finding["level"] != "note"]


def score(rule: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the runs that show a trouble, those that were named; of all the alarms, those that are right."""
    bad = [run for run in runs if run["expect"] == rule]
    named = [level for run in bad if (level := level_of(run, rule))]
    others = [run for run in runs if run["expect"] != rule and rule in alarms(run)]
    wrong = [run["name"] for run in others if rule not in run["also"]]
    right = len(named) + len(others) - len(wrong)
    return {
        "rule": rule,
        "bad": len(bad),
        "named": len(named),
        "levels": sorted(set(named)),
        "recall": len(named) / len(bad) if bad else None,
        "wrong": wrong,
        "precision": right / (right + len(wrong)) if right or wrong else None,
    }


def tables(scores: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| rule | runs that show it | named | as | wrong alarms | recall | precision |",
        "|---|--:|--:|---|---|--:|--:|",
    ]
    for row in scores:
        wrong, levels = ", ".join(row["wrong"]) or "none", ", ".join(row["levels"])
        shares = " | ".join("" if row[name] is None else f"{row[name]:.0%}" for name in ("recall", "precision"))
        lines.append(f"| {row['rule']} | {row['bad']} | {row['named']} | {levels} | {wrong} | {shares} |")
    sound = [run for run in runs if not run["expect"]]
    quiet = sum(not alarms(run) for run in sound)
    lines += ["", f"Of {len(sound)} sound runs, {quiet} have nothing above a note:", ""]
    lines += ["| sound run | verb | steps | what is said |", "|---|---|--:|---|"]
    for run in sound:
        said = ", ".join(f"{finding['name']} ({finding['level']})" for finding in run["findings"]) or "nothing"
        lines.append(f"| {run['name']} | {run['verb']} | {run['steps']} | {said} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for texts and runs")
    parser.add_argument("--only", nargs="*", help="recipes to make and look at; the results are left as they are")
    arguments = parser.parse_args()
    recipes = [recipe for recipe in read_recipes() if not arguments.only or recipe.name in arguments.only]
    folder = arguments.output.resolve()
    write_texts([*needed_by(recipes), *recipes], folder)
    make_runs(recipes, folder)
    runs = [look(recipe, folder) for recipe in recipes]
    scores = [score(rule, runs) for rule in NAMES]
    if arguments.only:
        sys.stdout.write(json.dumps(runs, indent=2) + "\n")
        return
    RESULTS.write_text(json.dumps({"machine": machine(), "rules": scores, "runs": runs}, indent=2) + "\n")
    put_between(PAGE, BEGIN, tables(scores, runs), END)


if __name__ == "__main__":
    main()
