"""The shard set, which holds training data or samples: its writer and its reader. `verify.py` checks it.

    NAME-000000.tar   samples KEY.png|jpg|webp, KEY.cls (class number), KEY.json; plain webdataset reads it
    NAME-000000.npy   the sidecar, one `SIDECAR` row a sample: where its bytes lie and their crc32
    NAME-000000.json  the shard's record, written after both: with it the shard is committed
    index.json        written last; a set without it is unfinished
    rejected.jsonl    the inputs that were not taken, with reasons (absent from sample sets)

A tar cut on a 512-byte boundary ends cleanly in every tar reader; only the counts in the index show that samples are
missing. So a set without an index is not read. Equal samples give equal bytes. `shards/README.md` describes the format.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import messages, path_kind, untrusted
from pipeline.data.shards.index_file import locations_message, read_index
from pipeline.data.shards.record import ShardRecord
from pipeline.data.shards.shard_table import ShardSizes, ShardTable
from pipeline.errors import ConfigError, DataError
from pipeline.storage import files, remote
from pipeline.storage.block_cache import BlockCache

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
_MAX_HEADER = 1 << 12  # bytes of a sidecar before its rows
_FIX = "run the command that made the set again: it makes only what is missing, or restore it from a copy"
_REMAKE = "restore it from a copy, or make the set again with --overwrite"


@dataclass(frozen=True)
class Sample:
    """One sample to write into a shard."""

    key: str
    """From `key`; ascending within a shard."""
    image: bytes
    """The encoded image file."""
    extension: str
    """png, jpg or webp."""
    label: int | None
    """Class number, or None."""
    meta: dict[str, Any]
    """Becomes KEY.json."""


def resolve(url: str, name: str) -> str:
    """Path or URL of a file, from its name in the set at `url`: relative to the set, absolute, or a URL."""
    return name if files.is_remote(name) or name.startswith("/") else files.join(url, name)


def key(position: int) -> str:
    """The key of an input or seed: its number, zero-padded to nine digits, so that keys sort as the numbers do."""
    return f"{position:09d}"


class Packed(NamedTuple):
    """The bytes of a sample in a tar; they do not depend on the tar or on the offset in it."""

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
    """Make the bytes of a sample: its tar members, in the order of their extensions."""
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


def refuse_foreign(url: str, own_names: re.Pattern[str]) -> None:
    """Refuse to write a set to a directory that holds something else.

    Args:
        url: the set to write.
        own_names: names of files that an unfinished set may have before its first record. Hidden files are ignored.

    Raises:
        ConfigError: `url` is a file, or holds a file of another name.
    """
    if files.exists(url) and not files.is_dir(url):
        raise ConfigError(f"{url} is a file: give --out a directory")
    if foreign := [name for name in files.listdir(url) if not (name.startswith(".") or own_names.fullmatch(name))]:
        raise ConfigError(f"{url} exists and holds something else ({ascii(foreign[0])[1:-1]}): choose another --out")


def write_shard(
    directory: str, stem: str, samples: Iterable[Packed], extra: Callable[[], dict[str, Any]]
) -> ShardRecord:
    """Write one shard: tar, then sidecar, then record. Returns the record.

    If the shard exists, it stays valid until the new tar is complete.

    Args:
        directory: the set, a path or URL.
        stem: NAME-000000.
        samples: in ascending order of key; consumed one at a time.
        extra: gives further fields of the record. Called after the last sample, before any file is replaced; may raise.

    Raises:
        DataError: no space left, or not permitted; no file of this shard is left half-written.
    """
    base = files.join(directory, stem)
    rows: list[tuple[int, ...]] = []
    digest, size = hashlib.sha256(), 0
    with files.publishing(f"{base}.tar") as file:
        for data, crc32, *image_and_label in samples:
            file.write(data)
            digest.update(data)
            rows.append((size, len(data), crc32, *image_and_label))
            size += len(data)
        end = bytes(2 * tarfile.BLOCKSIZE + -(size + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)
        file.write(end)
        digest.update(end)
        extra_fields, sha256 = extra(), digest.hexdigest()
        # The old record would not fit the new tar. If another process has just written the same tar, its record fits.
        if _sha256_in_record(f"{base}.json") not in (None, sha256):
            files.remove(f"{base}.json")
    fields = {"name": f"{stem}.tar", "bytes": size + len(end), "sha256": sha256}
    return write_sidecar_and_record(directory, stem, np.array(rows, SIDECAR), fields | extra_fields)


def _sha256_in_record(file: str) -> str | None:
    """The hash of a tar in its record; None if there is no record, and empty if it is damaged."""
    try:
        return ShardRecord.parse(files.read_json(file)).sha256
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DataError:
        return ""


def write_sidecar_and_record(directory: str, stem: str, rows: NDArray[np.void], fields: dict[str, Any]) -> ShardRecord:
    """Write the sidecar of an existing tar, then its record. Returns the record.

    Args:
        directory: the set, a path or URL.
        stem: the name of both, without the ending.
        rows: of the sidecar.
        fields: of the record: `name`, `bytes`, `sha256` of the tar, and others.

    Raises:
        DataError: no space left, or not permitted.
    """
    base = files.join(directory, stem)
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    files.write_bytes(f"{base}.npy", buffer.getvalue())
    fields |= {"samples": len(rows), "sidecar_sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    record = ShardRecord.parse(fields)
    files.write_json(f"{base}.json", record.entry() | record.extra)
    return record


def read_record(directory: str, stem: str) -> ShardRecord | None:
    """A shard's record; None if the shard is not committed or its tar has another size than in the record."""
    base = resolve(directory, stem)
    try:
        record = ShardRecord.parse(files.read_json(f"{base}.json"), f"{base}.json")
        tar = resolve(directory, record.name) if record.sidecar else f"{base}.tar"
        is_complete = files.size(tar) == record.bytes and files.exists(f"{base}.npy")
    except (FileNotFoundError, NotADirectoryError, DataError):
        return None
    return record if is_complete else None


