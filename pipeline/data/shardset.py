"""The shard set: one writer and one reader for training data and samples alike; `integrity.py` is its verifier.

    NAME-000000.tar   samples KEY.png|jpg|webp, KEY.cls (class number), KEY.json; plain webdataset reads it
    NAME-000000.npy   the sidecar, one `SIDECAR` row a sample: where its bytes lie and their crc32
    NAME-000000.json  the shard's record and commit, written after both; it carries what the job wants to remember
    index.json        written last; a set without it is unfinished
    rejected.jsonl    the inputs that were not taken, with reasons (absent from sample sets)

A tar cut on a 512-byte boundary ends cleanly in every tar reader, and so does one with a damaged header; only the
counts kept beside it tell. Hence no index, no reading. Every file appears complete or not at all and equal samples
give equal bytes: no clock, host or process is in them. `shards/README.md` is the format on one page.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.errors import ConfigError, DataError

VERSION = 1
INDEX = "index.json"
REJECTED = "rejected.jsonl"
SIDECAR = np.dtype(
    [
        ("offset", "<u8"),  # of the sample's first header in the tar
        ("length", "<u4"),  # of the whole sample: headers, payloads and padding
        ("crc32", "<u4"),  # of exactly these bytes
        ("image_offset", "<u4"),  # of the image's payload, relative to `offset`
        ("image_length", "<u4"),
        ("label", "<i4"),  # class number, -1: none
    ]
)
_INDEXED = {"name": str, "bytes": int, "sha256": str, "samples": int, "sidecar_sha256": str}
_FIX = "run the command that made the set again: it makes only what is missing"
_REMAKE = "restore it from a copy, or make the set again with --overwrite"


@dataclass(frozen=True)
class Sample:
    """One picture on its way into a shard."""

    key: str
    """From `key`; ascending within a shard."""
    image: bytes
    """The encoded file."""
    extension: str
    """png, jpg or webp."""
    label: int | None
    """Class number, or None."""
    meta: dict[str, Any]
    """Becomes KEY.json."""


@dataclass(frozen=True)
class ShardRecord:
    """What is known of one shard; the first five fields are repeated in the index."""

    name: str
    """File name of the tar; of one made elsewhere its path, from the set or from the root, or its URL."""
    bytes: int
    sha256: str
    samples: int
    sidecar_sha256: str
    extra: dict[str, Any]
    """Whatever else the job wants to remember; not in the index."""
    sidecar: str | None = None
    """File name of the sidecar where it does not lie beside the tar; the record lies beside the sidecar."""

    @property
    def stem(self) -> str:
        """What the names of sidecar and record begin with, from the set."""
        return (self.sidecar or self.name).rpartition(".")[0]

    @staticmethod
    def parse(value: dict[str, Any]) -> ShardRecord:
        """A record from NAME-000000.json or from the index.

        Raises:
            KeyError, TypeError: it is neither.
        """
        extra = value | {}
        known = {name: extra.pop(name) for name in _INDEXED}
        sidecar = extra.pop("sidecar", None)
        if not isinstance(sidecar, str | None) or not all(isinstance(known[name], _INDEXED[name]) for name in known):
            raise TypeError("a value of the wrong kind")
        return ShardRecord(**known, sidecar=sidecar, extra=extra)

    def entry(self) -> dict[str, Any]:
        """The shard's line in the index."""
        entry = {name: getattr(self, name) for name in _INDEXED}
        return entry | ({"sidecar": self.sidecar} if self.sidecar else {})


def place(url: str, name: str) -> str:
    """Where a file is that a set at `url` calls by this name: in the set, from there, or a place of its own."""
    return name if storage.is_remote(name) or name.startswith("/") else storage.join(url, name)


def key(position: int) -> str:
    """The key of an input or seed: its number, zero-padded to nine digits, so that names sort as numbers do."""
    return f"{position:09d}"


class Packed(NamedTuple):
    """A sample as its bytes in a tar; they do not depend on where in which tar it is."""

    data: bytes
    """Members with their headers and padding."""
    crc32: int
    """Of `data`."""
    image_offset: int
    """Of the image's payload in `data`."""
    image_length: int
    label: int
    """-1 for none."""


def pack(sample: Sample) -> Packed:
    """A sample's members as a piece of a tar, in the order of their extensions."""
    members = {sample.extension: sample.image, "json": json.dumps(sample.meta).encode()}
    if sample.label is not None:
        members["cls"] = str(sample.label).encode()
    data, image_offset = bytearray(), 0
    for extension, payload in sorted(members.items()):
        header = tarfile.TarInfo(f"{sample.key}.{extension}")
        header.size, header.mode = len(payload), 0o444
        data += header.tobuf(tarfile.USTAR_FORMAT)
        if extension == sample.extension:
            image_offset = len(data)
        data += payload + bytes(-len(payload) % tarfile.BLOCKSIZE)
    label = -1 if sample.label is None else sample.label
    return Packed(bytes(data), zlib.crc32(data), image_offset, len(sample.image), label)


