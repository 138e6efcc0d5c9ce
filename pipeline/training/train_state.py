"""The state of a run besides its tensors: with them, all that a resume needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.model.unet import Checkpointing


@dataclass
class TrainState:
    """Counters of a run; every checkpoint has them under `position` in its state.json."""

    step: int = 0
    """Finished steps."""
    samples: int = 0
    """Samples consumed; the next batch begins at this position of the order."""
    batch_changes: list[tuple[int, int]] = field(default_factory=list)
    """(step, samples) at which the run resumed with another global batch."""
    ema_updates: int = 0
    bad_steps: int = 0
    """Steps that changed no weights, because loss or gradient was not finite."""
    bad_in_a_row: int = 0
    lanes: int = 0
    """Streams of the order of the data; fixed when the run starts."""
    micro_batch: int = 0
    checkpointing: Checkpointing = "none"
