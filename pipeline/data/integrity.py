"""Every byte of a shard set against its index.

A hash tells that a shard is damaged; what its user wants to know is which shard and which samples, so each sample is
looked at as well. Nothing is extracted: members are read in memory, and only regular files named KEY.extension are
accepted (a tar can hold `../../etc/passwd`, links and devices).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.data.images import Rejected, decode
from pipeline.data.shardset import INDEX, REJECTED, SIDECAR, ShardRecord, ShardSet, read_record, rejected_lines
from pipeline.errors import DataError

_BLOCK = tarfile.BLOCKSIZE
_MEMBER = re.compile(r"(\d{9,})\.(png|jpg|webp|cls|json)")
_SHARD_FILE = re.compile(r".*\d{6,}\.(tar|npy|json)")


def verify(url: str, each: Callable[[Sequence[ShardRecord]], Iterable[ShardRecord]] = iter) -> list[str]:
    """Check every byte of a shard set against its index.

    Nothing is extracted: members are looked at in memory, and only regular files named KEY.extension are accepted.

    Args:
        url: the set.
        each: gives the shards one by one, to watch or to end the work.

    Returns:
        One line a finding, naming shard and key; none if the set is sound.
    """
    try:
        shards = ShardSet.indexed(url)
    except DataError as error:
        return [str(error)]
    findings = [*_strangers(shards)]
    for i, _ in enumerate(each(shards.shards)):
        findings += _verify_shard(shards, i)
    return [*findings, *_verify_rejected(shards)]


def _strangers(shards: ShardSet) -> Iterator[str]:
    """Shard files that the index does not know: renamed, or left by another job."""
    known = {record.stem for record in shards.shards}
    if len(known) < len(shards.shards):
        yield f"{INDEX}: a shard is listed twice"
    for name in storage.listdir(shards.url):
        if _SHARD_FILE.fullmatch(name) and name.rsplit(".", 1)[0] not in known:
            yield f"{name}: not in the index (renamed, or left by another job)"


def _verify_rejected(shards: ShardSet) -> Iterator[str]:
    """The list of rejected inputs against the shards' records and the index's counts."""
    if "inputs" not in shards.counts:
        return
    records = [read_record(shards.url, record.stem) for record in shards.shards]
    lines = rejected_lines(record for record in records if record)
    place = storage.join(shards.url, REJECTED)
    if not storage.exists(place) or storage.read_bytes(place) != lines:
        yield f"{REJECTED}: missing, or not what the shards' records say"
    missing = shards.counts["inputs"] - shards.samples - lines.count(b"\n")
    if missing:
        yield f"{INDEX}: {missing} of {shards.counts['inputs']} inputs are neither a sample nor in {REJECTED}"


def _verify_shard(shards: ShardSet, i: int) -> Iterator[str]:
    record = shards.shards[i]
    yield from _verify_record(shards, record)
    try:
        rows = shards.sidecar(i)
    except DataError as error:
        yield f"{record.stem}.npy: {error}"
        rows = np.zeros(0, SIDECAR)
    try:
        with storage.open_read(shards.tar(i)) as tar:
            digest, found = hashlib.sha256(), 0
            while chunk := tar.read(1 << 20):
                digest.update(chunk)
                found += len(chunk)
    except FileNotFoundError:
        yield f"{record.name}: missing"
        return
    if digest.hexdigest() != record.sha256:
        twins = [other.name for other in shards.shards if other.sha256 == digest.hexdigest()]
        if twins:
            yield f"{record.name}: holds the bytes of {twins[0]} (swapped or renamed)"
            return
        if found != record.bytes:
            whole = int(np.sum(rows["offset"] + rows["length"] <= found))
            yield (
                f"{record.name}: {found} bytes, the index says {record.bytes} (cut short or changed): "
                f"the index says {record.samples} samples, {whole} are whole"
            )
        else:
            yield f"{record.name}: does not have the sha256 of the index"
    with storage.open_read(shards.tar(i)) as tar:
        yield from _verify_samples(shards, i, rows[rows["offset"] + rows["length"] <= found], tar)


def _verify_record(shards: ShardSet, record: ShardRecord) -> Iterator[str]:
    try:
        committed = ShardRecord.parse(storage.read_json(storage.join(shards.url, f"{record.stem}.json")))
    except FileNotFoundError:
        yield f"{record.stem}.json: missing"
        return
    except (DataError, KeyError, TypeError) as error:
        yield f"{record.stem}.json: not the record of a shard ({error})"
        return
    differing = [key for key, value in record.entry().items() if committed.entry()[key] != value]
    if differing:
        yield f"{record.stem}.json: differs from the index in {', '.join(differing)} (of another shard, or changed)"


def _verify_samples(shards: ShardSet, i: int, rows: NDArray[np.void], tar: BinaryIO) -> Iterator[str]:
    """Each sample's bytes against its row, then what follows the last one."""
    record = shards.shards[i]
    shard_samples = shards.settings.get("shard_samples")
    first, last = 0, None
    if isinstance(shard_samples, int) and (number := re.search(r"[-_](\d{6,})\.tar$", record.name)):
        first = int(number[1]) * shard_samples
        last = first + shard_samples
    end, previous = 0, -1
    for n, row in enumerate(rows):
        if row["offset"] != end:
            yield f"{record.stem}.npy: row {n} starts at byte {row['offset']}, the sample before it ends at {end}"
            return
        data = tar.read(int(row["length"]))
        end += len(data)
        key, problem = _inspect(data, row, shards)
        if key is not None and problem is None:
            if int(key) <= previous:
                problem = "its key is not above the one before it"
            elif int(key) < first or (last is not None and int(key) >= last):
                problem = f"its key is outside this shard's range, {first} to {last}"
            previous = int(key)
        if problem:
            yield f"{record.name}: sample {key if key is not None else f'in row {n}'}: {problem}"
    if len(rows) == record.samples:
        rest = tar.read()
        if rest.strip(b"\0") or len(rest) < 2 * _BLOCK:
            yield f"{record.name}: no end-of-archive mark after the last sample, or something follows it"


