"""Checks of values read from files that anyone may have written, before they are used.

Such values are names, counts, sizes, offsets, nesting and labels in archives, tables, indexes and records. A function
takes the value and, in `what`, its name for messages; it returns a value that is safe to use, or raises DataError.
"""

from __future__ import annotations

import bz2
import io
import json
import lzma
import math
import posixpath
import re
import stat
import struct
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import DataError
from pipeline.errors import printable as printable  # noqa: PLC0414  for the users of this module

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_JSON_DEPTH = 64
"""Nested lists and objects; deeper text is refused before it is parsed."""
MAX_JSON_BYTES = 1 << 29
"""Of one JSON file: the index of a million shards takes half of it."""
MAX_COUNT = 1 << 48
"""Of bytes, samples, rows; no file holds more."""
MAX_LOCATIONS = 64
"""Directories and URL prefixes outside of a set that its index may list."""
DEFLATE_RATIO = 1032
"""Bytes that one byte of deflate unpacks to, at most."""
_MAX_HEADER = 1 << 14  # bytes, of an .npy; those of plain arrays have 128
_ONE_AT_A_TIME = threading.Lock()  # Python 3.11 fails if two threads parse literals at once, as numpy does
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CHAIN = "::"
_PLAIN_WEB = ("http", "https")  # whose names may hold `::`


def error_text(error: BaseException) -> str:
    """The message of another package's error, as part of a line."""
    return printable(" ".join(str(error).split()) or type(error).__name__, 300)


def parse_json(data: bytes | str, what: str) -> Any:
    """Parse UTF-8 JSON of bounded size and depth with finite numbers only.

    Raises:
        DataError: the text is not JSON, too large, nested too deeply, or has a number that is not finite.
    """
    try:
        raw = data if isinstance(data, bytes) else data.encode()
        if len(raw) > MAX_JSON_BYTES:
            raise DataError(f"{what}: {len(raw)} bytes of JSON, the limit is {MAX_JSON_BYTES}: make it again")
        if _depth(raw) > MAX_JSON_DEPTH:
            raise DataError(f"{what}: nesting is deeper than {MAX_JSON_DEPTH} deep: it is damaged or made to harm")
        return json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is not JSON ({error_text(error)}): restore it, or make it again") from error


def _depth(raw: bytes) -> int:
    """An upper bound of the nesting: brackets in strings count too, unless they are closed there."""
    depth = deepest = 0
    for char in raw.translate(None, _NOT_BRACKETS):
        if char in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
    return deepest


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


def count(value: Any, what: str, least: int = 0, most: int = MAX_COUNT) -> int:
    """Check that a value is a whole number within bounds.

    Raises:
        DataError: the value is something else.
    """
    if type(value) is not int or not least <= value <= most:
        raise DataError(f"{what} is {printable(repr(value), 60)}, not a whole number from {least} to {most}")
    return value


def name_inside(name: Any, what: str) -> str:
    """Check that a value is a relative path that stays in its directory.

    Raises:
        DataError: the value is something else.
    """
    if not isinstance(name, str) or not _stays_inside(name):
        raise DataError(f"{what} names {printable(repr(name), 300)}, which is not a file in this directory")
    return name


def _stays_inside(name: str) -> bool:
    parts = name.split("/")
    return "\0" not in name and "://" not in name and not {"", ".", ".."} & set(parts)


def location_of(name: str) -> str:
    """The directory or URL prefix that a tar outside of a set lies in, with a slash at the end.

    Args:
        name: the tar's path, relative to the set or absolute, or its URL.
    """
    scheme = _SCHEME.match(name)
    path = name.partition("?")[0] if scheme and scheme[1] in _PLAIN_WEB else name
    return path.rpartition("/")[0] + "/"


def locations_of(names: Iterable[str]) -> list[str]:
    """The directories and URL prefixes outside of a set that these tars lie in; if they are too many, parents."""
    locations = sorted({location_of(name) for name in names if not _stays_inside(name)})
    while len(locations) > MAX_LOCATIONS:
        parents = sorted({_parent(location) for location in locations})
        if parents == locations:
            break
        locations = parents
    return locations


def _parent(location: str) -> str:
    """The parent of a location; a store's name, a root, and the parent directory of the set have none."""
    scheme = _SCHEME.match(location)
    head = location[scheme.end() :] if scheme else location
    parent = head.rstrip("/").rpartition("/")[0] + "/"
    if parent == "/" or head.rstrip("/").endswith(".."):
        return location
    return (scheme[0] if scheme else "") + parent


