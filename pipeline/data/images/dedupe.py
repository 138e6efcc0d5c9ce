"""Duplicate images: equal pixels (`exact`), or nearly equal images (`near`). Pure.

`near` compares a perceptual hash after Zauner (2010, "Implementation and Benchmarking of Perceptual Image Hash
Functions", section 3.2): the signs of the lowest 8×8 frequencies of a 32×32 grey image, less their median. Integer
arithmetic gives the same hash on all machines. The hash ignores color, so mean colors are compared, too.
"""

from __future__ import annotations

import hashlib
from array import array
from itertools import pairwise
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
_EDGES = [_BITS * band // (MAX_DISTANCE + 1) for band in range(MAX_DISTANCE + 2)]
_BANDS = [(band, start, (1 << (end - start)) - 1) for band, (start, end) in enumerate(pairwise(_EDGES))]
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
        self._exact: dict[bytes, str] = {}
        self._near = _NearImages() if dedupe == "near" else None

    def find(self, fingerprint: bytes) -> str | None:
        """The key of the first image of which this is a duplicate; None if it is new.

        An image with this very fingerprint comes before one that is near.
        """
        return self._near.find(fingerprint) if self._near else self._exact.get(fingerprint)

    def add(self, fingerprint: bytes, key: str) -> None:
        """Add a new image."""
        if self._near:
            self._near.add(fingerprint, key)
        else:
            self._exact[fingerprint] = key


class _NearImages:
    """Some 200 bytes an image: its hash in one array for each band, where all images have the same bits in the band."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[int, int], tuple[array[int], array[int]]] = {}  # hashes and numbers of images
        self._colors = bytearray()
        self._keys: list[str] = []

    def find(self, fingerprint: bytes) -> str | None:
        bits, colors = _split(fingerprint)
        own = np.uint64(bits)
        found: list[NDArray[np.int64]] = []
        for bucket in filter(None, map(self._buckets.get, _bands(bits))):
            hashes, numbers = np.frombuffer(bucket[0], np.uint64), np.frombuffer(bucket[1], np.int64)
            near = np.flatnonzero(np.bitwise_count(hashes ^ own) <= MAX_DISTANCE)
            if len(near):
                found.append(self._alike(numbers[near], colors))
                exact: list[int] = numbers[near[hashes[near] == own]].tolist()
                if same := [number for number in exact if self._color(number, len(colors)) == colors]:
                    return self._keys[same[-1]]
        return min((self._keys[number] for numbers in found for number in numbers.tolist()), default=None)

    def add(self, fingerprint: bytes, key: str) -> None:
        bits, colors = _split(fingerprint)
        for band in _bands(bits):
            hashes, numbers = self._buckets.setdefault(band, (array("Q"), array("q")))
            hashes.append(bits)
            numbers.append(len(self._keys))
        self._colors += colors
        self._keys.append(key)

    def _color(self, number: int, length: int) -> bytes:
        return bytes(self._colors[number * length : (number + 1) * length])

    def _alike(self, numbers: NDArray[np.int64], colors: bytes) -> NDArray[np.int64]:
        """Those of these images that have nearly these mean colors."""
        known = np.frombuffer(self._colors, np.uint8).reshape(-1, len(colors))[numbers]
        difference = np.abs(known.astype(np.int16) - np.frombuffer(colors, np.uint8))
        return numbers[(difference <= MAX_COLOR_DIFFERENCE).all(axis=1)]


def _split(fingerprint: bytes) -> tuple[int, bytes]:
    return int.from_bytes(fingerprint[: _BITS // 8], "big"), fingerprint[_BITS // 8 :]


def _bands(bits: int) -> list[tuple[int, int]]:
    return [(band, bits >> start & mask) for band, start, mask in _BANDS]
