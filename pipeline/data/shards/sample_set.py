"""The sample set: shards of seeds, each complete or not.

Shard i holds those of the requested seeds that lie in [iS, (i+1)S). Its record `shard_000012.json` is written last and
commits it: it has the seeds and the settings with which they were drawn. In tars, a complete sample set is a shard set.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline import untrusted
from pipeline.data.images import preprocess
from pipeline.data.shards import index_file, record_files, set_identity, shard_set
from pipeline.data.shards.record import ShardRecord
from pipeline.data.shards.seeds import merged, parse_seeds, ranges_text, seeds_text, within, without
from pipeline.errors import ConfigError, DataError
from pipeline.path_kind import SAMPLE_RECORD
from pipeline.storage import files
from pipeline.untrusted import name_inside, printable

CleanImage = NDArray[np.uint8]
Format = Literal["tar", "png", "npz"]
_MAX_ASKED = 10_000  # characters: each record repeats them
_SHOWN_RANGES = 50
_SAMPLES = re.compile(r".+\.(png|npz)|shard_\d{6,}\.(tar|npy)")
_UNCOMMITTED = re.compile(r"shard_\d{6,}\.(tar|npy|npz)")
_BEGUN = re.compile(rf"{_UNCOMMITTED.pattern}|{re.escape(set_identity.FILE)}")


@dataclass(frozen=True)
class SampleSet:
    """Where samples are written, and how they are drawn."""

    url: str
    format: Format
    shard_samples: int
    """Seeds in a shard."""
    provenance: dict[str, Any]
    """All settings that decide the image of a seed; equal for all samples of a set."""
    environment: dict[str, Any]
    """Software and device; recorded, not compared."""
    asked: tuple[range, ...] = ()
    """All seeds that are asked for; recorded, so that `verify` knows which ones are missing."""

    def check(self) -> dict[int, tuple[range, ...]]:
        """Refuse a directory that holds something else, or samples drawn with other settings.

        Returns:
            Number → committed seeds of each shard that has a record.

        Raises:
            ConfigError: naming the file or the settings.
        """
        numbers = recorded(self.url)
        read = record_files.together(partial(_read, self.url), numbers)
        records = {i: record for i, record in zip(numbers, read) if record}
        if not records:
            begun = set_identity.read(self.url) or {}
            if "provenance" in begun:  # the process that began the set was killed before its first record
                self._compare(begun)
            shard_set.refuse_foreign(self.url, _BEGUN if "provenance" in begun else _UNCOMMITTED)
        for record in records.values():
            self._compare(record)
        return {i: _ranges(record) for i, record in records.items()}

    def numbers(self, seeds: tuple[range, ...]) -> list[int]:
        """The numbers of the shards that hold these seeds, ascending."""
        size = self.shard_samples
        return sorted({i for part in seeds for i in range(part.start // size, (part.stop - 1) // size + 1)})

    def seeds_in(self, i: int, seeds: tuple[range, ...]) -> list[int]:
        """The seeds that shard i holds, of sorted ranges that do not overlap."""
        return within(seeds, i * self.shard_samples, (i + 1) * self.shard_samples)

    def committed(self, i: int) -> set[int]:
        """The committed seeds of shard i.

        Raises:
            ConfigError: they were drawn with other settings.
        """
        record = self._record(i)
        return self._seeds_of(record, i) if record else set()

    def write(self, i: int, images: Iterable[tuple[int, CleanImage]], labels: dict[int, int]) -> None:
        """Write shard i, its record last.

        Args:
            i: number of the shard.
            images: (seed, uint8 (H, W, C)), ascending.
            labels: seed → class, for seeds that have one.

        Raises:
            ConfigError: meanwhile another job has begun a set with other settings in the same directory.
            DataError: no space left. No file is half-written, and the earlier shard is unchanged.
        """
        seeds: list[int] = []
        written: dict[str, dict[str, Any]] = {}

        def encoded() -> Iterator[shard_set.Sample]:
            for seed, image in images:
                seeds.append(seed)
                label = labels.get(seed)
                meta = {"seed": seed, "label": label}
                yield shard_set.Sample(shard_set.key(seed), preprocess.encode(image, "png"), "png", label, meta)

        def record() -> dict[str, Any]:
            self._compare(self._identity)
            asked = ranges_text(self.asked)
            return {
                "seeds": seeds_text(seeds),
                "count": len(seeds),
                **({"asked": asked} if 0 < len(asked) <= _MAX_ASKED else {}),
                "provenance": self.provenance,
                "environment": self.environment,
            }

        def publish(name: str, data: bytes) -> None:
            files.write_bytes(files.join(self.url, name), data)
            written[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

        record_path = files.join(self.url, f"{stem(i)}.json")
        if self.format == "tar":
            shard_set.write_shard(self.url, stem(i), map(shard_set.pack, encoded()), record)
            return
        if self.format == "png":
            if not files.exists(record_path):  # without a record nothing shows that the PNGs belong to this set
                files.write_json(record_path, record() | {"files": {}})
            for sample in encoded():
                publish(f"{sample.key}.png", sample.image)
        else:
            drawn = list(images)
            seeds += [seed for seed, _ in drawn]
            buffer = io.BytesIO()
            named: dict[str, Any] = {"labels": np.array([labels[seed] for seed in seeds])} if labels else {}
            np.savez(buffer, seeds=np.array(seeds), images=np.stack([image for _, image in drawn]), **named)
            record()  # raises ConfigError before any file is replaced
            publish(f"{stem(i)}.npz", buffer.getvalue())
        files.write_json(record_path, record() | {"files": written})

    def read(self, seeds: Iterable[int], channels: int) -> dict[int, CleanImage]:
        """The committed ones of these images: seed → uint8 (H, W, C).

        Raises:
            DataError: a file is damaged.
        """
        images: dict[int, CleanImage] = {}
        for i, requested in groupby(sorted(seeds), key=lambda seed: seed // self.shard_samples):
            committed = sorted(self.committed(i))
            wanted = {seed: committed.index(seed) for seed in requested if seed in committed}
            base = files.join(self.url, stem(i))
            try:
                if wanted and self.format == "npz":
                    with np.load(io.BytesIO(files.read_bytes(f"{base}.npz")), allow_pickle=False) as arrays:
                        images |= {seed: arrays["images"][row] for seed, row in wanted.items()}
                elif wanted and self.format == "png":
                    for seed in wanted:
                        data = files.read_bytes(files.join(self.url, f"{shard_set.key(seed)}.png"))
                        images[seed] = preprocess.decode(data, channels)
                elif wanted:
                    rows = untrusted.array_rows(files.read_bytes(f"{base}.npy"), shard_set.SIDECAR, f"{base}.npy")
                    for seed, row in wanted.items():
                        with files.open_read(
                            f"{base}.tar", int(rows[row]["offset"] + rows[row]["image_offset"])
                        ) as tar:
                            images[seed] = preprocess.decode(tar.read(int(rows[row]["image_length"])), channels)
            except (preprocess.Rejected, ValueError, KeyError, IndexError) as error:
                raise DataError(f"{base}: damaged ({error!r}): `ddpm verify {self.url}` tells more") from error
        return images

    def finish(
        self, seeds: tuple[range, ...], *, size: tuple[int, int], channels: int, classes: Sequence[str] | None
    ) -> bool:
        """Write the index if all these seeds are committed; returns whether they are.

        Of several jobs on one set each may write it: they write the same bytes.
        """
        if self.format != "tar":
            return all(record_files.together(lambda i: self._has(self.committed(i), i, seeds), self.numbers(seeds)))
        sizes = files.sizes(self.url)
        numbers = sorted(int(match[1]) for name in sizes if (match := SAMPLE_RECORD.fullmatch(name)))
        records = record_files.read(self.url, map(stem, numbers), sizes)
        for record in records.values():
            self._compare(record.extra)
        if not all(
            stem(i) in records and self._has(self._seeds_of(records[stem(i)].extra, i), i, seeds)
            for i in self.numbers(seeds)
        ):
            return False
        index_file.write_index(
            self.url, records.values(), size=size, channels=channels,
            classes=classes, source=f"checkpoint {self.provenance['checkpoint_sha256']}", settings=self.provenance,
            counts={"taken": sum(record.samples for record in records.values())},
        )  # fmt: skip
        return True

    def _has(self, committed: set[int], i: int, seeds: tuple[range, ...]) -> bool:
        return committed.issuperset(self.seeds_in(i, seeds))

    def _seeds_of(self, record: dict[str, Any], i: int) -> set[int]:
        first = i * self.shard_samples
        return set(within(_ranges(record), first, first + self.shard_samples))

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What `set.json` says; the first process to commit a shard creates it. Older sets have only their records."""
        claimed = set_identity.claim(self.url, {"provenance": self.provenance})
        if "provenance" not in claimed:
            raise ConfigError(f"{self.url} holds a {set_identity.FILE} of something else: choose another --out")
        return claimed

    def _record(self, i: int) -> dict[str, Any] | None:
        record = _read(self.url, i)
        if record is None:
            return None
        self._compare(record)
        if self.format == "tar":
            return record if shard_set.read_record(self.url, stem(i)) else None
        try:
            is_complete = all(
                files.size(files.join(self.url, name_inside(name, stem(i)))) == file["bytes"]
                for name, file in record["files"].items()
            )
        except (FileNotFoundError, NotADirectoryError, DataError, KeyError, TypeError):
            return None
        return record if is_complete else None

    def _compare(self, record: dict[str, Any]) -> None:
        then, now = record["provenance"], self.provenance
        if differing := [key for key in now | then if then.get(key) != now.get(key)]:
            diff = "; ".join(f"{key}: {then.get(key)} there, {now.get(key)} now" for key in differing)
            raise ConfigError(f"{self.url} holds samples drawn differently ({diff}): choose another --out")


