"""Frozen weights in four bits (QLoRA: Dettmers et al., 2023), and the library that packs and unpacks them.

An NF4 code is one of 16 levels, the quantiles of a normal distribution. Each block of 64 weights has its largest
magnitude as its scale, and the scales are kept in 8 bits themselves (double quantization): 4.13 bits a weight.

I in   O out
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from seedbed.errors import ConfigError, MissingExtra
from seedbed.model.decoder import Decoder

DEVICES = ("cpu", "cuda")
"""Where bitsandbytes has kernels for all that is used here."""

_MIN_WEIGHTS = 4096  # below, scales and overhead outweigh what is saved


def import_bitsandbytes(feature: str) -> Any:
    """The library, for `feature`, a plural that begins a sentence.

    Raises:
        MissingExtra: it is not installed.
    """
    with _no_kernels_from_the_hub():
        try:
            return import_module("bitsandbytes")
        except ModuleNotFoundError:
            raise MissingExtra(feature, "lowbit") from None


def quantize_frozen(model: Decoder, device: torch.device) -> None:
    """Pack the frozen linear weights of the blocks into NF4, on `device`; biases, norms and embeddings stay.

    They are moved there one at a time, so that it never holds them all in 32 bits; then they take 4.13 bits each.
    Products with them unpack one layer at a time, and so does their backward pass.

    Raises:
        MissingExtra: bitsandbytes is not installed.
        ConfigError: a device without kernels.
    """
    if device.type not in DEVICES:
        raise ConfigError(f"--base_precision nf4: there are no kernels for {device.type}; choose auto, or --device cpu")
    bitsandbytes = import_bitsandbytes("4-bit weights")
    for layer in model.blocks.modules():
        if not isinstance(layer, nn.Linear) or layer.weight.requires_grad or layer.weight.numel() < _MIN_WEIGHTS:
            continue
        packed = bitsandbytes.functional.quantize_4bit(
            layer.weight.detach().to(device), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        layer.weight = nn.Parameter(NF4Weight(*packed), requires_grad=False)


class NF4Weight(Tensor):
    """A matrix (O, I) kept in four bits, that looks like one of the type it was made from.

    `F.linear` multiplies by it without keeping an unpacked copy for the backward pass. Every other function gets
    a plain, unpacked tensor, and so does another device. Nothing can write into it.
    """

    codes: Tensor  # uint8, two weights a byte
    state: Any  # bitsandbytes.functional.QuantState: the scales, the shape, the type

    @staticmethod
    def __new__(cls, codes: Tensor, state: Any) -> NF4Weight:
        make: Callable[..., NF4Weight] = Tensor._make_wrapper_subclass
        return make(cls, state.shape, dtype=state.dtype, device=codes.device)

    def __init__(self, codes: Tensor, state: Any) -> None:
        self.codes, self.state = codes, state

    def unpack(self) -> Tensor:
        """(O, I), a plain tensor."""
        return import_bitsandbytes("4-bit weights").functional.dequantize_4bit(self.codes, self.state)  # type: ignore[no-any-return]

    def packed_bytes(self) -> int:
        """What it takes in memory: codes, their scales, and the scales of these."""
        scales = self.state.state2
        return sum(part.nbytes for part in (self.codes, self.state.absmax, scales.absmax))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"NF4Weight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].state)
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} would write into a weight kept in four bits; unpack() it first")
        return func(*_unpacked(args), **{key: _unpacked(value) for key, value in (kwargs or {}).items()})


def _unpacked(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_unpacked(item) for item in value)
    return value.unpack() if isinstance(value, NF4Weight) else value


def _linear(input: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """(..., I) to (..., O), in the type that autocast wants; the kernels know nothing of it."""
    kind = input.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
    bias = None if bias is None else bias.to(dtype)
    multiply = import_bitsandbytes("4-bit weights").matmul_4bit
    return multiply(input.to(dtype), weight.codes, weight.state, bias=bias)  # type: ignore[no-any-return]


@contextmanager
def _no_kernels_from_the_hub() -> Iterator[None]:
    """On CPUs with bfloat16, bitsandbytes fetches code with the package `kernels` as it is imported, or warns that it
    cannot. That code is for inference only, and nothing here runs what it has not installed."""
    if "bitsandbytes" in sys.modules:
        yield
        return
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, kernels = logger.level, sys.modules.get("kernels")
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        yield
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels
