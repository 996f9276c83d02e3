"""Small changes to a model that is loaded: room for new tokens, another dropout."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from seedbed.model.attention import Attention
from seedbed.model.decoder import Decoder


@torch.no_grad()
def grow_vocabulary(model: Decoder, known: int, wanted: int) -> None:
    """Give tokens `known` to `wanted` an embedding (and a row of the head): the mean of the rows before them.

    The mean keeps a new token from being likelier or less likely than all others, as a random row would be
    (Hewitt, 2021). Rows that a model has to spare are used first. A tied head stays tied.
    """
    if wanted <= known:
        return
    tables: list[nn.Embedding | nn.Linear] = [model.embed_tokens]
    if isinstance(model.lm_head, nn.Linear):
        tables.append(model.lm_head)
    for table in tables:
        old = table.weight  # (V, D)
        size = max(wanted, old.shape[0])
        weight = torch.cat([old, old.new_empty(size - old.shape[0], old.shape[1])])  # (V', D)
        weight[known:wanted] = old[:known].mean(0)
        table.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    if model.lm_head is not None:
        model.lm_head.out_features = len(model.lm_head.weight)
    model.embed_tokens.num_embeddings = len(model.embed_tokens.weight)
    model.config = replace(model.config, vocab_size=len(model.embed_tokens.weight))


def set_dropout(model: Decoder, dropout: float) -> None:
    """Another dropout everywhere that the family has it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        elif isinstance(module, Attention):
            module.dropout = dropout
    if model.config.family != "gpt2":
        model.embed_dropout.p = 0.0  # the Llama-like families have none there
    model.config = replace(model.config, dropout=dropout)
