"""The inputs of all sources in one sorted list, which lies in a row file: some 30 bytes for each, on the disk.

Memory does not grow with the number of inputs: the sources are merged as streams, and a job decodes the rows of the
shard that it makes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, overload

import numpy as np

from pipeline.data.sources.inputs import LABEL_FILE, NO_LABEL, Entries, Input, Rejection
from pipeline.data.sources.labels.label_files import is_label_file
from pipeline.data.sources.row_file import ROWS, Block, BlockWriter, RowFile, temporary
from pipeline.data.sources.row_sort import merge

_SCATTERED = Rejection("scattered", "a later member has the same name")


class Labels(Protocol):
    """The class numbers of the entries of one source."""

    def of(self, first: int, paths: Sequence[str]) -> Sequence[int]:
        """Of the entries from number `first` on, which have these paths; `NO_LABEL` for none."""


class Inputs(Sequence[Input]):
    """Inputs of all sources, sorted by name; an `Input` is made when it is asked for.

    Args:
        rows: of the inputs.
        prefixes: text before the paths of each source, which makes them names.
    """

    def __init__(self, rows: RowFile, prefixes: Sequence[str]) -> None:
        self.rows, self.prefixes = rows, list(prefixes)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> Input: ...
    @overload
    def __getitem__(self, at: slice) -> list[Input]: ...
    def __getitem__(self, at: int | slice) -> Input | list[Input]:
        if isinstance(at, int):
            at = range(len(self))[at]
            return self[at : at + 1][0]
        first, last, step = at.indices(len(self))
        if step != 1:
            return [self[i] for i in range(first, last, step)]
        return [item for block in self.rows.parts(first, last) for item in self._inputs(block)]

    def __iter__(self) -> Iterator[Input]:
        for block in self.rows.blocks():
            yield from self._inputs(block)

    def _inputs(self, block: Block) -> Iterator[Input]:
        rows = zip(block.names, *block.columns.tolist())
        for row, (name, source, size, stamp, offset, packed_size, label) in enumerate(rows):
            path, number = name[len(self.prefixes[source]) :], None if label == NO_LABEL else label
            yield Input(name, number, source, path, size, stamp, offset, packed_size, block.rejections.get(row))


class Sorted(NamedTuple):
    """The sorted list of inputs, and what was found while it was written."""

    inputs: Inputs
    fingerprint: str
    """Hash of the classes, and of all names, sizes, stamps, labels and rejections except those of label files."""
    bytes: int
    """Sum of the sizes."""


def sort(
    prefixes: Sequence[str], entries: Sequence[Entries], labels: Sequence[Labels], classes: Iterable[str] | None
) -> Sorted:
    """Merge the entries of all sources into one list.

    Args:
        prefixes: text before the paths of each source.
        entries: of each source, sorted.
        labels: of each source.
        classes: their names, for the fingerprint.

    Raises:
        DataError: no space left for temporary files.
    """
    digest = hashlib.sha256("\n".join(classes or ()).encode("utf-8", "surrogatepass"))
    writer, size, rejections = BlockWriter(temporary()), 0, list[tuple[int, tuple[str, ...]]]()
    streams = [_blocks(*source) for source in zip(range(len(entries)), prefixes, entries, labels)]
    for block in _without_repeated(merge(streams)):
        digest.update("\n".join(block.names).encode("utf-8", "surrogatepass"))
        sizes, stamps, numbers = map(block.column, ("sizes", "stamps", "labels"))
        for column in (sizes, stamps, numbers.astype(np.int32)):
            digest.update(column.tobytes())
        # Label files are left out: older versions rejected them without a reason of their own, with the same keys.
        known = sorted(block.rejections.items())
        rejections += [(writer.rows + row, tuple(why)) for row, why in known if why.reason != LABEL_FILE]
        size += int(sizes.sum())
        writer.add(block)
    if rejections:
        digest.update(repr(rejections).encode())
    return Sorted(Inputs(writer.written(), prefixes), digest.hexdigest(), size)


def _blocks(source: int, prefix: str, entries: Entries, labels: Labels) -> Iterator[Block]:
    """The entries of one source as blocks of a sorted list."""
    for first in range(0, len(entries.paths), ROWS):
        piece = slice(first, first + ROWS)
        paths = entries.paths[piece]
        nothing = [0] * len(paths)
        columns = (
            [source] * len(paths),
            entries.sizes[piece],
            entries.stamps[piece],
            entries.offsets[piece],
            entries.packed_sizes[piece] or nothing,
            labels.of(first, paths),
        )
        names = [prefix + path for path in paths] if prefix else paths
        numbers = np.array([np.array(column, np.int64) for column in columns])
        yield Block(names, numbers, dict(_rejections(entries, first, paths)))


def _rejections(entries: Entries, first: int, paths: Sequence[str]) -> Iterator[tuple[int, Rejection]]:
    for row, path in enumerate(paths):
        if entries.rejections and (known := entries.rejections.get(first + row)):
            yield row, known
        elif entries.directory_is_class and is_label_file(entries.paths, first + row, path):
            yield row, Rejection(LABEL_FILE)


def _without_repeated(blocks: Iterable[Block]) -> Iterator[Block]:
    """The same blocks; of several files of one name in one source all but the last are rejected."""
    previous: Block | None = None
    for block in blocks:
        if previous is not None:
            yield _marked(previous, (block.names[0], int(block.columns[0, 0])))
        previous = block
    if previous is not None:
        yield _marked(previous, ("", -1))


def _marked(block: Block, after: tuple[str, int]) -> Block:
    """A block whose repeated names are rejected; `after` is the name and source of the row that follows it."""
    for row, (name, next_name) in enumerate(zip(block.names, [*block.names[1:], after[0]])):
        if name == next_name:
            sources = [*block.column("sources"), after[1]]
            if sources[row] == sources[row + 1]:
                block.rejections.setdefault(row, _SCATTERED)
    return block
