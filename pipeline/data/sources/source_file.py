"""Files that contain inputs: a process keeps few of them open, and reads them only if unchanged since the listing."""

from __future__ import annotations

import errno
import io
import os
import resource
import struct
import tarfile
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from typing import Any, BinaryIO, cast

from pipeline.data.images.preprocess import Rejected
from pipeline.data.sources import urls
from pipeline.errors import DataError
from pipeline.storage import files
from pipeline.untrusted import Limits, error_text

DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, LookupError,
    OverflowError, NotImplementedError, RuntimeError,
)  # fmt: skip
"""What reading a damaged file raises, as fuzzing found."""
_MASK = (1 << 63) - 1
_VERSION_FIELDS = ("ETag", "etag", "mtime", "LastModified", "last_modified")
_LIMITS = Limits()
_MIN_FREE = 1 << 26  # bytes on the disk that unpacking leaves free
_MOST_OPEN = max(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, 256), 8)


def time_stamp(seconds_or_ns: int) -> int:
    """A time of modification as a stamp, also of a wrong clock."""
    return seconds_or_ns & _MASK


def remote_stamp(info: dict[str, Any]) -> int:
    """A stamp of what a store says of a file: it changes with the content; 0 if the store says nothing that does."""
    version = next((info[key] for key in _VERSION_FIELDS if info.get(key)), None)
    return 0 if version is None else int.from_bytes(blake2b(str(version).encode(), digest_size=8).digest()) & _MASK


@contextmanager
def refuse_damaged(url: str, kind: str, errors: tuple[type[Exception], ...] = DAMAGED) -> Iterator[None]:
    """Turn the errors of reading a damaged file into a DataError.

    Args:
        url: of the file.
        kind: of file, for the message.
        errors: that are caught.
    """
    try:
        yield
    except errors as error:
        raise DataError(f"{url} cannot be read as {kind} ({error_text(error)}): copy or make it again") from error


class SourceFile:
    """One file, local or remote; it is pickled for worker processes without its open handle."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.size, self.stamp = _size_and_stamp(url)
        self._unpacked: tuple[str, int, int] | None = None
        self._file: BinaryIO | None = None
        self._on_close: Callable[[], None] | None = None

    def open(self, on_close: Callable[[], None] | None = None) -> BinaryIO:
        """The file, or its unpacked content; the same object until it is closed because too many are open.

        Args:
            on_close: called when the file is closed; it drops other objects that read from the file.

        Raises:
            Rejected: source_changed.
        """
        if self._file is None:
            if self._unpacked is not None:
                self._file = cast(BinaryIO, io.BufferedReader(_Part(*self._unpacked)))
            else:
                if _size_and_stamp(self.url) != (self.size, self.stamp):
                    raise Rejected("source_changed", f"{self.url} was written to since it was listed")
                self._file = files.open_read(self.url)
        if on_close is not None:
            self._on_close = on_close
        _limit_open(self)
        return self._file

    def close(self) -> None:
        """Drop the open file; the next `open` opens it again."""
        self._file = None  # closed with the last reference: another thread may be reading
        if self._on_close is not None:
            self._on_close()

    def unpack(self, blocks: Iterable[bytes]) -> BinaryIO:
        """Write the unpacked content to a temporary file, which this process and its workers read from then on.

        The file has no name, so it disappears with this process, however the process ends.

        Args:
            blocks: the unpacked content.

        Raises:
            DataError: no space is left, or the content is larger than that of any archive of images.
        """
        store, most = _TEMPORARY.file, _LIMITS.most(self.size)
        start = store.seek(0, os.SEEK_END)
        end = start
        try:
            for block in blocks:
                end += len(block)
                if end - start > most:
                    raise DataError(
                        f"{self.url} unpacks to more than {most:,} bytes, {_LIMITS.ratio} times its own: damaged, or "
                        "made to fill disks; if it is neither, unpack it and give the .tar"
                    )
                self._write(store, block)
        except BaseException:
            with suppress(OSError):
                store.truncate(start)
            _TEMPORARY.close_unused()
            raise
        _TEMPORARY.add_user(self)
        self._unpacked = f"/proc/{os.getpid()}/fd/{store.fileno()}", start, end - start
        self._file = None
        return self.open()

    def _write(self, store: BinaryIO, block: bytes) -> None:
        try:
            status = os.fstatvfs(store.fileno())
            if status.f_blocks and status.f_bavail * status.f_frsize < len(block) + _MIN_FREE:
                raise OSError(errno.ENOSPC, "")
            store.write(block)
            store.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DataError(
                f"{self.url}: no space left in {tempfile.gettempdir()} to unpack it: "
                "free some space, or set the environment variable TMPDIR to another directory"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_on_close": None}


_open: weakref.WeakKeyDictionary[SourceFile, None] = weakref.WeakKeyDictionary()  # in the order of their last use


def _limit_open(file: SourceFile) -> None:
    """Note that a file is in use; if too many are open, close those that were not used for the longest time."""
    _open.pop(file, None)
    _open[file] = None
    while len(_open) > _MOST_OPEN:
        oldest = next(iter(_open))
        del _open[oldest]
        oldest.close()


class _TemporaryFile:
    """One nameless temporary file for all archives of this process: open files are limited, archives may be many."""

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        self._users = 0

    @property
    def file(self) -> BinaryIO:
        if self._file is None:
            self._file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  it stays open
        return self._file

    def add_user(self, user: SourceFile) -> None:
        """Keep the file for as long as this object exists."""
        self._users += 1
        weakref.finalize(user, self._release)

    def close_unused(self) -> None:
        """Close the file, which frees its bytes, if it has no user."""
        if self._users == 0:
            self._file = None

    def _release(self) -> None:
        self._users -= 1
        self.close_unused()


_TEMPORARY = _TemporaryFile()


class _Part(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: str, start: int, size: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  it stays open
        self._start, self._size, self._at = start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if self._at < 0:
            raise OSError(errno.EINVAL, "an offset before the file")
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self._size - self._at, 0)]
        count = os.preadv(self._file.fileno(), [view], self._start + self._at) if len(view) else 0
        self._at += count
        return count


class OneFile:
    """Parent of the sources that are a single file."""

    parallel = False

    def __init__(self, url: str) -> None:
        self.name = urls.name(url)
        self._file = SourceFile(url)


def _size_and_stamp(url: str) -> tuple[int, int]:
    if files.is_remote(url):
        info = files.info(url)
        return int(info["size"] or 0), remote_stamp(info)
    status = os.stat(files.local(url))
    return status.st_size, time_stamp(status.st_mtime_ns)
