"""The fields that tell one decoder from another, and the defaults of each family. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from seedbed.errors import ConfigError, did_you_mean

Norm = Literal["layernorm", "rmsnorm"]
Position = Literal["learned", "rope"]
MLP = Literal["gelu", "swiglu"]

MOST_LAYERS: Final = 1000
LARGEST_SIZE: Final = 2**31
LARGEST_MATRIX: Final = 2**50

FAMILIES: Final = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
SCRATCH_FAMILIES: Final = ("gpt2", "llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of rotary positions to longer texts (`rope_type` "llama3" of transformers).

    Pairs that turn fewer than `low_freq_factor` times over `original_max_position_embeddings` tokens turn
    `factor` times slower, those that turn more than `high_freq_factor` times as before; between, by degrees.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides the shape and the arithmetic of a `Decoder`.

    Raises:
        ConfigError: the fields contradict each other or the family; all contradictions are listed.
    """

    family: str  # Hugging Face's model_type
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # fewer than num_heads: groups of query heads share keys and values
    head_dim: int
    d_ff: int
    max_seq_len: int  # positions the model allows
    norm: Norm
    norm_eps: float
    position: Position
    rope_theta: float  # unused with learned positions
    mlp: MLP  # gelu is the tanh approximation, as GPT-2 has it
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm of every query and key head, as Qwen3 has it
    tie_embeddings: bool
    dropout: float
    init_std: float
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        problems = _size_problems(self) or _shape_problems(self)
        if problems := problems + _range_problems(self) + _family_problems(self):
            raise ConfigError(problems)


