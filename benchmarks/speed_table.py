"""The tables of `docs/performance.md` and `README.md`, made from the figures of `speed.py`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from equality import EQUALITY, LIMIT, STEPS, furthest

LAYERS, WIDTH, CONTEXT = 8, 512, 512
"""Of the job `matrix-share`."""

HEAD: Final = "| | {unit} | × best peer | Memory (GB) | First step (s) | Last loss |\n|---|---:|---:|---:|---:|---:|"


def tables(results: Mapping[str, Any]) -> str:
    """All jobs that were measured, a table each."""
    parts = [equality_table(job) if name == EQUALITY else job_table(name, job) for name, job in results.items()]
    return "\n\n".join(parts)


def summary(results: Mapping[str, Any]) -> str:
    """One table: a row for each job that has peers, the first way of seedbed's beside the fastest of theirs."""
    lines = ["| | seedbed | the fastest of the others | × |", "|---|---:|---:|---:|"]
    for job in results.values():
        medians = job_medians(job) if "contenders" in job else {}
        theirs = {name: speed for name, speed in medians.items() if job["contenders"][name]["is_peer"]}
        if theirs:
            fastest = max(theirs, key=theirs.__getitem__)
            ours = next(speed for name, speed in medians.items() if name not in theirs)
            speeds = f"{spread([ours])} {job['unit']} | {spread([theirs[fastest]])} ({fastest})"
            lines.append(f"| {job['title']} | {speeds} | {ours / theirs[fastest]:.2f} |")
    return "\n".join(lines)


def job_table(name: str, job: Mapping[str, Any]) -> str:
    """A row for each contender, and what it was measured on."""
    best = best_peer(job)
    rows = [row(contender, entry, best, job["unit"]) for contender, entry in job["contenders"].items()]
    parts = [f"### {job['title']}", "\n".join([HEAD.format(unit=job["unit"]), *rows])]
    if name == "matrix-share":
        parts.append(share_said(job))
    return "\n\n".join([*parts, measured_on(job)])


def row(name: str, entry: Mapping[str, Any], best: float | None, unit: str) -> str:
    """One contender: medians, with the least and the most where it was run several times."""
    runs = [run for run in entry["runs"] if "error" not in run]
    if not runs:
        return f"| {name} | failed | | | | |"
    speeds = values(runs, "first_step_seconds" if unit == "s" else "speed")
    ratio = "" if best is None or entry["is_peer"] else f"{statistics.median(speeds) / best:.2f}"
    memory = f"{statistics.median(values(runs, 'peak_memory_mb')) / 1024:.2f}"
    first = figure(values(runs, "first_step_seconds"), ".1f")
    loss = figure(values(runs, "final_loss"), ".2f")
    return f"| {name} | {spread(speeds)} | {ratio} | {memory} | {first} | {loss} |"


def values(runs: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A figure of each run that has it."""
    return [run[name] for run in runs if run.get(name) is not None]


def figure(found: Sequence[float], form: str) -> str:
    """The median of what was found, if anything was."""
    return format(statistics.median(found), form) if found else ""


def spread(found: Sequence[float]) -> str:
    """The median, and from where to where: 512 (498–530)."""
    form = ",.1f" if max(found) < 100 else ",.0f"
    middle = format(statistics.median(found), form)
    return middle if len(found) == 1 else f"{middle} ({format(min(found), form)}–{format(max(found), form)})"


def best_peer(job: Mapping[str, Any]) -> float | None:
    """The highest median of a peer; None where no peer was measured."""
    peers = (speed for name, speed in job_medians(job).items() if job["contenders"][name]["is_peer"])
    return max(peers, default=None)


def job_medians(job: Mapping[str, Any]) -> dict[str, float]:
    """The median speed of each contender that has one."""
    speeds = {name: values(entry["runs"], "speed") for name, entry in job["contenders"].items()}
    return {name: statistics.median(found) for name, found in speeds.items() if found}


def flops_per_token(parameters: int) -> int:
    """Floating-point operations of a training step for each token: 6N + 12·L·d·T, as PaLM counts them (appendix B).

    The embeddings are tied, so that N has the output head, which multiplies, and no table besides, which does not.
    Attention is counted in full, though half of it is masked.
    """
    return 6 * parameters + 12 * LAYERS * WIDTH * CONTEXT


def share_said(job: Mapping[str, Any]) -> str:
    """What share of the machine's rate in bf16 products the contenders reach."""
    shares = []
    for name, entry in job["contenders"].items():
        if speeds := values(entry["runs"], "speed"):
            flops = flops_per_token(entry["runs"][0]["parameters"]) * statistics.median(speeds)
            shares.append(f"{name} {flops / 1e9 / job['machine']['bfloat16_gflops']:.0%}")
    return f"Share of the machine's measured rate of bf16 matrix products: {', '.join(shares)}."


def measured_on(job: Mapping[str, Any]) -> str:
    """The machine and the peers' versions, in a sentence each."""
    of = job["machine"]
    peers = ", ".join(f"{name} {version}" for name, version in job["peers"].items())
    runs = max(len(entry["runs"]) for entry in job["contenders"].values())
    return (
        f"{job['date']}, {runs} rounds. {of['cpu']}, {of['cores']} cores, {of['threads']} threads, "
        f"{' '.join(of['instruction_sets'])}; matrix products {of['float32_gflops']:,.0f} GFLOP/s in float32, "
        f"{of['bfloat16_gflops']:,.0f} in bf16; copies {of['copy_gb_per_second']} GB/s; load {of['load']:.1f} at the "
        f"start. seedbed with torch {of['torch']}; peers with {peers}."
    )


def equality_table(job: Mapping[str, Any]) -> str:
    """Losses of each way beside those of float32, and whether they are near enough."""
    lines = [
        f"### The same loss: {STEPS} steps of seedbed on the same data",
        "",
        "| | Way | Last training loss | Held-out loss | From float32 |",
        "|---|---|---:|---:|---:|",
    ]
    for shape, ways in job["runs"].items():
        plain = ways["float32"]["val_loss"]
        for way, loss in ways.items():
            away = loss["val_loss"] - plain
            lines.append(f"| {shape} | {way} | {loss['train_loss']:.4f} | {loss['val_loss']:.4f} | {away:+.4f} |")
    most = max(furthest(ways) for ways in job["runs"].values())
    verdict = "within" if most <= LIMIT else "NOT within"
    return "\n".join([*lines, "", f"The furthest is {most:.4f} nats away: {verdict} {LIMIT}. {job['date']}."])
