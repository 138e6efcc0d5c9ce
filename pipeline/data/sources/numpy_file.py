"""Arrays of images, `.npy` and `.npz`: read row by row, each row as the bytes of an image file.

N, H, W, C: images, height, width, channels. Pickled arrays are refused.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pipeline import untrusted
from pipeline.data.images import png
from pipeline.data.images.preprocess import Rejected
from pipeline.data.sources.inputs import NO_LABEL, Entries, Input
from pipeline.data.sources.labels.column_names import LABEL_COLUMNS, normalized
from pipeline.data.sources.labels.label_encoder import LabelEncoder
from pipeline.data.sources.source_file import DAMAGED, OneFile, refuse_damaged
from pipeline.errors import DataError
from pipeline.untrusted import printable

_CHANNELS = (1, 3, 4)
_SPLITS = re.compile(r"train(ing)?|test(ing)?|val(id(ation)?)?|extra")
_PARTNERS = (("images", "labels"), ("image", "label"), ("imgs", "labels"), ("data", "labels"), ("data", "label"),
             ("x", "y"), ("X", "y"), ("arr_0", "arr_1"))  # fmt: skip


class _Header(NamedTuple):
    """The header of an array in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    data_offset: int
    """Bytes in front of the values."""

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {self.shape}".strip()

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def problem(self) -> str:
        """Why this is no array of images; empty if it is one."""
        if self.dtype.kind != "u" or self.dtype.itemsize > 2:
            return "not uint8 or uint16: convert it"
        if len(self.shape) == 3 and self.shape[2] in _CHANNELS:
            return "one image, or many that are a few pixels wide: write (N, H, W, C)"
        ends = [len(self.shape) == 4 and self.shape[axis] in _CHANNELS for axis in (1, 3)]
        if not (len(self.shape) == 3 or any(ends)) or 0 in self.shape[1:]:
            return "not of the shape (N, H, W), (N, H, W, C) or (N, C, H, W) with 1, 3 or 4 channels"
        if all(ends):
            return "of a shape whose channels are first or last: write (N, H, W, C) with larger images"
        return "in Fortran's order: save numpy.ascontiguousarray of it" if self.fortran else ""

    def image(self, data: bytes) -> bytes:
        """The bytes of an image file, from those of a row."""
        if len(data) != self.row_bytes:
            raise Rejected("truncated", f"{len(data)} bytes of {self.row_bytes}")
        row = np.frombuffer(data, self.dtype).reshape(self.shape[1:])
        return image_file(row if row.ndim == 2 or row.shape[2] in _CHANNELS else row.transpose(1, 2, 0))


def image_file(image: NDArray[Any]) -> bytes:
    """An image as a PGM or PPM file, with transparency as a PNG file; uncompressed.

    Args:
        image: (H, W) or (H, W, C) with 1, 3 or 4 channels; uint8 or uint16, whose white is 65535.
    """
    h, w, channels = image.shape if image.ndim == 3 else (*image.shape, 1)
    bits = 8 * image.dtype.itemsize
    values = image.astype(f">u{image.dtype.itemsize}", copy=False)
    if channels != 4:
        return b"P%d %d %d %d\n" % (5 if channels == 1 else 6, w, h, (1 << bits) - 1) + values.tobytes()
    lines = b"".join(b"\0" + line.tobytes() for line in values)  # 0: no filter
    return png.assemble(w, h, bits, png.RGBA, zlib.compress(lines, 0))


def row_names(count: int, prefix: str = "") -> list[str]:
    """Names of rows: zero-padded numbers, so that the names sort as the rows."""
    width = len(str(count - 1))
    return [f"{prefix}{row:0{width}}" for row in range(count)]


def _header(file: IO[bytes], size: int, name: str, url: str) -> _Header:
    header = untrusted.array_header(file, size, f"{name} in {url}" if name else url)
    return _Header(name, header.shape, header.dtype, header.fortran, header.data_at)


