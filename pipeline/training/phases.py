"""What a rank is doing now, for its heartbeat and for the time that the meter counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from pipeline.cluster.heartbeat import Heartbeat
from pipeline.monitoring.meter import Meter
from pipeline.training.train_state import TrainState

_NO_TRAINING = {"validation", "preview", "evaluation", "saving"}


class Phases:
    """`with phase("data"):` around each part of a step.

    Args:
        state: of the run; its step is that of the phases.
        heartbeat: writes the phase of this rank to the run directory.
        meter: counts "data" as waiting for data, and does not count the phases in `_NO_TRAINING` as training.
    """

    def __init__(self, state: TrainState, heartbeat: Heartbeat, meter: Meter) -> None:
        self._state, self._heartbeat, self._meter = state, heartbeat, meter

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Enter a phase, one of `heartbeat.PHASES`."""
        self._heartbeat.begin_phase(self._state.step, name)
        timed: AbstractContextManager[None] = nullcontext()
        if name == "data":
            timed = self._meter.waiting()
        elif name in _NO_TRAINING:
            timed = self._meter.paused()
        with timed:
            yield
