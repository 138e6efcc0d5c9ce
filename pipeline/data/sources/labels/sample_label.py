"""The class of one webdataset sample: the text of its `.cls` (`.label`, `.class` …), else a field of its `.json`.

`ddpm shard` and `ddpm index` both read it here, so they find the same classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from pipeline.data.sources.keys import Sample, kind, split
from pipeline.data.sources.labels.column_names import JSON_LABEL_FIELDS
from pipeline.data.sources.labels.label_encoder import MAX_NAME, class_of, shown
from pipeline.errors import DataError
from pipeline.untrusted import parse_json, printable

Label: TypeAlias = "int | str | None"
"""A class number, a class name, or no label."""
MAX_LABEL_BYTES = 1 << 22
_CLASS_EXTENSIONS = frozenset(("cls", "label", "labels", "class", "category", "target"))
_MAX_CLASS_NUMBER = 2**31 - 1
_FIELD = re.compile(rb'"(?:%s)"\s*:' % "|".join(JSON_LABEL_FIELDS).encode(), re.IGNORECASE)
_NUMBER = re.compile(rb"\s*[-+]?\d+(\.0*)?\s*")
_FIX = "correct it, or give --labels none"
_NO_FIELD = object()


def is_class_text(path: str) -> bool:
    """Whether the text of a member is a class: `000.cls`, `000.label`, `000.cls.txt`."""
    *_, before, last = ["", *split(path)[1].split(".")]
    return last in _CLASS_EXTENSIONS or (last == "txt" and before in _CLASS_EXTENSIONS)


def _is_json(path: str) -> bool:
    return kind(path).lower() == "json"


def read_label(sample: Sample, paths: Sequence[str], read: Callable[[int], bytes], archive: str) -> Label:
    """Read the class of a sample.

    Args:
        sample: the sample.
        paths: of all members of its key.
        read: returns the bytes of the n-th of these members, at most `MAX_LABEL_BYTES` + 1.
        archive: name of the archive in messages.

    Raises:
        DataError: a member that states the class cannot be understood, or two members contradict each other.
    """
    for states_class, parse in ((is_class_text, _parse_text), (_is_json, _parse_json)):
        for level in sample.companions:
            labels: dict[str, Any] = {}
            for number in level:
                if states_class(paths[number]):
                    try:
                        label = parse(read(number))
                    except ValueError as error:
                        raise DataError(f"{_name(archive, paths[number])}: {printable(str(error))}: {_FIX}") from error
                    if label is not _NO_FIELD:
                        _refuse_contradiction(archive, paths, paths[number], label, labels)
            if labels:
                first: Label = next(iter(labels.values()))
                return first
    return None


def _refuse_contradiction(
    archive: str, paths: Sequence[str], path: str, label: Label, labels: dict[str, Label]
) -> None:
    for other, other_label in labels.items():
        if other_label != label:
            both = f"is class {other_label!a} by {printable(other)} and {label!a} by {printable(path)}"
            raise DataError(f"{_name(archive, paths[0])} {both}: keep one, or give --labels none")
    labels[path] = label


def _name(archive: str, path: str) -> str:
    return printable(f"{archive}: {path}" if archive else path)


def _parse_text(data: bytes) -> Label:
    """The class in a `.cls`; raise ValueError if its text is no class."""
    if len(data) > MAX_NAME * 4:
        raise ValueError(f"{len(data)} bytes or more are no class number and no name")
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{data[:20]!r} is not text") from error
    return _parse_value(text)


def _parse_json(data: bytes) -> Any:
    """The class in a `.json`, `_NO_FIELD` if it has no field for one; raise ValueError if the field is no class."""
    if not (_FIELD.search(data) or _NUMBER.fullmatch(data)):
        return _NO_FIELD
    if len(data) > MAX_LABEL_BYTES:
        raise ValueError(f"more than {MAX_LABEL_BYTES} bytes are not searched for a class")
    try:
        value = parse_json(re.sub(rb"\bNaN\b", b"null", data), "it")
    except DataError as error:
        raise ValueError(f"it has a field for the class, but {error}") from error
    if not isinstance(value, dict):
        return _parse_value(value) if isinstance(value, int | float) else _NO_FIELD
    fields = {name.lower(): name for name in reversed(value)}
    name = next((fields[name] for name in JSON_LABEL_FIELDS if name in fields), None)
    if name is None:
        return _NO_FIELD
    try:
        return _parse_value(value[name])
    except ValueError as error:
        raise ValueError(f"{name!r} {error}") from error


def _parse_value(value: Any) -> Label:
    if isinstance(value, list | dict):
        raise ValueError(f"{shown(value)} is not one class")
    try:
        label = class_of(int(value) if isinstance(value, bool) else value)
    except ValueError as error:
        raise ValueError(f"{shown(value)} {error}") from error
    if isinstance(label, int) and label > _MAX_CLASS_NUMBER:
        raise ValueError(f"{shown(value)} is no class number: the greatest is {_MAX_CLASS_NUMBER}")
    return label
