"""Adapter folders as PEFT writes and reads them: `adapter_config.json` and `adapter_model.safetensors`.

    FOLDER/adapter_config.json         rank, alpha, layers, the base's name
    FOLDER/adapter_model.safetensors   base_model.model.MODULE.lora_A.weight, ...
    FOLDER/seedbed/base.json           path and fingerprint of the base; ours only

Where Hugging Face has one module for several layers here (GPT-2's `c_attn` for q_proj, k_proj and v_proj), their
adapters of rank r become one of rank 3r, the same function: A has theirs one under the other, B on its diagonal.

    A = [A_q]     B = [B_q        ]     scaling = alpha / r, as `alpha_pattern` makes it
        [A_k]         [    B_k    ]
        [A_v]         [        B_v]

A part without an adapter is zeros. An adapter of rank r that PEFT trained on such a module gives each part a
copy of A and its own rows of B.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seedbed.errors import CheckpointError, StorageError
from seedbed.lora import adapter_state, add_adapter, row_norms
from seedbed.model.adjust import grow_vocabulary
from seedbed.model.config import DecoderConfig
from seedbed.model.decoder import Adapter, Base, Decoder
from seedbed.model.families import Name, canonical_name, weight_names
from seedbed.parsing import parse_json, require_plain_files

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = "seedbed/base.json"

_PREFIX: Final = "base_model.model."
_MAGNITUDE: Final = "lora_magnitude_vector"
_NAME: Final = re.compile(r"[\w.]+")

# Keys of adapter_config.json that are read here or change nothing that is loaded. Which layers have adapters
# is told by the tensors. Any other key must be empty.
_READ: Final = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r",
    "rank_pattern", "use_dora", "use_rslora",
}  # fmt: skip
_WITHOUT_EFFECT: Final = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
# Ways to draw the first A and B that leave the base's weights alone. The others (pissa, olora, corda, loftq, ...)
# change them, and the adapter fits only what they made of them.
_PLAIN_INITS: Final = (True, False, "gaussian", "orthogonal", "eva")


def save_adapter(model: Decoder, folder: Path) -> None:
    """Write the adapter of `model` as PEFT does, and the base it belongs to. Not atomically: the caller gives
    a folder nobody reads yet.

    Raises:
        StorageError: the disk is full or refuses.
    """
    assert model.adapter is not None, "no adapter to save"
    tensors = {f"{_PREFIX}{name}": t.cpu().contiguous() for name, t in _to_peft(model, model.adapter).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / CONFIG_FILE, _peft_config(model.config, model.adapter, model.base))
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        if model.base is not None:
            (folder / BASE_FILE).parent.mkdir(exist_ok=True)
            _write_json(folder / BASE_FILE, {"path": model.base.path, "fingerprint": model.base.fingerprint})
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{folder}: the adapter could not be written ({error}); free space and save again"
        ) from error


def load_adapter(model: Decoder, folder: Path) -> None:
    """Freeze `model` and put the adapter of `folder` on it, its tensors as they were saved.

    An embedding that was trained beside the adapter may have more rows than the model's, for tokens that were
    added; the model grows to it.

    Raises:
        CheckpointError: files missing, damaged or pickled; an adapter for another base or of another kind.
    """
    _require_base(model, folder)
    adapter, state = _read(folder, model.config)
    if problems := _misfits(model, adapter, state, trained_here=(folder / BASE_FILE).is_file()):
        raise _misfit(folder, problems)
    if adapter.train_embeddings:
        grow_vocabulary(model, model.config.vocab_size, len(state["embed_tokens.weight"]))
    add_adapter(model, adapter)
    with torch.no_grad():
        for name, tensor in adapter_state(model).items():
            tensor.copy_(state[name])
        if model.lm_head is not None and "lm_head.weight" in state:
            model.lm_head.weight.copy_(state["lm_head.weight"])


def base_name(folder: Path) -> str:
    """The base model that an adapter folder names: a path, or a name on the hub.

    Raises:
        CheckpointError: it names none, or holds links out of the folder.
    """
    require_plain_files(folder)
    name = _read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{folder / CONFIG_FILE}: base_model_name_or_path {name!r}: expected the base's folder")
    return name


# Writing


def _peft_config(config: DecoderConfig, adapter: Adapter, base: Base | None) -> dict[str, Any]:
    fused = [name for name in _adapted(config, adapter) if len(name.ours) > 1]
    patterns = {name.theirs.rpartition(".")[2]: len(name.ours) for name in fused}
    power = _power(adapter.rslora)
    tied = config.tie_embeddings and "lm_head" not in adapter.modules
    embedding = _embedding(config).rpartition(".")[2]
    return {
        "alpha_pattern": {name: _whole(adapter.alpha * parts**power) for name, parts in patterns.items()},
        "base_model_name_or_path": base.path if base else None,
        "bias": "none",
        "ensure_weight_tying": adapter.train_embeddings and tied,
        "fan_in_fan_out": config.family == "gpt2",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _whole(adapter.alpha),
        "lora_dropout": adapter.dropout,
        # PEFT leaves a tied head as the base has it unless the head is saved as well.
        "modules_to_save": ([embedding, "lm_head"] if tied else [embedding]) if adapter.train_embeddings else None,
        "peft_type": "LORA",
        "r": adapter.r,
        "rank_pattern": {name: adapter.r * parts for name, parts in patterns.items()},
        "target_modules": _target_modules(config, adapter),
        "task_type": "CAUSAL_LM",
        "use_dora": adapter.dora,
        "use_rslora": adapter.rslora,
    }


def _power(rslora: bool) -> float:
    """PEFT divides alpha by this power of the rank."""
    return 0.5 if rslora else 1


def _embedding(config: DecoderConfig) -> str:
    """Hugging Face's name of embed_tokens."""
    return next(name.theirs for name in weight_names(config) if name.ours == ("embed_tokens",))


