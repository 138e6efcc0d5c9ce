"""Tar archives, plain or compressed, webdatasets among them.

In a webdataset the members of a sample share a key, the path up to the first dot of the base name. Those beside a
picture that say something of it (`.cls`, `.json`, `.txt`, …) are no inputs; a `.cls` is the picture's class number.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO

import numpy as np

from pipeline.data.inputs import NO_LABEL, PICTURES, Entries, Input, as_listed
from pipeline.data.labels import numbered
from pipeline.data.opened import OneFile, SourceFile, time_stamp
from pipeline.errors import ConfigError, DataError

_BLOCK = tarfile.BLOCKSIZE
_PIECE = 1 << 20
_END = bytes(_BLOCK)
_FILES, _OTHERS = frozenset((b"0", b"\0", b"7")), frozenset((b"2", b"3", b"4", b"5", b"6"))
_PAX, _LONG_NAME, _LONG_LINK = b"x", b"L", b"K"
_CHECKED_AT_ONCE = 2048
_CLASS = ".cls"
_COMPANIONS = frozenset(
    "cls cls2 id idx index json jsonl txt text caption captions tags label labels meta metadata url "  # noqa: SIM905
    "npy npz pyd pkl pickle pth pt safetensors mp msg msgpack cbor ten tb csv xml yaml yml".split()
)
_DAMAGED = (tarfile.TarError, zlib.error, EOFError, OSError, ValueError)


_Member = tuple[str, int, int, int]
"""Path, size, time of modification and offset of its bytes; millions are made, so they have no names."""


class _Unusual(Exception):  # noqa: N818
    """A header that only `tarfile` makes sense of."""


class Tar(OneFile):
    """A tar archive. A compressed one has no random access, so it is unpacked once, while it is listed.

    Args:
        url: its name; what it ends with says how it is packed.
    """

    def entries(self, labels: bool, go_on: Callable[[], None]) -> Entries:
        """List it."""
        try:
            file = self._file.open() if self.name.endswith(".tar") else self._file.unpack(self._unpacked(go_on))
            try:
                return _Samples(file, labels, go_on).entries(_scan(file))
            except _Unusual:
                return _Samples(file, labels, go_on).entries(_scan_slowly(file))
        except _DAMAGED as error:
            url = self._file.url
            raise DataError(f"{url} cannot be read as a tar archive ({error}): copy or make it again") from error

    def _unpacked(self, go_on: Callable[[], None]) -> Iterator[bytes]:
        stream = _zstd if self._file.url.endswith(".zst") else _gzip
        for block in stream(self._file):
            go_on()
            yield block

    def read(self, item: Input) -> bytes:
        """The member's bytes."""
        file = self._file.open()
        file.seek(item.place)
        return as_listed(file.read(item.size), item)


def _gzip(file: SourceFile) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file.open()) as stream:
        yield from iter(partial(stream.read, _PIECE), b"")


def _zstd(file: SourceFile) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(f"{file.url}: pip install 'ddpm-pipeline[zstd]' to read it, or unpack it first") from error
    stream = zstandard.ZstdDecompressor().stream_reader(file.open(), read_across_frames=True)
    try:
        yield from iter(partial(stream.read, _PIECE), b"")
    except zstandard.ZstdError as error:
        raise ValueError(error) from error


