"""Every byte of a shard set against its index, in one reading of each tar.

A hash tells that a shard is damaged; what its user wants to know is which shard and which samples, so each sample is
looked at as well.
"""

from __future__ import annotations

import hashlib
import re
import signal
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.data.foreign import decoder
from pipeline.data.inspection import Inspector
from pipeline.data.parts import totals
from pipeline.data.shardset import (
    INDEX,
    REJECTED,
    SIDECAR,
    ShardRecord,
    ShardSet,
    rejected_lines,
    settings_sha256,
)
from pipeline.errors import DataError

_BLOCK, _PIECE = tarfile.BLOCKSIZE, 1 << 20
_SHARD_FILE = re.compile(r".*\d{6,}\.(tar|npy|json)")
_UNREADABLE = (DataError, OSError, ValueError, KeyError, TypeError, AttributeError)
"""What comes of reading a file that holds something else than it should."""

_RECORDS = {
    "preprocessing": ("settings", "source", "classes", "counts", "rejected"),
    "foreign": ("settings", "counts", "rejected", "picture_sizes"),
    "checkpoint_sha256": ("provenance",),
}
"""What records hold, by a setting that tells who made the set."""

Check = Callable[[ShardSet], Iterable[list[str]]]


def in_turn(shards: ShardSet) -> Iterator[list[str]]:
    """The findings in each shard, found one after the other by this process."""
    return check(shards, range(len(shards.shards)), lambda: None)


def verify(url: str, shards_of: Check = in_turn) -> list[str]:
    """Check every byte of a shard set against its index.

    Args:
        url: the set.
        shards_of: gives the findings in each of its shards, in their order.

    Returns:
        One line a finding, naming shard and key; none if the set is sound.

    Raises:
        DataError: a store cannot be reached, or does not give parts of files.
    """
    try:
        shards = ShardSet.indexed(url)
        decoder(shards)
    except (DataError, OSError, RecursionError) as error:
        return [str(error)]
    findings = [*_strangers(shards), *_verify_index(shards)]
    for found in shards_of(shards):
        findings += found
    return [*findings, *_verify_sums(shards)]


def _strangers(shards: ShardSet) -> Iterator[str]:
    """Shard files that the index does not know: renamed, or left by another job."""
    known = {record.stem for record in shards.shards}
    if len(known) < len(shards.shards) or len({record.name for record in shards.shards}) < len(shards.shards):
        yield f"{INDEX}: a shard is listed twice"
    known |= {record.name.removesuffix(".tar") for record in shards.shards}
    for name in storage.listdir(shards.url):
        if _SHARD_FILE.fullmatch(name) and name.rsplit(".", 1)[0] not in known:
            yield f"{name}: not in the index (renamed, or left by another job)"


def _verify_index(shards: ShardSet) -> Iterator[str]:
    """What the index says twice."""
    settings, source = shards.settings, shards.source
    if shards.settings_sha256 != settings_sha256(settings):
        yield f"{INDEX}: `settings_sha256` is not that of `settings`"
    for name, value in {"size": list(shards.size), "channels": shards.channels}.items():
        if settings.get(name) not in (None, value):
            yield f"{INDEX}: `{name}` is {value}, `settings` has {settings[name]}"
    if not all(isinstance(name, str) for name in shards.classes or ()):
        yield f"{INDEX}: `classes` are not names"
    if "checkpoint_sha256" in settings and source != f"checkpoint {settings['checkpoint_sha256']}":
        yield f"{INDEX}: `source` is not the checkpoint of `settings`"
    if settings.get("foreign"):
        known = {"tars": len(shards.shards), "bytes": sum(record.bytes for record in shards.shards)}
        if source != known:
            yield f"{INDEX}: `source` is {source}, the tars are {known}"


def _verify_sums(shards: ShardSet) -> Iterator[str]:
    """The list of rejected inputs, the totals and the source against the shards' records."""
    taken = shards.counts.get("taken")
    if taken != shards.samples and (shards.counts or "checkpoint_sha256" in shards.settings):
        yield f"{INDEX}: `counts` has {taken} taken, the shards have {shards.samples} samples"
    records = [record for i in range(len(shards.shards)) if (record := _record(shards, i)[0])]
    if not any("counts" in record.extra for record in records):
        return
    try:
        yield from _verify_rejected(shards, records)
        if len(records) == len(shards.shards):
            yield from _verify_totals(shards, records)
    except _UNREADABLE as error:
        yield f"{INDEX}: cannot be compared with the sums of the records ({error!r})"


