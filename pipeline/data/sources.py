"""Folders, zip and tar archives → a sorted list of inputs, and the bytes of each.

Listing reads names, sizes and times only; a worker then reads inputs by their place, through archives that it opens
itself. An input is any regular file, hidden or of any extension: what is not a picture shows when it is decoded, and
is counted there. Nothing is unpacked.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO, Literal, NamedTuple, Protocol, cast

from pipeline import storage
from pipeline.data.images import MAX_BYTES, Rejected
from pipeline.errors import ConfigError, DataError

Labels = Literal["folder", "none"]
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError)


class Member(NamedTuple):
    """One file of one source."""

    path: str
    """Relative to the source; bytes that are not UTF-8 as surrogate escapes."""
    size: int
    """Bytes, unpacked."""
    stamp: str
    """Differs if the content does: a time of modification or a checksum; empty where none is to be had."""
    place: int = 0
    """Where an archive has it."""


class Input(NamedTuple):
    """One file on its way to becoming a sample; its position in the listing is its identity."""

    name: str
    """The member's path, after the source's own name if there are several sources."""
    label: int | None
    """Class number."""
    source: int
    """Number of the source among those given."""
    member: Member


@dataclass(frozen=True)
class Listing:
    """All inputs of a list of sources, sorted by name."""

    inputs: list[Input]
    classes: tuple[str, ...] | None
    """Sorted names of the folders that inputs lie in; None if there are no folders or no labels are wanted."""
    fingerprint: str
    """Hash of all names, sizes and stamps."""


class _Source(Protocol):
    def members(self) -> Iterator[Member]: ...

    def read(self, member: Member) -> bytes: ...


def list_inputs(urls: Sequence[str], labels: Labels = "folder", go_on: Callable[[], None] = lambda: None) -> Listing:
    """List every file of every source.

    Args:
        urls: folders, .zip, .tar, .tar.gz; local or fsspec URLs, mixed at will.
        labels: `folder` makes the name of the folder that a file lies in, inside its source, its class.
        go_on: called after each file; may raise.

    Raises:
        ConfigError: a source is missing, or of a kind that is not read.
        DataError: a source is damaged or cannot be listed, or there is not one file in all of them.
    """
    found: list[tuple[str, int, Member]] = []
    for number, url in enumerate(urls):
        # Two sources may hold equal paths; the source's name keeps them apart for people, its number for us.
        prefix = url.rstrip("/").rsplit("/", 1)[-1] + "/" if len(urls) > 1 else ""
        for member in _open(url).members():
            found.append((prefix + member.path, number, member))
            go_on()
    if not found:
        raise DataError(f"{', '.join(urls)}: not a single file in it: give a folder or archive that holds pictures")
    found.sort(key=lambda item: item[:2])
    folders = {_folder(member.path) for _, _, member in found} - {None} if labels == "folder" else set()
    classes = tuple(sorted(cast(set[str], folders)))
    numbers = {name: number for number, name in enumerate(classes)}
    inputs = [Input(name, numbers.get(_folder(member.path) or ""), number, member) for name, number, member in found]
    return Listing(inputs, classes or None, _fingerprint(inputs))


def _folder(path: str) -> str | None:
    parts = path.split("/")
    return parts[-2] if len(parts) > 1 else None


def _fingerprint(inputs: Iterable[Input]) -> str:
    digest = hashlib.sha256()
    for name, _, _, member in inputs:
        digest.update(f"{name}\0{member.size}\0{member.stamp}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


class Reader:
    """Reads inputs by their place; one in each process, since open archives do not survive a fork."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = urls

    @cached_property
    def _sources(self) -> list[_Source]:
        return [_open(url) for url in self._urls]

    def read(self, item: Input) -> bytes:
        """The bytes of an input.

        Raises:
            Rejected: unreadable, too_many_bytes or source_changed.
            DataError: its whole archive cannot be read.
        """
        if item.member.size > MAX_BYTES:
            raise Rejected("too_many_bytes", f"{item.member.size} bytes, the limit is {MAX_BYTES}")
        try:
            data = self._sources[item.source].read(item.member)
        except FileNotFoundError as error:
            raise Rejected("source_changed", "removed since it was listed, or a link to nowhere") from error
        except (*_DAMAGED, RuntimeError) as error:  # RuntimeError: an encrypted member of a zip
            raise Rejected("unreadable") from error
        if len(data) != item.member.size:
            raise Rejected("source_changed", f"{len(data)} bytes, listed with {item.member.size}")
        return data


