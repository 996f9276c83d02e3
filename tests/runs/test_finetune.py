"""Fine-tuning as whole runs: what is trained, what stays, what is kept, and what it can begin from."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import seedbed
from seedbed.checkpoint import load_model
from seedbed.cli.app import run
from seedbed.config import FLAGS, Layer, resolve
from seedbed.data import WholeRows
from seedbed.errors import ConfigError, DataError
from seedbed.export import export_merged
from seedbed.lora import num_trainable
from seedbed.model.adjust import grow_vocabulary
from seedbed.model.decoder import Decoder
from seedbed.model.weights import load_decoder, save_decoder
from seedbed.text.template import find_template
from seedbed.train import step
from seedbed.train.build import build_job
from seedbed.train.job import Job
from seedbed.train.progress import Display
from seedbed.train.resume import Start, open_run
from tests.runs.conftest import TUNING, RunIt, read_metrics, read_state

Make = Callable[[str], Path]
IDS = torch.arange(3, 63).reshape(2, 30)


def build(output: Path, data: Path, model: Path, **options: Any) -> Job:
    """A job that is ready to train."""
    from rich.console import Console

    values = {**TUNING, "data": str(data), "model": str(model), "output": str(output), **options}
    start = open_run(resolve("finetune", [Layer(FLAGS, values)]))
    assert isinstance(start, Start)
    job = build_job(start, Display(Console(file=io.StringIO()), 100))
    job.run.close()
    return job


@torch.no_grad()
def logits_of(model: Decoder) -> torch.Tensor:
    return model.eval().logits(model(IDS))


def parameters_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in load_decoder(folder).named_parameters()}


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What is trained


@pytest.mark.parametrize(
    ("data", "model", "options", "frozen"),
    [
        ("text", "llama", {}, ()),
        ("chat", "gpt2", {}, ()),
        ("alpaca", "llama", {"last_blocks": 1}, ("embed_tokens.*", "blocks.0.*")),
        ("text", "gpt2", {"last_blocks": 1}, ("embed_*", "blocks.0.*")),
        ("qa", "llama", {"freeze": "embeddings,norms"}, ("embed_tokens.*", "*norm.*")),
        ("completion", "gpt2", {"freeze": "attention, blocks.1.mlp"}, ("blocks.*.attention.*", "blocks.1.mlp.*")),
    ],
)
def test_what_is_frozen_stays_and_the_rest_learns(
    tune_it: RunIt, pretrained: Make, tmp_path: Path, data: str, model: str, options: dict[str, Any], frozen: Any
) -> None:
    outcome = tune_it(tmp_path / "run", data=data, model=model, **options)
    before, after = parameters_of(pretrained(model)), parameters_of(tmp_path / "run/checkpoints/final")
    stays = {name for name in before if any(fnmatchcase(name, pattern) for pattern in frozen)}
    assert {name for name in before if after[name].equal(before[name])} == stays
    moments = load_file(tmp_path / "run/checkpoints/final/seedbed/optimizer.safetensors")
    assert {name.rpartition("/")[0] for name in moments} == set(before) - stays
    total = sum(tensor.numel() for tensor in before.values())
    trained = sum(tensor.numel() for name, tensor in before.items() if name not in stays)
    summary = json.loads((tmp_path / "run/metrics.json").read_text())
    assert summary == outcome.summary
    assert (summary["parameters"], summary["trainable_parameters"]) == (total, trained)


@pytest.mark.parametrize(
    ("data", "options"),
    [("alpaca", {"lora": True}), ("text", {"lora_r": 4, "last_blocks": 1}), ("chat", {"lora_embeddings": True})],
)
def test_lora_leaves_its_base_alone(
    tune_it: RunIt, pretrained: Make, tmp_path: Path, data: str, options: dict[str, Any]
) -> None:
    files = files_of(pretrained("gpt2").parent.parent)
    outcome = tune_it(tmp_path / "run", data=data, model="gpt2", **options)
    assert files_of(pretrained("gpt2").parent.parent) == files
    before, after = parameters_of(pretrained("gpt2")), seedbed.load(tmp_path / "run").decoder
    assert after.adapter is not None
    named = dict(after.named_parameters())
    trains_embeddings = "lora_embeddings" in options
    for name, tensor in before.items():
        assert named[name].equal(tensor) != (name == "embed_tokens.weight" and trains_embeddings), name
    assert all(tensor.any() for name, tensor in named.items() if name.endswith("lora_B"))
    assert not any(name.startswith("blocks.0") for name in named if "lora" in name) or "last_blocks" not in options
    assert outcome.summary["trainable_parameters"] == num_trainable(
        load_decoder(pretrained("gpt2")).config, after.adapter
    )
    moments = load_file(tmp_path / "run/checkpoints/final/seedbed/optimizer.safetensors")
    trained = {name for name in named if "lora" in name or (name == "embed_tokens.weight" and trains_embeddings)}
    assert {name.rpartition("/")[0] for name in moments} == trained


@pytest.mark.parametrize("options", [{"last_blocks": 1}, {"freeze": "mlp"}, {"lora": True}])
def test_what_is_frozen_has_no_gradient(
    pretrained: Make, questions: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    job = build(tmp_path / "run", questions("qa"), pretrained("llama"), **options)
    for batch in job.micro_batches(0):
        step.batch_objective(job, batch)[1].backward()  # type: ignore[no-untyped-call]
    trained = {id(parameter) for group in job.optimizer.param_groups for parameter in group["params"]}
    for name, parameter in job.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (id(parameter) in trained), name


# Stopping and going on

RESUMED: dict[str, dict[str, Any]] = {
    "lora": {"model": "gpt2", "lora_dropout": 0.2, "lora_dora": True, "dropout": 0.1},
    "lora with new tokens": {
        "data": "chat",
        "chat_template": "chatml",
        "add_tokens": ["<|a|>", "<|b|>"],
        "lora_embeddings": True,
    },
    "whole": {"data": "alpaca", "neftune_alpha": 5, "optimizer": "sgd"},
    "new tokens": {"model": "gpt2", "data": "chat", "chat_template": "chatml", "freeze": "mlp", "packing": False},
    "last block": {"data": "chat", "last_blocks": 1, "train_on_prompt": True},
}


def same_run(a: Path, b: Path) -> None:
    for name in ("final", "best"):
        files = sorted(path.relative_to(a) for path in (a / "checkpoints" / name).rglob("*.safetensors"))
        assert len(files) == 2
        for path in files:
            assert (a / path).read_bytes() == (b / path).read_bytes(), path
    assert read_state(a / "checkpoints/final") == read_state(b / "checkpoints/final")
    assert read_metrics(a) == read_metrics(b)
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("kind", RESUMED)
def test_stopping_changes_nothing(tune_it: RunIt, tmp_path: Path, kind: str) -> None:
    options = {"grad_accumulation": 2, "batch_size": 2, "max_steps": 6, "eval_every": 4, "save_every": 2}
    options |= RESUMED[kind]
    straight = tune_it(tmp_path / "straight", **options)
    assert (straight.exit_code, straight.summary["steps"]) == (0, 6)
    for stop_at in (1, 3, 4):
        stopped = tune_it(tmp_path / "often", stop_at=stop_at, **options)
        assert (stopped.exit_code, stopped.summary["status"]) == (130, "interrupted")
    assert tune_it(tmp_path / "often", **options).exit_code == 0
    same_run(tmp_path / "straight", tmp_path / "often")


def test_moments_of_eight_bits_come_back(tune_it: RunIt, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    options = {"optimizer": "adamw8bit", "max_steps": 4}
    tune_it(tmp_path / "straight", **options)
    tune_it(tmp_path / "stopped", stop_at=2, **options)
    tune_it(tmp_path / "stopped", **options)
    same_run(tmp_path / "straight", tmp_path / "stopped")


def test_going_on_from_a_named_checkpoint(tune_it: RunIt, tmp_path: Path) -> None:
    options = {"lora": True, "batch_size": 1, "max_steps": 4, "save_every": 2}
    tune_it(tmp_path / "straight", **options)
    outcome = tune_it(tmp_path / "branch", resume_from=str(tmp_path / "straight/checkpoints/step-2"), **options)
    assert outcome.summary["parent"] == str(tmp_path / "straight/checkpoints/step-2")
    same_run(tmp_path / "straight", tmp_path / "branch")


def test_another_kind_of_run_does_not_go_on(tune_it: RunIt, tmp_path: Path) -> None:
    tune_it(tmp_path / "run", stop_at=1, lora=True)
    with pytest.raises(ConfigError, match=r"another kind \(lora, and this command means finetune\)"):
        tune_it(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--lora_r 4 \(the run has 16\)"):
        tune_it(tmp_path / "run", lora_r=4)


# What a step is


def test_packing_does_not_change_the_loss(tune_it: RunIt, tmp_path: Path) -> None:
    """One step that is one epoch, then the validation."""
    losses = {}
    for packing in (True, False):
        log = io.StringIO()
        options = {"packing": packing, "batch_size": 64, "epochs": 1, "max_steps": None}
        outcome = tune_it(tmp_path / f"{packing}", log=log, **options)
        assert outcome.summary["steps"] == 1
        records = read_metrics(tmp_path / f"{packing}")
        losses[packing] = [r.get("train_loss", r.get("val_loss")) for r in records] + [outcome.summary["tokens"]]
    assert len(losses[True]) == 3
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)


@pytest.mark.parametrize("options", [{"packing": False}, {"lora": True}])
def test_batch_times_accumulation_is_one_update(tune_it: RunIt, tmp_path: Path, options: dict[str, Any]) -> None:
    """Rows have answers of very different lengths, so a mean of means would be another number."""
    weights = {}
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        output = tmp_path / f"{batch}"
        tune_it(output, batch_size=batch, grad_accumulation=accumulation, learning_rate=3e-4, **options)
        weights[batch] = load_file(next((output / "checkpoints/final").glob("*.safetensors")))
    for batch in (4, 1):
        for name, expected in weights[8].items():
            assert (weights[batch][name] - expected).abs().max() <= 1e-6, f"batch {batch}: {name}"


def test_noise_is_for_training_only(pretrained: Make, questions: Make, tmp_path: Path) -> None:
    plain, noisy = (
        build(tmp_path / f"{alpha}", questions("qa"), pretrained("llama"), neftune_alpha=alpha) for alpha in (0, 10)
    )
    assert logits_of(plain.model).equal(logits_of(noisy.model))
    for job in (plain, noisy):
        job.model.train()
    losses = [step.take_step(job, 0.0).loss for job in (plain, noisy)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.5)


def test_noise_is_as_large_as_its_authors_have_it(pretrained: Make, questions: Make, tmp_path: Path) -> None:
    job = build(tmp_path / "run", questions("qa"), pretrained("llama"), neftune_alpha=10)
    job.model.train()
    noise = job.model.embed_tokens(IDS) - job.model.embed_tokens.weight[IDS]  # (2, 30, 32)
    most = 10 / (30 * 32) ** 0.5
    assert 0.95 * most < noise.abs().max() <= most * 1.0001


def test_augmentation_doubles_what_is_learnt_from_only(pretrained: Make, questions: Make, tmp_path: Path) -> None:
    plain, swapped = (
        build(tmp_path / f"{on}", questions("alpaca"), pretrained("llama"), augment_word_swap=on, packing=False)
        for on in (False, True)
    )
    assert len(swapped.rows) == 2 * len(plain.rows)
    assert swapped.validation is not None
    assert plain.validation is not None
    assert len(swapped.validation.rows) == len(plain.validation.rows)
    for index in range(len(plain.validation.rows)):
        one, other = swapped.validation.rows.row(0, index), plain.validation.rows.row(0, index)
        assert (one.input_ids == other.input_ids).all()
        assert (one.labels == other.labels).all()


def test_the_model_is_asked_the_first_question_that_fits(
    pretrained: Make, tmp_path: Path, make_text: Callable[[int], Path]
) -> None:
    long = make_text(2_000).read_text(encoding="utf-8")
    rows = [{"question": f"{i} {long}" if i != 3 else "How many?", "answer": "Five."} for i in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    job = build(tmp_path / "run", tmp_path / "rows.json", pretrained("llama"), max_seq_len=32, val_split=0)
    assert job.sample
    assert job.sample.shown == "How many?"
    assert not isinstance(job.sample.given, str)
    assert job.tokenizer.decode(job.sample.given) == "QUESTION: How many?\nANSWER:"


# What is said before


def test_guardrails_warn_and_strict_refuses(
    pretrained: Make, questions: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = {**TUNING, "learning_rate": 3e-4, "data": questions("qa"), "model": pretrained("llama")}
    del fixed["tensorboard"], fixed["report"]
    flags = [f"--{name}={value}" for name, value in fixed.items()]
    flags += ["--no_tensorboard", "--no_report", "--warmup_ratio=0.4"]

    def tune(name: str, *more: str) -> str:
        code = run(["finetune", *flags, "--output", str(tmp_path / name), *more])
        printed = capsys.readouterr()
        assert code == (2 if name == "strict" else 0), printed.err
        return printed.err + printed.out

    assert "Warning (learning_rate): --learning_rate 3e-4 is 6 times the top" in tune("warned").replace("\n", " ")
    assert "--learning_rate 3e-4 is 6 times the top" in tune("strict", "--strict")
    assert not (tmp_path / "strict").exists()
    allowed = ["--allow=learning_rate", "--allow=few_steps", "--allow=duplicates"]
    assert "(learning_rate)" not in tune("allowed", "--strict", *allowed)


# Checkpoints in other programs


def test_peft_opens_a_run(tune_it: RunIt, pretrained: Make, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    for model in ("gpt2", "llama"):
        tune_it(tmp_path / model, model=model, lora_targets="all-linear,head", learning_rate=1e-2)
        base = transformers.AutoModelForCausalLM.from_pretrained(pretrained(model))
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / model / "checkpoints/best").eval()
        with torch.no_grad():
            torch.testing.assert_close(
                logits_of(seedbed.load(tmp_path / model).decoder), theirs(IDS).logits, atol=1e-5, rtol=1e-4
            )


@pytest.mark.parametrize(
    ("data", "options"), [("alpaca", {}), ("qa", {}), ("chat", {"chat_template": "chatml"}), ("completion", {})]
)
def test_transformers_opens_a_run_and_its_template(
    tune_it: RunIt, tmp_path: Path, data: str, options: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    tune_it(tmp_path / "run", data=data, **options)
    folder = tmp_path / "run/checkpoints/best"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model, tokenizer = load_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model), theirs(IDS).logits, atol=1e-5, rtol=1e-4)
    assert (folder / "chat_template.jinja").is_file()
    messages = [
        {"role": "user", "content": "Count from 2 to 5."},
        {"role": "assistant", "content": "2 3 4 5"},
        {"role": "user", "content": " And\nback? "},
    ]
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert find_template(tokenizer, None, data).prompt_ids(messages) == ids


# New tokens


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_new_tokens_begin_as_the_mean(pretrained: Make, questions: Make, tmp_path: Path, model: str) -> None:
    options = {"chat_template": "chatml", "add_tokens": ["<|tool|>"]}
    job = build(tmp_path / "run", questions("chat"), pretrained(model), **options)
    before = load_decoder(pretrained(model))
    assert (job.tokenizer.vocab_size, job.model.config.vocab_size) == (403, 403)
    tables = [(before.embed_tokens, job.model.embed_tokens)]
    if before.lm_head is None:
        assert job.model.lm_head is None
    else:
        assert job.model.lm_head is not None
        tables.append((before.lm_head, job.model.lm_head))  # type: ignore[arg-type]
    for old, new in tables:
        assert new.weight[:400].equal(old.weight)
        torch.testing.assert_close(new.weight[400:], old.weight.mean(0).expand(3, -1))


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_transformers_opens_a_model_with_new_tokens(tune_it: RunIt, tmp_path: Path, model: str) -> None:
    transformers = pytest.importorskip("transformers")
    tune_it(tmp_path / "run", data="chat", model=model, chat_template="chatml", add_tokens=["<|tool|>"])
    folder = tmp_path / "run/checkpoints/best"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.config.tie_word_embeddings == (model == "gpt2")
    assert theirs.get_input_embeddings().weight.shape == theirs.get_output_embeddings().weight.shape == (403, 32)
    end = their_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert their_tokenizer.eos_token_id == end >= 400
    assert set(theirs.generation_config.eos_token_id) == {end, 0}  # and where its texts ended before
    ours = seedbed.load(folder)
    assert ours.tokenizer.eos_id == end
    assert set(ours.tokenizer.stop_ids) == {end, 0}
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ours.decoder), theirs(IDS).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"data": "chat", "chat_template": "chatml"}, {"add_tokens": ["<|tool|>"]}])
def test_adapters_alone_cannot_learn_new_tokens(tune_it: RunIt, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"new tokens learn nothing .* add --lora_embeddings"):
        tune_it(tmp_path / "run", lora=True, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_adapters_and_embeddings_learn_new_tokens(tune_it: RunIt, pretrained: Make, tmp_path: Path, model: str) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    options = {"data": "chat", "chat_template": "chatml", "lora_embeddings": True, "learning_rate": 1e-2}
    tune_it(tmp_path / "run", model=model, **options)
    ours = seedbed.load(tmp_path / "run")
    assert ours.decoder.config.vocab_size == 402
    base = transformers.AutoModelForCausalLM.from_pretrained(pretrained(model))
    base.resize_token_embeddings(402, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run/checkpoints/best").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ours.decoder), theirs(IDS).logits, atol=1e-5, rtol=1e-4)


# What a run can begin from


def start_of(kind: str, tune_it: RunIt, pretrained: Make, tmp_path: Path) -> Path:
    """A model folder of one kind or another."""
    base, adapter = pretrained("gpt2"), tmp_path / "adapter"
    if kind == "run":
        return base.parent.parent
    if kind == "checkpoint":
        return base
    if kind in ("transformers", "shards"):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
        theirs.save_pretrained(tmp_path / kind, max_shard_size="5GB" if kind == "transformers" else "60KB")
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / kind)
        assert (kind == "shards") == (tmp_path / kind / "model.safetensors.index.json").is_file()
        return tmp_path / kind
    more = {"chat_template": "chatml", "lora_embeddings": True} if kind == "adapter with new tokens" else {}
    tune_it(adapter, model="gpt2", lora=True, learning_rate=1e-2, **more)
    if kind == "merged":
        export_merged(adapter, tmp_path / "merged")
        return tmp_path / "merged"
    if kind == "adapter without tokenizer":
        for path in (adapter / "checkpoints/best").iterdir():
            if path.is_file() and not path.name.startswith("adapter_"):
                path.unlink()
        for name in ("manifest", "state"):  # as another program would have made it
            (adapter / f"checkpoints/best/seedbed/{name}.json").unlink()
    return adapter


@pytest.mark.parametrize(
    "kind",
    [
        "transformers",
        "shards",
        "run",
        "checkpoint",
        "adapter",
        "adapter with new tokens",
        "adapter without tokenizer",
        "merged",
    ],
)
def test_a_run_begins_with_the_weights_it_is_given(
    tune_it: RunIt, pretrained: Make, questions: Make, tmp_path: Path, kind: str
) -> None:
    folder = start_of(kind, tune_it, pretrained, tmp_path)
    expected = seedbed.load(folder)
    job = build(tmp_path / "tuned", questions("qa"), folder)
    assert job.model.adapter is None
    torch.testing.assert_close(logits_of(job.model), logits_of(expected.decoder), atol=1e-5, rtol=1e-5)
    assert job.tokenizer.vocab_size == expected.tokenizer.vocab_size
    if "adapter" not in kind:
        adapted = build(tmp_path / "adapted", questions("qa"), folder, lora=True)
        torch.testing.assert_close(logits_of(adapted.model), logits_of(expected.decoder), atol=1e-5, rtol=1e-5)


def test_learning_happens(tune_it: RunIt, tmp_path: Path) -> None:
    for options in ({"learning_rate": 1e-2}, {"learning_rate": 3e-2, "lora": True}):
        output = tmp_path / f"{len(options)}"
        outcome = tune_it(output, epochs=6, max_steps=None, eval_every=10_000, **options)
        losses = [record["val_loss"] for record in read_metrics(output) if "val_loss" in record]
        assert outcome.summary["best_val_loss"] < losses[0] - 0.5


# Without a shell, and afterwards


def test_from_python(pretrained: Make, questions: Make, tmp_path: Path) -> None:
    options = {**TUNING, "data": str(questions("qa")), "model": str(pretrained("llama"))}
    tuned = seedbed.finetune(output=str(tmp_path / "whole"), quiet=True, **options)
    assert (tuned.status, tuned.exit_code, tuned.path) == ("done", 0, tmp_path / "whole")
    model = tuned.load()
    answer = model.chat("Count from 1 to 3.", max_new_tokens=5)
    turn = [{"role": "user", "content": "Count from 1 to 3."}]
    assert model.chat(turn, max_new_tokens=5) == answer
    prompt = find_template(model.tokenizer, None, "qa").render(turn, add_generation_prompt=True)
    assert model.generate(prompt, max_new_tokens=5) == answer
    trainer = seedbed.Trainer("finetune", output=str(tmp_path / "lora"), quiet=True, lora=True, **options)
    assert trainer.train().metrics["trainable_parameters"] < tuned.metrics["trainable_parameters"]
    assert isinstance(trainer.generate("Count", max_new_tokens=3), str)
    with pytest.raises(ConfigError, match="no chat template"):
        seedbed.load(pretrained("llama")).chat("Hello?")


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("alpaca", {"augment_word_swap": True}),
        ("qa", {"lora": True}),
        ("chat", {"packing": False}),
        ("completion", {}),
        ("completion", {"chat_template": "chatml"}),
    ],
)
def test_evaluate_measures_what_validation_did(
    tune_it: RunIt, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str, options: dict[str, Any]
) -> None:
    outcome = tune_it(tmp_path / "run", data=data, **options)
    capsys.readouterr()
    assert run(["evaluate", "--model", str(tmp_path / "run"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["nats_per_token"] == pytest.approx(outcome.summary["best_val_loss"], abs=1e-4)
    assert facts["bits_per_byte"] == pytest.approx(outcome.summary["bits_per_byte"], rel=1e-4)


def test_completions_are_asked_for_as_they_were_taught(tune_it: RunIt, questions: Make, tmp_path: Path) -> None:
    """A model from elsewhere is not known to have learnt them in its template."""
    rows = str(questions("completion"))
    outcome = tune_it(tmp_path / "run", data="completion", chat_template="chatml", val_data=rows)
    model = seedbed.load(tmp_path / "run")
    assert model.evaluate(rows).nats_per_token == pytest.approx(outcome.summary["best_val_loss"], abs=1e-4)
    shutil.copytree(tmp_path / "run/checkpoints/best", tmp_path / "elsewhere")
    elsewhere = seedbed.load(tmp_path / "elsewhere")
    plain = elsewhere.evaluate(rows, chat_template="plain").nats_per_token
    assert elsewhere.evaluate(rows).nats_per_token == plain != model.evaluate(rows).nats_per_token


def test_validation_counts_each_target_once(pretrained: Make, questions: Make, tmp_path: Path) -> None:
    job = build(tmp_path / "run", questions("chat"), pretrained("llama"))
    assert isinstance(job.rows, WholeRows)
    labels = [job.rows.row(0, index).labels for index in range(len(job.rows))]
    assert sum(int((row != -100).sum()) for row in labels) == job.rows.num_targets


# Where answers end, and what they are worth


IM = ("<|im_start|>", "<|im_end|>")


def with_chatml(model: Path, folder: Path) -> Path:
    """The model with ChatML's tokens among its own, and another end of text, as base models come."""
    decoder, known = load_model(model)
    tokenizer = known.with_tokens(IM)
    grow_vocabulary(decoder, known.vocab_size, tokenizer.vocab_size)
    save_decoder(decoder, folder, bos_token_id=None, eos_token_id=tokenizer.eos_id)
    tokenizer.save(folder)
    return folder