def provenance(url: str) -> dict[str, Any]:
    """The `provenance` of an existing sample set, complete or not; empty if there is none."""
    records = (record for i in recorded(url) if (record := _read(url, i)))
    return next((record["provenance"] for record in records), {})


def recorded_seeds(url: str, i: int) -> tuple[range, ...]:
    """The committed seeds of shard i by its record; none if it has no record."""
    record = _read(url, i)
    return _ranges(record) if record else ()


def index_is_incomplete(url: str) -> bool:
    """Whether a sample set in tars has no index, or one that lacks shards with a record."""
    if not files.exists(files.join(url, index_file.INDEX)):
        records = (record for i in recorded(url) if (record := _read(url, i)))
        return any("files" not in record for record in records)
    try:
        indexed = {shard.stem for shard in shard_set.ShardSet.indexed(url).shards}
    except (DataError, OSError):
        return False  # it is damaged
    return any(stem(i) not in indexed for i in recorded(url))


def verify(url: str, each: Callable[[Sequence[int]], Iterable[int]] = iter) -> list[str]:
    """Check every file of a set against its records, and list the seeds that were asked for and are missing.

    `shards.verify` checks a finished set in tars, which has an index.

    Args:
        url: the set.
        each: yields the numbers of the shards; it may show progress, or raise to stop.

    Returns:
        One line for each finding; none if the set is intact.
    """
    findings: list[str] = []
    records: list[dict[str, Any]] = []
    known: set[str] = set()
    provenances: set[str] = set()
    for i in each(recorded(url)):
        record = _read(url, i)
        listed = None if record is None else _listed(record, i)
        if record is None or listed is None:
            findings.append(f"{stem(i)}.json: not the record of a shard of samples")
            continue
        records.append(record)
        known |= listed.keys()
        provenances.add(json.dumps(record["provenance"], sort_keys=True))
        if record["count"] != sum(map(len, _ranges(record))):
            findings.append(f"{stem(i)}.json: its count is not that of its seeds")
        findings += [problem for name, file in listed.items() if (problem := _problem(url, i, name, file))]
    if len(provenances) > 1:
        findings.append("its shards were drawn in different ways")
    unknown = [name for name in files.listdir(url) if _SAMPLES.fullmatch(name) and name not in known]
    findings += [f"{name}: in no record (of a shard that is not finished, or from elsewhere)" for name in unknown]
    return [*map(printable, findings), *_unfinished(url, records)]


