"""What a rank is doing now, for its heartbeat and for the time that the meter counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

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
        pause: entered in these phases too: the progress does not count them either.
    """

    def __init__(
        self,
        state: TrainState,
        heartbeat: Heartbeat,
        meter: Meter,
        pause: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._state, self._heartbeat, self._meter, self._pause = state, heartbeat, meter, pause

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Enter a phase, one of `heartbeat.PHASES`."""
        self._heartbeat.begin_phase(self._state.step, name)
        with ExitStack() as stack:
            if name == "data":
                stack.enter_context(self._meter.waiting())
            elif name in _NO_TRAINING:
                stack.enter_context(self._meter.paused())
                stack.enter_context(self._pause())
            yield
