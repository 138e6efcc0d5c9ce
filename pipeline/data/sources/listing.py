"""Images from any kind of source → one sorted list of inputs, and the bytes of each.

Listing reads names, sizes and times only, as far as possible; worker processes open the sources themselves and read
inputs by their offsets. Every regular file of a directory or archive is an input, hidden or of any extension: whether
it is an image is decided and counted when it is decoded.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline.data.images.preprocess import MAX_BYTES, Rejected
from pipeline.data.sources import cifar, globs, urls
from pipeline.data.sources.cifar import Cifar
from pipeline.data.sources.directory import Directory, RemoteDirectory
from pipeline.data.sources.inputs import SYSTEM_FILE, Entries, Input, Source, is_image_name
from pipeline.data.sources.junk_files import is_junk
from pipeline.data.sources.labels import metadata_files, numbering
from pipeline.data.sources.labels.labels_csv import LabelsCsv
from pipeline.data.sources.numpy_file import Npy, Npz
from pipeline.data.sources.parquet import Table, list_tables
from pipeline.data.sources.sorted_inputs import Inputs, sort
from pipeline.data.sources.source_file import DAMAGED
from pipeline.data.sources.tar import Tar
from pipeline.data.sources.zip import Zip
from pipeline.errors import ConfigError, DataError
from pipeline.storage import files

Labels = str
"""`folder`, `none`, or the name of a CSV file."""
_THREADS = 16
_MAX_AHEAD, _MAX_AHEAD_BYTES = 2 * _THREADS, 1 << 26
_GROUP, _GROUP_BYTES = 8, 1 << 20
_LISTED = 3  # origins of classes in a message
_SUPPORTED = (
    "a directory, .zip, .tar, .tar.gz, .tgz or .tar.zst archive, .parquet table, .npz or .npy array, "
    "CIFAR batch (.bin, or data_batch_1 and the like), image file, or a pattern of such"
)
SOURCES: dict[str, Callable[[str], Source]] = {
    **{".zip": Zip, ".tar": Tar, ".tar.gz": Tar, ".tgz": Tar, ".tar.zst": Tar},
    **{".parquet": Table, ".npz": Npz, ".npy": Npy},
}
"""Endings of the files that hold many images."""


@dataclass(frozen=True)
class Listing:
    """All inputs of all sources, sorted by name."""

    inputs: Inputs
    classes: tuple[str, ...] | None
    """Class names by class number; None if there are none or no labels are wanted."""
    fingerprint: str
    """Hash of all names, sizes, stamps and labels."""
    bytes: int
    """Sum of the known sizes."""
    sources: list[Source]
    """For `Reader`; can be pickled. They hold unpacked archives, so keep them while there is a reader."""
    rows_without_input: int = 0
    """Rows of label files that name no input."""
    labels_from: str = ""
    """Where the classes come from, or why there are none."""


def list_inputs(
    names: Sequence[str],
    labels: Labels = "folder",
    check_stop: Callable[[], None] = lambda: None,
    image_extensions: frozenset[str] = frozenset(),
    existing_classes: Sequence[str] | None = None,
) -> Listing:
    """List every input of every source.

    Args:
        names: paths or fsspec URLs of the sources; patterns with `*`, `?`, `[…]`, `**` and lists such as `{000..099}`.
        labels: `folder`: the class of a file is the name of the directory that it lies in, inside its source; sources
            with labels of their own keep those. A CSV file: it names the class of each file.
        check_stop: called now and then; may raise.
        image_extensions: which members of a tar are the images; see `keys`.
        existing_classes: of the set that is continued; their order is kept.

    Raises:
        ConfigError: a source is missing or of an unknown kind, or the CSV file does not match the inputs.
        DataError: a source is damaged or cannot be listed, or states classes in a way that is not read, or there is no
            input in all of them.
    """
    csv = None if labels in ("folder", "none") else LabelsCsv(labels)
    sources = open_sources(names)
    for source in sources:
        if isinstance(source, Tar):
            source.image_extensions = image_extensions
    entries = _list(sources, labels == "folder", check_stop)
    if not any(len(one.paths) for one in entries):
        raise DataError(f"{', '.join(names)}: not a single file in it: give a directory or archive that holds images")
    # Two sources may contain equal paths; users tell them apart by the name of the source.
    prefixes = [source.name + "/" if len(sources) > 1 else "" for source in sources]
    numbers, classes, unmatched, labels_from = numbering.unlabeled(entries), None, 0, "--labels none"
    if csv is not None:
        numbers, classes, unmatched = csv.labels(prefixes, entries)
        labels_from = labels
    elif labels == "folder":
        for number, (source, one) in enumerate(zip(sources, entries)):
            if one.directory_is_class and one.classes is None:
                metadata_files.read_labels(source, number, one, check_stop)
        numbers, classes = numbering.merge(entries)
        unmatched, labels_from = sum(one.unmatched_rows for one in entries), _labels_from(entries, classes is not None)
    unique = None
    if classes is not None:
        numbers, classes = numbering.in_order_of(existing_classes or (), numbers, classes)
        # The fingerprint covers the names as the sources state them; sets made earlier depend on that.
        unique = classes if list(classes) == list(existing_classes or ()) else numbering.unique_names(classes)
    inputs, fingerprint, size = sort(prefixes, entries, numbers, classes)
    return Listing(inputs, unique, fingerprint, size, sources, unmatched, labels_from)


def _list(sources: Sequence[Source], labels: bool, check_stop: Callable[[], None]) -> list[Entries]:
    """The entries of each source, sorted."""
    try:
        tables = [source for source in sources if isinstance(source, Table)]
        of_tables = iter(list_tables(tables, labels, check_stop) if tables else [])
        entries = [
            next(of_tables) if isinstance(source, Table) else source.entries(labels, check_stop) for source in sources
        ]
    except Rejected as error:  # a source was written to while it was listed
        raise DataError(f"{error.detail or error.reason}: run the same command again when it is complete") from error
    for one in entries:
        one.sort()
    return entries


def _labels_from(entries: Sequence[Entries], any_class: bool) -> str:
    """Where the classes of all sources come from, or why there are none; shortened."""
    default = "directories" if any_class else "the images lie in no directory, and nothing else says their classes"
    origins = list(
        dict.fromkeys(
            (one.labels_from + " names no class" * (one.classes == ()) if one.labels_from else default)
            for one in entries
            if one.paths and (one.classes or one.directory_is_class or not any_class)
        )
    )
    more = f" and {len(origins) - _LISTED} more" if len(origins) > _LISTED else ""
    return "; ".join(origins[:_LISTED]) + more


class Reader:
    """Reads the bytes of inputs; every process and thread needs its own, as it opens files of the sources.

    Args:
        sources: of the listing.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    def read(self, item: Input) -> bytes:
        """The bytes of an input's image file.

        Raises:
            Rejected: unreadable, too_many_bytes or source_changed; it is a junk file, or the listing rejected it.
            DataError: the store cannot be reached.
        """
        if is_junk(item.path):
            raise Rejected(SYSTEM_FILE)
        if item.rejection:
            raise Rejected(*item.rejection)
        if item.size > MAX_BYTES:
            raise Rejected("too_many_bytes", f"{item.size} bytes, the limit is {MAX_BYTES}")
        try:
            return self._sources[item.source].read(item)
        except FileNotFoundError as error:
            raise Rejected("source_changed", "removed since it was listed, or a link to nowhere") from error
        except DAMAGED as error:
            raise Rejected("unreadable") from error

    def read_ahead(self, items: Sequence[Input]) -> Iterator[bytes | Rejected]:
        """The bytes of inputs, or why there are none, in order; the next inputs are read in threads meanwhile.

        At most 32 inputs or about 64 MiB are held. Read nothing else with this reader before the end.

        Raises:
            DataError: the store cannot be reached.
        """
        parallel = all(self._sources[item.source].parallel for item in items)
        # Small local files are read in groups: passing one to another thread takes as long as reading it.
        threads, group_size = (_THREADS, 1) if parallel else (1, _GROUP)
        waiting: deque[tuple[Future[list[bytes | Rejected]], int, int]] = deque()
        held = held_bytes = 0
        pool = ThreadPoolExecutor(threads)
        try:
            for group in _groups(items, group_size):
                size = sum(item.size for item in group)
                while waiting and (held + len(group) > _MAX_AHEAD or held_bytes + size > _MAX_AHEAD_BYTES):
                    future, count, count_bytes = waiting.popleft()
                    yield from future.result()
                    held, held_bytes = held - count, held_bytes - count_bytes
                waiting.append((pool.submit(self._read_group, group), len(group), size))
                held, held_bytes = held + len(group), held_bytes + size
            while waiting:
                yield from waiting.popleft()[0].result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _read_group(self, items: Sequence[Input]) -> list[bytes | Rejected]:
        results: list[bytes | Rejected] = []
        for item in items:
            try:
                results.append(self.read(item))
            except Rejected as rejected:
                results.append(rejected)
        return results


