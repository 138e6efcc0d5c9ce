"""Job: look at every byte of a shard set, a sample set, a run or a checkpoint, and name what is wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import TypeVar

from pipeline import storage
from pipeline.data import integrity, pool, sampleset
from pipeline.data.shardset import ShardSet
from pipeline.errors import ConfigError, NoCheckpoint, Stopped
from pipeline.run import checkpoint
from pipeline.run.interrupt import Interrupt
from pipeline.run.progress import Progress

_T = TypeVar("_T")


def verify(path: str, *, quiet: bool = False) -> list[str]:
    """Check a shard set, a sample set, a run or one of its checkpoints.

    Args:
        path: directory or URL.
        quiet: no progress.

    Returns:
        One line a finding, naming the file and where in it; none if all is sound.

    Raises:
        ConfigError: there is nothing of this name, or it is none of these.
        DataError: a store cannot be reached, or does not give parts of files.
        Stopped: on request.
    """
    if not storage.is_dir(path):
        raise ConfigError(f"{path}: no such directory: give a shard set, a sample set, a run or a checkpoint")
    names = set(storage.listdir(path))
    is_run = bool(names & {"config.yaml", "checkpoints"})
    with Interrupt() as interrupt:

        def go_on() -> None:
            if interrupt.requested:
                raise Stopped(f"stopped by {interrupt.requested}: nothing is proved about {path}; start again")

        def each(items: Sequence[_T]) -> Iterator[_T]:
            unit = "checkpoints" if is_run else "shards"
            with Progress(len(items), "verifying", unit=unit, quiet=quiet) as progress:
                for item in items:
                    go_on()
                    yield item
                    progress.advance()

        if "manifest.json" in names:
            return _verify_checkpoint(path)
        if is_run:
            return checkpoint.verify(path, each)
        if "index.json" in names or any(name.endswith(".tar") for name in names):
            return integrity.verify(path, partial(_side_by_side, interrupt=interrupt, go_on=go_on, quiet=quiet))
        if any(sampleset.RECORD.fullmatch(name) for name in names):
            return sampleset.verify(path, each)
    raise ConfigError(f"{path} is neither a shard set, a sample set, a run nor a checkpoint: give one of these")


def _verify_checkpoint(path: str) -> list[str]:
    try:
        checkpoint.find(path)
    except NoCheckpoint as error:
        return [str(error)]
    return []


def _side_by_side(
    shards: ShardSet, *, interrupt: Interrupt, go_on: Callable[[], None], quiet: bool
) -> Iterator[list[str]]:
    """The findings in each shard, several shards at a time; a picture that crashes its decoder is one of them."""
    count, started, done = len(shards.shards), time.monotonic(), 0
    findings = pool.run(
        integrity.check,
        ([i] for i in range(count)),
        setup=partial(ShardSet.indexed, shards.url),
        workers=min(len(os.sched_getaffinity(0)), count),
        stop=lambda: interrupt.requested is not None,
        bury=integrity.bury,
        cpu_limit_s=pool.NO_LIMIT_S,
    )
    with Progress(count, "verifying", unit="shards", quiet=quiet) as progress, closing(findings):
        for record, found in zip(shards.shards, findings):
            done += record.bytes
            progress.note(f"{done / (time.monotonic() - started) / 1e6:.0f} MB/s")
            progress.advance()
            yield found[0]
    go_on()
