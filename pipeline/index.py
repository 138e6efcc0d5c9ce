"""Job: tars that are there, a webdataset made elsewhere or the parts of a shard set → a shard set, without copying."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from pipeline import storage
from pipeline.data import foreign, patterns, pool
from pipeline.data.foreign import Indexer, Labels, Settings, Tar
from pipeline.data.opened import SourceFile
from pipeline.data.parts import collect, is_part, publish, reference, refuse_too_many_bad
from pipeline.data.shardset import INDEX, REJECTED, ShardRecord, ShardSet, read_record
from pipeline.data.summary import Summary
from pipeline.errors import ConfigError, DataError, Stopped
from pipeline.run.interrupt import Interrupt
from pipeline.run.progress import Progress

_PAPERS = re.compile(r"index-\d{6,}\.(npy|json)")
_LOOKS = 16
_MAX_SIDE_PX = 16_383  # as for `ddpm shard`
_SIZES_SAID = 5


def index(
    tars: Sequence[str],
    out: str,
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    labels: Labels = "auto",
    workers: int | None = None,
    max_bad_fraction: float = 0.05,
    quiet: bool = False,
) -> Summary:
    """Make a shard set of tars that stay where they are.

    Tars that `ddpm shard` made are taken for parts of one set and are joined by their records; others are read, once.

    Args:
        tars: paths, URLs, globs, lists in braces, and folders of tars. Others' tars keep this order.
        out: directory or URL of the set, which may be that of the tars.
        size: (height, width) to bring pictures of several sizes to, in the middle, whenever they are read.
        channels: 3 for colour, which is the default, 1 for grey.
        labels: auto: as .cls or .json say; none.
        workers: tars read side by side; None: one a core. The result does not depend on it.
        max_bad_fraction: more rejected samples than this share are an error, after the set is written.
        quiet: no progress.

    Raises:
        ConfigError: an unusable setting, no such tar, or `out` holds something else.
        DataError: a tar is no sound one; pictures of several sizes and no `size`; parts that do not fit; no picture.
        Stopped: on request; the same call goes on from there.
    """
    started = time.monotonic()
    if not out:
        raise ConfigError("--out is empty: name the directory or URL of the set")
    if channels not in (None, 1, 3):
        raise ConfigError(f"--channels {channels}: 3 for colour or 1 for grey")
    if size and not 1 <= min(size) <= max(size) <= _MAX_SIDE_PX:
        raise ConfigError(f"--size {size[0]}x{size[1]}: 1 to {_MAX_SIDE_PX} pixels a side")
    urls = _expanded(tars)
    if is_part(urls[0]):
        if size or channels or labels != "auto":
            raise ConfigError(f"{urls[0]} is a shard of `ddpm shard`: leave out --size, --channels and --labels")
        counts, read, how = _join(urls, out), len(urls), "joined"
    else:
        settings = Settings(size, channels or 3, labels)
        listed = _listed(urls, out)
        _refuse_other(out, settings.as_json(), {})
        read = _read(listed, out, settings, workers or len(os.sched_getaffinity(0)), quiet)
        counts, how = _publish(listed, out, settings), "indexed"
    refuse_too_many_bad(out, counts, max_bad_fraction)
    seconds = time.monotonic() - started
    return Summary(
        out=out,
        **counts,
        shards=len(urls),
        shards_there=len(urls),
        shards_made=read,
        seconds=round(seconds, 3),
        images_per_s=round(counts["inputs"] * read / len(urls) / seconds, 1),
        how=how,
    )


def _expanded(names: Sequence[str]) -> list[str]:
    """Paths and URLs of the tars, each once."""
    urls: list[str] = []
    for name in names:
        if patterns.is_pattern(name):
            urls += patterns.matches(name)
        elif storage.is_dir(name):
            urls += [storage.join(name, file) for file in storage.listdir(name) if file.endswith(".tar")]
        else:
            urls.append(name)
    if not urls:
        raise ConfigError(f"{', '.join(names)}: not one .tar in it: name tars, or a folder of them")
    if twice := [url for url, count in Counter(urls).items() if count > 1]:
        raise ConfigError(f"{twice[0]} is named twice: name each tar once")
    return urls


def _listed(urls: list[str], out: str) -> list[Tar]:
    with ThreadPoolExecutor(_LOOKS) as looks:  # a store answers slowly, and many at once
        files = list(looks.map(_look, urls))
    names = (reference(out, file.url) for file in files)
    return [
        Tar(file.url, name, f"index-{i:06d}", file.size, file.stamp) for i, (file, name) in enumerate(zip(files, names))
    ]


def _look(url: str) -> SourceFile:
    try:
        return SourceFile(url)
    except FileNotFoundError as error:
        server = ", and that its server answers" if storage.is_remote(url) else ""  # as of patterns
        raise ConfigError(f"{url}: no such tar: check the name{server}") from error


def _identity(settings: dict[str, Any], source: Any) -> dict[str, Any]:
    return {**settings, "source": source.get("fingerprint") if isinstance(source, dict) else source}


def _refuse_other(out: str, settings: dict[str, Any], source: dict[str, Any]) -> None:
    """Refuse a place with the index, or the rejected inputs, of anything but this set."""
    if storage.exists(out) and not storage.is_dir(out):
        raise ConfigError(f"{out} is a file: --out names a directory")
    there = set(storage.listdir(out))
    if INDEX in there:
        try:
            other = ShardSet.indexed(out)
        except DataError as error:
            raise ConfigError(f"{out} holds an {INDEX} of something else: choose another --out") from error
        then, now = _identity(other.settings, other.source), _identity(settings, source)
        if differing := [name for name in then | now if then.get(name) != now.get(name)]:
            said = "; ".join(f"{name} was {then.get(name)}, now {now.get(name)}" for name in differing)
            raise ConfigError(f"{out} is another set ({said}): choose another --out")
    elif REJECTED in there and not any(map(_PAPERS.fullmatch, there)) and "fingerprint" not in source:
        raise ConfigError(f"{out} holds a {REJECTED} of something else: choose another --out")


def _read(tars: list[Tar], out: str, settings: Settings, workers: int, quiet: bool) -> int:
    """Read those tars that have to be, and say how many they were."""
    storage.make_dirs(out)
    indexer = Indexer(out, settings)
    with Interrupt() as interrupt:
        unread = [tar for tar in tars if not indexer.known(tar)]
        records = pool.run(
            foreign.index,
            ([tar] for tar in unread),
            setup=partial(Indexer, out, settings),
            workers=min(workers, len(unread)),
            stop=lambda: interrupt.requested is not None,
            bury=foreign.bury,
            cpu_limit_s=pool.NO_LIMIT_S,
        )
        with (
            Progress(len(tars), "indexing", unit="tars", done=len(tars) - len(unread), quiet=quiet) as progress,
            closing(records),
        ):
            for _ in records:
                progress.advance()
        if interrupt.requested and not all(map(indexer.known, unread)):
            raise Stopped(f"stopped by {interrupt.requested}: the same command goes on from there")
    return len(unread)


def _publish(tars: list[Tar], out: str, settings: Settings) -> dict[str, Any]:
    records = []
    for tar in tars:
        record = read_record(out, tar.stem)
        if record is None or record.name != tar.name:
            raise DataError(f"{tar.url} was removed or changed while this job ran: run the same command again")
        records.append(record)
    used = {record.stem for record in records}
    for name in storage.listdir(out):
        if _PAPERS.fullmatch(name) and name.rpartition(".")[0] not in used:  # of tars that were named before
            storage.remove(storage.join(out, name))
    labels = [int(label) for record in records for label in record.extra["counts"]["classes"]]
    return publish(
        out,
        records,
        size=settings.size or _one_size(records),
        channels=settings.channels,
        classes=[str(label) for label in range(max(labels) + 1)] if labels else None,
        source={"tars": len(tars), "bytes": sum(tar.size for tar in tars)},
        settings=settings.as_json(),
    )


def _one_size(records: list[ShardRecord]) -> list[int]:
    """The size that all pictures have; (1, 1) if there are none."""
    found: Counter[str] = Counter()
    for record in records:
        found.update(record.extra["picture_sizes"])
    if len(found) > 1:
        said = ", ".join(f"{count} of {size}" for size, count in found.most_common(_SIZES_SAID))
        more = ", …" if len(found) > _SIZES_SAID else ""
        raise DataError(
            f"the pictures have several sizes, height x width ({said}{more}): give --size, to which each is brought "
            "whenever it is read"
        )
    return [int(side) for side in next(iter(found), "1x1").split("x")]


def _join(urls: list[str], out: str) -> dict[str, Any]:
    records = collect(urls)
    settings, source, classes = (records[0].extra[name] for name in ("settings", "source", "classes"))
    _refuse_other(out, settings, source)
    storage.make_dirs(out)
    return publish(
        out,
        [replace(record, name=reference(out, record.name)) for record in records],
        size=settings["size"],
        channels=settings["channels"],
        classes=classes,
        source=source,
        settings=settings,
    )
