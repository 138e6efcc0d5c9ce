"""Tars of a webdataset made elsewhere → where their samples lie and which of them can be trained on; nothing is copied.

A tar is read once, from its first byte to its last. What webdataset makes one sample is one here: consecutive members
whose paths agree up to the first dot of the base name. A sample is taken if it holds one picture that decodes to the
set's size; any other is a line of `rejected.jsonl`. Its class is the number in its `.cls`, else in its `.json`: the
whole of it, or its `label`; -1 means none.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.data.images import MAX_BYTES, PREPROCESSING, Rejected, decode, to_picture, upright_size
from pipeline.data.inputs import PICTURES
from pipeline.data.parts import Books
from pipeline.data.shardset import SIDECAR, ShardRecord, ShardSet, read_record, write_papers
from pipeline.errors import DataError

Labels = Literal["auto", "none"]
MOST_CLASSES = 1 << 20
_PIECE = 1 << 20
_SIZES_KEPT = 8
_META = re.compile(r"__[^/]*__($|/)")  # what webdataset keeps for itself
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
_CLASS = re.compile(rb"\s*(-?\d{1,10})\s*")


@dataclass(frozen=True)
class Settings:
    """All that decides what a picture of such a set is, given the tars."""

    size: tuple[int, int] | None
    """(H, W) that every picture is brought to; None: the one size that they have."""
    channels: int
    labels: Labels
    foreign: bool = True
    pictures: int = PREPROCESSING

    def as_json(self) -> dict[str, Any]:
        """As in the index, where tuples are lists."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


class Tar(NamedTuple):
    """A tar to look at."""

    url: str
    name: str
    """What the set calls it."""
    stem: str
    """What its sidecar and record are called."""
    size: int
    """Bytes."""
    stamp: int
    """Differs if the content does."""


class Taken(NamedTuple):
    """A sample that can be trained on."""

    row: tuple[int, ...]
    """Of the sidecar."""
    size: tuple[int, int]
    """(H, W) of its picture in the set."""
    meta: dict[str, Any]
    """`Picture.meta`."""


class Scan(NamedTuple):
    """What is known of a tar that has been read."""

    bytes: int
    sha256: str
    samples: dict[str, Taken | Rejected]
    """By key, in the order of the tar."""

    @property
    def rows(self) -> NDArray[np.void]:
        """The sidecar."""
        return np.array([one.row for one in self.samples.values() if isinstance(one, Taken)], SIDECAR)


class Indexer:
    """Reads tars and writes their papers into a set.

    Args:
        out: the set.
        settings: of the set.
    """

    def __init__(self, out: str, settings: Settings) -> None:
        self._out, self._settings = out, settings

    def known(self, tar: Tar) -> ShardRecord | None:
        """The record of a tar that has been looked at with these settings and has not changed since."""
        record = read_record(self._out, tar.stem)
        if record is None or (record.name, record.bytes) != (tar.name, tar.size):
            return None
        if (record.extra.get("settings"), record.extra.get("stamp")) != (self._settings.as_json(), tar.stamp):
            return None
        sidecar = storage.sha256(storage.join(self._out, f"{tar.stem}.npy"))
        return record if sidecar == record.sidecar_sha256 else None

    def index(self, tar: Tar, go_on: Callable[[], None]) -> ShardRecord:
        """Look at a tar, calling `go_on` before each sample.

        Raises:
            DataError: it is not sound, or has changed meanwhile, or there is no space left.
        """
        found = scan(tar.url, self._settings, go_on)
        if found.bytes != tar.size:
            raise DataError(f"{tar.url} was {tar.size} bytes long and is {found.bytes} now: wait until it is complete")
        told = {"name": tar.name, "bytes": found.bytes, "sha256": found.sha256, "sidecar": f"{tar.stem}.npy"}
        told |= {"settings": self._settings.as_json(), "stamp": tar.stamp, **_books(tar.name, found.samples)}
        return write_papers(self._out, tar.stem, found.rows, told)


