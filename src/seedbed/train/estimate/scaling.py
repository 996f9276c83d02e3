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
"""Bytes of gradients that DDP adds up at once."""


@dataclass(frozen=True)
class Traffic:
    """One process's step: bytes it sends, messages that wait for one another, and seconds it computes."""

    num_bytes: float
    messages: int
    seconds: float

    def step_seconds(self, link: Link) -> float:
        """With what does not fit beside the way back."""
        sending = self.num_bytes / link.bytes_per_second + self.messages * link.delay
        return self.seconds + max(0.0, sending - BACKWARD * self.seconds)

    def efficiency(self, link: Link) -> float:
        """The share of its speed that a process keeps, 0 to 1."""
        return self.seconds / self.step_seconds(link)


def step_traffic(
    parameters: float,
    trained: float,
    processes: int,
    seconds: float,
    *,
    sharded: bool,
    micro_batches: int,
    product_bytes: int,
    groups: int,
) -> Traffic:
    """A step of so many seconds, with what is sent in it; arguments as in the two functions below."""
    sent = bytes_sent(
        parameters, trained, processes, sharded=sharded, micro_batches=micro_batches, product_bytes=product_bytes
    )
    messages = messages_sent(trained, processes, sharded=sharded, micro_batches=micro_batches, groups=groups)
    return Traffic(sent, messages, seconds)


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


def messages_sent(trained: float, processes: int, *, sharded: bool, micro_batches: int, groups: int) -> int:
    """How many messages of a step wait for one another.

    Args:
        trained: weights that learn.
        processes: how many.
        sharded: FSDP, else DDP.
        micro_batches: of one process, in a step.
        groups: of weights that FSDP puts together at once: the blocks, and what is outside them.
    """
    if not sharded:
        return math.ceil(4 * trained / BUCKET) * 2 * math.ceil(math.log2(processes))
    return micro_batches * groups * 3 * (processes - 1)


def describe_scaling(traffic: Traffic) -> dict[str, Any]:
    """What `plan --json` says of one way to share a model."""
    return {
        "communication_mb": round(traffic.num_bytes / 2**20, 1),
        "efficiency": {name: round(traffic.efficiency(link), 3) for name, link in LINKS.items()},
    }
