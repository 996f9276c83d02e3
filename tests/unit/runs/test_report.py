from __future__ import annotations

import json
import math
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from seedbed.errors import ConfigError, StorageError
from seedbed.runs.info import read_run
from seedbed.runs.report import page, write_report
from seedbed.runs.report.curves import POINTS, Line, figures_of_runs, mean_and_deviation, smooth, thin
from seedbed.runs.report.marks import marks_of
from seedbed.runs.series import Series, read_series

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> & \u202e \ud800 {{ 7 * 7 }}'

SUMMARY = {
    "status": "done",
    "steps": 300,
    "total_steps": 300,
    "tokens": 76800,
    "best_step": 250,
    "best_val_loss": 3.4,
    "best_val_ppl": 29.96,
    "bits_per_byte": 1.5,
    "train_loss": 3.2,
    "hours": 0.05,
    "peak_memory_mb": 520.0,
    "parameters": 3009792,
    "trainable_parameters": 3009792,
    "device": "cpu",
    "precision": "bf16",
    "forecast": {"peak_memory_mb": 500.0, "hours": 0.06},
    "notes": HOSTILE,
}
OPTIONS = {
    "regime": "scratch",
    "data": "book.txt",
    "model": "tiny",
    "learning_rate": 0.001,
    "max_grad_norm": 1.0,
    "seed": 0,
    "sources": {"data": "the command line", "learning_rate": "preset tiny", "max_grad_norm": "default"},
}
EVENTS: list[dict[str, Any]] = [
    {
        "event": "guardrail",
        "step": 0,
        "name": "warmup",
        "level": "warning",
        "message": "--warmup_steps 0: the first steps have the full learning rate",
        "evidence": {},
        "remedy": "Set --warmup_ratio 0.1 for a smoother start.",
    },
    {"event": "loss_spike", "step": 120, "loss": 9.0, "usual": 4.1, "times": 30.0, "grad_norm": 12.0},
    {"event": "skipped_step", "step": 180, "reason": "non-finite loss or gradient", "rows": [1, 2]},
    {"event": "resume", "step": 200, "checkpoint": "runs/a/checkpoints/step-200"},
    {"event": "forgetting", "step": 250, "limit": 0.05, "beyond": {"<b>plays</b>": 0.08}},
]


def records(steps: int, seed: int = 0) -> list[dict[str, float]]:
    """What training writes: a record a step, a validation every fifty."""
    noise = np.random.default_rng(seed)
    found = []
    for step in range(1, steps + 1):
        loss = 3.0 + 4.0 * math.exp(-step / 60) + noise.normal(0, 0.1) + (5.0 if step == 120 else 0.0)
        place = {"step": step, "epoch": step / 100, "tokens": step * 256, "elapsed_hours": step / 6000}
        found.append(
            {
                **place,
                "train_loss": loss,
                "train_ppl": math.exp(loss),
                "lr": 0.001 * (1 - step / (steps + 1)),
                "grad_norm": 0.5 + abs(noise.normal(0, 0.2)),
                "tokens_per_second": 3000 + noise.normal(0, 100),
                "memory_mb": 500.0 + min(step, 100) / 5,
                "data_share": 0.04,
            }
        )
        if step % 50 == 0:
            found.append({**place, "val_loss": 3.2 + 4.0 * math.exp(-step / 60), "val_loss/plays": 4.0 + step / 1000})
    return found


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(folder: Path, steps: int = 300, seed: int = 0, summary: Any = SUMMARY, **options: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**OPTIONS, "seed": seed, **options}), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(summary), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", records(steps, seed))
    samples = [{"step": step, "prompt": HOSTILE, "text": f"{HOSTILE} {step}"} for step in range(50, steps + 1, 50)]
    write_lines(folder / "samples.jsonl", samples)
    write_lines(folder / "events.jsonl", EVENTS)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "runs" / "<i>one</i>")


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return write_report([run]).read_text(encoding="utf-8")


def figures_in(html: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.DOTALL)
    assert found
    return list(json.loads(found[1]))


# The page


def test_it_is_one_file_in_the_run_folder(run: Path, html: str) -> None:
    path = run / "report.html"
    assert path.stat().st_size < 2_500_000
    assert not list(run.glob(".report*"))
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", html.split('id="figures"')[0])
    assert "default-src 'none'" in html