def _verify_rejected(shards: ShardSet, records: list[ShardRecord]) -> Iterator[str]:
    place, lines = storage.join(shards.url, REJECTED), rejected_lines(records)
    if not storage.exists(place) or storage.read_bytes(place) != lines:
        yield f"{REJECTED}: missing, or not what the shards' records say"
    missing = shards.counts["inputs"] - shards.samples - lines.count(b"\n")
    if missing:
        yield f"{INDEX}: {missing} of {shards.counts['inputs']} inputs are neither a sample nor in {REJECTED}"


def _verify_totals(shards: ShardSet, records: list[ShardRecord]) -> Iterator[str]:
    counts, told = shards.counts, totals(records, shards.classes)
    wrong = [name for name in counts | told if counts.get(name) != told.get(name)]
    if list(told["classes"] or ()) != list(counts["classes"] or ()):
        wrong.append("the order of classes")
    if wrong:
        yield f"{INDEX}: `counts` or `classes` are not what the records add up to: {', '.join(wrong)}"
    sources = [record.extra["source"] for record in records if "source" in record.extra]
    if sources and shards.source not in sources:
        yield f"{INDEX}: `source` is that of no record"
    if shards.settings.get("foreign") and shards.settings.get("size") is None:
        sizes = {str(size) for record in records for size in record.extra["picture_sizes"]}
        if sizes != {"x".join(map(str, shards.size))}:
            yield f"{INDEX}: `size` is {list(shards.size)}, the records have {', '.join(sorted(sizes))}"


def check(shards: ShardSet, numbers: Iterable[int], go_on: Callable[[], None]) -> Iterator[list[str]]:
    """The findings in each of these shards; `go_on` is called before each sample and may leave."""
    for i in numbers:
        yield _verify_shard(shards, i, go_on)


def bury(i: int, exit_code: int) -> list[str]:
    """The finding in a shard at which two processes have died."""
    cause = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
    return [f"shard {i}: two processes died at it ({cause}): a picture in it crashes its decoder, or memory ran out"]


def _record(shards: ShardSet, i: int) -> tuple[ShardRecord | None, str]:
    """A shard's record, or what is wrong with it."""
    name = f"{shards.shards[i].stem}.json"
    try:
        return ShardRecord.parse(storage.read_json(shards.papers(i, "json"))), ""
    except FileNotFoundError:
        return None, f"{name}: missing"
    except _UNREADABLE as error:
        return None, f"{name}: not the record of a shard ({error})"


def _verify_record(shards: ShardSet, i: int, rows: NDArray[np.void] | None) -> Iterator[str]:
    indexed = shards.shards[i]
    record, problem = _record(shards, i)
    if record is None:
        yield problem
        return
    differing = _differing(record, indexed, shards)
    if rows is not None and "counts" in record.extra and not _is_counted(record, rows):
        differing.append("what its counts add up to")
    if differing:
        yield f"{indexed.stem}.json: differs from the index in {', '.join(differing)} (of another shard, or changed)"


def _differing(record: ShardRecord, indexed: ShardRecord, shards: ShardSet) -> list[str]:
    """Names of what a record says otherwise than the index, or does not say."""
    then, now = record.entry(), indexed.entry()
    if not indexed.sidecar:  # the tar lies beside its record, which says nothing of where that is
        now["name"] = now["name"].rpartition("/")[2]
    differing = [key for key in then | now if then.get(key) != now.get(key)]
    for kind, names in _RECORDS.items():
        if kind in shards.settings:
            differing += [name for name in names if name not in record.extra]
    for name in ("settings", "provenance"):
        if record.extra.get(name, shards.settings) != shards.settings:
            differing.append(name)
    if "source" in record.extra and _identity(record.extra["source"]) != _identity(shards.source):
        differing.append("source")
    classes = record.extra.get("classes")
    if classes is not None and classes != list(shards.classes or ()):
        differing.append("classes")
    return differing


def _is_counted(record: ShardRecord, rows: NDArray[np.void]) -> bool:
    """Whether a record's counts are those of its samples and of what it says was rejected."""
    labels, numbers = np.unique(rows["label"][rows["label"] >= 0], return_counts=True)
    try:
        counts, rejected = record.extra["counts"], record.extra["rejected"]
        classes = dict(zip(map(str, labels.tolist()), numbers.tolist()))
        return [counts["taken"], counts["inputs"], counts["classes"]] == [len(rows), len(rows) + len(rejected), classes]
    except (KeyError, TypeError):
        return False


