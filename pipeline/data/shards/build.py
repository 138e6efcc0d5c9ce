"""Building a shard set of images: the shards to make, which of them exist, and the index at the end.

Shard i holds the inputs [iS, (i+1)S) of the sorted list, whichever job makes it and whenever, so any number of workers
and of interruptions gives the same bytes. Each record carries the settings and the source of the whole set, so that the
shards of an unfinished set also say what they are made of.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.data.images.dedupe import KnownImages
from pipeline.data.shards.image_task import NumberedInput, Outcome
from pipeline.data.shards.join import Counts, publish, totals
from pipeline.data.shards.settings import ShardSettings
from pipeline.data.shards.shard_set import (
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
from pipeline.data.sources import globs
from pipeline.data.sources.listing import Listing
from pipeline.errors import ConfigError, DataError
from pipeline.storage import files
from pipeline.untrusted import printable

_CHUNK, _CHUNK_BYTES = 64, 1 << 22
"""At most so many inputs, and bytes of pixels, go to a worker together."""
_NAMES_SHOWN = 200
_SHARD_FILE = re.compile(r"(.+)-\d{6,}\.(tar|npy|json)")
_UNCOMMITTED = re.compile(r".+-\d{6,}\.(tar|npy)")
_DERIVED = re.compile(r"(features|likelihood)-[0-9a-f]{12}|evaluation\.json|reference-[0-9a-f]+\.safetensors")
"""What `ddpm evaluate`, or version 0.1, has measured of the finished set."""


@dataclass(frozen=True)
class Task:
    """One shard to make, of the inputs [first, last)."""

    stem: str
    first: int
    last: int

    def __len__(self) -> int:
        """Number of inputs."""
        return self.last - self.first


class _Unfinished(Exception):  # noqa: N818  the job was told to stop, so no more outcomes come
    pass


class ShardSetBuilder:
    """The shards of one set: where they go, what they are made of, which of them exist.

    Args:
        out: directory or URL; its last component names the shards.
        settings: how samples are made.
        urls: the sources, as given.
        listing: their inputs.
        to_clear: names of files in `out` that are taken for deleted, for a forecast with `--overwrite`.

    Raises:
        ConfigError: `out` holds anything but the beginning, or the whole, of this very set.
    """

    def __init__(
        self, out: str, settings: ShardSettings, urls: Sequence[str], listing: Listing, to_clear: Collection[str] = ()
    ) -> None:
        self._out, self.settings, self.listing = out, settings, listing
        self._to_clear = set(to_clear)
        self._source = {
            "urls": list(urls),
            "inputs": len(listing.inputs),
            "bytes": listing.bytes,
            "fingerprint": listing.fingerprint,
        }
        self._refuse_other_set()
        prefix, count, size = _prefix(out), len(listing.inputs), settings.shard_samples
        self.tasks = [
            Task(f"{prefix}-{i:06d}", first, min(first + size, count)) for i, first in enumerate(range(0, count, size))
        ]
        self._unfinished_at_start = self._unfinished_files()
        self.refresh()

    def refresh(self) -> None:
        """Read the records of all shards that exist now, whichever job has made them.

        Raises:
            ConfigError: one of them belongs to another set.
        """
        self._records = {
            task.stem: record
            for task in self.tasks
            if f"{task.stem}.json" not in self._to_clear and (record := read_record(self._out, task.stem))
        }
        for record in self._records.values():
            self._compare(record.extra)

    def part(self, number: int, parts: int) -> list[Task]:
        """Run `number`, from 0, of so many runs of whole shards."""
        first, last = (i * len(self.tasks) // parts for i in (number, number + 1))
        return self.tasks[first:last]

    def missing(self, tasks: Sequence[Task]) -> list[Task]:
        """The tasks whose shard does not exist."""
        return [task for task in tasks if task.stem not in self._records]

    def chunks(self, tasks: Sequence[Task], workers: int) -> Iterator[list[NumberedInput]]:
        """The inputs of these shards, in chunks for so many workers."""
        height, width = self.settings.size
        pixel_bytes = height * width * self.settings.channels
        length = max(min(_CHUNK, _CHUNK_BYTES // pixel_bytes, sum(map(len, tasks)) // (4 * workers)), 1)
        for task in tasks:
            for first in range(task.first, task.last, length):
                last = min(first + length, task.last)
                yield list(map(NumberedInput, range(first, last), self.listing.inputs[first:last]))

    def write(self, tasks: Sequence[Task], outcomes: Iterator[Outcome]) -> list[ShardRecord]:
        """Write shards, in their order, and return their records.

        Args:
            tasks: the shards.
            outcomes: one for each of their inputs, in order. If they end early, so does this method.

        Raises:
            ConfigError: meanwhile another job has begun another set in the same directory.
            DataError: no space left.
        """
        seen, written, wanted = KnownImages(self.settings.dedupe), list[ShardRecord](), set(tasks)
        for task in self.tasks:
            if record := self._records.get(task.stem):
                for of, fingerprint in record.extra.get("fingerprints", {}).items():
                    seen.add(bytes.fromhex(fingerprint), of)
            elif task in wanted:
                counts, fingerprints = Counts(), dict[str, str]()
                samples = _samples(itertools.islice(outcomes, len(task)), len(task), counts, seen, fingerprints)
                try:
                    extra = partial(self._record_fields, counts, fingerprints)
                    written.append(write_shard(self._out, task.stem, samples, extra))
                except _Unfinished:
                    break
        return written

    def _record_fields(self, counts: Counts, fingerprints: dict[str, str]) -> dict[str, Any]:
        self._refuse_other_set()
        classes = None if self.listing.classes is None else list(self.listing.classes)
        fields = {"settings": self.settings.as_json(), "source": self._source, "classes": classes, **counts.as_json()}
        return fields | ({"fingerprints": fingerprints} if fingerprints else {})

    def counts(self) -> dict[str, Any]:
        """Totals over the shards that exist."""
        return totals(self._records.values(), self.listing.classes)

    def publish(self) -> None:
        """Write `rejected.jsonl`, and the index if there is a sample; nothing if both are up to date.

        Raises:
            DataError: no space left.
        """
        records = [self._records[task.stem] for task in self.tasks]
        if self._is_indexed(records):
            return
        for name, size in self._unfinished_files().items():
            if self._unfinished_at_start.get(name) == size:  # it has not grown: no job is writing it
                files.remove(files.join(self._out, name))
        publish(
            self._out,
            records,
            size=self.settings.size,
            channels=self.settings.channels,
            classes=self.listing.classes,
            source=self._source,
            settings=self.settings.as_json(),
        )

    def _is_indexed(self, records: list[ShardRecord]) -> bool:
        try:
            index = ShardSet.indexed(self._out)
        except DataError:
            return False
        same = [shard.entry() for shard in index.shards] == [record.entry() for record in records]
        return same and files.exists(files.join(self._out, REJECTED))

    def _unfinished_files(self) -> dict[str, int]:
        """Sizes of this set's files that are being written, or were when their writer was killed."""
        return files.unfinished(self._out, lambda name: name in (INDEX, REJECTED) or _SHARD_FILE.fullmatch(name))

    def _refuse_other_set(self) -> None:
        """Refuse a directory that holds anything but the beginning of this set; one record suffices, as all agree."""
        if self._to_clear:
            refuse_foreign(self._out, re.compile("|".join(map(re.escape, self._to_clear))))
            return
        try:
            refuse_foreign(self._out, _UNCOMMITTED)
        except ConfigError:
            previous = _previous(self._out)  # read after the check: other jobs may write records meanwhile
            if previous is None:
                raise
            self._compare(previous)

    def _compare(self, previous: dict[str, Any]) -> None:
        then, now, was, source = previous["settings"], self.settings.as_json(), previous["source"], self._source
        differing = [f"{name} was {then.get(name)}, now {now[name]}" for name in now if then.get(name) != now[name]]
        classes = [_shortened(previous.get("classes")), _shortened(self.listing.classes)]
        if was["fingerprint"] != source["fingerprint"] and then.get("labels") == now["labels"] and len({*classes}) > 1:
            differing.append("classes were {}, now {}".format(*classes))
        if was["inputs"] != source["inputs"]:
            differing.append(f"the source had {was['inputs']:,} files, now {source['inputs']:,}")
        elif was["bytes"] != source["bytes"]:
            differing.append("files of the source were changed")
        elif was["fingerprint"] != source["fingerprint"] and not differing:
            differing.append("files of the source have other names, times or labels")
        if differing:
            raise ConfigError(
                f"{self._out} was made from other sources or settings ({'; '.join(differing)}): choose another --out, "
                "or give --overwrite"
            )


