"""`seedbed judge` on a run that was fine-tuned here, with a server on loopback as the judge."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from seedbed.cli.app import run
from seedbed.config import FLAGS, Layer, resolve
from seedbed.generate import generate
from seedbed.judge import answers
from seedbed.runs.folder import read_records, read_summary
from seedbed.text.tokenizer import Tokenizer
from seedbed.train.run import run_training
from tests.runs.conftest import TUNING, RunIt
from tests.runs.processes import start_together, wait_for
from tests.unit.judge.server import KEY, Answer, refuse, say, serving
from tests.unit.judge.test_local import judge as make_judge

QUESTIONS = 3  # of the four that the run holds out


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEDBED_JUDGE_KEY", KEY)


@pytest.fixture(scope="module")
def trained(
    pretrained: Callable[[str], Path], questions: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with two runs on the same questions, `tuned` and `other`, which learnt less."""
    folder = tmp_path_factory.mktemp("judged")
    options = {**TUNING, "model": str(pretrained("llama")), "data": str(questions("qa"))}
    for name, steps in (("tuned", 20), ("other", 1)):
        values = {**options, "max_steps": steps, "output": str(folder / name)}
        run_training(resolve("finetune", [Layer(FLAGS, values)]), Console(quiet=True))
    return folder


@pytest.fixture
def tuned(trained: Path, tmp_path: Path) -> Path:
    """A copy of the first run, to write into."""
    return shutil.copytree(trained / "tuned", tmp_path / "tuned")


@pytest.fixture
def other(trained: Path) -> Path:
    return trained / "other"


def words(model: Path, url: str, *more: str) -> list[str]:
    asked = ["--limit", str(QUESTIONS), "--max_new_tokens", "8", "--device", "cpu"]
    return ["judge", "--model", str(model), "--judge_url", url, "--judge_model", "grader", *asked, *more]


def by_length(_number: int, prompt: str) -> Answer:
    """A judge that likes short answers, but no empty ones."""
    answers = re.findall(r"<answer(?:_[ab])?>\n(.*?)\n</answer", prompt, flags=re.DOTALL)
    if len(answers) == 1:
        return say(str(100 - min(len(answers[0]), 100)))
    first, second = map(len, answers)
    return say("tie" if first == second else "A" if first < second else "B")


