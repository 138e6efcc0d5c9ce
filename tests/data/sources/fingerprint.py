"""The fingerprint of a list of inputs as version 0.1 computed it, from the whole list in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from pipeline.data.sources.inputs import Input


def fingerprint_0_1(inputs: Sequence[Input], classes: Iterable[str] = (), piece_rows: int = 8192) -> str:
    """Of the names, sizes, times, labels and rejections, in pieces of 8,192 inputs (other pieces: another hash)."""
    digest = hashlib.sha256("\n".join(classes).encode("utf-8", "surrogatepass"))
    for first in range(0, len(inputs), piece_rows):
        piece = inputs[first : first + piece_rows]
        digest.update("\n".join(item.name for item in piece).encode("utf-8", "surrogatepass"))
        digest.update(np.array([item.size for item in piece], np.int64).tobytes())
        digest.update(np.array([item.stamp for item in piece], np.int64).tobytes())
        digest.update(np.array([-1 if item.label is None else item.label for item in piece], np.int32).tobytes())
    rejected = [
        (position, tuple(item.rejection))
        for position, item in enumerate(inputs)
        if item.rejection and item.rejection.reason != "label_file"
    ]
    if rejected:
        digest.update(repr(rejected).encode())
    return digest.hexdigest()
