"""Low-rank adapters, put into a built `Decoder` and merged into its weights again (LoRA: Hu et al., 2021).

A linear layer keeps its weight W, frozen, and learns a small correction B A beside it. With two inputs, three
outputs, rank r = 1 and alpha = 2:

    W = [[1, 0],     B = [[1],     A = [[2, 3]]     scaling = alpha / r = 2
         [0, 1],          [0],
         [1, 1]]          [0]]

    y = x Wᵀ + scaling · (x Aᵀ) Bᵀ,   as if W were   W + scaling · B A = [[5, 6],
                                                                          [0, 1],
                                                                          [1, 1]]

A and B hold r · (in + out) numbers instead of in · out: for a layer of 1,024 by 1,024 and r = 16, 3 % of them.
B starts at zero, so the model starts as it was. rsLoRA scales by alpha / sqrt(r) (Kalajdzievski, 2023). DoRA
(Liu et al., 2024) learns the norm of each row of the sum apart from its direction.

I in   O out   r rank
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from seedbed.errors import ConfigError, did_you_mean
from seedbed.model.config import DecoderConfig
from seedbed.model.decoder import AdaptedLinear, Adapter, Decoder
from seedbed.model.families import weight_names

_GROUPS = {"all-linear": "blocks.*", "attention": "blocks.*.attention.*", "mlp": "blocks.*.mlp.*", "head": "lm_head"}


class LoraLinear(AdaptedLinear):
    """A linear layer that is frozen, and the adapter beside it.

    `weight` (O, I) and `bias` are the very parameters of the layer it replaces, under the same names.
    `lora_A` (r, I), `lora_B` (O, r) and, for DoRA, `lora_magnitude` (O,) are float32, drawn and set as PEFT does.
    The weight may be bfloat16, under autocast.

    The loss takes the head of a `Decoder` as one matrix, which `effective_weight` makes; so the head's adapter
    has no dropout.
    """

    def __init__(self, layer: nn.Linear, adapter: Adapter) -> None:
        outputs, inputs = layer.weight.shape
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.scaling, self.dropout = adapter.scaling, adapter.dropout
        device = layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(adapter.r, inputs, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, adapter.r, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_magnitude = nn.Parameter(row_norms(layer.weight)) if adapter.dora else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        drops = self.training and self.dropout > 0
        dropped = F.dropout(x, self.dropout) if drops else x
        low_rank = F.linear(dropped, self.lora_A) * self.scaling  # (..., r)
        if self.lora_magnitude is None:
            y = F.linear(x, self.weight, self.bias)  # (..., O)
            return torch.addmm(y.flatten(0, -2), low_rank.flatten(0, -2), self.lora_B.T).view(y.shape)
        correction = F.linear(low_rank, self.lora_B)  # (..., O)
        with torch.no_grad():
            norms = row_norms(self._sum())
        scale = self.lora_magnitude / norms  # (O,)
        plain = F.linear(x, self.weight)  # (..., O)
        # As PEFT has it, dropout meets what the magnitude changes as well as the correction.
        changed = F.linear(dropped, self.weight) if drops else plain
        y = plain + (scale - 1) * changed + scale * correction
        return (y if self.bias is None else y + self.bias).to(plain.dtype)

    def effective_weight(self) -> Tensor:
        """(O, I): the one weight that does what both do; gradients reach the adapter. The sum is in float32."""
        weight = self._sum()
        if self.lora_magnitude is not None:
            weight = (self.lora_magnitude / row_norms(weight))[:, None] * weight
        return weight.to(torch.promote_types(self.weight.dtype, self.lora_A.dtype))

    def _sum(self) -> Tensor:
        """(O, I), float32: weight and correction, before DoRA."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.weight.float() + self.scaling * (self.lora_B.float() @ self.lora_A.float())


def row_norms(weight: Tensor) -> Tensor:
    """(O, I) to (O,), float32, constant for the gradient (section 4.3 of Liu et al., 2024)."""
    norms: Tensor = torch.linalg.vector_norm(weight.detach().float(), dim=1)
    return norms


def find_targets(config: DecoderConfig, targets: str, last_blocks: int | None = None) -> tuple[str, ...]:
    """Names of the linear layers that `targets` means, in the model's order, the head last.

    Args:
        targets: a comma list of `all-linear` (every one of the blocks), `attention`, `mlp`, `head`, and patterns
            with * and ?, which match whole names or their ends, as they are here or in Hugging Face's files:
            `q_proj`, `blocks.0.*`, `c_attn`, `model.layers.1.mlp.*`. GPT-2's `c_attn` is q_proj, k_proj and v_proj.
        last_blocks: only the last so many blocks; the head stays.

    Raises:
        ConfigError: names each item that matches nothing; `last_blocks` beyond the number of blocks.
    """
    if last_blocks is not None and not 1 <= last_blocks <= config.num_layers:
        raise ConfigError(f"--last_blocks {last_blocks}: expected from 1 to {config.num_layers}, the number of blocks")
    items = [item.strip() for item in targets.split(",") if item.strip()]
    if not items:
        raise ConfigError("--lora_targets is empty; expected a comma list such as all-linear or attention,head")
    names = _linear_layers(config, config.num_layers - (last_blocks or config.num_layers))
    chosen: set[str] = set()
    problems = []
    for item in items:
        found = {ours for ours, theirs in names if _matches(ours, theirs, item)}
        if not found:
            problems.append(_no_match(item, names, last_blocks))
        chosen |= found
    if problems:
        raise ConfigError(problems)
    return tuple(ours for ours, _ in names if ours in chosen)


