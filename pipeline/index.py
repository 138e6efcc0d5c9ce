"""Job: existing tars → shard set, without copying them: a webdataset made elsewhere, or the parts of a shard set."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from pipeline.cluster.interrupt import Interrupt
from pipeline.data.shards import index_tars, joined_labels, record_files
from pipeline.data.shards.index_file import INDEX
from pipeline.data.shards.index_tars import Indexer, Tar
from pipeline.data.shards.join import collect, is_part, publish, reference, refuse_too_many_bad
from pipeline.data.shards.record import ShardRecord
from pipeline.data.shards.settings import IndexSettings
from pipeline.data.shards.shard_set import REJECTED, ShardSet, read_record
from pipeline.data.shards.summary import Summary, train_command
from pipeline.data.sources import globs
from pipeline.data.sources.source_file import SourceFile
from pipeline.errors import ConfigError, DataError, Stopped
from pipeline.monitoring.progress import Progress
from pipeline.processes import pool
from pipeline.storage import files

_SIDECAR_OR_RECORD = re.compile(r"index-\d{6,}\.(npy|json)")
_THREADS = 16
_SIZES_SHOWN = 5


def index(
    tars: Sequence[str],
    out: str,
    settings: IndexSettings,
    *,
    workers: int = 0,
    max_bad_fraction: float = 0.05,
    quiet: bool = False,
) -> Summary:
    """Make a shard set of tars that stay where they are.

    Tars that `ddpm shard` made are parts of one set, and are joined by their records. Other tars are read, once.

    Args:
        tars: paths, URLs, globs, lists in braces, and directories of tars. Tars made elsewhere keep this order.
        out: directory or URL of the set, which may be that of the tars.
        settings: how the images of tars made elsewhere are read.
        workers: tars read in parallel; 0: one for each core. The result does not depend on it.
        max_bad_fraction: if a larger share of the samples is rejected, the set is written and DataError is raised.
        quiet: no progress bar.

    Raises:
        ConfigError: settings given for parts, a missing tar, or `out` holds something else.
        DataError: a damaged tar; images of several sizes and no `size`; parts that do not fit; no image.
        Stopped: on request; the same call continues from there.
    """
    started = time.monotonic()
    if not out:
        raise ConfigError("--out is empty: give the directory or URL of the set")
    urls = _expand(tars)
    if is_part(urls[0]):
        if settings.labels != "auto" or settings.model_fields_set - {"labels"}:
            raise ConfigError(
                f"{urls[0]} is a shard of `ddpm shard`: leave out --size, --channels and --labels, and --image-ext"
            )
        how, read, counts = "joined", len(urls), _join_parts(urls, out)
        labels_from = "the records of the parts" if counts["classes"] else "the parts have none"
    else:
        how = "indexed"
        read, counts = _index_foreign(urls, out, settings, workers, quiet)
        labels_from = ".cls or .json of the samples" if counts["classes"] else "no .cls or .json of a sample says one"
    refuse_too_many_bad(out, counts, max_bad_fraction)
    seconds, made = time.monotonic() - started, ShardSet.indexed(out)
    return Summary(
        out=out,
        **counts,
        shards=len(urls),
        shards_there=len(urls),
        shards_made=read,
        seconds=round(seconds, 3),
        images_per_s=round(counts["inputs"] * read / len(urls) / seconds, 1),
        how=how,
        labels_from="--labels none" if settings.labels == "none" else labels_from,
        next=train_command(out, made.size, made.channels, len(made.classes or ())),
    )


def _expand(names: Sequence[str]) -> list[str]:
    """Paths and URLs of the tars, each once."""
    urls: list[str] = []
    for name in names:
        if globs.is_pattern(name):
            urls += globs.matches(name)
        elif files.is_dir(name):
            urls += [files.join(name, file) for file in files.listdir(name) if file.endswith(".tar")]
        else:
            urls.append(name)
    if not urls:
        raise ConfigError(f"{', '.join(names)}: it contains no .tar: give tars, or a directory of tars")
    if twice := [url for url, count in Counter(urls).items() if count > 1]:
        raise ConfigError(f"{twice[0]} is given twice: give each tar once")
    return urls


def _join_parts(urls: list[str], out: str) -> dict[str, Any]:
    """Write the index over the parts of a set; returns the totals."""
    records = collect(urls)
    settings, source, classes = (records[0].extra[name] for name in ("settings", "source", "classes"))
    _refuse_other_set(out, settings, source)
    files.make_dirs(out)
    return publish(
        out,
        [replace(record, name=reference(out, record.name)) for record in records],
        size=settings["size"],
        channels=settings["channels"],
        classes=classes,
        source=source,
        settings=settings,
    )


def _index_foreign(
    urls: list[str], out: str, settings: IndexSettings, workers: int, quiet: bool
) -> tuple[int, dict[str, Any]]:
    """Index tars made elsewhere; returns how many of them had to be read, and the totals."""
    with ThreadPoolExecutor(_THREADS) as threads:  # a store answers slowly, but many requests at once
        sources = list(threads.map(_stat, urls))
    tars = [
        Tar(source.url, reference(out, source.url), f"index-{i:06d}", source.size, source.stamp)
        for i, source in enumerate(sources)
    ]
    _refuse_other_set(out, settings.as_json(), {})
    read = _read_tars(tars, out, settings, workers or pool.cores(), quiet)
    records = []
    for tar, record in zip(tars, record_files.together(partial(read_record, out), [tar.stem for tar in tars])):
        if record is None or record.name != tar.name:
            raise DataError(f"{tar.url} was removed or changed while this job ran: run the same command again")
        records.append(record)
    stems = {record.stem for record in records}
    for name in files.listdir(out):
        if _SIDECAR_OR_RECORD.fullmatch(name) and name.rpartition(".")[0] not in stems:  # of tars named earlier
            files.remove(files.join(out, name))
    records, classes = joined_labels.join(out, records)
    return read, publish(
        out,
        records,
        size=settings.size or _common_size(records),
        channels=settings.channels,
        classes=classes,
        source={"tars": len(tars), "bytes": sum(tar.size for tar in tars)},
        settings=settings.as_json(),
    )


def _stat(url: str) -> SourceFile:
    try:
        return SourceFile(url)
    except FileNotFoundError as error:
        server = ", and that its server answers" if files.is_remote(url) else ""
        raise ConfigError(f"{url}: no such tar: check the name{server}") from error


def _identity(settings: dict[str, Any], source: Any) -> dict[str, Any]:
    """The values in which two starts on one set must agree; not `keys`, as tars of another version are read again."""
    fingerprint = source.get("fingerprint") if isinstance(source, dict) else source
    return {name: value for name, value in settings.items() if name != "keys"} | {"source": fingerprint}


def _refuse_other_set(out: str, settings: dict[str, Any], source: dict[str, Any]) -> None:
    """Refuse a directory with the index, or the rejected inputs, of anything but this set."""
    if files.exists(out) and not files.is_dir(out):
        raise ConfigError(f"{out} is a file: give --out a directory")
    names = set(files.listdir(out))
    if INDEX in names:
        try:
            other = ShardSet.indexed(out)
        except DataError as error:
            raise ConfigError(f"{out} holds an {INDEX} of something else: choose another --out") from error
        then, now = _identity(other.settings, other.source), _identity(settings, source)
        if differing := [f"{name} was {then.get(name)}, now {now.get(name)}" for name in then | now
                         if then.get(name) != now.get(name)]:  # fmt: skip
            raise ConfigError(
                f"{out} was made from other sources or settings ({'; '.join(differing)}): choose another --out"
            )
    elif REJECTED in names and not any(map(_SIDECAR_OR_RECORD.fullmatch, names)) and "fingerprint" not in source:
        raise ConfigError(f"{out} holds a {REJECTED} of something else: choose another --out")


def _read_tars(tars: list[Tar], out: str, settings: IndexSettings, workers: int, quiet: bool) -> int:
    """Read those tars that have no valid record yet; returns how many they were."""
    indexer = Indexer(out, settings)
    with Interrupt("" if quiet else "tars that are read stay so") as interrupt:
        files.make_dirs(out)
        unread = [tar for tar, is_read in zip(tars, record_files.together(indexer.has_record, tars)) if not is_read]
        records = pool.run(
            Indexer.index,
            ([tar] for tar in unread),
            setup=partial(Indexer, out, settings),
            workers=min(workers, len(unread)),
            stop=lambda: interrupt.requested is not None,
            on_worker_death=index_tars.on_worker_death,
            cpu_limit_s=pool.NO_LIMIT_S,
        )
        with (
            Progress(len(tars), "indexing", unit="tars", done=len(tars) - len(unread), quiet=quiet) as progress,
            closing(records),
        ):
            for _ in records:
                progress.advance()
        if interrupt.requested and not all(record_files.together(indexer.has_record, unread)):
            raise Stopped(f"stopped by {interrupt.requested}: the same command continues from there")
    return len(unread)


def _common_size(records: list[ShardRecord]) -> list[int]:
    """The [height, width] that all images have; [1, 1] if there are no images."""
    sizes: Counter[str] = Counter()
    for record in records:
        sizes.update(record.extra["picture_sizes"])
    if len(sizes) > 1:
        shown = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(_SIZES_SHOWN))
        more = ", …" if len(sizes) > _SIZES_SHOWN else ""
        raise DataError(
            f"the images have several sizes, height x width ({shown}{more}): give --size; every reader then resizes "
            "the images to it"
        )
    return [int(side) for side in next(iter(sizes), "1x1").split("x")]