def _groups(items: Sequence[Input], group_size: int) -> Iterator[list[Input]]:
    """At most `group_size` small inputs together, in order; large ones alone."""
    group: list[Input] = []
    for item in items:
        if group and (len(group) == group_size or sum(other.size for other in group) + item.size > _GROUP_BYTES):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def open_sources(names: Sequence[str]) -> list[Source]:
    """The sources that names mean; the images of a pattern are one source, images that are named alone another."""
    sources: list[Source] = []
    images: dict[str, Any] = {}
    for name in names:
        if not globs.is_pattern(name):
            if opened := _open(name):
                sources += opened
            elif is_image_name(urls.without_query(name)):
                images[name] = files.info(name) if files.is_remote(name) else None
            else:
                raise ConfigError(f"{name} is not of a kind that is read: give {_SUPPORTED}")
            continue
        matches, before = {}, len(sources)
        for match, info in globs.matches(name).items():
            if opened := _open(match):
                sources += opened
            else:
                matches[match] = info
        if matches:
            sources.append(_image_files(globs.root(name), matches, is_class=len(sources) == before))
    return sources + _image_files_by_store(images)


def _image_files_by_store(images: dict[str, Any]) -> list[Source]:
    """One source for each store. Their names begin below their common directory, as if a shell expanded a pattern."""
    stores: dict[str, dict[str, Any]] = {}
    for url, info in images.items():
        if files.is_remote(url):
            stores.setdefault("/".join(url.split("/", 3)[:3]), {})[url] = info
        else:
            stores.setdefault("", {})[os.path.abspath(files.local(url))] = info
    return [_image_files(_common_directory(list(infos)), infos) for infos in stores.values()]


