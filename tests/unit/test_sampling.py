from __future__ import annotations

import math

import pytest
import torch

from seedbed.config import SamplingOptions
from seedbed.sampling import (
    apply_temperature,
    draw,
    forbid_repeated_ngrams,
    keep_top_k,
    keep_top_p,
    next_tokens,
    penalise_repetition,
    uniform_rows,
)

PLAIN = SamplingOptions(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)


def tokens(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def everything(history: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(history, dtype=torch.bool)


def banned(logits: torch.Tensor) -> list[list[int]]:
    return [row.isinf().nonzero().flatten().tolist() for row in logits]


def test_repetition_penalty_counts_a_token_once_and_not_the_padding() -> None:
    logits = torch.tensor([[2.0, -2.0, 4.0, 0.5]])
    history = tokens([2, 0, 1, 0])
    mask = torch.tensor([[False, True, True, True]])
    assert penalise_repetition(logits, history, mask, 2.0).tolist() == [[1.0, -4.0, 4.0, 0.5]]


def test_repeated_ngrams_are_forbidden_row_by_row() -> None:
    history = tokens([1, 2, 3, 1, 2], [1, 2, 3, 4, 5])
    logits = torch.zeros(2, 8)
    assert banned(forbid_repeated_ngrams(logits, history, everything(history), 3)) == [[3], []]
    assert banned(forbid_repeated_ngrams(logits, history, everything(history), 2)) == [[3], []]
    assert banned(forbid_repeated_ngrams(logits, history, everything(history), 1)) == [
        [1, 2, 3],
        [1, 2, 3, 4, 5],
    ]
    assert banned(forbid_repeated_ngrams(logits, history, everything(history), 6)) == [[], []]


def test_padding_is_no_part_of_an_ngram() -> None:
    history = tokens([0, 0, 5, 0])
    mask = torch.tensor([[False, False, True, True]])
    logits = torch.zeros(1, 8)
    assert banned(forbid_repeated_ngrams(logits, history, mask, 2)) == [[]]
    assert banned(forbid_repeated_ngrams(logits, history, everything(history), 2)) == [[0, 5]]
    nothing_before = torch.tensor([[False, False, False, True]])
    assert banned(forbid_repeated_ngrams(logits, tokens([0, 0, 0, 0]), nothing_before, 3)) == [[]]


def test_a_row_with_every_token_forbidden_keeps_its_logits() -> None:
    history = tokens([0, 1, 2, 3], [0, 1, 2, 2])
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    out = forbid_repeated_ngrams(logits, history, everything(history), 1)
    assert out[0].equal(logits[0])
    assert banned(out)[1] == [0, 1, 2]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-3])
def test_a_very_low_temperature_is_greedy(temperature: float) -> None:
    probabilities = apply_temperature(torch.tensor([[50.0, 51.0, -80.0]]), temperature).softmax(-1)
    assert probabilities.tolist() == [[0.0, 1.0, 0.0]]


def test_top_k_keeps_ties_and_may_exceed_the_vocabulary() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0]])
    assert banned(keep_top_k(logits, 2)) == [[0]]
    assert banned(keep_top_k(logits, 9)) == [[]]


def test_top_p_keeps_the_smallest_set_that_holds_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert banned(keep_top_p(logits, 0.79)) == [[2, 3]]
    assert banned(keep_top_p(logits, 0.81)) == [[3]]
    assert banned(keep_top_p(logits, 1e-9)) == [[1, 2, 3]]


def test_draw_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log().expand(5, 4)
    assert draw(logits, torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76])).tolist() == [0, 0, 2, 2, 3]


def test_draw_never_takes_an_impossible_token() -> None:
    logits = torch.randn(64, 5_000, generator=torch.Generator().manual_seed(0))
    logits = keep_top_k(logits, 3)
    for extreme in (0.0, 1 - 2**-24):
        chosen = draw(logits, torch.full((64,), extreme))
        assert logits.gather(1, chosen[:, None]).isfinite().all()


def test_frequencies_follow_the_probabilities() -> None:
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    n = 20_000
    chosen = draw(p.log().expand(n, 4), uniform_rows(0, [0], n)[0])
    spread = 4 * math.sqrt(0.25 / n)
    assert torch.allclose(chosen.bincount(minlength=4) / n, p, atol=spread)


def test_random_numbers_depend_on_seed_and_stream_alone() -> None:
    one = uniform_rows(7, [3], 40)
    assert uniform_rows(7, [0, 3, 1], 10)[1].equal(one[0, :10])
    assert not uniform_rows(8, [3], 40).equal(one)
    assert not uniform_rows(7 + 2**40, [3], 40).equal(one)
    assert ((one >= 0) & (one < 1)).all()


def test_a_row_is_drawn_as_if_it_were_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 50, generator=generator) * 3
    history = torch.randint(50, (4, 12), generator=generator)
    mask = torch.arange(12) >= torch.tensor([0, 3, 11, 5])[:, None]
    uniform = torch.rand(4, generator=generator)
    options = SamplingOptions(top_k=20, top_p=0.9, no_repeat_ngram=2)
    together = next_tokens(logits, history, mask, options, uniform)
    for i in range(4):
        row = slice(i, i + 1)
        real = history[row][:, mask[i]]
        alone = next_tokens(logits[row], real, everything(real), options, uniform[row])
        assert alone.item() == together[i].item()


def test_greedy_needs_no_random_numbers_and_ignores_the_cuts() -> None:
    history = tokens([1, 1])
    greedy = PLAIN.model_copy(update={"greedy": True, "temperature": 0.1, "top_k": 1})
    logits = torch.tensor([[0.0, 2.0, 1.5]])
    assert next_tokens(logits, history, everything(history), greedy, None).tolist() == [1]
    penalised = greedy.model_copy(update={"repetition_penalty": 2.0})
    assert next_tokens(logits, history, everything(history), penalised, None).tolist() == [2]