def _member_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, packed_bytes: int, url: str) -> _Header:
    """The header of an array in an archive of `packed_bytes`, whose claimed size is checked against that."""
    name = member.filename.removesuffix(".npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"{printable(name)} is packed as numpy does not: save it with numpy.savez_compressed")
    if member.file_size > untrusted.DEFLATE_RATIO * min(member.compress_size, packed_bytes):
        raise zipfile.BadZipFile(f"{printable(name)} claims {member.file_size} bytes, and its archive cannot have them")
    with archive.open(member) as stream:
        return _header(stream, member.file_size, name, url)


class Npy(OneFile):
    """One array, read at a row's offset."""

    def entries(self, labels: bool, check_stop: Callable[[], None]) -> Entries:
        """List its rows; they have no labels."""
        url = self._file.url
        with refuse_damaged(url, "an array of numpy"):
            file = self._file.open()
            file.seek(0)
            header = _header(file, self._file.size, "", url)
        if problem := header.problem():
            raise DataError(f"{url} is {header}: {problem}")
        self._header = header
        entries = _entries([header], [self._file.stamp], ("",))
        entries.labels_from = f"{self.name} has images only: save them with an array called labels, as .npz"
        return entries

    def read(self, item: Input) -> bytes:
        """The row as an image file."""
        file = self._file.open()
        file.seek(self._header.data_offset + item.offset * self._header.row_bytes)
        return self._header.image(file.read(self._header.row_bytes))


class Npz(OneFile):
    """Arrays in a zip archive: read forward, since compressed arrays have no random access."""

    _headers: Sequence[_Header] = ()
    """The arrays of images."""
    _first_rows: Sequence[int] = ()
    """The first row of each array, and the number of all rows."""
    _stream: tuple[str, IO[bytes]] | None = None
    """The array that is read now, and its name."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._damaged_from: dict[str, int] = {}

    def entries(self, labels: bool, check_stop: Callable[[], None]) -> Entries:
        """List the rows of its arrays of images, with their labels."""
        url = self._file.url
        with refuse_damaged(url, "arrays of numpy"), zipfile.ZipFile(self._file.open()) as archive:
            headers, crcs = {}, {}
            for member in archive.infolist():
                check_stop()
                header = _member_header(archive, member, self._file.size, url)
                headers[header.name], crcs[header.name] = header, member.CRC
            self._headers = _images(url, headers)
            self._first_rows = np.cumsum([0, *(header.shape[0] for header in self._headers)]).tolist()
            several = len(self._headers) > 1
            prefixes = [f"{header.name}/" if several else "" for header in self._headers]
            entries = _entries(self._headers, [crcs[header.name] for header in self._headers], prefixes)
            if labels:
                _set_labels(archive, entries, self._headers, headers, url)
        return entries

    def read(self, item: Input) -> bytes:
        """The row as an image file."""
        number = bisect_right(self._first_rows, item.offset) - 1
        header, row = self._headers[number], item.offset - self._first_rows[number]
        if row >= self._damaged_from.get(header.name, header.shape[0]):
            raise Rejected("unreadable", "the archive is damaged before it")
        try:
            stream = self._open_stream(header.name)
            stream.seek(header.data_offset + row * header.row_bytes)
            return header.image(stream.read(header.row_bytes))
        except DAMAGED:
            self._damaged_from[header.name], self._stream = row, None
            raise

    def _open_stream(self, name: str) -> IO[bytes]:
        if self._stream is None or self._stream[0] != name:
            file = self._file.open(self._close_stream)
            self._stream = name, zipfile.ZipFile(file).open(f"{name}.npy")  # noqa: SIM115  it stays open
        else:
            self._file.open()  # marks it as used
        return self._stream[1]

    def _close_stream(self) -> None:
        self._stream = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None}


def _entries(headers: Sequence[_Header], stamps: Sequence[int], prefixes: Sequence[str]) -> Entries:
    entries = Entries(directory_is_class=False)
    for header, stamp, prefix in zip(headers, stamps, prefixes):
        count = header.shape[0]
        entries.paths += row_names(count, prefix)
        entries.sizes += array("q", [header.row_bytes]) * count
        entries.stamps += array("q", [stamp]) * count
    entries.offsets = array("q", range(len(entries.paths)))
    return entries


def _images(url: str, headers: dict[str, _Header]) -> list[_Header]:
    """The arrays of images: one, or one for each of training, test and the like."""
    images = [header for header in headers.values() if not header.problem()]
    if len({_SPLITS.sub("", header.name) for header in images}) == 1:
        return images
    names = ", ".join(map(str, headers.values())) or "nothing"
    if images:
        raise DataError(f"{url} holds {names}: several arrays may be the images: save one alone, as .npy")
    reasons = {header.problem() for header in headers.values() if len(header.shape) > 2}
    raise DataError(f"{url} holds {names}: no array of images: {'; '.join(sorted(reasons)) or 'uint8, (N, H, W, C)'}")


def _labels_header(images: _Header, headers: dict[str, _Header], url: str) -> _Header | None:
    """The array of labels of an array of images: by its name, or the only one of that length; None if there is none.

    Raises:
        DataError: its shape or type is not that of labels, or several arrays may be the labels.
    """
    names = [images.name.replace(word, labels) for word, labels in _PARTNERS if word in images.name]
    others = [header for header in headers.values() if header.problem()]
    partner = next((headers[name] for name in names if name in headers), None)
    if partner is None:
        by_name = [other for other in others if normalized(other.name) in LABEL_COLUMNS]
        candidates = by_name or [other for other in others if _is_column(other, images.shape[0], "iubUS")]
        if len(candidates) > 1:
            several = printable(", ".join(map(str, candidates)))
            raise DataError(
                f"{url}: {several} may all be the classes of {printable(str(images))}: save one of them, as "
                "'labels', or give --labels none"
            )
        partner = next(iter(candidates), None)
    if partner is not None and not _is_column(partner, images.shape[0], "iubUSf"):
        raise DataError(
            f"{url}: {printable(f'{partner} beside {images}')}: a label is one whole number from 0 for each image, "
            "or one name: correct it, or give --labels none"
        )
    return partner


def _is_column(header: _Header, count: int, kinds: str) -> bool:
    return header.shape in ((count,), (count, 1)) and header.dtype.kind in kinds


def _set_labels(
    archive: zipfile.ZipFile, entries: Entries, images: Sequence[_Header], all_headers: dict[str, _Header], url: str
) -> None:
    """Set the labels of all arrays of images, with one numbering."""
    columns = [_labels_header(header, all_headers, url) for header in images]
    names = list(dict.fromkeys(header.name for header in columns if header is not None))
    if not names:
        others = ", ".join(name for name in all_headers if name not in {header.name for header in images})
        entries.labels_from = f"{url.rpartition('/')[2]} has no array called labels ({others or 'only images'})"
        return
    encoder = LabelEncoder(f"{url}: {', '.join(names)}")
    codes = [np.full(header.shape[0], NO_LABEL, np.int64) for header in images]
    for part, header in zip(codes, columns):
        if header is not None:
            with archive.open(f"{header.name}.npy") as stream:
                values = npy.read_array(stream, allow_pickle=False).reshape(-1)
            distinct, first, inverse = np.unique(values, return_index=True, return_inverse=True)
            known = [encoder.code(value, row) for value, row in zip(distinct.tolist(), first.tolist())]
            part[:] = np.array([*known, NO_LABEL], np.int64)[inverse]
    entries.labels, entries.classes = encoder.class_numbers(np.concatenate(codes))
    entries.labels_from = f"{', '.join(names)} of {url.rpartition('/')[2]}"
