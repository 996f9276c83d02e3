"""What `speed.py` measures: jobs, and for each the command lines of seedbed and of its peers."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from seedbed.text.tokenizer import Tokenizer

PEERS: Final = Path(__file__).resolve().parent / "peers"
TOKENIZED_BYTES: Final = 200_000_000
HELD_OUT_CHARACTERS: Final = 50_000


@dataclass(frozen=True)
class Contender:
    """A command, a process of its own, that prints its figures as one line of JSON."""

    name: str
    command: Sequence[str]
    is_peer: bool = True


@dataclass(frozen=True)
class Job:
    """What contenders do side by side."""

    title: str
    unit: str
    contenders: Sequence[Contender]


@dataclass(frozen=True)
class Shape:
    """A GPT-2 to train from scratch."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int
    vocab_size: int
    learning_rate: float
    tokenizer: str
    """A folder, or `char`."""
    tokens: str
    """Name of the file of tokens that peers read."""
    dataset: str
    """Name of nanoGPT's data folder."""
    timed: int

    def seedbed_flags(self) -> list[str]:
        """Of `seedbed pretrain`, without the text."""
        return (
            f"--arch gpt2 --num_layers {self.layers} --num_heads {self.heads} --d_model {self.width} "
            f"--max_seq_len {self.context} --batch_size {self.batch} --tokenizer {self.tokenizer} --document file "
            f"--learning_rate {self.learning_rate} --lr_schedule constant --warmup_steps 0 --weight_decay 0.1"
        ).split()

    def peer_flags(self, work: Path) -> list[str]:
        """Of the scripts in peers/."""
        return (
            f"--tokens {work / self.tokens} --vocab_size {self.vocab_size} --layers {self.layers} "
            f"--heads {self.heads} --width {self.width} --context {self.context} --batch {self.batch} "
            f"--learning_rate {self.learning_rate} --warm_up 2 --timed {self.timed}"
        ).split()

    def nanogpt_flags(self) -> list[str]:
        """Of nanoGPT's train.py: those its page gives for a CPU, and the shape."""
        return (
            f"--device=cpu --compile=False --eval_iters=1 --eval_interval=1000000 --log_interval=1 "
            f"--dataset={self.dataset} --block_size={self.context} --batch_size={self.batch} "
            f"--n_layer={self.layers} --n_head={self.heads} --n_embd={self.width} --bias=True --dropout=0.0 "
            f"--gradient_accumulation_steps=1 --decay_lr=False --learning_rate={self.learning_rate}"
        ).split()


@dataclass(frozen=True)
class Place:
    """Where everything is."""

    peers_python: Path
    starter: Path
    data: Path
    nanogpt: Path | None
    work: Path

    @property
    def plays(self) -> Path:
        return self.work / "plays.txt"

    def texts(self) -> list[str]:
        """Flags of seedbed: the plays, and text from their last tenth to measure on."""
        return ["--data", str(self.plays), "--val_data", str(self.work / "held-out.txt")]

    def gpt2(self) -> Shape:
        tokenizer = str(self.data / "gpt2-tokenizer")
        return Shape(12, 12, 768, 512, 4, 50_257, 3e-4, tokenizer, "gpt2.bin", "texts", timed=2)

    def char(self) -> Shape:
        return Shape(6, 6, 384, 256, 16, 65, 1e-3, "char", "char.bin", "shakespeare_char", timed=10)


def seedbed_steps(name: str, words: Sequence[str], timed: int, *flags: str, warm_up: int = 2) -> Contender:
    """A training command of seedbed."""
    script = [sys.executable, str(PEERS / "seedbed_train.py"), "--warm_up", str(warm_up), "--timed", str(timed)]
    return Contender(name, [*script, *flags, "--", *words], is_peer=False)


def peer(place: Place, name: str, script: str, *flags: str) -> Contender:
    return Contender(name, [str(place.peers_python), str(PEERS / script), *flags])


def watched(place: Place, name: str, shape: Shape, line: str, command: Sequence[str]) -> Contender:
    """A peer that prints a line a step."""
    flags = f"--tokens {shape.batch * shape.context} --warm_up 2 --timed {shape.timed}".split()
    return peer(place, name, "watch.py", "--line", line, *flags, "--", str(place.peers_python), "-u", *command)


