from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from seedbed.data.batches import Batch
from seedbed.data.rows import NO_TARGET
from seedbed.device import Precision
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Decoder
from seedbed.sampling import draw, uniform_rows
from seedbed.train.continual import anchors as module
from seedbed.train.continual.anchors import PredictionAnchor, WeightAnchor, diagonal_fisher

CPU = torch.device("cpu")
V, T = 19, 8


def tiny(arch: str, seed: int = 0, **changes: Any) -> Decoder:
    """Untrained weights predict all tokens alike; these are larger."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": V, "d_model": 16, "num_layers": 2, "num_heads": 4, "max_seq_len": T}
    config = from_scratch(arch, dropout=0.1, d_ff=24, num_kv_heads=4 if arch == "gpt2" else 2, **(sizes | changes))
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture(params=["gpt2", "llama"], ids=["tied gpt2", "untied llama"])
def model(request: pytest.FixtureRequest) -> Decoder:
    return tiny(request.param, tie_embeddings=request.param == "gpt2")


def moved(model: Decoder, size: float, seed: int = 1) -> Decoder:
    g = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g), alpha=size)
    return other


def text(rows: int, seed: int = 0, vocab_size: int = V, tokens: int = T, packed: bool = False) -> Batch:
    """Random tokens, some of them without a target; packed, two documents a row."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (rows, tokens + 1), generator=g)
    labels = ids[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=g) < 0.3] = NO_TARGET
    positions = torch.arange(tokens).expand(rows, tokens)
    if not packed:
        return Batch(ids[:, :-1], labels, positions, None)
    second = (positions >= 3).long()
    return Batch(ids[:, :-1], labels, positions - 3 * second, second)


def one_row_each(batch: Batch) -> Iterator[Batch]:
    for row in range(len(batch.labels)):
        segment_ids = None if batch.segment_ids is None else batch.segment_ids[[row]]
        yield Batch(batch.input_ids[[row]], batch.labels[[row]], batch.position_ids[[row]], segment_ids)


def num_targets(batch: Batch) -> int:
    return int((batch.labels != NO_TARGET).sum())


def fisher(model: Decoder, batches: Iterable[Batch], seed: int = 0, precision: Precision = "fp32") -> dict[str, Tensor]:
    return diagonal_fisher(model, batches, device=CPU, precision=precision, seed=seed)


def named_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def logits(model: Decoder, batch: Batch) -> Tensor:
    hidden = model(batch.input_ids, batch.position_ids, batch.segment_ids)
    return model.logits(hidden)  # (B, T, V)


# WeightAnchor


class TwoWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 3.0]))
        self.w.grad = torch.tensor([10.0, 20.0])


def test_l2_sp_by_hand() -> None:
    model = TwoWeights()
    anchor = WeightAnchor(model, {"w": torch.tensor([0.0, 1.0])}, strength=0.5)
    anchor.add_gradients()
    assert named_gradients(model)["w"].tolist() == [10 + 0.5, 20 + 1]


def test_ewc_by_hand() -> None:
    model = TwoWeights()
    importance = {"w": torch.tensor([3.0, 2.0])}
    anchor = WeightAnchor(model, {"w": torch.tensor([0.0, 1.0])}, 0.5, importance)
    anchor.add_gradients()
    assert named_gradients(model)["w"].tolist() == [10 + 1.5, 20 + 2]