def add_adapter(model: Decoder, adapter: Adapter) -> None:
    """Freeze `model` and put an adapter on each layer of `adapter.modules`, with the weight that is there.

    A tied head with an adapter shares the embedding's parameter. If the embedding is trained too, the head's
    frozen weight is a copy of the embedding as it is now, and the two go their own ways; without an adapter, a
    tied head follows the embedding.
    """
    assert model.adapter is None, "one adapter a model"
    model.requires_grad_(False)
    for name in adapter.modules:
        if name == "lm_head":
            layer = LoraLinear(
                _head(model, shared=not adapter.train_embeddings), dataclasses.replace(adapter, dropout=0)
            )
        else:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear), name
            layer = LoraLinear(linear, adapter)
        _replace(model, name, layer)
    model.embed_tokens.weight.requires_grad_(adapter.train_embeddings)
    model.adapter = adapter


@torch.no_grad()
def merge_adapter(model: Decoder) -> None:
    """Put every adapter into the weight beside it, in float32; what is left is a plain model, all trainable.

    A tied head that had an adapter is its own from now on. Weights keep their type.
    """
    assert model.adapter is not None, "no adapter to merge"
    for name in model.adapter.modules:
        layer = model.get_submodule(name)
        assert isinstance(layer, LoraLinear), name
        merged = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter(layer.effective_weight().to(layer.weight.dtype))
        merged.bias = layer.bias
        _replace(model, name, merged)
    if "lm_head" in model.adapter.modules:
        model.config = dataclasses.replace(model.config, tie_embeddings=False)
    model.adapter = None
    model.requires_grad_(True)


def adapter_state(model: Decoder) -> dict[str, Tensor]:
    """What an adapter learns, by name: its tensors, and the embedding if that is trained."""
    assert model.adapter is not None, "no adapter"
    names = [
        f"{module}.{name}"
        for module in model.adapter.modules
        for name, _ in model.get_submodule(module).named_parameters()
        if name.startswith("lora_")
    ]
    names += ["embed_tokens.weight"] if model.adapter.train_embeddings else []
    return {name: model.get_parameter(name).detach() for name in names}


def num_trainable(config: DecoderConfig, adapter: Adapter) -> int:
    """How many numbers training with this adapter changes; takes no memory for them."""
    with torch.device("meta"):
        model = Decoder(config)
    add_adapter(model, adapter)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _replace(model: Decoder, name: str, layer: nn.Linear) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _head(model: Decoder, *, shared: bool) -> nn.Linear:
    """The head as a layer: its own, or one made of the embedding it is tied to."""
    if model.lm_head is not None:
        return model.lm_head
    head = nn.Linear(model.config.d_model, model.config.vocab_size, bias=False, device="meta")
    weight = model.embed_tokens.weight
    head.weight = weight if shared else nn.Parameter(weight.detach().clone(), requires_grad=False)
    return head


def _linear_layers(config: DecoderConfig, first_block: int) -> list[tuple[str, str]]:
    """The names of every linear layer here and at Hugging Face, those of earlier blocks left out, the head last."""
    pairs = [(ours, name.theirs) for name in weight_names(config) for ours in name.ours if ours.endswith("_proj")]
    return [pair for pair in pairs if int(pair[0].split(".")[1]) >= first_block] + [("lm_head", "lm_head")]


def _matches(ours: str, theirs: str, item: str) -> bool:
    if item in _GROUPS:
        return fnmatchcase(ours, _GROUPS[item])
    return any(fnmatchcase(name, pattern) for name in (ours, theirs) for pattern in (item, f"*.{item}"))


def _no_match(item: str, names: Sequence[tuple[str, str]], last_blocks: int | None) -> str:
    ends = dict.fromkeys(name.rpartition(".")[2] for pair in names for name in pair)
    known = list(dict.fromkeys((*_GROUPS, *ends)))
    where = f" in the last {last_blocks} blocks" if last_blocks else ""
    return (
        f"--lora_targets {item}: no linear layer{where} has this name{did_you_mean(item, known)}. "
        f"There are {', '.join(known)}, and patterns such as {names[0][0].rpartition('.')[0]}.*"
    )
