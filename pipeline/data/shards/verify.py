"""Verification of a shard set: every byte against the index, in one reading of each tar.

A hash shows that a shard is damaged, but not which of its samples, so each sample is checked too.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards import record_files, set_identity
from pipeline.data.shards.index_file import INDEX, settings_sha256
from pipeline.data.shards.index_tars import decoder
from pipeline.data.shards.join import Totals
from pipeline.data.shards.record import ShardRecord
from pipeline.data.shards.sample_check import SampleChecker
from pipeline.data.shards.shard_set import REJECTED, SIDECAR, ShardSet, rejected_lines
from pipeline.errors import DataError
from pipeline.processes.pool import exit_cause
from pipeline.storage import files
from pipeline.untrusted import printable

_TOGETHER = 1024  # records that are read by several threads
_BLOCK, _PIECE = tarfile.BLOCKSIZE, 1 << 20
_SHARD_FILE = re.compile(r".*\d{6,}\.(tar|npy|json)")
_UNREADABLE = (DataError, OSError, ValueError, KeyError, TypeError, AttributeError)
"""Raised by reading a file with unexpected content."""

_RECORDS = {
    "preprocessing": ("settings", "source", "classes", "counts", "rejected"),
    "foreign": ("settings", "counts", "rejected", "picture_sizes"),
    "checkpoint_sha256": ("provenance",),
}
"""Extra fields that a record must have, by a setting that shows which job made the set."""

Check = Callable[[ShardSet], Iterable[list[str]]]


def in_turn(shards: ShardSet) -> Iterator[list[str]]:
    """Check the shards in this process, one after the other; yields the findings in each."""
    return check(shards, range(len(shards.shards)), lambda: None)


def verify(url: str, check_shards: Check = in_turn) -> list[str]:
    """Check every byte of a shard set against its index.

    Args:
        url: the set.
        check_shards: yields the findings in each of its shards, in their order.

    Returns:
        One line for each finding, with shard and key; none if the set is intact.

    Raises:
        DataError: a store cannot be reached, or does not give parts of files.
    """
    try:
        shards = ShardSet.indexed(url)
        decoder(shards)
    except (DataError, OSError) as error:
        return [str(error)]
    shards.report_tar_locations()
    names = files.listdir(url)
    findings = [*_verify_names(shards, names), *_verify_index(shards, names)]
    for of_shard in check_shards(shards):
        findings += of_shard
    return [printable(line) for line in (*findings, *_verify_sums(shards))]


def _verify_names(shards: ShardSet, names: list[str]) -> Iterator[str]:
    """Shards that the index lists twice, and shard files that it does not list."""
    known, tars = set[str](), set[str]()
    for record in shards.shards:
        known.add(record.stem)
        tars.add(record.name.removesuffix(".tar"))
    if min(len(known), len(tars)) < len(shards.shards):
        yield f"{INDEX}: a shard is listed twice"
    known |= tars
    for name in names:
        if _SHARD_FILE.fullmatch(name) and name.rsplit(".", 1)[0] not in known:
            yield f"{name}: not in the index (renamed, or left by another job)"


def _verify_index(shards: ShardSet, names: list[str]) -> Iterator[str]:
    """Values that the index has in two places."""
    settings, source = shards.settings, shards.source
    if shards.settings_sha256 != settings_sha256(settings):
        yield f"{INDEX}: `settings_sha256` is not that of `settings`"
    for name, value in {"size": list(shards.size), "channels": shards.channels}.items():
        if settings.get(name) not in (None, value):
            yield f"{INDEX}: `{name}` is {value}, `settings` has {settings[name]}"
    if set_identity.FILE in names and not _is_of(set_identity.read(shards.url), shards):
        yield f"{set_identity.FILE}: damaged, or of another set than {INDEX}"
    if "checkpoint_sha256" in settings and source != f"checkpoint {settings['checkpoint_sha256']}":
        yield f"{INDEX}: `source` is not the checkpoint of `settings`"
    if settings.get("foreign"):
        expected = {"tars": len(shards.shards), "bytes": int(shards.shards.bytes.sum())}
        if source != expected:
            yield f"{INDEX}: `source` is {source}, the tars are {expected}"


def _is_of(identity: dict[str, Any] | None, shards: ShardSet) -> bool:
    """Whether `set.json` agrees with the index; not in the names of the sources, which may have been moved."""
    if identity is None:
        return False
    source = identity.get("source")
    same_source = source is None or (
        isinstance(source, dict)
        and isinstance(shards.source, dict)
        and source.get("fingerprint") == shards.source.get("fingerprint")
    )
    return same_source and identity.get("provenance", identity.get("settings")) == shards.settings


def _verify_sums(shards: ShardSet) -> Iterator[str]:
    """The list of rejected inputs, the totals and the source against the shards' records."""
    taken = shards.counts.get("taken")
    if taken != shards.samples and (shards.counts or "checkpoint_sha256" in shards.settings):
        yield f"{INDEX}: `counts` has {taken} taken, the shards have {shards.samples} samples"
    sums = _Sums()
    try:
        for record in _records(shards):
            if "counts" in record.extra:
                sums.add(record)
        if sums.records:
            yield from sums.verify_rejected(shards)
        if sums.records == len(shards.shards):
            yield from sums.verify_totals(shards)
    except _UNREADABLE as error:
        yield f"{INDEX}: cannot be compared with the sums of the records ({error!r})"