def _open(url: str) -> _Source:
    if storage.is_dir(url):
        return _RemoteFolder(url) if storage.is_remote(url) else _Folder(url)
    if not storage.exists(url):
        raise ConfigError(f"{url}: no such file or folder: check the name")
    if url.endswith(".zip"):
        return _Zip(url)
    if url.endswith((".tar", ".tar.gz", ".tgz")):
        return _Tar(url)
    raise ConfigError(f"{url} is neither a folder nor a .zip, .tar or .tar.gz file: give one of these")


class _Folder:
    """A local folder, recursively; links are followed, except into a folder above."""

    def __init__(self, url: str) -> None:
        self._root = str(storage.local(url))

    def members(self) -> Iterator[Member]:
        return self._walk("", ())

    def _walk(self, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[Member]:
        place = os.path.join(self._root, folder)
        try:
            here = os.stat(place)
            entries = list(os.scandir(place))
        except OSError as error:
            raise DataError(f"{place} cannot be listed ({error.strerror}): give read permission or move it") from error
        if (here.st_dev, here.st_ino) in above:
            return
        for entry in entries:
            path = folder + entry.name
            try:
                status = entry.stat()
            except OSError:  # a link to nowhere was meant to be a file: it ends as rejected, not as nothing
                yield Member(path, 0, "")
                continue
            if stat.S_ISDIR(status.st_mode):
                yield from self._walk(f"{path}/", (*above, (here.st_dev, here.st_ino)))
            elif stat.S_ISREG(status.st_mode):
                yield Member(path, status.st_size, str(status.st_mtime_ns))

    def read(self, member: Member) -> bytes:
        with open(os.path.join(self._root, member.path), "rb") as file:
            if str(os.fstat(file.fileno()).st_mtime_ns) != member.stamp:
                raise Rejected("source_changed", "written to since it was listed")
            return file.read(member.size + 1)


class _RemoteFolder:
    """Everything under an fsspec URL."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def members(self) -> Iterator[Member]:
        for path, info in storage.find(self._url).items():
            stamp = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified") if info.get(key)), "")
            yield Member(path, int(info["size"] or 0), str(stamp))

    def read(self, member: Member) -> bytes:
        return storage.read_bytes(storage.join(self._url, member.path))


class _Zip:
    """A zip archive; `place` counts its directory's entries, as names may repeat."""

    def __init__(self, url: str) -> None:
        self._url = url

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(storage.open_read(self._url))
        except _DAMAGED as error:
            raise DataError(f"{self._url} cannot be read as a zip archive ({error}): copy or make it again") from error

    def members(self) -> Iterator[Member]:
        for place, entry in enumerate(self._archive.infolist()):
            if not entry.is_dir():
                yield Member(_plain(entry.filename), entry.file_size, f"{entry.CRC:08x}", place)

    def read(self, member: Member) -> bytes:
        return self._archive.read(self._archive.infolist()[member.place])


class _Tar:
    """A tar archive, plain or gzipped; `place` is the offset of a member's bytes.

    A gzipped one has no random access: each worker unpacks it once, if its members are in the order of their names.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    @cached_property
    def _stream(self) -> BinaryIO:
        file = storage.open_read(self._url)
        return file if self._url.endswith(".tar") else cast(BinaryIO, gzip.GzipFile(fileobj=file))

    def members(self) -> Iterator[Member]:
        try:
            yield from self._scan()
        except _DAMAGED as error:
            raise DataError(f"{self._url} cannot be read as a tar archive ({error}): copy or make it again") from error

    def _scan(self) -> Iterator[Member]:
        files: dict[str, Member] = {}
        with tarfile.open(fileobj=self._stream, mode="r:") as archive:
            while (entry := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep every header
                if entry.isreg():
                    member = Member(_plain(entry.name), entry.size, str(entry.mtime), entry.offset_data)
                    files[entry.name] = member
                    yield member
                elif entry.islnk() and entry.linkname in files:  # a second name of a file, stored once
                    yield files[entry.linkname]._replace(path=_plain(entry.name))
            self._stream.seek(archive.offset)
            # Where a tar is cut on a block's edge, or a header is damaged or zeroed, tar readers see its end.
            rest = self._stream.read(tarfile.BLOCKSIZE)
            if len(rest) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("no end-of-archive mark: cut short")
            while rest:
                if rest.strip(b"\0"):
                    raise tarfile.ReadError(f"it ends at byte {archive.offset}, but more follows: damaged or joined")
                rest = self._stream.read(1 << 20)

    def read(self, member: Member) -> bytes:
        self._stream.seek(member.place)
        return self._stream.read(member.size)


def _plain(path: str) -> str:
    return path.removeprefix("./")
