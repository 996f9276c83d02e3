"""seedbed without a shell: train, load, generate, evaluate.

import seedbed

run = seedbed.pretrain(data="python-docs", model="tiny", max_steps=300)
model = seedbed.load(run.path)
print(model.generate("The list", max_new_tokens=40))
print(model.evaluate("held_out.txt").bits_per_byte)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final, Literal, Self, overload

import torch
from rich.console import Console

from seedbed.checkpoint import find_model, load_model
from seedbed.config import CALL, Layer, SamplingOptions, read_config_file, read_run_options, read_section, resolve
from seedbed.data import open_whole
from seedbed.device import Precision, autocast, pick_precision
from seedbed.errors import ConfigError, did_you_mean
from seedbed.evaluate import Evaluation, evaluate
from seedbed.generate import generate
from seedbed.model.decoder import Decoder
from seedbed.model.decoding import DecodingModel
from seedbed.model.shape import contradictions
from seedbed.runs.info import was_taught_to_answer
from seedbed.text.template import find_template
from seedbed.text.tokenizer import Tokenizer
from seedbed.train.run import run_training

METHODS: Final = ("pretrain", "finetune", "continue")

_ONE_AT_A_TIME = threading.RLock()  # a model keeps what it writes; and threads would share the cores anyway


@dataclass(frozen=True)
class Run:
    """A finished or stopped run: its folder, how it ended, and the figures of its `metrics.json`."""

    path: Path
    status: str
    exit_code: int
    metrics: dict[str, Any]

    def load(self) -> LanguageModel:
        """The run's best model, or its last where nothing was held out."""
        return load(self.path)


@dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer, from any checkpoint, run or transformers folder. Made by `load`.

    Threads may share it: one at a time writes or evaluates.
    """

    path: Path
    decoder: Decoder
    tokenizer: Tokenizer
    precision: Precision
    """Of the matrix products when it writes."""

    @overload
    def generate(self, prompts: str, **options: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str], **options: Any) -> list[str]: ...

    def generate(self, prompts: str | Sequence[str], **options: Any) -> str | list[str]:
        """What the model writes after each prompt; options as `seedbed generate` has them.

        Raises:
            ConfigError: an unknown option or value, or a prompt longer than the context.
        """
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = self._write(several, options)
        return texts[0] if isinstance(prompts, str) else texts

    def chat(self, question: str | Sequence[dict[str, str]], **options: Any) -> str:
        """The model's answer, asked in its chat template.

        Args:
            question: what the user says; or a conversation, messages with `role` and `content`.
            options: as `seedbed generate` has them.

        Raises:
            ConfigError: the model has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise ConfigError(f"{self.path} has no chat template, so it was not taught to answer; use generate()")
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        if not messages or not all(
            isinstance(message, dict) and {"role", "content"} <= set(message) for message in messages
        ):
            raise ConfigError("chat: expected a question, or a list of messages with `role` and `content`")
        prompt = find_template(self.tokenizer, None, "chat").prompt_ids(messages)
        return self._write([prompt], options)[0]

    def _write(self, prompts: Sequence[str | Sequence[int]], options: dict[str, Any]) -> list[str]:
        sampling = read_section(SamplingOptions, options, CALL)
        with _ONE_AT_A_TIME:
            completions = generate(self.decoder, self.tokenizer, prompts, sampling, decoding=self._decoding())
        return [completion.text for completion in completions]

    def _decoding(self) -> DecodingModel:
        """The model as it writes, made anew when a weight has changed."""
        weights = _marks(self.decoder)
        kept: tuple[Any, DecodingModel] | None = vars(self).get("_kept")
        if kept is None or kept[0] != weights:
            with autocast(self.decoder.embed_tokens.weight.device, self.precision):
                kept = vars(self)["_kept"] = (weights, DecodingModel(self.decoder))
        return kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_kept"}

    def evaluate(
        self,
        data: str | Path,
        *,
        max_seq_len: int | None = None,
        stride: int | None = None,
        document: str | None = None,
        text_column: str = "text",
        format: str = "auto",
        chat_template: str | None = None,
        batch_size: int = 8,
        precision: Precision | Literal["auto"] = "fp32",
    ) -> Evaluation:
        """How well the model predicts a text, or the answers of conversations: its loss and perplexities.

        Args:
            data: a file, folder, glob or named source.
            max_seq_len: tokens predicted in one window; by default what the model allows, at most 1024.
            stride: tokens between windows; smaller gives each token more context and takes longer.
            document: what separates documents, as `--document` has it; by default a file is one.
            text_column: of tables, the column that holds the text.
            format: of conversations; `auto` looks.
            chat_template: for conversations; by default the tokenizer's own, else the format's.
            batch_size: windows predicted at once.
            precision: of the matrix products.
        """
        source = open_whole(str(data), document=document, text_column=text_column, format=format)
        length = min(1024, self.decoder.config.max_seq_len) if max_seq_len is None else max_seq_len
        taught, kind = was_taught_to_answer(self.path), source.format
        template = None if kind == "text" else find_template(self.tokenizer, chat_template, kind, taught=taught)
        device = self.decoder.embed_tokens.weight.device
        with _ONE_AT_A_TIME, autocast(device, pick_precision(precision, device)):
            return evaluate(
                self.decoder,
                self.tokenizer,
                source.documents(),
                max_seq_len=length,
                stride=stride,
                batch_size=batch_size,
                template=template,
            )


