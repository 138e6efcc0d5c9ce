"""A set of samples on its way to completion: shards of seeds, each done or not.

Shard i holds the seeds [iS, (i+1)S) that were asked for. Its record `shard_000012.json` is written last and is its
commit: it says which seeds are there and how they were drawn. In tars, a complete set is a shard set like any other.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.data import images, shardset
from pipeline.errors import ConfigError

Picture = NDArray[np.uint8]
Format = Literal["tar", "png", "npz"]
_RECORD = re.compile(r"shard_(\d{6,})\.json")


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
        if storage.exists(self.url) and not storage.is_dir(self.url):
            raise ConfigError(f"{self.url} is a file: --out names a directory")
        strange = [name for name in storage.listdir(self.url) if not self._is_ours(name)]
        if strange:
            raise ConfigError(
                f"{self.url} exists and is not a sample set (it holds {strange[0]}): choose another --out"
            )
        for i in self._numbers():
            self._record(i)

    def shards(self, seeds: tuple[range, ...]) -> Iterator[tuple[int, list[int]]]:
        """(i, seeds asked for in shard i), ascending; `seeds` are sorted and do not overlap."""
        size = self.shard_samples
        for i in sorted({i for part in seeds for i in range(part.start // size, (part.stop - 1) // size + 1)}):
            yield i, [s for part in seeds for s in range(max(part.start, i * size), min(part.stop, (i + 1) * size))]

    def there(self, i: int) -> set[int]:
        """The seeds of shard i that are committed.

        Raises:
            ConfigError: they were drawn in another way.
        """
        record = self._record(i)
        return {seed for part in parse_seeds(record["seeds"]) for seed in part} if record else set()

    def write(self, i: int, pictures: Iterable[tuple[int, Picture]], labels: dict[int, int]) -> None:
        """Write shard i, its record last.

        Args:
            i: number of the shard.
            pictures: (seed, uint8 (H, W, C)), ascending.
            labels: seed → class, for seeds that have one.

        Raises:
            DataError: no space left; nothing is half-written.
        """
        seeds: list[int] = []

        def encoded() -> Iterator[shardset.Sample]:
            for seed, picture in pictures:
                seeds.append(seed)
                label = labels.get(seed)
                meta = {"seed": seed, "label": label}
                yield shardset.Sample(shardset.key(seed), images.encode(picture, "png"), "png", label, meta)

        def record() -> dict[str, Any]:
            return {
                "seeds": seeds_text(seeds),
                "count": len(seeds),
                "provenance": self.provenance,
                "environment": self.environment,
            }

        if self.format == "tar":
            shardset.write_shard(self.url, stem(i), encoded(), record)
            return
        if self.format == "png":
            for sample in encoded():
                storage.write_bytes(storage.join(self.url, f"{sample.key}.png"), sample.image)
        else:
            drawn = list(pictures)
            seeds = [seed for seed, _ in drawn]
            buffer = io.BytesIO()
            named: dict[str, Any] = {"labels": np.array([labels[seed] for seed in seeds])} if labels else {}
            np.savez(buffer, seeds=np.array(seeds), images=np.stack([picture for _, picture in drawn]), **named)
            storage.write_bytes(storage.join(self.url, f"{stem(i)}.npz"), buffer.getvalue())
        storage.write_json(storage.join(self.url, f"{stem(i)}.json"), record())

    def finish(self, seeds: tuple[range, ...], *, size: tuple[int, int], channels: int, classes: int) -> bool:
        """Write the index if every shard asked for is committed; whoever sees that first writes what all would write.

        Returns:
            Whether the set is complete.
        """
        if not all(self.there(i).issuperset(asked) for i, asked in self.shards(seeds)):
            return False
        if self.format == "tar":
            records = [record for i in self._numbers() if (record := shardset.read_record(self.url, stem(i)))]
            shardset.write_index(
                self.url, records, size=size, channels=channels, classes=[str(i) for i in range(classes)] or None,
                source=f"checkpoint {self.provenance['checkpoint_sha256']}", settings=self.provenance,
                counts={"taken": sum(record.samples for record in records)},
            )  # fmt: skip
        return True

    def _numbers(self) -> list[int]:
        """Of the shards that have a record, ascending."""
        return sorted(int(match[1]) for name in storage.listdir(self.url) if (match := _RECORD.fullmatch(name)))

    def _record(self, i: int) -> dict[str, Any] | None:
        path = storage.join(self.url, f"{stem(i)}.json")
        if not storage.exists(path) or (self.format == "tar" and shardset.read_record(self.url, stem(i)) is None):
            return None
        record: dict[str, Any] = storage.read_json(path)
        theirs = record["provenance"]
        different = [key for key, value in self.provenance.items() if theirs.get(key) != value]
        if different:
            diff = "; ".join(f"{key}: {theirs.get(key)} there, {self.provenance[key]} now" for key in different)
            raise ConfigError(f"{self.url} holds samples drawn differently ({diff}): choose another --out")
        return record

    def _is_ours(self, name: str) -> bool:
        return name.startswith((".", "shard_")) or name == "index.json" or name.removesuffix(".png").isdecimal()


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