def _unfinished(url: str, records: list[dict[str, Any]]) -> list[str]:
    """The finding that a set is not finished, if it is not."""
    if missing := _missing(records):
        more = f" and {len(missing) - _SHOWN_RANGES} ranges more" if len(missing) > _SHOWN_RANGES else ""
        return [
            f"seeds {ranges_text(missing[:_SHOWN_RANGES])}{more} are missing ({sum(map(len, missing))} in all): the "
            "same `ddpm sample` command draws them"
        ]
    if any("files" not in record for record in records) and not files.exists(files.join(url, index_file.INDEX)):
        return [f"{index_file.INDEX}: missing, the set is not finished: the same `ddpm sample` command finishes it"]
    return []


def _missing(records: list[dict[str, Any]]) -> tuple[range, ...]:
    """The seeds that the commands of a set asked for and that are in no record. Version 0.1 did not record them."""
    asked = {record["asked"] for record in records if "asked" in record}
    committed = merged(part for record in records for part in _ranges(record))
    return without(merged(part for text in asked for part in parse_seeds(text)), committed)


def _listed(record: dict[str, Any], i: int) -> dict[str, Any] | None:
    """The files of a record: name → its bytes and sha256; None if the record does not list them."""
    if "files" in record:
        return dict(record["files"])
    try:
        shard = ShardRecord.parse(record)
    except DataError:
        return None
    return {shard.name: {"sha256": shard.sha256}, f"{stem(i)}.npy": {"sha256": shard.sidecar_sha256}}


