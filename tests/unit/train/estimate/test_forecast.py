from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from seedbed.config import FLAGS, Config, Layer, resolve
from seedbed.errors import ConfigError
from seedbed.loss import linear_cross_entropy
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Decoder, num_parameters
from seedbed.optim import build_optimizer, optimizer_tensors
from seedbed.train.estimate.footprint import MIB, parse_size
from seedbed.train.estimate.forecast import Forecast, describe_forecast, fitting, forecast, forecast_run
from seedbed.train.estimate.trial import LiveBytes, block_flops, kinds_of, outline
from seedbed.train.estimate.workload import Workload
from seedbed.train.ingredients import Ingredients
from seedbed.train.length import length
from seedbed.train.progress import Display
from seedbed.train.resume import Start, open_run
from seedbed.train.scratch import from_random_weights
from seedbed.train.state import TrainingState

SHAPE = from_scratch("llama", vocab_size=500, d_model=64, num_layers=4, num_heads=2, d_ff=128, max_seq_len=64)
BLOCK = 4 * 64 * 64 + 3 * 64 * 128  # weights of a block's matrices


def config(regime: str = "scratch", **values: Any) -> Config:
    shared = {"model": "tiny" if regime == "scratch" else "folder", "max_seq_len": 64, "batch_size": 4}
    chosen = {**shared, "precision": "fp32", "device": "cpu", **values}
    return resolve(regime, [Layer(FLAGS, chosen)])


def quick(run: Config, **changes: Any) -> Any:
    return forecast(Workload(run, SHAPE, **changes), seconds=0.1)


# Kinds of blocks, and what they are made of


def test_whole_blocks_are_of_one_kind() -> None:
    [kind] = kinds_of(outline(config(), SHAPE))
    assert (kind.count, kind.carries, kind.learns) == (4, True, True)


def test_no_gradient_goes_through_the_first_adapted_block() -> None:
    first, others = kinds_of(outline(config("finetune", lora=True), SHAPE))
    assert (first.count, first.carries, others.count, others.carries) == (1, False, 3, True)


def test_frozen_blocks_before_trained_ones_only_look() -> None:
    frozen, first, last = kinds_of(outline(config("finetune", last_blocks=2), SHAPE))
    assert [(kind.count, kind.learns, kind.carries) for kind in (frozen, first, last)] == [
        (2, False, False),
        (1, True, False),
        (1, True, True),
    ]


def test_an_outline_takes_no_memory() -> None:
    assert all(parameter.is_meta for parameter in outline(config("finetune", lora=True), SHAPE).parameters())


def test_flops_of_a_block() -> None:
    [whole] = kinds_of(outline(config(), SHAPE))
    attention = 4 * 64 * 64 / 2
    assert block_flops(whole, 64, training=False) == 64 * (2 * BLOCK + attention)
    assert block_flops(whole, 64, training=True) == 64 * (6 * BLOCK + 3 * attention)
    frozen, *_ = kinds_of(outline(config("finetune", last_blocks=2), SHAPE))
    assert block_flops(frozen, 64, training=True) == 64 * (2 * BLOCK + attention)


def test_live_bytes_come_and_go() -> None:
    known = torch.zeros(100)
    with LiveBytes([known]) as live:
        known.view(10, 10).mul_(2)
        assert live.now == 0
        a = torch.zeros(1000)
        b = a + 1
        assert live.now == 8000
        del a
        b += 1
    assert (live.now, live.peak) == (4000, 8000)


# Memory


