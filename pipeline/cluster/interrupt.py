"""Requests to stop: each sets a flag that the job checks between two steps.

A request is a signal; the file that `DDPM_STOP_FILE` names, created by a batch script; the file `RUN/control/stop`,
created by a user; the approach of `DDPM_DEADLINE`, the Unix time in seconds at which the job will be killed; or the
end of the launcher that started this process, as nobody else would stop the process then.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from math import isnan
from types import FrameType

from pipeline import messages
from pipeline.checkpoints.run_dir import RunDir
from pipeline.cluster import launch_environment
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.processes.periodic import Periodic
from pipeline.storage import files

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
STOP_FILE, DEADLINE, NO_LAUNCHER, CONTROL_FILE = "the stop file", "the deadline", "the launcher is gone", "control/stop"
REASONS = ("", *(number.name for number in SIGNALS), STOP_FILE, DEADLINE, NO_LAUNCHER, CONTROL_FILE)
"""All reasons to stop, and first none. Ranks exchange the index."""

_LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")
_SHELLS = {"sh", "bash", "dash", "ash", "busybox", "zsh", "ksh", "mksh", "fish", "csh", "tcsh", "screen"}
_POLL_S = 1.0


@contextmanager
def signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Send the stop signals to a handler within the block, except a SIGHUP that nohup ignores."""
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    before = {number: signal.signal(number, handler) for number in SIGNALS if not (nohup and number == signal.SIGHUP)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Interrupt:
    """Sets `requested` at the first request to stop while entered.

    The second Ctrl-C does not wait for the step: it raises KeyboardInterrupt. SIGHUP stays ignored under nohup.

    Args:
        first: what the job does before it ends, such as "this step is saved first": rank 0 says so at the request.

    Raises:
        ConfigError: `DDPM_DEADLINE` is not a time.
    """

    def __init__(self, first: str = "") -> None:
        self._first = first
        self.requested: str | None = None
        """One of REASONS, or None."""
        self.lead_s = 30.0
        """Seconds before the deadline at which a stop is requested: the time of a step and a save."""
        self.control_file: str | None = None
        """`RUN/control/stop`; only one process of a job polls it."""
        self._deadline = _deadline()
        self._stop_file = os.environ.get("DDPM_STOP_FILE")
        self._launcher = _launcher()
        self._stack = ExitStack()

    def __enter__(self) -> Interrupt:
        self._stack.enter_context(signals_to(self._handle))
        self._poll()
        self._watch = Periodic(_POLL_S, self._poll, "interrupt")
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.stop()
        self._stack.close()

    def set_time_limit(self, seconds: float) -> None:
        """Set the deadline to this time from now, unless it is earlier already."""
        self._deadline = min(self._deadline, time.time() + seconds)

    def warn_if_too_short(self, warn: Callable[[str], None]) -> None:
        """Warn if the deadline leaves no time for a single step."""
        left = self._deadline - time.time()
        if left <= self.lead_s:
            warn(
                f"{max(left, 0):.0f} s are left, and a stop is asked for {self.lead_s:.0f} s before the end: "
                "this start stops at once; give more time, by run.time_limit or --time of the batch job"
            )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == "SIGINT":
            raise KeyboardInterrupt
        self._request(signal.Signals(number).name)

    def _request(self, reason: str) -> None:
        is_news, self.requested = self.requested is None, reason
        if is_news and self._first and not launch_environment.count("RANK", 0):
            again = "; Ctrl-C again stops at once, without saving" if reason == "SIGINT" else ""
            messages.info(f"stopping ({reason}): {self._first}{again}")

    def _poll(self) -> None:
        if self.requested:
            return
        if self._stop_file and os.path.exists(self._stop_file):
            self._request(STOP_FILE)
        elif time.time() > self._deadline - self.lead_s:
            self._request(DEADLINE)
        elif self._launcher is not None and os.getppid() != self._launcher:
            self._request(NO_LAUNCHER)
        elif self.control_file:
            with suppress(PipelineError, OSError):  # the file system may be away for a moment
                if files.exists(self.control_file):
                    self._request(CONTROL_FILE)


def stop_reason(run_dir: str) -> str | None:
    """Why the last start of a run was stopped on request, one of REASONS; None if it was not."""
    with suppress(FileNotFoundError, DataError, TypeError, ValueError):  # it may be damaged
        return dict(files.read_json(RunDir(run_dir).stopped)).get("reason")
    return None


def _launcher() -> int | None:
    """The process number of the launcher; None without one. A shell may have the launcher's variables but is none."""
    parent = os.getppid()
    if not any(name in os.environ for name in _LAUNCHER_VARIABLES):
        return None
    with suppress(OSError, UnicodeDecodeError), open(f"/proc/{parent}/comm") as name:
        return None if name.read().strip() in _SHELLS else parent
    return parent


def _deadline() -> float:
    text = os.environ.get("DDPM_DEADLINE") or "inf"
    with suppress(ValueError):
        if not isnan(seconds := float(text)):
            return seconds
    raise ConfigError(f"DDPM_DEADLINE is {text!r}: give Unix seconds, as `date +%s` prints them")
