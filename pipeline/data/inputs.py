"""What the sources hold, kept in columns: some 150 bytes an input, of which there may be millions."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from pipeline.data.images import Rejected

NO_LABEL = -1
PICTURES = frozenset(
    "avif bmp dds dib gif heic heif ico j2k jfif jp2 jpe jpeg jpg jxl mpo "  # noqa: SIM905
    "pbm pcx pgm png pnm ppm psd qoi sgi tga tif tiff webp".split()
)
"""What the names of picture files end with, also of those that end as rejected."""
_AT_ONCE = 4096


class Input(NamedTuple):
    """One picture file, or what is read as one, on its way to becoming a sample; its position is its identity."""

    name: str
    """Its path in its source, after the source's own name if there are several sources."""
    label: int | None
    """Class number."""
    source: int
    """Number of its source in the listing."""
    path: str
    """Relative to the source; bytes that are not UTF-8 as surrogate escapes."""
    size: int
    """Bytes, unpacked; of a table's row what they are on average."""
    stamp: int
    """Differs if the content does: a time of modification or a checksum; 0 where none is to be had."""
    place: int
    """Where its source has it: an offset in bytes, or the number of a row."""
    stored: int
    """Bytes in a zip archive, packed."""


@dataclass
class Entries:
    """What one source holds, in any order; the n-th of every column is one input."""

    by_folder: bool = True
    """Whether the folder that an input lies in says its class, where labels are wanted and `classes` is None."""
    paths: list[str] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))
    stamps: array[int] = field(default_factory=lambda: array("q"))
    places: array[int] = field(default_factory=lambda: array("q"))
    stored: array[int] = field(default_factory=lambda: array("q"))
    """Empty, but for zip archives."""
    labels: array[int] = field(default_factory=lambda: array("q"))
    """Class numbers, or `NO_LABEL`; empty without `classes`."""
    classes: tuple[str, ...] | None = None
    """Names of the classes, if the source has labels of its own and they are wanted."""

    def add(self, path: str, size: int, stamp: int, place: int = 0) -> None:
        """Append one input."""
        self.paths.append(path)
        self.sizes.append(size)
        self.stamps.append(stamp)
        self.places.append(place)


class Source(Protocol):
    """Something that holds inputs. It is listed once, then pickled, and read in worker processes."""

    name: str
    """Keeps its inputs apart from those of other sources, for people."""
    parallel: bool
    """Whether several threads may read at once, and should."""

    def entries(self, labels: bool, go_on: Callable[[], None]) -> Entries:
        """List it; `labels` asks for the labels of its own; `go_on` is called now and then and may raise."""

    def read(self, item: Input) -> bytes:
        """An image file's bytes."""


class Inputs(Sequence[Input]):
    """Inputs of all sources, sorted by name; an item or slice is made when asked for.

    Args:
        prefixes: what stands before the path in the names of each source's inputs.
        found: the entries of each source.
        labels: class numbers of each source's entries, or `NO_LABEL`.
    """

    def __init__(self, prefixes: list[str], found: list[Entries], labels: list[array[int]]) -> None:
        self._cut = [len(prefix) for prefix in prefixes]
        names = [prefix + path for prefix, entries in zip(prefixes, found) for path in entries.paths]
        # Equal names stay in the order of their sources and, in an archive, of their places: the sort is stable.
        order = np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64)
        self.names = [names[i] for i in order.tolist()]
        numbers = np.repeat(np.arange(len(found)), [len(entries.paths) for entries in found])
        self._sources = numbers.astype(np.int32)[order]
        self.sizes = _column([entries.sizes for entries in found])[order]
        self.stamps = _column([entries.stamps for entries in found])[order]
        self._places = _column([entries.places for entries in found])[order]
        self._stored = _column([entries.stored or array("q", bytes(8 * len(entries.paths))) for entries in found])[
            order
        ]
        self.labels = _column(labels).astype(np.int32)[order]

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
        columns = (self._sources, self.sizes, self.stamps, self._places, self._stored, self.labels)
        return [
            Input(name, None if label == NO_LABEL else label, source, name[self._cut[source] :], *rest)
            for name, (source, *rest, label) in zip(self.names[at], zip(*(column[at].tolist() for column in columns)))
        ]

    def __iter__(self) -> Iterator[Input]:
        for first in range(0, len(self), _AT_ONCE):
            yield from self[first : first + _AT_ONCE]


def _column(parts: list[array[int]]) -> NDArray[np.int64]:
    return np.concatenate([np.frombuffer(part, dtype=np.int64) for part in parts])


def as_listed(data: bytes, item: Input) -> bytes:
    """The same bytes, if there are as many as were listed.

    Raises:
        Rejected: source_changed.
    """
    if len(data) != item.size:
        raise Rejected("source_changed", f"{len(data)} bytes, listed with {item.size}")
    return data
