"""Parquet tables with a column of images, as Hugging Face writes them: read forward, in batches of some megabytes.

A page is the smallest unit that can be read; if a writer made one page of a row group, the row group is held in memory.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from pipeline.data.images.preprocess import Rejected
from pipeline.data.sources.inputs import NO_LABEL, Entries, Input
from pipeline.data.sources.labels.column_names import CERTAIN_LABEL_COLUMNS, IMAGE_COLUMNS, LABEL_COLUMNS, normalized
from pipeline.data.sources.labels.label_encoder import ClassNumbers, LabelEncoder
from pipeline.data.sources.numpy_file import row_names
from pipeline.data.sources.source_file import DAMAGED, OneFile, SourceFile, refuse_damaged
from pipeline.errors import ConfigError, DataError
from pipeline.processes import pool
from pipeline.untrusted import error_text, parse_json, printable

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

_BATCH_BYTES, _BATCH_ROWS = 1 << 23, 256
_BUFFER = 1 << 20
_MAX_PROCESSES = 4
_DAMAGED = (*DAMAGED, TypeError, MemoryError)
_KIND = "a Parquet table"
_LABELS = frozenset((*CERTAIN_LABEL_COLUMNS, *LABEL_COLUMNS))


class Table(OneFile):
    """A Parquet file."""

    _column, _leaf = "", ""
    """The column of images, and the path of its part that has the bytes."""
    _first_rows: Sequence[int] = ()
    """The first row of each row group, and the number of all rows."""
    _rows: _ImageRows | None = None

    def entries(self, labels: bool, check_stop: Callable[[], None]) -> Entries:
        """List its rows: from its footer, and from the column of labels if they are wanted."""
        url = self._file.url
        table = _open(self._file)
        with refuse_damaged(url, _KIND, _DAMAGED):
            features = _features(table)
            self._column, self._leaf = _image_column(url, table, features)
            groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
            self._refuse_empty(table.metadata.num_rows, sum(map(self._image_bytes, groups)))
            self._first_rows = np.cumsum([0, *(group.num_rows for group in groups)]).tolist()
            entries = Entries.of_rows(row_names(self._first_rows[-1]), 0, self._file.stamp)
            means = [self._image_bytes(group) // max(group.num_rows, 1) for group in groups]
            entries.sizes = array("q", np.repeat(np.array(means, np.int64), np.diff(self._first_rows)).tobytes())
            if labels and (column := _label_column(url, table, self._column, features)):
                names = features.get(column, {}).get("names")
                entries.labels, entries.classes = read_labels(url, table, column, names, check_stop)
                entries.labels_from = f"column {column} of {self.name}"
            elif labels:
                others = ", ".join(field.name for field in table.schema_arrow if field.name != self._column)
                entries.labels_from = f"{self.name} has no column called label ({others or 'only images'})"
        return entries

    def _refuse_empty(self, rows: int, image_bytes: int) -> None:
        """Refuse a table with less than a byte for each row, rather than reject every row."""
        if rows > min(self._file.size, image_bytes):
            raise DataError(
                f"{self._file.url}: {rows} rows in {self._file.size} bytes, so its column {printable(self._column)} "
                "is empty or has equal values only: make it again with images"
            )

    def _image_bytes(self, group: Any) -> int:
        columns = (group.column(i) for i in range(group.num_columns))
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == self._leaf)

    def read(self, item: Input) -> bytes:
        """The image's bytes."""
        group = bisect_right(self._first_rows, item.offset) - 1
        row = item.offset - self._first_rows[group]
        if self._rows is None or not self._rows.reaches(group, row):
            batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(item.size, 1)))
            self._rows = _ImageRows(_open(self._file, self._close_rows), group, self._leaf, batch_rows)
        try:
            data = self._rows.value(row)
        except (*_DAMAGED, StopIteration) as error:
            self._rows = None
            raise Rejected("unreadable", error_text(error)) from error
        if data is None:
            raise Rejected("unreadable", "the row has no bytes, only a path or nothing")
        return data

    def _close_rows(self) -> None:
        self._rows = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}


