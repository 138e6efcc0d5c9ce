"""A shard set of images on its way to completion: shards of inputs, each made or not.

Shard i holds the inputs [iS, (i+1)S) of the sorted list, whoever makes it and whenever, so any number of workers and
any number of interruptions give the same bytes. Each record carries the settings and the source of the whole set, so
that an unfinished set, too, knows what it is made of.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline import storage
from pipeline.data import patterns
from pipeline.data.dedupe import Seen
from pipeline.data.intake import Made, Placed, Settings
from pipeline.data.parts import Books, publish, totals
from pipeline.data.shardset import (
    INDEX,
    REJECTED,
    Packed,
    ShardRecord,
    ShardSet,
    key,
    read_record,
    refuse_foreign,
    write_shard,
)
from pipeline.data.sources import Listing
from pipeline.errors import ConfigError, DataError

_CHUNK, _CHUNK_BYTES = 64, 1 << 22
"""At most so many inputs, and bytes of pixels, go to a worker together."""
_SHARD_FILE = re.compile(r"(.+)-\d{6,}\.(tar|npy|json)")
_UNCOMMITTED = re.compile(r".+-\d{6,}\.(tar|npy)")
_DERIVED = re.compile(r"reference-[0-9a-f]+\.safetensors")  # what a job has measured of the finished set
_LEFTOVER = re.compile(r"\..*\.tmp")  # what storage was writing when it was killed


@dataclass(frozen=True)
class Task:
    """One shard to make, of the inputs [first, last)."""

    stem: str
    first: int
    last: int


class _Unfinished(Exception):  # noqa: N818  no more inputs come, as the job was told to stop
    pass


class ImageSet:
    """Where the shards go, what they are made of, and which of them are there.

    Args:
        out: directory or URL; its last component names the shards.
        settings: how pictures are made.
        urls: the sources, as given.
        listing: their inputs.

    Raises:
        ConfigError: `out` holds anything but the beginning, or the whole, of this very set.
    """

    def __init__(self, out: str, settings: Settings, urls: Sequence[str], listing: Listing) -> None:
        self._out, self._settings, self._classes = out, settings, listing.classes
        self._inputs = listing.inputs
        self._source = {
            "urls": list(urls),
            "inputs": len(listing.inputs),
            "bytes": listing.bytes,
            "fingerprint": listing.fingerprint,
        }
        _refuse_other(out, settings, self._source)
        prefix, count, size = _prefix(out), len(listing.inputs), settings.shard_samples
        self.tasks = [
            Task(f"{prefix}-{i:06d}", first, min(first + size, count)) for i, first in enumerate(range(0, count, size))
        ]
        self._leftovers = self._unfinished()
        self.look()

    def look(self) -> None:
        """See which shards are there, whoever has made them.

        Raises:
            ConfigError: one of them belongs to another set.
        """
        self._records = {task.stem: record for task in self.tasks if (record := read_record(self._out, task.stem))}
        for record in self._records.values():
            _compare(self._out, record.extra, self._settings, self._source)

    def part(self, number: int, parts: int) -> list[Task]:
        """One of so many runs of whole shards, counted from 0."""
        first, last = (i * len(self.tasks) // parts for i in (number, number + 1))
        return self.tasks[first:last]

    def missing(self, tasks: Sequence[Task]) -> list[Task]:
        """Those of them that are still to be done."""
        return [task for task in tasks if task.stem not in self._records]

    def chunks(self, tasks: Sequence[Task], workers: int) -> Iterator[list[Placed]]:
        """The inputs of these shards, in pieces for so many workers."""
        height, width = self._settings.size
        inputs = sum(task.last - task.first for task in tasks)
        most = min(_CHUNK, _CHUNK_BYTES // (height * width * self._settings.channels), inputs // (4 * workers))
        for task in tasks:
            for first in range(task.first, task.last, max(most, 1)):
                last = min(first + max(most, 1), task.last)
                yield list(map(Placed, range(first, last), self._inputs[first:last]))

    def write(self, tasks: Sequence[Task], made: Iterator[Made]) -> Iterator[ShardRecord]:
        """Write shards, in their order; ends early where `made` does.

        Args:
            tasks: the shards.
            made: what became of each of their inputs, in order.

        Raises:
            ConfigError: meanwhile another job has begun another set in the same place.
            DataError: no space left.
        """
        seen, wanted = Seen(self._settings.dedupe), set(tasks)
        for task in self.tasks:
            if record := self._records.get(task.stem):
                for of, fingerprint in record.extra.get("fingerprints", {}).items():
                    seen.keep(bytes.fromhex(fingerprint), of)
            elif task in wanted:
                books, fingerprints = Books(), dict[str, str]()
                samples = _samples(itertools.islice(made, task.last - task.first), task, books, seen, fingerprints)
                try:
                    yield write_shard(self._out, task.stem, samples, partial(self._remember, books, fingerprints))
                except _Unfinished:
                    return

    def _remember(self, books: Books, fingerprints: dict[str, str]) -> dict[str, Any]:
        _refuse_other(self._out, self._settings, self._source)
        classes = None if self._classes is None else list(self._classes)
        known = {"settings": self._settings.as_json(), "source": self._source, "classes": classes, **books.as_json()}
        return known | ({"fingerprints": fingerprints} if fingerprints else {})

    def counts(self) -> dict[str, Any]:
        """Totals over the shards that are there."""
        return totals(self._records.values(), self._classes)

    def publish(self) -> None:
        """Write `rejected.jsonl`, and the index if there is a sample; nothing if both are there already.

        Raises:
            DataError: no space left.
        """
        records = [self._records[task.stem] for task in self.tasks]
        if self._is_indexed(records):
            return
        for name, size in self._unfinished().items():
            if self._leftovers.get(name) == size:  # it has not grown since: nobody is at it
                storage.remove(storage.join(self._out, name))
        publish(
            self._out,
            records,
            size=self._settings.size,
            channels=self._settings.channels,
            classes=self._classes,
            source=self._source,
            settings=self._settings.as_json(),
        )

    def _is_indexed(self, records: list[ShardRecord]) -> bool:
        try:
            indexed = ShardSet.indexed(self._out)
        except DataError:
            return False
        same = [shard.entry() for shard in indexed.shards] == [record.entry() for record in records]
        return same and storage.exists(storage.join(self._out, REJECTED))

    def _unfinished(self) -> dict[str, int]:
        """Sizes of the files that are being written, or were when their writer was killed."""
        sizes = {}
        for name in filter(_LEFTOVER.fullmatch, storage.listdir(self._out)):
            with suppress(FileNotFoundError):
                sizes[name] = storage.size(storage.join(self._out, name))
        return sizes


def _samples(
    made: Iterator[Made], task: Task, books: Books, seen: Seen, fingerprints: dict[str, str]
) -> Iterator[Packed]:
    """The pictures of a shard, less those that were there before; it fills books and fingerprints."""
    left = task.last - task.first
    for one in made:
        left -= 1
        if one.fingerprint and (original := seen.original(one.fingerprint)):
            one = Made(one.position, one.source, ("duplicate", f"of {original}"))  # noqa: PLW2901
        elif one.fingerprint:
            seen.keep(one.fingerprint, key(one.position))
            fingerprints[key(one.position)] = one.fingerprint.hex()
        if one.packed is None:
            books.reject(one.line())
        else:
            books.take(one.transforms, one.short_side, one.packed.label)
            yield one.packed
    if left:
        raise _Unfinished


def _refuse_other(out: str, settings: Settings, source: dict[str, Any]) -> None:
    """Refuse a place that holds anything but the beginning of this set; one record tells, as all agree."""
    try:
        refuse_foreign(out, _UNCOMMITTED)
    except ConfigError:
        previous = _previous(out) if storage.is_dir(out) else None  # a later look: others may write records meanwhile
        if previous is None:
            raise
        _compare(out, previous, settings, source)


def _compare(out: str, previous: dict[str, Any], settings: Settings, source: dict[str, Any]) -> None:
    then, now, was = previous["settings"], settings.as_json(), previous["source"]
    differing = [f"{name} was {then.get(name)}, now {now[name]}" for name in now if then.get(name) != now[name]]
    if was["fingerprint"] != source["fingerprint"]:
        differing.append(
            f"source was {was['inputs']} files of {was['bytes']} bytes, now {source['inputs']} of {source['bytes']}"
            + ", with other names or times" * (was["bytes"] == source["bytes"])
        )
    if differing:
        raise ConfigError(f"{out} is another set ({'; '.join(differing)}): choose another --out, or give --overwrite")


def clear(out: str) -> None:
    """Delete a set made by this job, finished or not, and nothing else."""
    if _previous(out) is None:
        return
    for name in [INDEX, *storage.listdir(out)]:  # the index first: without it the rest is no set
        if name in (INDEX, REJECTED) or _SHARD_FILE.fullmatch(name) or _DERIVED.fullmatch(name):
            storage.remove(storage.join(out, name))


def refuse_nesting(urls: Sequence[str], out: str) -> None:
    """Refuse a set inside its own source: it would be among the inputs of the next start.

    Raises:
        ConfigError: naming the source.
    """
    if storage.is_remote(out):
        return
    place = os.path.realpath(storage.local(out))
    for url in urls:
        folder = patterns.root(url) if "**" in url else url
        if not storage.is_remote(url) and f"{place}/".startswith(os.path.realpath(storage.local(folder)) + "/"):
            raise ConfigError(f"--out {out} lies inside the source {url}: choose a place outside of it")


def _prefix(out: str) -> str:
    """What shards are called: as those that are there, else as the directory."""
    for name in storage.listdir(out):
        if match := _SHARD_FILE.fullmatch(name):
            return match[1]
    name = out.rstrip("/").rsplit("/", 1)[-1]
    return name if re.fullmatch(r"[a-z0-9_-]+", name) else "shard"


def _previous(out: str) -> dict[str, Any] | None:
    """The index or a record of an earlier start; None if there was none."""
    names = [name for name in storage.listdir(out) if _SHARD_FILE.fullmatch(name) and name.endswith(".json")]
    for name in [INDEX, *names]:
        try:
            value = storage.read_json(storage.join(out, name))
        except (FileNotFoundError, NotADirectoryError, DataError):
            continue
        if isinstance(value, dict) and "preprocessing" in value.get("settings", {}):
            return value
    return None