def _common_directory(paths: list[str]) -> str:
    directories = [urls.without_query(path).rpartition("/")[0] + "/" for path in paths]
    # `commonpath` would take the second slash out of a URL.
    return os.path.commonprefix(directories).rpartition("/")[0]  # noqa: RUF071


def _image_files(root: str, infos: dict[str, Any], is_class: bool = True) -> Source:
    source: Directory | RemoteDirectory
    if files.is_remote(next(iter(infos))):
        source = RemoteDirectory(root, {url[len(root) :].lstrip("/"): info for url, info in infos.items()})
    else:
        directory = str(files.local(root))
        source = Directory(directory, [os.path.relpath(files.local(path), directory) for path in infos])
    source.is_class = is_class
    return source


def _open(url: str) -> list[Source]:
    """A directory, archive, table, array or batch, or several; none for a file that is one input."""
    if files.is_dir(url):
        batches = [Cifar(batch) for batch in cifar.batches(url)]
        return [*batches] or [RemoteDirectory(url) if files.is_remote(url) else Directory(url)]
    if not files.exists(url):
        raise ConfigError(f"{url}: no such file or directory: check the name")
    if cifar.is_batch(url):
        return [Cifar(url)]
    return [source(url) for ending, source in SOURCES.items() if urls.without_query(url).endswith(ending)][:1]
