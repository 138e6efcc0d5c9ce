"""Reference statistics: moments of a shard set's features, stored beside its index with the hashes of their inputs.

`reference-<first 12 digits of the feature file's sha256>.safetensors`, so that several networks can have one. It
holds `mean` (D,) and `covariance` (D, D), float64. The header's metadata has one entry, `reference`: JSON with
`count`, the fields of `Identity`, and the sha256 over all of it. There is one entry only, because the library writes
several in any order, and equal statistics must give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors.numpy

from pipeline import untrusted
from pipeline.errors import DataError
from pipeline.evaluation.moments import Moments
from pipeline.storage import files


@dataclass(frozen=True)
class Identity:
    """What a file of statistics was computed from. Only statistics with the same feature network are comparable."""

    features_sha256: str
    """Hash of the feature file."""
    preprocessing: str
    """`Extractor.preprocessing`."""
    data_sha256: str
    """Hash of the shard set."""
    settings_sha256: str
    """Hash of the settings with which its images were prepared."""
    channels: int
    size: tuple[int, int]
    """(height, width) in pixels."""


_REMAKE = "run the `ddpm shard` command of the set again, with --features"
_DIFFERENCES = {
    "features_sha256": "another feature file",
    "preprocessing": "images that were brought to the network in another way",
    "data_sha256": "other data",
    "settings_sha256": "images that were prepared with other settings",
    "channels": "images with another number of channels",
    "size": "images of another size",
}


def path(directory: str, features_sha256: str) -> str:
    """The file that holds a shard set's statistics for this feature file."""
    return files.join(directory, f"reference-{features_sha256[:12]}.safetensors")


def write(directory: str, identity: Identity, moments: Moments) -> None:
    """Store statistics; they replace older ones of the same feature file.

    Args:
        directory: path or URL of the shard set.
        identity: what the statistics were computed from.
        moments: moments of all images of the set.

    Raises:
        DataError: there is no space left, or no permission.
    """
    known = {"count": moments.count, **asdict(identity)}
    text = json.dumps(known | {"sha256": _digest(known, moments)}, sort_keys=True)
    arrays = {"mean": moments.mean, "covariance": moments.covariance}
    data = safetensors.numpy.save(arrays, metadata={"reference": text})
    files.write_bytes(path(directory, identity.features_sha256), data)


def read(directory: str, identity: Identity) -> Moments:
    """The stored statistics, after a check of their identity.

    Raises:
        FileNotFoundError: there are no statistics for this feature file.
        DataError: the identity differs, or the file is damaged.
    """
    url = path(directory, identity.features_sha256)
    stored, moments = parse(url)
    for name, what in _DIFFERENCES.items():
        there, here = getattr(stored, name), getattr(identity, name)
        if there != here:
            raise DataError(f"{url} is of {what} ({name} {there} there, {here} here): {_REMAKE}")
    return moments


def parse(url: str) -> tuple[Identity, Moments]:
    """Read a file of statistics.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the file is damaged, or of another kind.
    """
    data = files.read_bytes(url)
    try:
        arrays = safetensors.numpy.load(data)
        header = untrusted.parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], url)
        known: dict[str, Any] = untrusted.parse_json(header["__metadata__"]["reference"], url)
        digest = known.pop("sha256")
        moments = Moments(known["count"], arrays["mean"], arrays["covariance"])
        identity = Identity(**{name: known[name] for name in _DIFFERENCES} | {"size": tuple(known["size"])})
    except (DataError, safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{url} is not a file of reference statistics ({error!r}): {_REMAKE}") from error
    if digest != _digest(known, moments):
        raise DataError(f"{url} does not have the sha256 it was written with: damaged; {_REMAKE}")
    return identity, moments


def _digest(known: dict[str, Any], moments: Moments) -> str:
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for array in (moments.mean, moments.covariance):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