def _adapted(config: DecoderConfig, adapter: Adapter) -> list[Name]:
    """Hugging Face's modules that have an adapter."""
    return [name for name in weight_names(config) if set(name.ours) & set(adapter.modules)]


def _target_modules(config: DecoderConfig, adapter: Adapter) -> list[str]:
    """Ends of names where they stand for the adapted modules and no other (`q_proj`), else whole names."""
    adapted = {name.theirs for name in _adapted(config, adapter)}
    every = [name.theirs for name in weight_names(config)]
    targets = set()
    for name in adapted:
        inside = re.split(r"\.\d+\.", name)[-1]  # attn.c_proj; c_proj alone is the MLP's as well
        ends = (inside.rpartition(".")[2], inside)
        alone = (end for end in ends if all(n in adapted for n in every if f".{n}".endswith(f".{end}")))
        targets.add(next(alone, name))
    return sorted(targets)


def _to_peft(model: Decoder, adapter: Adapter) -> dict[str, Tensor]:
    ours = adapter_state(model)
    tensors: dict[str, Tensor] = {}
    for name in _adapted(model.config, adapter):
        parts = [_part(model, ours, module, adapter) for module in name.ours]
        tensors[f"{name.theirs}.lora_A.weight"] = torch.cat([a for a, _, _ in parts])  # (n r, I)
        tensors[f"{name.theirs}.lora_B.weight"] = _block_diagonal([b for _, b, _ in parts])  # (n O, n r)
        if adapter.dora:
            tensors[f"{name.theirs}.{_MAGNITUDE}"] = torch.cat([m for _, _, m in parts])
    if adapter.train_embeddings:
        tensors[f"{_embedding(model.config)}.weight"] = ours["embed_tokens.weight"]
        # The head's rows of tokens that were added are in no base; PEFT saves a tied head apart.
        head = "lm_head.base_layer.weight" if "lm_head" in adapter.modules else "lm_head.weight"
        tensors[head] = (model.lm_head or model.embed_tokens).weight.detach().clone()
    return tensors