def is_allowed(name: Any, locations: Iterable[str]) -> bool:
    """Whether a name in an index leads to a file in the set or in one of these locations.

    Paths with detours (`a/../b`) and chains of file systems (`a::b`) are not allowed.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    if _stays_inside(name):
        return True
    scheme = _SCHEME.match(name)
    if "://" in name and not scheme:
        return False
    if scheme:
        if (_CHAIN in name and scheme[1] not in _PLAIN_WEB) or ".." in name.partition("?")[0].split("/"):
            return False
    elif posixpath.normpath(name) != name:
        return False
    return any(_contains(location, name) for location in locations)


def _contains(location: Any, name: str) -> bool:
    if not isinstance(location, str) or not location.endswith("/") or not name.startswith(location):
        return False
    return ".." not in name[len(location) :].partition("?")[0].split("/")


def require_regular(mode: int, name: str) -> None:
    """Refuse devices, pipes, sockets and directories: to read them may never end, or have an effect.

    Raises:
        DataError: `mode` is of one of these.
    """
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise DataError(f"{name} is {kind}, not a file: only regular files are read")


def inflated(stored: bytes, method: int, size: int) -> bytes:
    """Unpack a zip member, to at most one byte more than its directory entry says.

    Args:
        stored: the bytes in the archive.
        method: the compression method, as zip numbers it.
        size: bytes of the member, by its directory entry.

    Raises:
        ValueError: the bytes are damaged.
        NotImplementedError: another compression method.
    """
    try:
        if method == zipfile.ZIP_STORED:
            return stored
        if method == zipfile.ZIP_DEFLATED:
            return zlib.decompressobj(-15).decompress(stored, size + 1)
        if method == zipfile.ZIP_BZIP2:
            return bz2.BZ2Decompressor().decompress(stored, size + 1)
        if method == zipfile.ZIP_LZMA:
            return _lzma(stored, size).decompress(stored[9:], size + 1)
    except (zlib.error, OSError, EOFError, lzma.LZMAError, struct.error) as error:
        raise ValueError(error_text(error)) from error
    raise NotImplementedError(f"zip's method {method}")


def _lzma(stored: bytes, size: int) -> lzma.LZMADecompressor:
    _, properties, packed, dictionary = struct.unpack_from("<HHBI", stored)
    if properties != 5 or packed >= 225:
        raise ValueError("damaged LZMA header")
    how = {
        "id": lzma.FILTER_LZMA1, "dict_size": max(4096, min(dictionary, size)),
        "lc": packed % 9, "lp": packed // 9 % 5, "pb": packed // 45,
    }  # fmt: skip
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[how])


class Limits(NamedTuple):
    """How much an archive may unpack to."""

    free: int = 1 << 28
    """Bytes that any archive may unpack to."""
    ratio: int = 100
    """A larger archive may unpack to so many times its own bytes. Images stay below 2, masks and text below 30."""

    def most(self, packed: int) -> int:
        """Bytes that an archive of so many bytes may unpack to."""
        return max(self.free, self.ratio * packed)


class ArrayHeader(NamedTuple):
    """The header of an .npy file."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    data_at: int
    """Offset of the values, in bytes."""


def array_header(file: IO[bytes], size: int, what: str) -> ArrayHeader:
    """Read the header of an .npy file, and check that the file is long enough for its values.

    Args:
        file: at its beginning.
        size: bytes of the whole file.
        what: its name for messages.

    Raises:
        DataError: the file is something else, or too short.
    """
    from numpy.lib import format as npy

    try:
        version = npy.read_magic(file)
        head = file.read(2 if version == (1, 0) else 4)
        length = int.from_bytes(head, "little")
        if version > (3, 0) or length > _MAX_HEADER:
            raise ValueError(f"a header of version {version[0]} and {length} bytes")
        text = io.BytesIO(head + file.read(length))
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        with _ONE_AT_A_TIME, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 has written
            try:
                shape, fortran, dtype = read(text, max_header_size=_MAX_HEADER)
            except SystemError:  # a thread of another package has parsed Python at this moment
                text.seek(0)
                shape, fortran, dtype = read(text, max_header_size=_MAX_HEADER)
    except Exception as error:  # numpy evaluates the header as a Python literal, which fails in many ways
        reason = error_text(error)
        raise DataError(f"{what} is not an array that numpy has saved ({reason}): copy or make it again") from error
    data_at = 8 + len(head) + length
    held = printable(f"{shape} of {dtype}", 200)
    if any(side < 0 for side in shape):
        raise DataError(f"{what} holds {held}, not an array of numbers: save it as one")
    needed = data_at + math.prod(shape) * dtype.itemsize
    if needed > size and not dtype.hasobject:  # which are pickled, and never read
        raise DataError(f"{what} is cut short: {held} takes {needed} bytes, and there are {size}: copy it again")
    return ArrayHeader(shape, fortran, dtype, data_at)


def array_rows(data: bytes, dtype: np.dtype[Any], what: str) -> NDArray[np.void]:
    """The rows of an .npy file that is a table of this type.

    Raises:
        DataError: the file is something else.
    """
    import numpy as np

    header = array_header(io.BytesIO(data), len(data), what)
    if header.dtype != dtype or len(header.shape) != 1:
        raise DataError(f"{what} holds {printable(f'{header.shape} of {header.dtype}', 300)}, not rows of a sidecar")
    return np.frombuffer(data, dtype, header.shape[0], header.data_at)
