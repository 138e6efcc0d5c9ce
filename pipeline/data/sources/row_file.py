"""Rows of a listing in a file, in blocks, as a listing may be larger than memory: a reader decodes the blocks it needs.

A block has up to 8,192 rows: their columns of integers, names and rejections, packed with zlib, whose checksum finds
damage. `BlockWriter` appends blocks; the bytes at which they end are the index of the file.
"""

from __future__ import annotations

import json
import struct
import tempfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, cast, overload

import numpy as np
from numpy.typing import NDArray

from pipeline.data.sources.inputs import Entries, Rejection
from pipeline.errors import DataError
from pipeline.storage import local_disk

ROWS = 8192
"""In a block; the fingerprint of a listing is computed over pieces of so many rows."""
_HEAD = struct.Struct("<III")  # rows, bytes of the names, bytes of the rejections
COLUMNS = ("sources", "sizes", "stamps", "offsets", "packed_sizes", "labels")
"""Integers of a row: the number of its source, and what `Entries` and `Input` say of it."""
_LEVEL = 1  # of zlib: a quarter of the bytes at the speed of a disk
_HELD_BLOCKS = 3
_IN_MEMORY = 1 << 21  # bytes of a temporary file up to which no disk is touched


class Block(NamedTuple):
    """Consecutive rows."""

    names: list[str]
    columns: NDArray[np.int64]
    """(6, rows), in the order of `COLUMNS`."""
    rejections: dict[int, Rejection]
    """By row of the block."""

    def column(self, name: str) -> NDArray[np.int64]:
        """One of `COLUMNS`, (rows,)."""
        column: NDArray[np.int64] = self.columns[COLUMNS.index(name)]
        return column

    def part(self, first: int, last: int) -> Block:
        """The rows [first, last)."""
        rejections = {row - first: why for row, why in self.rejections.items() if first <= row < last}
        return Block(self.names[first:last], self.columns[:, first:last], rejections)


def encoded(block: Block) -> bytes:
    """The bytes of a block in a file."""
    text = "".join(block.names).encode("utf-8", "surrogatepass")  # names of files need not be UTF-8
    rejections = json.dumps(list(block.rejections.items())).encode() if block.rejections else b""
    lengths = np.fromiter(map(len, block.names), np.int32, len(block.names))
    head = _HEAD.pack(len(block.names), len(text), len(rejections))
    return zlib.compress(head + lengths.tobytes() + block.columns.tobytes() + text + rejections, _LEVEL)


def decoded(data: bytes) -> Block:
    """The block of these bytes.

    Raises:
        zlib.error, ValueError, struct.error: they are damaged.
    """
    data = zlib.decompress(data)
    rows, text_bytes, rejected_bytes = _HEAD.unpack_from(data)
    at = _HEAD.size
    lengths = np.frombuffer(data, np.int32, rows, at)
    at += lengths.nbytes
    columns = np.frombuffer(data, np.int64, len(COLUMNS) * rows, at).reshape(len(COLUMNS), rows)
    at += columns.nbytes
    text = data[at : at + text_bytes].decode("utf-8", "surrogatepass")
    ends = np.cumsum(lengths).tolist()
    names = [text[start:end] for start, end in zip([0, *ends], ends)]
    rejected = json.loads(data[at + text_bytes :]) if rejected_bytes else []
    return Block(names, columns, {row: Rejection(*why) for row, why in rejected})