def judged(command: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_scores_stand_in_the_summary_and_every_reply_in_the_run(
    tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(by_length) as server:
        found = judged(words(tuned, server.url, "--judge_price", "1,10"), capsys)
    answers = list(read_records(tuned / "judge/answers.jsonl"))
    assert len(answers) == QUESTIONS == found["questions"] == found["scored"]
    expected = [100 - len(answer["answer"]) for answer in answers]
    assert found["score"] == pytest.approx(sum(expected) / QUESTIONS)
    assert found["low"] <= found["score"] <= found["high"]
    assert all(answer["reference"] and answer["prompt"].startswith("Count from") for answer in answers)
    scores = list(read_records(tuned / "judge/scores.jsonl"))
    assert {record["id"] for record in scores} == {answer["id"] for answer in answers}
    assert all(record["judge"] == "grader" and record["attempt"] == 1 for record in scores)
    assert found["prompt_tokens"] == 100 * len(scores) and found["completion_tokens"] == 2 * len(scores)
    assert found["cost"] == pytest.approx(len(scores) * (100 + 20) / 1e6)
    base = found["baseline"]
    assert base["model"].endswith("llama/checkpoints/best")
    assert base["difference"]["mean"] == pytest.approx(found["score"] - base["score"])
    summary = read_summary(tuned)["judge"]
    assert {name: found[name] for name in summary} == summary


def test_the_same_command_pays_for_nothing_twice(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(by_length) as server:
        first = judged(words(tuned, server.url), capsys)
        paid = len(server.prompts)
        written = (tuned / "judge/answers.jsonl").read_bytes()
        assert judged(words(tuned, server.url), capsys) == first
        assert len(server.prompts) == paid
        assert (tuned / "judge/answers.jsonl").read_bytes() == written
        more = judged(words(tuned, server.url, "--limit", str(QUESTIONS + 1), "--baseline", "none"), capsys)
        assert len(server.prompts) == paid + 1
        assert more["questions"] == QUESTIONS + 1 and more["baseline"] is None


def test_a_judge_that_goes_away_is_gone_on_with(
    tuned: Path, questions: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ten = ["--baseline", "none", "--limit", "10", "--data", str(questions("qa"))]
    with serving(lambda n, prompt: by_length(n, prompt) if n < 3 else refuse(500)) as server:
        assert run(words(tuned, server.url, *ten, "--judge_retries", "0", "--judge_concurrency", "1")) == 2
        assert "the same command goes on" in capsys.readouterr().err
    assert read_summary(tuned)["judge"] is None
    with (tuned / "judge/scores.jsonl").open("a") as stream:
        stream.write('{"key": "half of a li')
    with serving(by_length) as server:
        found = judged(words(tuned, server.url, *ten), capsys)
        assert len(server.prompts) == 7
    assert found["scored"] == 10 and found["failed"] == 0


def test_requests_that_failed_are_left_out_and_said(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda n, prompt: refuse(500) if n == 1 else by_length(n, prompt)) as server:
        assert run(words(tuned, server.url, "--baseline", "none", "--judge_retries", "0")) == 0
    assert "1 requests about" in (said := " ".join(capsys.readouterr().out.split()))
    assert "the same command asks them again" in said
    judge = read_summary(tuned)["judge"]
    assert (judge["failed"], judge["scored"], judge["unparsable"]) == (1, QUESTIONS - 1, 0)


def test_replies_that_cannot_be_read_are_counted_and_are_no_zeros(
    tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused: list[str] = []

    def stubborn(_number: int, prompt: str) -> Answer:
        refused.extend([prompt] if not refused else [])
        return say("A fine answer." if prompt.startswith(refused[0]) else "90")

    with serving(stubborn) as server:
        found = judged(words(tuned, server.url, "--baseline", "none"), capsys)
        assert len(server.prompts) == QUESTIONS + 1
    assert (found["score"], found["unparsable"], found["scored"]) == (90, 1, QUESTIONS - 1)


def test_against_another_run(tuned: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(by_length) as server:
        found = judged(words(tuned, server.url, "--against", str(other)), capsys)
        pairs = [prompt for prompt in server.prompts if "<answer_b>" in prompt]
    against = found["against"]
    outcomes = against["preference"]["outcomes"]
    assert sum(outcomes.values()) == QUESTIONS
    assert against["preference"]["inconsistent"] == 0
    rate = (outcomes["win"] + outcomes["tie"] / 2) / QUESTIONS
    assert against["preference"]["win_rate"]["mean"] == pytest.approx(rate)
    assert against["difference"]["mean"] == pytest.approx(found["score"] - against["score"])
    same = QUESTIONS - len(pairs) // 2
    assert outcomes["tie"] >= same
    others = {record["model"] for record in read_records(tuned / "judge/others.jsonl")}
    assert others == {str(other), found["baseline"]["model"]}


def test_a_judge_that_likes_a_position_decides_nothing(
    tuned: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda _, prompt: say("A" if "<answer_b>" in prompt else "50")) as server:
        command = words(tuned, server.url, "--against", str(other), "--baseline", "none")
        preference = judged(command, capsys)["against"]["preference"]
        assert run(command) == 0
    assert preference["outcomes"] == {"win": 0, "tie": QUESTIONS, "loss": 0}
    assert preference["inconsistent"] == 1
    assert preference["win_rate"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert "changed" in capsys.readouterr().out


def test_repeats_show_how_the_judge_varies(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda n, _: say("40" if n % 2 else "60")) as server:
        found = judged(
            words(tuned, server.url, "--repeats", "4", "--baseline", "none", "--judge_concurrency", "1"), capsys
        )
        assert {body["temperature"] for body in server.bodies} == {1.0}
        assert len(server.prompts) == 4 * QUESTIONS
    assert found["score"] == pytest.approx(50)
    assert found["spread"] == pytest.approx((400 / 3) ** 0.5)


def test_the_key_is_in_no_file_and_not_shown(tuned: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(lambda n, _: say(f"50 {KEY}" if n == 0 else "50")) as server:
        assert run(words(tuned, server.url)) == 0
    assert KEY not in "".join(capfd.readouterr())
    assert not [path for path in tuned.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_without_a_judge_the_summary_stays(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["judge", "--model", str(tuned), "--max_new_tokens", "8", "--device", "cpu"]
    assert run(command) == 0
    assert "No judge: add --judge_url" in capsys.readouterr().out
    found = judged(command, capsys)
    assert found["score"] is None and found["judge"] is None and found["chrf"] >= 0
    assert read_summary(tuned)["judge"] is None


def test_a_damaged_summary_is_refused_before_anything_is_asked(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tuned / "metrics.json").write_text("{", encoding="utf-8")
    with serving(by_length) as server:
        assert run(words(tuned, server.url)) == 2
        assert "metrics.json is not readable" in capsys.readouterr().err
        assert server.prompts == []
    assert (tuned / "metrics.json").read_text(encoding="utf-8") == "{"


def test_completions_are_asked_for_as_they_were_taught(
    tune_it: RunIt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_it(tmp_path / "run", data="completion", chat_template="chatml", max_steps=1)
    asked: list[str] = []

    def heard(model: Any, tokenizer: Tokenizer, prompts: Any, *more: Any, **options: Any) -> Any:
        asked.extend(map(tokenizer.decode, prompts))
        return generate(model, tokenizer, prompts, *more, **options)

    monkeypatch.setattr(answers, "generate", heard)
    assert run(["judge", "--model", str(tmp_path / "run"), "--limit", "1", "--max_new_tokens", "4"]) == 0
    assert asked[0].startswith("<|im_start|>user\nCount")


def test_other_data_and_a_folder_that_is_no_run(
    tuned: Path, questions: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = read_summary(tuned)["parent"]
    with serving(by_length) as server:
        command = words(Path(base), server.url, "--data", str(questions("chat")), "--output", str(tmp_path / "kept"))
        found = judged(command, capsys)
    assert found["baseline"] is None and found["data"] == str(questions("chat"))
    assert len(list(read_records(tmp_path / "kept/answers.jsonl"))) == QUESTIONS


def test_a_local_judge(tuned: Path, pretrained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["judge", "--model", str(tuned), "--judge", str(pretrained("gpt2")), "--limit", "2", "--device", "cpu"]
    assert run([*command, "--max_new_tokens", "4"]) == 2
    assert "its context 192" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["server", "local"])
def test_several_processes_judge_as_one(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    make_judge(tmp_path / "local", 2048, seed=1)
    with serving(by_length) as server:
        command = words(tuned, server.url)
        if kind == "local":
            asked = command.index("--judge_url")
            command[asked : asked + 4] = ["--judge", str(tmp_path / "local")]
        alone = judged([*command, "--output", str(tmp_path / "alone")], capsys)
        together = [*command, "--output", str(tmp_path / "together"), "--json"]
        assert wait_for(start_together(2, lambda _rank: run(together), tmp_path / "logs")) == [0, 0]
        paid = len(server.prompts)
        assert wait_for(start_together(2, lambda _rank: run(together), tmp_path / "logs")) == [0, 0]
        assert len(server.prompts) == paid  # all is found, by both
    found = json.loads((tmp_path / "logs/0").read_text().splitlines()[-1])
    assert "{" not in (tmp_path / "logs/1").read_text()
    assert {**found, "transcripts": None} == {**alone, "transcripts": None}
    for name in ("answers", "others", "scores"):
        records = [list(read_records(tmp_path / folder / f"{name}.jsonl")) for folder in ("alone", "together")]
        assert sorted(records[0], key=str) == sorted(records[1], key=str)


def test_a_checkpoint_of_a_run_is_scored_for_the_run(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(by_length) as server:
        judged(words(tuned / "checkpoints/final", server.url, "--baseline", "none"), capsys)
    assert read_summary(tuned)["judge"]["model"] == str(tuned / "checkpoints/final")
    assert (tuned / "judge/scores.jsonl").exists()


def test_a_parent_that_is_gone_is_said_and_no_error(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((tuned / "config.yaml").read_text())
    (tuned / "config.yaml").write_text(yaml.safe_dump({**config, "model": "runs/gone/away"}))
    assert run(["judge", "--model", str(tuned), "--limit", "1", "--max_new_tokens", "2"]) == 0
    assert "runs/gone/away, from which the run began, is not here" in capsys.readouterr().out