def _problem(url: str, i: int, name: str, file: Any) -> str:
    """The finding in a file of shard i; empty if the file is intact."""
    try:
        if files.sha256(files.join(url, name_inside(name, f"{stem(i)}.json"))) != file["sha256"]:
            return f"{name}: does not have the sha256 of {stem(i)}.json"
    except DataError as error:
        return str(error)
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError):
        return f"{name}: missing, or {stem(i)}.json does not say what it holds"
    return ""


def recorded(url: str) -> list[int]:
    """The numbers of the shards that have a record, ascending."""
    return sorted(int(match[1]) for name in files.listdir(url) if (match := SAMPLE_RECORD.fullmatch(name)))


def _read(url: str, i: int) -> dict[str, Any] | None:
    """The record of shard i; None if there is none, or not one of a sample set."""
    try:
        record = files.read_json(files.join(url, f"{stem(i)}.json"))
        _ranges(record)
        if "asked" in record:
            parse_seeds(record["asked"])
        kinds = {"provenance": dict, "count": int} | ({"files": dict} if "files" in record else {})
        return record if all(isinstance(record[key], kind) for key, kind in kinds.items()) else None
    except (FileNotFoundError, NotADirectoryError, DataError, ConfigError, AttributeError, KeyError, TypeError):
        return None


def _ranges(record: dict[str, Any]) -> tuple[range, ...]:
    """The seeds of a record, as ranges: a short text can stand for millions of seeds."""
    return parse_seeds(record["seeds"]) if record["seeds"] != "" else ()


def stem(i: int) -> str:
    """The name of shard i without its ending."""
    return f"shard_{i:06d}"
