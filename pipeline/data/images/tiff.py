"""TIFF: find the full image among those of a file, and correct the kinds that Pillow or some versions misread. Pure.

Tags and values are those of TIFF 6.0 and of Adobe's supplements (SubIFDs).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.images.color import UnknownWhiteError

_CLASSIC = {b"II*\0": "<", b"MM\0*": ">"}
_BIG = {b"II+\0": "<", b"MM\0+": ">"}
SIGNATURES = (*_CLASSIC, *_BIG)
_NEW_SUBFILE, _SUBFILE, _WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 255, 256, 257, 258, 259, 262
_STRIP_BYTES, _SAMPLES, _PLANAR, _COLORMAP, _TILE_BYTES, _SUB_IFDS = 279, 277, 284, 320, 325, 330
_INK_SET, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _SUBSAMPLING = 332, 338, 339, 530
_TYPES = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}
_NOT_UNSIGNED = {2: "signed integers", 3: "floating point", 5: "complex integers", 6: "complex numbers"}
_GREY, _PALETTE, _CMYK, _YCBCR = (0, 1), 3, 5, 6
_UNCOMPRESSED, _SEPARATE, _ASSOCIATED, _UNASSOCIATED = 1, 2, 1, 2
_MAX_DIRECTORIES = 100


class PreparedFile(NamedTuple):
    """A file whose first image is the full one, so that Pillow reads it."""

    data: bytes
    needs_libtiff: bool
    """Pillow's own decoder of uncompressed pixels is wrong here."""
    is_associated: bool
    """The colors are multiplied by alpha, though the prepared file no longer says so."""


class _Layout(NamedTuple):
    """How offsets and tags are stored, in formats of `struct`."""

    order: str
    tag_count: str
    """Format of the number of tags."""
    offset: str
    """Format of an offset."""
    tag_bytes: int
    first: int
    """Position of the offset of the first directory."""

    @property
    def offset_bytes(self) -> int:
        return struct.calcsize(self.offset)


class _Directory:
    """The tags of one image."""

    def __init__(self, data: bytes, at: int, layout: _Layout) -> None:
        self._data, self._order = data, layout.order
        (count,) = struct.unpack_from(layout.tag_count, data, at)
        start = at + struct.calcsize(layout.tag_count)
        end = start + count * layout.tag_bytes
        self._tags: dict[int, tuple[int, int, int]] = {}
        for position in range(start, end, layout.tag_bytes):
            tag, kind = struct.unpack_from(layout.order + "HH", data, position)
            (count,) = struct.unpack_from(layout.offset, data, position + 4)
            inline = position + 4 + layout.offset_bytes
            is_inline = (np.dtype(_TYPES[kind]).itemsize * count if kind in _TYPES else 0) <= layout.offset_bytes
            self._tags[tag] = kind, count, inline if is_inline else struct.unpack_from(layout.offset, data, inline)[0]
        (self.next,) = struct.unpack_from(layout.offset, data, end)

    def locate(self, tag: int) -> tuple[int, NDArray[np.integer]]:
        """Position and values of a tag; no values if the tag is missing or damaged."""
        kind, count, position = self._tags.get(tag, (0, 0, 0))
        if kind not in _TYPES or position + count * np.dtype(_TYPES[kind]).itemsize > len(self._data):
            return 0, np.zeros(0, np.uint16)
        return position, np.frombuffer(self._data, self._order + _TYPES[kind], count, position)

    def values(self, tag: int) -> list[int]:
        """The first values of a tag."""
        return [int(value) for value in self.locate(tag)[1][:64]]

    def value(self, tag: int, default: int) -> int:
        """The first value of a tag."""
        return (self.values(tag) or [default])[0]

    @property
    def is_full(self) -> bool:
        """Whether the image is neither a thumbnail nor a mask of another image in the file."""
        return not self.value(_NEW_SUBFILE, 0) & 0b101 and self.value(_SUBFILE, 1) != 2


