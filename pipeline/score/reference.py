"""Reference statistics: the moments of a shard set's features, stored beside its index and bound to what made them.

`reference-<first 12 digits of the feature file's sha256>.safetensors`, so statistics of several networks lie side by
side. It holds `mean` (D,) and `covariance` (D, D), float64. The header's metadata has one entry, `reference`: JSON with
`count`, the fields of `Identity`, and the sha256 over all of it. One entry only, as the library writes several in any
order, and equal statistics are to give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors.numpy

from pipeline import storage
from pipeline.errors import DataError
from pipeline.score.moments import Moments


@dataclass(frozen=True)
class Identity:
    """What statistics are of. Distances mean something between statistics whose features were made alike."""

    features_sha256: str
    """Of the feature file."""
    preprocessing: str
    """How pictures are brought to the network, from the extractor."""
    data_sha256: str
    """Of the shard set."""
    settings_sha256: str
    """Of the settings that its pictures were prepared with."""
    channels: int
    size: tuple[int, int]
    """(height, width), px."""


_REMAKE = "run the `ddpm shard` command of the set again, with --features"
_OTHER = {
    "features_sha256": "another feature file",
    "preprocessing": "pictures that were brought to the network in another way",
    "data_sha256": "other data",
    "settings_sha256": "pictures that were prepared with other settings",
    "channels": "pictures with another number of channels",
    "size": "pictures of another size",
}


def place(directory: str, features_sha256: str) -> str:
    """Where a shard set's statistics of this feature file lie."""
    return storage.join(directory, f"reference-{features_sha256[:12]}.safetensors")


def write(directory: str, identity: Identity, moments: Moments) -> None:
    """Store statistics, in place of older ones of the same feature file.

    Args:
        directory: the shard set, a path or URL.
        identity: what they are of.
        moments: of all pictures of the set.

    Raises:
        DataError: no space left, or not permitted.
    """
    known = {"count": moments.count, **asdict(identity)}
    text = json.dumps(known | {"sha256": _digest(known, moments)}, sort_keys=True)
    arrays = {"mean": moments.mean, "covariance": moments.covariance}
    data = safetensors.numpy.save(arrays, metadata={"reference": text})
    storage.write_bytes(place(directory, identity.features_sha256), data)


def read(directory: str, identity: Identity) -> Moments:
    """The stored statistics, which must be of this identity.

    Raises:
        FileNotFoundError: there are none of this feature file.
        DataError: they are of something else, or damaged.
    """
    url = place(directory, identity.features_sha256)
    found, moments = parse(url)
    for name, what in _OTHER.items():
        there, here = getattr(found, name), getattr(identity, name)
        if there != here:
            raise DataError(f"{url} is of {what} ({name} {there} there, {here} here): {_REMAKE}")
    return moments


def parse(url: str) -> tuple[Identity, Moments]:
    """What a file of statistics is of, and the statistics.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is damaged, or another kind of file.
    """
    data = storage.read_bytes(url)
    try:
        arrays = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        known: dict[str, Any] = json.loads(header["__metadata__"]["reference"])
        digest = known.pop("sha256")
        moments = Moments(known["count"], arrays["mean"], arrays["covariance"])
        identity = Identity(**{name: known[name] for name in _OTHER} | {"size": tuple(known["size"])})
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{url} is not a file of reference statistics ({error!r}): {_REMAKE}") from error
    if digest != _digest(known, moments):
        raise DataError(f"{url} does not have the sha256 it was written with: damaged; {_REMAKE}")
    return identity, moments


def _digest(known: dict[str, Any], moments: Moments) -> str:
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for array in (moments.mean, moments.covariance):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
