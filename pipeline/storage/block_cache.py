"""Blocks of a remote shard set on a disk of the node, shared by all processes there and kept for later starts.

    DIR/SET/ab/HASH-000012   block 12 of the file with this hash, and its crc32
    DIR/SET/used             bytes of the blocks of this set, 8 bytes
    DIR/SET/lock             each process that uses the set holds a shared lock, which the system releases at its end
    DIR/lock                 held for a moment by the process that adds a block

SET and HASH are beginnings of the hashes of a set and of a file, so a block never gets out of date. When the limit is
reached, the sets that no process uses are removed; blocks of a set in use stay, and further ones are not added: an
epoch reads each block once, so to replace one by another would save no request.
"""

from __future__ import annotations

import fcntl
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pipeline import messages
from pipeline.errors import DataError
from pipeline.storage import files, local_disk

_CRC32, _USED = struct.Struct("<I"), struct.Struct("<Q")


class BlockCache:
    """The blocks of one set in the cache of this node. It can be pickled; each process opens the directory itself.

    Args:
        directory: local.
        limit: bytes of all sets in the directory.
        name: of the set.

    Raises:
        DataError: the directory cannot be written.
    """

    def __init__(self, directory: str, limit: int, name: str) -> None:
        self._arguments = directory, limit, name
        self._root, self._limit, self._set = Path(directory), limit, Path(directory) / name
        self._thread_lock = threading.Lock()
        self._turns: dict[Path, threading.Lock] = {}
        self._accepts = True
        with local_disk.explained(directory):
            self._set.mkdir(parents=True, exist_ok=True)
            self._user = _open_lock(self._set)
            if _acquires(self._user, fcntl.LOCK_EX):  # nobody else uses the set: count anew what killed processes left
                self._set_used(self._set, sum(path.stat().st_size for path in self._blocks(remove_temporary=True)))
            fcntl.flock(self._user, fcntl.LOCK_SH)

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockCache, self._arguments

    def get(self, file: str, number: int, load: Callable[[], bytes]) -> bytes:
        """A block of a file.

        Args:
            file: hash of the file.
            number: of the block, from 0.
            load: reads it from the store, if the node does not have it. Its exceptions pass through.
        """
        path = self._set / file[:2] / f"{file[:32]}-{number:06d}"
        with self._thread_lock:
            turn = self._turns.setdefault(path, threading.Lock())
        with turn:  # two lanes of a process may want the same shard at once: one of them loads it
            if (data := self._read(path)) is None:
                data = load()
                if self._accepts:
                    self._add(path, data)
        with self._thread_lock:
            self._turns.pop(path, None)
        return data

    def forget(self, file: str) -> None:
        """Remove the blocks of a file, which are not what its hash says: the store had other bytes when they came."""
        for path in (self._set / file[:2]).glob(f"{file[:32]}-*"):
            files.remove(str(path))

    def _read(self, path: Path) -> bytes | None:
        try:
            data = path.read_bytes()
        except OSError:
            return None
        block, crc32 = data[: -_CRC32.size], data[-_CRC32.size :]
        if len(data) > _CRC32.size and crc32 == _CRC32.pack(zlib.crc32(block)):
            return block
        return None  # damaged by the disk or a power cut

    def _add(self, path: Path, block: bytes) -> None:
        data = block + _CRC32.pack(zlib.crc32(block))
        try:
            if path.exists() or self._has_room(len(data)):  # a damaged block counts already
                files.write_bytes(str(path), data, durable=False)
            else:
                self._accepts = False
        except (DataError, OSError) as error:
            if self._accepts:
                messages.warning(f"data.cache: no more blocks are added by this process: {error}")
            self._accepts = False

    def _has_room(self, size: int) -> bool:
        """Count `size` bytes more, if the limit allows it; sets that nobody uses are removed for it."""
        with self._locked():
            sets = [path for path in self._root.iterdir() if path.is_dir()]
            excess = sum(map(_used, sets)) + size - self._limit
            for other in sorted(sets, key=lambda path: path.stat().st_mtime):
                if excess > 0 and other != self._set:
                    excess -= _remove_unused(other)
            if excess <= 0:
                self._set_used(self._set, _used(self._set) + size)
        return excess <= 0

    def _blocks(self, *, remove_temporary: bool) -> Iterator[Path]:
        for path in self._set.glob("*/*"):
            if not path.name.startswith("."):
                yield path
            elif remove_temporary:
                files.remove(str(path))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One thread of one process of this node at a time."""
        with self._thread_lock, local_disk.explained(str(self._root)), _open_lock(self._root) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @staticmethod
    def _set_used(place: Path, size: int) -> None:
        place.mkdir(exist_ok=True)  # another process may have removed the set just before this one opened its lock
        (place / "used").write_bytes(_USED.pack(size))


def _open_lock(place: Path) -> IO[bytes]:
    return (place / "lock").open("ab")


def _acquires(file: IO[bytes], kind: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    return False


def _used(place: Path) -> int:
    """Bytes of the blocks of a set; 0 if its first process is just beginning."""
    with suppress(OSError, struct.error):
        return int(_USED.unpack((place / "used").read_bytes())[0])
    return 0


def _remove_unused(place: Path) -> int:
    """Remove a set, unless a process uses it; returns the bytes that are free now."""
    with suppress(OSError), _open_lock(place) as file:
        if _acquires(file, fcntl.LOCK_EX):
            size = _used(place)
            files.remove(str(place))
            return size
    return 0