class RowFile:
    """The rows of a file, or of a part of it.

    Args:
        file: open for reading; it is shared, and read under a lock.
        ends: where its blocks begin and end, in bytes: (blocks + 1,). All but the last block have `ROWS` rows.
        rows: in all blocks.
        name: of the file in messages.
    """

    def __init__(self, file: BinaryIO, ends: NDArray[np.uint64], rows: int, name: str = "") -> None:
        self._file, self._ends, self._rows, self._name = file, ends, rows, name
        self._held: OrderedDict[int, Block] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._rows

    def block(self, number: int) -> Block:
        """One block; the last few that were asked for are held.

        Raises:
            DataError: it is damaged, or its store cannot be read.
        """
        with self._lock:
            if block := self._held.get(number):
                return block
            block = self._read(number)
            self._held[number] = block
            if len(self._held) > _HELD_BLOCKS:
                self._held.popitem(last=False)
            return block

    def blocks(self) -> Iterator[Block]:
        """All blocks, in order."""
        for number in range(len(self._ends) - 1):
            with self._lock:
                block = self._read(number)
            yield block

    def parts(self, first: int, last: int) -> Iterator[Block]:
        """The rows [first, last), a block or a part of one at a time."""
        while first < last:
            number, start = divmod(first, ROWS)
            block = self.block(number)
            end = min(len(block.names), last - number * ROWS)
            yield block if (start, end) == (0, len(block.names)) else block.part(start, end)
            first = number * ROWS + end

    def copy_to(self, file: BinaryIO) -> None:
        """Append the bytes of all blocks to another file."""
        for number in range(len(self._ends) - 1):
            with self._lock:
                file.write(self._bytes(number))

    @property
    def ends(self) -> NDArray[np.uint64]:
        """Where the blocks begin and end, in bytes from the beginning of the first."""
        ends: NDArray[np.uint64] = self._ends - self._ends[0]
        return ends

    def _bytes(self, number: int) -> bytes:
        start, end = int(self._ends[number]), int(self._ends[number + 1])
        self._file.seek(start)
        return self._file.read(end - start)

    def _read(self, number: int) -> Block:
        try:
            return decoded(self._bytes(number))
        except (zlib.error, ValueError, struct.error, TypeError) as error:
            raise DataError(
                f"{self._name or 'a temporary file'}: the list of inputs is damaged ({error}): remove it, and run the "
                "same command again"
            ) from error


class BlockWriter:
    """Appends blocks to a file, from where it stands."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._ends, self.rows = file, [file.tell()], 0

    def add(self, block: Block) -> None:
        """Append one block. Only the last may have less than `ROWS` rows.

        Raises:
            DataError: no space left.
        """
        data = encoded(block)
        with local_disk.explained(tempfile.gettempdir()):
            self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))
        self.rows += len(block.names)

    def written(self) -> RowFile:
        """The rows so far."""
        return RowFile(self._file, np.array(self._ends, np.uint64), self.rows)


def temporary() -> BinaryIO:
    """A temporary file without a name, in memory while it is small; it disappears with this process."""
    return cast(BinaryIO, tempfile.SpooledTemporaryFile(_IN_MEMORY))


class StoredColumn(Sequence[Any]):
    """The names of a row file, or one of its `COLUMNS`; in order it is read block by block."""

    def __init__(self, rows: RowFile, name: str) -> None:
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> Any: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Any]: ...
    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, int):
            number, row = divmod(range(len(self))[at], ROWS)
            block = self._rows.block(number)
            return block.names[row] if self._name == "names" else int(block.column(self._name)[row])
        first, last, _ = at.indices(len(self))
        parts = [self._of(block) for block in self._rows.parts(first, last)]
        return parts[0] if len(parts) == 1 else [value for part in parts for value in part]

    def __iter__(self) -> Iterator[Any]:
        for block in self._rows.blocks():
            yield from self._of(block)

    def _of(self, block: Block) -> Any:
        return block.names if self._name == "names" else block.column(self._name)


def stored_entries(rows: RowFile, directory: str) -> Entries:
    """The entries of a source that is a directory, sorted; their columns stay in the file.

    Args:
        rows: of the source, sorted by path.
        directory: see `Entries.directory`.
    """
    columns: dict[str, Any] = {name: StoredColumn(rows, name) for name in ("sizes", "stamps", "offsets")}
    paths: Any = StoredColumn(rows, "names")
    return Entries(paths=paths, directory=directory, is_sorted=True, **columns)
