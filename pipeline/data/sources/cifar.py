"""The batches of CIFAR-10 and CIFAR-100 as Krizhevsky published them, binary and pickled.

https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np

from pipeline.data.images.preprocess import Rejected
from pipeline.data.sources import urls
from pipeline.data.sources.inputs import Entries, Input
from pipeline.data.sources.labels.label_encoder import from_numbers
from pipeline.data.sources.numpy_file import image_file, row_names
from pipeline.data.sources.source_file import OneFile, SourceFile
from pipeline.errors import DataError
from pipeline.restricted_unpickler import PickledStub, unpickled
from pipeline.storage import files
from pipeline.untrusted import error_text

_PIXELS = 3 * 32 * 32  # planes of red, green and blue, rows from the top
_BATCH = re.compile(r"(data_batch_\d+|test_batch|train|test)(\.bin)?")
_META_FILES = ("batches.meta", "batches.meta.txt", "meta", "fine_label_names.txt")
_ROWS_AT_ONCE = 1 << 12
_MAX_PICKLED = 1 << 30
_NAMES = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct", "numpy ndarray", "numpy dtype")
_PICKLE = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


class Cifar(OneFile):
    """One batch."""

    def entries(self, labels: bool, check_stop: Callable[[], None]) -> Entries:
        """List its images, with the class names if their file lies beside the batch."""
        is_binary = self.name.endswith(".bin")
        offsets, numbers, is_fine = _list_binary(self._file) if is_binary else _list_pickled(self._file)
        check_stop()
        entries = Entries.of_rows(row_names(len(numbers)), _PIXELS, self._file.stamp)
        entries.offsets = offsets
        if labels:
            entries.labels, entries.classes = from_numbers(numbers)
            names = _class_names(self._file.url, is_binary, is_fine)
            if len(names) >= len(entries.classes):
                entries.classes = names
            entries.labels_from = self.name
        return entries

    def read(self, item: Input) -> bytes:
        """The image as a PPM file."""
        file = self._file.open()
        file.seek(item.offset)
        data = file.read(_PIXELS)
        if len(data) != _PIXELS:
            raise Rejected("truncated", f"{len(data)} bytes of {_PIXELS}")
        return image_file(np.frombuffer(data, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0))


def is_batch(url: str) -> bool:
    """Whether a file is a batch, by its name and first bytes."""
    name = urls.name(url)
    if name.endswith(".bin"):
        return True
    if not _BATCH.fullmatch(name):
        return False
    with files.open_read(url) as file:
        return file.read(2) in _PICKLE


def batches(directory: str) -> list[str]:
    """The batches in a directory as it is published; none in another directory."""
    if not any(files.exists(files.join(directory, name)) for name in _META_FILES):
        return []
    paths = [files.join(directory, name) for name in files.listdir(directory) if _BATCH.fullmatch(name)]
    return [path for path in paths if not files.is_dir(path) and is_batch(path)]


def _list_binary(file: SourceFile) -> tuple[array[int], list[int], bool]:
    """Offsets of the pixels, class numbers, and whether these are the fine classes of CIFAR-100."""
    for head, classes in ((1, 10), (2, 100)):
        if file.size and file.size % (head + _PIXELS) == 0:
            numbers = _labels(file, head)
            if max(numbers) < classes:
                return array("q", range(head, file.size, head + _PIXELS)), numbers, classes == 100
    raise DataError(
        f"{file.url} ({file.size} bytes) is not a CIFAR batch: these are rows of 3073 or 3074 bytes, and the first of "
        "each say its class: copy it again"
    )


def _labels(file: SourceFile, head: int) -> list[int]:
    """The last byte in front of each image, read in pieces: a batch may be larger than memory."""
    stream, numbers = file.open(), bytearray()
    stream.seek(0)
    while rows := stream.read(_ROWS_AT_ONCE * (head + _PIXELS)):
        numbers += rows[head - 1 :: head + _PIXELS]
    return list(numbers)


def _list_pickled(file: SourceFile) -> tuple[array[int], list[int], bool]:
    if file.size > _MAX_PICKLED:
        raise DataError(
            f"{file.url} is not a CIFAR batch: {file.size} bytes, the limit is {_MAX_PICKLED}: copy it again"
        )
    stream = file.open()
    stream.seek(0)
    batch = _unpickled(file.url, stream.read())
    data, is_fine = _array(batch.get("data")), "fine_labels" in batch
    numbers = batch.get("fine_labels" if is_fine else "labels")
    if data is None or not _are_classes(numbers) or len(data) != _PIXELS * len(numbers):
        held = ", ".join(batch) or "nothing"
        raise DataError(f"{file.url} is not a CIFAR batch: it holds {held}: copy it again")
    file.unpack([data])
    return array("q", range(0, len(data), _PIXELS)), numbers, is_fine


def _are_classes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 100 for number in value)


def _array(value: Any) -> bytes | None:
    """The bytes of a pickled array of uint8, one image a row."""
    match value:
        case PickledStub(
            state=(_, (int(rows), int(width)), PickledStub(arguments=("u1" | b"u1", *_)), fortran, bytes(data))
        ):
            if width == _PIXELS and len(data) == rows * width:
                return np.frombuffer(data, np.uint8).reshape(rows, width, order="F" if fortran else "C").tobytes()
    return None


def _class_names(url: str, is_binary: bool, is_fine: bool) -> tuple[str, ...]:
    """The class names in the file beside a batch; empty if there is no such file."""
    directory = os.path.dirname(url) or "."
    stem = "fine_label_names" if is_fine else "batches.meta" if is_binary else "label_names"
    try:
        if is_binary:
            text = files.read_bytes(files.join(directory, f"{stem}.txt")).decode("utf-8", "replace")
            return tuple(text.split())
        path = files.join(directory, "meta" if is_fine else "batches.meta")
        names = _unpickled(path, files.read_bytes(path)).get(stem, ())
    except FileNotFoundError:
        return ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str | bytes) for name in names):
        raise DataError(f"{path} does not name the classes: copy it again, or remove it")
    return tuple(_text(name) for name in names)


def _text(name: str | bytes) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name


def _unpickled(url: str, data: bytes) -> dict[str, Any]:
    try:
        value = unpickled(data, dict.fromkeys(_NAMES, PickledStub), encoding="bytes")
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{url} is not a CIFAR batch ({error_text(error)}): copy it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{url} is not a CIFAR batch: it holds no names: copy it again")
    return {_text(key): part for key, part in value.items() if isinstance(key, str | bytes)}
