"""Label files among the inputs of a directory or archive: read the known kinds, refuse the others.

Known are `dataset.json` of StyleGAN and EDM, and `metadata.csv`, `.jsonl` or `.parquet` of an imagefolder of
`datasets`; names in them are relative to the directory that they lie in. Label files stay inputs and end in
`rejected.jsonl`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.images.preprocess import Rejected
from pipeline.data.sources.inputs import NO_LABEL, Entries, Input, Source, is_image_name
from pipeline.data.sources.junk_files import is_junk
from pipeline.data.sources.keys import split
from pipeline.data.sources.labels.column_names import FILE_NAME_COLUMNS, LABEL_COLUMNS, find_column
from pipeline.data.sources.labels.label_encoder import LabelEncoder
from pipeline.data.sources.labels.label_files import (
    LABEL_FILE_NAME,
    METADATA,
    STYLEGAN,
    TABLES,
    name_and_ending,
    neighbours,
)
from pipeline.data.sources.labels.labels_csv import comparable, read_rows
from pipeline.data.sources.labels.sample_label import is_class_text
from pipeline.data.sources.labels.unsupported_files import Candidates, refuse, unusable
from pipeline.data.sources.tar import Tar
from pipeline.errors import ConfigError, DataError
from pipeline.untrusted import parse_json, printable

_TEXTS = TABLES | {".json"}
_MAX_BYTES = 1 << 28
_SPLIT = re.compile(r"(train|training|test|testing|val|valid|validation|dev|eval|data)([-_.].*)?", re.IGNORECASE)


@dataclass
class _LabelFile:
    """The content of one label file."""

    path: str
    directory: str
    """Directory that its names are relative to, with a slash at its end, or empty."""
    labels: list[tuple[str, Any, int]] | None
    """File name, label and row number; None if the file has no labels."""
    other_columns: str = ""
    covers_subdirectories: bool = True
    """Without labels: no input in any directory below has its directory as its class, else none beside the file."""


def read_labels(source: Source, number: int, entries: Entries, check_stop: Callable[[], None]) -> None:
    """Set the labels of entries from the label files among them, if there are any.

    Args:
        source: open for reading.
        number: of the source in the listing.
        entries: of the source, which has no class labels of its own.
        check_stop: called now and then; may raise.

    Raises:
        DataError: a label file cannot be used; the message names it.
    """
    candidates = _candidates(entries)

    def content(entry: int) -> bytes:
        check_stop()
        return _content(source, number, entries, entry)

    label_files = _read_known(source.name, entries, candidates.known, content)
    if label_files:
        _set_labels(source.name, entries, label_files)
        return
    if candidates.class_texts and not isinstance(source, Tar):
        for entry in candidates.class_texts:
            path = entries.paths[entry]
            if path.lower().endswith(".cls") or _shares_key(entries, entry):  # Java's files end with .class, too
                raise unusable(source.name, path, f"a {path[path.rfind('.') :]} file is read from a tar only")
    refuse(source.name, entries, candidates, content)


def _shares_key(entries: Entries, entry: int) -> bool:
    """Whether an image has the key of an entry."""
    key = split(entries.paths[entry])[0]
    return any(is_image_name(path) and split(path)[0] == key for path in neighbours(entries.paths, entry, key + "."))


def _candidates(entries: Entries) -> Candidates:
    candidates = Candidates()
    for number, path in enumerate(entries.paths):
        if is_image_name(path) or is_junk(path):
            continue
        name, ending = name_and_ending(path)
        if name in METADATA:
            candidates.known.append(number)
        elif is_class_text(path):
            candidates.class_texts.append(number)
        elif ending in _TEXTS:
            candidates.texts.append(number)
        elif LABEL_FILE_NAME.fullmatch(name):
            candidates.by_name.append(number)
    return candidates


def _content(source: Source, number: int, entries: Entries, entry: int) -> bytes:
    path, size = entries.paths[entry], entries.sizes[entry]
    packed_size = entries.packed_sizes[entry] if entries.packed_sizes else 0
    if size > _MAX_BYTES:
        raise unusable(source.name, path, f"it has {size} bytes, the limit is {_MAX_BYTES}")
    item = Input(path, None, number, path, size, entries.stamps[entry], entries.offsets[entry], packed_size)
    try:
        return source.read(item)
    except Rejected as rejected:
        raise unusable(source.name, path, rejected.detail or rejected.reason) from rejected
    except (OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise unusable(source.name, path, str(error)) from error


def _read_known(
    source: str, entries: Entries, numbers: Iterable[int], content: Callable[[int], bytes]
) -> list[_LabelFile]:
    """One label file for each directory that has one; a file with labels before a file without."""
    by_directory: dict[str, _LabelFile] = {}
    for number in numbers:
        path = entries.paths[number]
        data = content(number)
        try:
            file = _stylegan(path, data) if path.lower().endswith(STYLEGAN) else _imagefolder(path, data)
        except (ConfigError, DataError) as error:
            raise DataError(f"{printable(source)}/{error}, or give --labels none") from error
        if file is None:
            continue
        other = by_directory.get(file.directory)
        if other and other.labels is not None and file.labels is not None:
            raise DataError(
                f"{printable(other.path)} and {printable(path)} both give classes: remove one, or give --labels none"
            )
        if other is None or other.labels is None:
            by_directory[file.directory] = file
    return list(by_directory.values())


def _stylegan(path: str, data: bytes) -> _LabelFile | None:
    """`{"labels": [["00000/img00000000.png", 6], …]}`, or null; None if the file is of another program."""
    value = parse_json(data, path)
    if not isinstance(value, dict) or "labels" not in value:
        return None
    directory, labels = path[: path.rfind("/") + 1], value["labels"]
    if labels is None:
        return _LabelFile(path, directory, None, "its labels are null")
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise DataError(f"{printable(path)}: its labels are not pairs of a name and a class: correct it")
    return _LabelFile(path, directory, [(name, label, row) for row, (name, label) in enumerate(pairs)])


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)


def _imagefolder(path: str, data: bytes) -> _LabelFile | None:
    """`metadata.*`; None if the file has no column of file names, or no labels and lies in a directory of a class."""
    directory = path[: path.rfind("/") + 1]
    columns, rows = _table(path, data)
    name, label = find_column(columns, FILE_NAME_COLUMNS), find_column(columns, LABEL_COLUMNS)
    if name is None or name == label:
        return None
    if label is not None:
        return _LabelFile(path, directory, [(str(cells[name]), cells[label], row) for row, cells in rows])
    if directory and not _SPLIT.fullmatch(directory[:-1].rpartition("/")[2]):
        return None
    others = ", ".join(column for number, column in enumerate(columns) if number != name)
    return _LabelFile(path, directory, None, f"no column called label ({others})", covers_subdirectories=False)


def _table(path: str, data: bytes) -> tuple[list[str], Iterator[tuple[int, list[Any]]]]:
    """The columns of a table, and its rows with their numbers."""
    if path.lower().endswith(".parquet"):
        from pipeline.data.sources.parquet import read_table

        return read_table(path, io.BytesIO(data))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{printable(path)} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    if path.lower().endswith(".jsonl"):
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        first = parse_json(lines[0][1], f"{path}, line {lines[0][0]}") if lines else {}
        columns = list(first) if isinstance(first, dict) else []
        return columns, ((number, _cells(path, number, line, columns)) for number, line in lines)
    rows = read_rows(text, path)
    columns = rows[0][1] if rows else []
    return columns, ((line, cells + [""] * (len(columns) - len(cells))) for line, cells in rows[1:])


def _cells(path: str, number: int, line: str, columns: list[str]) -> list[Any]:
    value = parse_json(line, f"{path}, line {number}")
    if not isinstance(value, dict):
        raise DataError(f"{printable(path)}: line {number} is not an object: correct it")
    return [value.get(column) for column in columns]


def _set_labels(source: str, entries: Entries, label_files: list[_LabelFile]) -> None:
    """Label the inputs that the files name; if no file has labels, note which inputs have no class."""
    with_labels = [file for file in label_files if file.labels is not None]
    if not with_labels:
        _set_without_class(entries, label_files)
        return
    names = ", ".join(printable(file.path) for file in with_labels[:3]) + " and others" * (len(with_labels) > 3)
    encoder = LabelEncoder(f"{source}/{names}")
    codes = np.full(len(entries.paths), NO_LABEL, np.int64)
    entry_of = {comparable(path): number for number, path in enumerate(entries.paths)}
    for file in with_labels:
        matched = False
        assert file.labels is not None
        for name, label, row in file.labels:
            number = entry_of.get(comparable(file.directory + name.removeprefix("./")))
            if number is None:
                entries.unmatched_rows += 1
                continue
            code, earlier = encoder.code(label, row), codes[number]
            if earlier != NO_LABEL and not encoder.same_class(int(earlier), code):
                raise DataError(
                    f"{printable(file.path)}: {name!a} has two classes, {encoder.text(int(earlier))} and "
                    f"{encoder.text(code)}: keep one, or give --labels none"
                )
            codes[number] = code
            matched = True
        if file.labels and not matched:
            raise unusable(source, file.path, f"not one of its names, such as {file.labels[0][0]!a}, is a file here")
    entries.labels, entries.classes = encoder.class_numbers(codes)
    entries.labels_from = names


def _set_without_class(entries: Entries, label_files: list[_LabelFile]) -> None:
    """An image that a label file without labels covers does not take the name of its directory as its class."""
    entries.labels_from = "; ".join(printable(f"{file.path}: {file.other_columns}") for file in label_files[:3])
    beside = {file.directory.rstrip("/") for file in label_files}
    below = tuple(file.directory for file in label_files if file.covers_subdirectories)
    entries.without_class = lambda path: path.rpartition("/")[0] in beside or bool(below and path.startswith(below))
