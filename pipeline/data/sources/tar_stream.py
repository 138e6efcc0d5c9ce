"""A tar that is read once from beginning to end: its members in groups of one key, hashed on the way."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple, cast

from pipeline.data.images.preprocess import MAX_BYTES
from pipeline.data.sources.junk_files import is_junk
from pipeline.data.sources.keys import split
from pipeline.data.sources.tar_samples import LINK, NOT_FILES, OTHER, SPARSE

_PIECE = 1 << 20
_WEBDATASET_METADATA = re.compile(r"__[^/]*__($|/)")


class Window:
    """A file that is read once, from beginning to end: hashed as it is read, the latest bytes kept in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.sha256 = hashlib.sha256()
        self.end = 0
        """Bytes read so far."""
        self._file, self._held, self._start, self._at = file, bytearray(), 0, 0

    def read(self, size: int) -> bytes:
        """The next bytes, as `tarfile` asks for headers."""
        if not 0 <= size <= MAX_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        while self.end < self._at + size and self._read_piece():
            pass
        data = self.part(self._at, self._at + size)
        self._at += len(data)
        return data

    def seek(self, offset: int) -> int:
        """Go to an offset."""
        self._at = offset
        return offset

    def tell(self) -> int:
        """The current offset."""
        return self._at

    def part(self, first: int, last: int) -> bytes:
        """Bytes that are still in memory."""
        return bytes(memoryview(self._held)[first - self._start : last - self._start])

    def release(self, before: int) -> None:
        """Release the bytes before an offset; bytes that were not read yet are hashed and not kept."""
        while self.end < before:
            self._held.clear()
            self._start = self.end
            if not self._read_piece():
                return
        del self._held[: before - self._start]
        self._start = max(before, self._start)

    def _read_piece(self) -> bool:
        piece = self._file.read(_PIECE)
        self.sha256.update(piece)
        self._held += piece
        self.end += len(piece)
        return bool(piece)


class GroupMember(NamedTuple):
    """A file in a tar; offsets are bytes from the beginning of the tar."""

    path: str
    extension: str
    header_offset: int
    """Of the first header of the member."""
    offset: int
    """Of its data, or a key of `tar_samples.UNREADABLE`."""
    size: int
    end: int
    """Offset of the next member."""


@dataclass
class TarGroup:
    """Consecutive members of one key, without junk files between them."""

    key: str
    members: list[GroupMember] = field(default_factory=list)

    @property
    def first(self) -> int:
        """Offset of its first byte."""
        return self.members[0].header_offset

    @property
    def last(self) -> int:
        """Offset after its last byte."""
        return self.members[-1].end


def groups(window: Window) -> Iterator[TarGroup | str]:
    """The groups, each while its bytes are in memory, and the paths of junk files.

    Raises:
        tarfile.ReadError: as `members` and `check_end`.
    """
    group: TarGroup | None = None
    end = 0
    for member, end in members(window):
        if member.type in NOT_FILES or _WEBDATASET_METADATA.match(member.name):
            continue
        if is_junk(member.name):
            yield member.name
            continue
        key, extension = split(member.name)
        if group is None or key != group.key:
            if group:
                yield group
            window.release(member.offset)
            group = TarGroup(key)
        group.members.append(GroupMember(member.name, extension, member.offset, _data_offset(member), member.size, end))
        if group.last - group.first > MAX_BYTES:
            window.release(group.last - 1)
    if group:
        yield group
    check_end(window, end)


def members(file: BinaryIO | Window) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Each member as `tarfile` reads it, and the offset of the next; `check_end` has to follow.

    Raises:
        tarfile.ReadError: the tar is damaged.
    """
    with tarfile.open(fileobj=cast(BinaryIO, file), mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would keep every header
            if member.size < 0 or archive.offset <= member.offset:
                raise tarfile.ReadError(f"damaged header of {member.name}")
            yield member, archive.offset


def check_end(file: BinaryIO | Window, end: int) -> None:
    """Check that a tar ends after its last member: readers take damaged headers and cuts between blocks for the end.

    Raises:
        tarfile.ReadError: other bytes than zeros follow, or less than one block of zeros.
    """
    offset = end
    while True:
        if isinstance(file, Window):
            file.release(offset)
        file.seek(offset)
        piece = file.read(_PIECE)
        if piece.strip(b"\0"):
            raise tarfile.ReadError(f"it ends at byte {end}, but more follows: damaged or joined")
        if not piece:
            break
        offset += len(piece)
    if offset < end + tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no end-of-archive mark: cut short")


def _data_offset(member: tarfile.TarInfo) -> int:
    if member.issparse():
        return SPARSE
    if member.isreg():
        return member.offset_data
    return LINK if member.islnk() or member.issym() else OTHER
