"""At which steps a run saves, validates, previews and logs. Intervals in epochs count the samples that it has consumed.

How many samples each past step has consumed stands in the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoints.checkpoint import committed_step
from pipeline.checkpoints.run_dir import RunDir
from pipeline.config import RunSection
from pipeline.errors import DataError
from pipeline.storage import files
from pipeline.units import EpochCounter, epochs

Past = list[tuple[int, int]]
"""(steps, samples) as `EpochCounter` has it."""


@dataclass(frozen=True)
class Schedule:
    """Which actions are due at a step."""

    course: EpochCounter
    run: RunSection
    """As configured: lengths may be in epochs."""

    def due(self, step: int, *names: str) -> bool:
        """Whether one of `names`, such as `checkpoint` of `checkpoint_every`, is due."""
        return any(self.course.is_reached(getattr(self.run, f"{name}_every"), step) for name in names)

    def is_milestone(self, step: int) -> bool:
        """Whether the checkpoint of a step is kept for ever, also if `run.keep_every` changes later."""
        return self.due(step, "keep")

    @property
    def keep_every(self) -> int:
        """`run.keep_every` in steps; 0 if it is in epochs or off."""
        return 0 if epochs(self.run.keep_every) is not None else self.run.keep_every


def past_of(state: Mapping[str, Any]) -> Past:
    """From the state of a checkpoint; [] for an empty state."""
    position = state.get("position", {})
    step, samples = int(position.get("step", 0)), int(position.get("samples", 0))
    changes = [(int(at), int(before)) for at, before in position.get("batch_changes", ())]
    return [*changes, (step, samples)] if step and changes[-1:] != [(step, samples)] else changes


def newest_past(run_dir: str) -> Past:
    """From the newest checkpoint, unchecked, so it may be damaged; [] if there is none."""
    if not (step := committed_step(run_dir)):
        return []
    with suppress(OSError, DataError, KeyError, TypeError, ValueError, AttributeError):
        state = files.read_json(files.join(RunDir(run_dir).checkpoint(step), "state.json"))
        return past_of(state)
    return []


def batch_changed(known: Past, global_batch: int) -> bool:
    """Whether the last steps were taken with another global batch."""
    (before_last, before), (last, after) = ((0, 0), *known)[-2:] if known else ((0, 0), (0, 0))
    return last > before_last and after - before != global_batch * (last - before_last)
