"""Arrays of pictures, `.npy` and `.npz`, read row by row; each row leaves as an image file's bytes.

N, H, W, C: pictures, height, width, channels. Nothing pickled is read.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pipeline.data import png
from pipeline.data.images import Rejected
from pipeline.data.inputs import NO_LABEL, Entries, Input
from pipeline.data.labels import Labelled, named, numbered
from pipeline.data.opened import OneFile
from pipeline.errors import DataError

_CHANNELS = (1, 3, 4)
_SPLITS = re.compile(r"train(ing)?|test(ing)?|val(id(ation)?)?|extra")
_PARTNERS = (("images", "labels"), ("image", "label"), ("imgs", "labels"), ("data", "labels"), ("data", "label"),
             ("x", "y"), ("X", "y"), ("arr_0", "arr_1"))  # fmt: skip
_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError)


class _Header(NamedTuple):
    """Of an array in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    data_at: int
    """Bytes in front of the values."""

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {self.shape}".strip()

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def problem(self) -> str:
        """Why it is no array of pictures; empty if it is one."""
        if self.dtype.kind != "u" or self.dtype.itemsize > 2:
            return "not uint8 or uint16: convert it"
        if len(self.shape) == 3 and self.shape[2] in _CHANNELS:
            return "one picture, or many that are a few pixels wide: write (N, H, W, C)"
        ends = [len(self.shape) == 4 and self.shape[axis] in _CHANNELS for axis in (1, 3)]
        if not (len(self.shape) == 3 or any(ends)) or 0 in self.shape[1:]:
            return "not of the shape (N, H, W), (N, H, W, C) or (N, C, H, W) with 1, 3 or 4 channels"
        if all(ends):
            return "of a shape whose channels are first or last: write (N, H, W, C) with larger pictures"
        return "in Fortran's order: save numpy.ascontiguousarray of it" if self.fortran else ""

    def picture(self, data: bytes) -> bytes:
        """An image file's bytes, of a row's."""
        if len(data) != self.row_bytes:
            raise Rejected("truncated", f"{len(data)} bytes of {self.row_bytes}")
        row = np.frombuffer(data, self.dtype).reshape(self.shape[1:])
        return image_file(row if row.ndim == 2 or row.shape[2] in _CHANNELS else row.transpose(1, 2, 0))


def image_file(picture: NDArray[Any]) -> bytes:
    """PGM, PPM, or for transparency PNG, none of them compressed.

    Args:
        picture: (H, W) or (H, W, C) with 1, 3 or 4 channels; uint8 or uint16, whose white is 65535.
    """
    h, w, channels = picture.shape if picture.ndim == 3 else (*picture.shape, 1)
    bits = 8 * picture.dtype.itemsize
    values = picture.astype(f">u{picture.dtype.itemsize}", copy=False)
    if channels != 4:
        return b"P%d %d %d %d\n" % (5 if channels == 1 else 6, w, h, (1 << bits) - 1) + values.tobytes()
    lines = b"".join(b"\0" + line.tobytes() for line in values)  # 0: a line that is not filtered
    return png.assembled(w, h, bits, png.RGBA, zlib.compress(lines, 0))


def row_names(count: int, folder: str = "") -> list[str]:
    """Numbers with zeros in front, so that the order of the names is that of the rows."""
    width = len(str(count - 1))
    return [f"{folder}{row:0{width}}" for row in range(count)]


def _header(file: IO[bytes], name: str) -> _Header:
    read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return _Header(name, shape, dtype, fortran, file.tell())


class Npy(OneFile):
    """One array, read at a row's offset."""

    def entries(self, labels: bool, go_on: Callable[[], None]) -> Entries:
        """List its rows; they have no labels."""
        url = self._file.url
        try:
            header = _header(self._file.open(), "")
        except _DAMAGED as error:
            raise DataError(f"{url} is not an array that numpy has saved ({error}): copy or make it again") from error
        if problem := header.problem():
            raise DataError(f"{url} is {header}: {problem}")
        count = header.shape[0]
        if self._file.size < header.data_at + count * header.row_bytes:
            raise DataError(f"{url} is cut short: its header tells of {count} rows of {header.row_bytes} bytes")
        self._header = header
        return _entries([header], [self._file.stamp], ("",))

    def read(self, item: Input) -> bytes:
        """The row as an image file."""
        file = self._file.open()
        file.seek(self._header.data_at + item.place * self._header.row_bytes)
        return self._header.picture(file.read(self._header.row_bytes))


