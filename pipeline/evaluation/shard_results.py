"""What a network computes of a shard set, kept in one file for each shard: evaluation resumes, processes share it.

    CACHE/features-<12 digits>/NAME-000000-<16 digits>.safetensors      the digits of the directory are the network's

The digits of a file are a hash of all that its content depends on: the shard's tar, the settings of the set, the
network and how it is called. So the files of several sets can lie in one directory, and a shard that has changed gets a
new file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.data.loading.batches import Batch, read_range
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import DataError
from pipeline.evaluation import result_file
from pipeline.evaluation.result_file import Arrays
from pipeline.storage import files


@dataclass(frozen=True)
class ShardResults:
    """Arrays computed from each shard of a set."""

    shards: ShardSet
    directory: str
    """Where the files lie: matches `result_file.DIRECTORY`."""
    network: dict[str, str]
    """What the arrays depend on besides the images."""
    compute_batch: Callable[[Batch], Arrays]
    """Arrays, (B, …) each, of a batch whose positions are the numbers of its images in the set."""
    batch: int
    """Images in a batch. Batches start with each shard, so that results do not depend on the number of processes."""

    @cached_property
    def names(self) -> list[str]:
        """The file name of each shard."""
        digests = (json.dumps(self._identity(i), sort_keys=True).encode() for i in range(len(self.shards.shards)))
        return [
            f"{record.stem.rpartition('/')[2]}-{hashlib.sha256(digest).hexdigest()[:16]}.safetensors"
            for record, digest in zip(self.shards.shards, digests, strict=True)
        ]

    def missing(self) -> list[int]:
        """The numbers of the shards without a file, by one listing."""
        there = set(files.listdir(self.directory))
        return [i for i, name in enumerate(self.names) if name not in there and self.shards.shards[i].samples]

    def exists(self, i: int) -> bool:
        """Whether shard i has a file."""
        return files.exists(files.join(self.directory, self.names[i]))

    def compute(self, i: int, each: Callable[[int], None]) -> None:
        """Compute and store the arrays of shard i.

        Args:
            i: number of the shard.
            each: gets the number of images after each batch; may raise.

        Raises:
            ConfigError: the network does not accept the images.
            DataError: an image is missing or damaged, a result is not finite, or there is no space left.
        """
        end = int(self.shards.shards.ends[i])
        first = end - self.shards.shards[i].samples
        parts: list[Arrays] = []
        for start in range(first, end, self.batch):
            numbers = range(start, min(start + self.batch, end))
            parts.append(self.compute_batch(read_range(self.shards, numbers)))
            each(len(numbers))
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for name, array in arrays.items():
            if bad := int((~np.isfinite(array).reshape(end - first, -1).all(axis=1)).sum()):
                raise DataError(f"{self.shards.tar(i)}: the {name} of {bad} of {end - first} images are not finite")
        result_file.write(files.join(self.directory, self.names[i]), self._identity(i), arrays)

    def read(self) -> Arrays:
        """The arrays of the whole set, in the order of the index.

        Raises:
            DataError: a file is missing, damaged or of something else.
        """
        parts = [self._read(i) for i, record in enumerate(self.shards.shards) if record.samples]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _read(self, i: int) -> Arrays:
        url = files.join(self.directory, self.names[i])
        try:
            identity, arrays = result_file.parse(url)
        except FileNotFoundError:
            raise DataError(f"{url} was removed while this job ran: run the same command again") from None
        if identity != self._identity(i) or {len(array) for array in arrays.values()} != {
            self.shards.shards[i].samples
        }:
            raise DataError(f"{url} holds results of something else: remove it; the same command makes it again")
        return arrays

    def _identity(self, i: int) -> dict[str, Any]:
        """All that the arrays of a shard depend on."""
        return {
            "tar_sha256": self.shards.shards[i].sha256,
            "settings_sha256": self.shards.settings_sha256,
            "size": list(self.shards.size),
            "channels": self.shards.channels,
            **self.network,
        }
