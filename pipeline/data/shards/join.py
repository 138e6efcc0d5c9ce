"""Records of shards → one set: the totals, the list of rejected inputs, the index."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from pipeline.data.shards import record_files
from pipeline.data.shards.index_file import write_index
from pipeline.data.shards.record import ShardRecord
from pipeline.data.shards.shard_set import REJECTED, read_record, rejected_lines
from pipeline.data.sources.inputs import NOT_IMAGES
from pipeline.data.sources.labels import class_names
from pipeline.data.sources.listing import SOURCES
from pipeline.errors import DataError
from pipeline.storage import files

_NUMBERED = re.compile(r"(.+)-(\d{6,})\.tar")
_NAMES_SHOWN = 5
_AGAIN = "run `ddpm shard` again with its --part, then this command"


class Counts:
    """Counts of a shard's samples and rejected inputs: the part of its record that `totals` adds up."""

    def __init__(self) -> None:
        self._taken = 0
        self._rejected: list[dict[str, str]] = []
        self._transforms: Counter[str] = Counter()
        self._sizes: Counter[int] = Counter()
        self._classes: Counter[int] = Counter()

    def take(self, transforms: Iterable[str], short_side: int, label: int) -> None:
        """Count a sample.

        Args:
            transforms: what was done to its image.
            short_side: of the image as stored, in pixels.
            label: class number, -1 for none.
        """
        self._taken += 1
        self._transforms.update(transforms)
        self._sizes[1 << (short_side.bit_length() - 1)] += 1
        self._classes[label] += 1

    def reject(self, line: dict[str, str]) -> None:
        """Count a rejected input, by its line in `rejected.jsonl`."""
        self._rejected.append(line)

    def as_json(self) -> dict[str, Any]:
        """`counts` and `rejected`."""
        counts = {
            "inputs": self._taken + len(self._rejected),
            "taken": self._taken,
            "rejected": dict(sorted(Counter(line["reason"] for line in self._rejected).items())),
            "transforms": dict(sorted(self._transforms.items())),
            "sizes": {str(least): count for least, count in sorted(self._sizes.items())},
            "classes": {str(label): count for label, count in sorted(self._classes.items()) if label >= 0},
        }
        return {"counts": counts, "rejected": self._rejected}


class Totals:
    """The `counts` of the index: the sums over the shards, with classes by name.

    `sizes` counts images by the power of two that their short side, in pixels, as stored, reaches.
    """

    def __init__(self) -> None:
        self._numbers: Counter[str] = Counter(inputs=0, taken=0)
        self._sums: dict[str, Counter[str]] = {
            name: Counter() for name in ("rejected", "transforms", "sizes", "classes")
        }

    def add(self, record: ShardRecord) -> None:
        """Add the counts of a shard's record."""
        counts = record.extra["counts"]
        for name in self._numbers:
            self._numbers[name] += counts[name]
        for name, sums in self._sums.items():
            sums.update(counts[name])

    def as_json(self, classes: Sequence[str] | None) -> dict[str, Any]:
        """The sums; `classes` are the names by class number."""
        by_class = self._sums["classes"]
        return {
            **self._numbers,
            "rejected": dict(sorted(self._sums["rejected"].items())),
            "transforms": dict(sorted(self._sums["transforms"].items())),
            "sizes": dict(sorted(self._sums["sizes"].items(), key=lambda item: int(item[0]))),
            "classes": None if classes is None else {name: by_class[str(i)] for i, name in enumerate(classes)},
        }


def totals(records: Iterable[ShardRecord], classes: Sequence[str] | None) -> dict[str, Any]:
    """The `counts` of an index of these shards."""
    sums = Totals()
    for record in records:
        sums.add(record)
    return sums.as_json(classes)


def publish(
    out: str, records: Sequence[ShardRecord], *, classes: Sequence[str] | None, size: Sequence[int], **head: Any
) -> dict[str, Any]:
    """Write `rejected.jsonl` and, if there is a sample, the index; returns the totals.

    Args:
        out: the set.
        records: of all shards, in order.
        classes: names by class number, or None.
        size: (height, width) of every image.
        head: `channels`, `source` and `settings`, as `write_index` takes them.

    Raises:
        DataError: no space left.
    """
    files.write_bytes(files.join(out, REJECTED), rejected_lines(records))
    counts = totals(records, classes)
    if counts["taken"]:
        height, width = size
        write_index(out, records, size=(height, width), classes=classes, counts=counts, **head)
    return counts