def from_scratch(
    arch: str,
    *,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    d_ff: int | None = None,
    max_seq_len: int,
    dropout: float = 0.0,
    tie_embeddings: bool = True,
    rope_theta: float = 10000.0,
) -> DecoderConfig:
    """A new model of a family, with the defaults its authors chose.

    gpt2: learned positions, LayerNorm, GELU, biases, `d_ff` 4 times the width (Radford et al., 2019).
    llama: RoPE, RMSNorm, SwiGLU, no biases, `d_ff` 8/3 of the width rounded up to a multiple of 64
    (Touvron et al., 2023). qwen2: llama with biases on queries, keys and values. qwen3: llama with
    queries and keys normalised.

    Raises:
        ConfigError: an unknown family, or sizes that contradict each other (all are listed).
    """
    if arch not in SCRATCH_FAMILIES:
        raise ConfigError(
            f"--arch {arch}: expected one of {', '.join(SCRATCH_FAMILIES)}{did_you_mean(arch, SCRATCH_FAMILIES)}"
        )
    gpt2 = arch == "gpt2"
    return DecoderConfig(
        family=arch,
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=d_model // num_heads if num_heads > 0 else 0,
        d_ff=d_ff if d_ff is not None else 4 * d_model if gpt2 else -(-8 * d_model // (3 * 64)) * 64,
        max_seq_len=max_seq_len,
        norm="layernorm" if gpt2 else "rmsnorm",
        norm_eps=1e-6 if arch in ("qwen2", "qwen3") else 1e-5,
        position="learned" if gpt2 else "rope",
        rope_theta=rope_theta,
        mlp="gelu" if gpt2 else "swiglu",
        qkv_bias=arch in ("gpt2", "qwen2"),
        output_bias=gpt2,
        mlp_bias=gpt2,
        qk_norm=arch == "qwen3",
        tie_embeddings=tie_embeddings,
        dropout=dropout,
        init_std=0.02,
    )


def _size_problems(c: DecoderConfig) -> list[str]:
    names = ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff", "max_seq_len")
    problems = [f"{n} {getattr(c, n)}: expected at least 1" for n in names if getattr(c, n) < 1]
    # A damaged file may ask for billions, and to find out that its weights are others would take for ever.
    limits = {name: MOST_LAYERS if name == "num_layers" else LARGEST_SIZE for name in names}
    problems += [
        f"{n} {getattr(c, n)}: expected at most {limit}" for n, limit in limits.items() if getattr(c, n) > limit
    ]
    # What follows from another size (key-value heads from heads, head_dim from both) is not a second mistake.
    if c.num_kv_heads == c.num_heads < 1:
        problems = [p for p in problems if not p.startswith("num_kv_heads")]
    if c.head_dim < 1 and not problems:
        problems.append(
            f"head_dim {c.head_dim} (d_model {c.d_model} divided by num_heads {c.num_heads}): expected at least 1"
        )
    widest = max(c.vocab_size, c.d_ff, c.max_seq_len, c.num_heads * c.head_dim)
    if not problems and c.d_model * widest > LARGEST_MATRIX:
        problems.append(f"a matrix of {c.d_model:,} × {widest:,} weights: expected sizes of a model that can be held")
    return problems


def _shape_problems(c: DecoderConfig) -> list[str]:
    problems = []
    derived = c.head_dim == c.d_model // c.num_heads
    if c.d_model % c.num_heads and (derived or c.family in ("gpt2", "llama")):
        problems.append(
            f"d_model {c.d_model} is not divisible by num_heads {c.num_heads}: "
            f"take d_model {c.d_model // c.num_heads * c.num_heads or c.num_heads} or another number of heads"
        )
    elif not derived and c.family in ("gpt2", "qwen2"):
        problems.append(f"head_dim {c.head_dim}: {c.family} has d_model / num_heads = {c.d_model // c.num_heads} only")
    if c.family == "gpt2" and c.num_kv_heads != c.num_heads:
        problems.append(
            f"num_kv_heads {c.num_kv_heads} with num_heads {c.num_heads}: gpt2 has no grouped heads; "
            f"leave num_kv_heads out, or take --arch llama"
        )
    elif c.num_heads % c.num_kv_heads:
        problems.append(
            f"num_heads {c.num_heads} is not a multiple of num_kv_heads {c.num_kv_heads}: "
            f"take num_kv_heads from {_divisors(c.num_heads)}"
        )
    if c.position == "rope" and c.head_dim % 2:
        problems.append(f"head_dim {c.head_dim} is odd: rotary positions turn pairs, so it must be even")
    return problems


def _range_problems(c: DecoderConfig) -> list[str]:
    problems = []
    if not 0 <= c.dropout < 1:
        problems.append(f"dropout {c.dropout}: expected 0 or more and less than 1")
    if not c.norm_eps > 0:
        problems.append(f"norm_eps {c.norm_eps}: expected more than 0")
    if not c.rope_theta > 0:
        problems.append(f"rope_theta {c.rope_theta}: expected more than 0")
    if (s := c.rope_scaling) and not s.factor >= 1:
        problems.append(f"rope_scaling factor {s.factor}: expected 1 or more")
    if (s := c.rope_scaling) and not s.high_freq_factor > s.low_freq_factor > 0:
        problems.append(
            f"rope_scaling low_freq_factor {s.low_freq_factor}, high_freq_factor {s.high_freq_factor}: "
            f"expected more than 0, the second more than the first"
        )
    if not c.init_std > 0:
        problems.append(f"init_std {c.init_std}: expected more than 0")
    return problems


def _family_problems(c: DecoderConfig) -> list[str]:
    """What the family's own `config.json` could not express, and so no other program could read."""
    if c.family not in FAMILIES:
        return [f"family {c.family}: expected one of {', '.join(FAMILIES)}{did_you_mean(c.family, FAMILIES)}"]
    gpt2 = c.family == "gpt2"
    expected: dict[str, object] = {
        "norm": "layernorm" if gpt2 else "rmsnorm",
        "position": "learned" if gpt2 else "rope",
        "mlp": "gelu" if gpt2 else "swiglu",
        "qk_norm": c.family == "qwen3",
    }
    if c.family in ("llama", "qwen3"):
        expected["output_bias"] = c.qkv_bias  # one flag, attention_bias, for all four
    else:
        expected |= {"qkv_bias": c.family != "mistral", "output_bias": gpt2}
    if c.family != "llama":
        expected["mlp_bias"] = gpt2
    return [
        f"{name} {getattr(c, name)}: {c.family} has {name} {value}"
        for name, value in expected.items()
        if getattr(c, name) != value
    ]


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
