"""The figures of a history, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from seedbed.runs.history import BASE, Figure, History, Stage
from seedbed.runs.lineage import MatrixRow, against, backward_transfer, forgetting, gain_kept, matrix, method_in_words


def figures(**bits_per_byte: float) -> dict[str, Figure]:
    return {domain: Figure(2 * bits, bits) for domain, bits in bits_per_byte.items()}


ROOT = Stage(BASE, "/models/base", "")
LAW = Stage("law", "", "", before=figures(base=1.0, law=1.5), after=figures(base=1.1, law=1.1))
MEDICINE = Stage(
    "medicine",
    "",
    "",
    before=figures(base=1.1, law=1.1, medicine=2.0),
    after=figures(base=1.3, law=1.2, medicine=1.0),
)
THREE = History((ROOT, LAW, MEDICINE))
UNDER_WAY = THREE.with_stage(replace(MEDICINE, after={}))


def test_the_matrix_has_a_row_a_stage() -> None:
    assert matrix(THREE) == [
        MatrixRow("base", figures(base=1.0, law=1.5)),
        MatrixRow("law", figures(base=1.1, law=1.1)),
        MatrixRow("medicine", figures(base=1.3, law=1.2, medicine=1.0)),
    ]
    assert matrix(UNDER_WAY)[2] == MatrixRow("medicine", {})
    assert matrix(History((ROOT,))) == [MatrixRow("base", {})]


def test_forgetting_is_the_relative_rise() -> None:
    assert forgetting(Figure(1.0, 2.0), Figure(1.0, 2.5)) == pytest.approx(0.25)
    assert forgetting(Figure(1.0, 2.0), Figure(1.0, 1.5)) == pytest.approx(-0.25)


def test_backward_transfer_is_negative_where_models_forget() -> None:
    # The base went from 1.0 to 1.3, law from 1.1 to 1.2.
    assert backward_transfer(THREE) == pytest.approx(((1.0 - 1.3) + (1.1 - 1.2)) / 2)
    # While medicine is being learnt, now is after law.
    assert backward_transfer(UNDER_WAY) == pytest.approx(1.0 - 1.1)


def test_backward_transfer_leaves_out_what_was_not_measured() -> None:
    law = replace(LAW, before=figures(law=1.5), after=figures(law=1.1))
    medicine = replace(MEDICINE, after=figures(law=1.05, medicine=1.0))
    assert backward_transfer(History((ROOT, law))) is None
    assert backward_transfer(History((ROOT, law, medicine))) == pytest.approx(0.05)
    assert backward_transfer(History((ROOT,))) is None
    assert backward_transfer(History(())) is None


def test_the_share_of_a_gain_that_is_left() -> None:
    assert gain_kept(THREE, "law") == pytest.approx((1.5 - 1.2) / (1.5 - 1.1))
    assert gain_kept(THREE, "medicine") == pytest.approx(1.0)
    assert gain_kept(UNDER_WAY, "law") == pytest.approx(1.0)
    assert gain_kept(UNDER_WAY, "medicine") is None
    assert gain_kept(THREE, "base") is None
    assert gain_kept(THREE, "physics") is None
    worse = replace(LAW, after=figures(base=1.1, law=1.6))
    assert gain_kept(History((ROOT, worse)), "law") is None


def test_a_stage_against_a_naive_one() -> None:
    naive = replace(LAW, after=figures(base=1.4, law=1.0))
    compared = against(LAW, naive)
    assert compared is not None
    assert compared.gain_share == pytest.approx(0.4 / 0.5)
    assert compared.forgetting_avoided == pytest.approx(1 - 0.1 / 0.4)


def test_only_domains_that_both_measured_are_compared() -> None:
    naive = replace(MEDICINE, before=figures(law=1.1, medicine=2.0), after=figures(law=1.5, medicine=1.0))
    compared = against(MEDICINE, naive)
    assert compared is not None
    assert compared.gain_share == pytest.approx(1.0)
    assert compared.forgetting_avoided == pytest.approx(1 - 0.1 / 0.4)


def test_a_naive_stage_that_forgot_nothing() -> None:
    for after in (figures(base=1.0, law=1.0), figures(base=0.9, law=1.0), figures(law=1.0)):
        compared = against(LAW, replace(LAW, after=after))
        assert compared is not None
        assert compared.forgetting_avoided is None


def test_stages_that_cannot_be_compared() -> None:
    assert against(LAW, MEDICINE) is None
    assert against(LAW, replace(LAW, after={})) is None
    assert against(replace(LAW, after={}), LAW) is None
    assert against(LAW, replace(LAW, after=figures(base=1.0, law=1.5))) is None


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({}, "naive"),
        ({"replay": 0, "learning_rate": 5e-5}, "naive, whole model, peak rate 5e-05"),
        ({"learning_rate": 2e-5, "replay": 0.05}, "replay 5 %, whole model, peak rate 2e-05"),
        (
            {"self_replay": 0.125, "l2_sp": 0.1, "ewc": 10.0, "kl": None, "interpolate": True},
            "self-replay 12.5 %, L2-SP 0.1, EWC 10, interpolated, whole model",
        ),
        ({"kl": 0.3, "lora": 16, "learning_rate": 2e-4}, "KL 0.3, LoRA of rank 16, peak rate 0.0002"),
        ({"replay": 0.05, "last_blocks": 2, "freeze": "norms"}, "replay 5 %, last blocks: 2, frozen: norms"),
        ({"replay": "a {little}", "of_luck": 1}, "replay a {little}, whole model, of luck 1"),
    ],
)
def test_a_method_in_words(method: dict[str, Any], words: str) -> None:
    assert method_in_words(method) == words
