"""Building a shard set of images: the shards to make, which of them exist, and the index at the end.

Shard i holds the inputs [iS, (i+1)S) of the sorted list, whichever job makes it and whenever, so any number of workers
and of interruptions gives the same bytes. `set.json` says what the whole set is made of before the first shard exists;
each record repeats it, so that shards of several directories can be joined. A shard costs three writes, and at most two
reads; the directory is listed at the start and at the end of a job only.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline.data.images.dedupe import KnownImages
from pipeline.data.shards import record_files, set_identity
from pipeline.data.shards.image_task import NumberedInput, Outcome
from pipeline.data.shards.index_file import INDEX, TABLE
from pipeline.data.shards.join import Counts, publish, totals
from pipeline.data.shards.record import ShardRecord
from pipeline.data.shards.settings import ShardSettings
from pipeline.data.shards.shard_set import REJECTED, Packed, ShardSet, key, refuse_foreign, write_shard
from pipeline.data.sources import globs, inventory
from pipeline.data.sources.listing import Listing
from pipeline.errors import ConfigError, DataError
from pipeline.storage import files
from pipeline.untrusted import printable

_CHUNK, _CHUNK_BYTES = 64, 1 << 22
"""At most so many inputs, and bytes of pixels, go to a worker together."""
_NAMES_SHOWN = 200
_SHARD_FILE = re.compile(r"(.+)-\d{6,}\.(tar|npy|json)")
_UNCOMMITTED = re.compile(r".+-\d{6,}\.(tar|npy)")
_OF_SET = (INDEX, REJECTED, set_identity.FILE)
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
        part: (I, N): this job makes run I, from 0, of N runs of whole shards.
        to_clear: names of files in `out` that are taken for deleted, for a forecast with `--overwrite`.

    Raises:
        ConfigError: `out` holds anything but the beginning, or the whole, of this very set.
    """

    def __init__(
        self,
        out: str,
        settings: ShardSettings,
        urls: Sequence[str],
        listing: Listing,
        part: tuple[int, int] = (0, 1),
        to_clear: Collection[str] = (),
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
        first, last = (i * len(self.tasks) // part[1] for i in (part[0], part[0] + 1))
        self.own = self.tasks[first:last]
        """The shards of this job's part."""
        self._prefix, self._records, self._is_begun = prefix, dict[str, ShardRecord](), False
        self._unfinished_at_start = self._unfinished_files()
        self.refresh()

    def refresh(self) -> None:
        """List the set, and read the records of shards that exist now and were not read before.

        Of a finished set the index is read instead, and of an unfinished one only the records of this job's part.

        Raises:
            ConfigError: a record belongs to another set.
        """
        sizes = {name: size for name, size in files.sizes(self._out).items() if name not in self._to_clear}
        self._there = [task for task in self.tasks if record_files.are_listed(task.stem, sizes)]
        is_complete = len(self._there) == len(self.tasks)
        self._has_index = INDEX in sizes
        self._finished_counts: dict[str, Any] | None = self._read_index(sizes) if is_complete else None
        if self._finished_counts:
            return
        self._records = {
            stem: record
            for stem, record in self._records.items()
            if record_files.are_listed(stem, sizes) and sizes[record.name] == record.bytes and record.extra
        }
        wanted = {task.stem for task in (self._there if is_complete else self.own)}
        unread = sorted(wanted - self._records.keys())
        for stem, record in record_files.read(self._out, unread, sizes).items():
            self._compare(record.extra)
            self._records[stem] = _without_identity(record)
        self._there = [task for task in self._there if task.stem in self._records or task.stem not in wanted]

    def _read_index(self, sizes: Mapping[str, int]) -> dict[str, Any] | None:
        """The totals of a finished set; None if it is not finished."""
        if not {INDEX, REJECTED} <= sizes.keys():
            return None
        try:
            index = ShardSet.indexed(self._out)
        except DataError:
            return None
        fits = [record.stem for record in index.shards] == [task.stem for task in self.tasks] and all(
            sizes.get(record.name) == record.bytes for record in index.shards
        )
        if not fits or index.counts.keys() != totals([], None).keys():  # version 0.1 counted less
            return None
        return index.counts

    def missing(self, tasks: Sequence[Task]) -> list[Task]:
        """The tasks whose shard does not exist."""
        there = {task.stem for task in self._there}
        return [task for task in tasks if task.stem not in there]

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
                self._records[task.stem] = _without_identity(written[-1])
        return written

    def _identity(self) -> dict[str, Any]:
        classes = None if self.listing.classes is None else list(self.listing.classes)
        return {"settings": self.settings.as_json(), "source": self._source, "classes": classes}

    def _record_fields(self, counts: Counts, fingerprints: dict[str, str]) -> dict[str, Any]:
        if not self._is_begun:
            self._compare(set_identity.claim(self._out, {"name": self._prefix, **self._identity()}))
            if self._has_index:  # it would not fit shards made again
                files.remove(files.join(self._out, INDEX))
            self._is_begun = True
        return self._identity() | counts.as_json() | ({"fingerprints": fingerprints} if fingerprints else {})

    def counts(self) -> dict[str, Any]:
        """Totals of the set if it is complete, else of the shards of this job's part that exist."""
        return self._finished_counts or totals(self._records.values(), self.listing.classes)

    def publish(self) -> None:
        """Write `rejected.jsonl`, and the index if there is a sample; nothing if both are up to date.

        Raises:
            DataError: no space left.
        """
        if self._finished_counts:
            return
        records = [self._records[task.stem] for task in self.tasks]
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

    def _unfinished_files(self) -> dict[str, int]:
        """Sizes of this set's files that are being written, or were when their writer was killed."""
        return files.unfinished(
            self._out, lambda name: name in _OF_SET or TABLE.fullmatch(name) or _SHARD_FILE.fullmatch(name)
        )

    def _refuse_other_set(self) -> None:
        """Refuse a directory that holds anything but the beginning of this set."""
        if self._to_clear:
            refuse_foreign(self._out, re.compile("|".join(map(re.escape, self._to_clear))))
            return
        try:
            refuse_foreign(self._out, _UNCOMMITTED)
        except ConfigError:
            previous = _previous(self._out)  # read after the check: other jobs may begin the set meanwhile
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


def _without_identity(record: ShardRecord) -> ShardRecord:
    """A record without what is the same in all records of a set, of which there may be a million."""
    extra = {name: value for name, value in record.extra.items() if name in ("counts", "rejected", "fingerprints")}
    return replace(record, extra=extra)


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


def refuse_something_else(out: str) -> None:
    """Refuse a directory that holds anything but a set, finished or begun, before a file is written to it.

    Raises:
        ConfigError: `out` is a file, or holds a file of another name.
    """
    if _previous(out) is None:
        refuse_foreign(out, _UNCOMMITTED)


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
    if previous is None:  # perhaps no shard was made, but the inputs were listed
        return [name for name in files.listdir(out) if name == inventory.DIRECTORY]
    shards = previous.get("shards") or [previous]
    names = (str(shard["name"]) for shard in shards)  # in `set.json` the prefix itself
    prefixes = {match[1] if (match := _SHARD_FILE.fullmatch(name)) else name for name in names}
    return [
        name
        # The index first: without it the shards are no set. What the set is made of last.
        for name in sorted(files.listdir(out), key=lambda name: (name != INDEX, name == set_identity.FILE))
        if name in _OF_SET
        or TABLE.fullmatch(name)
        or ((match := _SHARD_FILE.fullmatch(name)) and match[1] in prefixes)
        or _DERIVED.fullmatch(name)
        or name == inventory.DIRECTORY
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
    """NAME of the shards: as in `set.json` or the shards that exist, else as the directory."""
    if isinstance(name := (set_identity.read(out) or {}).get("name"), str):
        return name
    for name in files.listdir(out):
        if match := _SHARD_FILE.fullmatch(name):
            return match[1]
    name = out.rstrip("/").rsplit("/", 1)[-1]
    return name if re.fullmatch(r"[a-z0-9_-]+", name) else "shard"


def _previous(out: str) -> dict[str, Any] | None:
    """`set.json`, or else the index or one record, of the set that `ddpm shard` has begun in `out`; or None."""
    names = [name for name in files.listdir(out) if _SHARD_FILE.fullmatch(name) and name.endswith(".json")]
    for name in [set_identity.FILE, INDEX, *names]:
        try:
            value = files.read_json(files.join(out, name))
        except (FileNotFoundError, NotADirectoryError, DataError):
            continue
        if isinstance(value, dict) and isinstance(value.get("settings"), dict) and "preprocessing" in value["settings"]:
            return value
    return None
