"""A set of samples on its way to completion: shards of seeds, each done or not.

Shard i holds the seeds [iS, (i+1)S) that were asked for. Its record `shard_000012.json` is written last and is its
commit: it says which seeds are there and how they were drawn. In tars, a complete set is a shard set like any other.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.data import images, shardset
from pipeline.errors import ConfigError, DataError

Picture = NDArray[np.uint8]
Format = Literal["tar", "png", "npz"]
RECORD = re.compile(r"shard_(\d{6,})\.json")
"""The names of records."""
_MOST = 100_000_000
_UNCOMMITTED = re.compile(r"shard_\d{6,}\.(tar|npy|npz)")


@dataclass(frozen=True)
class SampleSet:
    """Where samples go, and how they are drawn."""

    url: str
    format: Format
    shard_samples: int
    """Seeds in a shard."""
    provenance: dict[str, Any]
    """All that decides what a seed looks like; two samples of one set agree in it."""
    environment: dict[str, Any]
    """Where they were drawn: written down, not compared."""

    def check(self) -> None:
        """Refuse a place that holds something else, or samples drawn in another way.

        Raises:
            ConfigError: naming it.
        """
        records = [record for i in _numbers(self.url) if (record := _read(self.url, i))]
        if not records:
            shardset.refuse_foreign(self.url, _UNCOMMITTED)
        for record in records:
            self._compare(record)

    def numbers(self, seeds: tuple[range, ...]) -> list[int]:
        """Of the shards that these seeds are in, ascending."""
        size = self.shard_samples
        return sorted({i for part in seeds for i in range(part.start // size, (part.stop - 1) // size + 1)})

    def asked(self, i: int, seeds: tuple[range, ...]) -> list[int]:
        """Those of the seeds, which are sorted and do not overlap, that are in shard i."""
        first, last = i * self.shard_samples, (i + 1) * self.shard_samples
        return [seed for part in seeds for seed in range(max(part.start, first), min(part.stop, last))]

    def there(self, i: int) -> set[int]:
        """The seeds of shard i that are committed.

        Raises:
            ConfigError: they were drawn in another way.
        """
        record = self._record(i)
        return set(_seeds_of(record)) if record else set()

    def write(self, i: int, pictures: Iterable[tuple[int, Picture]], labels: dict[int, int]) -> None:
        """Write shard i, its record last.

        Args:
            i: number of the shard.
            pictures: (seed, uint8 (H, W, C)), ascending.
            labels: seed → class, for seeds that have one.

        Raises:
            ConfigError: meanwhile another job has begun to draw in another way in the same place.
            DataError: no space left; nothing is half-written, and what was there before still is.
        """
        seeds: list[int] = []
        files: dict[str, dict[str, Any]] = {}

        def encoded() -> Iterator[shardset.Sample]:
            for seed, picture in pictures:
                seeds.append(seed)
                label = labels.get(seed)
                meta = {"seed": seed, "label": label}
                yield shardset.Sample(shardset.key(seed), images.encode(picture, "png"), "png", label, meta)

        def record() -> dict[str, Any]:
            if other := next((record for n in _numbers(self.url) if (record := _read(self.url, n))), None):
                self._compare(other)
            return {
                "seeds": seeds_text(seeds),
                "count": len(seeds),
                "provenance": self.provenance,
                "environment": self.environment,
            }

        def publish(name: str, data: bytes) -> None:
            storage.write_bytes(storage.join(self.url, name), data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

        place = storage.join(self.url, f"{stem(i)}.json")
        if self.format == "tar":
            shardset.write_shard(self.url, stem(i), map(shardset.pack, encoded()), record)
            return
        if self.format == "png":
            if not storage.exists(place):  # loose pictures might be anybody's: a record says from the start whose
                storage.write_json(place, record() | {"files": {}})
            for sample in encoded():
                publish(f"{sample.key}.png", sample.image)
        else:
            drawn = list(pictures)
            seeds += [seed for seed, _ in drawn]
            buffer = io.BytesIO()
            named: dict[str, Any] = {"labels": np.array([labels[seed] for seed in seeds])} if labels else {}
            np.savez(buffer, seeds=np.array(seeds), images=np.stack([picture for _, picture in drawn]), **named)
            record()  # refuses, before anything is replaced
            publish(f"{stem(i)}.npz", buffer.getvalue())
        storage.write_json(place, record() | {"files": files})

    def read(self, seeds: Iterable[int], channels: int) -> dict[int, Picture]:
        """Those of the pictures that are there: seed → uint8 (H, W, C).

        Raises:
            DataError: a file is damaged.
        """
        found: dict[int, Picture] = {}
        for i, asked in groupby(sorted(seeds), key=lambda seed: seed // self.shard_samples):
            there = sorted(self.there(i))
            wanted = {seed: there.index(seed) for seed in asked if seed in there}
            base = storage.join(self.url, stem(i))
            try:
                if wanted and self.format == "npz":
                    with np.load(io.BytesIO(storage.read_bytes(f"{base}.npz")), allow_pickle=False) as arrays:
                        found |= {seed: arrays["images"][row] for seed, row in wanted.items()}
                elif wanted and self.format == "png":
                    for seed in wanted:
                        data = storage.read_bytes(storage.join(self.url, f"{shardset.key(seed)}.png"))
                        found[seed] = images.decode(data, channels)
                elif wanted:
                    rows = np.load(io.BytesIO(storage.read_bytes(f"{base}.npy")), allow_pickle=False)
                    for seed, row in wanted.items():
                        with storage.open_read(
                            f"{base}.tar", int(rows[row]["offset"] + rows[row]["image_offset"])
                        ) as tar:
                            found[seed] = images.decode(tar.read(int(rows[row]["image_length"])), channels)
            except (images.Rejected, ValueError, KeyError, IndexError) as error:
                raise DataError(f"{base}: damaged ({error!r}): `ddpm verify {self.url}` tells more") from error
        return found

    def finish(
        self, seeds: tuple[range, ...], *, size: tuple[int, int], channels: int, classes: Sequence[str] | None
    ) -> bool:
        """Write the index if every shard asked for is committed; whoever sees that first writes what all would write.

        Returns:
            Whether the set is complete.
        """
        if not all(self.there(i).issuperset(self.asked(i, seeds)) for i in self.numbers(seeds)):
            return False
        if self.format == "tar":
            records = [record for i in _numbers(self.url) if (record := shardset.read_record(self.url, stem(i)))]
            shardset.write_index(
                self.url, records, size=size, channels=channels, classes=classes,
                source=f"checkpoint {self.provenance['checkpoint_sha256']}", settings=self.provenance,
                counts={"taken": sum(record.samples for record in records)},
            )  # fmt: skip
        return True

    def _record(self, i: int) -> dict[str, Any] | None:
        record = _read(self.url, i)
        if record is None:
            return None
        self._compare(record)
        if self.format == "tar":
            return record if shardset.read_record(self.url, stem(i)) else None
        try:
            files = record["files"].items()
            whole = all(storage.size(storage.join(self.url, name)) == file["bytes"] for name, file in files)
        except (FileNotFoundError, KeyError, TypeError):
            return None
        return record if whole else None

    def _compare(self, record: dict[str, Any]) -> None:
        theirs, ours = record["provenance"], self.provenance
        different = [key for key in ours | theirs if theirs.get(key) != ours.get(key)]
        if different:
            diff = "; ".join(f"{key}: {theirs.get(key)} there, {ours.get(key)} now" for key in different)
            raise ConfigError(f"{self.url} holds samples drawn differently ({diff}): choose another --out")


def shard_samples(url: str) -> int | None:
    """Seeds in a shard of the set that is there, finished or not; None if there is none."""
    records = (record for i in _numbers(url) if (record := _read(url, i)))
    return next((record["provenance"].get("shard_samples") for record in records), None)


def verify(url: str, each: Callable[[Sequence[int]], Iterable[int]] = iter) -> list[str]:
    """Check every file of a set of loose PNGs or npz against the records; what is in tars is for `integrity`.

    Args:
        url: the set.
        each: gives the shards one by one, to watch or to end the work.

    Returns:
        One line a finding; none if all is sound.
    """
    findings, known, manners = [], set(), set()
    for i in each(_numbers(url)):
        record = _read(url, i)
        if record is None or "files" not in record:
            findings.append(f"{stem(i)}.json: not the record of a shard of PNGs or npz")
            continue
        known |= record["files"].keys()
        manners.add(json.dumps(record["provenance"], sort_keys=True))
        if record["count"] != len(_seeds_of(record)):
            findings.append(f"{stem(i)}.json: its count is not that of its seeds")
        for name, file in record["files"].items():
            try:
                if storage.sha256(storage.join(url, name)) != file["sha256"]:
                    findings.append(f"{name}: does not have the sha256 of {stem(i)}.json")
            except (FileNotFoundError, KeyError, TypeError):
                findings.append(f"{name}: missing, or {stem(i)}.json does not say what it holds")
    if len(manners) > 1:
        findings.append("its shards were drawn in different ways")
    strangers = [name for name in storage.listdir(url) if name.endswith((".png", ".npz")) and name not in known]
    return findings + [
        f"{name}: in no record (of a shard that is not finished, or from elsewhere)" for name in strangers
    ]


def _numbers(url: str) -> list[int]:
    """Of the shards that have a record, ascending."""
    return sorted(int(match[1]) for name in storage.listdir(url) if (match := RECORD.fullmatch(name)))


def _read(url: str, i: int) -> dict[str, Any] | None:
    """The record of shard i, if there is one and it is a sample set's."""
    try:
        record = storage.read_json(storage.join(url, f"{stem(i)}.json"))
        _seeds_of(record)
        kinds = {"provenance": dict, "count": int} | ({"files": dict} if "files" in record else {})
        return record if all(isinstance(record[key], kind) for key, kind in kinds.items()) else None
    except (FileNotFoundError, NotADirectoryError, DataError, ConfigError, AttributeError, KeyError, TypeError):
        return None


def _seeds_of(record: dict[str, Any]) -> list[int]:
    return [seed for part in parse_seeds(record["seeds"]) for seed in part] if record["seeds"] != "" else []


def stem(i: int) -> str:
    """The name of shard i without its ending."""
    return f"shard_{i:06d}"


def parse_seeds(text: str) -> tuple[range, ...]:
    """`A-B` inclusive, `A`, or a comma list of both, as sorted ranges that do not overlap.

    Raises:
        ConfigError: it is none of these.
    """
    ranges = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ConfigError(f"--seeds {text}: write A-B (inclusive), A, or a comma list such as 0-99,500")
        ranges.append(range(int(first), int(last or first) + 1))
    merged: list[range] = []
    for part in sorted(ranges, key=lambda part: part.start):
        if merged and part.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, part.stop))
        else:
            merged.append(part)
    if merged[-1].stop > 1 << 62:
        raise ConfigError(f"--seeds {text}: seeds go up to 2^62")
    if sum(map(len, merged)) > _MOST:
        raise ConfigError(f"--seeds {text}: more than {_MOST:,} at once: ask for fewer")
    return tuple(merged)


def seeds_text(seeds: list[int]) -> str:
    """The inverse of `parse_seeds`, for ascending seeds."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges)
