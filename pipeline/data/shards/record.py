"""Checks of the JSON values of records and of the index, and the directories that the tars of a set may lie in.

The tars of `ddpm shard` and `ddpm sample` lie in the set. The tars of `ddpm index` lie elsewhere: `places` in
`index.json` lists the directories and URL prefixes in which they lie.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipeline.errors import DataError
from pipeline.storage import files
from pipeline.untrusted import count, is_allowed, location_of, locations_of, name_inside, printable

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SAMPLE_BYTES = 1024  # at least: a header and a payload in a tar
_MAX_SIDE = 1 << 16
_MAX_CLASSES = 1 << 20
_PART = re.compile(r"(?!.*://).+-\d{6,}\.tar")
_LOCATIONS_SHOWN = 8


def shard_fields(value: Any, what: str) -> tuple[dict[str, Any], str | None, dict[str, Any]]:
    """Check a record, or an entry of the index.

    Returns:
        The fields that every entry of the index has, the name of the sidecar or None, and all other fields.

    Raises:
        DataError: a value is missing, of another type, or impossible.
    """
    if not isinstance(value, dict):
        raise DataError(f"{what} has no list of values for a shard")
    rest = dict(value)
    try:
        known = {name: rest.pop(name) for name in ("name", "bytes", "sha256", "samples", "sidecar_sha256")}
    except KeyError as error:
        raise DataError(f"{what} does not say {error} of a shard") from error
    if not isinstance(known["name"], str) or not known["name"]:
        raise DataError(f"{what}: {printable(repr(known['name']), 60)} is no name of a shard")
    for name in ("sha256", "sidecar_sha256"):
        if not isinstance(known[name], str) or not _SHA256.fullmatch(known[name]):
            raise DataError(f"{what}: `{name}` of {known['name']} is no SHA-256")
    size = count(known["bytes"], f"{what}: `bytes` of {known['name']}")
    count(
        known["samples"],
        f"{what}: `samples` of {known['name']}, which has {size} bytes,",
        most=size // _SAMPLE_BYTES,
    )
    sidecar = rest.pop("sidecar", None)
    if sidecar is not None:
        name_inside(sidecar, what)
    return known, sidecar, rest


def head_fields(index: Any, what: str) -> dict[str, Any]:
    """Check the index except its list of shards; returns the fields of `ShardSet`.

    Raises:
        DataError: a value is missing, of another type, or impossible.
    """
    kinds = {"shards": list, "settings": dict, "counts": dict, "source": (str, dict), "settings_sha256": str}
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
