"""Messages for users: no other module writes to stdout or stderr. A message that cannot be written is lost silently.

Messages go through the standard logger `ddpm`, so that a program that imports this package can redirect them
(`logging.getLogger("ddpm").handlers`). By default they are plain lines on stderr.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import sys
from contextlib import suppress
from typing import TextIO

from tqdm import tqdm

from pipeline.errors import DataError, printable

_LOGGER = logging.getLogger("ddpm")
_WRITE_ERRORS = (OSError, ValueError)  # a closed pipe, a full disk, a terminal that is gone; a closed stream


class _Stderr:
    """The current stderr as a stream that never raises.

    Lines and progress bars share one object: tqdm writes a line above a bar only if both use the same stream.
    """

    def write(self, text: str) -> None:
        with suppress(*_WRITE_ERRORS):
            if sys.stderr is not None:
                sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(*_WRITE_ERRORS):
            if sys.stderr is not None:
                sys.stderr.flush()

    def isatty(self) -> bool:
        with suppress(*_WRITE_ERRORS):
            return sys.stderr is not None and sys.stderr.isatty()
        return False

    def fileno(self) -> int:  # tqdm asks it for the width of the terminal
        return sys.stderr.fileno()

    @property
    def encoding(self) -> str | None:
        return getattr(sys.stderr, "encoding", None)


STDERR = _Stderr()


class _LineHandler(logging.Handler):
    """Writes plain lines, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(record.getMessage(), file=STDERR)
        STDERR.flush()


def info(text: str) -> None:
    """Write a line about what the job does."""
    _write(logging.INFO, text)


def warning(text: str) -> None:
    """Write a line about something that the user may not want, with `warning: ` before it."""
    _write(logging.WARNING, f"warning: {text}")


def discard(text: str) -> None:
    """Write nothing: what ranks other than 0 call in place of `info` and `warning`, so that each line appears once."""


def error(text: str) -> None:
    """Write the last line of a failed command."""
    _write(logging.ERROR, text)


def _write(level: int, text: str) -> None:
    escaped = "\n".join(map(printable, text.split("\n")))  # text from a file or another package may be part of it
    with suppress(Exception):  # a handler of another program may raise
        _LOGGER.log(level, "%s", escaped)


def result(text: str) -> None:
    """Write the result of a command to stdout.

    Raises:
        DataError: stdout cannot be written.
    """
    try:
        if sys.stdout is None:
            raise OSError("it is closed")
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except _WRITE_ERRORS as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise DataError(f"cannot write the result to standard output: {reason}: write it to another place") from problem


def summary(text: str) -> None:
    """Write a line about a result that is in files to stdout; never raises."""
    with suppress(DataError):
        result(text)


def prepare_streams() -> None:
    """Make stdin, stdout and stderr safe; a command calls this first.

    A closed stream is opened on the null device: otherwise the next file opened gets its number, and C libraries write
    their messages into that file. Text that stdout cannot encode is escaped. At exit, output that cannot be written is
    thrown away: otherwise the interpreter exits with 120.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    atexit.unregister(_flush_streams)  # of an earlier command in this process
    atexit.register(_flush_streams)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            flush_or_discard(stream)


def flush_or_discard(stream: TextIO) -> None:
    """Flush a stream; if it cannot be written, redirect it to the null device."""
    try:
        stream.flush()
    except _WRITE_ERRORS:
        with suppress(*_WRITE_ERRORS):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


_LOGGER.addHandler(_LineHandler())
_LOGGER.setLevel(logging.INFO)
_LOGGER.propagate = False
