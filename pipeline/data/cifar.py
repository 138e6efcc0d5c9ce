"""The batches of CIFAR-10 and CIFAR-100 as Krizhevsky published them, binary and pickled.

https://www.cs.toronto.edu/~kriz/cifar.html. A pickle is a program. This one may ask for the three names of which numpy
arrays are made, and is given a stand-in for each that does nothing but remember what it was told.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data.arrays import image_file, row_names
from pipeline.data.images import Rejected
from pipeline.data.inputs import Entries, Input
from pipeline.data.labels import numbered
from pipeline.data.opened import OneFile, SourceFile
from pipeline.errors import DataError

_PIXELS = 3 * 32 * 32  # planes of red, green and blue, rows from the top
_BATCH = re.compile(r"(data_batch_\d+|test_batch|train|test)(\.bin)?")
_MARKS = ("batches.meta", "batches.meta.txt", "meta", "fine_label_names.txt")
_PICKLE = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


class Cifar(OneFile):
    """One batch."""

    def entries(self, labels: bool, go_on: Callable[[], None]) -> Entries:
        """List its pictures, with the names of the classes if they lie beside it."""
        binary = self.name.endswith(".bin")
        places, numbers, fine = _binary(self._file) if binary else _pickled(self._file)
        go_on()
        count = len(numbers)
        found = Entries(
            by_folder=False,
            paths=row_names(count),
            sizes=array("q", [_PIXELS]) * count,
            stamps=array("q", [self._file.stamp]) * count,
            places=places,
        )
        if labels:
            found.labels, found.classes = numbered(numbers)
            names = _names(self._file.url, binary, fine)
            if len(names) >= len(found.classes):
                found.classes = names
        return found

    def read(self, item: Input) -> bytes:
        """The picture as a PPM file."""
        file = self._file.open()
        file.seek(item.place)
        data = file.read(_PIXELS)
        if len(data) != _PIXELS:
            raise Rejected("truncated", f"{len(data)} bytes of {_PIXELS}")
        return image_file(np.frombuffer(data, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0))


def is_batch(url: str) -> bool:
    """Whether a file is one of the batches, by its name and first bytes."""
    name = url.rsplit("/", 1)[-1]
    if name.endswith(".bin"):
        return True
    if not _BATCH.fullmatch(name):
        return False
    with storage.open_read(url) as file:
        return file.read(2) in _PICKLE


def batches(folder: str) -> list[str]:
    """The batches of one of the folders as they are published; none if it is another."""
    if not any(storage.exists(storage.join(folder, mark)) for mark in _MARKS):
        return []
    urls = [storage.join(folder, name) for name in storage.listdir(folder) if _BATCH.fullmatch(name)]
    return [url for url in urls if not storage.is_dir(url) and is_batch(url)]


def _binary(file: SourceFile) -> tuple[array[int], list[int], bool]:
    """Offsets of the pixels, class numbers, and whether these are the hundred fine classes."""
    for head, classes in ((1, 10), (2, 100)):
        if file.size and file.size % (head + _PIXELS) == 0:
            stream = file.open()
            stream.seek(0)
            rows = np.frombuffer(stream.read(), np.uint8).reshape(-1, head + _PIXELS)
            numbers = rows[:, head - 1].tolist()
            if max(numbers) < classes:
                return array("q", range(head, file.size, head + _PIXELS)), numbers, classes == 100
    raise DataError(
        f"{file.url} ({file.size} bytes) is not a CIFAR batch: these are rows of 3073 or 3074 bytes, and the first of "
        "each say its class: copy it again"
    )


def _pickled(file: SourceFile) -> tuple[array[int], list[int], bool]:
    batch = _unpickled(file.url, file.open().read())
    data, fine = _array(batch.get("data")), "fine_labels" in batch
    numbers = batch.get("fine_labels" if fine else "labels")
    if data is None or not isinstance(numbers, list) or len(data) != _PIXELS * len(numbers):
        held = ", ".join(map(str, batch)) or "nothing"
        raise DataError(f"{file.url} is not a CIFAR batch: it holds {held}: copy it again")
    file.unpack([data])
    return array("q", range(0, len(data), _PIXELS)), [int(number) for number in numbers], fine


def _array(value: Any) -> bytes | None:
    """The bytes of a pickled array of uint8, one picture a row."""
    match value:
        case _Told(state=(_, (int(rows), int(width)), _Told(told=("u1" | b"u1", *_)), fortran, bytes(data))):
            if width == _PIXELS and len(data) == rows * width:
                return np.frombuffer(data, np.uint8).reshape(rows, width, order="F" if fortran else "C").tobytes()
    return None


def _names(url: str, binary: bool, fine: bool) -> tuple[str, ...]:
    """The names of the classes, as they lie beside a batch; none if they do not."""
    folder = os.path.dirname(url) or "."
    stem = "fine_label_names" if fine else "batches.meta" if binary else "label_names"
    try:
        if binary:
            text = storage.read_bytes(storage.join(folder, f"{stem}.txt")).decode()
            return tuple(text.split())
        place = storage.join(folder, "meta" if fine else "batches.meta")
        names = _unpickled(place, storage.read_bytes(place)).get(stem, ())
    except FileNotFoundError:
        return ()
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)


class _Told:
    """Stands for a numpy array, or the type of one."""

    def __init__(self, *told: Any) -> None:
        self.told = told
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    _ALLOWED = frozenset(
        ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct", "numpy ndarray", "numpy dtype")
    )

    def find_class(self, module: str, name: str) -> type[_Told]:
        if f"{module} {name}" in self._ALLOWED:
            return _Told
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not run")


def _unpickled(url: str, data: bytes) -> dict[str, Any]:
    try:
        value = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # whatever a damaged program ends with
        raise DataError(f"{url} is not a CIFAR batch ({error}): copy it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{url} is not a CIFAR batch: it holds no names: copy it again")
    return {key.decode() if isinstance(key, bytes) else str(key): part for key, part in value.items()}
