"""Progress of a job: a bar on a terminal, plain lines in a log, nothing with `--quiet`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from tqdm import tqdm

from pipeline import messages
from pipeline.units import duration_text

_REFRESH_S = 0.5
"""Seconds between two refreshes of a bar while nothing is counted."""


class Progress(AbstractContextManager["Progress"]):
    """Counts finished units of a job and shows the count, the rate and the time left.

    Args:
        total: units in the whole job.
        job: name of the work, such as "sharding".
        unit: plural, such as "images".
        done: units already done by an earlier start.
        quiet: show nothing but warnings.
        every_s: seconds between two lines in a log.
        steady: show the average rate since the start also on a terminal, for counts that grow by many at a time.
    """

    def __init__(
        self,
        total: int,
        job: str,
        *,
        unit: str,
        done: int = 0,
        quiet: bool = False,
        every_s: float = 10.0,
        steady: bool = False,
    ) -> None:
        self._total, self._job, self._unit, self._done, self._first = total, job, unit, done, done
        self._every_s, self._quiet, self._postfix = every_s, quiet, ""
        self._started = self._last_shown = time.monotonic()
        self._bar = None
        if messages.STDERR.isatty() and not quiet:
            self._bar = tqdm(
                total=total, initial=done, desc=job, unit=f" {unit}", dynamic_ncols=True, file=messages.STDERR,
                smoothing=0 if steady else 0.3,
            )  # fmt: skip

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.close()

    def set_postfix(self, text: str) -> None:
        """Show a text after the count from now on."""
        self._postfix = text

    def advance(self, count: int = 1) -> None:
        """Count finished units."""
        self._done += count
        if self._bar:
            self._bar.set_postfix_str(self._postfix, refresh=False)
            self._bar.update(count)
        elif not self._quiet and (time.monotonic() - self._last_shown > self._every_s or self._done == self._total):
            self._log()

    def set_done(self, done: int) -> None:
        """Set the count of finished units, if other processes work on the same job."""
        if done != self._done:
            self.advance(done - self._done)

    def show_alive(self, text: str) -> None:
        """Show a text after the count now and then, for work that takes long between two counts."""
        if not self._quiet and time.monotonic() - self._last_shown > (_REFRESH_S if self._bar else self._every_s):
            self._postfix = text
            if self._bar:
                self._bar.set_postfix_str(text)
                self._last_shown = time.monotonic()
            else:
                self._log()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent here from the rate and the time left: work that is not counted."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self._started += seconds
        if self._bar:
            self._bar.start_t += seconds
            self._bar.last_print_t += seconds

    def info(self, line: str) -> None:
        """Write a line above the bar; nothing with `--quiet`."""
        if not self._quiet:
            messages.info(line)

    def _log(self) -> None:
        self._last_shown = time.monotonic()
        rate = (self._done - self._first) / max(self._last_shown - self._started, 1e-9)
        speed = f", {rate:.3g} {self._unit}/s" if rate else ""
        left = f", {duration_text((self._total - self._done) / rate)} left" if rate and self._done < self._total else ""
        tail = f", {self._postfix}" if self._postfix else ""
        messages.info(f"{self._job}: {self._done}/{self._total} {self._unit}{speed}{left}{tail}")
