"""Run the images of a shard set through a feature network, for jobs that compare sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from operator import add

import torch

from pipeline.data.loading.batches import read_all
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import DataError
from pipeline.evaluation import features, reference
from pipeline.evaluation.features import Extractor
from pipeline.evaluation.moments import Moments

_BATCH = 256


def extractor(file: str, size: tuple[int, int]) -> Extractor:
    """The network of a feature file, on the GPU if there is one.

    Raises:
        ConfigError, DataError: as `features.load`.
    """
    return features.load(file, torch.device("cuda" if torch.cuda.is_available() else "cpu"), size)


def moments(shards: ShardSet, extractor: Extractor, each: Callable[[range], Iterable[int]] = iter) -> Moments:
    """Mean and covariance of the features of all images of a set.

    Args:
        shards: the set.
        extractor: the network.
        each: iterates over the batch numbers; it may report progress or raise.

    Raises:
        DataError: an image is missing or damaged.
    """
    count = -(-shards.samples // _BATCH)
    batches: Iterator[Moments] = (
        Moments.of(extractor(read_all(shards, share=(i, count)).images).features.numpy()) for i in each(range(count))
    )
    return reduce(add, batches)


def store_reference(shards: ShardSet, extractor: Extractor, each: Callable[[range], Iterable[int]] = iter) -> str:
    """Write the feature statistics of a set beside its index, unless they exist already.

    Returns:
        Path or URL of the file.
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
    return reference.path(shards.url, extractor.sha256)
