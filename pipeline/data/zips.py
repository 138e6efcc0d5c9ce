"""Zip archives: their directory read once, while they are listed; a worker needs the member's own header only."""

from __future__ import annotations

import struct
import zipfile
from array import array
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from pipeline.data.images import Rejected
from pipeline.data.inputs import Entries, Input, as_listed
from pipeline.data.opened import OneFile
from pipeline.errors import DataError

# As APPNOTE.TXT of PKWARE has them, sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16.
_LOCAL = struct.Struct("<4s2xHH4xI8xHH")  # signature, flags, method, CRC, lengths of name and extra field
_MEMBER = struct.Struct("<4s4xH6xIIIHHH8xI")  # signature, flags, CRC, sizes, lengths of name, extra, comment; offset
_END = struct.Struct("<4s6xHIIH")  # signature, members, bytes and offset of the directory, length of the comment
_END_64_AT = struct.Struct("<4s4xQ4x")
_END_64 = struct.Struct("<4s28xQQQ")
_LONGEST_COMMENT = 1 << 16
_ENCRYPTED, _UTF8, _ELSEWHERE = 1, 1 << 11, 0xFFFFFFFF


class _Directory(NamedTuple):
    members: int
    data: bytes
    before: int
    """Bytes in front of the archive, as a self-extracting one has them; offsets do not count them."""


class Zip(OneFile):
    """A zip archive; names may repeat."""

    def entries(self, labels: bool, go_on: Callable[[], None]) -> Entries:
        """List it."""
        found = Entries(stored=array("q"))
        try:
            directory = _directory(self._file.open(), self._file.size)
            for number, (path, size, crc, place, stored) in enumerate(_members(directory)):
                if number % 1024 == 0:
                    go_on()
                if not path.endswith("/"):
                    found.add(path.removeprefix("./"), size, crc, place)
                    found.stored.append(stored)
        except (zipfile.BadZipFile, struct.error, OSError, ValueError) as error:
            url = self._file.url
            raise DataError(f"{url} cannot be read as a zip archive ({error}): copy or make it again") from error
        return found

    def read(self, item: Input) -> bytes:
        """The member's bytes, unpacked and checked."""
        file = self._file.open()
        file.seek(item.place)
        mark, flags, method, crc, name, extra = _LOCAL.unpack(file.read(_LOCAL.size))
        if mark != b"PK\3\4" or (crc and crc != item.stamp):
            raise Rejected("source_changed", "another member, or none, where it was listed")
        if flags & _ENCRYPTED:
            raise Rejected("unreadable", "encrypted")
        file.seek(item.place + _LOCAL.size + name + extra)
        member = zipfile.ZipInfo()
        member.compress_type, member.compress_size = method, item.stored
        member.file_size, member.CRC = item.size, item.stamp
        with zipfile.ZipExtFile(file, "r", member) as stream:
            return as_listed(stream.read(), item)


def _directory(file: BinaryIO, size: int) -> _Directory:
    start = max(0, size - _LONGEST_COMMENT - _END.size)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0:
        raise zipfile.BadZipFile("no directory at its end: cut short, or not a zip archive")
    _, members, length, offset, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment > len(tail):
        raise zipfile.BadZipFile("cut short")
    end = start + at
    if end >= _END_64_AT.size:
        file.seek(end - _END_64_AT.size)
        mark, place = _END_64_AT.unpack(file.read(_END_64_AT.size))
        if mark == b"PK\6\7":
            file.seek(place)
            mark, members, length, offset = _END_64.unpack(file.read(_END_64.size))
            if mark != b"PK\6\6":
                raise zipfile.BadZipFile("its 64-bit directory is not where it should be")
            end = place
    before = end - length - offset
    if before < 0:
        raise zipfile.BadZipFile("cut short, or a part of an archive in several files")
    file.seek(before + offset)
    return _Directory(members, file.read(length), before)


def _members(directory: _Directory) -> Iterator[tuple[str, int, int, int, int]]:
    """Path, size, CRC, offset of the local header, and packed size of each."""
    data, at, unpack, fixed = directory.data, 0, _MEMBER.unpack_from, _MEMBER.size
    count = 0
    while at < len(data):
        mark, flags, crc, stored, size, name, extra, comment, place = unpack(data, at)
        if mark != b"PK\1\2":
            raise zipfile.BadZipFile(f"its directory is damaged at byte {at}")
        path = data[at + fixed : at + fixed + name]
        if _ELSEWHERE in (size, stored, place):
            field = data[at + fixed + name : at + fixed + name + extra]
            size, stored, place = _zip64(field, [size, stored, place])
        text = path.decode("utf-8", "surrogateescape") if flags & _UTF8 else path.decode("cp437")
        yield text.split("\0", 1)[0], size, crc, directory.before + place, stored
        at += fixed + name + extra + comment
        count += 1
    if (count - directory.members) % 65536:  # some writers count no further
        raise zipfile.BadZipFile(f"its directory has {count} members, its end says {directory.members}")


def _zip64(field: bytes, values: list[int]) -> list[int]:
    """Those of the three that do not fit 32 bits are in an extra field, in this order."""
    while len(field) >= 4:
        kind, length = struct.unpack_from("<HH", field)
        if kind == 1:
            large = iter(struct.unpack_from(f"<{length // 8}Q", field, 4))
            return [next(large, value) if value == _ELSEWHERE else value for value in values]
        field = field[4 + length :]
    return values
