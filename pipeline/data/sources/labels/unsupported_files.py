"""Label files in a format that is not read: the job ends and names them, so that no class is lost in silence."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pipeline.data.sources.inputs import Entries, is_image_name
from pipeline.data.sources.labels.column_names import FILE_NAME_COLUMNS, JSON_LABEL_FIELDS, LABEL_COLUMNS, find_column
from pipeline.data.sources.labels.label_files import LABEL_FILE_NAME, is_beside_image
from pipeline.data.sources.labels.labels_csv import comparable, read_rows
from pipeline.errors import ConfigError, DataError
from pipeline.untrusted import parse_json, printable

_MAX_READ_BYTES = 1 << 24
_MAX_READ_BESIDE = 256  # files beside images, and lines of a .jsonl, that are read
_FIELDS = (*JSON_LABEL_FIELDS, "classes")


@dataclass
class Candidates:
    """The files of a source that may hold labels, as numbers of its entries."""

    known: array[int] = field(default_factory=lambda: array("q"))
    """Label files of a kind that is read."""
    class_texts: array[int] = field(default_factory=lambda: array("q"))
    """`.cls` and the like."""
    texts: array[int] = field(default_factory=lambda: array("q"))
    """CSV and JSON."""
    by_name: array[int] = field(default_factory=lambda: array("q"))
    """Other files with a name such as `labels.mat`."""


def unusable(source: str, path: str, reason: str) -> DataError:
    """The error for a label file that cannot be used."""
    name = printable(f"{source}/{path}")
    return DataError(
        f"{name} gives classes and cannot be used: {printable(reason)}: give its classes as --labels FILE.csv, or "
        "--labels none"
    )


def refuse(source: str, entries: Entries, candidates: Candidates, content: Callable[[int], bytes]) -> None:
    """Refuse label files in a format that is not read.

    Args:
        source: its name.
        entries: of the source.
        candidates: the files that may hold labels.
        content: returns the bytes of an entry.

    Raises:
        DataError: the message names the first such file.
    """
    if not (candidates.texts or candidates.by_name):
        return
    beside, apart = array("q"), array("q")
    for number in candidates.texts:
        (beside if is_beside_image(entries.paths, number, entries.paths[number]) else apart).append(number)
    for number in beside[:: max(1, len(beside) // _MAX_READ_BESIDE)]:
        path = entries.paths[number]
        if entries.sizes[number] <= _MAX_READ_BYTES and (name := _label_field(_json(path, content(number)))):
            raise unusable(source, path, f"{name!a} of a file beside an image is read from a tar only")
    by_name = list(candidates.by_name)

    @cache  # of all paths, so it is made only if a file may state classes
    def names() -> set[str]:
        return {name for path in map(comparable, entries.paths) for name in (path, path.rpartition("/")[2])}

    for number in apart:
        path = entries.paths[number]
        is_read = entries.sizes[number] <= _MAX_READ_BYTES
        if is_read and (reason := _states_classes(path, content(number), names, entries)):
            raise unusable(source, path, reason)
        if LABEL_FILE_NAME.fullmatch(path.rpartition("/")[2]):
            by_name.append(number)
    if by_name and not any("/" in path and is_image_name(path) for path in entries.paths):
        raise unusable(source, entries.paths[by_name[0]], "files of its kind are not read")


def _json(path: str, data: bytes) -> Any:
    """The value of a JSON file, the first values of a .jsonl; None if it is neither."""
    try:
        data = re.sub(rb"\b(NaN|-?Infinity)\b", b"null", data)  # Python writes these
        if not path.lower().endswith(".jsonl"):
            return parse_json(data, path)
        return [parse_json(line, path) for line in data.splitlines()[:_MAX_READ_BESIDE] if line.strip()]
    except DataError:
        return None


def _label_field(value: Any) -> str | None:
    """The field of a JSON object that states a class."""
    if not isinstance(value, dict):
        return None
    fields = {name.lower(): name for name, stated in value.items() if stated is not None}
    return next((fields[name] for name in _FIELDS if name in fields), None)


def _states_classes(path: str, data: bytes, names: Callable[[], set[str]], entries: Entries) -> str:
    """Why a file of an unknown kind states classes of these inputs; empty if it does not."""
    if path.lower().endswith((".csv", ".tsv")):
        return _csv_states_classes(path, data, names, entries)
    value = _json(path, data)
    items: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        if {"images", "annotations"} <= value.keys():
            return "annotations as COCO has them are not read"
        if LABEL_FILE_NAME.fullmatch(path.rpartition("/")[2]) and any(comparable(name) in names() for name in value):
            return "its names and classes are not read"
        items = list(value.items())
        value = [element for item in value.values() if isinstance(item, list) for element in item]
    if isinstance(value, list):
        items += [("", item) for item in value]
    for name, item in items:
        if label := _label_field(item):
            texts = [name, *(text for text in item.values() if isinstance(text, str))]
            if any(comparable(text) in names() for text in texts):
                return f"its field {label!a} is not read"
    return ""


def _csv_states_classes(path: str, data: bytes, names: Callable[[], set[str]], entries: Entries) -> str:
    """Why a table states classes: it has known columns, names inputs, and gives them other classes than directories."""
    try:
        rows = read_rows(data.decode("utf-8-sig"), path)
    except (UnicodeDecodeError, ConfigError):
        return ""
    if not rows:
        return ""
    name, label = find_column(rows[0][1], FILE_NAME_COLUMNS), find_column(rows[0][1], LABEL_COLUMNS)
    if name is None or label is None or name == label:
        return ""
    directories = {comparable(path).rpartition("/")[2]: path.split("/")[-2:-1] for path in entries.paths}
    for _, cells in rows[1:]:
        if len(cells) > max(name, label) and comparable(cells[name]) in names():
            directory = directories.get(comparable(cells[name]).rpartition("/")[2])
            if directory != [cells[label]]:
                return f"give it as --labels {path}: its column {rows[0][1][label]!a} is not read by itself"
    return ""
