"""One operation on a remote store, repeated until it is done, cannot heal or has not healed in time; and its streams.

The time is a minute, or `DDPM_IO_TIMEOUT` seconds. Packages below have retries of their own, shorter and uncounted.
"""

from __future__ import annotations

import errno
import io
import math
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.core import url_to_fs

from pipeline.errors import ConfigError, DataError

Result = TypeVar("Result")
_TIMEOUT_S = 60.0
_NOTE_EVERY_S = 60.0
_LONGEST_PAUSE_S = 8.0
_READ_AHEAD = 1 << 16, 1 << 23  # bytes of a request: the first after a jump, and the largest
_BUFFER = 1 << 20
_NO_BUCKET = re.compile("bucket does not exist|NoSuchBucket", re.IGNORECASE)
_HOPELESS = (PermissionError, IsADirectoryError, NotADirectoryError, ValueError, ImportError)
_HOPELESS_NAMES = re.compile("Credentials|Authentication|ParamValidation")  # of packages that may not be installed


class _Retries:
    """How often this process has repeated a remote operation, and when it last said so."""

    def __init__(self) -> None:
        self.count = 0
        self._noted_at = -math.inf
        self._lock = threading.Lock()

    def add(self, url: str, reason: str, *, note: bool) -> None:
        with self._lock:
            self.count += 1
            note = note and time.monotonic() >= self._noted_at + _NOTE_EVERY_S
            if note:
                self._noted_at = time.monotonic()
        if note:
            sys.stderr.write(f"retrying {url}: {reason}\n")


RETRIES = _Retries()


def attempt(url: str, operation: Callable[[fsspec.AbstractFileSystem, str], Result], verb: str = "read") -> Result:
    """Do something remote, again if it fails, with growing pauses.

    Raises:
        FileNotFoundError: unless on writing; the store and the bucket are there, though.
        FileExistsError: as `operation` says.
        DataError: it cannot heal, or has not in time.
    """
    fs, path = _filesystem(url)
    fs.invalidate_cache(path)  # of listings: others write too
    started, timeout_s, failures = 0.0, _timeout_s(), 0
    while True:
        try:
            return operation(fs, path)
        except (FileExistsError, TypeError, NotImplementedError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, FileNotFoundError) and verb != "write" and not _NO_BUCKET.search(reason):
                raise
            if failures == 0:
                started = time.monotonic()  # however long the first try took, there is a second
            pause = min(0.1 * 2**failures, _LONGEST_PAUSE_S) * random.SystemRandom().uniform(0.5, 1.5)
            advice = _advice(error)
            if not advice and time.monotonic() + pause > started + timeout_s:
                advice = f"tried for {timeout_s:g} s; run the same command again when the store is well"
            if advice:
                raise DataError(f"cannot {verb} {url}: {reason}: {advice}") from error
            RETRIES.add(url, reason, note=failures == 0)
            time.sleep(pause)
            failures += 1


def _advice(error: Exception) -> str:
    """What to do about an error that repetition cannot heal; nothing for the others."""
    if isinstance(error, FileNotFoundError):
        return "correct the address, or make the bucket"
    if isinstance(error, PermissionError):
        return "give other credentials, or these the right to it"
    if "Credentials" in type(error).__name__:
        return "give some, in the environment or a file, as the store's package says (s3: AWS_ACCESS_KEY_ID, …)"
    if isinstance(error, _HOPELESS) or _HOPELESS_NAMES.search(type(error).__name__):
        return "correct the address"
    return ""


def _timeout_s() -> float:
    text = os.environ.get("DDPM_IO_TIMEOUT", str(_TIMEOUT_S))
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"DDPM_IO_TIMEOUT is {text!r}: give seconds, such as 60") from error


def _filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return cast(tuple[fsspec.AbstractFileSystem, str], url_to_fs(url))
    except ImportError as error:
        raise ConfigError(f"{url}: {error}, such as with pip install 'ddpm-pipeline[s3]' (or gcs, azure)") from error
    except ValueError as error:
        raise ConfigError(f"{url}: {error}: name a local path or a URL whose fsspec package is installed") from error


def info(url: str) -> dict[str, Any]:
    """What a store says of a file or directory: `type`, and `size` in bytes.

    Raises:
        FileNotFoundError: there is none.
        DataError: as `attempt`.
    """
    return attempt(url, lambda fs, path: cast(dict[str, Any], fs.info(path, **_limit(fs))))


def _limit(fs: fsspec.AbstractFileSystem) -> dict[str, float]:
    """An end to one try, too: the retries below would wait minutes for a store that accepts and never answers."""
    return {"timeout": _timeout_s()} if fs.async_impl else {}


def stream(url: str, size: int) -> BinaryIO:
    """A file of this size, read by ranges in blocks."""
    return cast(BinaryIO, io.BufferedReader(_RangedFile(url, size), _BUFFER))


class _RangedFile(io.RawIOBase):
    """Knows its place and its end, so that a stream which breaks or ends early is taken up again where it was good."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._at = url, size, 0
        self._ahead, self._most = _READ_AHEAD

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if at < 0:
            raise OSError(errno.EINVAL, "a place before the file", self._url)
        if at != self._at:
            self._at, self._ahead = at, _READ_AHEAD[0]
        return at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._ahead, self._size - self._at)
        if wanted <= 0:
            return 0
        data = attempt(self._url, partial(_part, start=self._at, end=self._at + wanted))
        if len(data) < wanted:
            RETRIES.add(self._url, f"{len(data)} bytes instead of {wanted}", note=True)
        buffer[: len(data)] = data
        self._at += len(data)
        self._ahead = min(2 * self._ahead, self._most)
        return len(data)

    def readall(self) -> bytes:
        self._ahead = self._most
        return b"".join(iter(partial(self.read, self._most), b""))


def _part(fs: fsspec.AbstractFileSystem, path: str, *, start: int, end: int) -> bytes:
    data: bytes = fs.cat_file(path, start=start, end=end, **_limit(fs))
    if not data:
        raise EOFError("no byte came")
    if len(data) > end - start:
        raise ValueError("the server gives whole files only, not parts")
    return data
