"""What adding domains does to a model, method by method: what it gains, what it forgets, time and memory.

    python benchmarks/continual.py --pretrained FOLDER --data FOLDER_OF_TEXTS
    python benchmarks/continual.py --pretrained FOLDER --data FOLDER_OF_TEXTS --only small

Three domains: Shakespeare, Python's documentation, WikiText. Two models: a pretrained one, whose general text is one
half of WikiText's articles, and a small one trained here on WikiText first. A tenth of every text is set apart before
anything else and only measured with, after each run: no run sees it, neither to learn, nor to stop, nor to choose.

Every run is one `seedbed` command in a process of its own; the script prints each before it starts it, and passes over
those that are done. Results go to benchmarks/results/continual.json, and as tables into docs/continual-results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import seedbed
from commands import command, machine, put_between
from seedbed.data import open_source
from seedbed.data.store import digest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/continual.json"
COSTS = ROOT / "benchmarks/results/continual_cost.json"
PAGE = ROOT / "docs/continual-results.md"

TEST_CHARS = 25_000

BEGIN, END = "<!-- tables made by benchmarks/continual.py -->", "<!-- end of tables -->"

WITHIN = "--interpolate --max_forgetting 0.01 --on_forgetting warn"
"""Trains to its end, then takes the best mixture of old and new weights within the limit."""

METHODS: dict[str, str] = {
    "naive": "--method naive",
    "replay 5 %": "--replay 0.05",
    "replay 1 %": "--replay 0.01",
    "self-replay": "--self_replay 0.1",
    "L2-SP": "--method l2_sp",
    "EWC": "--method ewc",
    "KL": "--method kl",
    "interpolation": "--method interpolate",
    "replay 5 % + L2-SP": "--replay 0.05 --l2_sp 0.02",
    "replay 5 % + weak L2-SP": "--replay 0.05 --l2_sp 0.01",
    "replay 5 % + EWC": "--replay 0.05 --ewc 10",
    "self-replay + L2-SP": "--self_replay 0.1 --l2_sp 0.02",
    "replay 25 % + weak L2-SP": "--replay 0.25 --l2_sp 0.01",
    "replay 5 % + weak L2-SP, within 1 %": f"--replay 0.05 --l2_sp 0.01 {WITHIN}",
    "replay 25 % + weak L2-SP, within 1 %": f"--replay 0.25 --l2_sp 0.01 {WITHIN}",
    "LoRA": "--method naive --lora",
    "last blocks": "--method naive --last_blocks {half}",
}
"""The parts, alone and together. Those without `replay` use no stored text of what the model knew."""

LIMITED = ("replay 5 % + weak L2-SP, within 1 %", "replay 25 % + weak L2-SP, within 1 %")
CHAINED = ("naive", "replay 5 % + weak L2-SP", "replay 25 % + weak L2-SP", "self-replay + L2-SP", *LIMITED)
"""Methods that also learn all domains, one after the other."""


@dataclass(frozen=True)
class Setting:
    """A model, the text that it knows, and the orders in which it learns the others."""

    flags: str
    old: str
    orders: tuple[tuple[str, ...], ...]
    half: int
    """Blocks that `last blocks` trains."""
    seeds: tuple[int, ...] = (0, 1, 2)


SETTINGS = {
    "small": Setting(
        "--max_seq_len 256 --batch_size 8 --max_steps 80 --eval_every 80 --val_split 0.05",
        "wikitext",
        (("shakespeare", "python"), ("python", "shakespeare")),
        3,
    ),
    "pretrained": Setting(
        "--max_seq_len 128 --batch_size 4 --max_steps 40 --eval_every 40 --val_split 0.02 --learning_rate 1e-4",
        "general",
        (("shakespeare", "python", "wikitext"), ("python", "wikitext", "shakespeare")),
        15,
    ),
}


@dataclass(frozen=True)
class Run:
    """One domain learnt by one method, after those before it in `path`."""

    setting: str
    method: str
    seed: int
    path: tuple[str, ...]

    @property
    def name(self) -> str:
        """How results are kept."""
        return f"{self.setting} | {self.method} | seed {self.seed} | {' > '.join(self.path)}"

    @property
    def folder(self) -> str:
        """Where it goes, below the output folder."""
        method = "".join(letter if letter.isalnum() else "-" for letter in self.method)
        return f"{self.setting}/{method}/seed-{self.seed}/{'-'.join(self.path)}"

    @property
    def before(self) -> Run | None:
        """The run that this one begins from."""
        return Run(self.setting, self.method, self.seed, self.path[:-1]) if len(self.path) > 1 else None


def main() -> None:
    """Run what is missing, then write the page."""
    options = parse()
    output = Path(options.output)
    texts = divide(Path(options.data), output / "texts")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"machine": machine(), "before": {}, "runs": {}}
    results["threads_a_run"] = threads = max(1, torch.get_num_threads() // options.jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    models = {"pretrained": Path(options.pretrained), "small": output / "small-model"}
    settings = [options.only] if options.only else list(SETTINGS)
    if "small" in settings:
        pretrain(models["small"], texts)
    for setting in settings:
        if setting not in results["before"]:
            results["before"][setting] = measured(models[setting], texts)
            keep(results)
    wanted = [run for run in runs(settings, options) if len(run.path) <= options.depth]
    for depth in range(1, 1 + max(len(run.path) for run in wanted)):
        missing = [run for run in wanted if len(run.path) == depth and run.name not in results["runs"]]
        with ThreadPoolExecutor(options.jobs) as pool:
            jobs = {pool.submit(learn, run, models, texts, output): run for run in missing}
            for job in as_completed(jobs):
                results["runs"][jobs[job].name] = job.result()
                keep(results)
    write_page(results)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="the pretrained model's folder")
    parser.add_argument("--data", required=True, help="the folder of tinyshakespeare.txt and wikitext-2-valid.txt")
    parser.add_argument("--output", default="runs/continual", help="where the runs go")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--only", choices=SETTINGS, help="one of the models")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--orders", type=int, default=2, help="how many of the orders")
    parser.add_argument("--depth", type=int, default=3, help="domains in a row, at most")
    return parser.parse_args()


def runs(settings: Iterable[str], options: argparse.Namespace) -> Iterator[Run]:
    """Every method on the first domain of each order, some of them on all domains."""
    for setting in settings:
        for seed in options.seeds:
            for order in SETTINGS[setting].orders[: options.orders]:
                for method in options.methods:
                    depth = len(order) if method in CHAINED else 1
                    yield from (Run(setting, method, seed, order[:length]) for length in range(1, depth + 1))


def divide(data: Path, folder: Path) -> dict[str, dict[str, Path]]:
    """Each text as documents in two files: `train`, of which a run holds some out, and `test`."""
    sources = {
        "shakespeare": str(data / "tinyshakespeare.txt"),
        "python": "python-docs",
        "all of wikitext": str(data / "wikitext-2-valid.txt"),
    }
    documents = {name: list(open_source(spec).documents()) for name, spec in sources.items()}
    articles = documents.pop("all of wikitext")
    documents["wikitext"], documents["general"] = articles[::2], articles[1::2]
    files: dict[str, dict[str, Path]] = {}
    for name, texts in documents.items():
        parts: dict[str, list[str]] = {"train": [], "test": []}
        for text in texts:
            apart = digest(text.encode()) % 10 == 0
            room = sum(map(len, parts["test"])) + len(text) <= TEST_CHARS
            if apart and room:
                parts["test"].append(text)
            elif not apart:
                parts["train"].append(text)
        folder.mkdir(parents=True, exist_ok=True)
        files[name] = {part: folder / f"{name}-{part}.jsonl" for part in parts}
        for part, some in parts.items():
            lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in some)
            files[name][part].write_text("".join(lines), encoding="utf-8")
    return files


def pretrain(folder: Path, texts: dict[str, dict[str, Path]]) -> None:
    """The small model: both halves of WikiText's articles, until it gets no better."""
    if not (folder / "metrics.json").exists() or json.loads((folder / "metrics.json").read_text())["status"] != "done":
        joined = folder.with_name("all-of-wikitext.jsonl")
        joined.parent.mkdir(parents=True, exist_ok=True)
        joined.write_text("".join(texts[name]["train"].read_text(encoding="utf-8") for name in ("wikitext", "general")))
        command(
            f"pretrain --data {joined} --model tiny --epochs 6 --output {folder} --no_tensorboard --eval_every 1000"
        )


