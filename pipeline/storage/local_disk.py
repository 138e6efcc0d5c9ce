"""The local file system: opens regular files only, and turns errors of writing into one-line messages."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipeline import untrusted
from pipeline.errors import DataError

_BUFFER_BYTES = 1 << 16  # with Python's default, 8 KiB, every small image costs a system call
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EPERM}
"""Errors of file systems without fsync: FUSE, CIFS, 9p, some mounts of object stores."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is a device, a pipe, a socket or a directory.
    """
    untrusted.require_regular(path.stat().st_mode, str(path))  # before open: to open a device may have an effect
    file = open(path, "rb", buffering=_BUFFER_BYTES, opener=without_waiting)  # noqa: SIM115  the caller's
    try:
        untrusted.require_regular(os.fstat(file.fileno()).st_mode, str(path))
    except BaseException:
        file.close()
        raise
    return file


def without_waiting(name: str, flags: int) -> int:
    """An opener for `open` that does not block, even if a pipe has replaced the file."""
    return os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)


def sync(descriptor: int) -> None:
    """Flush an open file or directory to the disk, if its file system supports that.

    Raises:
        OSError: the flush has failed.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def free_bytes(path: Path) -> int | None:
    """Bytes that this user may still write below a path, which need not exist; None if unknown."""
    path = path.absolute()
    with explained(str(path)):
        status = os.statvfs(next(directory for directory in (path, *path.parents) if directory.exists()))
    return status.f_bavail * status.f_frsize if status.f_blocks else None


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn the errors of a full or unwritable disk into a DataError of one line."""
    try:
        yield
    except OSError as error:
        reason = {
            errno.ENOSPC: "no space left: free some, then run the same command again",
            errno.EDQUOT: "disk quota exceeded: free some space, then run the same command again",
            errno.EROFS: "the file system is read-only: choose another place",
            errno.EACCES: "permission denied: choose another place or change its permissions",
            errno.ENOTDIR: "a part of this path is a file: choose another place",
            errno.EISDIR: "a directory of this name is in the way: choose another place",
            errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
            errno.EEXIST: "a file of this name is in the way: choose another place",
        }.get(error.errno or 0)
        if reason is None:
            # The block may also read other files; errors of these name another path and are raised as they are.
            path, named = Path(url.removeprefix("file://")), Path(str(error.filename or url))
            if named not in (path, *path.parents) and not named.name.startswith(f".{path.name}."):
                raise
            reason = f"{error.strerror}: choose another place"
        raise DataError(f"cannot write {url}: {reason}") from error
