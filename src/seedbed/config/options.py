"""Every option of a training run: its name, type, default, range and meaning, written once.

The command line, the config file, the Python API and the page of options are all made from these
records. A field without a default takes its value from the regime (`REGIMES`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from seedbed.disk import expanded


def _whole(value: Any) -> Any:
    """Large numbers may be written as 2e6."""
    if isinstance(value, str | float):
        try:
            return int(float(value)) if float(value).is_integer() else value
        except (ValueError, OverflowError):
            return value
    return value


def folder_of_config(name: Any) -> Any:
    """The folder of a model that is named by its config.json; any other name as it is."""
    folder, slash, file = name.rpartition("/") if isinstance(name, str) else ("", "", "")
    return (folder or slash or ".") if file == "config.json" else name


def _above_zero(temperature: float) -> float:
    if temperature <= 0:
        raise PydanticCustomError("temperature", "greater than 0; --greedy takes the likeliest token each time")
    return temperature


def _one_or_more(value: Any) -> Any:
    """A word alone may stand for a list of one."""
    return (value,) if isinstance(value, str) else value


Arch = Literal["gpt2", "llama", "qwen2", "qwen3"]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(gt=0), BeforeValidator(_whole)]
Words = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]
Name = Annotated[str, Field(min_length=1)]
PathName = Annotated[str, AfterValidator(expanded)]
"""A path, or a name that may stand for one, such as a hub id."""
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of options that one part of the program receives."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class TextOptions(Section):
    """Data"""

    data: Name | None = Field(
        None,
        description="Text to learn: a text file, JSON or Parquet table, folder, glob, or a name from `data list`.",
    )
    val_data: Name | None = Field(
        None,
        description="Text to validate on; by default a named source's validation split, else --val_split of --data.",
    )
    val_split: Share = Field(
        0.1, description="Share of the text (in bytes) to hold out, as whole documents, if --val_data is not given."
    )
    format: Literal["auto", "text", "alpaca", "qa", "chat", "completion"] = Field(
        "auto",
        description="What --data holds: text, or rows with instruction/output (alpaca), question/answer (qa), "
        "messages (chat), prompt/completion (completion); auto detects it.",
    )
    text_column: str = Field("text", description="Column of JSON and Parquet rows that holds the text.")
    document: Literal["auto", "file", "blank_line", "article", "line"] = Field(
        "auto", description="What separates documents in plain text."
    )


class DataOptions(TextOptions):
    """Data"""

    tokenizer: PathName | None = Field(
        description="bpe or char trains one on the training text; or name a tokenizer folder or a hub id."
    )
    vocab_size: Positive | None = Field(
        None,
        description="Size of a tokenizer trained here; by default the preset's, or up to 8000, growing with the text.",
    )
    max_seq_len: Annotated[int, Field(ge=2)] = Field(description="Context length: tokens in one row of a batch.")
    packing: bool = Field(
        True,
        description="Fill each row with several documents, which do not see one another; without it, pad and truncate.",
    )
    chat_template: str | None = Field(
        None,
        description="How conversations become text: alpaca, qa, chatml, plain or a .jinja file; "
        "by default the tokenizer's own template, else the one of --format.",
    )
    train_on_prompt: bool = Field(False, description="Learn the questions as well as the answers.")
    streaming: bool = Field(
        False,
        description="Read --data file by file, with the tokens of three files on disk at once; also from addresses "
        "such as s3://bucket/part-*.parquet. Needs --max_steps or --max_tokens; --val_split only sees the first file.",
    )
    augment_word_swap: bool = Field(
        False, description="Add a copy of every training document with neighbouring words swapped."
    )


class PretrainedOptions(Section):
    """Model"""

    model: Annotated[PathName, BeforeValidator(folder_of_config)] = Field(
        description="A preset (tiny, small, medium, distilgpt2, gpt2, gpt2-medium, gpt2-large, gpt2-xl), or a folder "
        "whose config.json gives the shape.",
    )
    dropout: Share | None = Field(
        None, description="Dropout rate during training; by default 0, or what a pretrained model was trained with."
    )


class ModelOptions(PretrainedOptions):
    """Model"""

    arch: Arch | None = Field(None, description="Model family.")
    d_model: Positive | None = Field(None, description="Width of the residual stream.")
    num_layers: Positive | None = Field(None, description="Number of blocks.")
    num_heads: Positive | None = Field(None, description="Attention heads (query heads).")
    num_kv_heads: Positive | None = Field(None, description="Key-value heads; by default as many as --num_heads.")
    d_ff: Positive | None = Field(None, description="Width of the MLP; by default as the family's authors chose it.")
    tie_embeddings: bool | None = Field(
        None, description="Share the embedding matrix with the output head; by default yes."
    )


class AdaptOptions(Section):
    """What is trained"""

    last_blocks: Positive | None = Field(
        None, description="Train only the last N blocks and what follows them; with --lora, put adapters only there."
    )
    freeze: str | None = Field(
        None,
        description="Parts to leave untrained: a comma-separated list of embeddings, attention, mlp, norms, head, or "
        "patterns such as blocks.0.*.",
    )
    add_tokens: Words = Field(
        (),
        description="A token to add to the vocabulary, found in every text; its embedding starts as the mean of the "
        "others. May be given several times.",
    )
    lora: bool | None = Field(
        None, description="Train small adapters beside frozen weights (LoRA); the --lora_... flags imply it."
    )
    lora_r: Positive = Field(16, description="Rank of the adapters.")
    lora_alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="Adapters are scaled by alpha / r.")
    lora_dropout: Share = Field(0.0, description="Dropout on the adapters' input.")
    lora_targets: str = Field(
        "all-linear",
        description="Layers that get adapters: a comma-separated list of all-linear (every linear layer of the "
        "blocks), attention, mlp, head, or patterns such as q_proj.",
    )
    lora_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead, for high ranks.")
    lora_dora: bool = Field(
        False, description="Learn each weight row's magnitude separately from its direction (DoRA)."
    )
    lora_embeddings: bool = Field(False, description="Train the embeddings in full, beside the adapters.")
    base_precision: Literal["auto", "fp32", "bf16", "nf4"] = Field(
        "auto",
        description="How frozen weights are stored with LoRA: auto = compute precision, nf4 = 4-bit (QLoRA).",
    )


class KeepOptions(Section):
    """What it keeps"""

    domain: str | None = Field(None, description="Name of what is learnt, for the model's history.")
    general_data: str | None = Field(
        None,
        description="Text that stands for what the model knew before its first domain; by default the text of the run "
        "that trained it. Part of it is held out for measuring, the rest may be replayed.",
    )
    method: str = Field(
        "auto",
        description="How to keep what the model knew: auto, naive (not at all), or a comma-separated list of replay, "
        "self_replay, l2_sp, ewc, kl, interpolate. The flags below set their strengths and imply them.",
    )
    replay: Share | None = Field(
        None, description="Share of the training tokens that comes from stored text of earlier domains. [0.05]"
    )
    self_replay: Share | None = Field(
        None, description="The same, from text that the model writes itself before training. [0.1]"
    )
    l2_sp: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Strength of the pull towards the old weights (L2-SP). [0.05]"
    )
    ewc: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="The same, each weight by how much it matters for held-out text of earlier domains (EWC). [10]",
    )
    kl: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Strength of the pull towards the old model's predictions; training takes 1.5 times as long. [0.3]",
    )
    interpolate: bool | None = Field(
        None,
        description="Mix old and new weights at the end, in the ratio that held-out text of both favours (WiSE-FT).",
    )
    max_forgetting: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Alarm: the most that bits per byte of any earlier domain may rise, as a share (0.02 is 2 %).",
    )
    on_forgetting: Literal["roll_back", "stop", "warn"] = Field(
        "roll_back",
        description="At the alarm: roll_back ends with the best weights within the limit (or the old model if there "
        "are none), stop ends with the current weights, warn only reports it.",
    )
    reserve_mb: Annotated[float, Field(ge=0)] = Field(
        4.0, description="Training text to keep with the model for replay in later domains, in MB; 0 keeps none."
    )
    rollback_to: str | None = Field(
        None, description="Start from the model as it was after this domain (or `base`, before the first)."
    )


class TrainingOptions(Section):
    """Training"""

    epochs: Positive = Field(description="Passes over the training text.")
    max_steps: Positive | None = Field(None, description="Stop after this many steps, whatever --epochs says.")
    max_tokens: Count | None = Field(
        None, description="Stop after about this many tokens, whatever --epochs says; 2e6 is two million."
    )
    max_training_hours: Annotated[float, Field(gt=0)] = Field(
        12.0, description="Save and stop (exit code 75) after this many hours across all sessions of the run."
    )
    batch_size: Positive = Field(8, description="Sequences in one micro-batch.")
    grad_accumulation: Positive = Field(1, description="Micro-batches that each process adds up for one step.")
    processes: Positive | None = Field(
        None,
        description="Processes whose micro-batches make one step; by default as many as torchrun starts. If there are "
        "fewer or more, they share the same step.",
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="How several processes share the model: ddp keeps a whole copy in each, fsdp a part in each; auto "
        "takes ddp if it fits on a GPU.",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(description="Peak learning rate.")
    min_lr: Annotated[float, Field(ge=0)] = Field(description="Learning rate at the end of the schedule.")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="Steps of linear warm-up.")
    warmup_ratio: Share | None = Field(None, description="Warm-up as a share of the run.")
    lr_schedule: Literal["cosine", "cosine_time", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="After the warm-up; cosine_time reaches --min_lr when --max_training_hours run out, wsd stays "
        "at the peak and falls over the last fifth.",
    )
    optimizer: Literal["adamw", "adamw8bit", "muon", "sgd"] = Field(
        "adamw",
        description="adamw8bit keeps AdamW's moments in a quarter of the memory; muon orthogonalizes the updates of "
        "the blocks' matrices.",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(description="Decoupled weight decay, on matrices only.")
    beta1: Share = Field(0.9, description="Decay rate of AdamW's first moment; momentum of SGD.")
    beta2: Share = Field(0.95, description="Decay rate of AdamW's second moment.")
    epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's epsilon.")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Clip the gradient's norm at this value; 0 is off."
    )
    neftune_alpha: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Strength of noise on the embeddings during training (NEFTune); 5 to 15 is usual, 0 is off."
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Compute precision; auto picks what this hardware accelerates."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, slower."
    )
    compile: bool = Field(
        False, description="Run the model through torch.compile (on a CPU this needs a C++ compiler)."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Seed of the initial weights, the order of the data, and dropout."
    )
    device: str = Field("auto", description="Where to train: auto, cpu, cuda, cuda:1, mps.")

    @property
    def rows_per_step(self) -> int:
        """Sequences that one update learns from, in all processes."""
        return self.batch_size * self.grad_accumulation * (self.processes or 1)


class WatchOptions(Section):
    """Watching, saving, stopping"""

    eval_every: Positive = Field(500, description="Steps between validations; there is one after each epoch too.")
    log_every: Positive = Field(100, description="Steps between TensorBoard points and plain progress lines.")
    early_stopping_patience: Annotated[int, Field(ge=0)] = Field(
        3, description="Stop after this many epochs without a better validation loss; 0 is off."
    )
    save_every: Positive = Field(1000, description="Steps between checkpoints; there is one after each epoch too.")
    keep_checkpoints: Annotated[int, Field(ge=0)] = Field(
        3,
        description="Number of step and of epoch checkpoints to keep, 0 for all; best and final always stay.",
    )
    async_save: bool = Field(
        False,
        description="Write checkpoints while training goes on, from a copy in memory; the run waits for the last one.",
    )
    output: Annotated[Name, AfterValidator(expanded)] | None = Field(
        None, description="Run folder; by default runs/ and a name made from the data and the model."
    )
    stop_at_step: Positive | None = Field(
        None,
        description="Save and stop at this step (exit code 75); the schedule stays that of the whole run, and the same "
        "command without this flag resumes it.",
    )
    resume: bool = Field(True, description="Resume an unfinished run in the same folder.")
    resume_from: Annotated[Name, AfterValidator(expanded)] | None = Field(
        None, description="Checkpoint folder to go on from."
    )
    tensorboard: bool = Field(True, description="Write TensorBoard files into the run folder.")
    report: bool = Field(True, description="At the end, write report.html (curves and diagnosis) into the run folder.")
    sample_prompt: str = Field(
        "", description="Text for the model to continue at each validation (or to answer, if it learns conversations)."
    )
    strict: bool = Field(False, description="Do not start if a guardrail warns.")
    allow: Words = Field((), description="Name of a finding to ignore; may be given several times.")


class SamplingOptions(Section):
    """Sampling"""

    max_new_tokens: Positive = Field(100, description="The most tokens to write.")
    temperature: Annotated[float, AfterValidator(_above_zero)] = Field(
        0.8, description="Below 1 makes the choice of tokens more careful, above 1 more surprising."
    )
    top_k: Annotated[int, Field(ge=0)] = Field(50, description="Sample from the k likeliest tokens; 0 is all.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample from the likeliest tokens that together have this probability."
    )
    repetition_penalty: Annotated[float, Field(gt=0)] = Field(
        1.1, description="Above 1 makes tokens less likely once they have appeared."
    )
    no_repeat_ngram: Annotated[int, Field(ge=0)] = Field(
        0, description="Never repeat a sequence of this many tokens; 0 is off."
    )
    greedy: bool = Field(False, description="Always take the likeliest token instead of sampling.")
    stop: Words = Field((), description="Stop before this string; may be given several times.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="The same seed gives the same text.")


SECTIONS: tuple[type[Section], ...] = (
    DataOptions,
    ModelOptions,
    AdaptOptions,
    KeepOptions,
    TrainingOptions,
    WatchOptions,
)

STRENGTHS: dict[str, float | bool] = {
    "replay": 0.05,
    "self_replay": 0.1,
    "l2_sp": 0.05,
    "ewc": 10.0,
    "kl": 0.3,
    "interpolate": True,
}
"""Ways to keep what a model knew, each an option of its own, and the strengths they have when only named."""

TRAINED_HERE = ("bpe", "char")
"""Values of `tokenizer` that mean: train one on the training text."""

FREE_TO_CHANGE = frozenset(
    [
        "max_training_hours",
        "log_every",
        "stop_at_step",
        "keep_checkpoints",
        "async_save",
        "output",
        "resume",
        "resume_from",
        "tensorboard",
        "report",
        "device",
        "parallel",
        "strict",
        "allow",
    ]
)
"""Options an unfinished run may be continued with at another value: none of them changes its rows or their order."""
