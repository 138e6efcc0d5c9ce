"""Parquet tables with a column of pictures, as Hugging Face keeps them: read forward, in batches of some megabytes.

A page is the least that can be read; where a writer has made one of a whole row group, that much is held.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pipeline.data.arrays import by_value, row_names
from pipeline.data.images import Rejected
from pipeline.data.inputs import Entries, Input
from pipeline.data.opened import OneFile, SourceFile
from pipeline.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

_BATCH_BYTES, _BATCH_ROWS = 1 << 23, 256
_BUFFER = 1 << 20
_PICTURES = ("image", "img", "picture", "photo", "jpg", "png", "bytes", "image_bytes", "data")
_LABELS = ("label", "labels", "fine_label", "class", "category", "target", "cls", "y")


class Table(OneFile):
    """A Parquet file.

    Args:
        url: its name.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._column = ""
        self._leaf = ""
        self._first_rows: list[int] = []
        self._rows: _Forward | None = None

    def entries(self, labels: bool, go_on: Callable[[], None]) -> Entries:
        """List its rows: from its footer, and the column of labels if they are wanted."""
        url = self._file.url
        table = _open(self._file)
        try:
            features = _features(table)
            self._column, self._leaf = _picture_column(url, table, features)
            groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
            counts = [group.num_rows for group in groups]
            self._first_rows = [0]
            for count in counts:
                self._first_rows.append(self._first_rows[-1] + count)
            total = self._first_rows[-1]
            found = Entries(by_folder=False, paths=row_names(total), places=array("q", range(total)))
            found.stamps = array("q", [self._file.stamp]) * total
            for group, count in zip(groups, counts):
                found.sizes += array("q", [self._bytes(group) // max(count, 1)]) * count
            if labels and (column := _label_column(url, table, features)):
                values: list[Any] = []
                for batch in table.iter_batches(batch_size=1 << 16, columns=[column]):
                    go_on()
                    values += batch.column(0).to_pylist()
                found.labels, found.classes = by_value(values)
                names = features.get(column, {}).get("names")
                if names and len(names) >= len(found.classes) and not any(isinstance(value, str) for value in values):
                    found.classes = tuple(map(str, names))
        except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are of these
            raise _damaged(url, error) from error
        return found

    def _bytes(self, group: Any) -> int:
        columns = (group.column(i) for i in range(group.num_columns))
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == self._leaf)

    def read(self, item: Input) -> bytes:
        """The picture's bytes."""
        group = bisect_right(self._first_rows, item.place) - 1
        row = item.place - self._first_rows[group]
        if self._rows is None or not self._rows.reaches(group, row):
            size = max(item.size, 1)
            self._rows = _Forward(_open(self._file), group, self._leaf, max(1, min(_BATCH_ROWS, _BATCH_BYTES // size)))
        try:
            data = self._rows.value(row)
        except BaseException:
            self._rows = None
            raise
        if data is None:
            raise Rejected("unreadable", "the row has no bytes, only a path or nothing")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}


class _Forward:
    """One row group's pictures, in batches, from the front."""

    def __init__(self, table: ParquetFile, group: int, leaf: str, rows: int) -> None:
        self._group, self._first = group, 0
        self._batches: Iterator[pyarrow.RecordBatch] = table.iter_batches(rows, row_groups=[group], columns=[leaf])
        self._batch: Any = None

    def reaches(self, group: int, row: int) -> bool:
        return group == self._group and row >= self._first

    def value(self, row: int) -> bytes | None:
        while self._batch is None or row >= self._first + len(self._batch):
            self._first += 0 if self._batch is None else len(self._batch)
            column = next(self._batches).column(0)
            self._batch = column.field(0) if hasattr(column, "field") else column
        value: bytes | None = self._batch[row - self._first].as_py()
        return value


def _open(file: SourceFile) -> ParquetFile:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(f"{file.url}: pip install 'ddpm-pipeline[parquet]' to read it") from error
    try:
        # With a buffer a column of a row group is read page by page, not as a whole.
        return ParquetFile(file.open(), buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)
    except (OSError, ValueError) as error:
        raise _damaged(file.url, error) from error


def _damaged(url: str, error: Exception) -> DataError:
    reason = str(error).split("\n", 1)[0]
    return DataError(f"{url} cannot be read as a Parquet table ({reason}): copy or make it again")


def _features(table: ParquetFile) -> dict[str, dict[str, Any]]:
    """What Hugging Face's `datasets` says of the columns; nothing if it has not written this table."""
    try:
        text = (table.schema_arrow.metadata or {})[b"huggingface"]
        features = json.loads(text)["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _picture_column(url: str, table: ParquetFile, features: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """Name of the column of pictures, and of the part of it that has the bytes."""
    import pyarrow.types as kinds

    leaves = {}
    for field in table.schema_arrow:
        if kinds.is_struct(field.type) and "bytes" in [part.name for part in field.type]:
            leaves[field.name] = f"{field.name}.bytes"
        elif kinds.is_binary(field.type) or kinds.is_large_binary(field.type):
            leaves[field.name] = field.name
    pictures = [name for name, feature in features.items() if feature.get("_type") == "Image" and name in leaves]
    likely = [name for name in _PICTURES if name in (pictures or leaves)]
    candidates = likely[:1] or pictures or list(leaves)
    if len(candidates) != 1:
        held = ", ".join(f"{field.name} {field.type}" for field in table.schema_arrow)
        what = "several columns may be" if candidates else "no column of bytes is"
        raise DataError(f"{url}: {what} the pictures: call one 'image'; it has: {held}")
    return candidates[0], leaves[candidates[0]]


def _label_column(url: str, table: ParquetFile, features: dict[str, dict[str, Any]]) -> str | None:
    """Name of the column of labels: of `datasets`' type for them, else by its name; None if there is none."""
    import pyarrow.types as kinds

    classes = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    plain = [f.name for f in table.schema_arrow if kinds.is_integer(f.type) or kinds.is_string(f.type)]
    likely = [name for name in _LABELS if name in (classes or plain)]
    if not likely and len(classes) > 1:
        raise DataError(f"{url}: {', '.join(classes)} may all be the class: call one 'label', or give --labels none")
    return next(iter(likely or classes), None)
