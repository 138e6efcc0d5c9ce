"""Whatever pictures are kept in → one sorted list of inputs, and the bytes of each.

Listing reads names, sizes and times only, so far as it can; worker processes then read inputs by their place, through
files that they open themselves. An input is any regular file of a folder or archive, hidden or of any extension: what
is not a picture shows when it is decoded, and is counted there.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tarfile
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.data import cifar, patterns
from pipeline.data import labels as numbering
from pipeline.data.arrays import Npy, Npz
from pipeline.data.cifar import Cifar
from pipeline.data.folders import Folder, RemoteFolder
from pipeline.data.images import MAX_BYTES, Rejected
from pipeline.data.inputs import PICTURES, Input, Inputs, Source
from pipeline.data.table import Table
from pipeline.data.tars import Tar
from pipeline.data.zips import Zip
from pipeline.errors import ConfigError, DataError

Labels = str
"""`folder`, `none`, or the name of a CSV file."""
_UNREADABLE = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, NotImplementedError,
    RuntimeError,
)  # fmt: skip
_AT_ONCE = 8192
_THREADS = 16
_AHEAD, _AHEAD_BYTES = 2 * _THREADS, 1 << 26
_TOGETHER, _TOGETHER_BYTES = 8, 1 << 20
_READ = (
    "a folder, .zip, .tar, .tar.gz, .tgz or .tar.zst archive, .parquet table, .npz or .npy array, "
    "CIFAR batch (.bin, or data_batch_1 and the like), picture file, or a pattern of such"
)
_KINDS: dict[str, Callable[[str], Source]] = {
    **{".zip": Zip, ".tar": Tar, ".tar.gz": Tar, ".tgz": Tar, ".tar.zst": Tar},
    **{".parquet": Table, ".npz": Npz, ".npy": Npy},
}


@dataclass(frozen=True)
class Listing:
    """All inputs of a list of sources, sorted by name."""

    inputs: Inputs
    classes: tuple[str, ...] | None
    """Their names, in the order of their numbers; None if there are none or no labels are wanted."""
    fingerprint: str
    """Hash of all names, sizes, stamps and labels."""
    bytes: int
    """Sum of the known sizes."""
    sources: list[Source]
    """For `Reader`; they may be pickled, and are to be kept while there is one."""
    rows_without_input: int = 0
    """Of a CSV file of labels."""


def list_inputs(urls: Sequence[str], labels: Labels = "folder", go_on: Callable[[], None] = lambda: None) -> Listing:
    """List every input of every source.

    Args:
        urls: as `open_source` reads them, local or fsspec URLs, mixed at will; patterns with `*`, `?`, `[…]`, `**` and
            lists such as `{000..099}`.
        labels: `folder` makes the name of the folder that a file lies in, inside its source, its class; sources with
            labels of their own keep those. A CSV file names a class for each file.
        go_on: called now and then; may raise.

    Raises:
        ConfigError: a source is missing, or of a kind that is not read, or the CSV file does not fit.
        DataError: a source is damaged or cannot be listed, or there is not one input in all of them.
    """
    table = None if labels in ("folder", "none") else numbering.LabelFile(labels)
    sources = _sources(urls)
    found = [source.entries(labels == "folder", go_on) for source in sources]
    if not any(entries.paths for entries in found):
        raise DataError(f"{', '.join(urls)}: not a single file in it: give a folder or archive that holds pictures")
    # Two sources may hold equal paths; the source's name keeps them apart for people, its number for us.
    prefixes = [source.name + "/" if len(sources) > 1 else "" for source in sources]
    classes, rest = None, 0
    if table is not None:
        numbers, classes, rest = table.labels(prefixes, found)
    elif labels == "folder":
        numbers, classes = numbering.join(found)
    else:
        numbers = numbering.none(found)
    inputs = Inputs(prefixes, found, numbers)
    return Listing(inputs, classes, _fingerprint(inputs, classes), int(inputs.sizes.sum()), sources, rest)


def _fingerprint(inputs: Inputs, classes: Iterable[str] | None) -> str:
    digest = hashlib.sha256("\n".join(classes or ()).encode("utf-8", "surrogatepass"))
    for first in range(0, len(inputs), _AT_ONCE):
        piece = slice(first, first + _AT_ONCE)
        digest.update("\n".join(inputs.names[piece]).encode("utf-8", "surrogatepass"))
        for column in (inputs.sizes, inputs.stamps, inputs.labels):
            digest.update(column[piece].tobytes())
    return digest.hexdigest()


class Reader:
    """Reads inputs by their place; one in each process and thread, as the sources' open files are its own.

    Args:
        sources: of the listing.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    def read(self, item: Input) -> bytes:
        """An image file's bytes.

        Raises:
            Rejected: unreadable, too_many_bytes or source_changed.
            DataError: its store cannot be reached.
        """
        if item.size > MAX_BYTES:
            raise Rejected("too_many_bytes", f"{item.size} bytes, the limit is {MAX_BYTES}")
        try:
            return self._sources[item.source].read(item)
        except FileNotFoundError as error:
            raise Rejected("source_changed", "removed since it was listed, or a link to nowhere") from error
        except _UNREADABLE as error:
            raise Rejected("unreadable") from error

    def read_ahead(self, items: Sequence[Input]) -> Iterator[bytes | Rejected]:
        """The bytes of inputs, or why there are none, in order; the next are read meanwhile.

        Not more than 32 inputs or about 64 MiB are held. Nothing else may be read before the end.

        Raises:
            DataError: as `read`.
        """
        parallel = all(self._sources[item.source].parallel for item in items)
        # Handing over costs as much as reading a small local file.
        threads, together = (_THREADS, 1) if parallel else (1, _TOGETHER)
        waiting: deque[tuple[Future[list[bytes | Rejected]], int, int]] = deque()
        held = held_bytes = 0
        pool = ThreadPoolExecutor(threads)
        try:
            for group in _groups(items, together):
                size = sum(item.size for item in group)
                while waiting and (held + len(group) > _AHEAD or held_bytes + size > _AHEAD_BYTES):
                    future, count, count_bytes = waiting.popleft()
                    yield from future.result()
                    held, held_bytes = held - count, held_bytes - count_bytes
                waiting.append((pool.submit(self._verdicts, group), len(group), size))
                held, held_bytes = held + len(group), held_bytes + size
            while waiting:
                yield from waiting.popleft()[0].result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _verdicts(self, items: Sequence[Input]) -> list[bytes | Rejected]:
        return [self._verdict(item) for item in items]

    def _verdict(self, item: Input) -> bytes | Rejected:
        try:
            return self.read(item)
        except Rejected as verdict:
            return verdict