def learn(run: Run, models: dict[str, Path], texts: dict[str, dict[str, Path]], output: Path) -> dict[str, Any]:
    """One domain learnt, and how the model does on the test text of all of them."""
    setting = SETTINGS[run.setting]
    begin = output / run.before.folder if run.before else models[run.setting]
    folder, domain = output / run.folder, run.path[-1]
    flags = [
        f"--model {begin} --data {texts[domain]['train']} --domain {domain} --output {folder} --seed {run.seed}",
        setting.flags,
        METHODS[run.method].format(half=setting.half),
        "--no_tensorboard --keep_checkpoints 1 --save_every 100000",
    ]
    if run.setting == "pretrained" and not run.before:
        flags.append(f"--general_data {texts['general']['train']}")
    facts = command(f"continue {' '.join(flags)}")
    kept = ("steps", "tokens", "hours", "peak_memory_mb", "trainable_parameters", "method", "domains")
    known = {name: texts[name] for name in (setting.old, *run.path)}
    result = {**{key: facts[key] for key in kept}, "test": measured(folder, known)}
    forget_checkpoints(folder, run)
    return result


def forget_checkpoints(folder: Path, run: Run) -> None:
    """Delete weights that nothing begins from."""
    deepest = len(run.path) == (len(SETTINGS[run.setting].orders[0]) if run.method in CHAINED else 1)
    for checkpoint in (folder / "checkpoints").iterdir():
        if deepest or checkpoint.name != "best":
            shutil.rmtree(checkpoint)