def index(indexer: Indexer, tars: Iterable[Tar], go_on: Callable[[], None]) -> Iterator[ShardRecord]:
    """`Indexer.index`, for a pool."""
    return (indexer.index(tar, go_on) for tar in tars)


def bury(tar: Tar, exit_code: int) -> ShardRecord:
    """What is said of a tar at which two processes have died.

    Raises:
        DataError: always.
    """
    cause = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
    raise DataError(
        f"{tar.url}: two processes died at it ({cause}): a picture in it crashes its decoder, or memory has run out: "
        "leave it out, or run the same command again with fewer --workers"
    )


def decoder(shards: ShardSet) -> Callable[[bytes], NDArray[np.uint8]]:
    """What makes an image, uint8 (H, W, C), of a picture file in a set, or raises Rejected.

    Raises:
        DataError: the set was indexed for pictures as another version made them.
    """
    if not shards.settings.get("foreign"):
        return partial(decode, channels=shards.channels)
    if shards.settings.get("pictures") != PREPROCESSING:
        raise DataError(f"{shards.url} was indexed by another version, which makes other pictures: index it again")
    return lambda data: to_picture(data, size=shards.size, channels=shards.channels).array


class _Window:
    """A file read once and forwards: hashed as it comes, held as far back as somebody may look."""

    def __init__(self, file: BinaryIO) -> None:
        self.sha256 = hashlib.sha256()
        self.end = 0
        """Bytes read so far."""
        self._file, self._held, self._start, self._at = file, bytearray(), 0, 0

    def read(self, size: int) -> bytes:
        if size > MAX_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        while self.end < self._at + size and self._more():
            pass
        data = self.part(self._at, self._at + size)
        self._at += len(data)
        return data

    def seek(self, offset: int) -> int:
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at

    def part(self, first: int, last: int) -> bytes:
        return bytes(memoryview(self._held)[first - self._start : last - self._start])

    def forget(self, before: int) -> None:
        """Nobody looks back further; what has not been read up to there is hashed and not held."""
        while self.end < before:
            self._held.clear()
            self._start = self.end
            if not self._more():
                return
        del self._held[: before - self._start]
        self._start = max(before, self._start)

    def _more(self) -> bool:
        piece = self._file.read(_PIECE)
        self.sha256.update(piece)
        self._held += piece
        self.end += len(piece)
        return bool(piece)


