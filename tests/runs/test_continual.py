"""Continual adaptation as whole runs: what is remembered, what is measured, what is held, and what can be undone."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import seedbed
from seedbed.adapter import base_name
from seedbed.checkpoint import load_model
from seedbed.cli.app import run
from seedbed.config import FLAGS, STRENGTHS, Config, Layer, read_config_file, resolve
from seedbed.data import Reading
from seedbed.data.overlap import find_overlap
from seedbed.data.replay import MixedRows
from seedbed.generate import Completion
from seedbed.generate import generate as write
from seedbed.model.decoder import Decoder
from seedbed.model.weights import load_decoder
from seedbed.runs.history import BASE, Figure, History, Stage, find_history, read_documents, read_history
from seedbed.runs.lineage import forgetting
from seedbed.train import build, loop
from seedbed.train.continual import conclude, holding
from seedbed.train.continual.memory import Memory, model_fingerprint, stage_folder
from seedbed.train.continual.methods import WITH_STORED_TEXT, WITHOUT_STORED_TEXT, choose_methods
from seedbed.train.corpus import open_texts, store_documents, validation_rows
from seedbed.train.job import Job
from seedbed.train.measure import measure
from seedbed.train.progress import Display
from seedbed.train.resume import Start, open_run
from seedbed.train.run import run_training
from tests.runs.conftest import KEEPING, RunIt, read_metrics, read_state

Make = Callable[[str], Path]
Keeping = Callable[..., Config]
IDS = torch.arange(3, 63).reshape(2, 30)

HARD: dict[str, Any] = {"learning_rate": 1e-2, "max_steps": 20, "eval_every": 20, "save_every": 20}
"""Enough to forget the base by a seventh."""


@pytest.fixture(scope="session")
def two_domains(tmp_path_factory: pytest.TempPathFactory, keeping: Keeping) -> tuple[Path, Path]:
    """The runs of code learnt after the base, and of documentation learnt after code. To be read, not changed."""
    first, second = tmp_path_factory.mktemp("chain") / "first", tmp_path_factory.mktemp("chain") / "second"
    run_training(keeping(first, eval_every=2), Console(quiet=True))
    run_training(keeping(second, data="docs", model=str(first), eval_every=2), Console(quiet=True))
    return first, second


@pytest.fixture(scope="session")
def naive(tmp_path_factory: pytest.TempPathFactory, keeping: Keeping) -> Path:
    """A run that learns code, and forgets. To be read, not changed."""
    output = tmp_path_factory.mktemp("naive") / "run"
    run_training(keeping(output, method="naive", **HARD), Console(quiet=True))
    return output


def build_job(config: Config) -> Job:
    """A job that is ready to train."""
    start = open_run(config)
    assert isinstance(start, Start)
    job = build.build_job(start, quiet_display())
    job.run.close()
    return job


def quiet_display() -> Display:
    return Display(Console(file=io.StringIO()), 100)


def history_of(output: Path) -> History:
    history = find_history(output)
    assert history is not None
    return history


def weights(folder: Path) -> bytes:
    [path] = [path for path in folder.glob("*.safetensors") if path.is_file()]
    return path.read_bytes()


def best(output: Path) -> Path:
    return output / "checkpoints/best"


def rises(output: Path) -> dict[str, float]:
    """How much worse, or better, each domain became."""
    domains = json.loads((output / "metrics.json").read_text())["domains"]
    return {name: figures["forgetting"] for name, figures in domains.items()}


@torch.no_grad()
def logits_of(model: Decoder) -> torch.Tensor:
    return model.eval().logits(model(IDS))


def parameters_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in load_decoder(folder).named_parameters()}


@torch.no_grad()
def loss_by_transformers(model: Any, folder: Path, stage: Stage, config: Config) -> Figure:
    """A stage's stored held-out text, each piece of each document in each row alone through transformers."""
    documents = list(read_documents(folder / "seedbed/domains" / stage.domain / "held_out.jsonl"))
    tokenizer = load_model(folder)[1]
    store = store_documents(documents, "text", Reading(tokenizer), "held-out", quiet_display())
    held_out = validation_rows(store, config.data, config.training.seed)
    total, targets = 0.0, 0
    for index in range(len(held_out.rows)):
        row = held_out.rows.row(0, index)
        for segment in set(row.segment_ids.tolist()):
            here = row.segment_ids == segment
            inputs, labels = torch.from_numpy(row.input_ids[here]), torch.from_numpy(row.labels[here])
            logits = model(inputs[None]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            targets += int((labels != -100).sum())
    return Figure(total / targets, total / (sum(len(text.encode()) for text in documents) * 0.6931471805599453))


# What is remembered


def test_a_model_remembers_its_domains_in_their_order(
    two_domains: tuple[Path, Path], pretrained: Make, domain_text: Make, small_text_file: Path
) -> None:
    first, second = two_domains
    for name in ("best", "final"):
        folder = second / "checkpoints" / name
        history = read_history(folder)
        assert history is not None
        assert history.domains == [BASE, "code", "docs"]
        base, code, docs = history.stages
        assert [Path(stage.model) for stage in history.stages] == [pretrained("llama"), best(first), best(second)]
        assert [stage.fingerprint for stage in history.stages] == [
            model_fingerprint(Path(stage.model)) for stage in history.stages
        ]
        assert [stage.run for stage in history.stages] == [None, str(first), str(second)]
        assert [stage.data for stage in history.stages] == [
            str(path) for path in (small_text_file, domain_text("code"), domain_text("docs"))
        ]
        assert docs.method == {**WITH_STORED_TEXT, "learning_rate": 5e-3}
        assert "base, code" in docs.why
        assert (set(code.before), set(code.after)) == ({BASE, "code"}, {BASE, "code"})
        assert (set(docs.before), set(docs.after)) == ({BASE, "code", "docs"}, {BASE, "code", "docs"})
        assert docs.before[BASE] == code.after[BASE]
        assert docs.before["code"] == code.after["code"]
        assert (docs.steps, docs.max_seq_len) == (4, 64)
        assert docs.tokens > 0 < docs.hours
    assert base.after == {}


def test_the_texts_of_a_domain_are_kept_with_it(two_domains: tuple[Path, Path], pretrained: Make) -> None:
    first, second = two_domains
    for output, domain in ((pretrained("llama").parent.parent, BASE), (first, "code"), (second, "docs")):
        options = read_config_file(str(output / "config.yaml")).values
        texts = open_texts(
            resolve("scratch", [Layer(FLAGS, {"data": options["data"], "model": "tiny"})]).data,
        )
        stage = history_of(second).stage(domain)
        assert stage is not None
        for kind, expected in (("held_out", texts.held_out_documents()), ("reserve", texts.training_documents())):
            kept = list(read_documents(best(second) / f"seedbed/domains/{domain}/{kind}.jsonl"))
            assert sorted(kept) == sorted(expected)
            assert getattr(stage, f"{kind}_documents") == len(kept) > 0
            assert getattr(stage, f"{kind}_bytes") == sum(len(text.encode()) for text in kept)


def test_figures_are_what_transformers_finds(two_domains: tuple[Path, Path], keeping: Keeping) -> None:
    transformers = pytest.importorskip("transformers")
    first, second = two_domains
    config = keeping(second, data="docs", model=str(first))
    docs = history_of(second).stages[-1]
    for output, figures in ((first, docs.before), (second, docs.after)):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(best(output)).eval()
        for stage in history_of(second).stages:
            found = loss_by_transformers(theirs, best(second), stage, config)
            assert found.loss == pytest.approx(figures[stage.domain].loss, rel=1e-5)
            assert found.bits_per_byte == pytest.approx(figures[stage.domain].bits_per_byte, rel=1e-5)


def test_a_model_with_a_history_opens_in_transformers(
    two_domains: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    for name in ("best", "final"):
        folder = two_domains[1] / "checkpoints" / name
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            torch.testing.assert_close(logits_of(load_model(folder)[0]), theirs(IDS).logits, atol=1e-5, rtol=1e-4)
        assert run(["verify", str(folder)]) == 0
        assert "is intact" in capsys.readouterr().out


def test_curves_of_all_that_was_known(two_domains: tuple[Path, Path]) -> None:
    for output, earlier in zip(two_domains, ([BASE], [BASE, "code"]), strict=True):
        validations = [record for record in read_metrics(output) if "val_loss" in record]
        assert [record["step"] for record in validations] == [2, 4]
        for record in validations:
            assert {f"val_loss/{domain}" for domain in earlier} == {name for name in record if "val_loss/" in name}
        summary = json.loads((output / "metrics.json").read_text())
        stage = history_of(output).stages[-1]
        assert summary["best_step"] == 4
        for domain in earlier:
            assert stage.after[domain].loss == pytest.approx(validations[-1][f"val_loss/{domain}"], rel=1e-6)
            expected = forgetting(stage.before[domain], stage.after[domain])
            assert summary["domains"][domain]["forgetting"] == expected
            assert summary["domains"][domain]["before"] == vars(stage.before[domain])
            assert summary["domains"][domain]["after"] == vars(stage.after[domain])
        assert (summary["domain"], summary["method"]) == (stage.domain, dict(stage.method))


def test_tensorboard_has_a_curve_for_each_domain(keep_it: RunIt, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    keep_it(tmp_path / "run", tensorboard=True, eval_every=2)
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    for tag in ("validation/loss", f"validation/loss/{BASE}"):
        assert [event.step for event in events.Scalars(tag)] == [2, 4]


def test_the_learning_rate_is_half_of_what_the_model_was_trained_with(two_domains: tuple[Path, Path]) -> None:
    for output in two_domains:
        values = read_config_file(str(output / "config.yaml")).values
        assert values["learning_rate"] == 5e-3
        assert json.loads((output / "metrics.json").read_text())["method"]["learning_rate"] == 5e-3


def test_a_learning_rate_that_was_given_stays(keeping: Keeping, two_domains: tuple[Path, Path], tmp_path: Path) -> None:
    job = build_job(keeping(tmp_path / "run", data="qa", model=str(two_domains[1]), learning_rate=1e-4))
    assert job.training.learning_rate == 1e-4
    adapters = build_job(keeping(tmp_path / "lora", data="qa", model=str(two_domains[1]), lora=True))
    assert adapters.training.learning_rate == 2e-4


# Stopping and going on

RESUMED: dict[str, dict[str, Any]] = {
    "replay": {"method": "replay", "replay": 0.2},
    "everything": {
        "method": "self_replay,l2_sp,ewc,kl",
        "replay": 0.1,
        "interpolate": True,
        "dropout": 0.1,
        "max_forgetting": 0.5,
    },
    "lora": {"lora": True, "method": "kl,interpolate", "replay": 0.1},
}


def same_stage(a: Path, b: Path) -> None:
    """The same weights under both names, the same curves, and a history that differs in places and hours alone."""
    for name in ("best", "final"):
        one, other = a / "checkpoints" / name, b / "checkpoints" / name
        assert weights(one) == weights(other), name
        ours, theirs = read_history(one), read_history(other)
        assert ours is not None
        assert theirs is not None
        assert ours.stages[:-1] == theirs.stages[:-1]
        told = [dict(vars(history.stages[-1])) for history in (ours, theirs)]
        for facts in told:
            for name_of_fact in ("model", "run", "hours", "peak_memory_mb"):
                facts.pop(name_of_fact)
        assert told[0] == told[1]
    assert read_state(a / "checkpoints/final") == read_state(b / "checkpoints/final")
    assert read_metrics(a) == read_metrics(b)
    assert (
        json.loads((a / "metrics.json").read_text())["domains"]
        == json.loads((b / "metrics.json").read_text())["domains"]
    )


@pytest.mark.parametrize("kind", RESUMED)
def test_stopping_changes_nothing(keep_it: RunIt, tmp_path: Path, kind: str) -> None:
    options = {"max_steps": 6, "eval_every": 3, "save_every": 2, **RESUMED[kind]}
    assert keep_it(tmp_path / "straight", **options).exit_code == 0
    for stop_at in (1, 3, 4):
        stopped = keep_it(tmp_path / "often", stop_at=stop_at, **options)
        assert (stopped.exit_code, stopped.summary["status"]) == (130, "interrupted")
    assert keep_it(tmp_path / "often", **options).exit_code == 0
    same_stage(tmp_path / "straight", tmp_path / "often")


def test_killed_before_any_checkpoint(keep_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"method": "self_replay,ewc", "max_steps": 3}
    keep_it(tmp_path / "straight", **options)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "take_step", killed)
        keep_it(tmp_path / "killed", **options)
    assert not any((tmp_path / "killed/checkpoints").iterdir())
    monkeypatch.setattr(holding, "generate", killed)  # the text is there, and so is what weights matter
    monkeypatch.setattr(holding, "diagonal_fisher", killed)
    assert keep_it(tmp_path / "killed", **options).exit_code == 0
    same_stage(tmp_path / "straight", tmp_path / "killed")


def test_a_command_that_came_to_nothing_is_forgotten(
    keep_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before there is a job, in a folder that was there; then another domain is learnt there."""
    (tmp_path / "run").mkdir()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "describe_schedule", killed)
        keep_it(tmp_path / "run", method="self_replay", self_replay=0.4)
    keep_it(tmp_path / "run", data="docs", method="self_replay")
    keep_it(tmp_path / "straight", data="docs", method="self_replay")
    same_stage(tmp_path / "straight", tmp_path / "run")
    assert (tmp_path / "run/self_replay.jsonl").read_bytes() == (tmp_path / "straight/self_replay.jsonl").read_bytes()


CUT_SHORT: dict[str, tuple[dict[str, Any], list[tuple[str, int]]]] = {
    "done": ({}, [("save_checkpoint", 1), ("link_checkpoint", 1), ("link_checkpoint", 2)]),
    "rolled back to a checkpoint": ({"max_forgetting": 0.05, "max_steps": 20}, [("link_checkpoint", 2)]),
    "rolled back to the beginning": (
        {"max_forgetting": 1e-9},
        [("save_checkpoint", 1), ("link_checkpoint", 1), ("link_checkpoint", 2)],
    ),
    "lora": ({"lora": True, "max_steps": 4}, [("link_checkpoint", 1), ("link_checkpoint", 2)]),
    "nothing held out": ({"method": "naive", "val_split": 0, "max_steps": 2}, [("link_checkpoint", 1)]),
}
"""Options, and the calls at which a conclusion crashes, one sitting after the other."""


@pytest.mark.parametrize("kind", CUT_SHORT)
def test_a_conclusion_cut_short_is_done_again(
    keep_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """By a signal while it measures, and by a crash at each of the places where it writes."""
    more, crashes = CUT_SHORT[kind]
    options = {**HARD, "method": "interpolate", "eval_every": 2, "max_steps": 6, **more}
    straight = keep_it(tmp_path / "straight", **options)
    assert straight.summary["status"] == ("early_stopped" if "rolled" in kind else "done")
    assert (straight.summary["best_step"] is None) == (kind in ("rolled back to the beginning", "nothing held out"))

    def signalled(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(*given)

    with monkeypatch.context() as patch:
        patch.setattr(conclude, "measure", signalled)
        stopped = keep_it(tmp_path / "often", **options)
        assert (stopped.exit_code, stopped.summary["status"]) == (143, "interrupted")
    for name, call in crashes:
        with monkeypatch.context() as patch, pytest.raises(KeyError):
            patch.setattr(conclude, name, crashing(getattr(conclude, name), call))
            keep_it(tmp_path / "often", **options)
    again = keep_it(tmp_path / "often", **options)
    assert again.summary["status"] == straight.summary["status"]
    assert again.summary["best_val_loss"] == straight.summary["best_val_loss"]
    same_stage(tmp_path / "straight", tmp_path / "often")
    assert not [path for path in (tmp_path / "often").rglob(".*") if path.name != ".lock"]


def crashing(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """`function`, but its call of that number, from 1, fails."""
    calls = iter(range(1, call + 1))

    def called(*given: Any) -> Any:
        if next(calls) == call:
            raise KeyError(call)
        return function(*given)

    return called


def test_a_branch_is_measured_against_the_model_as_it_was(keep_it: RunIt, tmp_path: Path) -> None:
    options = {"method": "self_replay,kl", "max_steps": 4, "save_every": 2}
    keep_it(tmp_path / "straight", **options)
    step = tmp_path / "straight/checkpoints/step-2"
    keep_it(tmp_path / "branch", resume_from=str(step), **options)
    same_stage(tmp_path / "straight", tmp_path / "branch")
    assert history_of(tmp_path / "branch").stages[-1].run == str(tmp_path / "branch")


# Replay


def test_replay_has_exactly_its_share(keeping: Keeping, two_domains: tuple[Path, Path], tmp_path: Path) -> None:
    for number, options in enumerate(
        [{"replay": 0.05}, {"replay": 0.3}, {"self_replay": 0.1}, {"replay": 0.3, "self_replay": 0.2}]
    ):
        config = keeping(
            tmp_path / f"{number}", domain="more", model=str(two_domains[1]), allow=("held_out_overlap",), **options
        )
        job = build_job(config)
        assert isinstance(job.rows, MixedRows)
        for epoch in (0, 3):
            counted = [0] * len(job.rows.parts)
            for index in range(len(job.rows)):
                targets = int((job.rows.row(epoch, index).labels != -100).sum())
                counted[job.rows.locate(epoch, index)[0]] += targets
            assert counted == [part.num_targets for part in job.rows.parts]
            replayed, total = counted[1:], sum(counted)
            if "replay" in options:
                stored, replayed = replayed[:3], replayed[3:]
                assert abs(sum(stored) - options["replay"] * total) <= 1
                assert max(stored) - min(stored) <= 1
            if "self_replay" in options:
                assert abs(sum(replayed) - options["self_replay"] * total) <= 1


def test_own_text_comes_from_the_model_alone(keep_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def watched(model: Any, tokenizer: Any, prompts: Any, *more: Any, **options: Any) -> Any:
        given.extend(prompts)
        return write(model, tokenizer, prompts, *more, **options)

    monkeypatch.setattr(holding, "generate", watched)
    keep_it(tmp_path / "run", method="self_replay", self_replay=0.3)
    assert set(given) == {""}
    written = list(read_documents(tmp_path / "run/self_replay.jsonl"))
    assert len(set(written)) > 20
    for domain in (BASE, "code"):
        for kind in ("held_out", "reserve"):
            known = list(read_documents(best(tmp_path / "run") / f"seedbed/domains/{domain}/{kind}.jsonl"))
            assert find_overlap(written, known) is None
    assert not list(best(tmp_path / "run").rglob("self_replay.jsonl"))


def test_a_model_that_writes_nothing(keeping: Keeping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = keeping(tmp_path / "run", method="self_replay")

    def silent(_model: Any, _tokenizer: Any, prompts: list[str], *_: Any, **__: Any) -> Any:
        return [Completion(prompt, "", (), "eos") for prompt in prompts]

    monkeypatch.setattr(holding, "generate", silent)
    with pytest.raises(seedbed.SeedbedError, match="writes nothing"):
        build_job(config)


# What holds

HELD: dict[str, dict[str, Any]] = {
    "replay": {"replay": 0.4},
    "self_replay": {"self_replay": 0.4},
    "l2_sp": {"l2_sp": 1.0},
    "ewc": {"ewc": 100.0},
    "kl": {"kl": 1.0},
    "interpolate": {"interpolate": True},
}


@pytest.mark.parametrize("kind", HELD)
def test_every_method_forgets_less(keep_it: RunIt, naive: Path, tmp_path: Path, kind: str) -> None:
    assert rises(naive)[BASE] > 0.1
    assert rises(naive)["code"] < -0.2
    log = io.StringIO()
    keep_it(tmp_path / "run", log=log, **HARD, **HELD[kind])
    assert history_of(tmp_path / "run").stages[-1].method.keys() == {kind, "learning_rate"}
    assert weights(best(tmp_path / "run")) != weights(best(naive))
    assert rises(tmp_path / "run")[BASE] < 0.9 * rises(naive)[BASE]
    assert rises(tmp_path / "run")["code"] < 0
    if kind == "interpolate":
        check_interpolation(log.getvalue(), tmp_path / "run", naive)


def check_interpolation(log: str, output: Path, naive: Path) -> None:
    """The share is the best by its own measure, and the weights are that mixture."""
    rows = re.findall(r"(\d+)% of the new weights: code ([+-][\d.]+)%, base ([+-][\d.]+)%", log)
    scores = {int(share) / 100: float(gain) + float(rise) for share, gain, rise in rows}
    assert list(scores) == [tenth / 10 for tenth in range(11)]
    share = history_of(output).stages[-1].method["interpolate"]
    assert 0 < share < 1
    assert scores[share] <= min(scores.values()) + 0.02
    old = parameters_of(Path(history_of(output).stages[0].model))
    new, mixed = parameters_of(best(naive)), parameters_of(best(output))
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, (1 - share) * old[name] + share * new[name])
    assert json.loads((output / "metrics.json").read_text())["bits_per_byte"] == pytest.approx(
        history_of(output).stages[-1].after["code"].bits_per_byte
    )


# The alarm


def events(output: Path) -> list[dict[str, Any]]:
    path = output / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_rolling_back_ends_within_the_limit(keep_it: RunIt, tmp_path: Path) -> None:
    options = {**HARD, "eval_every": 2, "method": "naive", "max_forgetting": 0.05}
    log = io.StringIO()
    outcome = keep_it(tmp_path / "run", log=log, **options)
    assert outcome.summary["status"] == "early_stopped"
    assert "--max_forgetting 0.05 was exceeded" in outcome.summary["reason"]
    assert 0 < outcome.summary["best_step"] < outcome.summary["steps"]
    assert rises(tmp_path / "run")[BASE] <= 0.05
    assert rises(tmp_path / "run")["code"] < 0
    assert weights(best(tmp_path / "run")) == weights(tmp_path / "run/checkpoints/final")
    event = events(tmp_path / "run")[0]
    assert event["event"] == "forgetting"
    assert (event["event"], event["limit"], list(event["beyond"])) == ("forgetting", 0.05, [BASE])
    assert "Alarm: base is" in log.getvalue()


@pytest.mark.parametrize("when", ["at once", "at the last step", "when patience ends"])
@pytest.mark.parametrize("lora", [False, True])
def test_with_nothing_within_the_limit_the_model_stays_as_it_was(
    keep_it: RunIt, pretrained: Make, two_domains: tuple[Path, Path], tmp_path: Path, when: str, lora: bool
) -> None:
    options: dict[str, Any] = {**HARD, "data": "qa", "max_forgetting": 1e-9, "method": "naive", "max_seq_len": 64}
    ends: dict[str, dict[str, Any]] = {
        "at once": {"eval_every": 2},
        "at the last step": {"max_steps": 3},
        "when patience ends": {"max_steps": None, "epochs": 2, "early_stopping_patience": 1, "eval_every": 1000},
    }
    options |= ends[when]
    old = pretrained("llama") if lora else best(two_domains[1])
    outcome = keep_it(tmp_path / "run", model=str(old), lora=lora or None, **options)
    assert outcome.summary["status"] == "early_stopped"
    assert set(rises(tmp_path / "run").values()) == {0.0}
    for name in ("best", "final"):
        folder = tmp_path / "run/checkpoints" / name
        history = read_history(folder)
        assert history is not None
        if lora:
            assert history.domains == [BASE]
            assert logits_of(load_model(folder)[0]).equal(logits_of(load_model(old)[0]))
        else:
            assert weights(folder) == weights(old)
            assert history == history_of(two_domains[1])
            assert {path.name for path in (folder / "seedbed/domains").iterdir()} == {BASE, "code", "docs"}
        assert run(["verify", str(folder)]) == 0


def test_an_adapter_gives_way_to_the_one_before_it(keep_it: RunIt, tmp_path: Path) -> None:
    options = {**HARD, "max_steps": 4, "lora": True, "method": "naive"}
    keep_it(tmp_path / "first", **options)
    outcome = keep_it(tmp_path / "second", data="docs", model=str(tmp_path / "first"), max_forgetting=1e-9, **options)
    assert outcome.summary["status"] == "early_stopped"
    assert weights(best(tmp_path / "second")) == weights(best(tmp_path / "first"))
    assert history_of(tmp_path / "second").domains == [BASE, "code"]
    assert stage_folder(str(tmp_path / "second"), "code") == best(tmp_path / "second")


def test_stopping_at_the_alarm_keeps_the_weights_at_hand(keep_it: RunIt, tmp_path: Path) -> None:
    options = {**HARD, "eval_every": 2, "method": "naive", "max_forgetting": 0.02, "on_forgetting": "stop"}
    outcome = keep_it(tmp_path / "run", **options)
    steps = outcome.summary["steps"]
    assert outcome.summary["status"] == "early_stopped"
    assert "--max_forgetting" in outcome.summary["reason"]
    assert 0 < steps < 20
    assert rises(tmp_path / "run")[BASE] > 0.02
    assert outcome.summary["best_step"] == steps
    assert read_state(best(tmp_path / "run"))["step"] == steps
    last = [record for record in read_metrics(tmp_path / "run") if "val_loss" in record][-1]
    assert outcome.summary["best_val_loss"] == pytest.approx(last["val_loss"])
    assert history_of(tmp_path / "run").stages[-1].after[BASE].loss == pytest.approx(last["val_loss/base"])


def test_stopping_at_the_alarm_without_held_out_text(keep_it: RunIt, domain_text: Make, tmp_path: Path) -> None:
    log = io.StringIO()
    options = {"method": "naive", "max_forgetting": 1e-9, "on_forgetting": "stop", "learning_rate": 0.1}
    more = {"general_data": str(domain_text("docs")), "val_split": 0.0, "eval_every": 2}
    outcome = keep_it(tmp_path / "run", log=log, **options, **more)
    assert (outcome.exit_code, outcome.summary["status"]) == (0, "early_stopped")
    assert (outcome.summary["best_step"], outcome.summary["best_val_loss"]) == (2, None)
    assert f"Model available at: {tmp_path}/run/checkpoints/final" in log.getvalue()


def test_a_warning_changes_nothing(keep_it: RunIt, naive: Path, tmp_path: Path) -> None:
    options = {**HARD, "method": "naive", "max_forgetting": 0.02, "on_forgetting": "warn"}
    outcome = keep_it(tmp_path / "run", **options)
    assert (outcome.summary["status"], outcome.summary["steps"]) == ("done", 20)
    assert weights(best(tmp_path / "run")) == weights(best(naive))
    assert outcome.summary["best_step"] == 20
    # The alarm at the validation, and at the end what to change.
    assert [event["event"] for event in events(tmp_path / "run")] == ["forgetting", "finding"]


def test_a_warning_at_the_end_of_patience(keep_it: RunIt, tmp_path: Path) -> None:
    options = {"method": "naive", "learning_rate": 0.1, "max_forgetting": 1e-9, "on_forgetting": "warn"}
    more = {"epochs": 4, "max_steps": None, "early_stopping_patience": 1, "eval_every": 1000}
    outcome = keep_it(tmp_path / "run", **options, **more)
    assert outcome.summary["status"] in ("done", "early_stopped")
    assert history_of(tmp_path / "run").domains == [BASE, "code"]


# Going back


def test_going_on_from_an_earlier_stage(
    keeping: Keeping, two_domains: tuple[Path, Path], pretrained: Make, tmp_path: Path
) -> None:
    for stage, folder, domains in (("code", best(two_domains[0]), [BASE, "code"]), (BASE, pretrained("llama"), [BASE])):
        job = build_job(keeping(tmp_path / stage, data="docs", model=str(two_domains[1]), rollback_to=stage))
        for name, parameter in parameters_of(folder).items():
            assert job.model.get_parameter(name).equal(parameter)
        assert job.training.learning_rate == 5e-3
        history = history_of(tmp_path / stage)
        assert history.domains == [*domains, "docs"]
        assert set(history.stages[-1].before) == {*domains, "docs"}
        assert Path(history.stages[-2].model) == folder


def test_going_back_without_text_copies_the_stage(
    two_domains: tuple[Path, Path], pretrained: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage, folder in (("docs", best(two_domains[1])), ("code", best(two_domains[0])), (BASE, pretrained("llama"))):
        words = ["continue", "--model", str(two_domains[1]), "--rollback_to", stage, "--output", str(tmp_path / stage)]
        assert run([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["copied_from"] == str(folder)
        assert weights(tmp_path / stage) == weights(folder)
        assert read_history(tmp_path / stage) == read_history(folder)
        assert run(["verify", str(tmp_path / stage)]) == 0
        capsys.readouterr()
        assert run(words) == 2
        assert "is there already" in capsys.readouterr().err


def test_a_stage_can_be_used_by_its_name(
    two_domains: tuple[Path, Path], pretrained: Make, small_text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for domain, folder in (("docs", best(two_domains[1])), ("code", best(two_domains[0])), (BASE, pretrained("llama"))):
        assert stage_folder(str(two_domains[1]), domain) == folder
        told = []
        for model in (["--model", str(folder)], ["--model", str(two_domains[1]), "--domain", domain]):
            assert run(["evaluate", *model, "--data", str(small_text_file), "--json"]) == 0
            told.append(json.loads(capsys.readouterr().out)["nats_per_token"])
            assert run(["generate", *model, "--prompt", "The", "--max_new_tokens", "9"]) == 0
            told.append(capsys.readouterr().out)
        assert told[:2] == told[2:]


def test_runs_that_were_moved_together_find_each_other(keep_it: RunIt, tmp_path: Path) -> None:
    keep_it(tmp_path / "runs/first")
    keep_it(tmp_path / "runs/second", data="docs", model=str(tmp_path / "runs/first"))
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert stage_folder(str(tmp_path / "elsewhere/second"), "code") == best(tmp_path / "elsewhere/first")


# LoRA


def test_an_adapter_for_each_domain(
    keep_it: RunIt, pretrained: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, options = pretrained("llama"), {**HARD, "lora": True}
    before = weights(base)
    keep_it(tmp_path / "code", method="kl", **options)
    log = io.StringIO()
    keep_it(tmp_path / "docs", data="docs", model=str(tmp_path / "code"), method="interpolate", log=log, **options)
    assert weights(base) == before
    code, docs = best(tmp_path / "code"), best(tmp_path / "docs")
    assert {Path(base_name(folder)) for folder in (code, docs)} == {base}
    assert history_of(tmp_path / "docs").domains == [BASE, "code", "docs"]
    assert (
        history_of(tmp_path / "docs").stages[-1].before[BASE] == history_of(tmp_path / "code").stages[-1].before[BASE]
    )
    assert rises(tmp_path / "code")["code"] < -0.03
    for domain, folder in (("code", code), ("docs", docs), (BASE, base)):
        assert stage_folder(str(tmp_path / "docs"), domain) == folder
        model = ["--model", str(tmp_path / "docs"), "--domain", domain]
        assert run(["generate", *model, "--prompt", "def", "--max_new_tokens", "5", "--json"]) == 0
        assert run(["evaluate", *model, "--json"]) == 0
    capsys.readouterr()
    share = history_of(tmp_path / "docs").stages[-1].method["interpolate"]
    whole, mixed = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "docs/checkpoints/step-20", docs)
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(mixed[name], tensor * (share if "lora_B" in name else 1))


# Text and conversations


def test_conversations_after_text_and_text_after_conversations(keep_it: RunIt, tmp_path: Path) -> None:
    options = {"replay": 0.3, "max_seq_len": 128}
    keep_it(tmp_path / "first", data="alpaca", **options)
    keep_it(tmp_path / "second", data="code", model=str(tmp_path / "first"), **options)
    history = history_of(tmp_path / "second")
    assert [stage.format for stage in history.stages] == ["text", "alpaca", "text"]
    _, alpaca, _ = history.stages
    assert history.stages[-1].before["alpaca"] == alpaca.after["alpaca"]
    assert history.stages[-1].before[BASE] == alpaca.after[BASE]
    assert alpaca.reserve_documents + alpaca.held_out_documents == 40
    assert "### Instruction" in (best(tmp_path / "second") / "chat_template.jinja").read_text()


def test_completions_keep_the_template_that_they_were_taught_with(keep_it: RunIt, tmp_path: Path) -> None:
    options = {"max_seq_len": 128, "method": "naive"}
    keep_it(tmp_path / "first", data="completion", chat_template="chatml", **options)
    keep_it(tmp_path / "second", data="code", model=str(tmp_path / "first"), **options)
    _, completion, code = history_of(tmp_path / "second").stages
    assert code.before["completion"].loss == pytest.approx(completion.after["completion"].loss)


def test_the_rows_of_a_tuned_model_keep_its_template(keep_it: RunIt, tune_it: RunIt, tmp_path: Path) -> None:
    options = {"max_seq_len": 128, "method": "naive"}
    tuned = tune_it(tmp_path / "tuned", data="completion", chat_template="chatml", max_seq_len=128)
    keep_it(tmp_path / "run", data="code", model=str(tmp_path / "tuned"), **options)
    before = history_of(tmp_path / "run").stages[-1].before[BASE]
    assert before.loss == pytest.approx(tuned.summary["best_val_loss"], rel=1e-4)


def test_replayed_conversations_train_their_answers_only(keep_it: RunIt, keeping: Keeping, tmp_path: Path) -> None:
    keep_it(tmp_path / "first", data="alpaca", max_seq_len=128)
    job = build_job(keeping(tmp_path / "second", model=str(tmp_path / "first"), replay=0.3, max_seq_len=128))
    assert isinstance(job.rows, MixedRows)
    _, base, conversations = job.rows.parts
    row = conversations.row(0, 0)
    assert (row.labels == -100).sum() > (row.labels != -100).sum() > 0
    assert "Instruction" in job.tokenizer.decode(row.input_ids.tolist())
    assert (base.row(0, 0).labels != -100).all()


# In part


def test_what_is_frozen_stays(keep_it: RunIt, pretrained: Make, tmp_path: Path) -> None:
    keep_it(tmp_path / "run", last_blocks=1, method="l2_sp,ewc,interpolate", learning_rate=1e-2)
    before, after = parameters_of(pretrained("llama")), parameters_of(best(tmp_path / "run"))
    stays = {name for name in before if name.startswith(("embed_tokens", "blocks.0"))}
    assert {name for name in before if after[name].equal(before[name])} == stays
    assert history_of(tmp_path / "run").stages[-1].method["last_blocks"] == 1


# Models from elsewhere


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory, pretrained: Make) -> Path:
    """A model folder that transformers wrote."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("foreign") / "model"
    transformers.AutoModelForCausalLM.from_pretrained(pretrained("llama")).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(pretrained("llama")).save_pretrained(folder)
    return folder


def test_a_model_without_a_history(keep_it: RunIt, foreign: Path, tmp_path: Path) -> None:
    log = io.StringIO()
    outcome = keep_it(tmp_path / "run", model=str(foreign), log=log)
    base, code = history_of(tmp_path / "run").stages
    assert (base.model, base.held_out_bytes, base.reserve_bytes) == (str(foreign), 0, 0)
    assert set(code.before) == set(code.after) == {"code"}
    assert code.method == {**WITHOUT_STORED_TEXT, "learning_rate": 2e-5}
    assert "no stored text" in code.why
    assert code.why in log.getvalue()
    assert "Nothing measures what the model knew before its first domain; --general_data" in log.getvalue()
    assert outcome.summary["why"] == code.why
    later = keep_it(tmp_path / "later", data="docs", model=str(tmp_path / "run"))
    assert later.summary["method"]["replay"] == 0.05
    assert set(later.summary["domains"]) == {"code", "docs"}


def test_general_text_stands_for_what_a_model_knew(
    keep_it: RunIt, foreign: Path, small_text_file: Path, naive: Path, tmp_path: Path
) -> None:
    options = {**HARD, "model": str(foreign), "general_data": str(small_text_file), "method": "naive"}
    keep_it(tmp_path / "run", **options)
    ours, theirs = history_of(tmp_path / "run"), history_of(naive)
    assert weights(best(tmp_path / "run")) == weights(best(naive))
    assert ours.stages[-1].before == theirs.stages[-1].before
    assert ours.stages[-1].after == theirs.stages[-1].after
    later = keep_it(tmp_path / "later", data="docs", model=str(tmp_path / "run"), replay=0.2)
    assert set(later.summary["domains"]) == {BASE, "code", "docs"}


def test_a_model_with_pretrained_text_that_is_gone(
    keep_it: RunIt, run_it: RunIt, small_text_file: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(small_text_file.read_bytes())
    run_it(tmp_path / "base", data=str(text), max_steps=2, max_seq_len=64, learning_rate=3e-4)
    text.unlink()
    log = io.StringIO()
    outcome = keep_it(tmp_path / "run", model=str(tmp_path / "base"), log=log)
    assert "cannot be read now" in log.getvalue()
    assert outcome.summary["method"]["self_replay"] == 0.1
    assert outcome.summary["method"]["learning_rate"] == pytest.approx(1.5e-4)


# What is chosen


def memory_of(folder: Path, *, held_out: int = 0, reserve: int = 0, new_held_out: int = 1) -> Memory:
    base = Stage(BASE, "base", "", held_out_bytes=held_out, reserve_bytes=reserve)
    return Memory(folder, History((base, Stage("new", "", "", held_out_bytes=new_held_out))), folder)


def without(chosen: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in chosen.items() if name not in names}


@pytest.mark.parametrize(
    ("texts", "options", "expected", "why"),
    [
        ({"reserve": 1, "held_out": 1}, {}, WITH_STORED_TEXT, "stored text of base"),
        ({"reserve": 1}, {}, WITH_STORED_TEXT, "stored text of base"),
        ({"reserve": 1}, {"lora": True}, without(WITH_STORED_TEXT, "l2_sp"), "stored text of base"),
        ({"reserve": 1}, {"l2_sp": 0}, without(WITH_STORED_TEXT, "l2_sp"), "stored text of base"),
        ({"held_out": 1}, {}, WITHOUT_STORED_TEXT, "no stored text .* it writes some itself"),
        ({"held_out": 1, "new_held_out": 0}, {}, WITHOUT_STORED_TEXT, "no stored text .* it writes some itself"),
        ({}, {}, WITHOUT_STORED_TEXT, "no stored text .* it writes some itself"),
        ({}, {"lora_dora": True}, without(WITHOUT_STORED_TEXT, "l2_sp"), "it writes some itself"),
        ({"reserve": 1}, {"replay": 0}, WITHOUT_STORED_TEXT, "replay is switched off, so it writes some itself"),
        ({}, {"self_replay": 0}, without(WITHOUT_STORED_TEXT, "self_replay"), "no stored text .* nothing is replayed"),
        ({"reserve": 1, "held_out": 1}, {"kl": 0.5}, {"kl": 0.5}, "^$"),
        ({"reserve": 1, "held_out": 1}, {"method": "naive"}, {}, "^$"),
        ({"reserve": 1}, {"method": "replay, l2_sp", "l2_sp": 2.0}, {"replay": 0.05, "l2_sp": 2.0}, "^$"),
        ({"held_out": 1}, {"method": "interpolate,ewc"}, {"interpolate": True, "ewc": STRENGTHS["ewc"]}, "^$"),
    ],
)
def test_the_method_follows_from_the_texts_at_hand(
    keeping: Keeping, tmp_path: Path, texts: dict[str, int], options: dict[str, Any], expected: dict[str, Any], why: str
) -> None:
    config, said = choose_methods(keeping(tmp_path / "run", **options), memory_of(tmp_path, **texts))
    chosen = {name: value for name in STRENGTHS if (value := getattr(config.keeping, name))}
    assert chosen == expected
    assert re.search(why, said), said


# Without a shell


def test_from_python(pretrained: Make, domain_text: Make, tmp_path: Path) -> None:
    options = {**KEEPING, "model": str(pretrained("llama")), "data": str(domain_text("code")), "domain": "code"}
    continued = seedbed.continue_training(output=str(tmp_path / "run"), quiet=True, **options)
    assert (continued.status, continued.exit_code) == ("done", 0)
    assert set(continued.metrics["domains"]) == {BASE, "code"}
    trainer = seedbed.Trainer("continue", output=str(tmp_path / "again"), quiet=True, **options)
    assert trainer.train().metrics["domains"] == continued.metrics["domains"]
    assert isinstance(trainer.generate("def", max_new_tokens=3), str)


# What is said of it


def test_what_was_forgotten_is_said_with_what_to_change() -> None:
    before, same = {"base": Figure(2.0, 1.0), "law": Figure(4.0, 2.0)}, {"law": Figure(3.0, 1.5)}
    method = {"replay": 0.05, "learning_rate": 1e-3}
    stage = Stage("law", "", "", method=method, before=before, after={"base": Figure(2.2, 1.1), **same})
    [finding] = conclude.forgotten(stage)
    assert (finding.name, finding.level) == ("forgetting", "warning")
    assert "base costs 10.0% more bits per byte" in str(finding)
    for remedy in ("--replay 0.25", "--interpolate --max_forgetting 0.02", "--learning_rate (it was 0.001)"):
        assert remedy in finding.remedy
    limited = {"replay": 0.25, "interpolate": 0.5, "learning_rate": 1e-3}
    [finding] = conclude.forgotten(replace(stage, method=limited))
    assert "--replay" not in finding.remedy and "--interpolate" not in finding.remedy
    assert conclude.forgotten(replace(stage, after={"base": Figure(2.02, 1.01), **same})) == []
