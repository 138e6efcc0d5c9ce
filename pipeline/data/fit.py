"""Whether a shard set is what a configuration was written for."""

from __future__ import annotations

from pipeline.config import DataSection
from pipeline.data.shardset import ShardSet
from pipeline.errors import ConfigError


def check_fit(shards: ShardSet, section: DataSection, classes: int) -> None:
    """Refuse pictures of another size or kind than the network is built for.

    Args:
        shards: the pictures.
        section: says of what size and how many channels they are.
        classes: of a class-conditional network; 0 takes pictures of any class.

    Raises:
        ConfigError: with the key to change.
    """
    size = section.height_width
    if size != shards.size:
        theirs = "x".join(map(str, shards.size))
        raise ConfigError(
            f"data.size is {size[0]}x{size[1]}, but {shards.url} holds {theirs}: set data.size to that, or shard again"
        )
    if section.channels != shards.channels:
        raise ConfigError(
            f"data.channels is {section.channels}, but {shards.url} has {shards.channels}: "
            "set it to that, or shard again"
        )
    if classes and classes != len(shards.classes or ()):
        raise ConfigError(
            f"model.num_classes is {classes}, but {shards.url} has {len(shards.classes or ())} classes: set it to "
            "that, or to 0 for an unconditional model"
        )
