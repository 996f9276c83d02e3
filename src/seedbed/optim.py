"""Optimizers: decay on matrices only, the fused kernels where torch has them."""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seedbed.config import TrainingOptions
from seedbed.errors import ConfigError
from seedbed.lowbit import DEVICES, import_bitsandbytes
from seedbed.parallel import distribute_like, is_dtensor, to_local

_MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}
"""Adam's two moments, and the numbers they have in bitsandbytes."""

_TABLES = ("embed_", "lm_head")
"""How the names of matrices begin that have a row for each token or position."""

_MIN_SIZE_8BIT = 4096  # smaller parameters keep their moments in float32


@contextmanager
def compiler_beside() -> Iterator[None]:
    """Load torch's compiler, which making any optimizer does, beside the work inside: a second of every start.

    That work should import nothing: of modules that two threads load at once, one may see the half.
    """
    loading = threading.Thread(target=importlib.import_module, args=("torch._dynamo",))
    loading.start()
    try:
        yield
    finally:
        loading.join()


def build_optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), also with 8-bit moments (Dettmers et al. 2022), Muon (Jordan 2024), or SGD.

    Over the trainable parameters of `model`, which must be on their device. Weight decay applies to tensors of two
    or more dimensions: not to norms and biases.

    Raises:
        MissingExtra: 8-bit moments without the library for them.
        ConfigError: 8-bit moments on a device without kernels for them.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = _decay_groups(trainable, options.weight_decay)
    if options.optimizer == "sgd":
        fused = not any(map(is_dtensor, trainable))  # no kernel for sharded weights
        return torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.beta1, fused=fused)
    adam: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.beta1, options.beta2),
        "eps": options.epsilon,
    }
    if options.optimizer == "adamw8bit":
        device = trainable[0].device.type
        if device not in DEVICES:
            raise ConfigError(f"--optimizer adamw8bit: there are no kernels for {device}; choose adamw")
        kind = import_bitsandbytes("8-bit optimizers").optim.AdamW8bit
        return kind(groups, min_8bit_size=_MIN_SIZE_8BIT, **adam)  # type: ignore[no-any-return]
    if options.optimizer == "muon":
        return Muon(model, adam, options.weight_decay)
    return torch.optim.AdamW(groups, fused=True, **adam)


def _decay_groups(parameters: Sequence[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with decay, all else without it."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Muon(torch.optim.Optimizer):
    """Muon for matrices between hidden states, whose updates it makes orthogonal; AdamW for the rest (Jordan, 2024).

    Muon's updates are scaled to the size of AdamW's (Liu et al., 2025), so both take the same learning rate and decay.
    """

    def __init__(self, model: nn.Module, adam: Mapping[str, Any], weight_decay: float) -> None:
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = {name for name, p in trainable.items() if p.dim() == 2 and not name.startswith(_TABLES)}
        groups = _decay_groups([p for name, p in trainable.items() if name not in matrices], weight_decay)
        both: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, fused=True, **adam)] if groups else []
        self._matrices = [trainable[name] for name in sorted(matrices)]
        if matrices:
            scaled = {"lr": adam["lr"], "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
            both.append(_MuonByShape(self._matrices, **scaled))
        super().__init__([group for one in both for group in one.param_groups], {})
        for one in both:
            one.state = self.state  # one state, as `optimizer_tensors` reads it
        self._both = both

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters."""
        assert closure is None
        for one in self._both:
            one.step()

    def keys_of(self, parameter: Tensor) -> set[str]:
        """What the state of a parameter consists of."""
        in_muon = any(parameter is matrix for matrix in self._matrices)
        return {"momentum_buffer"} if in_muon else {"step", *_MOMENTS}


class _MuonByShape(torch.optim.Muon):
    """torch's, but matrices of one shape are made orthogonal together: many small products one by one are slow."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all matrices that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                self._update(group, matrices)

    def _update(self, group: Mapping[str, Any], matrices: list[Tensor]) -> None:
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        grads = [matrix.grad for matrix in matrices if matrix.grad is not None]
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        directions = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))  # (M, O, I), Nesterov's
        orthogonal = _orthogonal(directions, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rate = group["lr"] * 0.2 * math.sqrt(max(matrices[0].shape))  # the size of AdamW's updates
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(orthogonal.to(matrices[0].dtype)), alpha=-rate)


def _orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The orthogonal matrix nearest to each of (M, O, I), roughly: Newton and Schulz's iteration, in bfloat16."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT  # (M, O, O)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, of each what this process has: `PARAMETER/exp_avg`, `PARAMETER/step`, ...

    A moment in 8 bits is two: `PARAMETER/exp_avg.codes` in the parameter's shape, `PARAMETER/exp_avg.scales` with
    one number for each 256 codes.
    """
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}
    if is_8bit(optimizer):
        states = {name: _from_bitsandbytes(state) for name, state in states.items() if state}
    return {
        f"{name}/{key}": to_local(value)
        for name, state in states.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, the parts of all processes together, on each parameter's device.

    Raises:
        ConfigError: it is the state of another optimizer.
    """
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        states.setdefault(name, {})[key] = distribute_like(value, parameters[name])
    for name, state in states.items():
        expected = _state_keys(optimizer, parameters[name])
        if state.keys() != expected:
            raise ConfigError(
                f"--optimizer: the checkpoint holds the state of another one: {', '.join(sorted(state))} of {name}, "
                f"expected {', '.join(sorted(expected))}; go on with the optimizer it was trained with"
            )
        optimizer.state[parameters[name]] = _to_bitsandbytes(optimizer, state) if is_8bit(optimizer) else state


def is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is bitsandbytes', whose kernels change tensors unseen by torch."""
    return not isinstance(optimizer, torch.optim.AdamW | torch.optim.SGD | Muon)


def _state_keys(optimizer: torch.optim.Optimizer, parameter: Tensor) -> set[str]:
    """What `optimizer_tensors` gives for a parameter that was updated."""
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer"}
    if isinstance(optimizer, Muon):
        return optimizer.keys_of(parameter)
    if is_8bit(optimizer) and parameter.numel() >= _MIN_SIZE_8BIT:
        return {"step", *(f"{moment}.{part}" for moment in _MOMENTS for part in ("codes", "scales"))}
    return {"step", *_MOMENTS}


def _from_bitsandbytes(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """One parameter's state under names of ours; the table of the codes' values is always the same."""
    tensors = {"step": torch.tensor(float(state["step"]))}
    for moment, number in _MOMENTS.items():
        if f"absmax{number}" in state:
            tensors[f"{moment}.codes"] = state[f"state{number}"]
            tensors[f"{moment}.scales"] = state[f"absmax{number}"]
        else:
            tensors[moment] = state[f"state{number}"]
    return tensors


def _to_bitsandbytes(optimizer: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `_from_bitsandbytes`."""
    if not optimizer.name2qmap:
        optimizer.fill_qmap()
    state: dict[str, Any] = {"step": int(tensors["step"])}
    for moment, number in _MOMENTS.items():
        if moment in tensors:
            state[f"state{number}"] = tensors[moment]
            continue
        codes = tensors[f"{moment}.codes"]
        table = optimizer.name2qmap["dynamic" if moment == "exp_avg" else "udynamic"]
        state |= {
            f"state{number}": codes,
            f"absmax{number}": tensors[f"{moment}.scales"],
            f"qmap{number}": table.to(codes.device),
        }
    return state