def refuse_too_many_bad(out: str, counts: dict[str, Any], max_bad_fraction: float) -> None:
    """Refuse a written set of which too many inputs were rejected; files that are not meant as images do not count.

    Raises:
        DataError: no input was taken, or a larger share than this was rejected.
    """
    list_path, rejected = files.join(out, REJECTED), counts["rejected"]
    bad = {reason: count for reason, count in rejected.items() if reason not in NOT_IMAGES}
    unclear = "; --image-ext names the images among them" if "several_pictures" in bad else ""
    if not counts["taken"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.items())
        raise DataError(
            f"not one of {counts['inputs']} inputs is a readable image ({reasons}): {list_path} names each{unclear}"
            f"{_archives(list_path)}"
        )
    count = sum(bad.values())
    meant = counts["taken"] + count
    if count > max_bad_fraction * meant:
        reasons = ", ".join(f"{count} {reason}" for reason, count in bad.items())
        raise DataError(
            f"{count} of {meant} inputs were rejected ({reasons}), more than --max-bad-fraction {max_bad_fraction:g} "
            f"allows: {list_path} names each{unclear}; the set is written, with the other {counts['taken']}"
        )


def _archives(list_path: str) -> str:
    """Advice if the first rejected input is an archive in a directory, which is not opened."""
    with files.open_read(list_path) as lines:
        name = json.loads(lines.readline() or "{}").get("source", "").rpartition("/")[2]
    ending = next((ending for ending in SOURCES if name.endswith(ending)), None)
    return f"; {name} holds images itself: give such files as sources, as in 'DIRECTORY/*{ending}'" if ending else ""


def reference(out: str, tar: str) -> str:
    """The name of a tar in the index of the set `out`: relative if the tar lies in the set's parent directory or below.

    So the parent directory can be moved as a whole, and a set whose tars lie elsewhere can be moved by itself.
    """
    if files.is_remote(tar):
        return tar.removeprefix(out.rstrip("/") + "/")
    directory, name = os.path.split(os.path.abspath(files.local(tar)))
    file = os.path.join(os.path.realpath(directory), name)
    if files.is_remote(out):
        return file
    root = os.path.realpath(files.local(out))
    return os.path.relpath(file, root) if file.startswith(os.path.dirname(root).rstrip("/") + "/") else file


def is_part(tar: str) -> bool:
    """Whether `ddpm shard` made this tar: then a record beside it has its settings."""
    try:
        record = files.read_json(f"{tar.removesuffix('.tar')}.json")
    except (FileNotFoundError, NotADirectoryError, DataError):
        return False
    return (
        isinstance(record, dict) and isinstance(record.get("settings"), dict) and "preprocessing" in record["settings"]
    )


def collect(tars: Sequence[str]) -> list[ShardRecord]:
    """The records of the shards of one set, in their order, with the tar as given for a name.

    Args:
        tars: paths or URLs, in any order.

    Raises:
        DataError: a shard is unfinished, of another set, given twice, or missing; the message names it.
    """
    by_number: dict[int, tuple[str, ShardRecord]] = {}
    first: tuple[str, ShardRecord] | None = None
    for tar, record in zip(tars, record_files.together(_record, tars)):
        match = _NUMBERED.fullmatch(tar.rpartition("/")[2])
        if match is None or record is None or not {"settings", "source", "counts"} <= record.extra.keys():
            raise DataError(
                rf"{tar} is not a complete shard of `ddpm shard` \(no record fits it\): {_AGAIN}, or leave it out"
            )
        first = first or (tar, record)
        if differing := _differing(first[1].extra, record.extra):
            raise DataError(f"{tar} is of another set than {first[0]} ({differing}): join parts of one set")
        if twin := by_number.get(int(match[2])):
            raise DataError(f"{twin[0]} and {tar} are the same shard: leave one of them out")
        by_number[int(match[2])] = tar, record
    assert first is not None
    source, settings = first[1].extra["source"], first[1].extra["settings"]
    expected = -(-source["inputs"] // settings["shard_samples"])
    if beyond := [tar for number, (tar, _) in by_number.items() if number >= expected]:
        raise DataError(
            f"{beyond[0]} is beyond the {expected} shards of its source: it was renamed: give it its old name"
        )
    if missing := [f"{number:06d}" for number in range(expected) if number not in by_number]:
        more = f" and {len(missing) - _NAMES_SHOWN} more" if len(missing) > _NAMES_SHOWN else ""
        raise DataError(
            f"shards {', '.join(missing[:_NAMES_SHOWN])}{more} of {expected} are missing: name them too, or {_AGAIN}"
        )
    return [replace(record, name=tar) for _, (tar, record) in sorted(by_number.items())]


def _record(tar: str) -> ShardRecord | None:
    directory, _, name = tar.rpartition("/")
    return read_record(directory or ".", name.removesuffix(".tar")) if _NUMBERED.fullmatch(name) else None


def _differing(then: dict[str, Any], now: dict[str, Any]) -> str:
    settings = {**then["settings"], **now["settings"]}
    names = [name for name in settings if then["settings"].get(name) != now["settings"].get(name)]
    differences = [f"{name} {then['settings'].get(name)} there, {now['settings'].get(name)} here" for name in names]
    before, after = then.get("classes") or (), now.get("classes") or ()
    if class_names.mapping(before, after) != list(range(len(before))):
        differences.append(f"other classes, or in another order: {class_names.compared(before, after)}")
    if then["source"]["fingerprint"] != now["source"]["fingerprint"]:
        differences.append("made of other inputs")
    return "; ".join(differences)