def list_tables(tables: Sequence[Table], labels: bool, check_stop: Callable[[], None]) -> list[Entries]:
    """List tables in processes of their own, as a damaged table can crash the process that opens it.

    Args:
        tables: their columns and row groups are set.
        labels: whether their labels are wanted.
        check_stop: called several times a second; may raise.

    Raises:
        DataError: as `Table.entries`, or Arrow has crashed two processes.
    """

    def stop() -> bool:
        check_stop()
        return False

    listed = pool.run(
        _list, ([table] for table in tables), setup=partial(bool, labels), workers=min(len(tables), _MAX_PROCESSES),
        stop=stop, on_worker_death=_refuse, cpu_limit_s=pool.NO_LIMIT_S,
    )  # fmt: skip
    all_entries = []
    for table, ((entries, state),) in zip(tables, listed):
        table.__dict__.update(state)
        all_entries.append(entries)
    return all_entries


def _list(
    labels: bool, tables: Sequence[Table], check_stop: Callable[[], None]
) -> Iterator[tuple[Entries, dict[str, Any]]]:
    for table in tables:
        try:
            yield table.entries(labels, check_stop), table.__getstate__()
        except Rejected as error:  # the table was written to meanwhile
            raise DataError(f"{error.detail}: run the same command again when it is complete") from error


def _refuse(table: Table, exit_code: int) -> tuple[Entries, dict[str, Any]]:
    with refuse_damaged(table._file.url, _KIND):
        raise RuntimeError(f"Arrow ends its process with exit code {exit_code}")


class _ImageRows:
    """The images of one row group, read in batches from the front."""

    def __init__(self, table: ParquetFile, group: int, leaf: str, batch_rows: int) -> None:
        self._group, self._first = group, 0
        self._batches: Iterator[pyarrow.RecordBatch] = table.iter_batches(
            batch_rows, row_groups=[group], columns=[leaf]
        )
        self._batch: Any = None

    def reaches(self, group: int, row: int) -> bool:
        """Whether a row is in this row group and not behind."""
        return group == self._group and row >= self._first

    def value(self, row: int) -> bytes | None:
        """The image in a row."""
        while self._batch is None or row >= self._first + len(self._batch):
            self._first += 0 if self._batch is None else len(self._batch)
            column = next(self._batches).column(0)
            self._batch = column.field(0) if hasattr(column, "field") else column
        value: bytes | None = self._batch[row - self._first].as_py()
        return value


def _open(file: SourceFile, on_close: Callable[[], None] | None = None) -> ParquetFile:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(f"{file.url}: pip install 'ddpm-pipeline[parquet]' to read it") from error
    # With a buffer a column is read page by page, not a row group at once.
    with refuse_damaged(file.url, _KIND, _DAMAGED):
        return ParquetFile(file.open(on_close), buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)


def _features(table: ParquetFile) -> dict[str, dict[str, Any]]:
    """The features of the columns, as Hugging Face's `datasets` writes them; empty for other tables."""
    try:
        text = (table.schema_arrow.metadata or {})[b"huggingface"]
        features = parse_json(text, "the metadata of datasets")["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (DataError, KeyError, TypeError, AttributeError):
        return {}


def _value_type(kind: pyarrow.DataType) -> pyarrow.DataType:
    """The type of a column's values, without dictionary encoding and extension types."""
    import pyarrow.types as kinds

    if kinds.is_dictionary(kind):
        return _value_type(kind.value_type)
    return _value_type(kind.storage_type) if hasattr(kind, "storage_type") else kind


def _is_bytes(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as kinds

    kind = _value_type(kind)
    return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind))


def _columns(url: str, table: ParquetFile) -> dict[str, str]:
    """The names of the columns, by their names in lower case.

    Raises:
        DataError: two names are equal in lower case.
    """
    names = [field.name for field in table.schema_arrow]
    by_lower = {name.lower(): name for name in names}
    if len(by_lower) < len(names):
        twice = next(name for name in names if by_lower[name.lower()] != name or names.count(name) > 1)
        raise DataError(f"{url}: two columns have the name {printable(twice)}, small or capital: rename one")
    return by_lower


