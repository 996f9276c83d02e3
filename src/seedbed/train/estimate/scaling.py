"""What several processes send each other in a step, and what is left of their speed.

Bytes are counted for rings, as NCCL and gloo make them: each process sends (n - 1) / n of what is gathered or reduced.
Waiting is counted for rings where weights are gathered, and for trees where gradients are reduced, as NCCL does among
many (Sanders et al., 2009).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Link:
    """Between two processes."""

    bytes_per_second: float  # that one sends, as the makers say; what is reached is often a fifth less
    delay: float  # seconds until a message begins to arrive, software included; assumed


LINKS: Final = {
    "1 Gb/s Ethernet": Link(0.125e9, 50e-6),
    "10 Gb/s Ethernet": Link(1.25e9, 50e-6),
    "100 Gb/s InfiniBand": Link(12.5e9, 5e-6),
    "400 Gb/s InfiniBand": Link(50e9, 5e-6),
    "NVLink 4": Link(450e9, 1e-6),
}
BACKWARD: Final = 2 / 3
"""Of a step's time, the share in which gradients are sent while others are still made."""
BUCKET: Final = 25 << 20
"""Bytes of gradients that DDP reduces at once."""


@dataclass(frozen=True)
class Traffic:
    """One process's step: bytes it sends, messages that wait for one another, and seconds it computes."""

    num_bytes: float
    messages: int
    seconds: float

    def step_seconds(self, link: Link) -> float:
        """With what does not fit beside the backward pass."""
        sending = self.num_bytes / link.bytes_per_second + self.messages * link.delay
        return self.seconds + max(0.0, sending - BACKWARD * self.seconds)

    def efficiency(self, link: Link) -> float:
        """The share of its speed that a process keeps, 0 to 1."""
        return self.seconds / self.step_seconds(link)


@dataclass(frozen=True)
class Exchange:
    """What decides how much the processes of a run send each other in a step."""

    parameters: float
    """Weights in all."""
    trained: float
    """Those that learn."""
    processes: int
    micro_batches: int = 1
    """Of one process, in a step."""
    product_bytes: int = 4
    """Of a number in a product."""
    units: int = 1
    """Groups of weights that FSDP gathers at once: the blocks, and what is outside them."""

    def ddp(self, seconds: float) -> Traffic:
        """A step that computes for so many seconds and reduces float32 gradients once, a bucket at a time."""
        buckets = math.ceil(4 * self.trained / BUCKET)
        return Traffic(
            num_bytes=2 * self._others * 4 * self.trained,
            messages=buckets * 2 * math.ceil(math.log2(self.processes)),
            seconds=seconds,
        )

    def fsdp(self, seconds: float) -> Traffic:
        """One that in every micro-batch gathers the weights, in the type of the products, and reduces gradients.

        Weights are gathered for the forward pass and once more for the backward pass.
        """
        weights, gradients = 2 * self.product_bytes * self.parameters, 4 * self.trained
        return Traffic(
            num_bytes=self.micro_batches * self._others * (weights + gradients),
            messages=self.micro_batches * self.units * 3 * (self.processes - 1),
            seconds=seconds,
        )

    @property
    def _others(self) -> float:
        """The share of all processes that are others."""
        return (self.processes - 1) / self.processes


def describe_scaling(traffic: Traffic) -> dict[str, Any]:
    """What `plan --json` says of one way to share a model."""
    return {
        "communication_mb": round(traffic.num_bytes / 2**20, 1),
        "efficiency": {name: round(traffic.efficiency(link), 3) for name, link in LINKS.items()},
    }
