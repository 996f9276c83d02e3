"""Where tensors live and in which precision they are multiplied; what of that the hardware accelerates."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Literal

import torch

from seedbed.errors import ConfigError

Precision = Literal["bf16", "fp16", "fp32"]
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` prefers CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps") from None
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type, 0)
    if (device.index or 0) >= available:
        raise ConfigError(f"--device {name}: this machine has no such device; leave it out to take the best")
    return device


def pick_precision(name: str, device: torch.device) -> Precision:
    """`name`, or for `auto` bf16 where matrix products are faster in it, else fp32.

    Raises:
        ConfigError: no such precision.
    """
    if name in ("bf16", "fp16", "fp32"):
        return name  # type: ignore[return-value]
    if name != "auto":
        raise ConfigError(f"--precision {name}: expected auto, bf16, fp16 or fp32")
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and _cpu_accelerates_bf16() else "fp32"


def _cpu_accelerates_bf16() -> bool:
    """AMX or AVX512-BF16, unless the user told oneDNN to keep away from them."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    knows_bf16 = ("BF16", "FP16", "AMX", "ALL", "DEFAULT")
    if limit and not any(word in limit for word in knows_bf16):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[object]:
    """The context in which forward passes run."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])


def product_type(tensor: torch.Tensor) -> torch.dtype:
    """In which products with `tensor` are made: the type of autocast where it is on, else its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def envelope(device: torch.device) -> dict[str, str | int]:
    """What the last bits of a step depend on beside weights, text, options and the number of processes."""
    if device.type != "cpu":
        return {"torch": torch.__version__, "device": describe(device)}
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").lower()
    instructions = torch.backends.cpu.get_cpu_capability()
    amx = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
    return {
        "torch": torch.__version__,
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
        "instructions": f"{instructions}{amx}{f' limited to {limit}' if limit else ''}",
    }


def keep_memory() -> None:
    """Have the C library keep what this process frees for the next step, which asks for the same again (glibc's only).

    Otherwise the system takes large blocks back and fills them with zeros each time before they are used.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's allocator has a type for it; the CPU's, Apple's, and CUDA's libraries raise errors that say so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("can't allocate memory", "out of memory", "can't start new thread", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def empty_cache(device: torch.device) -> None:
    """Give the memory that is kept for later back: torch's on a GPU, the C library's on a CPU (glibc's only)."""
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far: the allocator's on CUDA, else the process's (MiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # A process begins with the ru_maxrss of the one that started it; VmHWM is its own.
    with contextlib.suppress(OSError, StopIteration, ValueError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def describe(device: torch.device) -> str:
    """The device in words, as it stands in a run's summary."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"