def _image_column(url: str, table: ParquetFile, features: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """Name of the column of images, and path of its part that has the bytes.

    Raises:
        DataError: no column or several columns may be the images.
    """
    import pyarrow.types as kinds

    leaves = {}
    by_lower = _columns(url, table)
    for field in table.schema_arrow:
        kind = _value_type(field.type)
        if kinds.is_struct(kind) and any(part.name == "bytes" and _is_bytes(part.type) for part in kind):
            leaves[field.name] = f"{field.name}.bytes"
        elif _is_bytes(field.type) and normalized(field.name) not in _LABELS:
            leaves[field.name] = field.name
    images = [name for name, feature in features.items() if feature.get("_type") == "Image" and name in leaves]
    likely = [by_lower[name] for name in IMAGE_COLUMNS if by_lower.get(name) in (images or leaves)]
    candidates = likely[:1] or images or list(leaves)
    if len(candidates) != 1:
        columns = printable(", ".join(f"{field.name} {field.type}" for field in table.schema_arrow))
        problem = "several columns may be" if candidates else "no column of bytes is"
        raise DataError(f"{url}: {problem} the images: call one 'image'; it has: {columns}")
    return candidates[0], leaves[candidates[0]]


def _label_column(url: str, table: ParquetFile, image: str, features: dict[str, dict[str, Any]]) -> str | None:
    """Name of the column of labels: by its name, or by the type that `datasets` gives labels; None if there is none.

    Raises:
        DataError: several columns may be the labels.
    """
    names = [name for name in _columns(url, table).values() if name != image]
    certain_name = next((known for known in CERTAIN_LABEL_COLUMNS if known in map(normalized, names)), None)
    certain = [name for name in names if normalized(name) == certain_name]
    typed = [name for name in names if _is_class_label(features.get(name))]
    candidates = certain or typed or [name for name in names if normalized(name) in _LABELS]
    if len(candidates) > 1:
        several = printable(", ".join(candidates))
        raise DataError(f"{url}: {several} may all be the class: call one 'label', or give --labels none")
    return next(iter(candidates), None)


def _is_class_label(feature: Any) -> bool:
    """Whether `datasets` declares a column as classes, or as lists of classes."""
    while isinstance(feature, dict) and "feature" in feature:
        feature = feature["feature"]
    return isinstance(feature, dict) and feature.get("_type") == "ClassLabel"


def read_labels(url: str, table: ParquetFile, column: str, names: Any, check_stop: Callable[[], None]) -> ClassNumbers:
    """Read the classes in a column of labels.

    Args:
        url: of the table.
        table: open.
        column: its name.
        names: class names by number, as `datasets` writes them; anything but a list is ignored.
        check_stop: called now and then; may raise.

    Raises:
        DataError: the type of the column, or one of its values, is not one class.
    """
    import pyarrow
    import pyarrow.types as kinds

    encoder = LabelEncoder(f"{url}: column {column}")
    kind = _value_type(table.schema_arrow.field(column).type)
    text = kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)
    if not (text or _is_bytes(kind) or kinds.is_primitive(kind) or kinds.is_decimal(kind) or kinds.is_null(kind)):
        raise DataError(
            f"{printable(encoder.source)} is of {printable(str(kind))}: a label is one whole number from 0 for each "
            "image, or one name: correct it, or give --labels none"
        )
    codes, row = array("q"), 0
    for batch in table.iter_batches(batch_size=1 << 16, columns=[column]):
        check_stop()
        values = batch.column(0)
        while hasattr(values, "storage"):  # an extension type
            values = values.storage
        if not kinds.is_dictionary(values.type):
            if text or kinds.is_null(kind):
                values = values.cast(pyarrow.large_string())
            elif kinds.is_float16(kind):
                values = values.cast(pyarrow.float32())
            values = values.dictionary_encode()
        indices = values.indices.fill_null(len(values.dictionary)).to_numpy(zero_copy_only=False).astype(np.int64)
        first = dict(zip(*(part.tolist() for part in np.unique(indices, return_index=True))))
        known = [
            encoder.code(value, row + first[index]) if index in first and value is not None else NO_LABEL
            for index, value in enumerate(values.dictionary.to_pylist())
        ]
        codes.frombytes(np.array([*known, NO_LABEL], np.int64)[indices].tobytes())
        row += len(values)
    class_names = tuple(map(str, names)) if isinstance(names, list) and not text else None
    return encoder.class_numbers(np.frombuffer(codes, np.int64), class_names)


def read_table(path: str, file: BinaryIO) -> tuple[list[str], Iterator[tuple[int, list[Any]]]]:
    """The columns of a small table, and its rows with their numbers.

    Raises:
        DataError: the file is no table.
    """
    from pyarrow.parquet import ParquetFile

    with refuse_damaged(path, _KIND, _DAMAGED):
        table = ParquetFile(file).read()
        return table.column_names, ((row, [*values]) for row, values in enumerate(zip(*table.to_pydict().values())))