def test_generation_stops_where_the_template_ends_an_answer(tune_it: RunIt, pretrained: Make, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base = with_chatml(pretrained("llama"), tmp_path / "base")
    tune_it(tmp_path / "run", data="chat", model=str(base), chat_template="chatml", max_steps=1)
    model = seedbed.load(tmp_path / "run")
    end = model.tokenizer.encode_with_special_tokens("<|im_end|>")[0][0]
    assert model.tokenizer.eos_token == "<|endoftext|>"
    assert model.tokenizer.stop_ids == {0, end}
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "run/checkpoints/best")
    assert set(theirs.eos_token_id) == {0, end}


def test_added_tokens_are_found_in_the_text(tune_it: RunIt, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    data = tmp_path / "notes.jsonl"
    rows = [{"question": f"What is {i}?", "answer": f"<note> It is {i}. </note>"} for i in range(9)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tune_it(tmp_path / "run", data=str(data), add_tokens=["<note>", "</note>"], max_steps=1)
    folder = tmp_path / "run/checkpoints/best"
    ours, theirs = seedbed.load(folder).tokenizer, transformers.AutoTokenizer.from_pretrained(folder)
    template = find_template(ours, None, "qa")
    example = template.example([{"role": "user", "content": "a"}, {"role": "assistant", "content": rows[3]["answer"]}])
    assert {400, 401} <= {token for token, learnt in zip(example.token_ids, example.trained, strict=True) if learnt}
    text = "A <note> here </note>"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text), skip_special_tokens=True) == text