def pretraining(place: Place, shape: Shape, title: str) -> Job:
    """A model from scratch: seedbed, Trainer, nanoGPT, litgpt."""
    words = ["pretrain", *place.texts(), *shape.seedbed_flags()]
    flags = shape.peer_flags(place.work)
    litgpt = [str(PEERS / "litgpt_pretrain.py"), *flags]
    line = r"iter \d+ step .* loss train: (?P<loss>[\d.]+)"
    contenders = [
        seedbed_steps("seedbed", words, shape.timed),
        seedbed_steps("seedbed `--compile`", [*words, "--compile"], shape.timed),
        peer(place, "Trainer", "trainer.py", *flags),
        peer(place, "Trainer bf16", "trainer.py", *flags, "--bf16"),
        peer(place, "Trainer bf16, compile", "trainer.py", *flags, "--bf16", "--compile"),
        *nanogpt(place, shape, flags),
        watched(place, "litgpt (compiles)", shape, line, litgpt),
        watched(place, "litgpt bf16-mixed (compiles)", shape, line, [*litgpt, "--bf16"]),
    ]
    return Job(title, "tokens/s", contenders)


def nanogpt(place: Place, shape: Shape, flags: Sequence[str]) -> list[Contender]:
    """As documented for a CPU, and its model with what train.py leaves out there; nothing without a checkout."""
    if place.nanogpt is None:
        return []
    code = place.work / "nanogpt"
    # It reads its files below the working folder, and executes them.
    train = f"import os, runpy; os.chdir({str(code)!r}); runpy.run_path('train.py', run_name='__main__')"
    command = ["-c", train, *shape.nanogpt_flags(), "--max_iters=1000000", f"--out_dir={place.work / 'out'}"]
    best = ["--nanogpt", str(place.nanogpt), "--bf16", "--compile"]
    return [
        watched(place, "nanoGPT", shape, r"^iter \d+: loss (?P<loss>[\d.]+)", command),
        peer(place, "nanoGPT bf16, compile, fused AdamW", "nanogpt_best.py", *flags, *best),
    ]


def lora(place: Place) -> Job:
    """A pretrained model on questions and answers."""
    rows = place.data / "instruction-1100.json"
    words = (
        f"finetune --lora --lora_r 16 --lora_alpha 32 --model {place.starter} --data {rows} --max_seq_len 512 "
        "--batch_size 8 --learning_rate 2e-4 --lr_schedule constant --warmup_steps 0 --weight_decay 0.1"
    ).split()
    flags = ["--model", str(place.starter), "--data", str(rows)]
    best = ["--packing", "--bf16", "--no_checkpointing"]
    few = ["--warm_up", "1", "--timed", "2"]  # packed rows are all alike, and take a minute a step
    contenders = [
        seedbed_steps("seedbed", words, 5, "--conversations"),
        seedbed_steps("seedbed `--compile`", [*words, "--compile"], 5, "--conversations"),
        peer(place, "TRL", "trl_lora.py", *flags, "--timed", "8"),
        peer(place, "TRL packing", "trl_lora.py", *flags, "--packing", *few),
        peer(place, "TRL packing, bf16, no checkpointing", "trl_lora.py", *flags, *best, *few),
    ]
    title = "LoRA r 16 on all linear layers, SmolLM2-135M-Instruct, 1,100 questions and answers, 512, batch 8"
    return Job(title, "useful tokens/s", contenders)


def generation(place: Place, batch: int) -> Job:
    flags = ["--model", str(place.starter), "--text", str(place.plays), "--batch", str(batch)]
    script = "transformers_generate.py"
    ours = [sys.executable, str(PEERS / "seedbed_generate.py"), *flags]
    contenders = [
        Contender("seedbed", ours, is_peer=False),
        peer(place, "transformers", script, *flags),
        peer(place, "transformers bf16", script, *flags, "--bf16"),
        peer(place, "transformers bf16, static cache", script, *flags, "--bf16", "--static"),
        peer(place, "transformers bf16, static cache, compile", script, *flags, "--bf16", "--static", "--compile"),
    ]
    if batch == 1:  # the only one it does this for
        contenders.append(peer(place, "transformers bf16, prompt lookup", script, *flags, "--bf16", "--lookup"))
    return Job(f"Greedy generation, SmolLM2-135M-Instruct, 128 new tokens, batch {batch}", "tokens/s", contenders)


def matrix_share(place: Place) -> Job:
    shape = (
        "--document file --vocab_size 8000 --arch llama --num_layers 8 --num_heads 8 --d_model 512 "
        "--max_seq_len 512 --batch_size 8 --lr_schedule constant --warmup_steps 0 --weight_decay 0.1"
    )
    words = ["pretrain", *place.texts(), *shape.split()]
    contenders = [
        seedbed_steps("seedbed", words, 6),
        seedbed_steps("seedbed `--compile`", [*words, "--compile"], 6),
    ]
    return Job("Llama, 8 layers × 512, vocabulary 8,000, context 512, batch 8", "tokens/s", contenders)


