"""Joint: a shard set's pictures through a feature network, for the jobs that compare sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from operator import add

import torch

from pipeline.data.batches import read_all
from pipeline.data.shardset import ShardSet
from pipeline.errors import DataError
from pipeline.score import features, reference
from pipeline.score.features import Extractor
from pipeline.score.moments import Moments

_BATCH = 256


def extractor(file: str, size: tuple[int, int]) -> Extractor:
    """The network of a feature file, on the GPU if there is one.

    Raises:
        ConfigError, DataError: as `score.features.load`.
    """
    return features.load(file, torch.device("cuda" if torch.cuda.is_available() else "cpu"), size)


def moments(shards: ShardSet, extractor: Extractor, each: Callable[[range], Iterable[int]] = iter) -> Moments:
    """Mean and covariance of the features of all pictures of a set.

    Args:
        shards: the set.
        extractor: the network.
        each: gives the batches one by one, to watch or to end the work.

    Raises:
        DataError: a picture is missing or damaged.
    """
    count = -(-shards.samples // _BATCH)
    of_batches: Iterator[Moments] = (
        Moments.of(extractor(read_all(shards, share=(i, count)).images).features.numpy()) for i in each(range(count))
    )
    return reduce(add, of_batches)


def store_reference(shards: ShardSet, extractor: Extractor, each: Callable[[range], Iterable[int]] = iter) -> str:
    """Write the statistics of a set beside its index, unless they are there.

    Returns:
        Where they are.
    """
    identity = reference.Identity(
        features_sha256=extractor.sha256,
        preprocessing=extractor.preprocessing,
        data_sha256=shards.sha256,
        settings_sha256=shards.settings_sha256,
        channels=shards.channels,
        size=shards.size,
    )
    try:
        reference.read(shards.url, identity)
    except (FileNotFoundError, DataError):
        reference.write(shards.url, identity, moments(shards, extractor, each))
    return reference.place(shards.url, extractor.sha256)