def _records(shards: ShardSet) -> Iterator[ShardRecord]:
    """The records that can be read, in the order of the shards, several at a time."""
    for first in range(0, len(shards.shards), _TOGETHER):
        numbers = range(first, min(first + _TOGETHER, len(shards.shards)))
        for record, _problem in record_files.together(partial(_record, shards), numbers):
            if record:
                yield record


class _Sums:
    """What the records of a set add up to; they are not kept, as there may be a million."""

    def __init__(self) -> None:
        self.records = 0
        self._totals, self._sources, self._sizes = Totals(), list[Any](), set[str]()
        self._rejected, self._lines = hashlib.sha256(), 0

    def add(self, record: ShardRecord) -> None:
        """Add a record that has counts."""
        self.records += 1
        self._totals.add(record)
        lines = rejected_lines([record])
        self._rejected.update(lines)
        self._lines += lines.count(b"\n")
        self._sizes.update(map(str, record.extra.get("picture_sizes", ())))
        if "source" in record.extra and record.extra["source"] not in self._sources:
            self._sources.append(record.extra["source"])

    def verify_rejected(self, shards: ShardSet) -> Iterator[str]:
        """The list of rejected inputs against the lines in the records."""
        path = files.join(shards.url, REJECTED)
        if not files.exists(path) or files.sha256(path) != self._rejected.hexdigest():
            yield f"{REJECTED}: missing, or not what the shards' records say"
        missing = shards.counts["inputs"] - shards.samples - self._lines
        if missing:
            yield f"{INDEX}: {missing} of {shards.counts['inputs']} inputs are neither a sample nor in {REJECTED}"

    def verify_totals(self, shards: ShardSet) -> Iterator[str]:
        """The totals, the source and the size of the images against those of the records."""
        counts, sums = shards.counts, self._totals.as_json(shards.classes)
        wrong = [name for name in counts | sums if counts.get(name) != sums.get(name)]
        if list(sums["classes"] or ()) != list(counts["classes"] or ()):
            wrong.append("the order of classes")
        if wrong:
            yield f"{INDEX}: `counts` or `classes` are not what the records add up to: {', '.join(wrong)}"
        if self._sources and shards.source not in self._sources:
            yield f"{INDEX}: `source` is that of no record"
        is_of_tars = bool(shards.settings.get("foreign")) and shards.settings.get("size") is None
        if is_of_tars and self._sizes != {"x".join(map(str, shards.size))}:
            yield f"{INDEX}: `size` is {list(shards.size)}, the records have {', '.join(sorted(self._sizes))}"


def check(shards: ShardSet, numbers: Iterable[int], check_stop: Callable[[], None]) -> Iterator[list[str]]:
    """Check these shards; yields the findings in each. `check_stop` is called before each sample and may raise."""
    for i in numbers:
        yield _verify_shard(shards, i, check_stop)


def on_worker_death(i: int, exit_code: int) -> list[str]:
    """The finding in a shard whose check has killed two processes."""
    return [
        f"shard {i}: two processes died at it ({exit_cause(exit_code)}): an image in it crashes its decoder, or "
        "memory ran out"
    ]


