"""The image files of a shard set's samples, read at the byte offsets of the sidecars and checked."""

from __future__ import annotations

import zlib
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.data.loading.order import Place
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import DataError


class ShardReader:
    """Reads samples from the shards. Read in the order of the tars, each shard is opened once and streamed."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._shard = -1
        self._rows: NDArray[np.void]
        self._file: BinaryIO | None = None
        self._at = 0

    def read(self, place: Place) -> tuple[bytes, int]:
        """Image file and label of a sample.

        Raises:
            DataError: the sample is missing, cut short or damaged.
        """
        shard, row = place
        if shard != self._shard:
            self.close()
            self._rows = self._shards.sidecar(shard)
            self._shard = shard
        offset, length, crc32, image_offset, image_length, label = self._rows[row].item()
        try:
            if self._file is None:
                self._file = self._shards.open_tar(shard, offset)
            elif offset != self._at:
                self._file.seek(offset)
            data = self._file.read(length)
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
        if self._file is not None:
            self._file.close()
            self._file = None


def damage_message(shards: ShardSet, place: Place, what: str) -> str:
    """The message about a sample that cannot be read."""
    return f"{shards.tar(place.shard)}: the sample in row {place.row} {what}; `ddpm verify {shards.url}` names all such"
