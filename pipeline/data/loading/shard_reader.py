"""The image files of a shard set's samples, read at the byte offsets of the sidecars and checked."""

from __future__ import annotations

import zlib
from collections import deque
from functools import partial
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.loading.order import Place
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import DataError
from pipeline.processes.background import Background
from pipeline.storage import files

_LEAST_AHEAD, _SCATTERED = 64, 960
_GOLDEN_RATIO = 0.618034  # its multiples spread evenly between whole numbers


class _Opened(NamedTuple):
    shard: int
    rows: NDArray[np.void]
    file: BinaryIO


class ShardReader:
    """Reads samples from the shards. Read in the order of the tars, each shard is opened once and streamed."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._opened: _Opened | None = None
        self._announced = deque[Place]()
        self._next: tuple[Place, Background[_Opened]] | None = None
        self._at = 0

    def announce(self, place: Place) -> None:
        """Open the shard of a later read in time, if it lies in a store; `place` is the first that is read of it.

        To open a shard takes two answers of the store, one after the other. All ranks wait for the slowest one in each
        step, and with a thousand ranks some rank opens a shard in almost every step.
        """
        if files.is_remote(self._shards.tar(place.shard)):
            self._announced.append(place)
            self._open_next()

    def read(self, place: Place) -> tuple[bytes, int]:
        """Image file and label of a sample.

        Raises:
            DataError: the sample is missing, cut short or damaged.
        """
        shard, row = place
        try:
            if self._opened is None or self._opened.shard != shard:
                self._opened = self._take_next(place)
            offset, length, crc32, image_offset, image_length, label = self._opened.rows[row].item()
            if offset != self._at:
                self._opened.file.seek(offset)
            data = self._opened.file.read(length)
        except OSError as error:
            raise DataError(damage_message(self._shards, place, f"cannot be read ({error})")) from error
        self._at = offset + length
        if zlib.crc32(data) != crc32:
            if self._shards.cache:
                self._shards.cache.forget(self._shards.shards[shard].sha256)
            is_cut = len(data) < length
            what = "is missing: the file is cut short" if is_cut else "does not have the crc32 of the sidecar"
            raise DataError(damage_message(self._shards, place, what))
        return data[image_offset : image_offset + image_length], label

    def close(self) -> None:
        """Close the open shard; the next read opens one again."""
        if self._opened:
            self._opened.file.close()
            self._opened = None

    def _take_next(self, place: Place) -> _Opened:
        """Open the shard of a place, or take it if it was announced."""
        self.close()
        if self._next and self._next[0] == place:
            opened = self._next[1].result()
        else:
            opened = self._open(place)
            self._announced.clear()
        self._next = None
        self._open_next()
        self._at = int(opened.rows["offset"][place.row])
        return opened

    def _open_next(self) -> None:
        if self._announced and not self._next:
            place = self._announced.popleft()
            self._next = place, Background(partial(self._open, place))

    def _open(self, place: Place) -> _Opened:
        rows = self._shards.sidecar(place.shard)
        return _Opened(place.shard, rows, self._shards.open_tar(place.shard, int(rows["offset"][place.row])))


def announced_ahead(lane: int) -> int:
    """Samples of a lane before the first one of a shard at which it is announced.

    All lanes end an epoch together, so each has another number, and not all ask the store in the same moment.
    """
    return _LEAST_AHEAD + int(_SCATTERED * (lane * _GOLDEN_RATIO % 1))


def damage_message(shards: ShardSet, place: Place, what: str) -> str:
    """The message about a sample that cannot be read."""
    return f"{shards.tar(place.shard)}: the sample in row {place.row} {what}; `ddpm verify {shards.url}` names all such"
