"""A judge in a model folder, read by what it holds likely and not by what it writes.

A small model seldom replies with a number alone. So it does not write: each possible reply is scored by its likelihood
after the prompt, and the score is the mean over them (G-Eval; Liu et al., 2023).

N possible replies   W tokens of the longest of them   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from seedbed import distributed
from seedbed.checkpoint import load_model
from seedbed.judge.answers import weights_digest
from seedbed.judge.ask import OnReply, Reply, Request
from seedbed.judge.prompts import VERDICTS
from seedbed.model.decoder import Decoder
from seedbed.model.decoding import DecodingModel
from seedbed.text.template import Template, find_template
from seedbed.text.tokenizer import Tokenizer

SCORES: Final = tuple(range(0, 101, 10))


class LocalJudge:
    """A checkpoint that judges; loaded when it is first asked."""

    remedy = "Choose a judge with a longer context, or questions with shorter answers"

    def __init__(self, name: str, folder: Path, device: str = "auto") -> None:
        self.name = name
        self._folder = folder
        self._device = device

    @cached_property
    def identity(self) -> str:
        """SHA-256 of its weights."""
        return weights_digest(self._model[0])

    @cached_property
    def _model(self) -> tuple[Decoder, Tokenizer]:
        return load_model(self._folder, self._device)

    def ask(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        """See `Judge.ask`. A prompt that its context cannot hold gets no reply."""
        decoder, tokenizer = self._model
        template = find_template(tokenizer, None, "chat")
        reply = partial(self._reply, decoder.config.max_seq_len, tokenizer, template)
        for first in range(0, len(requests), distributed.size()):
            part = requests[first : first + distributed.size()]
            replies = distributed.each_a_part(part, lambda own: [asdict(reply(request)) for request in own])
            for place, fields in enumerate(replies, start=first):
                on_reply(place, Reply(**fields))

    @cached_property
    def _decoding(self) -> DecodingModel:
        return DecodingModel(self._model[0])

    def _reply(self, positions: int, tokenizer: Tokenizer, template: Template, request: Request) -> Reply:
        prompt = template.prompt_ids([{"role": "user", "content": request.prompt}])
        choices = [str(score) for score in SCORES] if request.kind == "score" else list(VERDICTS)
        replies = [[*tokenizer.encode(choice), tokenizer.eos_id] for choice in choices]
        if len(prompt) + max(map(len, replies)) > positions:
            return Reply(None, error=f"what it must read has {len(prompt):,} tokens, and its context {positions:,}")
        shares = log_likelihoods(self._decoding, prompt, replies).softmax(-1)  # (N,)
        if request.kind == "verdict":
            return Reply(choices[int(shares.argmax())], len(prompt))
        return Reply(f"{float(shares @ torch.tensor(SCORES, dtype=shares.dtype)):.2f}", len(prompt))


def log_likelihoods(model: DecodingModel, prompt: Sequence[int], replies: Sequence[Sequence[int]]) -> Tensor:
    """Log-likelihood of each reply, of two tokens or more, after the prompt, which is read once: (N,) float32."""
    width = max(map(len, replies))
    with torch.inference_mode():
        first = model.read([prompt], len(prompt) + width - 1)  # (1, V)
        model.repeat(len(replies))
        padded = [[*reply, *[0] * (width - len(reply))] for reply in replies]
        tokens = torch.tensor(padded, device=first.device)  # (N, W)
        logits = torch.cat([first.expand(len(replies), 1, -1), model.step(tokens[:, :-1])], dim=1)  # (N, W, V)
        chosen = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].cpu()  # (N, W)
    real = torch.tensor([[place < len(reply) for place in range(width)] for reply in replies])  # (N, W)
    return (chosen * real).sum(-1)
