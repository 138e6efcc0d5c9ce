"""Large files that never change, mapped into memory, so that all processes of a node share one copy of their pages.

A file of a remote store is copied to the node's temporary directory first, once for all processes of the user there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.storage import files, local_disk, remote

_UNUSED_S = 7 * 24 * 3600.0
"""A copy that no process has opened for so long is deleted when another is made."""
PIECE_BYTES = 1 << 22
"""Of a file that is sent from node to node."""


class FileReference(NamedTuple):
    """A file, known by its hash."""

    url: str
    """Path or URL."""
    size: int
    """Bytes."""
    sha256: str

    @property
    def is_remote(self) -> bool:
        """Whether the file lies in a remote store, so that nodes need copies."""
        return files.is_remote(self.url)

    @property
    def node_path(self) -> Path:
        """Where this node has the file: its own path, or for a remote file that of the copy."""
        return _directory() / self.sha256 if self.is_remote else files.local(self.url)

    def is_on_node(self) -> bool:
        """Whether this node has the file."""
        return self.node_path.exists()

    def fetch(self) -> None:
        """Check the hash of a local file; copy a remote one to this node, unless the node has it, and check it.

        Raises:
            FileNotFoundError: there is no such file.
            DataError: it is damaged, the store cannot be read, or the temporary directory is full.
        """
        if not self.is_remote:
            self._check(files.sha256(self.url))
            return
        with _lock(self.node_path):
            if not self.is_on_node():
                self.store([remote.complete_range(self.url, 0, self.size)])

    def store(self, pieces: Iterator[bytes] | list[bytes]) -> None:
        """Write the bytes of a remote file to this node, and check their hash.

        Raises:
            DataError: they are damaged, or the temporary directory is full.
        """
        digest = hashlib.sha256()
        with files.publishing(str(self.node_path), durable=False) as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
            self._check(digest.hexdigest())
        _remove_unused()

    def pieces(self) -> Iterator[bytes]:
        """The bytes of a file that this node has, `PIECE_BYTES` at a time."""
        with self.node_path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece

    def map(self) -> NDArray[np.uint8]:
        """The bytes of the file, (size,), read-only. `fetch` has checked the hash, here or in another process.

        Raises:
            FileNotFoundError: there is no such file.
            DataError: it has another size, or as `fetch`.
        """
        if self.is_remote:
            self.fetch()
            with suppress(OSError):
                os.utime(self.node_path)
        with local_disk.open_regular(self.node_path) as file:
            found = os.fstat(file.fileno()).st_size
            if found != self.size:
                raise DataError(f"{self.node_path} has {found} bytes instead of {self.size}: damaged")
            return np.memmap(file, np.uint8, "r").view(np.ndarray)

    def _check(self, sha256: str) -> None:
        if sha256 != self.sha256:
            raise DataError(f"{self.url} does not have the sha256 of the index: damaged")


def _directory() -> Path:
    """The directory of this user's copies, to which other users cannot write."""
    directory = Path(tempfile.gettempdir()) / f"ddpm-{os.getuid()}"
    with local_disk.explained(str(directory)):
        directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o22:
        raise DataError(f"{directory} belongs to another user, or others may write to it: remove it, or set TMPDIR")
    return directory


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Processes of this node enter one at a time; the system releases the lock of a killed one."""
    with path.with_suffix(".lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_unused() -> None:
    for path in _directory().iterdir():
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - _UNUSED_S:
                files.remove(str(path))
