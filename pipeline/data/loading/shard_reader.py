"""The image files of a shard set's samples, read at the byte offsets of the sidecars and checked."""

from __future__ import annotations

import zlib
from functools import partial
from io import BufferedReader
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.data.loading.order import Place
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import DataError
from pipeline.processes.background import Background
from pipeline.storage import files


class _Opened(NamedTuple):
    shard: int
    rows: NDArray[np.void]
    file: BinaryIO


class ShardReader:
    """Reads samples from the shards. Read in the order of the tars, each shard is opened once and streamed."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._opened: _Opened | None = None
        self._next: tuple[Place, Background[_Opened]] | None = None
        self._at = 0

    def prepare(self, place: Place) -> None:
        """Begin to open the shard of a later read, whose first sample will be this one, if it lies in a store.

        To open it takes three answers of the store, one after the other. All ranks wait for the slowest one in each
        step, and with a thousand ranks some rank opens a shard in almost every step.
        """
        if files.is_remote(self._shards.tar(place.shard)) and not self._next:
            self._next = place, Background(partial(self._open, place, begin=True))

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
        """Open the shard of a place, or take it if it was prepared."""
        self.close()
        prepared, self._next = self._next, None
        opened = prepared[1].result() if prepared and prepared[0] == place else self._open(place)
        self._at = int(opened.rows["offset"][place.row])
        return opened

    def _open(self, place: Place, *, begin: bool = False) -> _Opened:
        """Open a shard at a sample; with `begin` its first bytes are read, too."""
        rows = self._shards.sidecar(place.shard)
        file = self._shards.open_tar(place.shard, int(rows["offset"][place.row]))
        if begin:
            cast(BufferedReader, file).peek()
        return _Opened(place.shard, rows, file)


def damage_message(shards: ShardSet, place: Place, what: str) -> str:
    """The message about a sample that cannot be read."""
    return f"{shards.tar(place.shard)}: the sample in row {place.row} {what}; `ddpm verify {shards.url}` names all such"
