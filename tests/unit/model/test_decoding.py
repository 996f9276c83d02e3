"""What writes gives the logits of the decoder it was made from, whatever stands beside a row."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seedbed.evaluate import evaluation_mode
from seedbed.lora import add_adapter
from seedbed.model.config import DecoderConfig, from_scratch
from seedbed.model.decoder import Adapter, Decoder
from seedbed.model.decoding import DecodingModel

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"num_kv_heads": 2, "rope_theta": 100.0},
    "qwen2": {"num_kv_heads": 1, "tie_embeddings": False},
    "qwen3": {"num_kv_heads": 2},
}
LENGTHS = (33, 1, 60, 7)
FED = 5  # tokens of each row that are added one by one
POSITIONS = 64


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Decoder:
    return decoder(config(request.param))


def config(family: str) -> DecoderConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 301,
        "d_model": 48,
        "num_layers": 2,
        "num_heads": 4,
        "max_seq_len": POSITIONS,
    }
    return dataclasses.replace(from_scratch(family, **sizes, **FAMILIES[family]), init_std=0.2)


def decoder(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(weight, mean=float(name.endswith("weight")), std=0.2)
    return model


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(301, (length + FED - 1,), generator=generator).tolist() for length in lengths]


def decoded(model: Decoder, rows: list[list[int]], dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, FED, V): the logits after each row without its last tokens, and after each of these."""
    device = model.embed_tokens.weight.device
    with evaluation_mode(model):
        decoding = DecodingModel(model, dtype)
        logits = [decoding.read([row[: 1 - FED] for row in rows], max(map(len, rows)))]
        logits += [
            decoding.step(torch.tensor([[row[at]] for row in rows], device=device))[:, 0] for at in range(1 - FED, 0)
        ]
        return torch.stack(logits, dim=1)


def direct(model: Decoder, rows: list[list[int]]) -> Tensor:
    """The same from the decoder, each row whole and alone."""
    with evaluation_mode(model):
        return torch.stack([model.logits(model(torch.tensor([row])))[0, -FED:] for row in rows])