def _record(shards: ShardSet, i: int) -> tuple[ShardRecord | None, str]:
    """A shard's record and no finding, or None and the finding."""
    name = f"{shards.shards[i].stem}.json"
    try:
        return ShardRecord.parse(files.read_json(shards.record_path(i)), name), ""
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
    """Names of the values that differ between a record and the index, or that the record lacks."""
    then, now = record.entry(), indexed.entry()
    if not indexed.sidecar:  # the tar lies beside its record, whose `name` has no directory
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
    """Whether a record's counts are those of its samples and of its `rejected` list."""
    labels, numbers = np.unique(rows["label"][rows["label"] >= 0], return_counts=True)
    try:
        counts, rejected = record.extra["counts"], record.extra["rejected"]
        classes = dict(zip(map(str, labels.tolist()), numbers.tolist()))
        return [counts["taken"], counts["inputs"], counts["classes"]] == [len(rows), len(rows) + len(rejected), classes]
    except (KeyError, TypeError):
        return False


def _identity(source: Any) -> Any:
    """`source` without its URLs: jobs that make parts of one set may name the source differently."""
    return {**source, "urls": None} if isinstance(source, dict) else source


class _HashedFile:
    """A file that is read once, from its beginning, and hashed on the way."""

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
        """Read to the end; returns the number of bytes if all are zero, else -1."""
        count = 0
        while piece := self.read(_PIECE):
            count = -1 if count < 0 or piece.strip(b"\0") else count + len(piece)
        return count


def _verify_shard(shards: ShardSet, i: int, check_stop: Callable[[], None]) -> list[str]:
    record = shards.shards[i]
    try:
        rows = shards.sidecar(i)
        findings = [*_verify_record(shards, i, rows)]
    except (DataError, OSError, ValueError, EOFError) as error:
        findings = [*_verify_record(shards, i, None), f"{record.stem}.npy: {error}"]
        rows = np.zeros(0, SIDECAR)
    try:
        with files.open_read(shards.tar(i)) as file:
            tar = _HashedFile(file)
            problems = [*_verify_samples(shards, i, rows, tar, check_stop)]
            tar.zeros()
    except FileNotFoundError:
        return [*findings, f"{record.name}: missing"]
    except OSError as error:
        return [*findings, f"{record.name}: cannot be read ({error.strerror or error})"]
    digest = tar.sha256.hexdigest()
    if digest == record.sha256:
        return findings + problems
    if twins := shards.shards.with_sha256(digest):
        return [*findings, f"{record.name}: holds the bytes of {shards.shards[twins[0]].name} (swapped or renamed)"]
    if tar.at == record.bytes:
        return [*findings, f"{record.name}: does not have the sha256 of the index", *problems]
    complete = int(np.sum(rows["offset"] + rows["length"] <= tar.at))
    sizes = f"{record.name}: {tar.at} bytes, the index says {record.bytes} (cut short or changed)"
    return [*findings, f"{sizes}: the index says {record.samples} samples, {complete} are whole", *problems]


def _verify_samples(
    shards: ShardSet, i: int, rows: NDArray[np.void], tar: _HashedFile, check_stop: Callable[[], None]
) -> Iterator[str]:
    """Check each sample against its row of the sidecar, up to the end of the tar."""
    record = shards.shards[i]
    checker, keys = SampleChecker(shards), _KeyOrder(shards, record)
    for n, row in enumerate(rows):
        check_stop()
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
        key, problem = checker.check(data, row)
        if problem := problem or keys.check(key):
            yield f"{record.name}: sample {key if key is not None else f'in row {n}'}: {problem}"
    if len(rows) == record.samples and not shards.settings.get("foreign") and tar.zeros() < 2 * _BLOCK:
        yield f"{record.name}: no end-of-archive mark after the last sample, or something follows it"


class _KeyOrder:
    """Checks that the keys of a shard ascend and lie in its range; keys of tars made elsewhere are free."""

    def __init__(self, shards: ShardSet, record: ShardRecord) -> None:
        self._last: int | None = None
        self._previous, self._first = -1, 0
        self._is_foreign = bool(shards.settings.get("foreign"))
        shard_samples = shards.settings.get("shard_samples")
        number = re.search(r"[-_](\d{6,18})\.tar$", record.name)
        if isinstance(shard_samples, int) and number:
            self._first = int(number[1]) * shard_samples
            self._last = self._first + shard_samples

    def check(self, key: str | None) -> str | None:
        """What is wrong with the next key, or None."""
        if key is None or self._is_foreign:
            return None
        previous, self._previous = self._previous, int(key)
        if int(key) <= previous:
            return "its key is not above the one before it"
        if int(key) < self._first or (self._last is not None and int(key) >= self._last):
            return f"its key is outside this shard's range, {self._first} to {self._last}"
        return None
