"""Nearest neighbours among features, by Euclidean distance, in blocks. Pure; float64.

Features are float32, so two that differ by less than a millionth of their distance from the centre count as equal: the
distance of identical images is exactly 0, although it is computed as |x|² + |y|² - 2 x·y.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_PAIRS = 1 << 23
"""Pairs in a block, 64 MiB; a few such arrays exist at a time."""
_ROWS = 4096
_EQUAL = 1e-12


def nearest(
    samples: NDArray[np.float32], reference: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k nearest reference images of each sample.

    Args:
        samples: (n, D).
        reference: (m, D), m at least 1.
        k: at most m.

    Returns:
        Indices (n, k) into the reference and distances (n, k), from the nearest on.
    """
    return _nearest(samples, reference, k, same=False)


def nearest_others(rows: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k nearest other images of each image of a set; one that is identical is another image, at distance 0.

    Args:
        rows: (n, D), n at least 2.
        k: at most n - 1.

    Returns:
        As `nearest`.
    """
    return _nearest(rows, rows, k, same=True)


def _nearest(
    samples: NDArray[np.float32], reference: NDArray[np.float32], k: int, *, same: bool
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    indices, squared = np.empty((len(samples), k), np.int64), np.empty((len(samples), k))
    for block, distances in squared_distances(samples, reference):
        if same:
            distances[np.arange(len(distances)), np.arange(len(samples))[block]] = np.inf
        near = np.sort(np.argpartition(distances, k - 1, axis=1)[:, :k], axis=1)
        found = np.take_along_axis(distances, near, axis=1)
        order = np.argsort(found, axis=1, kind="stable")
        indices[block] = np.take_along_axis(near, order, axis=1)
        squared[block] = np.take_along_axis(found, order, axis=1)
    return indices, np.sqrt(squared)


def squared_distances(
    samples: NDArray[np.float32], reference: NDArray[np.float32]
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Squared distances of blocks of samples to all of the reference.

    Args:
        samples: (n, D).
        reference: (m, D).

    Yields:
        The samples of the block, and (B, m).
    """
    centre = reference.mean(axis=0, dtype=np.float64)  # keeps the norms, and so the rounding, small
    height = max(_PAIRS // len(reference), 1)
    for start in range(0, len(samples), height):
        block = slice(start, start + height)
        rows = samples[block] - centre
        length = (rows * rows).sum(axis=1)[:, None]
        distances = np.empty((len(rows), len(reference)))
        for other in (slice(begin, begin + _ROWS) for begin in range(0, len(reference), _ROWS)):
            others = reference[other] - centre
            scale = length + (others * others).sum(axis=1)
            part = scale - 2 * (rows @ others.T)
            distances[:, other] = np.where(part > _EQUAL * scale, part, 0)
        yield block, distances