def rejected_lines(records: Iterable[ShardRecord]) -> bytes:
    """The content of `rejected.jsonl`: one JSON object a line, from the `rejected` lists of the records."""
    return "".join(json.dumps(line) + "\n" for record in records for line in record.extra.get("rejected", [])).encode()


@dataclass(frozen=True)
class ShardSet:
    """A finished shard set, as its index describes it."""

    url: str
    shards: ShardTable
    samples: int
    size: tuple[int, int]
    """(height, width) of every image."""
    channels: int
    classes: tuple[str, ...] | None
    sha256: str
    """Identity of the data: the hash of the list of shard hashes."""
    source: str | dict[str, Any]
    settings: dict[str, Any]
    settings_sha256: str
    counts: dict[str, Any]
    tar_locations: tuple[str, ...] = ()
    """Directories and URL prefixes outside of the set in which its tars may lie; `places` in the index."""
    cache: BlockCache | None = field(default=None, compare=False)
    """The cache of this node, through which tars and sidecars of a remote set are read."""

    @staticmethod
    def open(url: str) -> ShardSet:
        """Read the index; a message names directories outside of the set. A tar is checked when it is opened.

        Raises:
            DataError: no such directory, no index, or a newer or damaged one.
        """
        shards = ShardSet.indexed(url)
        shards.report_tar_locations()
        return shards

    @staticmethod
    def indexed(url: str) -> ShardSet:
        """Read the index, without a message.

        Raises:
            DataError: no such directory, no index, or a newer or damaged one.
        """
        try:
            head, shards, locations = read_index(url)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(path_kind.not_a_set(url)) from error
        identity = hashlib.sha256()
        for hashes in shards.hex_hashes():
            identity.update(hashes.encode())
        shards.release()
        return ShardSet(url=url, shards=shards, tar_locations=locations, sha256=identity.hexdigest(), **head)

    def report_tar_locations(self) -> None:
        """Print a message with the directories outside of the set from which tars are read, if there are some."""
        if self.tar_locations:
            messages.info(locations_message(self.url, self.tar_locations))

    def tar(self, i: int) -> str:
        """Path or URL of shard i's tar."""
        return resolve(self.url, self.shards[i].name)

    def open_tar(self, i: int, offset: int) -> BinaryIO:
        """Open shard i's tar at a byte offset. Of a tar in a store the first block is read, and its size is not asked.

        Raises:
            DataError: it is missing, or has another size than in the index; in a store a read finds that it is cut.
        """
        record, tar = self.shards[i], self.tar(i)
        try:
            if files.is_remote(tar):
                cached = partial(self.cache.get, record.sha256) if self.cache else None
                return remote.stream(tar, offset, record.bytes, cached)
            if (size := files.size(tar)) != record.bytes:
                raise DataError(f"{tar} is cut short or changed: {size} bytes, the index says {record.bytes}: {_FIX}")
            return files.open_read(tar, offset)
        except FileNotFoundError as error:
            raise DataError(f"{tar} is missing: {_FIX}") from error

    def sidecar_path(self, i: int) -> str:
        """Path or URL of shard i's sidecar."""
        return resolve(self.url, f"{self.shards[i].stem}.npy")

    def record_path(self, i: int) -> str:
        """Path or URL of shard i's record."""
        return resolve(self.url, f"{self.shards[i].stem}.json")

    def sidecar(self, i: int) -> NDArray[np.void]:
        """Shard i's sidecar: (samples,) of `SIDECAR`, checked against its hash.

        Raises:
            DataError: missing or damaged.
        """
        record, file = self.shards[i], self.sidecar_path(i)

        def load() -> bytes:
            data = files.read_bytes(file, at_most=SIDECAR.itemsize * record.samples + _MAX_HEADER)
            if not _has_sha256(data, record.sidecar_sha256):
                data = files.read_bytes(file)
            if not _has_sha256(data, record.sidecar_sha256):
                raise DataError(f"{file} does not have the sha256 of the index: damaged or of another shard; {_REMAKE}")
            return data

        try:
            data = self.cache.get(record.sidecar_sha256, 0, load) if self.cache else load()
        except FileNotFoundError as error:
            raise DataError(f"{file} is missing: {_FIX}") from error
        rows = untrusted.array_rows(data, SIDECAR, file)
        if len(rows) != record.samples:
            raise DataError(f"{file} holds {len(rows)} rows, not {record.samples}; {_REMAKE}")
        return rows

    @property
    def shard_samples(self) -> ShardSizes:
        """Samples in each shard."""
        return ShardSizes(self.shards)


def _has_sha256(data: bytes, sha256: str) -> bool:
    return hashlib.sha256(data).hexdigest() == sha256
