"""The inputs of all sources, kept in columns: some 150 bytes for each, as there may be millions."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from pipeline.data.images.preprocess import Rejected

NO_LABEL = -1
IMAGES = frozenset(
    "avif bmp dds dib gif heic heif ico j2k jfif jp2 jpe jpeg jpg jxl mpo "  # noqa: SIM905
    "pbm pcx pgm png pnm ppm psd qoi sgi tga tif tiff webp".split()
)
"""Extensions of image files, also of formats that are rejected."""
LABEL_FILE, BESIDE_IMAGE, SYSTEM_FILE = "label_file", "beside_image", "system_file"
NOT_IMAGES = frozenset((LABEL_FILE, BESIDE_IMAGE, SYSTEM_FILE))
"""Reasons for inputs that were never meant as images; they do not count as bad."""
_CHUNK = 4096


def is_image_name(path: str) -> bool:
    """Whether a file has the extension of an image."""
    return path.rpartition(".")[2].lower() in IMAGES


class Rejection(NamedTuple):
    """Why an input will not be a sample, known from the listing alone: reason and detail as in `rejected.jsonl`."""

    reason: str
    detail: str = ""


class Input(NamedTuple):
    """One image file, or table row that is read as one; its position in the listing is its identity."""

    name: str
    """Its path in its source, after the name of the source if there are several sources."""
    label: int | None
    """Class number."""
    source: int
    """Number of its source in the listing."""
    path: str
    """Relative to the source; bytes that are not UTF-8 are surrogate escapes."""
    size: int
    """Unpacked size in bytes; for a row of a table the average."""
    stamp: int
    """Changes with the content: a time of modification or a checksum; 0 if neither is known."""
    offset: int
    """Where it lies in its source: a byte offset, or the number of a row."""
    packed_size: int
    """In a zip archive, in bytes."""
    rejection: Rejection | None = None
    """Why it is no sample, if the listing knows already."""


@dataclass
class Entries:
    """What one source holds, in any order; the n-th elements of all columns describe one input."""

    directory_is_class: bool = True
    """Whether the directory of an input is its class, where labels are wanted and `classes` is None."""
    paths: list[str] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))
    stamps: array[int] = field(default_factory=lambda: array("q"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    packed_sizes: array[int] = field(default_factory=lambda: array("q"))
    """Empty except for zip archives."""
    labels: array[int] = field(default_factory=lambda: array("q"))
    """Class numbers, or `NO_LABEL`; empty without `classes`."""
    classes: tuple[str, ...] | None = None
    """Names of the classes, if the source has labels of its own and they are wanted."""
    labels_from: str = ""
    """Where the classes come from, or why there are none, if the source knows."""
    directory: str = ""
    """Name of the directory that the source is; the class of the files at its top, beside other such sources."""
    without_class: set[int] = field(default_factory=set)
    """Entries whose directory is not their class, because of a label file."""
    unmatched_rows: int = 0
    """Rows of label files that name no entry."""
    rejections: dict[int, Rejection] = field(default_factory=dict)
    """By number of the entry."""

    @classmethod
    def of_rows(cls, names: list[str], size: int, stamp: int) -> Entries:
        """The rows of a table or array, all of one size in bytes; a row's offset is its number."""
        count = len(names)
        return cls(False, names, array("q", [size]) * count, array("q", [stamp]) * count, array("q", range(count)))

    def add(self, path: str, size: int, stamp: int, offset: int = 0) -> None:
        """Append one input."""
        self.paths.append(path)
        self.sizes.append(size)
        self.stamps.append(stamp)
        self.offsets.append(offset)


class Source(Protocol):
    """A container of inputs. It is listed once, then pickled, and read in worker processes."""

    name: str
    """Distinguishes its inputs from those of other sources."""
    parallel: bool
    """Whether several threads can read at once, and are faster."""

    def entries(self, labels: bool, check_stop: Callable[[], None]) -> Entries:
        """List the inputs, with the source's own labels if `labels`; `check_stop` is called now and then, may raise."""

    def read(self, item: Input) -> bytes:
        """The bytes of an input's image file."""


class Inputs(Sequence[Input]):
    """Inputs of all sources, sorted by name; an `Input` is made when it is asked for.

    Args:
        prefixes: text before the paths of each source, which makes them names.
        entries: of each source.
        labels: class numbers of each source's entries, or `NO_LABEL`.
    """

    def __init__(self, prefixes: list[str], entries: list[Entries], labels: list[array[int]]) -> None:
        self._prefix_lengths = [len(prefix) for prefix in prefixes]
        names = [prefix + path for prefix, source in zip(prefixes, entries) for path in source.paths]
        # The sort is stable: equal names stay in the order of their sources and, in an archive, of their members.
        order = np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64)
        self.names = [names[i] for i in order.tolist()]
        numbers = np.repeat(np.arange(len(entries)), [len(source.paths) for source in entries])
        self._sources = numbers.astype(np.int32)[order]
        self.sizes = _column([source.sizes for source in entries])[order]
        self.stamps = _column([source.stamps for source in entries])[order]
        self._offsets = _column([source.offsets for source in entries])[order]
        packed_sizes = [source.packed_sizes or array("q", bytes(8 * len(source.paths))) for source in entries]
        self._packed_sizes = _column(packed_sizes)[order]
        self.labels = _column(labels).astype(np.int32)[order]
        self.rejections = self._rejections(entries, order)

    def _rejections(self, entries: list[Entries], order: NDArray[np.int64]) -> dict[int, Rejection]:
        """By position; of several files of one name in one source all but the last are rejected."""
        known: dict[int, Rejection] = {}
        first = 0
        for source in entries:
            known |= {first + number: rejection for number, rejection in source.rejections.items()}
            first += len(source.paths)
        rejections = {position: known[i] for position, i in enumerate(order.tolist()) if i in known} if known else {}
        for position, (name, next_name) in enumerate(zip(self.names, self.names[1:])):
            if name == next_name and self._sources[position] == self._sources[position + 1]:
                rejections.setdefault(position, Rejection("scattered", "a later member has the same name"))
        return rejections

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, at: int) -> Input: ...
    @overload
    def __getitem__(self, at: slice) -> list[Input]: ...
    def __getitem__(self, at: int | slice) -> Input | list[Input]:
        if isinstance(at, int):
            at = range(len(self))[at]
            return self[at : at + 1][0]
        columns = (self.labels, self._sources, self.sizes, self.stamps, self._offsets, self._packed_sizes)
        rows = zip(*(column[at].tolist() for column in columns))
        inputs = []
        positions = range(len(self))[at]
        for position, name, (number, source, size, stamp, offset, packed) in zip(positions, self.names[at], rows):
            label, path = None if number == NO_LABEL else number, name[self._prefix_lengths[source] :]
            rejection = self.rejections.get(position)
            inputs.append(Input(name, label, source, path, size, stamp, offset, packed, rejection))
        return inputs

    def __iter__(self) -> Iterator[Input]:
        for first in range(0, len(self), _CHUNK):
            yield from self[first : first + _CHUNK]


def _column(parts: list[array[int]]) -> NDArray[np.int64]:
    return np.concatenate([np.frombuffer(part, dtype=np.int64) for part in parts])


def check_size(data: bytes, item: Input) -> bytes:
    """The same bytes, if there are as many as listed.

    Raises:
        Rejected: source_changed.
    """
    if len(data) != item.size:
        raise Rejected("source_changed", f"{len(data)} bytes, listed with {item.size}")
    return data