CALLS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['tool_calls'] %}{{ m['tool_calls']|tojson }}"
    "{% endif %}<|endoftext|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_answers_that_only_call_tools(tune_it: RunIt, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What they are worth in bytes is what the template writes of them; a template that writes nothing is refused."""
    call = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
    turns = [{"role": "user", "content": "How is it?"}, {"role": "assistant", "content": None, "tool_calls": call}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8, encoding="utf-8")
    (tmp_path / "calls.jinja").write_text(CALLS, encoding="utf-8")
    data = str(tmp_path / "rows.jsonl")
    chosen: dict[str, Any] = {"data": data, "max_steps": 1, "val_data": data}
    outcome = tune_it(tmp_path / "run", **chosen, chat_template=str(tmp_path / "calls.jinja"))
    assert run(["evaluate", "--model", str(tmp_path / "run"), "--data", data, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == 8 * len(json.dumps(call))
    assert facts["bits_per_byte"] == pytest.approx(outcome.summary["bits_per_byte"], rel=1e-4)
    with pytest.raises(DataError, match="prints nothing of an answer's tool_calls"):
        tune_it(tmp_path / "other", **chosen, chat_template="chatml")


def test_bits_per_byte_of_documents_that_are_cut(run_it: RunIt, tmp_path: Path) -> None:
    """Against the text that is learnt, not against all of it."""
    found = [run_it(tmp_path / str(on), packing=on, max_steps=20).summary["bits_per_byte"] for on in (True, False)]
    assert found[1] == pytest.approx(found[0], rel=0.2)
