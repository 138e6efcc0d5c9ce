"""The files that inputs lie in: opened once in a process, and only if they are still what was listed."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, BinaryIO, cast

from pipeline import storage
from pipeline.data.images import Rejected
from pipeline.errors import DataError

_MASK = (1 << 63) - 1
_TELLING = ("ETag", "etag", "mtime", "LastModified", "last_modified")


def time_stamp(seconds_or_ns: int) -> int:
    """A time of modification as it stands in a listing; those of damaged clocks, too."""
    return seconds_or_ns & _MASK


def remote_stamp(info: dict[str, Any]) -> int:
    """What a store says of a file that differs if its content does; 0 if it says nothing of the kind."""
    told = next((info[key] for key in _TELLING if info.get(key)), None)
    return 0 if told is None else int.from_bytes(blake2b(str(told).encode(), digest_size=8).digest()) & _MASK


class SourceFile:
    """One file, local or remote, that travels to worker processes without its open handle.

    Args:
        url: its name.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.size, self.stamp = _state(url)
        self._place = url
        self._file: BinaryIO | None = None

    def open(self) -> BinaryIO:
        """The file, or what was unpacked from it; the same object each time.

        Raises:
            Rejected: source_changed.
        """
        if self._file is None:
            if self._place == self.url and _state(self.url) != (self.size, self.stamp):
                raise Rejected("source_changed", f"{self.url} was written to since it was listed")
            self._file = storage.open_read(self._place)
        return self._file

    def unpack(self, blocks: Iterable[bytes]) -> BinaryIO:
        """Keep what it holds in a temporary file without a name, for this process and its workers to read instead.

        It lives as long as this process does, however that ends.

        Args:
            blocks: the bytes, in pieces.

        Raises:
            DataError: no space left.
        """
        file = tempfile.TemporaryFile()  # noqa: SIM115  it stays open
        try:
            for block in blocks:
                file.write(block)
            file.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DataError(
                f"{self.url}: no space left in {tempfile.gettempdir()} to unpack it: "
                "make room, or name another place in the environment variable TMPDIR"
            ) from error
        self._place, self._file = f"/proc/{os.getpid()}/fd/{file.fileno()}", cast(BinaryIO, file)
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


class OneFile:
    """What the sources that are a single file have in common.

    Args:
        url: its name.
    """

    parallel = False

    def __init__(self, url: str) -> None:
        self.name = url.rsplit("/", 1)[-1]
        self._file = SourceFile(url)


def _state(url: str) -> tuple[int, int]:
    if storage.is_remote(url):
        info = storage.info(url)
        return int(info["size"] or 0), remote_stamp(info)
    status = os.stat(storage.local(url))
    return status.st_size, time_stamp(status.st_mtime_ns)
