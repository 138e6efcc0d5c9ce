"""Sorting rows by name in bounded memory: sorted runs in a temporary file, which are then merged (external merge sort).

Names that come in order, as from an object store, make one run, so nothing is merged.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO

import numpy as np

from pipeline.data.sources.inputs import NO_LABEL
from pipeline.data.sources.row_file import ROWS, Block, BlockWriter, RowFile, temporary

_RUN_ROWS, _RUN_CHARACTERS = 1 << 18, 1 << 25
_FAN_IN = 32
"""So many runs are merged at once; of each, one block is in memory."""


class Sorter:
    """Collects the files of one source in any order; their names differ."""

    def __init__(self) -> None:
        self._file = temporary()
        self._runs: list[BlockWriter] = []
        self._last = ""  # the greatest name of the last run
        self._clear()

    def _clear(self) -> None:
        self._names: list[str] = []
        self._sizes, self._stamps, self._characters = array("q"), array("q"), 0

    def add(self, name: str, size: int, stamp: int) -> None:
        """Add one file.

        Raises:
            DataError: no space left for temporary files.
        """
        self._names.append(name)
        self._sizes.append(size)
        self._stamps.append(stamp)
        self._characters += len(name)
        if len(self._names) == _RUN_ROWS or self._characters > _RUN_CHARACTERS:
            self._write()

    def directory_done(self) -> None:
        """Write now, if there is enough: the next directory may have greater names only, and continue the run."""
        if len(self._names) > _RUN_ROWS // 2:
            self._write(keep=len(self._names) % ROWS)

    def _write(self, keep: int = 0) -> None:
        """Write the rows in memory, except the last few, as a run, or as the continuation of the last one."""
        names = self._names
        order = sorted(range(len(names)), key=names.__getitem__)
        kept, order = order[len(order) - keep :], order[: len(order) - keep]
        later = [(names[i], self._sizes[i], self._stamps[i]) for i in kept]
        self._names = [names[i] for i in order]
        sizes, stamps = (np.frombuffer(column, np.int64)[order] for column in (self._sizes, self._stamps))
        if not self._runs or self._runs[-1].rows % ROWS or self._names[0] <= self._last:
            self._runs.append(BlockWriter(self._file))
        self._last = self._names[-1]
        for first in range(0, len(order), ROWS):
            piece = slice(first, first + ROWS)
            zeros = np.zeros_like(sizes[piece])
            columns = np.stack([zeros, sizes[piece], stamps[piece], zeros, zeros, zeros + NO_LABEL])
            self._runs[-1].add(Block(self._names[piece], columns, {}))
        self._clear()
        for row in later:
            self.add(*row)

    def sorted(self) -> RowFile:
        """All rows, sorted by name.

        Raises:
            DataError: no space left for temporary files.
        """
        if self._names:
            self._write()
        runs = [run.written() for run in self._runs]
        while len(runs) > 1:
            runs = _merged_in_groups([run.blocks() for run in runs], _FAN_IN)
        return runs[0] if runs else BlockWriter(self._file).written()


def merge(streams: Sequence[Iterable[Block]]) -> Iterator[Block]:
    """Merge sorted streams of blocks into one; of equal names, those of the lower source number come first.

    Raises:
        DataError: no space left for temporary files.
    """
    while len(streams) > _FAN_IN:
        streams = [run.blocks() for run in _merged_in_groups(streams, _FAN_IN)]
    return iter(streams[0]) if len(streams) == 1 else _merge(streams)


def _merged_in_groups(streams: Sequence[Iterable[Block]], size: int) -> list[RowFile]:
    file = temporary()
    return [_stored(_merge(streams[first : first + size]), file) for first in range(0, len(streams), size)]


def _stored(blocks: Iterable[Block], file: BinaryIO) -> RowFile:
    writer = BlockWriter(file)
    for block in blocks:
        writer.add(block)
    return writer.written()


def _merge(streams: Sequence[Iterable[Block]]) -> Iterator[Block]:
    rows = heapq.merge(*map(_rows, streams))
    while chunk := list(islice(rows, ROWS)):
        names, *columns, rejections = zip(*chunk)
        known = {row: why for row, why in enumerate(rejections) if why}
        yield Block(list(names), np.array(columns, np.int64), known)


def _rows(blocks: Iterable[Block]) -> Iterator[tuple[Any, ...]]:
    """Name and source number, which decide the order, and the other columns; no two streams share both."""
    for block in blocks:
        yield from zip(block.names, *block.columns.tolist(), map(block.rejections.get, range(len(block.names))))
