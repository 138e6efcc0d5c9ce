"""`index.json`, which makes a directory of shards a shard set: how it is read and written.

Version 1 lists the shards. Above `MAX_LISTED` shards, version 2 names a file beside it with the table of the shards
(`shard_table.py`), its size and its SHA-256; all else is as in version 1.

The tars of `ddpm shard` and `ddpm sample` lie in the set. The tars of `ddpm index` lie elsewhere: `places` lists the
directories and URL prefixes in which they lie.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from pipeline.data.shards.record import SHA256, ShardRecord
from pipeline.data.shards.shard_table import ShardTable, pack_table
from pipeline.errors import DataError
from pipeline.storage import files
from pipeline.storage.mapped_file import FileReference
from pipeline.untrusted import count, is_allowed, location_of, locations_of, printable

INDEX = "index.json"
TABLE = re.compile(r"index-table-[0-9a-f]{12}\.bin")
"""Names of files with tables."""
MAX_LISTED = 100_000
"""Shards that `index.json` lists itself, at most."""
_VERSIONS = (1, 2)
_MAX_SIDE = 1 << 16
_MAX_CLASSES = 1 << 20
_PART = re.compile(r"(?!.*://).+-\d{6,}\.tar")
_LOCATIONS_SHOWN = 8
_REMAKE = "restore it from a copy, or make the set again with --overwrite"


class Index(NamedTuple):
    """What an index says."""

    head: dict[str, Any]
    """Fields of `ShardSet`: samples, size, channels, classes, source, settings, settings_sha256, counts."""
    shards: ShardTable
    tar_locations: tuple[str, ...]


def read_index(url: str) -> Index:
    """Read and check the index of the set in a directory.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        DataError: it is damaged, or of a newer version.
    """
    file = files.join(url, INDEX)
    index = files.read_json(file)
    if isinstance(index, dict) and (version := index.get("version")) not in _VERSIONS:
        raise DataError(f"{file} has format {version}, this program reads 1 and 2: upgrade it")
    try:
        head, listed = _head_fields(index, INDEX), index.get("shards")
        if index["version"] == 1:
            if not isinstance(listed, list):
                raise DataError(f"{INDEX}: `shards` is missing or of another kind")
            source, length = pack_table(ShardRecord.parse(entry, INDEX) for entry in listed)
            names = [(entry["name"], entry.get("sidecar")) for entry in listed]
            locations = tar_locations(url, index, names, INDEX)
            shards = ShardTable(source, length, locations)
        else:
            locations = tar_locations(url, {"places": [], **index}, (), INDEX)
            shards = ShardTable(*_table_reference(url, listed), locations)
        shards.check(head["samples"])
    except (DataError, FileNotFoundError) as error:
        raise DataError(f"{file} is not the index of a shard set ({error}): {_REMAKE}") from error
    return Index(head, shards, locations)


def _table_reference(url: str, value: Any) -> tuple[FileReference, int]:
    """The file with the table that `shards` of an index of version 2 names, on this node, and its number of shards.

    Raises:
        FileNotFoundError: the file is missing.
        DataError: the value is damaged, or the file has other bytes.
    """
    value = value if isinstance(value, dict) else {}
    name, sha256 = str(value.get("table")), str(value.get("sha256"))
    if not TABLE.fullmatch(name) or not SHA256.fullmatch(sha256):
        raise DataError(f"{INDEX}: `shards` is no list of shards, and names no table with its SHA-256")
    size = count(value.get("bytes"), f"{INDEX}: `bytes` of `shards`")
    length = count(value.get("count"), f"{INDEX}: `count` of `shards`", least=1, most=size)
    reference = FileReference(files.join(url, name), size, sha256)
    reference.fetch()
    return reference, length


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
        records: in the order of the shards; consumed one at a time.
        size: (height, width) of every image.
        channels: 1 or 3.
        classes: names by class number, or None.
        source: where the images come from.
        settings: how they were made. Two sets with the same hash of the settings were made in the same way.
        counts: totals, for people.

    Raises:
        DataError: no space left, or not permitted.
    """
    table, length = pack_table(records)
    unchecked = ShardTable(table, length)
    locations = locations_of(name for name, _ in unchecked.names())
    index: dict[str, Any] = {
        "version": 1 if length <= MAX_LISTED else 2,
        "shards": [record.entry() for record in ShardTable(table, length, tuple(locations))]
        if length <= MAX_LISTED
        else _write_table(directory, table, length),
        "samples": int(unchecked.samples.sum()),
        "size": list(size),
        "channels": channels,
        "classes": None if classes is None else list(classes),
        "source": source,
        "settings": settings,
        "settings_sha256": settings_sha256(settings),
        "counts": counts,
    }
    if locations or settings.get("foreign"):
        index["places"] = locations
    previous = _table_name(directory) if length > MAX_LISTED else None
    files.write_json(files.join(directory, INDEX), index)
    if previous and previous != index["shards"]["table"]:
        files.remove(files.join(directory, previous))


