"""Job: look at every byte of a shard set, a sample set, a run or a checkpoint, and name what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from pipeline import storage
from pipeline.data import integrity, sampleset
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
        Stopped: on request.
    """
    if not storage.is_dir(path):
        raise ConfigError(f"{path}: no such directory: give a shard set, a sample set, a run or a checkpoint")
    names = set(storage.listdir(path))
    is_run = bool(names & {"config.yaml", "checkpoints"})
    with Interrupt() as interrupt:

        def each(items: Sequence[_T]) -> Iterator[_T]:
            unit = "checkpoints" if is_run else "shards"
            with Progress(len(items), "verifying", unit=unit, quiet=quiet) as progress:
                for item in items:
                    if interrupt.requested:
                        raise Stopped(f"stopped by {interrupt.requested}: nothing is proved about {path}; start again")
                    yield item
                    progress.advance()

        if "manifest.json" in names:
            try:
                checkpoint.find(path)
            except NoCheckpoint as error:
                return [str(error)]
            return []
        if is_run:
            return checkpoint.verify(path, each)
        if "index.json" in names or any(name.endswith(".tar") for name in names):
            return integrity.verify(path, each)
        if any(sampleset.RECORD.fullmatch(name) for name in names):
            return sampleset.verify(path, each)
    raise ConfigError(f"{path} is neither a shard set, a sample set, a run nor a checkpoint: give one of these")
