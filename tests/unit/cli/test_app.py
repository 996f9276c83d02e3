"""The command line as a contract: which verbs and flags there are, and what becomes of mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from seedbed import __version__
from seedbed.cli.app import run
from seedbed.cli.options import SectionOption
from seedbed.cli.training import demo, pretrain
from seedbed.config import read_preset

TEXT = {
    "--data",
    "--val_data",
    "--val_split",
    "--format",
    "--text_column",
    "--document",
}
STREAMING = {"--streaming", "--no_streaming"}
DATA = TEXT | {
    "--tokenizer",
    "--vocab_size",
    "--max_seq_len",
    "--packing",
    "--no_packing",
    "--chat_template",
    "--train_on_prompt",
    "--no_train_on_prompt",
    "--augment_word_swap",
    "--no_augment_word_swap",
    *STREAMING,
}
PRETRAINED = {"--model", "--dropout"}
MODEL = PRETRAINED | {
    "--arch",
    "--d_model",
    "--num_layers",
    "--num_heads",
    "--num_kv_heads",
    "--d_ff",
    "--tie_embeddings",
    "--no_tie_embeddings",
}
ADAPT = {
    "--last_blocks",
    "--freeze",
    "--add_tokens",
    "--lora",
    "--no_lora",
    "--lora_r",
    "--lora_alpha",
    "--lora_dropout",
    "--lora_targets",
    "--lora_rslora",
    "--no_lora_rslora",
    "--lora_dora",
    "--no_lora_dora",
    "--lora_embeddings",
    "--no_lora_embeddings",
    "--base_precision",
}
TRAINING = {
    "--epochs",
    "--max_steps",
    "--max_tokens",
    "--max_training_hours",
    "--batch_size",
    "--grad_accumulation",
    "--processes",
    "--parallel",
    "--learning_rate",
    "--min_lr",
    "--warmup_steps",
    "--warmup_ratio",
    "--lr_schedule",
    "--optimizer",
    "--weight_decay",
    "--beta1",
    "--beta2",
    "--epsilon",
    "--max_grad_norm",
    "--neftune_alpha",
    "--precision",
    "--gradient_checkpointing",
    "--no_gradient_checkpointing",
    "--compile",
    "--no_compile",
    "--seed",
    "--device",
}
WATCHING = {
    "--eval_every",
    "--log_every",
    "--early_stopping_patience",
    "--save_every",
    "--keep_checkpoints",
    "--async_save",
    "--no_async_save",
    "--output",
    "--stop_at_step",
    "--resume",
    "--no_resume",
    "--resume_from",
    "--tensorboard",
    "--no_tensorboard",
    "--report",
    "--no_report",
    "--sample_prompt",
    "--strict",
    "--no_strict",
    "--allow",
}
SAMPLING = {
    "--max_new_tokens",
    "--temperature",
    "--top_k",
    "--top_p",
    "--repetition_penalty",
    "--no_repeat_ngram",
    "--greedy",
    "--no_greedy",
    "--stop",
    "--seed",
}
EVERY_TRAINING_FLAG = DATA | MODEL | TRAINING | WATCHING
FINETUNE = DATA | PRETRAINED | ADAPT | TRAINING | WATCHING
KEEP = {
    "--domain",
    "--general_data",
    "--method",
    "--replay",
    "--self_replay",
    "--l2_sp",
    "--ewc",
    "--kl",
    "--interpolate",
    "--no_interpolate",
    "--max_forgetting",
    "--on_forgetting",
    "--reserve_mb",
    "--rollback_to",
}

FLAGS: dict[str, set[str]] = {
    "demo": {"--json"} | EVERY_TRAINING_FLAG,
    "pretrain": {"--config", "--from", "--json"} | EVERY_TRAINING_FLAG,
    "finetune": {"--config", "--from", "--json"} | FINETUNE,
    "continue": {"--config", "--from", "--json"} | FINETUNE | KEEP,
    "plan continue": {"--config", "--from", "--json", "--memory_limit"} | FINETUNE | KEEP,
    "plan pretrain": {"--config", "--from", "--json", "--memory_limit"} | EVERY_TRAINING_FLAG,
    "plan finetune": {"--config", "--from", "--json", "--memory_limit"} | FINETUNE,
    "evaluate": {
        "--model",
        "--domain",
        "--data",
        "--format",
        "--chat_template",
        "--text_column",
        "--document",
        "--split",
        "--max_seq_len",
        "--stride",
        "--batch_size",
        "--device",
        "--precision",
        "--json",
    },
    "generate": {
        "--model",
        "--domain",
        "--prompt",
        "--prompt_file",
        "--chat",
        "--system",
        "--device",
        "--precision",
        "--json",
    }
    | SAMPLING,
    "chat": {"--model", "--domain", "--system", "--device", "--precision"} | SAMPLING,
    "tokenizer train": {"--type", "--output", "--json", "--vocab_size"} | TEXT,
    "tokenizer show": {"--text", "--data", "--json"},
    "data list": {"--json"},
    "data show": {"--num", "--model", "--json"} | DATA - STREAMING,
    "runs list": {"--columns", "--sort", "--filter", "--format", "--json"},
    "runs show": {"--lineage", "--baseline", "--json"},
    "runs compare": {"--axis", "--markdown", "--report", "--json"},
    "runs note": set(),
    "runs report": {"--output", "--json"},
    "diagnose": {"--json"},
    "sweep": {"--output", "--at_once", "--dry_run", "--json"},
    "judge": {
        "--model",
        "--data",
        "--format",
        "--chat_template",
        "--limit",
        "--baseline",
        "--against",
        "--output",
        "--batch_size",
        "--device",
        "--judge",
        "--judge_url",
        "--judge_model",
        "--judge_temperature",
        "--judge_concurrency",
        "--judge_timeout",
        "--judge_retries",
        "--judge_price",
        "--repeats",
        "--json",
    }
    | SAMPLING,
    "import": {"--output", "--dtype", "--json"},
    "export": {"--model", "--merge", "--gguf", "--output", "--dtype", "--json"},
    "verify": {"--json"},
}
"""Adding a flag is a line here; renaming or removing one breaks somebody's scripts."""


