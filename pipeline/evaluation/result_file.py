"""The file with what a network has computed of one shard: arrays, and what they depend on.

A safetensors file of float32 arrays. Its header has one entry of metadata, `identity`: JSON with what the arrays depend
on, and `sha256`, over that and the arrays. There is one entry only, because the library writes several in any order,
and equal results must give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from pipeline import untrusted
from pipeline.errors import DataError
from pipeline.storage import files

DIRECTORY = re.compile(r"(features|likelihood)-[0-9a-f]{12}")
"""Names of the directories in which results are kept."""
_ENTRY = "identity"
_MAX_ARRAYS = 16
Arrays = dict[str, NDArray[np.float32]]
"""By name; the first dimension is the image."""


def verify(directory: str) -> Iterator[str]:
    """Check every file of results that is kept beside a shard set.

    Args:
        directory: the set, a path or URL.

    Yields:
        One line for each file that is damaged or holds something else.
    """
    for name in files.listdir(directory):
        for file in files.listdir(files.join(directory, name)) if DIRECTORY.fullmatch(name) else ():
            try:
                parse(files.join(directory, name, file))
            except (DataError, OSError) as error:
                yield str(error)


def parse(url: str) -> tuple[dict[str, Any], Arrays]:
    """Read a file of results: what they depend on, and the arrays.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the file is damaged, or of another kind.
    """
    data = files.read_bytes(url)
    try:
        arrays = safetensors.numpy.load(data)
        header = untrusted.parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], url)
        identity: dict[str, Any] = untrusted.parse_json(header["__metadata__"][_ENTRY], url)
        digest = identity.pop("sha256")
        is_sound = 0 < len(arrays) <= _MAX_ARRAYS and all(array.dtype == np.float32 for array in arrays.values())
    except (DataError, safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{url} is not a file of results ({untrusted.error_text(error)}): remove it") from error
    if not is_sound or digest != _digest(identity, arrays):
        raise DataError(f"{url} does not have the sha256 that it was written with: it is damaged: remove it")
    return identity, arrays


def write(url: str, identity: dict[str, Any], arrays: Arrays) -> None:
    """Write a file of results. Equal results are equal bytes.

    Args:
        url: path or URL.
        identity: what the arrays depend on.
        arrays: by name, float32.

    Raises:
        DataError: there is no space left, or no permission.
    """
    text = json.dumps(identity | {"sha256": _digest(identity, arrays)}, sort_keys=True)
    files.write_bytes(url, safetensors.numpy.save(arrays, metadata={_ENTRY: text}))


def _digest(identity: dict[str, Any], arrays: Arrays) -> str:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
