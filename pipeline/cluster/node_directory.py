"""A directory of one start of a run on one node: its ranks share it, and no other node sees it.

It lies in memory (/dev/shm), or in the directory for temporary files where there is no /dev/shm. What is written here
costs the storage of the run nothing. Ranks that cannot see each other's files, such as those of containers with a /tmp
of their own, count as different nodes; so does a rank that can write to neither place.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape, glob
from typing import BinaryIO

from pipeline.errors import PipelineError
from pipeline.storage import files

MEMORY = "/dev/shm"  # noqa: S108
"""File system in the memory of a node."""
_PREFIX = "ddpm-start-"
_RECORD = re.compile(r"(\d{5,})\.json")
_PRESENCE = "presence.lock"
_UNUSED_S = 60.0
"""Age from which a directory whose presence lock nobody holds belongs to no rank that is about to take the lock."""
_POLL_S = 0.1


class NodeDirectory:
    """The files that the ranks of a node share. Nothing here raises where the node has no place for files.

    Args:
        start: identifies the start of the run, the same on all ranks.
    """

    def __init__(self, start: str) -> None:
        self._base = MEMORY if os.access(MEMORY, os.W_OK | os.X_OK) else tempfile.gettempdir()
        self._path = os.path.join(self._base, f"{_PREFIX}{start}-{socket.gethostname()}")
        self._presence: BinaryIO | None = None

    def enter(self) -> None:
        """Show that this rank uses the directory; remove those of earlier starts that nobody uses."""
        self._remove_unused()
        with suppress(OSError):
            os.makedirs(self._path, exist_ok=True)
            self._presence = open(os.path.join(self._path, _PRESENCE), "ab")  # noqa: SIM115
            fcntl.flock(self._presence, fcntl.LOCK_SH)

    def leave(self) -> None:
        """Remove the directory if this rank is the last one to use it."""
        if self._presence:
            with self._presence, suppress(PipelineError, OSError):
                fcntl.flock(self._presence, fcntl.LOCK_EX | fcntl.LOCK_NB)
                files.remove(self._path)

    def write(self, name: str, data: bytes) -> bool:
        """Write a whole file atomically; returns whether it is written."""
        with suppress(PipelineError, OSError):
            files.write_bytes(os.path.join(self._path, name), data, durable=False)
            return True
        return False

    def read(self, name: str) -> bytes | None:
        """Read a whole file; None if there is none."""
        with suppress(PipelineError, OSError):
            return files.read_bytes(os.path.join(self._path, name))
        return None

    def write_record(self, rank: int, data: bytes) -> bool:
        """Replace the record of a rank; returns whether it is written."""
        return self.write(f"{rank:05d}.json", data)

    def records(self) -> dict[int, bytes]:
        """The record of each rank that has written one, in ascending order of ranks."""
        read = {rank: self.read(f"{rank:05d}.json") for rank in sorted(self.versions())}
        return {rank: data for rank, data in read.items() if data is not None}

    def versions(self) -> dict[int, tuple[int, int]]:
        """Of each rank's record a value that changes when the record is written; the records are not read."""
        found = {}
        with suppress(OSError), os.scandir(self._path) as entries:
            for entry in entries:
                if match := _RECORD.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        status = os.stat(entry.path)
                        found[int(match[1])] = status.st_ino, status.st_mtime_ns
        return found

    @contextmanager
    def turn(self, what: str, limit_s: float) -> Iterator[None]:
        """Let one rank of the node at a time into the block.

        The lock of a process that ends is free at once. One that is frozen keeps it, so after `limit_s` seconds the
        next rank enters all the same.
        """
        with ExitStack() as stack:
            with suppress(OSError):
                os.makedirs(self._path, exist_ok=True)
                lock = stack.enter_context(open(os.path.join(self._path, f"{what}.lock"), "ab"))
                until = time.monotonic() + limit_s
                while not _locks(lock) and time.monotonic() < until:
                    time.sleep(_POLL_S)
            yield

    def _remove_unused(self) -> None:
        for path in glob(os.path.join(escape(self._base), f"{_PREFIX}*")):
            with suppress(PipelineError, OSError):
                if path != self._path and time.time() - os.stat(path).st_mtime > _UNUSED_S:
                    with open(os.path.join(path, _PRESENCE), "ab") as presence:
                        fcntl.flock(presence, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        files.remove(path)


def _locks(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