def _identity(source: Any) -> Any:
    """Jobs that make parts of one set may name its source differently."""
    return {**source, "urls": None} if isinstance(source, dict) else source


class _Hashed:
    """A file read once from its beginning, hashed as it comes."""

    def __init__(self, file: BinaryIO) -> None:
        self.sha256 = hashlib.sha256()
        self.at = 0
        self._file = file

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        self.at += len(data)
        return data

    def zeros(self) -> int:
        """Read on to the end: how many bytes there are if all of them are zero, else -1."""
        count = 0
        while piece := self.read(_PIECE):
            count = -1 if count < 0 or piece.strip(b"\0") else count + len(piece)
        return count


def _verify_shard(shards: ShardSet, i: int, go_on: Callable[[], None]) -> list[str]:
    record = shards.shards[i]
    try:
        rows = shards.sidecar(i)
        findings = [*_verify_record(shards, i, rows)]
    except (DataError, OSError, ValueError, EOFError) as error:
        findings = [*_verify_record(shards, i, None), f"{record.stem}.npy: {error}"]
        rows = np.zeros(0, SIDECAR)
    try:
        with storage.open_read(shards.tar(i)) as file:
            tar = _Hashed(file)
            problems = [*_verify_samples(shards, i, rows, tar, go_on)]
            tar.zeros()
    except FileNotFoundError:
        return [*findings, f"{record.name}: missing"]
    except OSError as error:
        return [*findings, f"{record.name}: cannot be read ({error.strerror or error})"]
    digest = tar.sha256.hexdigest()
    if digest == record.sha256:
        return findings + problems
    if twins := [other.name for other in shards.shards if other.sha256 == digest]:
        return [*findings, f"{record.name}: holds the bytes of {twins[0]} (swapped or renamed)"]
    if tar.at == record.bytes:
        return [*findings, f"{record.name}: does not have the sha256 of the index", *problems]
    whole = int(np.sum(rows["offset"] + rows["length"] <= tar.at))
    said = f"{record.name}: {tar.at} bytes, the index says {record.bytes} (cut short or changed)"
    return [*findings, f"{said}: the index says {record.samples} samples, {whole} are whole", *problems]


def _verify_samples(
    shards: ShardSet, i: int, rows: NDArray[np.void], tar: _Hashed, go_on: Callable[[], None]
) -> Iterator[str]:
    """Each sample's bytes against its row, as far as they go."""
    record = shards.shards[i]
    inspector, keys = Inspector(shards), _Keys(shards, record)
    for n, row in enumerate(rows):
        go_on()
        offset, length = int(row["offset"]), int(row["length"])
        if offset < tar.at or (offset > tar.at and not shards.settings.get("foreign")):
            yield f"{record.stem}.npy: row {n} starts at byte {offset}, the sample before it ends at {tar.at}"
            return
        while (gap := min(offset - tar.at, _PIECE)) and tar.read(gap):
            pass
        data = tar.read(length)
        if len(data) < length:
            if record.bytes < offset + length:
                yield f"{record.stem}.npy: row {n} ends beyond the tar"
            return
        key, problem = inspector.inspect(data, row)
        if problem := problem or keys.follow(key):
            yield f"{record.name}: sample {key if key is not None else f'in row {n}'}: {problem}"
    if len(rows) == record.samples and not shards.settings.get("foreign") and tar.zeros() < 2 * _BLOCK:
        yield f"{record.name}: no end-of-archive mark after the last sample, or something follows it"


class _Keys:
    """The keys of our own shards ascend, and tell which shard they belong to; those of others say nothing."""

    def __init__(self, shards: ShardSet, record: ShardRecord) -> None:
        self._last: int | None = None
        self._previous, self._first = -1, 0
        self._is_foreign = bool(shards.settings.get("foreign"))
        shard_samples = shards.settings.get("shard_samples")
        number = re.search(r"[-_](\d{6,})\.tar$", record.name)
        if isinstance(shard_samples, int) and number:
            self._first = int(number[1]) * shard_samples
            self._last = self._first + shard_samples

    def follow(self, key: str | None) -> str | None:
        """What is wrong with the next key."""
        if key is None or self._is_foreign:
            return None
        previous, self._previous = self._previous, int(key)
        if int(key) <= previous:
            return "its key is not above the one before it"
        if int(key) < self._first or (self._last is not None and int(key) >= self._last):
            return f"its key is outside this shard's range, {self._first} to {self._last}"
        return None