def _inspect(data: bytes, row: np.void, shards: ShardSet) -> tuple[str | None, str | None]:
    """One sample's bytes: its key if it can be told, and what is wrong with it, if anything."""
    key: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    problem = None
    end = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                name = _MEMBER.fullmatch(member.name)
                if not name or not member.isreg() or (key is not None and name[1] != key) or name[2] in members:
                    problem = f"member {member.name!r} has no place in it"
                    break
                key = name[1]
                members[name[2]] = member
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
    except (tarfile.TarError, ValueError, OverflowError) as error:
        problem = f"damaged headers ({error})"
    if zlib.crc32(data) != row["crc32"]:
        return key, "its bytes do not have the crc32 of the sidecar"
    if problem is None and end != len(data):
        problem = "the sidecar's length is not that of its members"
    return key, problem or _inspect_members(data, members, row, shards)


def _inspect_members(data: bytes, members: dict[str, tarfile.TarInfo], row: np.void, shards: ShardSet) -> str | None:
    payload = {name: data[m.offset_data : m.offset_data + m.size] for name, m in members.items()}
    images = [name for name in payload if name not in ("cls", "json")]
    if len(images) != 1:
        return f"{len(images)} images in it, not one"
    return _inspect_labels(payload, row, shards) or _inspect_image(members[images[0]], payload[images[0]], row, shards)


def _inspect_labels(payload: dict[str, bytes], row: np.void, shards: ShardSet) -> str | None:
    if payload.get("cls", b"-1") != str(row["label"]).encode():
        return "its class is not that of the sidecar"
    if shards.classes is not None and not -1 <= row["label"] < len(shards.classes):
        return f"class {row['label']} is not one of the {len(shards.classes)} of the index"
    try:
        json.loads(payload.get("json", b"{}"))
    except ValueError:
        return "its KEY.json is not JSON"
    return None


def _inspect_image(member: tarfile.TarInfo, image: bytes, row: np.void, shards: ShardSet) -> str | None:
    if (member.offset_data, member.size) != (row["image_offset"], row["image_length"]):
        return "its image is not where the sidecar says"
    try:
        shape = decode(image, shards.channels).shape
    except Rejected as rejected:
        return f"its image cannot be decoded ({rejected.reason})"
    expected = (*shards.size, shards.channels)
    return None if shape == expected else f"its image is {shape}, the index says {expected}"
