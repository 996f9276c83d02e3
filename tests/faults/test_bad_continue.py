"""Domains that cannot be added: each reason named with what, where and the remedy, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from seedbed.cli.app import run
from tests.faults.test_bad_input import Fails, copy_model

FLAGS = "--max_seq_len=32 --batch_size=4 --max_steps=1 --precision=fp32 --device=cpu --no_tensorboard --output=run"
ONE = "held-out text that stands nowhere else, of words such as alpha beta gamma delta epsilon zeta eta theta iota."


def write_text(path: Path, *more: str, about: str = "planets") -> str:
    """A file of forty documents on something, and then these."""
    documents = [
        f"Of {about}, number {i} is {i * 7} times as far as number {i + 1}. "
        + " ".join(f"{about}{i}x{j}" for j in range(40))
        for i in range(40)
    ]
    path.write_text("\n\n".join([*documents, *more]), encoding="utf-8")
    return str(path)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with text that can be learnt."""
    folder = tmp_path / "work"
    folder.mkdir()
    write_text(folder / "good.txt")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def base(tiny_run: Path, tmp_path: Path) -> Path:
    """A model folder of another program, which has no history."""
    return copy_model(tiny_run, tmp_path / "base")


@pytest.fixture(scope="session")
def learnt_once(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and with `law`, a run that learnt law after it; tests copy it."""
    folder = tmp_path_factory.mktemp("learnt")
    shutil.copytree(tiny_run, folder / "base")
    write_text(folder / "law.txt", about="law")
    flags = [flag for flag in FLAGS.split() if "output" not in flag]
    told = ["--model", str(folder / "base"), "--data", str(folder / "law.txt"), "--domain", "law"]
    assert run(["continue", *flags, *told, "--output", str(folder / "law")]) == 0
    return folder


@pytest.fixture
def model(learnt_once: Path, tmp_path: Path) -> Path:
    """The best model of such a run; its history leads to the base of this test alone."""
    shutil.copytree(learnt_once / "base", tmp_path / "parent")
    shutil.copytree(learnt_once / "law", tmp_path / "law")
    folder = tmp_path / "law/checkpoints/best"
    edit_history(folder, lambda text: text.replace(str(learnt_once / "base"), str(tmp_path / "parent")))
    for name in ("manifest", "state"):  # which would tell that it was edited
        (folder / f"seedbed/{name}.json").unlink()
    return folder


def edit_history(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "seedbed/history.json"
    text = change(path.read_text(encoding="utf-8"))
    path.unlink()  # the run has the same file under other names
    path.write_text(text, encoding="utf-8")


def held_out(folder: Path, domain: str) -> list[str]:
    lines = (folder / f"seedbed/domains/{domain}/held_out.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def words_for(flags: list[str], base: Path) -> list[str]:
    """The whole command: what the flags leave out is good."""
    good = {"--data": "good.txt", "--model": str(base), "--domain": "new"}
    return [
        "continue",
        *FLAGS.split(),
        *[w for name, value in good.items() if name not in flags for w in (name, value)],
        *flags,
    ]


@pytest.fixture
def fails(base: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """`fails(code, flags)`: it must end with this exit code, a message, and no new file; gives the message."""

    def check(code: int, flags: list[str]) -> str:
        before = {path: path.stat().st_size for path in work.rglob("*")}
        capsys.readouterr()
        assert run(words_for(flags, base)) == code
        message = " ".join(capsys.readouterr().err.split())
        assert message.startswith("error: "), message
        assert "Traceback" not in message
        assert {path: path.stat().st_size for path in work.rglob("*")} == before
        return message

    return check


def contains(message: str, *words: str) -> None:
    assert all(word in message for word in words), message


# Names


@pytest.mark.parametrize("name", ["law", "Law", "base", "BASE"])
def test_a_domain_is_learnt_once(name: str, model: Path, fails: Fails) -> None:
    message = fails(2, ["--model", str(model), "--domain", name])
    contains(message, f"--domain {name}", str(model), "already", "choose another name", "--rollback_to")


@pytest.mark.parametrize("name", ["", " ", "a/b", "../x", ".hidden", "a b", "ä", "x" * 65, "-x", "law\n"])
def test_a_name_that_cannot_name_a_folder(name: str, fails: Fails) -> None:
    contains(fails(2, [f"--domain={name}", "--domain", name]), "--domain", "missing" if not name else "letters, digits")


def test_no_name(base: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["continue", *FLAGS.split(), "--data", "good.txt", "--model", str(base)]) == 2
    contains(capsys.readouterr().err, "--domain is missing", "such as --domain medical")
    assert not (work / "run").exists()


# Held-out text that is learnt


def test_held_out_text_that_is_the_training_text(fails: Fails) -> None:
    message = fails(3, ["--val_data", "good.txt"])
    contains(message, "held-out text of new (good.txt)", "--data good.txt", "100.0%", "--allow held_out_overlap")


def test_held_out_text_that_is_part_of_the_training_text(work: Path, fails: Fails) -> None:
    write_text(work / "both.txt", ONE)
    (work / "val.txt").write_text(ONE, encoding="utf-8")
    contains(fails(3, ["--data", "both.txt", "--val_data", "val.txt"]), "(val.txt)", "--data both.txt", "alpha beta")


@pytest.mark.parametrize("domain", ["base", "law"])
def test_new_text_that_was_held_out_before(domain: str, model: Path, work: Path, fails: Fails) -> None:
    data = write_text(work / "both.txt", *held_out(model, domain))
    flags = ["--model", str(model), "--data", data, "--val_split", "0"]
    contains(fails(3, flags), f"held-out text of {domain}", f"--data {data}", "Take it out", "--allow held_out_overlap")
    assert run(words_for([*flags, "--allow", "held_out_overlap"], model)) == 0


def test_new_text_that_is_held_out_general_text(work: Path, fails: Fails) -> None:
    flags = ["--general_data", write_text(work / "general.txt", about="birds"), "--val_split", "0"]
    contains(fails(3, ["--data", "general.txt", *flags]), "held-out text of base", "general.txt", "--data general.txt")


@pytest.mark.parametrize("more", [[], ["--method", "replay"], ["--replay", "0.3"]])
def test_held_out_text_that_is_replayed(model: Path, work: Path, fails: Fails, more: list[str]) -> None:
    """Of the new domain, where the old text has it: the replay that `auto` chooses counts too."""
    reserve = (model / "seedbed/domains/law/reserve.jsonl").read_text(encoding="utf-8").splitlines()
    (work / "val.txt").write_text("\n\n".join(map(json.loads, reserve[:3])), encoding="utf-8")
    flags = ["--model", str(model), "--val_data", "val.txt"]
    contains(
        fails(3, [*flags, *more]), "held-out text of new (val.txt)", "replayed from law", "--allow held_out_overlap"
    )
    assert run(words_for([*flags, "--method", "naive"], model)) == 0


# Strengths and methods


@pytest.mark.parametrize("name", ["replay", "self_replay"])
@pytest.mark.parametrize("value", ["1.0", "-0.1", "1.5", "nan", "much"])
def test_a_share_that_is_none(name: str, value: str, fails: Fails) -> None:
    contains(fails(2, [f"--{name}={value}"]), f"--{name} {value}", "set on the command line", "expected")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--replay=0.6", "--self_replay=0.4"], ("--replay 0.6", "--self_replay 0.4", "leave nothing", "lower")),
        (["--replay=0.7", "--self_replay=0.7"], ("leave nothing for the new text",)),
        (["--method=rehearsal"], ("'rehearsal' is unknown", "auto, naive, replay")),
        (["--method=replay,repla"], ("'repla' is unknown", "did you mean replay")),
        (["--method="], ("--method", "is unknown")),
        (["--method=naive,ewc"], ("naive stands alone",)),
        (["--method=auto,ewc"], ("auto stands alone",)),
        (["--method=naive", "--replay=0.1"], ("--method naive", "contradicts --replay 0.1")),
        (["--method=replay", "--replay=0"], ("contradicts --replay 0",)),
        (["--lora", "--l2_sp=0.1"], ("--l2_sp has no meaning with --lora",)),
        (["--lora", "--method=ewc"], ("--ewc has no meaning with --lora",)),
        (["--lora_dora", "--lora", "--interpolate"], ("--interpolate has no meaning with --lora_dora",)),
        (["--on_forgetting=warn"], ("--on_forgetting warn", "no meaning without --max_forgetting")),
        (["--max_forgetting=-0.1"], ("--max_forgetting -0.1", "greater than or equal to 0")),
        (["--max_forgetting=0.1", "--on_forgetting=panic"], ("--on_forgetting panic", "roll_back")),
        (["--ewc=-1"], ("--ewc -1",)),
        (["--kl=inf"], ("--kl inf", "finite")),
    ],
)
def test_methods_that_contradict_each_other(flags: list[str], words: tuple[str, ...], fails: Fails) -> None:
    contains(fails(2, flags), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--replay=0.1"], ("--replay 0.1", "is stored", "--general_data", "--self_replay")),
        (["--method=replay"], ("--replay 0.05", "--general_data")),
        (["--ewc=1"], ("--ewc needs held-out text", "--general_data")),
        (["--method=interpolate"], ("--interpolate needs held-out text of what",)),
        (["--max_forgetting=0.1"], ("--max_forgetting needs held-out text",)),
        (["--max_forgetting=0"], ("--max_forgetting needs held-out text",)),
        (["--method=ewc,replay,interpolate"], ("--ewc needs", "--replay 0.05", "--interpolate needs")),
    ],
)
def test_methods_that_need_text_that_is_not_there(
    flags: list[str], words: tuple[str, ...], base: Path, fails: Fails
) -> None:
    contains(fails(2, flags), str(base), *words)


def test_mixing_needs_held_out_text_of_the_new_domain(model: Path, fails: Fails) -> None:
    message = fails(2, ["--model", str(model), "--val_split", "0", "--interpolate"])
    contains(message, "--interpolate needs held-out text of the new domain", "--val_data")


# General text


def test_general_text_that_the_model_remembers_already(model: Path, fails: Fails) -> None:
    message = fails(2, ["--model", str(model), "--general_data", "good.txt"])
    contains(message, "--general_data good.txt", str(model), "remembers general text already", "leave it out")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("no such file",)),
        (b"", ("is empty",)),
        (b"\x89PNG\r\n" + b"words \0" * 100, ("binary",)),
        (b"good line\n" * 20_000 + b"caf\xe9\n", ("not UTF-8", "line 20001")),
        (b"One paragraph only. " * 100, ("--general_data general.txt is one document", "give text of several")),
    ],
)
def test_general_text_that_cannot_be_read(
    content: bytes | None, words: tuple[str, ...], work: Path, fails: Fails
) -> None:
    if content is not None:
        (work / "general.txt").write_bytes(content)
    contains(fails(3, ["--general_data", "general.txt"]), "general.txt", *words)


# Stages


@pytest.mark.parametrize("more", [["--data", "good.txt"], []])
def test_a_stage_that_is_not_there(
    more: list[str], model: Path, base: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["continue", *FLAGS.split(), "--domain", "new", *more, "--rollback_to", "medicine"]
    for folder, told in ((model, "it knows base, law"), (base, "has no history of domains")):
        assert run([*words, "--model", str(folder)]) == 2
        contains(" ".join(capsys.readouterr().err.split()), "--rollback_to medicine", str(folder), told)
    assert not (work / "run").exists()


def test_going_back_needs_a_place(model: Path, fails: Fails, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["continue", "--model", str(model), "--rollback_to", "base"]) == 2
    contains(capsys.readouterr().err, "--output is missing")
    assert fails(2, ["--model", str(model), "--rollback_to", "base", "--domain", "base"])


def spoil(folder: Path, kind: str) -> None:
    """Take the base away, or give it other weights."""
    if kind == "deleted":
        shutil.rmtree(folder)
        return
    path = folder / "checkpoints/best/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(("kind", "told"), [("deleted", "that is gone"), ("changed", "holds other weights now")])
def test_a_stage_that_was_taken_away(
    kind: str, told: str, model: Path, tmp_path: Path, work: Path, fails: Fails
) -> None:
    spoil(tmp_path / "parent", kind)
    message = fails(4, ["--model", str(model), "--rollback_to", "base"])
    contains(message, str(model), "stage 'base'", str(tmp_path / "parent"), told, "--model")
    for verb in (["evaluate", "--data", "good.txt"], ["generate", "--prompt", "Of"]):
        assert run([*verb, "--model", str(model), "--domain", "base"]) == 4
    # The model itself needs no earlier stage.
    assert run(words_for(["--model", str(model)], model)) == 0
    assert (work / "run/checkpoints/best").is_dir()


# Damage


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: "", ("not a readable history",)),
        (lambda text: text[: len(text) // 2], ("not a readable history",)),
        (lambda _: "[" * 100_000, ("not a readable history",)),
        (lambda _: "[]", ("expected a JSON object",)),
        (lambda text: text.replace('"version": 1', '"version": 2'), ("version 2", "install a newer one")),
        (lambda text: text.replace('"domain": "base"', '"domain": "law"'), ("stage `base` first",)),
        (lambda text: text.replace('"domain": "law"', '"domain": "../../law"'), ("stages.1.domain",)),
        (lambda text: text.replace('"steps": 1', '"steps": "1"'), ("stages.1.steps", "integer")),
        (lambda text: text.replace('"steps": 1', '"steps": -1'), ("stages.1.steps", "greater")),
        (lambda text: text.replace('"steps": 1', '"stepps": 1'), ("stages.1.stepps",)),
    ],
)
def test_a_damaged_history(change: Callable[[str], str], words: tuple[str, ...], model: Path, fails: Fails) -> None:
    edit_history(model, change)
    contains(fails(4, ["--model", str(model)]), "history.json", "copy the folder again", *words)


@pytest.mark.parametrize("kind", ["held_out", "reserve"])
@pytest.mark.parametrize("line", ["{", "7", '{"text": "x"}', '"\\ud800"', "\udcff"])
def test_damaged_texts(kind: str, line: str, model: Path, fails: Fails) -> None:
    path = model / f"seedbed/domains/law/{kind}.jsonl"
    path.unlink()
    path.write_bytes(f'"whole"\n{line}\n'.encode(errors="surrogateescape"))
    contains(fails(4, ["--model", str(model)]), f"{kind}.jsonl", "copy the folder again")


def test_texts_that_are_missing(model: Path, learnt_once: Path, fails: Fails) -> None:
    for kind in ("held_out", "reserve"):
        (model / f"seedbed/domains/law/{kind}.jsonl").unlink()
        contains(fails(4, ["--model", str(model)]), f"law/{kind}.jsonl", "copy the folder again")
        shutil.copyfile(
            learnt_once / f"law/checkpoints/best/seedbed/domains/law/{kind}.jsonl",
            model / f"seedbed/domains/law/{kind}.jsonl",
        )


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("nowhere/at/all", 2, ("--model nowhere/at/all does not exist",)),
        ("good.txt", 2, ("--model good.txt is a file",)),
        (".", 4, ("holds no model",)),
    ],
)
def test_a_model_that_is_not_there(name: str, code: int, words: tuple[str, ...], fails: Fails) -> None:
    contains(fails(code, ["--model", name]), *words)


def test_an_adapter_without_its_weights(base: Path, work: Path, fails: Fails) -> None:
    assert run([*words_for(["--lora"], base)]) == 0
    shutil.copytree(work / "run/checkpoints/best", work / "adapter")
    (work / "adapter/adapter_model.safetensors").unlink()
    shutil.rmtree(work / "run")
    contains(fails(4, ["--model", "adapter"]), "adapter_model.safetensors")


@pytest.mark.parametrize("content", ["data: [", "7", "val_split: 7\ndata: [1]"])
def test_an_unusable_config_beside_the_model(content: str, model: Path, tmp_path: Path, work: Path) -> None:
    """The model is then one from elsewhere."""
    (tmp_path / "parent/config.yaml").write_text(content, encoding="utf-8")
    assert run(words_for(["--model", str(tmp_path / "parent")], model)) == 0
    method = json.loads((work / "run/metrics.json").read_text(encoding="utf-8"))["method"]
    assert "self_replay" in method
    assert method["learning_rate"] == 2e-5