def measured(model: Path, texts: dict[str, dict[str, Path]]) -> dict[str, dict[str, float]]:
    """Loss and bits per byte on the test text of every domain."""
    loaded = seedbed.load(model, device="cpu")
    figures = {name: loaded.evaluate(str(files["test"]), max_seq_len=256) for name, files in texts.items()}
    return {name: {"loss": f.nats_per_token, "bits_per_byte": f.bits_per_byte} for name, f in figures.items()}


def keep(results: dict[str, Any]) -> None:
    """Save after every run, beside what another process has saved meanwhile."""
    if RESULTS.exists():
        saved = json.loads(RESULTS.read_text(encoding="utf-8"))
        for part in ("before", "runs"):
            results[part] = {**saved[part], **results[part]}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def write_page(results: dict[str, Any]) -> None:
    """Put the tables between their marks."""
    put_between(PAGE, BEGIN, tables(results), END)


def tables(results: dict[str, Any]) -> str:
    """Markdown: the first domain by every method, then the chains."""
    parts = []
    for name, setting in SETTINGS.items():
        if name not in results["before"]:
            continue
        parts.append(f"### The {name} model")
        for order in setting.orders:
            if Run(name, "naive", setting.seeds[0], order[:1]).name in results["runs"]:
                parts.append(f"Learning **{order[0]}**, knowing {setting.old}:")
                parts.append(method_table(results, name, order[0]))
        parts.append("One domain after the other: bits per byte at the end, against right after each was learnt:")
        parts.append(chain_table(results, name))
    flags = (f"| {method} | `{given}` |" for method, given in METHODS.items())
    parts.append("### The methods\n\n" + "\n".join(["| method | flags |", "|---|---|", *flags]))
    shared = (f"| {name} | `{setting.flags}` |" for name, setting in SETTINGS.items())
    parts.append("\n".join(["| model | flags that all its runs share |", "|---|---|", *shared]))
    return "\n\n".join(parts)


def method_table(results: dict[str, Any], setting: str, domain: str) -> str:
    """A row a method: gain and forgetting, and their shares of the naive run's, seed by seed."""
    lines = [
        "| method | gain, bits/byte | rise on the old | gain kept | forgetting avoided | time a token | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    old, before = SETTINGS[setting].old, results["before"][setting]
    for method in METHODS:
        rows = []
        for seed in SETTINGS[setting].seeds:
            run, naive = (results["runs"].get(Run(setting, m, seed, (domain,)).name) for m in (method, "naive"))
            if run and naive:
                gain, most = (
                    before[domain]["bits_per_byte"] - r["test"][domain]["bits_per_byte"] for r in (run, naive)
                )
                rise, worst = (r["test"][old]["bits_per_byte"] - before[old]["bits_per_byte"] for r in (run, naive))
                rows.append((gain, rise, gain / most, 1 - rise / worst, run["peak_memory_mb"]))
        if not rows:
            continue
        gain, rise, kept, avoided, memory = (spread(column) for column in zip(*rows, strict=True))
        lines.append(
            f"| {method} | {gain('.3f')} | {rise('+.3f')} | {kept('.1%')} | {avoided('.1%')} | "
            f"{time_a_token(method)} | {memory(',.0f')} MB |"
        )
    return "\n".join(lines)


def time_a_token(method: str) -> str:
    """What the method costs, as benchmarks/continual_cost.py measured it on the pretrained model."""
    costs = json.loads(COSTS.read_text(encoding="utf-8"))["by_method"] if COSTS.exists() else {}
    return f"×{costs[method]['against_naive']:.2f}" if method in costs else ""


def spread(values: tuple[float, ...]) -> Callable[[str], str]:
    """A mean and, of several, half the distance from the least to the greatest, both written in a format."""

    def write(form: str) -> str:
        mean = format(statistics.fmean(values), form)
        half = format((max(values) - min(values)) / 2, form.removeprefix("+"))
        return mean if len(values) == 1 else f"{mean} ± {half}"

    return write


def chain_table(results: dict[str, Any], setting: str) -> str:
    """A row for each chain that was learnt to its end: every text at the end, against when it was last learnt."""
    lines = [
        "| method | order | seeds | " + " | ".join(f"{n + 1}." for n in range(4)) + " |",
        "|---|---|---|" + "---|" * 4,
    ]
    before = results["before"][setting]
    for method in CHAINED:
        for order in SETTINGS[setting].orders:
            columns: dict[str, list[float]] = {}
            for seed in SETTINGS[setting].seeds:
                chain = [
                    results["runs"].get(Run(setting, method, seed, order[: n + 1]).name) for n in range(len(order))
                ]
                if not all(chain):
                    continue
                learnt = [before, *(run["test"] for run in chain if run)]
                for place, text in enumerate((SETTINGS[setting].old, *order)):
                    then, now = learnt[place][text]["bits_per_byte"], learnt[-1][text]["bits_per_byte"]
                    columns.setdefault(text, []).append(now / then - 1)
            if columns:
                count = len(next(iter(columns.values())))
                cells = [f"{text} {spread(tuple(rises))('+.1%')}" for text, rises in columns.items()]
                cells += [""] * (4 - len(cells))
                lines.append(f"| {method} | {' > '.join(order)} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
