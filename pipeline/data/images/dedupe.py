"""Duplicate images: equal pixels (`exact`), or nearly equal images (`near`). Pure.

`near` compares a perceptual hash after Zauner (2010, "Implementation and Benchmarking of Perceptual Image Hash
Functions", section 3.2): the signs of the lowest 8×8 frequencies of a 32×32 grey image, less their median. Integer
arithmetic gives the same hash on all machines. The hash ignores color, so mean colors are compared, too.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Dedupe = Literal["none", "exact", "near"]
_SIDE, _LOW = 32, 8
_BITS = _LOW * _LOW
MAX_DISTANCE = 4
"""Bits of the hash, of 64, in which near images may differ."""
MAX_COLOR_DIFFERENCE = 12
"""In the mean of a channel over a quarter of the image, in levels of 255."""
# Near images are equal in at least one of MAX_DISTANCE + 1 bands of bits: only images that share a band are compared.
_BANDS = [
    range(_BITS * i // (MAX_DISTANCE + 1), _BITS * (i + 1) // (MAX_DISTANCE + 1)) for i in range(MAX_DISTANCE + 1)
]
_MASKS = [sum(1 << bit for bit in band) for band in _BANDS]
_DCT = np.rint(
    1024 * np.cos(np.pi / _SIDE * np.outer(np.arange(_LOW), np.arange(_SIDE) + 0.5))
).astype(np.int64)  # fmt: skip


def fingerprint(array: NDArray[np.uint8], dedupe: Dedupe) -> bytes:
    """The bytes by which an image is compared with others.

    Args:
        array: uint8, (H, W, C).
        dedupe: exact: a hash of the pixels; near: 8 bytes of perceptual hash, then mean colors; none: nothing.
    """
    if dedupe == "none":
        return b""
    if dedupe == "exact":
        return hashlib.blake2b(array.tobytes(), digest_size=16).digest()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.int64)
    frequencies = (_DCT @ grey @ _DCT.T).ravel()[1:]  # without the mean
    signs = np.append(frequencies > np.sort(frequencies)[len(frequencies) // 2], False)
    return np.packbits(signs).tobytes() + image.resize((2, 2), Image.Resampling.BOX).tobytes()


class KnownImages:
    """The fingerprints of the images so far, to find duplicates of them."""

    def __init__(self, dedupe: Dedupe) -> None:
        self._is_near = dedupe == "near"
        self._exact: dict[bytes, str] = {}
        self._near: dict[tuple[int, int], list[tuple[int, bytes, str]]] = defaultdict(list)

    def find(self, fingerprint: bytes) -> str | None:
        """The key of the first image of which this is a duplicate; None if it is new."""
        if (key := self._exact.get(fingerprint)) or not self._is_near:
            return key
        bits, colors = _split(fingerprint)
        keys = [
            key
            for band in _bands(bits)
            for other_bits, other_colors, key in self._near.get(band, ())
            if (bits ^ other_bits).bit_count() <= MAX_DISTANCE and _similar(colors, other_colors)
        ]
        return min(keys, default=None)

    def add(self, fingerprint: bytes, key: str) -> None:
        """Add a new image."""
        self._exact[fingerprint] = key
        if self._is_near:
            bits, colors = _split(fingerprint)
            for band in _bands(bits):
                self._near[band].append((bits, colors, key))


def _split(fingerprint: bytes) -> tuple[int, bytes]:
    return int.from_bytes(fingerprint[: _BITS // 8], "big"), fingerprint[_BITS // 8 :]


def _bands(bits: int) -> list[tuple[int, int]]:
    return [(number, bits & mask) for number, mask in enumerate(_MASKS)]


def _similar(colors: bytes, other_colors: bytes) -> bool:
    return all(abs(a - b) <= MAX_COLOR_DIFFERENCE for a, b in zip(colors, other_colors))