def test_a_checkpoint_stands_for_its_run(tiny_run: Path, tmp_path: Path) -> None:
    report = write_report([tiny_run / "checkpoints" / "final"], tmp_path / "deeper" / "page.html")
    assert f"<h1><bdi>{tiny_run.name}</bdi>" in report.read_text(encoding="utf-8")


def test_what_a_run_says_is_text(html: str) -> None:
    assert "alert(1)" in html
    assert "<script>alert" not in html and "<img" not in html and "<i>one" not in html and "<b>plays" not in html
    assert "{{ 7 * 7 }}" in html
    assert html.count("<script") == html.count("</script>") == 3


def test_forecast_stands_beside_what_came(html: str) -> None:
    rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>', html)
    assert ("peak memory", "500 MB", "520 MB", "+4.0 %") in rows
    assert ("time", "3.6 min", "3.0 min", "−16.7 %") in rows


def test_time_of_a_run_that_ended_early_is_not_held_against_its_forecast() -> None:
    rows = {row[0]: row[3] for row in page.forecast({**SUMMARY, "status": "time_limit"})}
    assert rows == {"peak memory": "+4.0 %", "time": "not run to its end"}


def test_guardrails_have_flags_to_copy(html: str) -> None:
    assert "Found before the first step" in html
    assert '<code>--warmup_ratio 0.1</code> <button type="button" class="copy">' in html


def test_findings_of_the_diagnosis_come_first(tmp_path: Path) -> None:
    bad = make_run(tmp_path / "bad", learning_rate=0.5)
    write_lines(bad / "metrics.jsonl", [{**record, "train_loss": 9.0} for record in records(300)])
    found = page.page_of_run(read_run(bad))["findings"]
    assert found and found[0]["level"] in ("warning", "error")
    html = write_report([bad]).read_text(encoding="utf-8")
    assert html.index('class="finding') < html.index('id="curves"')


def test_options_the_user_chose_come_first(run: Path) -> None:
    options = page.options(read_run(run))
    assert options["chosen"] == [("data", "book.txt", "the command line")]
    assert ("learning_rate", "0.001", "preset tiny") in options["rest"]


def test_many_samples_are_thinned_and_the_last_kept(tmp_path: Path) -> None:
    many = make_run(tmp_path / "many")
    write_lines(many / "samples.jsonl", [{"step": step, "prompt": "", "text": str(step)} for step in range(500)])
    ((prompt, shown, number),) = page.samples(read_run(many))
    assert (prompt, number, len(shown)) == ("", 500, page.MOST_SAMPLES)
    assert shown[0] == ("0", "0") and shown[-1] == ("499", "499")


# The curves


def test_plotly_accepts_the_figures(html: str) -> None:
    from plotly.graph_objects import Figure

    figures = figures_in(html)
    titles = [figure["layout"]["title"]["text"] for figure in figures]
    assert titles == ["Loss", "Perplexity", "Learning rate", "Gradient norm", "Speed", "Memory", "Making batches"]
    for figure in figures:
        Figure(figure)


def test_every_curve_has_all_axes(html: str) -> None:
    for trace in (trace for figure in figures_in(html) for trace in figure["data"]):
        lengths = {
            len(trace["y"]),
            len(trace["x"]),
            *(len(trace["meta"][axis]) for axis in ("tokens", "time", "epoch")),
        }
        assert len(lengths) == 1
    loss = figures_in(html)[0]["data"][0]
    assert loss["x"][9] == 10 and loss["meta"]["tokens"][9] == 2560
    assert loss["meta"]["epoch"][9] == 0.1 and loss["meta"]["time"][9] == 6  # seconds


def test_perplexity_is_that_of_the_smoothed_loss(html: str) -> None:
    loss, perplexity = figures_in(html)[:2]
    smoothed = next(trace for trace in loss["data"] if trace["name"] == "training")
    assert perplexity["data"][0]["y"] == pytest.approx(np.exp(smoothed["y"]), rel=1e-4)


def test_the_clipping_limit_is_a_line(html: str) -> None:
    (shape,) = figures_in(html)[3]["layout"]["shapes"]
    assert shape["y0"] == shape["y1"] == 1.0