def listed_flags(help_text: str) -> set[str]:
    heads = [line[2:].split("  ")[0] for line in help_text.splitlines() if line.startswith("  -")]
    return {flag for head in heads for flag in re.findall(r"--[a-z_0-9]+", head)}


@pytest.mark.parametrize("verb", FLAGS)
def test_help_lists_the_flags_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*verb.split(), "--help"]) == 0
    captured = capsys.readouterr()
    assert listed_flags(captured.out) - {"--help"} == FLAGS[verb]
    assert captured.err == ""


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    listed = re.findall(r"^  ([a-z]+)  ", text, flags=re.MULTILINE)
    assert set(listed) == {verb.split()[0] for verb in FLAGS}


@pytest.mark.parametrize("verb", [verb for verb in FLAGS if FLAGS[verb] >= DATA - STREAMING])
def test_help_shows_flags_by_section_with_defaults(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    run([*verb.split(), "--help"])
    text = capsys.readouterr().out
    assert "\nData:\n" in text
    context = {"finetune": "[512]", "continue": "[512]", "demo": "[128]", "show": "[256]"}
    assert context.get(verb.split()[-1], "[256, or the preset's]") in " ".join(text.split())
    assert " ".join(text.split()).count("[on]") >= 1


def helps(command: click.Command) -> dict[str, str]:
    return {str(option.name): option.help or "" for option in command.params if isinstance(option, SectionOption)}


def test_help_says_which_defaults_the_presets_replace() -> None:
    texts = helps(pretrain)
    named = re.search(r"A preset \((.*?)\)", texts["model"])
    assert named
    replaced = {name for preset in named[1].split(", ") for name in read_preset(preset)}
    with_default = {name for name in replaced if texts[name].endswith("]")}
    assert with_default == {name for name, text in texts.items() if text.endswith(", or the preset's]")}
    assert f"small, the default, a learning rate of {read_preset('small')['learning_rate']}" in " ".join(
        (pretrain.help or "").split()
    )


def test_help_of_the_demo_has_its_own_values() -> None:
    texts = helps(demo)
    for name, value in {**read_preset("demo"), "output": "runs/demo"}.items():
        assert texts[name].endswith(f"[{value}]")
        assert "by default" not in texts[name]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"seedbed, version {__version__}\n"


def test_text_is_named_once(small_text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", "--data", str(small_text_file), "--data", "other.txt", "--epochs", "1"]
    assert run(words) == 2
    assert f"--data is given 2 times ({small_text_file}, other.txt); name a folder" in capsys.readouterr().err


def test_hyphens_work_like_underscores(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--vocab_size", "300", "--model", "tiny", "--json"]
    assert run(["plan", "pretrain", "--d_model", "48", "--no_tie_embeddings", *shape]) == 0
    underscores = json.loads(capsys.readouterr().out)["parameters"]
    for flags in (["--d-model", "48", "--no-tie-embeddings"], ["--d-model=48", "--no-tie_embeddings"]):
        assert run(["plan", "pretrain", *flags, *shape]) == 0
        assert json.loads(capsys.readouterr().out)["parameters"] == underscores


def test_every_unknown_flag_is_listed_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["pretrain", "--data", "x", "--lerning_rate", "3", "--num-layrs=4", "--xyzzy", "--epochs", "yes"])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 4
    assert "error: unknown option --lerning_rate; did you mean learning_rate?" in lines
    assert "error: unknown option --num_layrs; did you mean num_layers?" in lines
    assert "error: unknown option --xyzzy" in lines
    assert any("--epochs yes (set on the command line)" in line for line in lines)


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "--model", "m", "--strid", "3"],
        ["generate", "--model", "m", "--top_kk", "3"],
        ["tokenizer", "show", "t", "--txt", "3"],
        ["tokenizer", "train", "--output", "o", "--dta", "3"],
        ["data", "show", "--dta", "x"],
        ["data", "list", "--jsn"],
        ["runs", "show", "r", "--linage"],
        ["verify", "f", "--jsn"],
        ["demo", "--seeed", "1"],
        ["plan", "pretrain", "--modle", "tiny"],
    ],
)
def test_each_verb_refuses_an_unknown_flag(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 2
    error = capsys.readouterr().err
    assert "unknown option --" in error
    assert "did you mean" in error


@pytest.mark.parametrize("words", [["pretrian"], ["pretrain", "book.txt"], ["data"], ["pretrain", "--device"]])
def test_words_that_are_no_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 2
    captured = capsys.readouterr()
    assert captured.out + captured.err


def test_a_missing_value_is_said_for_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate"]) == 2
    assert "--model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "parameters"),
    [
        (["--model", "gpt2-medium"], 354_823_168),
        (["--model", "gpt2-medium", "--no_tie_embeddings"], 406_286_336),
        (["--model", "gpt2-large", "--no_tie_embeddings"], 838_359_040),
        (["--model", "gpt2-xl", "--no_tie_embeddings"], 1_638_022_400),
        (["--config", "gpt2"], 124_439_808),
    ],
)
def test_plan_counts_parameters(flags: list[str], parameters: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "pretrain", *flags, "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["parameters"] == facts["trainable_parameters"] == parameters
    assert facts["parameters_mb"] == pytest.approx(parameters * 4 / 2**20, abs=0.01)
    assert captured.out.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", "--model", "x" * 400, "--data", "text.txt"],
        ["pretrain", "--data", "x" * 400],
        ["evaluate", "--model", "x" * 400],
        ["verify", "x" * 400],
        ["diagnose", "x" * 400],
        ["import", "x" * 400, "--output", "there"],
        ["sweep", "grid.yaml", "--output", "x" * 400],
    ],
)
@pytest.mark.parametrize("there", [[], ["runs"]], ids=["first run", "later run"])
def test_a_name_that_no_file_can_have(
    words: list[str],
    there: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text("verb: pretrain\nbase: {data: text.txt}\ngrid: {learning_rate: [1e-3, 1e-4]}\n")
    for folder in there:
        Path(folder).mkdir()
    assert run(words) == 2
    assert "error: " in capsys.readouterr().err


def test_plan_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "pretrain", "--model", "gpt2-medium"]) == 0
    text = capsys.readouterr().out
    assert "354,823,168" in text
    assert "1,353.5 MB" in text


def test_plan_refuses_contradictions_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "pretrain", "--model", "medium", "--num_kv_heads", "5"]) == 2
    assert "num_heads 12 is not a multiple of num_kv_heads 5" in capsys.readouterr().err


def test_a_file_gives_values_and_flags_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "shape.yaml"
    path.write_text("model: tiny\nvocab-size: 300\nnum_layers: 3\n", encoding="utf-8")
    assert run(["plan", "pretrain", "--config", str(path), "--json"]) == 0
    three = json.loads(capsys.readouterr().out)["parameters"]
    assert run(["plan", "pretrain", "--config", str(path), "--num_layers", "4", "--json"]) == 0
    four = json.loads(capsys.readouterr().out)["parameters"]
    assert four > three


NO_TORCH = """
import sys
from seedbed.cli.app import run
assert run({arguments!r}) == 0
heavy = [name for name in ("torch", "safetensors", "transformers") if name in sys.modules]
assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"], ["data", "list"], ["--version"]])
def test_help_and_lists_need_no_torch(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH.format(arguments=arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_program_is_the_module() -> None:
    done = subprocess.run([sys.executable, "-m", "seedbed", "--nonsense"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "nonsense" in done.stderr
