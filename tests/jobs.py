"""The jobs `shard` and `index` with their settings and options side by side, as on the command line."""

from __future__ import annotations

from typing import Any

from pipeline import index as index_job
from pipeline import shard as shard_job
from pipeline.data.shards.settings import IndexSettings, ShardSettings
from pipeline.data.shards.summary import Summary


def shard(sources: list[str], out: str, *, size: int | tuple[int, int], **options: Any) -> Summary:
    """`ddpm shard`; a `size` that is one number is that of squares."""
    settings = {name: options.pop(name) for name in ShardSettings.model_fields if name in options}
    size = (size, size) if isinstance(size, int) else size
    return shard_job.shard(sources, out, ShardSettings(size=size, **settings), **options)


def index(tars: list[str], out: str, **options: Any) -> Summary:
    """`ddpm index`."""
    settings = {name: options.pop(name) for name in IndexSettings.model_fields if name in options}
    return index_job.index(tars, out, IndexSettings(**settings), **options)