class Trainer:
    """A run as an object: set options, train, then evaluate and generate with the result.

    trainer = seedbed.Trainer("finetune", data="questions.json", model="SmolLM2-135M-Instruct", lora=True)
    trainer.train()
    print(trainer.evaluate("other_book.txt").token_ppl)
    print(trainer.generate("Once upon a time", temperature=0.7))
    """

    def __init__(self, method: Literal["pretrain", "finetune", "continue"] = "pretrain", /, **options: Any) -> None:
        if method not in METHODS:
            raise ConfigError(f"{method}: expected {', '.join(METHODS)}{did_you_mean(method, METHODS)}")
        self.method = method
        self.options = options
        self.run: Run | None = None
        self.model: LanguageModel | None = None

    def train(self) -> Run:
        """Train to the end, or go on where an interrupted run stopped; loads the best weights."""
        methods = {"pretrain": pretrain, "finetune": finetune, "continue": continue_training}
        self.run = methods[self.method](**self.options)
        if self.run.metrics["steps"]:  # else it was stopped before there was anything to load
            self.model = self.run.load()
        return self.run

    def load_model(self, path: str | Path) -> Self:
        """Use an existing model instead of training one."""
        self.model = load(path)
        return self

    def evaluate(self, data: str | Path, **options: Any) -> Evaluation:
        """See `LanguageModel.evaluate`."""
        return self._loaded().evaluate(data, **options)

    def generate(self, prompt: str, **options: Any) -> str:
        """See `LanguageModel.generate`."""
        return self._loaded().generate(prompt, **options)

    def _loaded(self) -> LanguageModel:
        if self.model is None:
            raise ConfigError("the trainer has no model yet; call train() or load_model(path) first")
        return self.model


def _marks(decoder: Decoder) -> list[Any]:
    """What differs once a weight or a part has changed; fused optimizers and `.data` count no version."""
    parameters = list(decoder.parameters())
    with torch.inference_mode():
        sums = [parameter.sum(dtype=torch.float32) for parameter in parameters if parameter.is_floating_point()]
    return [*map(id, decoder.modules()), *map(id, parameters), *map(float, sums)]


def pretrain(
    *, from_run: str | Path | None = None, config: str | Path | None = None, quiet: bool = False, **options: Any
) -> Run:
    """Train a model from scratch; options and their defaults as `seedbed pretrain` has them.

    Args:
        from_run: a run with whose options to begin; this one's parent.
        config: a YAML file or a preset's name, beneath the options.
        quiet: print nothing.

    Raises:
        SeedbedError: what was wrong, with the remedy; see `seedbed.errors`.
    """
    return _run("scratch", from_run, config, quiet, options)


def finetune(
    *, from_run: str | Path | None = None, config: str | Path | None = None, quiet: bool = False, **options: Any
) -> Run:
    """Fine-tune a pretrained model; options and their defaults as `seedbed finetune` has them.

    Args:
        from_run: a run with whose options to begin; this one's parent.
        config: a YAML file, beneath the options.
        quiet: print nothing.

    Raises:
        SeedbedError: what was wrong, with the remedy; see `seedbed.errors`.
    """
    return _run("finetune", from_run, config, quiet, options)


def continue_training(
    *, from_run: str | Path | None = None, config: str | Path | None = None, quiet: bool = False, **options: Any
) -> Run:
    """Add a domain to a model and hold what it knew; options and their defaults as `seedbed continue` has them.

    Args:
        from_run: a run with whose options to begin; this one's parent.
        config: a YAML file, beneath the options.
        quiet: print nothing.

    Raises:
        SeedbedError: what was wrong, with the remedy; see `seedbed.errors`.
    """
    return _run("continue", from_run, config, quiet, options)


def _run(
    regime: str, from_run: str | Path | None, config: str | Path | None, quiet: bool, options: dict[str, Any]
) -> Run:
    layers = [read_run_options(regime, str(from_run))] if from_run else []
    layers += [read_config_file(str(config))] if config else []
    given = {
        name: str(value) if isinstance(value, PathLike | torch.device) else value for name, value in options.items()
    }
    resolved = resolve(regime, [*layers, Layer(CALL, given)], also=contradictions)
    if resolved.keeping.rollback_to and resolved.data.data is None and not resolved.watching.resume_from:
        raise ConfigError("data is missing; to copy a model as it was, use `seedbed continue --rollback_to`")
    # The caller's random numbers go on as if nothing had happened, and gradients are made wherever this is called.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(mode=False), torch.enable_grad():
        outcome = run_training(resolved, Console(quiet=quiet, force_jupyter=False))
    return Run(outcome.path, outcome.summary["status"], outcome.exit_code, outcome.summary)


def load(
    path: str | Path, device: str | torch.device = "auto", precision: Precision | Literal["auto"] = "auto"
) -> LanguageModel:
    """The model in a checkpoint, a run folder (its best), or a transformers folder.

    Args:
        path: the folder.
        device: where it is put; `auto` prefers CUDA, then MPS, then the CPU.
        precision: of the matrix products when it writes; `auto` takes what the hardware accelerates.

    Raises:
        ConfigError: no such folder.
        CheckpointError: a damaged or incomplete one.
    """
    folder = find_model(path, "load")
    decoder, tokenizer = load_model(folder, str(device))
    in_use = pick_precision(precision, decoder.embed_tokens.weight.device)
    return LanguageModel(folder, decoder, tokenizer, in_use)