def _part(model: Decoder, state: Mapping[str, Tensor], module: str, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and magnitude of a layer; for one without an adapter, those that change nothing."""
    if module in adapter.modules:
        a, b = state[f"{module}.lora_A"], state[f"{module}.lora_B"]
        return a, b, state[f"{module}.lora_magnitude"] if adapter.dora else b[:, 0]
    weight = model.get_parameter(f"{module}.weight")
    zeros = weight.new_zeros(adapter.r, dtype=torch.float32)
    return zeros[:, None].expand(-1, weight.shape[1]), zeros.expand(weight.shape[0], -1), row_norms(weight)


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    return torch.block_diag(*blocks)  # type: ignore[no-any-return,no-untyped-call]


# Reading


def _read(folder: Path, config: DecoderConfig) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter and its tensors by our names, and with them what only repeats the base: `lm_head.weight`, and
    magnitudes of layers without an adapter.
    """
    raw = _read_json(folder / CONFIG_FILE)
    if problems := _unsupported(raw):
        raise CheckpointError(f"{folder / CONFIG_FILE}: this adapter cannot be read here\n  " + "\n  ".join(problems))
    parser = _Parser(raw, config, _read_tensors(folder, config))
    state = parser.layers()
    modules = tuple(name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A"))
    state |= parser.embedding(head_adapted="lm_head" in modules)
    problems = parser.problems + [f"{key} is not a tensor of an adapter for this model" for key in parser.tensors]
    if not modules and not problems:
        problems = ["no layer has an adapter"]
    if problems:
        raise _misfit(folder, problems)
    return replace(parser.adapter, modules=modules, train_embeddings="embed_tokens.weight" in state), state


def _unsupported(raw: Mapping[str, Any]) -> list[str]:
    """What a config asks for that is not here, and values that are not what they should be."""
    kind, bias, init = raw.get("peft_type"), raw.get("bias", "none"), raw.get("init_lora_weights", True)
    if kind != "LORA":
        return [f"peft_type {kind!r}: supported is 'LORA'"]
    problems = [
        f"{key} {value!r}: not supported"
        for key, value in sorted(raw.items())
        if key not in _READ | _WITHOUT_EFFECT and value not in (None, False, "", [], {})
    ]
    if bias != "none":
        problems.append(f"bias {bias!r}: supported is 'none'")
    if init not in _PLAIN_INITS:
        problems.append(f"init_lora_weights {init!r} changes the base; let PEFT save it as plain LoRA")
    r, alpha, dropout = raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout", 0.0)
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        problems.append(f"r {r!r}: expected a whole number, 1 or more")
    if not _is_number(alpha) or not alpha > 0:
        problems.append(f"lora_alpha {alpha!r}: expected a number above 0")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout {dropout!r}: expected 0 or more and less than 1")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = raw.get(key) or {}
        if not isinstance(pattern, dict) or not all(_is_number(value) for value in pattern.values()):
            problems.append(f"{key} {pattern!r}: expected numbers by the names of modules")
        else:
            # Any other regular expression, which PEFT would take, can keep a program busy for hours.
            problems += [
                f"{key} {name!r}: supported is a module's name" for name in pattern if not _NAME.fullmatch(name)
            ]
    return problems


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Parser:
    """Takes PEFT's tensors module by module; collects what is wrong instead of stopping at the first."""

    def __init__(self, raw: Mapping[str, Any], config: DecoderConfig, tensors: dict[str, Tensor]) -> None:
        embedding = tensors.get(f"{_embedding(config)}.weight")
        tokens = len(embedding) if embedding is not None and embedding.ndim else 0  # more, where some were added
        self.raw, self.tensors = raw, tensors
        self.config = replace(config, vocab_size=max(config.vocab_size, tokens))
        self.problems: list[str] = []
        self.adapter = Adapter(
            r=raw["r"],
            alpha=float(raw["lora_alpha"]),
            dropout=float(raw.get("lora_dropout", 0.0)),
            rslora=bool(raw.get("use_rslora")),
            dora=bool(raw.get("use_dora")),
            modules=(),
            train_embeddings=False,
        )

    def layers(self) -> dict[str, Tensor]:
        """A, B and magnitude of every layer with an adapter, in the model's order, the head last."""
        with torch.device("meta"):
            model = Decoder(replace(self.config, tie_embeddings=False))
        state: dict[str, Tensor] = {}
        for name in sorted(weight_names(self.config), key=lambda name: name.theirs == "lm_head"):
            if f"{name.theirs}.lora_A.weight" in self.tensors:
                layers = [model.get_submodule(ours) for ours in name.ours]
                state |= self._module(name, [layer for layer in layers if isinstance(layer, nn.Linear)])
        return state

    def embedding(self, *, head_adapted: bool) -> dict[str, Tensor]:
        """The embedding trained beside the adapter, and the head's frozen weight where the file has it."""
        theirs, shape = _embedding(self.config), [self.config.vocab_size, self.config.d_model]
        saved = theirs.rpartition(".")[2] in (self.raw.get("modules_to_save") or [])
        state: dict[str, Tensor] = {}
        for key in ("lm_head.base_layer.weight", "lm_head.weight"):
            if key in self.tensors and (head := self._take(key, shape)) is not None:
                state["lm_head.weight"] = head
        if f"{theirs}.weight" in self.tensors or saved:
            embedding = self._take(f"{theirs}.weight", shape)
            if embedding is not None:
                state["embed_tokens.weight"] = embedding
                if self.config.tie_embeddings and not head_adapted:
                    self._require_tied(embedding, state.pop("lm_head.weight", None), theirs, saved)
        return state

    def _require_tied(self, embedding: Tensor, head: Tensor | None, theirs: str, saved: bool) -> None:
        """A tied head follows the embedding. PEFT lets it, unless only the embedding is in modules_to_save."""
        if head is not None and not (head.dtype == embedding.dtype and head.equal(embedding)):
            self.problems.append(f"lm_head.weight differs from {theirs}.weight, and this base ties the two")
        if head is None and saved:
            self.problems.append(
                f"modules_to_save has {theirs} without lm_head: PEFT left the tied head as it was, and here it "
                "follows; train with both in modules_to_save and ensure_weight_tying"
            )

    def _module(self, name: Name, layers: list[nn.Linear]) -> dict[str, Tensor]:
        """What one of Hugging Face's modules says about the layers here that it holds."""
        if len(layers) < len(name.ours):
            return {}  # an adapter on what is no linear layer: its tensors stay behind and are named
        r, outputs = self.adapter.r, [layer.out_features for layer in layers]
        rank = self._rank(name)
        a = self._take(f"{name.theirs}.lora_A.weight", [rank, layers[0].in_features])
        b = self._take(f"{name.theirs}.lora_B.weight", [sum(outputs), rank])
        state: dict[str, Tensor] = {}
        if self.adapter.dora:
            magnitude = self._take(f"{name.theirs}.{_MAGNITUDE}", [sum(outputs)])
            parts = torch.split(magnitude, outputs) if magnitude is not None else ()
            state |= {f"{ours}.lora_magnitude": part for ours, part in zip(name.ours, parts, strict=False)}
        if a is None or b is None:
            return state
        if rank == r:
            for ours, rows in zip(name.ours, torch.split(b, outputs), strict=True):
                state |= {f"{ours}.lora_A": a, f"{ours}.lora_B": rows}
            return state
        blocks = [rows[:, i * r : (i + 1) * r] for i, rows in enumerate(torch.split(b, outputs))]  # each (O, r)
        if not _block_diagonal(blocks).equal(b):
            self.problems.append(f"{name.theirs} has rank {rank} and other modules {r}: supported is one rank for all")
        for ours, own, block in zip(name.ours, torch.split(a, r), blocks, strict=True):
            if own.any() or block.any():  # zeros stand for a layer without an adapter
                state |= {f"{ours}.lora_A": own, f"{ours}.lora_B": block}
        return state

    def _rank(self, name: Name) -> int:
        """The rank in the file: `r`, or that times the number of layers; the scaling must be the same."""
        r, alpha, rslora = self.adapter.r, self.adapter.alpha, self.adapter.rslora
        rank, own_alpha = self._by_pattern("rank_pattern", name, r), self._by_pattern("alpha_pattern", name, alpha)
        if rank not in (r, r * len(name.ours)):
            self.problems.append(f"{name.theirs} has rank {rank:g} by rank_pattern: supported is {r} for all modules")
            return r
        if not math.isclose(own_alpha / rank ** _power(rslora), self.adapter.scaling, rel_tol=1e-6):
            self.problems.append(
                f"{name.theirs} has rank {rank:g} and alpha {own_alpha:g}: supported is one scaling for all modules, "
                f"{self.adapter.scaling:g}"
            )
        return int(rank)

    def _by_pattern(self, key: str, name: Name, default: float) -> float:
        """A pattern names the modules whose names end like it."""
        for pattern, value in (self.raw.get(key) or {}).items():
            if f".{name.theirs}".endswith(f".{pattern}"):
                return float(value)
        return default

    def _take(self, key: str, shape: list[int]) -> Tensor | None:
        tensor = self.tensors.pop(key, None)
        if tensor is None:
            self.problems.append(f"{key} is missing")
        elif list(tensor.shape) != shape:
            self.problems.append(f"{key} has shape {list(tensor.shape)}, expected {shape}")
        else:
            return tensor
        return None


def _misfits(model: Decoder, adapter: Adapter, state: Mapping[str, Tensor], *, trained_here: bool) -> list[str]:
    """Where the folder repeats the base and differs from it."""
    problems = []
    head = state.get("lm_head.weight")
    shared = model.lm_head is None and not adapter.train_embeddings
    if head is not None and shared and not model.head_weight().to(head.dtype).equal(head):
        problems.append("lm_head.base_layer.weight is not the head of this base")
    for name in state:
        module = name.removesuffix(".lora_magnitude")
        if name != module and module not in adapter.modules and not trained_here:  # PEFT trains these as well
            norms = row_norms(model.get_parameter(f"{module}.weight"))
            if not torch.allclose(state[name], norms, rtol=1e-4):
                problems.append(f"{module} has a magnitude of its own and no A and B")
    return problems


def _require_base(model: Decoder, folder: Path) -> None:
    """Refuse a model that is not the adapter's base. PEFT's own folders do not say; shapes must do there."""
    if not (folder / BASE_FILE).is_file() or model.base is None:
        return
    made_for = _read_json(folder / BASE_FILE)
    if made_for.get("fingerprint") != model.base.fingerprint:
        raise CheckpointError(
            f"{folder}: an adapter for another base: it was trained on {made_for.get('path')} "
            f"({str(made_for.get('fingerprint'))[:12]}), and this is {model.base.path} "
            f"({model.base.fingerprint[:12]}), whose weights differ; load it with the base it was trained on"
        )


def _misfit(folder: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder}: the adapter does not fit this base; load it with the base it was trained on\n  "
        + "\n  ".join(problems)
    )


def _read_tensors(folder: Path, config: DecoderConfig) -> dict[str, Tensor]:
    """Every tensor by the name of Hugging Face's module it belongs to."""
    path = folder / WEIGHTS_FILE
    try:
        stored = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(_no_weights(folder)) from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); copy the file again") from error
    names = {key: canonical_name(config.family, key.removeprefix(_PREFIX)) or key for key in stored}
    # Some versions of PEFT end the name of a magnitude with .weight.
    return {name.replace(f"{_MAGNITUDE}.weight", _MAGNITUDE): stored[key] for key, name in names.items()}


def _no_weights(folder: Path) -> str:
    if (folder / "adapter_model.bin").is_file():
        return (
            f"{folder}: adapter_model.bin is pickled, and unpickling runs whatever code it holds. Expected "
            f"{WEIGHTS_FILE}; if you trust the file, let PEFT write one: "
            f"PeftModel.from_pretrained(BASE, {str(folder)!r}).save_pretrained(NEW_FOLDER)"
        )
    return f"{folder}: no {WEIGHTS_FILE}; expected an adapter folder of PEFT, copy it again"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name}; expected an adapter folder of PEFT") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object; copy the file again")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _whole(number: float) -> float:
    """16 for 16.0, as people and PEFT write it."""
    return int(number) if number == int(number) else number
