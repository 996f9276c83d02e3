"""From logits to the next token: penalties, then the cuts of the distribution, then the draw.

B batch   T tokens so far   V vocabulary   N windows of n tokens

Every function is pure and treats each row alone. `history` (B, T) holds the tokens of the prompt and those
written since, `history_mask` (B, T) is true where they are real and not padding. The order and the meaning
are those of `LogitsProcessorList` in transformers' `generate`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from seedbed.config import SamplingOptions

NEVER: Final = float("-inf")
COLDEST: Final = 1e-30  # a lower temperature is zero in float32


def next_tokens(
    logits: Tensor, history: Tensor, history_mask: Tensor, options: SamplingOptions, uniform: Tensor | None
) -> Tensor:
    """Choose the next token of every row.

    Args:
        logits: (B, V) float32.
        history: (B, T) tokens so far; not read unless the options `looks_back`.
        history_mask: (B, T) bool, false at padding.
        options: what to apply; values that change nothing cost nothing.
        uniform: (B,) float32 in [0, 1), one for each row (see `uniform_rows`); unused when greedy.

    Returns:
        (B,) int64.
    """
    if options.repetition_penalty != 1.0:
        logits = penalise_repetition(logits, history, history_mask, options.repetition_penalty)
    if options.no_repeat_ngram:
        logits = forbid_repeated_ngrams(logits, history, history_mask, options.no_repeat_ngram)
    if options.greedy:
        return _first_of_largest(logits)
    assert uniform is not None, "sampling needs random numbers"
    logits = apply_temperature(logits, options.temperature)
    if options.top_k:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p < 1.0:
        logits = keep_top_p(logits, options.top_p)
    return draw(logits, uniform)


def looks_back(options: SamplingOptions) -> bool:
    """Whether the next token depends on those before it by more than the logits."""
    return options.repetition_penalty != 1.0 or options.no_repeat_ngram > 0


def penalise_repetition(logits: Tensor, history: Tensor, history_mask: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens that appeared (CTRL, Keskar et al., 2019).

    The prompt counts too, as in transformers.
    """
    seen = _marked(history, history_mask, logits.shape[-1])  # (B, V)
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def forbid_repeated_ngrams(logits: Tensor, history: Tensor, history_mask: Tensor, n: int) -> Tensor:
    """Rule out each token that would complete n tokens already in `history` (Paulus et al., 2017).

    A row in which this leaves no token at all keeps its logits.
    """
    if history.shape[1] < n:
        return logits
    windows = history.unfold(1, n, 1)  # (B, N, n)
    whole = history_mask.unfold(1, n, 1).all(-1)  # (B, N)
    # The last n - 1 tokens are what the next token would follow.
    recent = history[:, history.shape[1] - n + 1 :]  # (B, n-1)
    follows = (windows[..., :-1] == recent[:, None]).all(-1) & whole  # (B, N)
    follows &= history_mask[:, history.shape[1] - n + 1 :].all(-1, keepdim=True)
    banned = _marked(windows[..., -1], follows, logits.shape[-1])  # (B, V)
    banned &= ~banned.all(-1, keepdim=True)
    return logits.masked_fill(banned, NEVER)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature, the largest logit of each row moved to 0 so that nothing overflows."""
    return (logits - logits.amax(-1, keepdim=True)) / max(temperature, COLDEST)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Rule out all but the k likeliest tokens (Fan et al., 2018); those level with the last of them stay."""
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < least, NEVER)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest tokens that hold the share p of the probability (Holtzman et al., 2019)."""
    ascending, order = logits.sort(-1)  # (B, V)
    outside = ascending.softmax(-1).cumsum(-1) <= 1 - p
    outside[:, -1] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), NEVER)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample a token of each row by inverting its cumulative distribution at `uniform` (B,), in [0, 1)."""
    p = logits.softmax(-1)  # (B, V)
    cumulative = p.cumsum(-1)
    # A sum in parallel may step up where p is 0, or end below the threshold: neither may choose a token.
    reached = (cumulative > uniform[:, None] * cumulative[:, -1:]) & (p > 0)
    first = _first_of_largest(reached.to(torch.uint8))  # (B,)
    return torch.where(reached.any(-1), first, _first_of_largest(p))


def uniform_rows(seed: int, streams: list[int], steps: int) -> Tensor:
    """Uniform numbers in [0, 1) for `steps` tokens of each row, (B, steps) float32 on the CPU.

    A row's numbers depend on the seed and the row's stream alone: not on the device, on the other rows, or
    on how many steps are asked for.
    """
    rows = [np.random.default_rng([seed, stream]).random(steps, dtype=np.float32) for stream in streams]
    return torch.from_numpy(np.stack(rows))


def _first_of_largest(x: Tensor) -> Tensor:
    """argmax of each row, (B, V) to (B,); on a CPU NumPy's, which is five times as fast."""
    if x.device.type != "cpu":
        return x.argmax(-1)
    return torch.from_numpy(x.detach().numpy().argmax(-1))


def _marked(tokens: Tensor, where: Tensor, vocab_size: int) -> Tensor:
    """(B, V) bool: true at the `tokens` (B, N) that `where` (B, N) selects."""
    marked = torch.zeros(tokens.shape[0], vocab_size + 1, dtype=torch.bool, device=tokens.device)
    marked.scatter_(1, tokens.masked_fill(~where, vocab_size), True)  # the last column takes the others
    return marked[:, :-1]
