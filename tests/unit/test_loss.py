from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from seedbed import loss as module
from seedbed.data.rows import NO_TARGET
from seedbed.loss import chunk_tokens, linear_cross_entropy, linear_kl_divergence, token_losses

N, V, D = 50, 31, 16


@pytest.fixture(params=[7, 10, 1000], ids=["ragged chunks", "even chunks", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    size: int = request.param
    monkeypatch.setattr(module, "chunk_tokens", lambda _vocab, _device: size)
    return size


def problem(ignored: tuple[int, ...] = (0, 3, 4, 49)) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=g).requires_grad_()
    weight = torch.randn(V, D, generator=g).requires_grad_()
    labels = torch.randint(V, (N,), generator=g)
    labels[list(ignored)] = NO_TARGET
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("ignored", [(), (0, 3, 4, 49), tuple(range(N - 1))])
@pytest.mark.parametrize("scale", [1.0, 1 / 46, 65536.0])
def test_sum_and_gradients_are_those_of_plain_cross_entropy(ignored: tuple[int, ...], scale: float) -> None:
    hidden, weight, labels = problem(ignored)
    ours, theirs = linear_cross_entropy(hidden, weight, labels), plain(hidden, weight, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-6)
    got, expected = gradients(ours * scale, hidden, weight), gradients(theirs * scale, hidden, weight)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g / scale, e / scale, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("chunk")
def test_token_losses_add_up() -> None:
    hidden, weight, labels = problem()
    nats = token_losses(hidden, weight, labels)
    assert not nats.requires_grad
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    torch.testing.assert_close(nats, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(nats.sum(), linear_cross_entropy(hidden, weight, labels).detach())


def test_nothing_to_predict() -> None:
    hidden, weight, labels = problem(tuple(range(N)))
    loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.item() == 0
    assert all(not g.any() for g in gradients(loss, hidden, weight))
    assert token_losses(hidden, weight, labels).tolist() == [0.0] * N


@pytest.mark.usefixtures("chunk")
def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, labels = problem()
    (only,) = gradients(linear_cross_entropy(hidden, weight.detach(), labels), hidden)
    torch.testing.assert_close(only, gradients(plain(hidden, weight, labels), hidden)[0], atol=1e-5, rtol=1e-5)


def test_a_tied_weight_adds_both_gradients() -> None:
    _, weight, labels = problem(())
    ids = labels.roll(1)
    ours = gradients(linear_cross_entropy(F.embedding(ids, weight), weight, labels), weight)[0]
    theirs = gradients(plain(F.embedding(ids, weight), weight, labels), weight)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("chunk")
def test_under_autocast_only_the_products_are_rounded(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem()
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(hidden, weight, labels)
        nats = token_losses(hidden, weight, labels)
    assert loss.dtype == nats.dtype == torch.float32
    rounded = F.cross_entropy((hidden.to(dtype) @ weight.to(dtype).T).float(), labels, reduction="sum")
    torch.testing.assert_close(loss, rounded, atol=1e-3, rtol=1e-6)
    got = gradients(loss, hidden, weight)
    assert all(g.dtype == torch.float32 for g in got)
    for g, e in zip(got, gradients(plain(hidden, weight, labels), hidden, weight), strict=True):
        assert (g - e).norm() < 0.01 * e.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("gradient", [True, False])
def test_what_is_compiled_is_the_same(dtype: torch.dtype, gradient: bool) -> None:
    logits = (20 * torch.randn(N, V, generator=torch.Generator().manual_seed(0))).to(dtype)
    label = logits.argmax(1, keepdim=True)
    label[::2] = 3
    expected, found = logits.clone(), logits.clone()
    nats = module._cross_entropy(expected.clone(), label, torch.float32, False)
    assert torch.allclose(module._cross_entropy_to_compile(found, label, torch.float32, gradient), nats, atol=1e-5)
    if gradient:
        module._cross_entropy(expected, label, torch.float32, gradient)
    assert torch.allclose(found.float(), expected.float(), atol=1e-6, rtol=2 * torch.finfo(dtype).eps)
    assert torch.equal(found, logits) != gradient


def test_half_precision_weights_get_gradients_of_their_own_type() -> None:
    hidden, weight, labels = (t.detach() for t in problem())
    hidden, weight = (t.bfloat16().requires_grad_() for t in (hidden, weight))
    got = gradients(linear_cross_entropy(hidden, weight, labels), hidden, weight)
    assert [g.dtype for g in got] == [torch.bfloat16] * 2


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight, labels = problem()
    loss = linear_cross_entropy(hidden * 1e4, weight, labels)
    assert math.isfinite(loss.item())
    assert all(g.isfinite().all() for g in gradients(loss, hidden, weight))


def test_the_gradients_serve_one_backward() -> None:
    hidden, weight, labels = problem()
    loss = linear_cross_entropy(hidden, weight, labels)
    torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    with pytest.raises(AssertionError, match="one backward"):
        torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("chunk_size", [1024, 100])
def test_products_have_few_shapes_however_many_labels_there_are(
    chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN keeps code for each shape that it meets, and rows of answers have as many labels as they like."""
    monkeypatch.setattr(module, "CPU_CHUNK", (chunk_size, 1 << 30))
    shapes, product = set(), torch.mm

    def seen(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        shapes.add(out.shape)
        return product(a, b, out=out)

    monkeypatch.setattr(torch, "mm", seen)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(256, D, generator=g), torch.randn(V, D, generator=g)
    for kept in range(1, 256, 5):
        labels = torch.full((256,), NO_TARGET)
        labels[torch.randperm(256, generator=g)[:kept]] = 3
        expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), expected)
    assert len(shapes) <= 4


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most elements of any tensor made inside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_the_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_CHUNK", (8, 1 << 30))
    monkeypatch.setattr(module, "CPU_BLOCK", 3 * 4 * V)
    hidden, weight, labels = problem()
    with _Largest() as seen:  # type: ignore[no-untyped-call]
        linear_cross_entropy(hidden, weight, labels).backward()  # type: ignore[no-untyped-call]
        token_losses(hidden, weight, labels)
        linear_kl_divergence(hidden, weight, *old_prediction(), labels).backward()  # type: ignore[no-untyped-call]
    assert seen.numel == max(8 * V, N * D, V * D)
    with _Largest() as seen:  # type: ignore[no-untyped-call]
        plain(hidden, weight, labels)
    assert seen.numel == N * V


def old_prediction(width: int = D) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, width, generator=g), torch.randn(V, width, generator=g)


def plain_divergence(hidden: Tensor, weight: Tensor, old_hidden: Tensor, old_weight: Tensor, labels: Tensor) -> Tensor:
    kept = labels != NO_TARGET
    new, old = (F.log_softmax(h[kept] @ w.T, dim=1) for h, w in ((hidden, weight), (old_hidden, old_weight)))
    return F.kl_div(new, old, reduction="sum", log_target=True)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("ignored", [(), (0, 3, 4, 49), tuple(range(N - 1))])
@pytest.mark.parametrize("width", [D, 9], ids=["same width", "another width"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_divergence_and_its_gradients(ignored: tuple[int, ...], width: int, dtype: torch.dtype, error: float) -> None:
    hidden, weight, labels = problem(ignored)
    hidden, weight, old_hidden, old_weight = (t.to(dtype) for t in (hidden, weight, *old_prediction(width)))
    ours = linear_kl_divergence(hidden, weight, old_hidden, old_weight, labels)
    theirs = plain_divergence(hidden, weight, old_hidden, old_weight, labels)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, atol=error, rtol=error)
    for g, e in zip(gradients(ours / 46, hidden, weight), gradients(theirs / 46, hidden, weight), strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g, e, atol=error, rtol=error)


def test_divergence_by_hand() -> None:
    """Old (1/2, 1/2), new (1/4, 3/4): 1/2 log(2) + 1/2 log(2/3), and new less old for each logit."""
    hidden = torch.tensor([[math.log(3)]], requires_grad=True)
    weight = torch.tensor([[0.0], [1.0]], requires_grad=True)
    nats = linear_kl_divergence(hidden, weight, torch.zeros(1, 1), torch.ones(2, 1), torch.tensor([1]))
    assert nats.item() == pytest.approx(0.5 * math.log(4 / 3))
    d_hidden, d_weight = gradients(nats, hidden, weight)
    assert d_hidden.item() == pytest.approx(0.25)
    assert d_weight.flatten().tolist() == pytest.approx([-0.25 * math.log(3), 0.25 * math.log(3)])


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_model_does_not_diverge_from_itself(dtype: torch.dtype | None) -> None:
    hidden, weight, labels = problem()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        nats = linear_kl_divergence(hidden, weight, hidden.detach(), weight.detach(), labels)
    assert nats.item() == 0
    assert all(not g.any() for g in gradients(nats, hidden, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("chunk")
def test_divergence_under_autocast(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem()
    old_hidden, old_weight = old_prediction()
    with torch.autocast("cpu", dtype):
        nats = linear_kl_divergence(hidden, weight, old_hidden, old_weight, labels)
    assert nats.dtype == torch.float32
    new, old = ((h.to(dtype) @ w.to(dtype).T).float() for h, w in ((hidden, weight), (old_hidden, old_weight)))
    rounded = F.kl_div(new.log_softmax(1), old.log_softmax(1), reduction="none", log_target=True)[labels != NO_TARGET]
    torch.testing.assert_close(nats, rounded.sum(), atol=1e-3, rtol=1e-5)
    expected = gradients(plain_divergence(hidden, weight, old_hidden, old_weight, labels), hidden, weight)
    for g, e in zip(gradients(nats, hidden, weight), expected, strict=True):
        assert g.dtype == torch.float32
        assert (g - e).norm() < 0.01 * e.norm()


def test_the_old_prediction_is_constant() -> None:
    hidden, weight, labels = problem()
    old_hidden, old_weight = (t.requires_grad_() for t in old_prediction())
    nats = linear_kl_divergence(hidden, weight.detach(), old_hidden, old_weight, labels)
    (only,) = gradients(nats, hidden)
    expected = plain_divergence(hidden, weight, old_hidden, old_weight, labels)
    torch.testing.assert_close(only, gradients(expected, hidden)[0], atol=3e-5, rtol=1e-5)
    nats = linear_kl_divergence(hidden, weight, old_hidden, old_weight, labels)
    nats.backward()  # type: ignore[no-untyped-call]
    assert old_hidden.grad is None
    assert old_weight.grad is None


def test_the_old_prediction_may_come_from_inference_mode() -> None:
    hidden, weight, labels = problem()
    with torch.inference_mode():
        old_hidden, old_weight = old_prediction()
    nats = linear_kl_divergence(hidden, weight, old_hidden, old_weight, labels)
    torch.testing.assert_close(nats, linear_kl_divergence(hidden, weight, *old_prediction(), labels), atol=0, rtol=0)
    assert all(g.isfinite().all() for g in gradients(nats, hidden, weight))


def test_nothing_to_compare() -> None:
    hidden, weight, labels = problem(tuple(range(N)))
    nats = linear_kl_divergence(hidden, weight, *old_prediction(), labels)
    assert nats.item() == 0
    assert all(not g.any() for g in gradients(nats, hidden, weight))


def test_other_vocabularies_do_not_compare() -> None:
    hidden, weight, labels = problem()
    old_hidden, old_weight = old_prediction()
    with pytest.raises(AssertionError, match="vocabularies of 31 and 30"):
        linear_kl_divergence(hidden, weight, old_hidden, old_weight[:30], labels)


@pytest.mark.parametrize("vocab_size", [2, 65, 2000, 50257, 152_000, 10**9])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_chunk_fits_its_bytes(vocab_size: int, device: str) -> None:
    tokens = chunk_tokens(vocab_size, device)
    limit = 256 << 20
    assert tokens == 1 or (tokens <= 4096 and 4 * tokens * vocab_size <= limit)
