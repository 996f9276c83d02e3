"""What several processes send each other in a step, and what is left of their speed.

Counted for rings, as NCCL and gloo make them: each process sends (n - 1) / n of what is put together or added up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

LINKS: Final = {
    "1 Gb/s Ethernet": 0.125e9,
    "10 Gb/s Ethernet": 1.25e9,
    "100 Gb/s InfiniBand": 12.5e9,
    "400 Gb/s InfiniBand": 50e9,
    "NVLink 4": 450e9,
}
"""Bytes a second that one process sends, as the makers say; what is reached is often a fifth less."""
BACKWARD: Final = 2 / 3
"""Of a step's time, the share in which gradients are sent while others are still made."""


@dataclass(frozen=True)
class Traffic:
    """One process's step: bytes it sends, and seconds it computes."""

    num_bytes: float
    seconds: float

    def step_seconds(self, bytes_per_second: float) -> float:
        """With what does not fit beside the way back."""
        sending = self.num_bytes / bytes_per_second
        return self.seconds + max(0.0, sending - BACKWARD * self.seconds)

    def efficiency(self, bytes_per_second: float) -> float:
        """The share of its speed that a process keeps, 0 to 1."""
        return self.seconds / self.step_seconds(bytes_per_second)


def bytes_sent(
    parameters: float, trained: float, processes: int, *, sharded: bool, micro_batches: int, product_bytes: int
) -> float:
    """What one process sends in a step.

    DDP adds up float32 gradients once. FSDP puts the weights together, in the type of the products, on the way
    forward and once more on the way back, and adds the gradients up, in every micro-batch.

    Args:
        parameters: weights in all.
        trained: those that learn.
        processes: how many.
        sharded: FSDP, else DDP.
        micro_batches: of one process, in a step.
        product_bytes: of a number in a product.
    """
    others = (processes - 1) / processes
    if not sharded:
        return 2 * others * 4 * trained
    return micro_batches * others * (2 * product_bytes * parameters + 4 * trained)


def describe_scaling(traffic: Traffic) -> dict[str, Any]:
    """What `plan --json` says of one way to share a model."""
    return {
        "communication_mb": round(traffic.num_bytes / 2**20, 1),
        "efficiency": {link: round(traffic.efficiency(speed), 3) for link, speed in LINKS.items()},
    }
