"""The shards of a set in columns: one buffer of about 115 bytes a shard, mapped from a file or packed from records.

With S shards, little-endian:

    samples         S × u64
    bytes           S × u64   of the tar
    name_ends       S × u64   where each name ends in `names`; it begins where the one before ends
    sha256          S × 32    of the tar
    sidecar_sha256  S × 32
    names           UTF-8; a sidecar that does not lie beside its tar follows the name after a zero byte
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards.record import SAMPLE_BYTES, ShardRecord
from pipeline.errors import DataError
from pipeline.storage.mapped_file import FileReference
from pipeline.untrusted import MAX_COUNT, is_allowed, name_inside, printable

_FIXED = 3 * 8 + 2 * 32  # bytes of a shard without its name
_AT_ONCE = 1 << 14  # shards whose hashes are made into text together
_TABLE = "the table of shards"


def pack_table(records: Iterable[ShardRecord]) -> tuple[bytes, int]:
    """The table of these shards, in the layout above, and their number."""
    columns = tuple(array("Q") for _ in range(3))
    hashes, sidecar_hashes, names = bytearray(), bytearray(), bytearray()
    for record in records:
        name = record.name if record.sidecar is None else f"{record.name}\0{record.sidecar}"
        names += name.encode(errors="surrogatepass")
        for column, number in zip(columns, (record.samples, record.bytes, len(names))):
            column.append(number)
        hashes += bytes.fromhex(record.sha256)
        sidecar_hashes += bytes.fromhex(record.sidecar_sha256)
    numbers = (np.asarray(column, "<u8").tobytes() for column in columns)
    return b"".join([*numbers, hashes, sidecar_hashes, names]), len(columns[0])


class ShardTable(Sequence[ShardRecord]):
    """The shards of a set, in their order; a record is made when it is asked for, with an empty `extra`.

    A table in a file is mapped at its first use. Pickled, it is a reference to this file, so worker processes do not
    receive a copy.

    Args:
        source: the table, or the file that holds it.
        count: number of shards.
        locations: directories and URL prefixes outside of the set in which its tars may lie.
    """

    def __init__(self, source: bytes | FileReference, count: int, locations: tuple[str, ...] = ()) -> None:
        self._source = source
        self._count, self._locations = count, locations

    @staticmethod
    def of(records: Iterable[ShardRecord], locations: tuple[str, ...] = ()) -> ShardTable:
        """A table in memory."""
        return ShardTable(*pack_table(records), locations)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and np.array_equal(self._data, other._data)

    __hash__ = None  # type: ignore[assignment]  # by identity it would not fit __eq__

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardTable, (self._source, self._count, self._locations)

    @property
    def file(self) -> FileReference | None:
        """The file that holds the table; None if it is in memory."""
        return self._source if isinstance(self._source, FileReference) else None

    def check(self, samples: int) -> None:
        """Check the sizes of the columns, and the numbers in them.

        Args:
            samples: of the set.

        Raises:
            DataError: the table is damaged.
        """
        names = self._data.size - _FIXED * self._count
        if names < 0 or not self._names_take(names):
            raise DataError(f"{_TABLE} has another size than its columns need: damaged")
        if (self.samples > self.bytes // SAMPLE_BYTES).any() or self.bytes.max(initial=0) > MAX_COUNT:
            raise DataError(f"{_TABLE} has more samples than fit into the bytes of a shard: damaged")
        if int(self.samples.sum()) != samples:
            raise DataError("`samples` is not the sum over the shards: damaged")

    def _names_take(self, size: int) -> bool:
        ends = self._column(2)
        return not self._count or (int(ends[-1]) == size and bool((ends[1:] >= ends[:-1]).all()))

    def release(self) -> None:
        """Give back the memory of pages that a check has read; the next use maps the file again."""
        if self.file:
            self.__dict__.pop("_data", None)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> ShardRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ShardRecord]: ...
    def __getitem__(self, index: int | slice) -> ShardRecord | Sequence[ShardRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        i = range(self._count)[index]
        name, sidecar = self._name(i)
        if not is_allowed(name, self._locations):
            raise DataError(f"{_TABLE} names {printable(name)}, outside of the set, where it may not lie")
        return ShardRecord(
            name=name,
            bytes=int(self.bytes[i]),
            sha256=bytes(self.hashes[i]).hex(),
            samples=int(self.samples[i]),
            sidecar_sha256=bytes(self._hash_column(1)[i]).hex(),
            extra={},
            sidecar=name_inside(sidecar, _TABLE) if sidecar else None,
        )

    def __iter__(self) -> Iterator[ShardRecord]:
        return map(self.__getitem__, range(self._count))

    def names(self) -> Iterator[tuple[str, str | None]]:
        """Name and sidecar of each shard, without a check of where they lead."""
        return map(self._name, range(self._count))

    def _name(self, i: int) -> tuple[str, str | None]:
        ends = self._column(2)
        first, last = (int(ends[i - 1]) if i else 0), int(ends[i])
        try:
            text = self._data[_FIXED * self._count :][first:last].tobytes().decode(errors="surrogatepass")
        except UnicodeDecodeError as error:
            raise DataError(f"{_TABLE}: the name of shard {i} is not UTF-8: damaged") from error
        name, _, sidecar = text.partition("\0")
        return name, sidecar or None

    @property
    def samples(self) -> NDArray[np.uint64]:
        """Samples in each shard, (S,)."""
        return self._column(0)

    @property
    def bytes(self) -> NDArray[np.uint64]:
        """Bytes of each tar, (S,)."""
        return self._column(1)

    @property
    def hashes(self) -> NDArray[np.uint8]:
        """SHA-256 of each tar, (S, 32)."""
        return self._hash_column(0)

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """The numbers at which the samples of each shard end, counted over the set, (S,)."""
        return np.cumsum(self.samples, dtype=np.int64)

    def with_sha256(self, sha256: str) -> list[int]:
        """The shards whose tar has this hash."""
        wanted = np.frombuffer(bytes.fromhex(sha256), np.uint8)
        return np.flatnonzero((self.hashes == wanted).all(axis=1)).tolist()

    def hex_hashes(self) -> Iterator[str]:
        """The hashes of the tars as text, many in one string."""
        for first in range(0, self._count, _AT_ONCE):
            yield self.hashes[first : first + _AT_ONCE].tobytes().hex()

    @cached_property
    def _data(self) -> NDArray[np.uint8]:
        return self.file.map() if self.file else np.frombuffer(cast(bytes, self._source), np.uint8)

    def _column(self, number: int) -> NDArray[np.uint64]:
        width = 8 * self._count
        return self._data[number * width : (number + 1) * width].view("<u8")

    def _hash_column(self, number: int) -> NDArray[np.uint8]:
        first = (3 * 8 + 32 * number) * self._count
        return self._data[first : first + 32 * self._count].reshape(self._count, 32)


class ShardSizes(Sequence[int]):
    """The number of samples in each shard of a table; `numpy` reads them without a copy of the table."""

    def __init__(self, table: ShardTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        found: int | list[int] = self._table.samples[index].tolist()
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self._table.samples, dtype=dtype) if copy is not False else self._table.samples
