"""Training only some of the weights: the last blocks, or all but the parts that are named."""

from __future__ import annotations

from fnmatch import fnmatchcase

from seedbed.errors import ConfigError, did_you_mean
from seedbed.model.decoder import Decoder

PARTS = {
    "embeddings": ("embed_tokens.*", "embed_positions.*"),
    "attention": ("blocks.*.attention.*",),
    "mlp": ("blocks.*.mlp.*",),
    "norms": ("*norm.*",),
    "head": ("lm_head.*",),
}
"""Patterns of parameter names."""


def freeze(model: Decoder, parts: str | None, last_blocks: int | None) -> None:
    """Turn gradients off for `parts` and for everything before the last `last_blocks` blocks.

    Args:
        parts: a comma list of `PARTS` and patterns of parameter names such as `blocks.0.*`.
        last_blocks: how many blocks are trained; the final norm and a head of its own follow them.

    Raises:
        ConfigError: a part that matches nothing, more blocks than there are, or nothing left to train.
    """
    if last_blocks is not None:
        first = first_trained_block(model.config.num_layers, last_blocks)
        model.embed_tokens.requires_grad_(False)
        if model.embed_positions is not None:
            model.embed_positions.requires_grad_(False)
        for block in list(model.blocks)[:first]:
            block.requires_grad_(False)
    parameters = dict(model.named_parameters())
    for part in (parts or "").split(","):
        if not (part := part.strip()):
            continue
        patterns = PARTS.get(part, (part, f"{part}.*"))
        matched = [name for name in parameters if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if not matched:
            why = "the head is the embedding; name embeddings" if part == "head" else f"expected {', '.join(PARTS)}"
            raise ConfigError(
                f"--freeze {part}: no weight has that name ({why}, or a pattern such as blocks.0.*)"
                f"{did_you_mean(part, list(PARTS))}"
            )
        for name in matched:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(f"--freeze {parts}: nothing is left to train; name fewer parts")


def first_trained_block(num_layers: int, last_blocks: int) -> int:
    """Number of the first of the last `last_blocks` blocks. Raises ConfigError when there are not so many."""
    if last_blocks > num_layers:
        raise ConfigError(f"--last_blocks {last_blocks}: the model has {num_layers} blocks; give at most that")
    return num_layers - last_blocks
