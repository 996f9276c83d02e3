"""Which device and which precision are taken."""

from __future__ import annotations

import pytest
import torch

from seedbed.device import autocast, peak_memory_mb, pick_device, pick_precision
from seedbed.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("bf16", "amx", "limit", "expected"),
    [
        (True, False, "", "bf16"),
        (False, True, "", "bf16"),
        (False, False, "", "fp32"),
        (True, True, "AVX512_CORE", "fp32"),
        (True, True, "avx2", "fp32"),
        (True, True, "AVX512_CORE_BF16", "bf16"),
        (True, True, "AVX512_CORE_AMX", "bf16"),
    ],
)
def test_auto_is_bf16_only_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, amx: bool, limit: str, expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert pick_precision("auto", CPU) == expected
    assert pick_precision("fp16", CPU) == "fp16"


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:3"])
def test_a_device_that_is_not_here(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--device {name}"):
        pick_device(name)


def test_autocast_takes_the_precision() -> None:
    a = torch.ones(2, 2)
    with autocast(CPU, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert (a @ a).dtype == torch.float32


def test_peak_memory_counts_what_was_touched() -> None:
    before = peak_memory_mb(CPU)
    block = torch.ones(200 * 2**20 // 4 + int(before) * 2**20 // 4)
    assert peak_memory_mb(CPU) - before > 100
    assert block[0] == 1
