"""A request to stop, however it arrives, becomes a flag that the job looks at between two steps.

It comes as a signal; as the file that `DDPM_STOP_FILE` names, which a batch script creates; as the time
`DDPM_DEADLINE`, in Unix seconds, at which the job will be killed; or by the end of the launcher that started this
process, which would otherwise live on with nobody to stop it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

from pipeline import storage
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.run.background import Every

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
STOP_FILE, DEADLINE, NO_LAUNCHER, CONTROL_FILE = "the stop file", "the deadline", "the launcher is gone", "control/stop"
REASONS = ("", *(number.name for number in SIGNALS), STOP_FILE, DEADLINE, NO_LAUNCHER, CONTROL_FILE)
"""All that a request can be; ranks tell each other by number."""

STOPPED = "control/stopped.json"
"""Of a run whose last start was stopped on request: `reason`, one of REASONS, and `step`."""

_LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")
_LOOK_EVERY_S = 1.0


@contextmanager
def signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within it a handler gets the stop signals, but for a SIGHUP that nohup has ignored."""
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    before = {number: signal.signal(number, handler) for number in SIGNALS if not (nohup and number == signal.SIGHUP)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Interrupt:
    """While entered, the stop signals only set `requested`, and so does whatever else asks for a stop.

    The second Ctrl-C does not wait for the step: it raises KeyboardInterrupt. SIGHUP stays ignored under nohup.

    Raises:
        ConfigError: `DDPM_DEADLINE` is not a time.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """One of REASONS."""
        self.lead_s = 30.0
        """So long before the deadline the stop is asked for: what a step and a save take."""
        self.control_file: str | None = None
        """A file whose appearance is a request too; looked at by one process of a job."""
        self._deadline = _deadline()
        self._stop_file = os.environ.get("DDPM_STOP_FILE")
        self._launcher = os.getppid() if any(name in os.environ for name in _LAUNCHED) else None
        self._signals = signals_to(self._handle)

    def __enter__(self) -> Interrupt:
        self._signals.__enter__()
        self._look()
        self._watch = Every(_LOOK_EVERY_S, self._look, "interrupt")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.stop()
        self._signals.__exit__(kind, error, trace)

    def end_within(self, seconds: float) -> None:
        """Ask for a stop `lead_s` before so much time is over, if the deadline is not earlier."""
        self._deadline = min(self._deadline, time.time() + seconds)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == "SIGINT":
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name

    def _look(self) -> None:
        if self.requested:
            return
        if self._stop_file and os.path.exists(self._stop_file):
            self.requested = STOP_FILE
        elif time.time() > self._deadline - self.lead_s:
            self.requested = DEADLINE
        elif self._launcher is not None and os.getppid() != self._launcher:
            self.requested = NO_LAUNCHER
        elif self.control_file:
            with suppress(PipelineError, OSError):  # a mount that is away for a moment
                if storage.exists(self.control_file):
                    self.requested = CONTROL_FILE


def stop_reason(run_dir: str) -> str | None:
    """Why the last start of a run was stopped on request; None if it was not."""
    with suppress(FileNotFoundError, DataError):
        return dict(storage.read_json(storage.join(run_dir, STOPPED))).get("reason")
    return None


def _deadline() -> float:
    text = os.environ.get("DDPM_DEADLINE") or "inf"
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"DDPM_DEADLINE is {text!r}: give Unix seconds, as `date +%s` prints them") from None
