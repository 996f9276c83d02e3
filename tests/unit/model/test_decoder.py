from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seedbed.model.attention import RMSNorm, rotate, rotation
from seedbed.model.config import SCRATCH_FAMILIES, DecoderConfig, from_scratch
from seedbed.model.decoder import Decoder, num_parameters
from seedbed.model.documents import dense_mask


def tiny(arch: str, **changes: Any) -> DecoderConfig:
    sizes: dict[str, Any] = {"vocab_size": 61, "d_model": 24, "num_layers": 3, "num_heads": 4, "max_seq_len": 16}
    return from_scratch(arch, **(sizes | {"num_kv_heads": None if arch == "gpt2" else 2} | changes))


@pytest.fixture(params=SCRATCH_FAMILIES)
def arch(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(61, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("d_model", "num_layers", "num_heads", "tied", "count"),
    [
        (768, 12, 12, True, 124_439_808),
        (1024, 24, 16, True, 354_823_168),
        (1024, 24, 16, False, 406_286_336),
        (1280, 36, 20, False, 838_359_040),
        (1600, 48, 25, False, 1_638_022_400),
    ],
)
def test_parameter_counts_of_gpt2(d_model: int, num_layers: int, num_heads: int, tied: bool, count: int) -> None:
    config = from_scratch(
        "gpt2",
        vocab_size=50257,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        max_seq_len=1024,
        tie_embeddings=tied,
    )
    assert num_parameters(config) == count


def test_parameter_count_is_that_of_the_model(arch: str) -> None:
    for tied in (True, False):
        config = tiny(arch, tie_embeddings=tied)
        assert num_parameters(config) == sum(p.numel() for p in Decoder(config).parameters())


def test_a_token_does_not_see_the_future(arch: str, ids: Tensor) -> None:
    model = Decoder(tiny(arch)).eval()
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 61
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.isclose(before[:, 6:], after[:, 6:]).all(-1).any()


def test_a_token_does_not_see_another_document(arch: str, ids: Tensor) -> None:
    model = Decoder(tiny(arch)).eval()
    segments = torch.tensor([0] * 4 + [1] * 6).expand(2, 10)
    positions = torch.tensor([*range(4), *range(6)]).expand(2, 10)
    changed = ids.clone()
    changed[:, :4] = (changed[:, :4] + 1) % 61
    before, after = model(ids, positions, segments), model(changed, positions, segments)
    assert torch.equal(before[:, 4:], after[:, 4:])
    assert not torch.allclose(before[:, :4], after[:, :4])


def test_dense_mask() -> None:
    mask = dense_mask(torch.tensor([[5, 5, 2]]))
    assert mask.int().tolist() == [[[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]]


def test_segments_need_their_positions(ids: Tensor) -> None:
    with pytest.raises(AssertionError, match="positions restart"):
        Decoder(tiny("llama"))(ids, segment_ids=torch.zeros_like(ids))


def gradients(model: Decoder, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(3)  # dropout
    model.logits(model(ids)).logsumexp(-1).square().sum().backward()  # type: ignore[no-untyped-call]
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_gradient_checkpointing_changes_no_gradient(arch: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Decoder(tiny(arch, dropout=0.2)).train()
    expected = gradients(model, ids)
    calls = []
    forward = type(model.blocks[0]).forward
    monkeypatch.setattr(type(model.blocks[0]), "forward", lambda *a: calls.append(1) or forward(*a))  # type: ignore[func-returns-value]
    model.gradient_checkpointing = True
    found = gradients(model, ids)
    assert len(calls) == 2 * model.config.num_layers  # once forward, once again on the way back
    assert len(found) == len(expected)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_every_weight_gets_a_gradient(arch: str, ids: Tensor) -> None:
    model = Decoder(tiny(arch, tie_embeddings=False))
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert len(gradients(model, ids)) == len(list(model.parameters()))
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_dropout_acts_in_training_only_and_follows_the_seed(arch: str, ids: Tensor) -> None:
    model = Decoder(tiny(arch, dropout=0.5))

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(ids)  # type: ignore[no-any-return]

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2))
    model.eval()
    assert torch.equal(run(1), run(2))


def test_weights_are_drawn_as_the_authors_do(arch: str) -> None:
    torch.manual_seed(0)
    layers = 8
    model = Decoder(tiny(arch, vocab_size=500, d_model=128, num_layers=layers, max_seq_len=128, tie_embeddings=False))
    for name, weight in model.state_dict().items():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.zeros_like(weight) if name.endswith("bias") else torch.ones_like(weight))
            continue
        residual = arch == "gpt2" and name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * layers) if residual else 0.02
        assert weight.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(weight.mean().item()) < 4 * std / math.sqrt(weight.numel()), name


def test_the_same_seed_draws_the_same_weights(arch: str) -> None:
    def draw() -> dict[str, Tensor]:
        torch.manual_seed(5)
        return Decoder(tiny(arch)).state_dict()

    first, second = draw(), draw()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_tied_head_is_the_embedding() -> None:
    model = Decoder(tiny("llama"))
    assert model.head_weight() is model.embed_tokens.weight
    assert Decoder(tiny("llama", tie_embeddings=False)).head_weight().shape == (61, 24)


def test_under_autocast_norms_and_the_residual_stream_stay_float32(arch: str, ids: Tensor) -> None:
    model = Decoder(tiny(arch)).eval()
    types: set[torch.dtype] = set()
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, out: types.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(ids)
    assert types == {torch.float32}
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, model(ids), atol=0.05, rtol=0.05)


def test_a_bfloat16_model_runs_in_bfloat16(arch: str, ids: Tensor) -> None:
    model = Decoder(tiny(arch)).bfloat16().eval()
    assert model(ids).dtype == torch.bfloat16


def test_rms_norm_divides_in_float32() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = RMSNorm(8, 1e-5)
    nn.init.uniform_(norm.weight)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert torch.equal(norm(x), expected.bfloat16())


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    g = torch.Generator().manual_seed(0)
    config = replace(tiny("llama"), head_dim=16)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=g)

    def turned(x: Tensor, position: int) -> Tensor:
        return rotate(x, rotation(torch.tensor([[position]]), config))

    torch.testing.assert_close(turned(q, 9).norm(), q.norm())
    assert torch.equal(turned(q, 0), q)
    torch.testing.assert_close((turned(q, 5) * turned(k, 2)).sum(), (turned(q, 13) * turned(k, 10)).sum())
    assert not torch.isclose((turned(q, 5) * turned(k, 2)).sum(), (turned(q, 5) * turned(k, 3)).sum())


def test_shared_heads_repeated_or_by_the_kernel_are_the_same(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Decoder(tiny("llama")).eval()
    expected = model(ids)
    monkeypatch.setattr("seedbed.model.attention.SHARES_HEADS", ())  # as on a GPU
    torch.testing.assert_close(model(ids), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_gives_what_the_cpu_gives(arch: str, ids: Tensor) -> None:
    model = Decoder(tiny(arch)).eval()
    segments, positions = torch.zeros_like(ids), torch.arange(10).expand(2, 10)
    expected = model(ids)
    model.cuda()
    ids, segments, positions = (x.cuda() for x in (ids, segments, positions))
    torch.testing.assert_close(model(ids).cpu(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(ids, positions, segments).cpu(), expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(model(ids, positions, segments).cpu(), expected, atol=0.05, rtol=0.05)