def _groups(items: Sequence[Input], together: int) -> Iterator[list[Input]]:
    """At most so many small items at a time, in order; large ones alone."""
    group: list[Input] = []
    for item in items:
        if group and (len(group) == together or sum(other.size for other in group) + item.size > _TOGETHER_BYTES):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _sources(urls: Sequence[str]) -> list[Source]:
    """What the names stand for; the pictures of a pattern are one source, those that are named one by one another."""
    sources: list[Source] = []
    pictures: dict[str, Any] = {}
    for url in urls:
        if not patterns.is_pattern(url):
            if opened := _open(url):
                sources += opened
            elif url.lower().rpartition(".")[2] in PICTURES:
                pictures[url] = storage.info(url) if storage.is_remote(url) else None
            else:
                raise ConfigError(f"{url} is not of a kind that is read: give {_READ}")
            continue
        files = {}
        for place, info in patterns.matches(url).items():
            if opened := _open(place):
                sources += opened
            else:
                files[place] = info
        if files:
            sources.append(_pictures(patterns.root(url), files))
    return sources + _named_one_by_one(pictures)


def _named_one_by_one(pictures: dict[str, Any]) -> list[Source]:
    """One source for each store; a shell has spelt out a pattern, perhaps, so folders in common are left out."""
    stores: dict[str, dict[str, Any]] = {}
    for url, info in pictures.items():
        if storage.is_remote(url):
            stores.setdefault("/".join(url.split("/", 3)[:3]), {})[url] = info
        else:
            stores.setdefault("", {})[os.path.abspath(storage.local(url))] = info
    return [_pictures(_common(list(files)), files) for files in stores.values()]


def _common(places: list[str]) -> str:
    """The innermost folder of all these files."""
    # Of letters, and then of whole names: `commonpath` takes the second slash out of a URL.
    return os.path.commonprefix([place.rpartition("/")[0] + "/" for place in places]).rpartition("/")[0]  # noqa: RUF071


def _pictures(root: str, files: dict[str, Any]) -> Source:
    if storage.is_remote(next(iter(files))):
        return RemoteFolder(root, {place[len(root) :].lstrip("/"): info for place, info in files.items()})
    place = str(storage.local(root))
    return Folder(place, [os.path.relpath(storage.local(file), place) for file in files])


def _open(url: str) -> list[Source]:
    """A folder, archive, table, array or batch, or several; none for a file that is no more than one input."""
    if storage.is_dir(url):
        batches = [Cifar(batch) for batch in cifar.batches(url)]
        return [*batches] or [RemoteFolder(url) if storage.is_remote(url) else Folder(url)]
    if not storage.exists(url):
        raise ConfigError(f"{url}: no such file or folder: check the name")
    if cifar.is_batch(url):
        return [Cifar(url)]
    return [kind(url) for ending, kind in _KINDS.items() if url.endswith(ending)][:1]
