"""A shard set of images on its way to completion: shards of inputs, each made or not.

Shard i holds the inputs [iS, (i+1)S) of the sorted list, whoever makes it and whenever, so any number of workers and
any number of interruptions give the same bytes. Each record carries the settings and the source of the whole set, so
that an unfinished set, too, knows what it is made of.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from pipeline import storage
from pipeline.data.images import EXTENSIONS, PREPROCESSING, ImageFormat, Rejected, encode, to_picture
from pipeline.data.shardset import (
    INDEX,
    REJECTED,
    Sample,
    ShardRecord,
    ShardSet,
    key,
    pack,
    read_record,
    refuse_foreign,
    write_index,
    write_rejected,
    write_shard,
)
from pipeline.data.sources import Input, Labels, Listing, Reader
from pipeline.errors import ConfigError, DataError
from pipeline.noise import Use, uniforms

Crop = Literal["center", "none", "random"]
_SHARD_FILE = re.compile(r"(.+)-\d{6,}\.(tar|npy|json)")
_UNCOMMITTED = re.compile(r".+-\d{6,}\.(tar|npy)")
_LEFTOVER = re.compile(r"\..*\.tmp")  # what storage was writing when it was killed


@dataclass(frozen=True)
class Settings:
    """All that decides what a shard's bytes are, given its inputs; the fields are those of `shard.shard`."""

    size: tuple[int, int]
    channels: int
    crop: Crop
    format: ImageFormat
    labels: Labels
    background: tuple[int, int, int]
    min_size: int
    shard_samples: int
    preprocessing: int = PREPROCESSING

    def as_json(self) -> dict[str, Any]:
        """As in the index, where tuples are lists."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Task:
    """One shard to make; it travels to a worker process."""

    out: str
    stem: str
    first: int
    """Position of the first input."""
    inputs: list[Input]
    settings: Settings
    source: dict[str, Any]

    def __str__(self) -> str:
        return storage.join(self.out, self.stem)


def make_shard(reader: Reader, task: Task, go_on: Callable[[], None]) -> ShardRecord:
    """Make one shard: read, picture, encode, write.

    Args:
        reader: of the sources that the task's inputs are in.
        task: the shard.
        go_on: called before each input; may leave.

    Raises:
        ConfigError: meanwhile another job has begun another set in the same place.
        DataError: no space left, or an archive cannot be read any more.
    """
    settings = task.settings
    rejected: list[dict[str, Any]] = []
    transforms: Counter[str] = Counter()
    labels: Counter[int] = Counter()

    def samples() -> Iterator[Sample]:
        places = _crop_places(settings.crop, task.first, len(task.inputs))
        for position, (item, crop_at) in enumerate(zip(task.inputs, places), task.first):
            go_on()
            try:
                picture = to_picture(
                    reader.read(item),
                    size=settings.size,
                    channels=settings.channels,
                    crop_at=crop_at,
                    background=settings.background,
                    min_size=settings.min_size,
                )
            except Rejected as verdict:
                line = {"key": key(position), "source": item.name, "reason": verdict.reason, "detail": verdict.detail}
                rejected.append(line)
                continue
            transforms.update(picture.meta["transforms"])
            if item.label is not None:
                labels[item.label] += 1
            image = encode(picture.array, settings.format)
            meta = {"source": item.name, **picture.meta}
            yield Sample(key(position), image, EXTENSIONS[settings.format], item.label, meta)

    def extra() -> dict[str, Any]:
        _refuse_other(task.out, settings, task.source)
        counts = {
            "inputs": len(task.inputs),
            "taken": len(task.inputs) - len(rejected),
            "rejected": dict(sorted(Counter(line["reason"] for line in rejected).items())),
            "transforms": dict(sorted(transforms.items())),
            "classes": {str(label): count for label, count in sorted(labels.items())},
        }
        return {"settings": settings.as_json(), "source": task.source, "counts": counts, "rejected": rejected}

    return write_shard(task.out, task.stem, map(pack, samples()), extra)


def _crop_places(crop: Crop, first: int, count: int) -> Sequence[tuple[float, float] | None]:
    if crop == "random":
        places = uniforms(0, torch.arange(first, first + count), Use.SHARDING_CROP, (2,))
        return [(x, y) for x, y in places.tolist()]
    return [(0.5, 0.5) if crop == "center" else None] * count


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
        self._source = {
            "urls": list(urls),
            "inputs": len(listing.inputs),
            "bytes": sum(item.member.size for item in listing.inputs),
            "fingerprint": listing.fingerprint,
        }
        _refuse_other(out, settings, self._source)
        prefix, size = _prefix(out), settings.shard_samples
        self.tasks = [
            Task(out, f"{prefix}-{i:06d}", first, listing.inputs[first : first + size], settings, self._source)
            for i, first in enumerate(range(0, len(listing.inputs), size))
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

    def counts(self) -> dict[str, Any]:
        """Totals over the shards that are there: inputs, taken, rejected by reason, transforms, pictures by class."""
        parts = [record.extra["counts"] for record in self._records.values()]
        sums: dict[str, Counter[str]] = {"rejected": Counter(), "transforms": Counter(), "classes": Counter()}
        for part in parts:
            for name, counter in sums.items():
                counter.update(part[name])
        classes = {name: sums["classes"][str(number)] for number, name in enumerate(self._classes or ())}
        return {
            "inputs": sum(part["inputs"] for part in parts),
            "taken": sum(part["taken"] for part in parts),
            "rejected": dict(sorted(sums["rejected"].items())),
            "transforms": dict(sorted(sums["transforms"].items())),
            "classes": classes if self._classes is not None else None,
        }

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
        write_rejected(self._out, records)
        counts = self.counts()
        if counts["taken"]:
            write_index(
                self._out,
                records,
                size=self._settings.size,
                channels=self._settings.channels,
                classes=self._classes,
                source=self._source,
                settings=self._settings.as_json(),
                counts=counts,
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
        if name in (INDEX, REJECTED) or _SHARD_FILE.fullmatch(name):
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
        if not storage.is_remote(url) and f"{place}/".startswith(os.path.realpath(storage.local(url)) + "/"):
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