def _samples(
    outcomes: Iterator[Outcome], inputs: int, counts: Counts, seen: KnownImages, fingerprints: dict[str, str]
) -> Iterator[Packed]:
    """The samples of a shard without repetitions; adds to `counts`, `seen` and `fingerprints`."""
    for outcome in outcomes:
        inputs -= 1
        if outcome.fingerprint and (original := seen.find(outcome.fingerprint)):
            outcome = Outcome(outcome.position, outcome.source, ("duplicate", f"of {original}"))  # noqa: PLW2901
        elif outcome.fingerprint:
            seen.add(outcome.fingerprint, key(outcome.position))
            fingerprints[key(outcome.position)] = outcome.fingerprint.hex()
        if outcome.packed is None:
            counts.reject(outcome.line())
        else:
            counts.take(outcome.transforms, outcome.short_side, outcome.packed.label)
            yield outcome.packed
    if inputs:
        raise _Unfinished


def _shortened(classes: Sequence[str] | None) -> str:
    names = printable(", ".join(classes or ())) or "none"
    return names if len(names) <= _NAMES_SHOWN else f"{len(classes or ())}: {names[:_NAMES_SHOWN]}…"


def begun_classes(out: str) -> list[str] | None:
    """The classes of the set that an earlier job has begun or finished in `out`; None if there is none."""
    classes = (_previous(out) or {}).get("classes")
    return classes if isinstance(classes, list) and all(isinstance(name, str) for name in classes) else None


