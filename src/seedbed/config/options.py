"""Every option of a training run: its name, type, default, range and meaning, written once.

The command line, the config file, the Python API and the page of options are all made from these
records. A field without a default takes its value from the regime (`REGIMES`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


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
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of options that one part of the program receives."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class TextOptions(Section):
    """Data"""

    data: Name | None = Field(
        None, description="Text to learn: a file, folder, glob, .jsonl, .parquet, or a name from `data list`."
    )
    val_data: Name | None = Field(None, description="Held-out text; otherwise --val_split of --data.")
    val_split: Share = Field(0.1, description="Share of the documents held out, when --val_data is not given.")
    format: Literal["auto", "text", "alpaca", "qa", "chat", "completion"] = Field(
        "auto",
        description="What --data holds: text, or rows with instruction/output (alpaca), question/answer (qa), "
        "messages (chat), prompt/completion (completion); auto looks.",
    )
    text_column: str = Field("text", description="Column of JSONL and Parquet rows that holds the text.")
    document: Literal["auto", "file", "blank_line", "article", "line"] = Field(
        "auto", description="What separates documents in plain text."
    )


class DataOptions(TextOptions):
    """Data"""

    tokenizer: str | None = Field(
        description="A tokenizer folder or hub id; or, from scratch, bpe / char: train one on the training text. "
        "Fine-tuning takes the model's own."
    )
    vocab_size: Positive | None = Field(
        None, description="Size of a tokenizer trained here; by default it grows with the text, up to 8000."
    )
    max_seq_len: Annotated[int, Field(ge=2)] = Field(
        description="Context: tokens in one row of a batch; at most what a pretrained model allows."
    )
    packing: bool = Field(
        True,
        description="Fill rows with several documents that do not see each other; else pad and truncate.",
    )
    chat_template: str | None = Field(
        None,
        description="How conversations become text: alpaca, qa, chatml, plain or a .jinja file; "
        "by default the tokenizer's own template, else the one of --format.",
    )
    train_on_prompt: bool = Field(False, description="Learn the questions too, not only the answers.")
    streaming: bool = Field(
        False,
        description="Read --data file by file, keeping the tokens of three files on disk; also from addresses such as "
        "s3://bucket/part-*.parquet. Needs --max_steps or --max_tokens; --val_split holds out of the first file.",
    )
    augment_word_swap: bool = Field(
        False, description="Add a copy of every training document with neighbouring words swapped."
    )


class PretrainedOptions(Section):
    """Model"""

    model: Annotated[str, BeforeValidator(folder_of_config)] = Field(
        description="From scratch, a preset (tiny, small, medium, distilgpt2, gpt2, gpt2-medium, gpt2-large, gpt2-xl) "
        "or a folder with a config.json; to fine-tune, a model folder, a run, or a hub id.",
    )
    dropout: Share | None = Field(
        None, description="Dropout during training; by default none, and for a pretrained model what it has."
    )


class ModelOptions(PretrainedOptions):
    """Model"""

    arch: Arch | None = Field(None, description="Family of the decoder.")
    d_model: Positive | None = Field(None, description="Width of the residual stream.")
    num_layers: Positive | None = Field(None, description="Number of blocks.")
    num_heads: Positive | None = Field(None, description="Query heads.")
    num_kv_heads: Positive | None = Field(None, description="Key and value heads; by default as many as --num_heads.")
    d_ff: Positive | None = Field(None, description="Width of the MLP; by default what the family's authors use.")
    tie_embeddings: bool | None = Field(None, description="Use the embedding as the output head; by default yes.")


class AdaptOptions(Section):
    """What is trained"""

    last_blocks: Positive | None = Field(
        None, description="Train only the last N blocks (and what follows them); with --lora, adapters only there."
    )
    freeze: str | None = Field(
        None,
        description="Parts that stay as they are: a comma list of embeddings, attention, mlp, norms, head, or patterns "
        "such as blocks.0.*.",
    )
    add_tokens: Words = Field(
        (),
        description="A new token, found in every text; begins as the mean of the others; may be given several times.",
    )
    lora: bool | None = Field(
        None, description="Train small adapters beside frozen weights; the other lora flags imply it."
    )
    lora_r: Positive = Field(16, description="Rank of the adapters.")
    lora_alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="Adapters are scaled by alpha / r.")
    lora_dropout: Share = Field(0.0, description="Dropout of what enters an adapter.")
    lora_targets: str = Field(
        "all-linear",
        description="Layers with adapters: a comma list of all-linear (all of the blocks), attention, mlp, head, "
        "or patterns such as q_proj.",
    )
    lora_rslora: bool = Field(False, description="Scale by alpha / sqrt(r), for high ranks.")
    lora_dora: bool = Field(False, description="Learn the size of each weight row apart from its direction (DoRA).")
    lora_embeddings: bool = Field(False, description="Train the embeddings whole beside the adapters.")
    base_precision: Literal["auto", "fp32", "bf16", "nf4"] = Field(
        "auto",
        description="Of weights that LoRA freezes: auto holds them as they are multiplied, nf4 in 4 bits (QLoRA).",
    )


class KeepOptions(Section):
    """What it keeps"""

    domain: str | None = Field(None, description="What is learnt, as the model's history will call it.")
    general_data: str | None = Field(
        None,
        description="Text that stands for what the model knew before its first domain; by default that of the run "
        "that trained it. A part is held out to measure on, the rest may be replayed.",
    )
    method: str = Field(
        "auto",
        description="How it is kept: auto, naive (not at all), or a comma list of replay, self_replay, l2_sp, ewc, kl, "
        "interpolate. The flags below set their strengths and imply them.",
    )
    replay: Share | None = Field(
        None, description="Share of the training tokens that is stored text of what the model knew. [0.05]"
    )
    self_replay: Share | None = Field(
        None, description="The same with text that the model writes itself before it changes. [0.1]"
    )
    l2_sp: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Strength of a pull towards the old weights (L2-SP). [0.05]"
    )
    ewc: Annotated[float, Field(ge=0)] | None = Field(
        None, description="The same, each weight by what it means to held-out text of what the model knew (EWC). [10]"
    )
    kl: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Strength of a pull towards the old model's predictions; takes half as long again. [0.3]"
    )
    interpolate: bool | None = Field(
        None, description="Mix old and new weights at the end, as held-out text of both says is best (WiSE-FT)."
    )
    max_forgetting: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Alarm: the most that bits per byte of anything earlier may rise, as a share (0.02 is 2 %)."
    )
    on_forgetting: Literal["roll_back", "stop", "warn"] = Field(
        "roll_back",
        description="At the alarm: end with the best weights within the limit (with none, the model as it was), end "
        "with the weights as they are, or only say so.",
    )
    reserve_mb: Annotated[float, Field(ge=0)] = Field(
        4.0, description="Training text kept with the model, in MB, for replay in later domains; 0 keeps none."
    )
    rollback_to: str | None = Field(
        None, description="Go back to the model as it was after this domain (or `base`), and begin there."
    )


class TrainingOptions(Section):
    """Training"""

    epochs: Positive = Field(description="Passes over the training text.")
    max_steps: Positive | None = Field(None, description="Stop after this many steps, whatever --epochs says.")
    max_tokens: Count | None = Field(
        None, description="Stop once about this many tokens are learnt, whatever --epochs says; 2e6 is two million."
    )
    max_training_hours: Annotated[float, Field(gt=0)] = Field(
        12.0, description="Save and stop when the hours run out, earlier sittings counted; exit code 75."
    )
    batch_size: Positive = Field(8, description="Sequences in one micro-batch.")
    grad_accumulation: Positive = Field(1, description="Micro-batches in one step, of each process.")
    processes: Positive | None = Field(
        None,
        description="Processes whose micro-batches make one step; by default as many as torchrun starts. Where there "
        "are fewer or more, the step stays the same and they share it.",
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="How several processes share the model: ddp keeps it whole in each, fsdp a part in each; auto "
        "takes ddp where a GPU has room for it.",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(description="Peak learning rate.")
    min_lr: Annotated[float, Field(ge=0)] = Field(description="Learning rate at the end of the schedule.")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="Steps of linear warm-up.")
    warmup_ratio: Share | None = Field(None, description="Warm-up as a share of the run.")
    lr_schedule: Literal["cosine", "cosine_time", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="After warm-up; cosine_time reaches --min_lr when the hours run out, "
        "wsd stays at the peak and falls over the last fifth.",
    )
    optimizer: Literal["adamw", "adamw8bit", "muon", "sgd"] = Field(
        "adamw",
        description="Optimizer; adamw8bit keeps its moments in a quarter of the memory, muon makes the updates of the "
        "blocks' matrices orthogonal.",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(description="Decoupled decay, on matrices only.")
    beta1: Share = Field(0.9, description="AdamW's first moment; SGD's momentum.")
    beta2: Share = Field(0.95, description="AdamW's second moment.")
    epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's epsilon.")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="Clip the gradient's norm; 0 is off.")
    neftune_alpha: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Noise on the embeddings while training (NEFTune), 5 to 15 is usual; 0 is off."
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Of the matrix products; auto takes what this hardware accelerates."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, slower.")
    compile: bool = Field(False, description="torch.compile the decoder (needs a C++ compiler on a CPU).")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="Weights, data order and dropout.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")

    @property
    def rows_per_step(self) -> int:
        """Sequences that one update learns from, in all processes."""
        return self.batch_size * self.grad_accumulation * (self.processes or 1)


class WatchOptions(Section):
    """Watching, saving, stopping"""

    eval_every: Positive = Field(500, description="Steps between validations; each epoch ends with one too.")
    log_every: Positive = Field(100, description="Steps between TensorBoard points and plain progress lines.")
    early_stopping_patience: Annotated[int, Field(ge=0)] = Field(
        3, description="Epochs without a better validation loss before stopping; 0 is off."
    )
    save_every: Positive = Field(1000, description="Steps between checkpoints; each epoch ends with one too.")
    keep_checkpoints: Annotated[int, Field(ge=0)] = Field(
        3,
        description="Newest step and epoch checkpoints kept of each kind; best and final always stay; 0 keeps all.",
    )
    async_save: bool = Field(
        False, description="Write checkpoints beside training, from a copy in memory; the last one is waited for."
    )
    output: Name | None = Field(None, description="Run folder; by default runs/ and a name from the data and model.")
    stop_at_step: Positive | None = Field(
        None,
        description="Save and stop at this step, exit code 75; the schedule stays that of the whole run, and the same "
        "command without it goes on.",
    )
    resume: bool = Field(True, description="Go on with an unfinished run in the same folder.")
    resume_from: Name | None = Field(None, description="Go on from this checkpoint folder.")
    tensorboard: bool = Field(True, description="Write TensorBoard files into the run folder.")
    report: bool = Field(True, description="Write report.html into the run folder at the end: curves and diagnosis.")
    sample_prompt: str = Field(
        "", description="At each validation the model continues this text, or answers it if it learns conversations."
    )
    strict: bool = Field(False, description="Do not start when a guardrail warns.")
    allow: Words = Field((), description="A finding to keep quiet about; may be given several times.")


class SamplingOptions(Section):
    """Sampling"""

    max_new_tokens: Positive = Field(100, description="Tokens to add at most.")
    temperature: Annotated[float, AfterValidator(_above_zero)] = Field(
        0.8, description="Below 1 sharpens the distribution, above 1 flattens it."
    )
    top_k: Annotated[int, Field(ge=0)] = Field(50, description="Sample among the k likeliest tokens; 0 is all.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample among the likeliest tokens that hold this share of the probability."
    )
    repetition_penalty: Annotated[float, Field(gt=0)] = Field(
        1.1, description="Above 1 makes tokens that already appeared less likely."
    )
    no_repeat_ngram: Annotated[int, Field(ge=0)] = Field(
        0, description="Never write the same n tokens twice; 0 is off."
    )
    greedy: bool = Field(False, description="Always take the likeliest token.")
    stop: Words = Field((), description="End before this string; may be given several times.")
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
