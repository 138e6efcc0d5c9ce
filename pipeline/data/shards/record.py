"""The facts about one shard, as its record `NAME-000000.json` and the index state them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pipeline.errors import DataError
from pipeline.untrusted import count, name_inside, printable

SAMPLE_BYTES = 1024
"""At least: a header and a payload in a tar."""
_INDEXED = ("name", "bytes", "sha256", "samples", "sidecar_sha256")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardRecord:
    """The facts about one shard; the first five fields are repeated in the index."""

    name: str
    """File name of the tar. If it lies outside of the set: its path, relative to the set or absolute, or its URL."""
    bytes: int
    sha256: str
    samples: int
    sidecar_sha256: str
    extra: dict[str, Any]
    """Further fields of the record, which depend on the job; not in the index."""
    sidecar: str | None = None
    """File name of the sidecar if it does not lie beside the tar; the record lies beside the sidecar."""

    @property
    def stem(self) -> str:
        """The names of sidecar and record, relative to the set, without the ending."""
        return (self.sidecar or self.name).rpartition(".")[0]

    @staticmethod
    def parse(value: Any, what: str = "the record") -> ShardRecord:
        """A record from the JSON value of NAME-000000.json or from an entry of the index.

        Raises:
            DataError: the value is not such a record.
        """
        fields, sidecar, extra = _fields(value, what)
        return ShardRecord(**fields, sidecar=sidecar, extra=extra)

    def entry(self) -> dict[str, Any]:
        """The shard's entry in the index."""
        entry = {name: getattr(self, name) for name in _INDEXED}
        return entry | ({"sidecar": self.sidecar} if self.sidecar else {})


def _fields(value: Any, what: str) -> tuple[dict[str, Any], str | None, dict[str, Any]]:
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
        known = {name: rest.pop(name) for name in _INDEXED}
    except KeyError as error:
        raise DataError(f"{what} does not say {error} of a shard") from error
    if not isinstance(known["name"], str) or not known["name"]:
        raise DataError(f"{what}: {printable(repr(known['name']), 60)} is no name of a shard")
    for name in ("sha256", "sidecar_sha256"):
        if not isinstance(known[name], str) or not SHA256.fullmatch(known[name]):
            raise DataError(f"{what}: `{name}` of {known['name']} is no SHA-256")
    size = count(known["bytes"], f"{what}: `bytes` of {known['name']}")
    count(
        known["samples"],
        f"{what}: `samples` of {known['name']}, which has {size} bytes,",
        most=size // SAMPLE_BYTES,
    )
    sidecar = rest.pop("sidecar", None)
    if sidecar is not None:
        name_inside(sidecar, what)
    return known, sidecar, rest