def clear(out: str) -> None:
    """Delete a set that `ddpm shard` made, finished or not, and nothing else."""
    for name in files_to_clear(out):
        files.remove(files.join(out, name))


def files_to_clear(out: str) -> list[str]:
    """What `clear` deletes, in this order."""
    previous = _previous(out)
    if previous is None:
        return []
    shards = previous.get("shards") or [previous]
    prefixes = {match[1] for shard in shards if (match := _SHARD_FILE.fullmatch(shard["name"]))}
    names = sorted(files.listdir(out), key=lambda name: name != INDEX)  # first: without it the shards are no set
    return [
        name
        for name in names
        if name in (INDEX, REJECTED)
        or ((match := _SHARD_FILE.fullmatch(name)) and match[1] in prefixes)
        or _DERIVED.fullmatch(name)
    ]


def refuse_nesting(urls: Sequence[str], out: str) -> None:
    """Refuse a set inside its own source: the next start would list its files as inputs.

    Raises:
        ConfigError: naming the source.
    """
    if files.is_remote(out):
        return
    target = os.path.realpath(files.local(out))
    for url in urls:
        directory = globs.root(url) if "**" in url else url
        if not files.is_remote(url) and f"{target}/".startswith(os.path.realpath(files.local(directory)) + "/"):
            raise ConfigError(f"--out {out} lies inside the source {url}: choose a place outside of it")


def _prefix(out: str) -> str:
    """NAME of the shards: as in those that exist, else as the directory."""
    for name in files.listdir(out):
        if match := _SHARD_FILE.fullmatch(name):
            return match[1]
    name = out.rstrip("/").rsplit("/", 1)[-1]
    return name if re.fullmatch(r"[a-z0-9_-]+", name) else "shard"


def _previous(out: str) -> dict[str, Any] | None:
    """The index, or else one record, of the set that `ddpm shard` has begun in `out`; None if there is none."""
    names = [name for name in files.listdir(out) if _SHARD_FILE.fullmatch(name) and name.endswith(".json")]
    for name in [INDEX, *names]:
        try:
            value = files.read_json(files.join(out, name))
        except (FileNotFoundError, NotADirectoryError, DataError):
            continue
        if isinstance(value, dict) and isinstance(value.get("settings"), dict) and "preprocessing" in value["settings"]:
            return value
    return None
