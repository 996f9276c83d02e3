"""What training must remember to go on as if it had never stopped, apart from weights and optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from seedbed.errors import CheckpointError


@dataclass
class TrainingState:
    """Plain numbers, saved as JSON with every checkpoint.

    The order of the data and all random numbers follow from the seed and `step`, so neither a
    position in the data nor a random state needs to be kept.
    """

    step: int = 0
    tokens: int = 0
    """Target tokens trained on."""
    seconds: float = 0.0
    """Training time used, in all sittings."""
    epoch_loss_sum: float = 0.0
    """Nats summed over the current epoch's tokens."""
    epoch_tokens: int = 0
    validated_step: int = 0
    """Step of the last finished validation."""
    val_loss: float | None = None
    steps_per_epoch: int = 0
    closed_epochs: int = 0
    """Epochs whose end was reported, judged for early stopping and saved."""
    best_val_loss: float | None = None
    best_step: int = 0
    epochs_without_improvement: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    """How often the run went back to an earlier checkpoint because its updates stayed bad."""
    tokens_at_rollback: int = -1
    """Those of the checkpoint that the last of them led to."""
    learning_rate_factor: float = 1.0
    """Of the schedule's rate; each of them lowers it."""
    set_aside: list[int] = field(default_factory=list)
    """Steps, from 0, whose rows are passed over."""
    micro_batch_size: int | None = None
    """Rows at once, since more of them ran out of memory; None: as configured."""
    shard_rows: list[int] = field(default_factory=list)
    """Of a text that is streamed, the rows of the shards so far: where in them the run is."""
    shard_layout: str = ""
    """Fingerprint of what those numbers depend on."""
    forgetting: dict[str, float] = field(default_factory=dict)
    """How much worse each earlier domain is than when the run began, as a share; negative is better."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the float16 loss scaler."""
    envelope: dict[str, Any] = field(default_factory=dict)
    """What the last bits depend on: versions, threads, instructions."""
    text: str = ""
    """Fingerprint of what is trained and validated on."""
    records: dict[str, int] = field(default_factory=dict)
    """Length of the run's record files in bytes."""

    def become(self, other: TrainingState) -> None:
        """Take over all that `other` is, in place."""
        vars(self).update(vars(other))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainingState:
        """What `to_json` gave; names that this version does not know are left out.

        Raises:
            CheckpointError: it is something else.
        """
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
            raise CheckpointError(
                f"the state of training is damaged ({wrong}); go on from another checkpoint"
            ) from None