def test_events_are_marked_where_they_happened(html: str) -> None:
    marks = {trace["legendgroup"]: trace for trace in figures_in(html)[0]["data"] if trace["meta"].get("mark")}
    places = {"loss spike": [120], "skipped step": [180], "resumed": [200], "forgetting": [250]}
    assert {name: marks[name]["x"] for name in places} == places
    assert marks["best checkpoint"]["x"] == [250]
    assert marks["loss spike"]["y"][0] > 7  # at the loss of its step
    assert marks["forgetting"]["text"] == ["forgetting at step 250: &lt;b&gt;plays&lt;/b&gt; +8.0 %"]


def test_thousands_of_marks_are_spread(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_lines(run / "events.jsonl", [{"event": "skipped_step", "step": step} for step in range(1, 3001)])
    skipped = [mark.step for mark in marks_of(read_run(run), []) if mark.kind.name == "skipped step"]
    assert len(skipped) == 100 and skipped[0] == 1 and skipped[-1] == 3000


def test_thinning_keeps_every_spike() -> None:
    values = np.sin(np.arange(100_003) / 5000)
    values[[7, 51_234, 100_002]] = 10, -10, 5
    kept = thin(values, POINTS)
    assert len(kept) <= POINTS + 4
    assert {0, 7, 51_234, 100_002} <= set(kept.tolist())
    assert np.all(np.diff(kept) > 0)


@pytest.mark.parametrize("count", [0, 1, 2, 1999, 2000, 2001, 2002])
def test_thinning_of_any_length(count: int) -> None:
    kept = thin(np.random.default_rng(0).normal(size=count), POINTS)
    assert len(kept) <= min(count, POINTS + 2)
    if count:
        assert kept[0] == 0 and kept[-1] == count - 1


def test_smoothing_keeps_straight_lines_and_steep_beginnings() -> None:
    line = np.arange(1000.0)
    assert smooth(line)[:900] == pytest.approx(line[:900])
    assert smooth(np.array([5.0]))[0] == 5.0
    steep = np.exp(-line / 5)
    assert smooth(steep)[0] == steep[0]


def test_a_group_of_seeds_is_its_mean_and_deviation(tmp_path: Path) -> None:
    runs = [read_series(make_run(tmp_path / f"seed-{seed}", steps=100 + 50 * seed, seed=seed)) for seed in range(3)]
    losses = [series["train_loss"] for series in runs]
    mean, deviation = mean_and_deviation(losses)
    assert mean.step.tolist() == list(range(1, 101))
    expected = np.stack([series.values[:100] for series in losses])
    assert mean.values == pytest.approx(expected.mean(axis=0))
    assert deviation == pytest.approx(expected.std(axis=0, ddof=1))


def test_seeds_without_a_common_step_are_not_averaged() -> None:
    early, late = (Series(step, step, step, step, step) for step in (np.array([1.0, 2.0]), np.array([8.0, 9.0])))
    mean, deviation = mean_and_deviation([early, late])
    assert mean.values.tolist() == [1.0, 2.0] and not deviation.any()


def test_runs_of_a_comparison_have_their_own_colours(tmp_path: Path) -> None:
    series = read_series(make_run(tmp_path / "run"))
    figures = figures_of_runs([Line(f"run {place}", [series]) for place in range(20)])
    lines = [(trace["line"]["color"], trace["line"]["dash"]) for trace in figures[0]["data"]]
    assert len(lines) == len(set(lines)) == 20
    assert all(len(trace["x"]) <= 304 for figure in figures for trace in figure["data"])


# Comparisons


def test_a_comparison_of_twenty(tmp_path: Path) -> None:
    from plotly.graph_objects import Figure

    runs = [
        make_run(tmp_path / f"rate-{rate}-seed-{seed}", seed=seed, learning_rate=1e-4 * (1 + rate))
        for rate in range(10)
        for seed in range(2)
    ]
    report = write_report(runs)
    assert report == tmp_path / "comparison.html"
    html = report.read_text(encoding="utf-8")
    assert report.stat().st_size < 5_000_000
    assert "20 runs compared" in html and "Options that differ" in html and "Answers" in html
    assert "<script>alert" not in html and "<img" not in html
    figures = figures_in(html)
    for figure in figures:
        Figure(figure)
    bands = [trace for trace in figures[1]["data"] if trace.get("fill") == "tonexty"]
    assert len(bands) == 10  # one for each pair of seeds
    assert set(re.findall(r"<bdi>(rate-\d-seed-\d)</bdi>", html)) == {run.name for run in runs}


def test_results_stand_first_and_the_best_is_marked(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path / f"run-{loss}", summary={**SUMMARY, "best_val_loss": loss}, learning_rate=loss)
        for loss in (3.5, 3.1, 3.3)
    ]
    table = page.runs_table([read_run(path) for path in paths])
    headings = [heading for heading, _ in table["headings"]]
    assert headings[:2] == ["run", "val loss"]
    assert [cells[1] for cells in table["rows"]] == [("3.5000", False), ("3.1000", True), ("3.3000", False)]
    assert ("status", "done") in table["same"]


