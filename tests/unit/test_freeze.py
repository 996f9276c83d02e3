from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch

from seedbed.errors import ConfigError
from seedbed.freeze import first_trained_block, freeze
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Decoder


def tiny(arch: str = "llama", **changes: Any) -> Decoder:
    sizes: dict[str, Any] = {"vocab_size": 31, "d_model": 16, "num_layers": 3, "num_heads": 4, "max_seq_len": 8}
    with torch.device("meta"):
        return Decoder(from_scratch(arch, **(sizes | changes)))


def frozen(model: Decoder) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("parts", "last_blocks", "patterns"),
    [
        (None, None, ()),
        ("", None, ()),
        ("embeddings", None, ("embed_*",)),
        ("attention", None, ("blocks.?.attention.*",)),
        ("mlp", None, ("blocks.?.mlp.*",)),
        ("norms", None, ("*norm.*",)),
        ("head", None, ("lm_head.*",)),
        ("embeddings, norms,head", None, ("embed_*", "*norm.*", "lm_head.*")),
        ("blocks.0", None, ("blocks.0.*",)),
        ("blocks.?.mlp.up_proj", None, ("blocks.?.mlp.up_proj.*",)),
        ("*_norm.weight", None, ("*_norm.weight",)),
        (None, 1, ("embed_*", "blocks.0.*", "blocks.1.*")),
        (None, 3, ("embed_*",)),
        ("mlp,head", 2, ("embed_*", "blocks.0.*", "blocks.?.mlp.*", "lm_head.*")),
    ],
)
def test_what_is_named_is_frozen_and_nothing_else(
    arch: str, parts: str | None, last_blocks: int | None, patterns: tuple[str, ...]
) -> None:
    model = tiny(arch, tie_embeddings=False)
    names = [name for name, _ in model.named_parameters()]
    freeze(model, parts, last_blocks)
    assert frozen(model) == {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def test_a_tied_head_is_trained_as_the_embedding_is() -> None:
    model = tiny(tie_embeddings=True)
    freeze(model, None, 1)
    assert not model.head_weight().requires_grad
    with pytest.raises(ConfigError, match=r"--freeze head.*the head is the embedding; name embeddings"):
        freeze(tiny(tie_embeddings=True), "head", None)


@pytest.mark.parametrize(
    ("parts", "last_blocks", "message"),
    [
        ("embedings", None, r"--freeze embedings: no weight has that name.*did you mean embeddings\?"),
        ("mlp,blocks.3", None, r"--freeze blocks\.3: no weight.*blocks\.0\.\*"),
        ("*", None, "nothing is left to train"),
        ("attention,mlp,norms", 1, r"--freeze attention,mlp,norms: nothing is left to train; name fewer parts"),
        (None, 4, r"--last_blocks 4: the model has 3 blocks"),
    ],
)
def test_what_cannot_be_frozen(parts: str | None, last_blocks: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        freeze(tiny(), parts, last_blocks)


def test_the_first_trained_block() -> None:
    assert [first_trained_block(3, blocks) for blocks in (1, 2, 3)] == [2, 1, 0]