def _write_table(directory: str, table: bytes, length: int) -> dict[str, Any]:
    """Write the table; returns `shards` of the index."""
    sha256 = hashlib.sha256(table).hexdigest()
    name = f"index-table-{sha256[:12]}.bin"
    files.write_bytes(files.join(directory, name), table)
    return {"count": length, "table": name, "bytes": len(table), "sha256": sha256}


def _table_name(directory: str) -> str | None:
    """The table that the present index names; None if there is none."""
    with suppress(OSError, DataError, TypeError, KeyError):
        name = files.read_json(files.join(directory, INDEX))["shards"]["table"]
        return name if TABLE.fullmatch(name) else None
    return None


def settings_sha256(settings: dict[str, Any]) -> str:
    """Hash of settings, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _head_fields(index: Any, what: str) -> dict[str, Any]:
    """Check the index except its list of shards; returns the fields of `ShardSet`.

    Raises:
        DataError: a value is missing, of another type, or impossible.
    """
    kinds = {"settings": dict, "counts": dict, "source": (str, dict), "settings_sha256": str}
    if not isinstance(index, dict):
        raise DataError(f"{what} is not an object with named values")
    for name, kind in kinds.items():
        if not isinstance(index.get(name), kind):  # type: ignore[arg-type]
            raise DataError(f"{what}: `{name}` is missing or of another kind")
    size, classes = index.get("size"), index.get("classes")
    if not isinstance(size, list) or len(size) != 2:
        raise DataError(f"{what}: `size` is not [height, width]")
    height, width = (count(side, f"{what}: a side in `size`", least=1, most=_MAX_SIDE) for side in size)
    if count(index.get("channels"), f"{what}: `channels`") not in (1, 3):
        raise DataError(f"{what}: `channels` is neither 1 nor 3")
    if "classes" not in index or not (classes is None or isinstance(classes, list)):
        raise DataError(f"{what}: `classes` is no list of names")
    if classes is not None and (len(classes) > _MAX_CLASSES or not all(isinstance(name, str) for name in classes)):
        raise DataError(f"{what}: `classes` are not names, or too many")
    return {
        **{name: index[name] for name in ("source", "settings", "settings_sha256", "counts", "channels")},
        "samples": count(index.get("samples"), f"{what}: `samples`"),
        "size": (height, width),
        "classes": None if classes is None else tuple(classes),
    }


def tar_locations(
    url: str, index: dict[str, Any], names: Sequence[tuple[str, str | None]], what: str
) -> tuple[str, ...]:
    """The directories and URL prefixes outside of a set in which its tars may lie: `places` of the index.

    Older indexes have no `places`. Then the directories of the tars are allowed if the tars were made elsewhere, or are
    parts that `ddpm shard` wrote to a disk or to the store of the set.

    Args:
        url: the set.
        index: its index.
        names: name and sidecar of each shard.
        what: the name of the index in messages.

    Raises:
        DataError: a tar lies elsewhere. It was not opened.
    """
    allowed = index.get("places")
    if allowed is None:
        is_foreign = bool(index["settings"].get("foreign"))
        allowed = locations_of(name for name, sidecar in names if is_foreign or _is_old_part(url, name, sidecar))
    if not isinstance(allowed, list) or not all(isinstance(location, str) for location in allowed):
        raise DataError(f"{what}: `places` is no list of directories and URLs")
    for name, _ in names:
        if not is_allowed(name, allowed):
            raise DataError(
                f"{what} names {name}, outside of the set, where it may not lie: if `ddpm index` made this set, run it "
                "again on the tars"
            )
    return tuple(allowed)


def _is_old_part(url: str, name: str, sidecar: str | None) -> bool:
    if sidecar is not None:
        return False
    store = "/".join(url.split("/", 3)[:3]) + "/"
    return bool(_PART.fullmatch(name)) or (files.is_remote(url) and location_of(name).startswith(store))


def locations_message(url: str, locations: Sequence[str]) -> str:
    """The message that names the directories outside of a set from which a job reads tars."""
    more = f" and {len(locations) - _LOCATIONS_SHOWN} more" if len(locations) > _LOCATIONS_SHOWN else ""
    return printable(f"{url}: reads tars in {', '.join(locations[:_LOCATIONS_SHOWN])}{more}")