# What may be wrong with a run


def empty(run: Path) -> None:
    for name in ("metrics.jsonl", "metrics.json", "samples.jsonl", "events.jsonl"):
        (run / name).unlink()


def nothing_recorded(run: Path) -> None:
    (run / "metrics.jsonl").write_text("")


def only_nan(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "train_loss": NaN, "lr": 0.1}\n{"step": 2, "train_loss": null}\n')


def one_step(run: Path) -> None:
    write_lines(run / "metrics.jsonl", records(1))


def half_written(run: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl", "events.jsonl"):
        path = run / name
        path.write_text(path.read_text()[:-20])


def no_validation(run: Path) -> None:
    rows = [record for record in records(60) if "train_loss" in record]
    write_lines(run / "metrics.jsonl", rows)
    (run / "samples.jsonl").unlink()


def only_validation(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [record for record in records(60) if "val_loss" in record])


def older(run: Path) -> None:
    (run / "metrics.json").write_text('{"status": "done", "steps": 3}')
    (run / "metrics.jsonl").write_text('{"step": 1, "train_loss": 3.0}\n{"step": 2, "train_loss": 2.0}\n')
    (run / "config.yaml").write_text("learning_rate: 0.1\n")


def odd_values(run: Path) -> None:
    summary = dict.fromkeys(SUMMARY, "much") | {
        "forecast": [1],
        "domains": {"a": 1, "b": {"before": 2}},
        "text": {"a": None},
        "judge": {"score": "x"},
    }
    (run / "metrics.json").write_text(json.dumps(summary))
    write_lines(run / "samples.jsonl", [{"text": None}, {"prompt": 3, "text": ["a"]}])
    write_lines(run / "events.jsonl", [{"event": "loss_spike", "step": "x"}, {"event": "guardrail"}, {"event": 3}])


FAULTS = [empty, nothing_recorded, only_nan, one_step, half_written, no_validation, only_validation, older, odd_values]


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_a_folder_holds_there_is_a_page(fault: Any, tmp_path: Path, run: Path) -> None:
    damaged = make_run(tmp_path / "run")
    fault(damaged)
    assert "</html>" in write_report([damaged]).read_text(encoding="utf-8")
    assert "2 runs compared" in write_report([damaged, run], tmp_path / "both.html").read_text(encoding="utf-8")


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run to report on"):
        write_report([])
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        write_report([tmp_path])


def test_a_place_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another --output"):
        write_report([run], tmp_path / "file" / "report.html")


def test_a_report_is_replaced_whole(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "report.html"
    output.write_text("the old one")

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(StorageError, match="No space left"):
        write_report([run], output)
    assert output.read_text() == "the old one"


def test_importing_it_is_cheap() -> None:
    look = "import sys, seedbed.runs.report; print([n for n in ('plotly', 'jinja2', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_libraries_import_is_not_needed_to_write(run: Path, tmp_path: Path) -> None:
    write = (
        "import sys; from pathlib import Path; from seedbed.runs.report import write_report; "
        "write_report([Path(sys.argv[1])], Path(sys.argv[2])); print('plotly' in sys.modules, 'torch' in sys.modules)"
    )
    words = [sys.executable, "-c", write, str(run), str(tmp_path / "report.html")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False False", done.stderr
    assert stat.S_ISREG((tmp_path / "report.html").stat().st_mode)