def test_logits_are_those_of_the_decoder(model: Decoder) -> None:
    torch.testing.assert_close(decoded(model, rows()), direct(model, rows()), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_logits_of_a_gpu_are_those_of_the_cpu(model: Decoder) -> None:
    torch.testing.assert_close(
        decoded(deepcopy(model).cuda(), rows()).cpu(), direct(model, rows()), atol=1e-4, rtol=1e-4
    )


def test_logits_are_the_same_without_onednn(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seedbed.model.decoding._packs", lambda _: False)
    torch.testing.assert_close(decoded(model, rows()), direct(model, rows()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_alone(model: Decoder, dtype: torch.dtype) -> None:
    together = decoded(model, rows(), dtype)
    for row, logits in zip(rows(), together, strict=True):
        torch.testing.assert_close(decoded(model, [row], dtype)[0], logits, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_near_as_under_autocast(model: Decoder) -> None:
    exact = direct(model, rows())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        allowed = (direct(model, rows()) - exact).abs().mean()
    assert (decoded(model, rows(), torch.bfloat16) - exact).abs().mean() < 1.25 * allowed


def test_weights_of_half_precision_decode_too(model: Decoder) -> None:
    half = decoder(model.config).to(torch.bfloat16)
    whole = decoder(model.config)
    whole.load_state_dict({name: weight.float() for name, weight in half.state_dict().items()})
    torch.testing.assert_close(decoded(half, rows()), direct(whole, rows()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("train_embeddings", [False, True])
def test_an_adapter_is_added(model: Decoder, dora: bool, train_embeddings: bool) -> None:
    adapted = decoder(model.config)
    modules = ("blocks.0.attention.k_proj", "blocks.1.mlp.down_proj", "lm_head")
    options = {"dropout": 0.5, "rslora": False, "dora": dora, "train_embeddings": train_embeddings}
    add_adapter(adapted, Adapter(r=4, alpha=8.0, modules=modules, **options))  # type: ignore[arg-type]
    for name, weight in adapted.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(weight, std=0.2)
    torch.testing.assert_close(decoded(adapted, rows()), direct(adapted, rows()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(direct(adapted, rows()), direct(model, rows()), atol=0.1)


def test_a_row_that_is_full_leaves_the_others_alone(model: Decoder) -> None:
    short, full = rows((3,))[0], [9] * POSITIONS
    with evaluation_mode(model):
        decoding = DecodingModel(model, torch.float32)
        decoding.read([full, short[: 1 - FED]], POSITIONS)
        logits = [decoding.step(torch.tensor([[9], [token]]))[1, 0] for token in short[1 - FED :]]
    torch.testing.assert_close(torch.stack(logits), direct(model, [short])[0, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 4])
def test_tokens_read_at_once_are_as_if_one_by_one(batch: int, dtype: torch.dtype) -> None:
    long = decoder(dataclasses.replace(config("llama"), max_seq_len=600))
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(301, (batch, 240), generator=generator)
    with evaluation_mode(long):
        decoding = DecodingModel(long, dtype)
        starts = [[*range(30 * index + 3)] for index in range(batch)]
        logits = []
        for at_once in (1, 2, 6, 9):
            decoding.read(starts, 600)
            logits.append(torch.cat([decoding.step(part) for part in torch.split(tokens, at_once, 1)], dim=1))
    assert all(logits[0].equal(other) for other in logits[1:])


def test_tokens_are_taken_back(model: Decoder) -> None:
    texts = rows((9, 4))
    with evaluation_mode(model):
        decoding = DecodingModel(model, torch.float32)
        decoding.read([text[: 1 - FED] for text in texts], POSITIONS)
        fed = torch.tensor([text[1 - FED :] for text in texts])
        decoding.step(torch.tensor([[*fed[0, :2], 8], [fed[1, 0], 7, 8]]))
        decoding.forget([1, 2])
        logits = decoding.step(torch.tensor([[*fed[0, 2:], 5], [*fed[1, 1:]]]))
    for row, text in enumerate(texts):
        first = 2 - row
        theirs = direct(model, [text])[0, 1 + first :]
        torch.testing.assert_close(logits[row, : len(theirs)], theirs, rtol=1e-4, atol=1e-4)


def test_more_tokens_than_slots_are_taken_back(model: Decoder) -> None:
    """As where a long guess of one row fills up the others, which are almost done."""
    texts = rows((9, 9))
    with evaluation_mode(model):
        decoding = DecodingModel(model, torch.float32)
        decoding.read([text[: 1 - FED] for text in texts], len(texts[0]))
        fed = torch.tensor([text[1 - FED :] for text in texts])
        decoding.step(torch.cat((fed[:, :1], torch.full((2, 8), 7)), dim=1))
        decoding.forget([8, 8])
        logits = decoding.step(fed[:, 1:])
    torch.testing.assert_close(logits, direct(model, texts)[:, 2:], rtol=1e-4, atol=1e-4)


def test_some_rows_go_on_alone(model: Decoder) -> None:
    texts = rows()
    with evaluation_mode(model):
        decoding = DecodingModel(model, torch.float32)
        decoding.read([text[: 1 - FED] for text in texts], POSITIONS)
        decoding.keep([3, 1])
        logits = decoding.step(torch.tensor([texts[row][1 - FED :] for row in (3, 1)]))
    torch.testing.assert_close(logits, direct(model, [texts[row] for row in (3, 1)])[:, 1:], rtol=1e-4, atol=1e-4)


def test_a_row_goes_on_in_copies(model: Decoder) -> None:
    [start], ends = rows((7,)), [[5, 6], [7, 8], [5, 9]]
    with evaluation_mode(model):
        decoding = DecodingModel(model, torch.float32)
        decoding.read([start], POSITIONS)
        decoding.repeat(3)
        logits = decoding.step(torch.tensor(ends))
    for row, end in enumerate(ends):
        torch.testing.assert_close(logits[row], direct(model, [[*start, *end]])[0, -2:], rtol=1e-4, atol=1e-4)


def test_it_reads_anew(model: Decoder) -> None:
    with evaluation_mode(model):
        decoding = DecodingModel(model, torch.float32)
        first = decoding.read(rows(), POSITIONS)
        decoding.read([[1, 2]], 3)
        decoding.step(torch.tensor([[3]]))
        assert decoding.read(rows(), POSITIONS).equal(first)


def test_a_compiled_block_is_written_with(model: Decoder) -> None:
    wrapped, before = decoder(model.config), decoded(model, rows())
    for index, block in enumerate(wrapped.blocks):
        compiled: Any = torch.compile(block, backend="eager")
        wrapped.blocks[index] = compiled
    assert decoded(wrapped, rows()).equal(before)


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Any) -> Tensor:
        twice: Tensor = 2 * self.inner(*given)
        return twice


def test_parts_of_another_kind_are_refused() -> None:
    changed = decoder(config("llama"))
    changed.blocks[1] = Doubled(changed.blocks[1])
    with pytest.raises(TypeError, match="each Block must be seedbed's own, and one is a Doubled"):
        DecodingModel(changed)
    changed = decoder(config("llama"))
    mlp: Any = changed.blocks[0].mlp
    mlp.down_proj = Doubled(mlp.down_proj)
    with pytest.raises(TypeError, match="each Linear"):
        DecodingModel(changed)