class Npz(OneFile):
    """Arrays in a zip archive, packed or not: read forward, since what is packed has no random access.

    Args:
        url: its name.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._headers: list[_Header] = []
        self._first_rows: list[int] = []
        self._stream: tuple[str, IO[bytes]] | None = None
        self._damaged_from: dict[str, int] = {}

    def entries(self, labels: bool, go_on: Callable[[], None]) -> Entries:
        """List the rows of its arrays of pictures, with the labels that belong to them."""
        url = self._file.url
        try:
            with zipfile.ZipFile(self._file.open()) as archive:
                headers, crcs = {}, {}
                for member in archive.infolist():
                    go_on()
                    with archive.open(member) as stream:
                        header = _header(stream, member.filename.removesuffix(".npy"))
                    headers[header.name], crcs[header.name] = header, member.CRC
                self._headers = _pictures(url, headers)
                self._first_rows = np.cumsum([0, *(header.shape[0] for header in self._headers)]).tolist()
                several = len(self._headers) > 1
                folders = [f"{header.name}/" if several else "" for header in self._headers]
                found = _entries(self._headers, [crcs[header.name] for header in self._headers], folders)
                if labels and (values := [_labels(archive, header, headers, url) for header in self._headers]):
                    _set_labels(found, values, self._headers)
        except _DAMAGED as error:
            raise DataError(f"{url} cannot be read as arrays of numpy ({error}): copy or make it again") from error
        return found

    def read(self, item: Input) -> bytes:
        """The row as an image file."""
        number = bisect_right(self._first_rows, item.place) - 1
        header, row = self._headers[number], item.place - self._first_rows[number]
        if row >= self._damaged_from.get(header.name, header.shape[0]):
            raise Rejected("unreadable", "the archive is damaged before it")
        try:
            stream = self._opened(header.name)
            stream.seek(header.data_at + row * header.row_bytes)
            return header.picture(stream.read(header.row_bytes))
        except _DAMAGED:
            self._damaged_from[header.name], self._stream = row, None
            raise

    def _opened(self, name: str) -> IO[bytes]:
        if self._stream is None or self._stream[0] != name:
            self._stream = name, zipfile.ZipFile(self._file.open()).open(f"{name}.npy")  # noqa: SIM115  kept
        return self._stream[1]


def _entries(headers: Sequence[_Header], stamps: Sequence[int], folders: Sequence[str]) -> Entries:
    found = Entries(by_folder=False)
    for header, stamp, folder in zip(headers, stamps, folders):
        count = header.shape[0]
        found.paths += row_names(count, folder)
        found.sizes += array("q", [header.row_bytes]) * count
        found.stamps += array("q", [stamp]) * count
    found.places = array("q", range(len(found.paths)))
    return found


def _pictures(url: str, headers: dict[str, _Header]) -> list[_Header]:
    """The arrays that hold pictures: one, or those of training, test and the like."""
    pictures = [header for header in headers.values() if not header.problem()]
    if len({_SPLITS.sub("", header.name) for header in pictures}) == 1:
        return pictures
    names = ", ".join(map(str, headers.values())) or "nothing"
    if pictures:
        raise DataError(f"{url} holds {names}: several arrays may be the pictures: save one alone, as .npy")
    reasons = {header.problem() for header in headers.values() if len(header.shape) > 2}
    raise DataError(f"{url} holds {names}: no array of pictures: {'; '.join(sorted(reasons)) or 'uint8, (N, H, W, C)'}")


def _labels(archive: zipfile.ZipFile, pictures: _Header, headers: dict[str, _Header], url: str) -> NDArray[Any] | None:
    """The array that says of what classes the pictures are, by its name, or the only one of that length."""
    count = pictures.shape[0]
    names = [pictures.name.replace(images, labels) for images, labels in _PARTNERS if images in pictures.name]
    partner = next((headers[name] for name in names if name in headers), None)
    if partner is None:
        fitting = [
            other for other in headers.values() if other.shape in ((count,), (count, 1)) and other.dtype.kind in "iuU"
        ]
        partner = fitting[0] if len(fitting) == 1 else None
    if partner is None:
        return None
    if partner.shape not in ((count,), (count, 1)) or partner.dtype.kind not in "iuU":
        raise DataError(
            f"{url}: {partner} beside {pictures}: one whole number a picture is read, or give --labels none"
        )
    with archive.open(f"{partner.name}.npy") as stream:
        return npy.read_array(stream, allow_pickle=False).reshape(-1)


def _set_labels(found: Entries, values: Sequence[NDArray[Any] | None], headers: Sequence[_Header]) -> None:
    """Number the labels of all arrays together."""
    if all(value is None for value in values):
        return
    flat: list[Any] = []
    for value, header in zip(values, headers):
        flat += [None] * header.shape[0] if value is None else value.tolist()
    found.labels, found.classes = by_value(flat)


def by_value(values: Sequence[Any]) -> Labelled:
    """Number labels that are whole numbers (below 0: none), or names; None is none."""
    if any(isinstance(value, str) for value in values):
        return named([None if value is None else str(value) for value in values])
    return numbered([NO_LABEL if value is None else max(int(value), NO_LABEL) for value in values])
