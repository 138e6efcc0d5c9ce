"""Progress of a job: a bar on a terminal, plain lines in a log, nothing with `--quiet`."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

_PULSE_S = 0.5
"""Between two signs of life of a bar."""


class Progress:
    """Counts units of work and shows how far the job is.

    Args:
        total: units in the whole job.
        job: what is being done, such as "sharding".
        unit: plural of what is counted, such as "images".
        done: units already done by an earlier start.
        quiet: show nothing but warnings.
        every_s: seconds between plain lines.
    """

    def __init__(
        self, total: int, job: str, *, unit: str, done: int = 0, quiet: bool = False, every_s: float = 10.0
    ) -> None:
        self._total, self._job, self._unit, self._done, self._first = total, job, unit, done, done
        self._every_s, self._quiet, self._notes = every_s, quiet, ""
        self._started = self._spoken = time.monotonic()
        on_terminal = sys.stderr.isatty() and not quiet
        self._bar = (
            tqdm(total=total, initial=done, desc=job, unit=f" {unit}", dynamic_ncols=True) if on_terminal else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.close()

    def note(self, figures: str) -> None:
        """A few figures to show beside the count from now on."""
        self._notes = figures

    def advance(self, count: int = 1) -> None:
        """Count finished units."""
        self._done += count
        if self._bar:
            self._bar.set_postfix_str(self._notes, refresh=False)
            self._bar.update(count)
        elif not self._quiet and (time.monotonic() - self._spoken > self._every_s or self._done == self._total):
            self._speak()

    def pulse(self, figures: str) -> None:
        """Show a few figures now and then while nothing is counted: for work that takes long between two counts."""
        if not self._quiet and time.monotonic() - self._spoken > (_PULSE_S if self._bar else self._every_s):
            self._notes = figures
            if self._bar:
                self._bar.set_postfix_str(figures)
                self._spoken = time.monotonic()
            else:
                self._speak()

    def _speak(self) -> None:
        self._spoken = time.monotonic()
        rate = (self._done - self._first) / max(self._spoken - self._started, 1e-9)
        left = f", {_duration((self._total - self._done) / rate)} left" if rate and self._done < self._total else ""
        tail = f", {self._notes}" if self._notes else ""
        self._write(f"{self._job}: {self._done}/{self._total} {self._unit}, {rate:.3g} {self._unit}/s{left}{tail}")

    def say(self, line: str) -> None:
        """A line of its own, above the bar if there is one."""
        if not self._quiet:
            self._write(line)

    def warn(self, line: str) -> None:
        """The same, also with `--quiet`."""
        self._write(line)

    def _write(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes <= 90 else f"{minutes // 60} h {minutes % 60:02} min"