def refuse_foreign(url: str, ours: re.Pattern[str]) -> None:
    """Refuse to write a set where something else is.

    Args:
        url: where the set is to be.
        ours: names that a set may have left there before its first record; hidden files are nobody's.

    Raises:
        ConfigError: it is a file, or holds a file of another name.
    """
    if storage.exists(url) and not storage.is_dir(url):
        raise ConfigError(f"{url} is a file: --out names a directory")
    strange = [name for name in storage.listdir(url) if not (name.startswith(".") or ours.fullmatch(name))]
    if strange:
        raise ConfigError(f"{url} exists and holds something else ({ascii(strange[0])[1:-1]}): choose another --out")


def write_shard(
    directory: str, stem: str, samples: Iterable[Packed], extra: Callable[[], dict[str, Any]]
) -> ShardRecord:
    """Write one shard: tar, then sidecar, then the record that makes both count.

    A shard that is written anew stays valid as it was until the new tar is complete.

    Args:
        directory: the set, a path or URL.
        stem: NAME-000000.
        samples: in ascending order of key; consumed one at a time.
        extra: called once the samples are consumed, before anything is replaced; goes into the record. May raise.

    Returns:
        The record as written.

    Raises:
        DataError: no space left, or not permitted; no file of this shard is left half-written.
    """
    base = storage.join(directory, stem)
    rows: list[tuple[int, ...]] = []
    digest, size = hashlib.sha256(), 0
    with storage.publishing(f"{base}.tar") as file:
        for data, crc32, *place_and_label in samples:
            file.write(data)
            digest.update(data)
            rows.append((size, len(data), crc32, *place_and_label))
            size += len(data)
        end = bytes(2 * tarfile.BLOCKSIZE + -(size + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)
        file.write(end)
        digest.update(end)
        remembered, sha256 = extra(), digest.hexdigest()
        # What a record vouches for is about to be replaced, unless by another process that has just made the same.
        if storage.exists(f"{base}.json") and ((old := read_record(directory, stem)) is None or old.sha256 != sha256):
            storage.remove(f"{base}.json")
    whole = {"name": f"{stem}.tar", "bytes": size + len(end), "sha256": sha256}
    return write_papers(directory, stem, np.array(rows, SIDECAR), whole | remembered)


def write_papers(directory: str, stem: str, rows: NDArray[np.void], remembered: dict[str, Any]) -> ShardRecord:
    """Write the sidecar of a tar that is there, then the record that makes both count.

    Args:
        directory: the set, a path or URL.
        stem: what both are called.
        rows: of the sidecar.
        remembered: `name`, `bytes`, `sha256`, and whatever else goes into the record.

    Raises:
        DataError: no space left, or not permitted.
    """
    base = storage.join(directory, stem)
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    storage.write_bytes(f"{base}.npy", buffer.getvalue())
    told = {"samples": len(rows), "sidecar_sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    record = ShardRecord.parse(remembered | told)
    storage.write_json(f"{base}.json", record.entry() | record.extra)
    return record


def read_record(directory: str, stem: str) -> ShardRecord | None:
    """A shard's record, or None if the shard is not committed or its tar has another size than it says."""
    base = place(directory, stem)
    try:
        record = ShardRecord.parse(storage.read_json(f"{base}.json"))
        tar = place(directory, record.name) if record.sidecar else f"{base}.tar"
        whole = storage.size(tar) == record.bytes and storage.exists(f"{base}.npy")
    except (FileNotFoundError, NotADirectoryError, DataError, KeyError, TypeError):
        return None
    return record if whole else None


def rejected_lines(records: Iterable[ShardRecord]) -> bytes:
    """What `rejected.jsonl` holds, assembled from the `rejected` lists of the records: one JSON object a line."""
    return "".join(json.dumps(line) + "\n" for record in records for line in record.extra.get("rejected", [])).encode()


def write_index(
    directory: str,
    records: Iterable[ShardRecord],
    *,
    size: tuple[int, int],
    channels: int,
    classes: Iterable[str] | None,
    source: str | dict[str, Any],
    settings: dict[str, Any],
    counts: dict[str, Any],
) -> None:
    """Write `index.json`, which makes a directory of shards a shard set.

    Args:
        directory: the set.
        records: in the order of the shards.
        size: (height, width) of every picture.
        channels: 1 or 3.
        classes: names by class number, or None.
        source: where the pictures come from.
        settings: what they were made with; its hash tells whether two sets were made alike.
        counts: totals for the reader.

    Raises:
        DataError: no space left, or not permitted.
    """
    entries = [record.entry() for record in records]
    index = {
        "version": VERSION,
        "shards": entries,
        "samples": sum(entry["samples"] for entry in entries),
        "size": list(size),
        "channels": channels,
        "classes": None if classes is None else list(classes),
        "source": source,
        "settings": settings,
        "settings_sha256": settings_sha256(settings),
        "counts": counts,
    }
    storage.write_json(storage.join(directory, INDEX), index)


def settings_sha256(settings: dict[str, Any]) -> str:
    """Hash of settings, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ShardSet:
    """A finished shard set, as its index describes it."""

    url: str
    shards: tuple[ShardRecord, ...]
    """As indexed: `extra` is empty, `read_record` has it."""
    samples: int
    size: tuple[int, int]
    """(height, width) of every picture."""
    channels: int
    classes: tuple[str, ...] | None
    sha256: str
    """Identity of the data: the hash of the list of shard hashes."""
    source: str | dict[str, Any]
    settings: dict[str, Any]
    settings_sha256: str
    counts: dict[str, Any]

    @staticmethod
    def open(url: str) -> ShardSet:
        """Read the index and compare every tar's size with it.

        Raises:
            DataError: no such directory, no index, a newer or damaged one, or a tar missing or cut short.
        """
        shards = ShardSet.indexed(url)
        for i, record in enumerate(shards.shards):
            try:
                found = storage.size(shards.tar(i))
            except FileNotFoundError as error:
                raise DataError(f"{shards.tar(i)} is missing: {_FIX}, or restore it from a copy") from error
            if found != record.bytes:
                raise DataError(
                    f"{shards.tar(i)} is cut short or changed: {found} bytes, the index says {record.bytes}: "
                    f"{_FIX}, or restore it from a copy"
                )
        return shards

    @staticmethod
    def indexed(url: str) -> ShardSet:
        """What the index says, without a look at the tars.

        Raises:
            DataError: no such directory, no index, or a newer or damaged one.
        """
        if not storage.is_remote(url) and not storage.is_dir(url):
            raise DataError(f"{url}: no such directory: give the place that `ddpm shard --out` wrote")
        file = storage.join(url, INDEX)
        try:
            index = storage.read_json(file)
        except FileNotFoundError as error:
            raise DataError(
                f"{url} has no {INDEX}: it is unfinished or not a shard set: run `ddpm shard` again with the same "
                "arguments, or `ddpm index` on tars made elsewhere"
            ) from error
        try:
            if index["version"] != VERSION:
                raise DataError(f"{file} has format {index['version']}, this program reads {VERSION}: upgrade it")
            height, width = map(int, index["size"])
            if index["channels"] not in (1, 3) or not isinstance(index["classes"], list | None):
                raise ValueError("of `channels` or `classes`")
            shards = tuple(ShardRecord.parse(entry) for entry in index["shards"])
            if index["samples"] != sum(record.samples for record in shards):
                raise DataError(f"{file}: `samples` is not the sum over the shards: damaged; {_REMAKE}")
            return ShardSet(
                url=url,
                shards=shards,
                samples=index["samples"],
                size=(height, width),
                channels=index["channels"],
                classes=None if index["classes"] is None else tuple(index["classes"]),
                sha256=hashlib.sha256("".join(record.sha256 for record in shards).encode()).hexdigest(),
                source=index["source"],
                settings=index["settings"] | {},
                settings_sha256=index["settings_sha256"],
                counts=index["counts"] | {},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file} is not the index of a shard set ({error!r}): {_REMAKE}") from error

    def tar(self, i: int) -> str:
        """Path or URL of shard i's tar."""
        return place(self.url, self.shards[i].name)

    def papers(self, i: int, ending: str) -> str:
        """Path or URL of shard i's sidecar (npy) or record (json)."""
        return place(self.url, f"{self.shards[i].stem}.{ending}")

    def sidecar(self, i: int) -> NDArray[np.void]:
        """Shard i's sidecar: (samples,) of `SIDECAR`, checked against its hash.

        Raises:
            DataError: missing or damaged.
        """
        record = self.shards[i]
        file = self.papers(i, "npy")
        try:
            data = storage.read_bytes(file)
        except FileNotFoundError as error:
            raise DataError(f"{file} is missing: {_FIX}, or restore it from a copy") from error
        if hashlib.sha256(data).hexdigest() != record.sidecar_sha256:
            raise DataError(f"{file} does not have the sha256 of the index: damaged or of another shard; {_REMAKE}")
        rows: NDArray[np.void] = np.load(io.BytesIO(data), allow_pickle=False)
        if rows.dtype != SIDECAR or rows.shape != (record.samples,):
            raise DataError(f"{file} holds {rows.shape} of {rows.dtype}, not {record.samples} rows; {_REMAKE}")
        return rows

    @property
    def shard_samples(self) -> tuple[int, ...]:
        """Samples in each shard."""
        return tuple(record.samples for record in self.shards)