def _headers(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Each header block, where the bytes behind it begin, and how many they are.

    Where a tar is cut on a block's edge, or a header is damaged or zeroed, tar readers see its end: here it is an
    error.
    """
    place, unchecked = 0, list[bytes]()
    while True:
        file.seek(place)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise tarfile.ReadError("no end-of-archive mark: cut short")
        if block == _END:
            break
        unchecked.append(block)
        if len(unchecked) == _CHECKED_AT_ONCE:
            _check(unchecked)
        size = _number(block, 124)
        yield block, place + _BLOCK, size
        place += _BLOCK
        if block[156:157] not in _OTHERS:
            place += -(-size // _BLOCK) * _BLOCK
    if unchecked:
        _check(unchecked)
    _only_zeros(file, place)


def _only_zeros(file: BinaryIO, place: int) -> None:
    file.seek(place)
    while rest := file.read(_PIECE):
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"it ends at byte {place}, but more follows: damaged or joined")


def _number(block: bytes, at: int) -> int:
    try:
        return int(block[at : at + 11], 8)
    except ValueError:
        pass
    if block[at] & 0x80:  # GNU's way to write more than 8 GiB
        return int.from_bytes(block[at + 1 : at + 12])
    try:
        return int(block[at : at + 12].strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise tarfile.ReadError(f"damaged header of {_text(block[:100])}") from error


def _check(unchecked: list[bytes]) -> None:
    """Compare the sums in headers, and forget these."""
    blocks = np.frombuffer(b"".join(unchecked), np.uint8).reshape(-1, _BLOCK)
    sums = blocks.sum(1, dtype=np.int64) - blocks[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    for block, right in zip(unchecked, sums.tolist()):
        told = int(block[148:156].strip(b" \0") or b"0", 8)
        if told != right and told != right - 256 * sum(byte > 127 for byte in block):  # which some tars sum as signed
            raise tarfile.ReadError(f"damaged header of {_text(block[:100])}")
    unchecked.clear()


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _scan(file: BinaryIO) -> Iterator[_Member]:
    """Regular members, several times as fast as `tarfile`.

    Raises:
        _Unusual: at a header that is left to `tarfile`: hard links, sparse files, several volumes, …
    """
    told: dict[str, str] = {}  # by headers of the next member
    for block, place, size in _headers(file):
        kind = block[156:157]
        if kind in _FILES:
            path = told.get("path") or _path(block)
            if path[-1:] != "/":  # an old way to write a folder
                mtime = int(float(told["mtime"])) if "mtime" in told else _number(block, 136)
                yield path.removeprefix("./"), size, time_stamp(mtime), place
        elif kind == _PAX:
            told.update(_records(file.read(size)))
            if "size" in told or any(name.startswith("GNU.sparse") or name == "hdrcharset" for name in told):
                raise _Unusual
            continue
        elif kind == _LONG_NAME:
            told["path"] = _text(file.read(size))
            continue
        elif kind not in _OTHERS and kind != _LONG_LINK:
            raise _Unusual
        if told and kind != _LONG_LINK:
            told.clear()


def _path(block: bytes) -> str:
    path = _text(block[:100])
    return f"{_text(block[345:500])}/{path}" if block[345] else path


def _records(data: bytes) -> Iterator[tuple[str, str]]:
    r"""Names and values of a pax header: `LENGTH NAME=VALUE\n`, the length being that of the whole record."""
    while data.strip(b"\0"):
        length, _, _ = data.partition(b" ")
        record, data = data[: int(length)], data[int(length) :]
        if int(length) <= len(length) or not record.endswith(b"\n"):
            raise tarfile.ReadError("damaged pax header")
        name, _, value = record[len(length) + 1 : -1].partition(b"=")
        yield name.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape")


def _scan_slowly(file: BinaryIO) -> Iterator[_Member]:
    files: dict[str, _Member] = {}
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (entry := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would keep every header
            if entry.isreg():
                path = entry.name.removeprefix("./")
                files[entry.name] = path, entry.size, time_stamp(int(entry.mtime)), entry.offset_data
                yield files[entry.name]
            elif entry.islnk() and entry.linkname in files:  # a second name of a file, stored once
                yield entry.name.removeprefix("./"), *files[entry.linkname][1:]
        file.seek(archive.offset)
        if len(file.read(_BLOCK)) < _BLOCK:
            raise tarfile.ReadError("no end-of-archive mark: cut short")
        _only_zeros(file, archive.offset)


class _Samples:
    """Pictures of an archive on the one hand, what is said of them on the other."""

    def __init__(self, file: BinaryIO, labels: bool, go_on: Callable[[], None]) -> None:
        self._file, self._labels, self._go_on = file, labels, go_on
        self._entries = Entries()
        self._classes = array("q")
        self._lost: list[tuple[str, _Member]] = []  # apart from any picture of their key

    def entries(self, members: Iterator[_Member]) -> Entries:
        """Divide the members. Those of a sample stand together, as webdataset wants it; stragglers are looked for."""
        before = ""
        shown, said = list[_Member](), list[_Member]()
        for number, member in enumerate(members):
            if number % 1024 == 0:
                self._go_on()
            key, extension = _split(member[0])
            if key != before:
                self._add(before, shown, said)
                shown, said, before = [], [], key
            (said if extension in _COMPANIONS else shown).append(member)
        self._add(before, shown, said)
        self._find_the_lost()
        if any(number != NO_LABEL for number in self._classes):
            self._entries.labels, self._entries.classes = numbered(self._classes)
        return self._entries

    def _add(self, key: str, shown: list[_Member], said: list[_Member]) -> None:
        number = NO_LABEL
        if said and any(_split(member[0])[1] in PICTURES for member in shown):
            number = self._class(said)
        else:
            self._lost += [(key, member) for member in said]
        for member in shown:
            self._entries.add(*member)
            self._classes.append(number)

    def _class(self, companions: list[_Member]) -> int:
        for path, size, _, place in companions if self._labels else ():
            if path.lower().endswith(_CLASS):
                self._file.seek(place)
                text = self._file.read(min(size, 99))
                try:
                    return max(int(text), NO_LABEL)
                except ValueError as error:
                    raise tarfile.ReadError(f"{path} holds {text[:20]!r}, not a class number") from error
        return NO_LABEL

    def _find_the_lost(self) -> None:
        if not self._lost:
            return
        places = {_split(path)[0]: number for number, path in enumerate(self._entries.paths)}
        for key, member in self._lost:
            if key not in places:
                self._entries.add(*member)
                self._classes.append(NO_LABEL)
            elif (number := self._class([member])) != NO_LABEL:
                self._classes[places[key]] = number


def _split(path: str) -> tuple[str, str]:
    """Key and extension as webdataset has them; a name that begins with a dot, or has none, stands for itself."""
    dot = path.find(".", path.rfind("/") + 2)
    if dot < 0:
        return path, ""
    return path[:dot], path[path.rfind(".") + 1 :].lower()