@dataclass
class _Group:
    """Consecutive members of one key."""

    key: str
    first: int
    last: int
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Extension, in lower case → offset and size of its payload."""
    is_repeated: bool = False


def scan(url: str, settings: Settings, go_on: Callable[[], None]) -> Scan:
    """Read a tar from end to end.

    Args:
        url: path or URL.
        settings: of the set.
        go_on: called before each sample; may raise.

    Raises:
        DataError: it cannot be read, or is no sound tar: cut short, damaged, or compressed.
    """
    found: dict[str, Taken | Rejected] = {}
    try:
        with storage.open_read(url) as file:
            window = _Window(file)
            for group in _groups(window):
                go_on()
                if group.key in found:
                    found[group.key] = Rejected("scattered", "its members do not follow each other")
                    continue
                try:
                    found[group.key] = _look(group, window, settings)
                except Rejected as verdict:
                    found[group.key] = verdict
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file: check the name") from error
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{url} is no sound tar ({error}): copy or make it again; compressed ones, unpack") from error
    return Scan(window.end, window.sha256.hexdigest(), found)


def _groups(window: _Window) -> Iterator[_Group]:
    """Samples, complete, while their bytes are held.

    Raises:
        tarfile.ReadError: where the tar does not go on to a sound end; tar readers take a damaged or zeroed header, and
            a cut on a block's edge, for one.
    """
    group: _Group | None = None
    with tarfile.open(fileobj=cast(BinaryIO, window), mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would keep every header
            if not member.isreg() or member.issparse() or _META.match(member.name):
                continue
            key, extension = split(member.name)
            if group is None or key != group.key:
                if group:
                    yield group
                window.forget(member.offset)
                group = _Group(key, member.offset, member.offset)
            group.is_repeated |= extension in group.members
            group.members[extension] = member.offset_data, member.size
            group.last = archive.offset
            if group.last - group.first > MAX_BYTES:
                window.forget(group.last - 1)
        if group:
            yield group
        end = archive.offset
    window.forget(end)
    first = window.seek(end)
    while piece := window.read(_PIECE):
        if piece.strip(b"\0"):
            raise tarfile.ReadError(f"it ends at byte {first}, but more follows: damaged or joined")
        end += len(piece)
        window.forget(end)
    if end < first + tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no end-of-archive mark: cut short")


def _look(group: _Group, window: _Window, settings: Settings) -> Taken:
    if group.last - group.first > MAX_BYTES:
        raise Rejected("too_many_bytes", f"{group.last - group.first} bytes, the limit is {MAX_BYTES}")
    if group.is_repeated:
        raise Rejected("scattered", "a member is there twice")
    shown = pictures(group.members)
    if len(shown) != 1:
        raise Rejected("several_pictures" if shown else "no_picture", ", ".join(sorted(group.members)))
    data = window.part(group.first, group.last)

    def payload(extension: str) -> bytes:
        offset, size = group.members[extension]
        return data[offset - group.first :][:size]

    told: dict[str, bytes] = {name: payload(name) for name in ("cls", "json") if name in group.members}
    label = -1 if settings.labels == "none" else label_of(told)
    image = payload(shown[0])
    size = settings.size or (upright_size(image) if image else (1, 1))
    picture = to_picture(image, size=size, channels=settings.channels)
    offset, length = group.members[shown[0]]
    row = (group.first, len(data), zlib.crc32(data), offset - group.first, length, label)
    return Taken(row, size, picture.meta)


def split(path: str) -> tuple[str, str]:
    """Key and extension of a member as webdataset has them; a name without extension, which it leaves out, is a key."""
    name = _NAME.fullmatch(path)
    return (name[1], name[2].lower()) if name else (path, "")


def pictures(extensions: Iterable[str]) -> list[str]:
    """Those that say of a member that it is a picture."""
    return [extension for extension in extensions if extension.rpartition(".")[2] in PICTURES]


def label_of(members: dict[str, bytes]) -> int:
    """The class number that `cls`, else `json`, states; -1: none.

    Raises:
        Rejected: no_label; what is stated is no class number.
    """
    stated: Any = None
    if "cls" in members:
        text = _CLASS.fullmatch(members["cls"])
        stated = int(text[1]) if text else members["cls"][:20]
    elif "json" in members:
        try:
            value = json.loads(members["json"])
        except (ValueError, RecursionError):
            return -1
        stated = value.get("label") if isinstance(value, dict) else value if isinstance(value, int) else None
    if stated is None:
        return -1
    if not isinstance(stated, int) or isinstance(stated, bool) or not -1 <= stated < MOST_CLASSES:
        raise Rejected("no_label", f"{stated!r} is no class number")
    return stated


def _books(source: str, found: dict[str, Taken | Rejected]) -> dict[str, Any]:
    """`counts`, `rejected` and, commonest first, some of the `picture_sizes`, for a record."""
    books, sizes = Books(), Counter[str]()
    for key, one in found.items():
        if isinstance(one, Rejected):
            books.reject({"key": key, "source": source, "reason": one.reason, "detail": one.detail})
        else:
            books.take(one.meta["transforms"], min(one.meta["original_size"]), one.row[-1])
            sizes["x".join(map(str, one.size))] += 1
    return {**books.as_json(), "picture_sizes": dict(sizes.most_common(_SIZES_KEPT))}