def tokenizing(place: Place) -> Job:
    text = place.work / "large.txt"
    script = ["--tokenizer", str(place.starter / "tokenizer.json"), "--text", str(text)]
    script += ["--output", str(place.work / "large.bin")]
    ours = [sys.executable, str(PEERS / "seedbed_tokenize.py"), "--tokenizer", str(place.starter), "--text", str(text)]
    contenders = [
        Contender("seedbed's store", ours, is_peer=False),
        peer(place, "fast tokenizer, `encode_batch`", "fast_tokenizer.py", *script),
        peer(place, "fast tokenizer, `encode_batch_fast`", "fast_tokenizer.py", *script, "--fast"),
    ]
    return Job("Tokenizing 200 MB with SmolLM2's tokenizer", "MB/s", contenders)


def first_step(place: Place) -> Job:
    words = ["pretrain", "--data", str(place.data / "tinyshakespeare.txt"), "--model"]
    gpt2 = ["gpt2", "--max_seq_len", "512", "--batch_size", "4", "--tokenizer", str(place.data / "gpt2-tokenizer")]
    contenders = [
        seedbed_steps("seedbed, `small`, its tokenizer trained first", [*words, "small"], 0, warm_up=1),
        seedbed_steps("seedbed, GPT-2 124M", [*words, *gpt2], 0, warm_up=1),
    ]
    return Job("From the start of the process to the end of the first step, text not yet tokenized", "s", contenders)


JOBS: Final[dict[str, Callable[[Place], Job]]] = {
    "gpt2-124m": lambda place: pretraining(
        place, place.gpt2(), "GPT-2 124M from scratch, vocabulary 50,257, context 512, batch 4"
    ),
    "char": lambda place: pretraining(
        place, place.char(), "Characters: GPT-2, 6 layers × 384, 65 symbols, context 256, batch 16"
    ),
    "lora": lora,
    "generate-1": lambda place: generation(place, 1),
    "generate-8": lambda place: generation(place, 8),
    "matrix-share": matrix_share,
    "tokenize": tokenizing,
    "first-step": first_step,
}


def prepare(place: Place, jobs: Sequence[str]) -> None:
    """Write the texts and tokens that the jobs read."""
    text = (place.data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    place.plays.write_text(text[:cut], encoding="utf-8")
    (place.work / "held-out.txt").write_text(text[cut:][:HELD_OUT_CHARACTERS], encoding="utf-8")
    symbols = {symbol: index for index, symbol in enumerate(sorted(set(text)))}
    write_tokens(place.work / "char.bin", [symbols[symbol] for symbol in text[:cut]])
    write_tokens(place.work / "gpt2.bin", Tokenizer.load(place.data / "gpt2-tokenizer").encode(text[:cut]))
    if place.nanogpt is not None:
        prepare_nanogpt(place, place.nanogpt)
    if "tokenize" in jobs:
        write_large_text(place.work / "large.txt", [text, *other_texts(place.data)])


def write_tokens(path: Path, ids: Sequence[int]) -> None:
    np.asarray(ids, dtype=np.uint16).tofile(path)


def prepare_nanogpt(place: Place, checkout: Path) -> None:
    """A copy of its code beside its data, as its own preparation writes it."""
    copy = place.work / "nanogpt"
    copy.mkdir()
    for script in checkout.glob("*.py"):
        shutil.copy(script, copy)
    texts, characters = copy / "data" / "texts", copy / "data" / "shakespeare_char"
    texts.mkdir(parents=True)
    for split in ("train.bin", "val.bin"):
        shutil.copy(place.work / "gpt2.bin", texts / split)
    characters.mkdir()
    shutil.copy(checkout / "data" / "shakespeare_char" / "prepare.py", characters)
    shutil.copy(place.data / "tinyshakespeare.txt", characters / "input.txt")
    preparation = [str(place.peers_python), str(characters / "prepare.py")]
    subprocess.run(preparation, check=True, capture_output=True)


def other_texts(data: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(data.glob("*.txt")) if path.stem != "tinyshakespeare"]


def write_large_text(path: Path, texts: Sequence[str]) -> None:
    """Paragraphs of real texts, again and again, each time in another order."""
    paragraphs = [part for text in texts for part in text.split("\n\n") if part.strip()]
    order = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < TOKENIZED_BYTES:
            order.shuffle(paragraphs)
            file.write("\n\n".join(paragraphs) + "\n\n")