@pytest.mark.parametrize("piece", [1, 100, 2**20])
@pytest.mark.parametrize("weighted", [False, True], ids=["l2_sp", "ewc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_penalty(
    model: Decoder, weighted: bool, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    old = {name: p.detach() for name, p in moved(model, 0.1).named_parameters()}
    model.to(dtype)
    importance = {name: torch.rand_like(w) for name, w in old.items()} if weighted else None
    anchor = WeightAnchor(model, old, 0.3, importance)
    penalty = torch.zeros((), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        squares = (parameter.double() - old[name].double()) ** 2
        penalty = penalty + 0.3 / 2 * (squares * importance[name] if importance else squares).sum()
    penalty.backward()  # type: ignore[no-untyped-call]
    expected = named_gradients(model)
    before = {name: torch.randn_like(g) for name, g in expected.items()}
    for name, parameter in model.named_parameters():
        parameter.grad = before[name].clone()
    anchor.add_gradients()
    for name, gradient in named_gradients(model).items():
        torch.testing.assert_close(gradient, before[name] + expected[name], atol=1e-6, rtol=1e-6)


def test_at_the_start_nothing_pulls(model: Decoder) -> None:
    """And the old weights stay where they are, though they were given as the parameters themselves."""
    anchor = WeightAnchor(model, dict(model.named_parameters()), 10.0)
    logits(model, text(2)).sum().backward()  # type: ignore[no-untyped-call]
    before = named_gradients(model)
    anchor.add_gradients()
    assert all(torch.equal(gradient, before[name]) for name, gradient in named_gradients(model).items())
    with torch.no_grad():
        model.embed_tokens.weight += 1
    model.zero_grad(set_to_none=False)
    anchor.add_gradients()
    torch.testing.assert_close(model.embed_tokens.weight.grad, torch.full_like(model.embed_tokens.weight, 10.0))
    others = {name: gradient for name, gradient in named_gradients(model).items() if "embed_tokens" not in name}
    assert not any(gradient.any() for gradient in others.values())


def test_a_parameter_without_a_gradient_or_frozen_is_left_alone(model: Decoder) -> None:
    model.requires_grad_(False)
    model.final_norm.requires_grad_(True)
    old = {name: torch.zeros_like(p) for name, p in model.final_norm.named_parameters(prefix="final_norm")}
    anchor = WeightAnchor(model, old, 1.0)
    anchor.add_gradients()
    assert not named_gradients(model)
    for parameter in model.final_norm.parameters():
        parameter.grad = torch.zeros_like(parameter)
    anchor.add_gradients()
    gradients = named_gradients(model)
    assert gradients.keys() == old.keys()
    assert all(torch.equal(gradient, model.get_parameter(name)) for name, gradient in gradients.items())


def test_old_weights_must_be_there_and_fit(model: Decoder) -> None:
    old = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(AssertionError, match=r"nothing given for embed_tokens\.weight"):
        WeightAnchor(model, {}, 1.0)
    with pytest.raises(AssertionError, match=r"nothing given for embed_tokens\.weight"):
        WeightAnchor(model, old, 1.0, {})
    with pytest.raises(AssertionError, match=r"embed_tokens\.weight: \(18, 16\) for \(19, 16\)"):
        WeightAnchor(model, old | {"embed_tokens.weight": torch.zeros(V - 1, 16)}, 1.0)


# PredictionAnchor


def plain_divergence(new: Tensor, old: Tensor, labels: Tensor) -> Tensor:
    """Sum over the targets of KL(old || new), from logits."""
    kept = labels != NO_TARGET
    p, q = (F.log_softmax(x[kept], dim=-1) for x in (old, new))
    return F.kl_div(q, p, reduction="sum", log_target=True)


@pytest.mark.parametrize("packed", [False, True])
def test_predictions_are_held(model: Decoder, packed: bool) -> None:
    batch, old = text(3, packed=packed), moved(model, 0.1)
    model.eval()
    anchor = PredictionAnchor(model, old.train(), 0.7, CPU, "fp32")
    penalty = anchor(model(batch.input_ids, batch.position_ids, batch.segment_ids), batch)
    penalty.backward()  # type: ignore[no-untyped-call]
    ours = named_gradients(model)
    assert not named_gradients(old)

    model.zero_grad()
    expected = 0.7 * plain_divergence(logits(model, batch), logits(old, batch), batch.labels)
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(penalty, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in named_gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-5, rtol=1e-4)


def test_the_old_model_is_frozen_and_without_dropout(model: Decoder) -> None:
    old = copy.deepcopy(model).train()
    PredictionAnchor(model, old, 1.0, CPU, "fp32")
    assert not any(m.training for m in old.modules())
    assert not any(p.requires_grad for p in old.parameters())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_at_the_start_predictions_agree(model: Decoder, precision: Precision) -> None:
    batch, anchor = text(3), PredictionAnchor(model.eval(), copy.deepcopy(model), 1.0, CPU, precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        penalty = anchor(model(batch.input_ids, batch.position_ids), batch)
    assert penalty.item() == 0
    penalty.backward()  # type: ignore[no-untyped-call]
    assert not any(gradient.any() for gradient in named_gradients(model).values())


def test_in_bf16_the_pull_is_about_the_same(model: Decoder) -> None:
    batch, old = text(8), moved(model, 0.1)
    model.eval()
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    found = []
    for precision in precisions:
        model.zero_grad()
        anchor = PredictionAnchor(model, old, 1.0, CPU, precision)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            penalty = anchor(model(batch.input_ids, batch.position_ids), batch)
        penalty.backward()  # type: ignore[no-untyped-call]
        found.append((penalty.item(), torch.cat([g.flatten() for g in named_gradients(model).values()])))
    (exact, gradient), (rounded, rounded_gradient) = found
    assert rounded == pytest.approx(exact, rel=0.05)
    assert (rounded_gradient - gradient).norm() < 0.1 * gradient.norm()


# diagonal_fisher


def drawn_labels(model: Decoder, batches: list[Batch], seed: int) -> Tensor:
    """(B of all batches, T), of the whole logits."""
    rows = []
    for number, batch in enumerate(batches):
        [uniform] = uniform_rows(seed, [number], batch.labels.numel())
        drawn = draw(logits(model, batch).flatten(0, 1), uniform).view_as(batch.labels)
        rows.append(drawn.where(batch.labels != NO_TARGET, NO_TARGET))
    return torch.cat(rows)


@pytest.mark.parametrize("packed", [False, True])
def test_in_batches_of_one_row_it_is_the_mean_of_squared_gradients(model: Decoder, packed: bool) -> None:
    batches = list(one_row_each(text(6, packed=packed)))
    ours = fisher(model, batches, seed=5)

    names, parameters = zip(*model.eval().named_parameters(), strict=True)
    squares = [torch.zeros_like(p) for p in parameters]
    for batch, drawn in zip(batches, drawn_labels(model, batches, seed=5), strict=True):
        assert not torch.equal(drawn, batch.labels[0])
        nats = F.cross_entropy(logits(model, batch)[0], drawn, reduction="sum")
        for total, gradient in zip(squares, torch.autograd.grad(nats, parameters), strict=True):
            total += gradient**2
    assert ours.keys() == set(names)
    for name, total in zip(names, squares, strict=True):
        torch.testing.assert_close(ours[name], total / sum(map(num_targets, batches)), atol=1e-6, rtol=1e-4)


def exact_fisher(model: Decoder, batch: Batch) -> dict[str, Tensor]:
    """Mean over the targets of the sum over labels of p(y) (d log p(y) / dw)^2."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    log_p = logits(model, batch)[batch.labels != NO_TARGET].log_softmax(-1)  # (targets, V)
    total = [torch.zeros_like(p) for p in parameters]
    for log_probability in log_p.flatten():
        gradients = torch.autograd.grad(log_probability, parameters, retain_graph=True)
        for sums, gradient in zip(total, gradients, strict=True):
            sums += log_probability.detach().exp() * gradient**2
    return {name: sums / len(log_p) for name, sums in zip(names, total, strict=True)}


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_its_expectation_is_the_exact_fisher(arch: str) -> None:
    """With several tokens and rows in a batch: products of two tokens' gradients cancel."""
    small = {"vocab_size": 5, "d_model": 8, "num_layers": 1, "num_heads": 4}
    model = tiny(arch, tie_embeddings=arch == "gpt2", **small).eval()
    batch = text(3, vocab_size=5, tokens=4)
    exact, draws = exact_fisher(model, batch), 600
    found = fisher(model, [batch] * draws)
    for name, value in found.items():
        assert float(value.sum()) == pytest.approx(float(exact[name].sum()), rel=0.15), name
    ours, theirs = (torch.cat([x[name].flatten() for name in exact]) for x in (found, exact))
    assert (ours - theirs).norm() < 3 * math.sqrt(2 / draws) * theirs.norm()


def test_it_predicts_what_a_small_move_costs(model: Decoder) -> None:
    batches = [text(4, seed=seed) for seed in range(40)]
    importance = fisher(model, batches)
    model.eval()
    predicted = measured = 0.0
    for seed in range(5):
        other = moved(model, 0.003, seed)
        with torch.no_grad():
            moves = {name: p - model.get_parameter(name) for name, p in other.named_parameters()}
            predicted += sum(float((importance[name] * move**2).sum()) for name, move in moves.items()) / 2
            rise = sum(float(plain_divergence(logits(other, b), logits(model, b), b.labels)) for b in batches)
        measured += rise / sum(num_targets(b) for b in batches)
    assert predicted / 2 < measured < predicted * 2


def test_it_depends_on_the_seed_and_nothing_else(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [text(3), text(3, seed=1, packed=True)]
    first = fisher(model, batches)
    torch.manual_seed(99)
    assert all(torch.equal(value, first[name]) for name, value in fisher(model, batches).items())
    assert not torch.equal(fisher(model, batches, seed=1)["final_norm.weight"], first["final_norm.weight"])
    monkeypatch.setattr(module, "chunk_tokens", lambda _vocab, _device: 3)
    for name, value in fisher(model, batches).items():
        torch.testing.assert_close(value, first[name], atol=1e-6, rtol=1e-5)


def test_draws_differ_from_batch_to_batch(model: Decoder) -> None:
    batch = text(3)
    assert not torch.equal(fisher(model, [batch] * 2)["final_norm.weight"], fisher(model, [batch])["final_norm.weight"])


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_gradients_are_left_as_they_were(model: Decoder, training: bool) -> None:
    model.train(training)
    model.final_norm.weight.grad = kept = torch.ones(16)
    fisher(model, [text(2)])
    assert model.training is training
    assert model.final_norm.weight.grad is kept
    assert kept.eq(1).all()
    assert list(named_gradients(model)) == ["final_norm.weight"]

    def broken() -> Iterator[Batch]:
        yield text(2)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk"):
        fisher(model, broken())
    assert model.training is training


def test_frozen_weights_are_left_out_and_progress_counts_targets(model: Decoder) -> None:
    model.embed_tokens.requires_grad_(False)
    batches, seen = [text(2), text(2, seed=1)], list[int]()
    found = diagonal_fisher(model, batches, device=CPU, precision="fp32", seed=0, progress=seen.append)
    assert found.keys() == {name for name, _ in model.named_parameters()} - {"embed_tokens.weight"}
    assert seen == [num_targets(batches[0]), num_targets(batches[0]) + num_targets(batches[1])]


def test_in_bf16_it_is_about_the_same(model: Decoder) -> None:
    batches = [text(4, seed=seed) for seed in range(30)]
    exact, rounded = fisher(model, batches), fisher(model, batches, precision="bf16")
    negligible = 1e-6 * sum(float(value.sum()) for value in exact.values())  # that of a key's bias is zero
    for name, value in rounded.items():
        assert value.dtype == torch.float32
        assert float(value.sum()) == pytest.approx(float(exact[name].sum()), rel=0.2, abs=negligible), name


def test_without_targets_there_is_no_fisher(model: Decoder) -> None:
    batch = text(2)
    batch.labels.fill_(NO_TARGET)
    with pytest.raises(AssertionError, match="nothing to predict"):
        fisher(model, [batch])
