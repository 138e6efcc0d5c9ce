"""Shards, whoever made them and wherever they lie → one set: their totals, the list of what was rejected, the index."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from pipeline import storage
from pipeline.data.shardset import REJECTED, ShardRecord, read_record, rejected_lines, write_index
from pipeline.errors import DataError

_NUMBERED = re.compile(r"(.+)-(\d{6,})\.tar")
_NAMED = 5
_AGAIN = "run `ddpm shard` again with its --part, then this command"


class Books:
    """What has become of a shard's inputs: the part of its record that `totals` adds up."""

    def __init__(self) -> None:
        self._taken = 0
        self._rejected: list[dict[str, str]] = []
        self._transforms: Counter[str] = Counter()
        self._sizes: Counter[int] = Counter()
        self._classes: Counter[int] = Counter()

    def take(self, transforms: Iterable[str], short_side: int, label: int) -> None:
        """A picture: what was done to it, its short side as stored, in pixels, and its class, -1 for none."""
        self._taken += 1
        self._transforms.update(transforms)
        self._sizes[1 << (short_side.bit_length() - 1)] += 1
        self._classes[label] += 1

    def reject(self, line: dict[str, str]) -> None:
        """An input that was not taken: its line in `rejected.jsonl`."""
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


def totals(records: Iterable[ShardRecord], classes: Sequence[str] | None) -> dict[str, Any]:
    """Totals over shards.

    Args:
        records: their records.
        classes: names by class number.

    Returns:
        inputs, taken, rejected by reason, transforms, and pictures by class and by the power of two that their short
        side, in pixels, as stored, reaches.
    """
    parts = [record.extra["counts"] for record in records]
    sums: dict[str, Counter[str]] = {name: Counter() for name in ("rejected", "transforms", "sizes", "classes")}
    for part in parts:
        for name, counter in sums.items():
            counter.update(part[name])
    return {
        "inputs": sum(part["inputs"] for part in parts),
        "taken": sum(part["taken"] for part in parts),
        "rejected": dict(sorted(sums["rejected"].items())),
        "transforms": dict(sorted(sums["transforms"].items())),
        "sizes": dict(sorted(sums["sizes"].items(), key=lambda item: int(item[0]))),
        "classes": None if classes is None else {name: sums["classes"][str(i)] for i, name in enumerate(classes)},
    }


def publish(
    out: str,
    records: Sequence[ShardRecord],
    *,
    size: Sequence[int],
    channels: int,
    classes: Sequence[str] | None,
    source: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Write `rejected.jsonl` and, if there is a sample, the index.

    Args:
        out: the set.
        records: of all shards, in order.
        size: (height, width) of every picture.
        channels: 1 or 3.
        classes: names by class number, or None.
        source: where the pictures come from.
        settings: what they were made with.

    Returns:
        The totals.

    Raises:
        DataError: no space left.
    """
    storage.write_bytes(storage.join(out, REJECTED), rejected_lines(records))
    counts = totals(records, classes)
    if counts["taken"]:
        height, width = size
        write_index(
            out,
            records,
            size=(height, width),
            channels=channels,
            classes=classes,
            source=source,
            settings=settings,
            counts=counts,
        )
    return counts


def refuse_too_many_bad(out: str, counts: dict[str, Any], max_bad_fraction: float) -> None:
    """Judge a set that is written by how much was rejected.

    Raises:
        DataError: everything, or more than this share.
    """
    bad, place = counts["inputs"] - counts["taken"], storage.join(out, REJECTED)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts["rejected"].items())
    if not counts["taken"]:
        raise DataError(f"not one of {bad} inputs is a readable picture ({reasons}): {place} names each")
    if bad > max_bad_fraction * counts["inputs"]:
        raise DataError(
            f"{bad} of {counts['inputs']} inputs were rejected ({reasons}), more than --max-bad-fraction "
            f"{max_bad_fraction:g} allows: {place} names each; the set is written, with the other {counts['taken']}"
        )


def reference(out: str, tar: str) -> str:
    """What a set calls a tar: its path from the set if it lies in the set's parent folder or below, else where it is.

    So that folder can be moved as a whole, and a set whose tars lie elsewhere by itself.
    """
    if storage.is_remote(tar):
        return tar.removeprefix(out.rstrip("/") + "/")
    folder, name = os.path.split(os.path.abspath(storage.local(tar)))
    file = os.path.join(os.path.realpath(folder), name)
    if storage.is_remote(out):
        return file
    root = os.path.realpath(storage.local(out))
    return os.path.relpath(file, root) if file.startswith(os.path.dirname(root).rstrip("/") + "/") else file


def is_part(tar: str) -> bool:
    """Whether `ddpm shard` made this tar: a record beside it says with which settings."""
    try:
        record = storage.read_json(f"{tar.removesuffix('.tar')}.json")
    except (FileNotFoundError, NotADirectoryError, DataError):
        return False
    return (
        isinstance(record, dict) and isinstance(record.get("settings"), dict) and "preprocessing" in record["settings"]
    )


def collect(tars: Sequence[str]) -> list[ShardRecord]:
    """The records of shards that together are one set, in their order; `name` is the tar as given.

    Args:
        tars: paths or URLs, in any order.

    Raises:
        DataError: one is unfinished, of another set or there twice, or one is missing; named.
    """
    found: dict[int, tuple[str, ShardRecord]] = {}
    first: tuple[str, ShardRecord] | None = None
    for tar in tars:
        folder, _, name = tar.rpartition("/")
        match = _NUMBERED.fullmatch(name)
        record = read_record(folder or ".", name.removesuffix(".tar")) if match else None
        if match is None or record is None or not {"settings", "source", "counts"} <= record.extra.keys():
            raise DataError(f"{tar} is no whole shard of `ddpm shard`: no record fits it: {_AGAIN}, or leave it out")
        first = first or (tar, record)
        if differing := _differing(first[1].extra, record.extra):
            raise DataError(f"{tar} is of another set than {first[0]} ({differing}): join parts of one set")
        if twin := found.get(int(match[2])):
            raise DataError(f"{twin[0]} and {tar} are the same shard: leave one of them out")
        found[int(match[2])] = tar, record
    assert first is not None
    source, settings = first[1].extra["source"], first[1].extra["settings"]
    expected = -(-source["inputs"] // settings["shard_samples"])
    if beyond := [tar for number, (tar, _) in found.items() if number >= expected]:
        raise DataError(f"{beyond[0]} is beyond the {expected} shards of its source: renamed; give it its name back")
    if missing := [f"{number:06d}" for number in range(expected) if number not in found]:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise DataError(
            f"shards {', '.join(missing[:_NAMED])}{more} of {expected} are missing: name them too, or {_AGAIN}"
        )
    return [replace(record, name=tar) for _, (tar, record) in sorted(found.items())]


def _differing(then: dict[str, Any], now: dict[str, Any]) -> str:
    settings = {**then["settings"], **now["settings"]}
    names = [name for name in settings if then["settings"].get(name) != now["settings"].get(name)]
    said = [f"{name} {then['settings'].get(name)} there, {now['settings'].get(name)} here" for name in names]
    if then["source"]["fingerprint"] != now["source"]["fingerprint"] or then.get("classes") != now.get("classes"):
        said.append("made of other inputs")
    return "; ".join(said)