def prepare(data: bytes) -> PreparedFile:
    """Find the full image of a TIFF file, and change tags that Pillow misreads.

    Raises:
        UnknownWhiteError: the samples are signed or no integers.
        ValueError: neither Pillow nor libtiff reads this kind correctly.
        EOFError: the file ends before its pixels do.
    """
    try:
        layout = _layout(data)
        offset, directory = _full_image(data, layout)
    except struct.error:  # Pillow says what is wrong
        return PreparedFile(data, False, False)
    (first,) = struct.unpack_from(layout.offset, data, layout.first)
    if offset != first:
        data = _patched(data, layout.first, struct.pack(layout.offset, offset))
    _refuse(directory)
    is_uncompressed = directory.value(_COMPRESSION, _UNCOMPRESSED) == _UNCOMPRESSED
    needs_libtiff = is_uncompressed and _is_misread(directory)
    if needs_libtiff:
        _refuse_short(directory)
    extra = directory.values(_EXTRA_SAMPLES)
    is_associated = directory.value(_PHOTOMETRIC, 0) in _GREY and extra == [_ASSOCIATED]
    if is_associated:
        position, values = directory.locate(_EXTRA_SAMPLES)
        data = _patched(data, position, np.full_like(values, _UNASSOCIATED).tobytes())
    position, colors = directory.locate(_COLORMAP)
    if directory.value(_PHOTOMETRIC, 0) == _PALETTE and 0 < colors.max(initial=0) < 256:
        data = _patched(data, position, (colors * 257).tobytes())  # old files store 8 bits where TIFF wants 16
    return PreparedFile(data, needs_libtiff, is_associated)


def _layout(data: bytes) -> _Layout:
    if order := _BIG.get(data[:4]):
        return _Layout(order, order + "Q", order + "Q", tag_bytes=20, first=8)
    order = _CLASSIC[data[:4]]
    return _Layout(order, order + "H", order + "I", tag_bytes=12, first=4)


def _full_image(data: bytes, layout: _Layout) -> tuple[int, _Directory]:
    """Offset and tags of the first full image; of the first image if none is full."""
    directories = _directories(data, layout)
    first = next(directories, None)
    if first is None:
        raise struct.error("no directory")
    if first[1].is_full:
        return first
    return next((directory for directory in directories if directory[1].is_full), first)


def _directories(data: bytes, layout: _Layout) -> Iterator[tuple[int, _Directory]]:
    """The directories of the main chain, then those inside them."""
    (at,) = struct.unpack_from(layout.offset, data, layout.first)
    seen: set[int] = set()
    inside: list[int] = []
    while len(seen) < _MAX_DIRECTORIES and (at or inside):
        at = at or inside.pop(0)
        if at in seen:
            at = 0
            continue
        seen.add(at)
        try:
            directory = _Directory(data, at, layout)
        except struct.error:
            if len(seen) == 1:
                raise
            at = 0
            continue
        yield at, directory
        inside += directory.values(_SUB_IFDS)
        at = directory.next


def _refuse(directory: _Directory) -> None:
    for sample_format in directory.values(_SAMPLE_FORMAT):
        if sample_format in _NOT_UNSIGNED:
            raise UnknownWhiteError(_NOT_UNSIGNED[sample_format])
    photometric, samples = directory.value(_PHOTOMETRIC, 0), directory.value(_SAMPLES, 1)
    if photometric == _CMYK and directory.value(_INK_SET, 1) != 1:
        raise ValueError("inks other than cyan, magenta, yellow and black")
    if directory.value(_PLANAR, 1) == _SEPARATE and photometric in (*_GREY, _PALETTE) and samples > 1:
        raise ValueError("grey or a palette with more samples in separate planes")


def _is_misread(directory: _Directory) -> bool:
    """Whether Pillow misreads uncompressed pixels: it ignores subsampling of YCbCr, and cuts planes at bytes."""
    if directory.value(_PHOTOMETRIC, 0) == _YCBCR:
        return True
    is_deep = directory.value(_BITS, 1) > 8 or _ASSOCIATED in directory.values(_EXTRA_SAMPLES)
    return directory.value(_PLANAR, 1) == _SEPARATE and is_deep


def _refuse_short(directory: _Directory) -> None:
    """Refuse a file that ends before its pixels do, which libtiff would fill."""
    w, h, samples = (directory.value(tag, 1) for tag in (_WIDTH, _LENGTH, _SAMPLES))
    if directory.value(_PHOTOMETRIC, 0) == _YCBCR and directory.value(_PLANAR, 1) != _SEPARATE:
        across, down = (directory.values(_SUBSAMPLING) or [2, 2])[:2]
        if across not in (1, 2, 4) or down not in (1, 2, 4):
            raise ValueError(f"chroma subsampled by {across}x{down}")
        needed = -(-w // across) * -(-h // down) * (across * down + 2)
    else:
        needed = w * h * samples * directory.value(_BITS, 8) // 8
    stored = max(int(directory.locate(tag)[1].sum(dtype=np.float64)) for tag in (_STRIP_BYTES, _TILE_BYTES))
    if stored < needed:
        raise EOFError(f"{stored} bytes of pixels instead of {needed}")


def _patched(data: bytes, position: int, stored: bytes) -> bytes:
    return data[:position] + stored + data[position + len(stored) :]
