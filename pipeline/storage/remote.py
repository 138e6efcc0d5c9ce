"""Operations on remote stores, repeated after errors until a timeout; and remote files as streams.

The timeout is a minute, or `DDPM_IO_TIMEOUT` seconds. The packages below have shorter retries, which are not counted.
"""

from __future__ import annotations

import errno
import io
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import fsspec
from fsspec.archive import AbstractArchiveFileSystem
from fsspec.core import split_protocol

from pipeline import messages
from pipeline.errors import ConfigError, DataError
from pipeline.processes.background import Background
from pipeline.untrusted import printable

Result = TypeVar("Result")
CachedBlocks = Callable[[int, Callable[[], bytes]], bytes]
BLOCK_BYTES = 1 << 22
"""Of the largest requests, and of a block in the cache of a node, except a file's last one."""
_TIMEOUT_S = 60.0
_NOTE_EVERY_S = 60.0
_LONGEST_PAUSE_S = 8.0
_AHEAD = 1 << 20  # from this length on a block is requested while the one before is consumed
_BUFFER = 1 << 16
_SLOWEST = 1 << 20  # bytes a second: a file that comes more slowly is asked for again
_THREADS = 16
_RESTORE = "restore it from a copy, or run the command that made it again"
_NO_SUCH_RANGE = re.compile(r"InvalidRange|not satisfiable|no byte came|\b416\b", re.IGNORECASE)
_WEB = ("http", "https")
_CHAIN = re.compile(r"::[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_NO_BUCKET = re.compile("bucket does not exist|NoSuchBucket", re.IGNORECASE)
_PERMANENT = (PermissionError, IsADirectoryError, NotADirectoryError, ValueError, ImportError)
_PERMANENT_NAMES = re.compile("Credentials|Authentication|ParamValidation")  # their packages may not be installed


class _CutShort(ValueError):  # noqa: N818
    """A file ends before a byte that it should have."""


class _Retries:
    """Counts how often this process has repeated a remote operation, and prints a message once in a while."""

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
            messages.info(f"retrying {url}: {reason}")


RETRIES = _Retries()


def attempt(url: str, operation: Callable[[fsspec.AbstractFileSystem, str], Result], verb: str = "read") -> Result:
    """Run an operation on a remote store; repeat it after errors, with growing pauses.

    Raises:
        FileNotFoundError: the bucket exists, but not the file; not raised for writing.
        FileExistsError: raised by `operation`.
        DataError: the error is permanent, or has lasted until the timeout.
    """
    fs, path = _filesystem(url)
    fs.invalidate_cache(path)  # of listings: other processes write too
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
                started = time.monotonic()  # the time of the first try does not count, so there is always a second
            pause = min(0.1 * 2**failures, _LONGEST_PAUSE_S) * random.SystemRandom().uniform(0.5, 1.5)
            advice = _advice(error)
            if not advice and time.monotonic() + pause > started + timeout_s:
                advice = f"tried for {timeout_s:g} s; run the same command again when the store works"
            if advice:
                raise DataError(f"cannot {verb} {url}: {reason}: {advice}") from error
            RETRIES.add(url, reason, note=failures == 0)
            time.sleep(pause)
            failures += 1


_ADVICE: tuple[tuple[type[Exception], str], ...] = (
    (FileNotFoundError, "correct the address, or make the bucket"),
    (PermissionError, "give other credentials, or these the right to it"),
    (_CutShort, f"it is cut short or changed: {_RESTORE}"),
)


def _advice(error: Exception) -> str:
    """What to do about a permanent error; empty for errors that may go away."""
    for kind, advice in _ADVICE:
        if isinstance(error, kind):
            return advice
    if "Credentials" in type(error).__name__:
        return "give some, in the environment or a file, as the store's package says (s3: AWS_ACCESS_KEY_ID, …)"
    if isinstance(error, _PERMANENT) or _PERMANENT_NAMES.search(type(error).__name__):
        return "correct the address"
    return ""


def _timeout_s() -> float:
    text = os.environ.get("DDPM_IO_TIMEOUT") or str(_TIMEOUT_S)
    with suppress(ValueError):
        if math.isfinite(seconds := float(text)):
            return seconds
    raise ConfigError(f"DDPM_IO_TIMEOUT is {text!r}: give seconds, such as 60")


def _filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and path of a URL; unlike fsspec's `url_to_fs` it refuses chains of file systems (`a::b`)."""
    nested = f"{printable(url)}: file systems inside others (::) are not supported: give the path of the file itself"
    if _CHAIN.search(url):
        raise ConfigError(nested)
    protocol = split_protocol(url)[0]
    try:
        kind = fsspec.get_filesystem_class(protocol)
        if issubclass(kind, AbstractArchiveFileSystem):
            raise ConfigError(nested)
        fs = fsspec.filesystem(protocol, **kind._get_kwargs_from_urls(url))
        path = kind._strip_protocol(url)
        # A `#` is a part of the name. Unescaped it would begin a fragment, which is not sent to the server.
        return fs, path.replace("#", "%23") if protocol in _WEB else path
    except ImportError as error:
        raise ConfigError(f"{url}: {error}, such as with pip install 'ddpm-pipeline[s3]' (or gcs, azure)") from error
    except (ValueError, TypeError) as error:  # such as a file system that needs more than a URL
        raise ConfigError(f"{url}: {error}: give a local path, or install the fsspec package of this URL") from error


def info(url: str) -> dict[str, Any]:
    """Info of a file or directory: `type`, and `size` in bytes. Raises the same as `attempt`."""
    return attempt(url, lambda fs, path: cast(dict[str, Any], fs.info(path, **_limit(fs))))


def described(listed: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Complete a listing, URL → info: web servers list files without size and time. Missing files stay as listed."""

    def complete(url: str) -> None:
        with suppress(FileNotFoundError):
            listed[url] = info(url)

    incomplete = [url for url, entry in listed.items() if entry["type"] != "directory" and entry.get("size") is None]
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(complete, incomplete))
    return listed


def _limit(fs: fsspec.AbstractFileSystem, size: int = 0) -> dict[str, float]:
    """A timeout for one try: without it aiohttp waits minutes for a store that accepts a request and never answers."""
    return {"timeout": _timeout_s() + size / _SLOWEST} if fs.async_impl else {}


def open_ranges(
    url: str, size: int, first_bytes: int = 1 << 16, cached: CachedBlocks | None = None
) -> io.BufferedReader:
    """Open a remote file of this size. It is read by range requests: one is under way while the last is consumed.

    Args:
        url: the file.
        size: its bytes.
        first_bytes: of the first request, also after a seek; later ones double up to `BLOCK_BYTES`.
        cached: gives block `number` of the file, of `BLOCK_BYTES`: from this node, or by a call of its second argument.
    """
    return io.BufferedReader(_RangedFile(url, size, first_bytes, cached), _BUFFER)


def stream(url: str, offset: int, size: int, cached: CachedBlocks | None = None) -> BinaryIO:
    """Open a remote file to read it from an offset on, in order; returns when the first block is there.

    `size` and `cached` as for `open_ranges`. Raises the same as `attempt`.
    """
    file = open_ranges(url, size, BLOCK_BYTES, cached)
    file.seek(offset)
    file.peek(1)
    return cast(BinaryIO, file)


class _RangedFile(io.RawIOBase):
    """Reads a file in blocks, which grow while it is read in order; it continues where a connection breaks."""

    def __init__(self, url: str, size: int, first_bytes: int, cached: CachedBlocks | None) -> None:
        self._url, self._size, self._cached, self._at = url, size, cached, 0
        self._block = memoryview(b"")  # the bytes from `_at` on that have come and are not consumed
        self._block_at = 0
        self._first_bytes = self._length = first_bytes
        self._next: _Request | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if at < 0:
            raise OSError(errno.EINVAL, "an offset before the file", self._url)
        if self._at <= at <= self._at + len(self._block):
            self._block = self._block[at - self._at :]
        else:
            self._block, self._length, self._next = memoryview(b""), self._first_bytes, None
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        if not self._block and self._at < self._size:
            self._block_at, self._block = self._at, memoryview(self._take())
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._at, self._block = self._at + count, self._block[count:]
        # Not with the block's first bytes: perhaps the file is opened for later reads.
        if self._next is None and self._length >= _AHEAD and self._at > self._block_at + _BUFFER:
            self._next = self._request(self._at + len(self._block))
        return count

    def readall(self) -> bytes:
        self._length = BLOCK_BYTES
        return b"".join(iter(partial(self.read, self._length), b""))

    def _take(self) -> bytes:
        """The block from here on."""
        request = self._next or self._request(self._at)
        assert request is not None
        data = request.data.result()[request.skipped :]
        if len(data) < request.length - request.skipped:
            RETRIES.add(self._url, f"{len(data)} bytes instead of {request.length}", note=True)
        if len(data) > self._size - self._at:
            raise DataError(f"{self._url} has more than {self._size} bytes: damaged or changed: {_RESTORE}")
        self._length = min(2 * self._length, BLOCK_BYTES)
        self._next = None
        return data

    def _request(self, start: int) -> _Request | None:
        """The request for the block from an offset on; None at the end of the file."""
        if start >= self._size:
            return None
        if self._cached is None:
            length = min(self._length, self._size - start)
            asked = length + (
                start + length == self._size
            )  # one byte more at the end, so that a longer file is noticed
            return _Request(Background(partial(read_range, self._url, start, asked)), length)
        number, skipped = divmod(start, BLOCK_BYTES)
        length = min(BLOCK_BYTES, self._size - (start - skipped))
        load = partial(complete_range, self._url, start - skipped, length)
        return _Request(Background(partial(self._cached, number, load)), length, skipped)


class _Request(NamedTuple):
    """One range of a file that is under way."""

    data: Background[bytes]
    length: int
    """Bytes that are expected."""
    skipped: int = 0
    """Bytes at its beginning that are not wanted."""


def read_range(url: str, start: int, length: int) -> bytes:
    """At least one byte of a range, and at most `length`, by one request. Raises the same as `attempt`."""
    return attempt(url, partial(_part, start=start, end=start + length))


def complete_range(url: str, start: int, length: int) -> bytes:
    """All bytes of a range, by one request if its answer is complete. Raises the same as `attempt`."""
    data = read_range(url, start, length)
    while len(data) < length:
        RETRIES.add(url, f"{len(data)} bytes instead of {length}", note=True)
        data += read_range(url, start + len(data), length - len(data))
    return data


def _part(fs: fsspec.AbstractFileSystem, path: str, *, start: int, end: int) -> bytes:
    try:
        data: bytes = fs.cat_file(path, start=start, end=end, **_limit(fs, end - start))
        if not data:
            raise EOFError("no byte came")
    except Exception as error:
        if _NO_SUCH_RANGE.search(str(error)) and (size := _size(fs, path)) is not None and size <= start:
            raise _CutShort(f"it has only {size} bytes") from error
        raise
    if len(data) > end - start:
        raise ValueError("the server gives whole files only, not parts")
    return data


def _size(fs: fsspec.AbstractFileSystem, path: str) -> int | None:
    """Bytes of a file; None if the store does not say it now."""
    with suppress(Exception):
        return cast(int | None, fs.info(path, **_limit(fs))["size"])
    return None
