"""Job: check every byte of a shard set, a sample set, a run or a checkpoint, and report what is damaged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import TypeVar

from pipeline import path_kind
from pipeline.checkpoints import ema_snapshots
from pipeline.checkpoints.checkpoint import find_checkpoint, verify_checkpoints
from pipeline.checkpoints.run_dir import RunDir
from pipeline.cluster.interrupt import Interrupt
from pipeline.data.shards import sample_set
from pipeline.data.shards import verify as verify_shards
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import ConfigError, NoCheckpoint, Stopped
from pipeline.evaluation import result_file
from pipeline.monitoring.progress import Progress
from pipeline.path_kind import SAMPLE_RECORD
from pipeline.processes import pool
from pipeline.storage import files

_T = TypeVar("_T")


def verify(path: str, *, quiet: bool = False) -> list[str]:
    """Check a shard set, a sample set, a run or one of its checkpoints.

    Args:
        path: directory or URL.
        quiet: no progress bar.

    Returns:
        One line for each finding, with the file and the sample; none if everything is intact.

    Raises:
        ConfigError: `path` does not exist, or is none of these.
        DataError: a store cannot be reached, or cannot read parts of files.
        Stopped: on request.
    """
    if not files.is_dir(path):
        raise ConfigError(f"{path}: no such directory: give a shard set, a sample set, a run or a checkpoint")
    names, run = files.listdir(path), RunDir(path)
    is_run = files.exists(run.config) or files.exists(run.checkpoints)
    with Interrupt() as interrupt:

        def check_stop() -> None:
            if interrupt.requested:
                raise Stopped(f"stopped by {interrupt.requested}: not all files were checked in {path}; start again")

        def each(items: Sequence[_T]) -> Iterator[_T]:
            unit = "checkpoints" if is_run else "shards"
            with Progress(len(items), "verifying", unit=unit, quiet=quiet) as progress:
                for item in items:
                    check_stop()
                    yield item
                    progress.advance()

        if "manifest.json" in names:
            return _verify_checkpoint(path)
        if is_run:
            return [*verify_checkpoints(path, each), *ema_snapshots.verify(path)]
        has_tars = "index.json" in names or any(name.endswith(".tar") for name in names)
        if _is_checked_by_records(path, names, has_tars=has_tars):
            return sample_set.verify(path, each)
        if has_tars:
            check = partial(_in_parallel, interrupt=interrupt, check_stop=check_stop, quiet=quiet)
            return [*verify_shards.verify(path, check), *result_file.verify(path)]
    raise ConfigError(f"{path} is {path_kind.of(path)}: give a shard set, a sample set, a run or a checkpoint")


def _is_checked_by_records(path: str, names: Sequence[str], *, has_tars: bool) -> bool:
    """Whether a directory is a set of samples that its index, if it has one, does not describe completely."""
    is_sample_set = any(map(SAMPLE_RECORD.fullmatch, names))
    return is_sample_set and (not has_tars or sample_set.index_is_incomplete(path))


def _verify_checkpoint(path: str) -> list[str]:
    try:
        find_checkpoint(path)
    except NoCheckpoint as error:
        return [str(error)]
    return []


def _in_parallel(
    shards: ShardSet, *, interrupt: Interrupt, check_stop: Callable[[], None], quiet: bool
) -> Iterator[list[str]]:
    """Check several shards at a time; an image that crashes its decoder is a finding too."""
    count, started, done = len(shards.shards), time.monotonic(), 0
    findings = pool.run(
        verify_shards.check,
        ([i] for i in range(count)),
        setup=partial(ShardSet.indexed, shards.url),
        workers=min(pool.cores(), count),
        stop=lambda: interrupt.requested is not None,
        on_worker_death=verify_shards.on_worker_death,
        cpu_limit_s=pool.NO_LIMIT_S,
    )
    with Progress(count, "verifying", unit="shards", quiet=quiet) as progress, closing(findings):
        for record, (of_shard,) in zip(shards.shards, findings):
            done += record.bytes
            progress.set_postfix(f"{done / (time.monotonic() - started) / 1e6:.0f} MB/s")
            progress.advance()
            yield of_shard
    check_stop()
