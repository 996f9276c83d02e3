"""A model and its optimizer over several processes: replicated in each (DDP), or sharded (FSDP).

Both are PyTorch's own: `DistributedDataParallel` and `fully_shard`. Gradients come out as the mean over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from seedbed import distributed
from seedbed.device import Precision
from seedbed.lora import add_adapter
from seedbed.model.decoder import Decoder

Strategy = Literal["ddp", "fsdp"]
T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """A model as a training step uses it, whichever way the processes share it."""

    forward: Callable[..., Tensor]
    """As `Decoder.forward`."""
    add_up: Callable[[bool], None]
    """Told before each forward pass of an update whether it is the last, which adds up over the processes."""


def spread(model: Decoder, strategy: Strategy, device: torch.device, precision: Precision) -> Spread:
    """Get `model` ready for the processes there are, on `device`; its parameters are the ones to optimize then."""
    if distributed.size() == 1:
        return Spread(model.to(device), lambda _last: None)
    return _replicate(model.to(device)) if strategy == "ddp" else _shard(model, device, precision)


def _replicate(model: Decoder) -> Spread:
    """The first process's weights in all of them."""
    from torch.nn.parallel import DistributedDataParallel

    replica = DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)
    for parameter in model.parameters():
        if parameter.requires_grad:  # what is frozen was read from one file by all
            distributed.of_first(parameter.detach())

    def add_up(last: bool) -> None:
        replica.require_backward_grad_sync = last

    return Spread(replica, add_up)


def _shard(model: Decoder, device: torch.device, precision: Precision) -> Spread:
    """Every block, and what is around the blocks, is an FSDP unit, whose weights are gathered when they are needed.

    Before, only rank 0 has weights; after, nobody has all of them on its device. What is around the blocks stays in
    float32, and gathered until the loss has read the head.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    state = model.state_dict() if distributed.is_first() else {}
    model.to("meta")
    mesh = init_device_mesh(device.type, (distributed.size(),))
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=bf16 if precision == "bf16" else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    model.to_empty(device=device)
    _load_full_state(model, state)
    return Spread(model, lambda _last: None)  # without reduction, gradients would be kept unsharded


def is_sharded(model: nn.Module) -> bool:
    """Whether each process has a shard of the weights, as FSDP leaves them."""
    return any(is_dtensor(parameter) for parameter in model.parameters())


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a `DTensor`, of which each process has a shard."""
    return hasattr(tensor, "full_tensor")  # `isinstance` would import all of it for those who train alone


def whole(tensor: Tensor) -> Tensor:
    """The full tensor that all shards make; a collective, so all processes ask for it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def to_local(tensor: Tensor) -> Tensor:
    """This process's shard; a tensor that is not sharded as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def distribute_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A copy of a full tensor on the parameter's device, sharded as the parameter is.

    What is a view of a file would be copied in the first step, page by page: that takes three times as long.
    """
    if not is_dtensor(parameter) or not tensor.dim():
        return tensor.to(parameter.device, copy=True)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def with_weights(model: nn.Module, work: Callable[[], T]) -> T:
    """What `work` gives, plain JSON, which reads the model: done by the first process for all, or by all at once."""
    return work() if is_sharded(model) else distributed.on_first(work)


def reshard(model: nn.Module) -> None:
    """Free the full weights that were gathered outside of training."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def gathered(model: Decoder) -> Decoder:
    """The full model on rank 0, in its memory and gathered weight by weight; on other ranks one without weights."""
    with torch.device("meta"):
        copy = Decoder(model.config)
        if model.adapter is not None:
            add_adapter(copy, model.adapter)
    copy.base = model.base
    # Of a model with an adapter only what is trained is saved.
    left_out = {name for name, p in model.named_parameters() if model.adapter is not None and not p.requires_grad}
    parts = {name: part for name, part in model.state_dict().items() if name not in left_out}
    copy.load_state_dict({name: _kept(part) for name, part in parts.items()}, assign=True, strict=False)
    return copy


def load(model: Decoder, saved: Decoder) -> None:
    """Give the trained weights of `model` the values of `saved`, which the first process has; all are called."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {name: parameter.detach() for name, parameter in saved.named_parameters() if name in trained}
    if is_sharded(model):
        _load_full_state(model, state if distributed.is_first() else {}, strict=False)
    else:
        model.load_state_dict(state, strict=False)


def _load_full_state(model: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
    set_model_state_dict(model, dict(state), options=options)


def _kept(part: Tensor) -> Tensor:
    tensor = whole(part).cpu()
    return tensor if distributed.is_first() else torch.empty_like(tensor, device="meta")