def saved_bytes(model: Decoder, ids: Tensor) -> int:
    """What autograd keeps of a forward pass, parameters left out, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(ids)
    assert hidden.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2"])
def test_activations_are_what_autograd_keeps(arch: str) -> None:
    shape = from_scratch(arch, vocab_size=500, d_model=64, num_layers=4, num_heads=2, d_ff=128, max_seq_len=64)
    run = config(packing=False)
    expected = forecast(Workload(run, shape), seconds=0.1).footprint.activations(4)
    kept = saved_bytes(Decoder(shape), torch.zeros(4, 64, dtype=torch.int64))
    assert expected == pytest.approx(kept, rel=0.15)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weights_gradients_and_state_are_exact(optimizer: str) -> None:
    run = config(optimizer=optimizer)
    model = Decoder(SHAPE)
    parts = build_optimizer(model, run.training)
    linear_cross_entropy(
        model(torch.zeros(1, 8, dtype=torch.int64))[0], model.head_weight(), torch.zeros(8, dtype=torch.int64)
    ).backward()  # type: ignore[no-untyped-call]
    parts.step()
    footprint = quick(run).footprint
    size = 4 * num_parameters(SHAPE)
    state = sum(tensor.nbytes for tensor in optimizer_tensors(model, parts).values())
    assert (footprint.weights, footprint.gradients) == (size, size)
    assert footprint.optimizer == pytest.approx(state, rel=0.01)


def test_adapters_need_little_beside_the_weights() -> None:
    whole, lora = quick(config("finetune")), quick(config("finetune", lora_r=4))
    assert lora.trainable_parameters < whole.trainable_parameters / 5
    assert lora.footprint.gradients == 4 * lora.trainable_parameters
    assert lora.footprint.weights == 4 * lora.parameters


def test_checkpointing_keeps_only_what_enters_a_block() -> None:
    plain, spare = quick(config()), quick(config(gradient_checkpointing=True))
    inputs = 4 * 64 * 64 * 4 * (4 + 3)  # rows, tokens, width, bytes; blocks, and what comes before and after them
    assert spare.footprint.activations(4) == pytest.approx(inputs, rel=0.15)
    assert spare.footprint.activations(4) < plain.footprint.activations(4) / 4


def test_half_precision_holds_a_copy_of_the_head_and_of_what_is_frozen_below_what_learns() -> None:
    assert quick(config()).footprint.cache == 0
    assert quick(config(precision="bf16")).footprint.cache == 2 * 500 * 64
    frozen = config("finetune", precision="bf16", freeze="blocks.2.*")
    assert quick(frozen).footprint.cache == 2 * (BLOCK + 500 * 64)


@pytest.mark.parametrize(
    ("ways", "copies"), [({}, 1), ({"l2_sp": 0.1}, 1), ({"ewc": 1}, 2), ({"kl": 0.1}, 1), ({"method": "naive"}, 0)]
)
def test_anchors_hold_old_weights(ways: dict[str, Any], copies: int) -> None:
    run = config("continue", domain="law", **ways)
    assert quick(run).footprint.weights == 4 * num_parameters(SHAPE) * (1 + copies)


def test_logits_are_those_of_a_chunk() -> None:
    footprint = quick(config()).footprint
    assert footprint.logits(1) == 4 * 64 * 500
    assert footprint.logits(1000) == 4 * footprint.chunk_tokens * 500
    assert quick(config(precision="bf16")).footprint.logits(1) == 2 * 64 * 500


# What fits


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 2**33), ("8GiB", 2**33), ("512MB", 2**29), ("8g", 2**33), ("1.5 gb", 1.5 * 2**30)]
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "8", "GB", "8XB", "-8GB", "0GB", "8GBs", "1e3MB"])
def test_other_words_are_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a size such as 8GB"):
        parse_size(text)


def test_the_largest_batch_just_fits() -> None:
    expected = quick(config(grad_accumulation=2))
    limit = expected.footprint.peak(13)
    fits = fitting(expected, limit)
    assert fits.largest_batch_size == 13
    assert (fits.batch_size, fits.grad_accumulation) == (8, 1)
    assert "--batch_size 13 is the largest" in fits.sentence
    assert "the same update" in fits.sentence
    fewer = fitting(expected, expected.footprint.peak(3))
    assert (fewer.batch_size, fewer.grad_accumulation) == (3, 3)
    assert "an update of 9 rows" in fewer.sentence


def test_what_would_help_when_no_row_fits() -> None:
    fits = fitting(quick(config("finetune")), MIB)
    assert (fits.largest_batch_size, fits.batch_size) == (0, 0)
    assert "Not even one row fits into 1 MB" in fits.sentence


def test_savings_add_up_for_a_large_model() -> None:
    wide = replace(SHAPE, d_model=256, num_heads=4, head_dim=64, num_kv_heads=4, d_ff=1024, vocab_size=8000)
    expected = forecast(Workload(config("finetune"), wide), seconds=0.1)
    savings = fitting(expected, MIB).savings_mb
    assert next(iter(savings)) == "--lora"
    moments = expected.footprint.optimizer / MIB
    assert savings["--optimizer adamw8bit"] == pytest.approx(moments * 3 / 4, abs=0.1)


def test_samples_are_written_from_a_copy_of_the_weights() -> None:
    lora = quick(config("finetune", lora=True)).footprint
    assert lora.writing == pytest.approx(4 * num_parameters(SHAPE))
    small = replace(lora, loading=0.0, row_activations=0.0, row_working=0.0, logit_bytes=0)
    assert small.peak(1) == lora.program + lora.weights + lora.optimizer + lora.writing


def test_too_little_memory_is_a_finding() -> None:
    expected = quick(config())
    assert replace(expected, free_bytes=None).findings() == []
    assert replace(expected, free_bytes=2 * expected.peak_bytes).findings() == []
    [finding] = replace(expected, free_bytes=expected.peak_bytes - MIB).findings()
    assert (finding.name, finding.level) == ("memory", "warning")
    assert "--batch_size" in finding.remedy


# A run


@dataclass
class Begun:
    """A run just before its first step."""

    made: Ingredients
    optimizer: torch.optim.Optimizer
    state: TrainingState
    steps: int | None

    def forecast(self) -> Forecast:
        return forecast_run(self.made, self.optimizer, self.state, self.steps)


@pytest.fixture
def begin(small_text_file: Path, tmp_path: Path) -> Callable[..., Begun]:
    def make(**values: Any) -> Begun:
        sizes = {"num_layers": 2, "d_model": 32, "num_heads": 2, "d_ff": 64, "max_seq_len": 32, "vocab_size": 300}
        run = config(data=str(small_text_file), output=str(tmp_path / "run"), **{**sizes, **values})
        start = open_run(run)
        assert isinstance(start, Start)
        made = from_random_weights(start, run, Display(Console(file=io.StringIO()), 100))
        _, steps = length(made.prepared.config, made.rows)
        return Begun(made, build_optimizer(made.model, run.training), TrainingState(), steps)

    return make


def test_a_forecast_leaves_the_run_as_it_was(begin: Callable[..., Begun]) -> None:
    run = begin()
    model, random = run.made.model, torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    run.forecast()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not run.optimizer.state


def test_a_forecast_of_a_run_counts_its_steps(begin: Callable[..., Begun]) -> None:
    run = begin(max_steps=30)
    expected = run.forecast()
    assert (expected.steps, expected.steps_per_epoch) == (30, -(-len(run.made.rows) // 4))
    assert expected.tokens == run.made.rows.num_targets
    assert expected.hours is not None
    assert expected.first_result_hours is not None
    assert 0 < expected.first_result_hours <= expected.hours
    assert 30 * expected.step_seconds < 3600 * expected.hours
    assert expected.to_summary() == {"peak_memory_mb": expected.memory_mb()["peak"], "hours": expected.hours}
    output = io.StringIO()
    describe_forecast(Display(Console(file=output, width=200), 100), expected)
    assert "Peak memory" in output.getvalue()
    assert "to the first result" in output.getvalue()


def test_hours_never_exceed_those_allowed(begin: Callable[..., Begun]) -> None:
    run = begin(max_training_hours=1e-6)
    assert run.forecast().hours == 1e-6
    run.steps = None  # as with cosine_time
    assert run.forecast().hours == 1e-6


def test_hours_used_earlier_count(begin: Callable[..., Begun]) -> None:
    run = begin(max_steps=1000)
    run.state.step, run.state.seconds = 1000, 36.0
    assert run.forecast().hours == pytest.approx(0.01)
