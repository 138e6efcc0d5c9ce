"""Nearest neighbours among features, by Euclidean distance, in blocks. Pure; float64.

Features are float32, so two that differ by less than a millionth of their distance from the centre count as equal: the
distance of identical images is exactly 0, although it is computed as |x|² + |y|² - 2 x·y.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_ROWS, _COLUMNS = 1024, 2048
"""A block of pairs is 16 MiB, which a cache holds better than larger ones; a few such arrays exist at a time."""
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
    indices, squared = np.zeros((len(samples), k), np.int64), np.full((len(samples), k), np.inf)
    for rows, columns, distances in squared_distances(samples, reference):
        if same:
            distances[np.arange(rows.start, rows.stop)[:, None] == np.arange(columns.start, columns.stop)] = np.inf
        listed = min(k, distances.shape[1])
        near = np.sort(np.argpartition(distances, listed - 1, axis=1)[:, :listed], axis=1)
        found = np.concatenate((squared[rows], np.take_along_axis(distances, near, axis=1)), axis=1)
        order = np.argsort(found, axis=1, kind="stable")[:, :k]
        squared[rows] = np.take_along_axis(found, order, axis=1)
        indices[rows] = np.take_along_axis(np.concatenate((indices[rows], near + columns.start), axis=1), order, axis=1)
    return indices, np.sqrt(squared)


def squared_distances(
    samples: NDArray[np.float32], reference: NDArray[np.float32]
) -> Iterator[tuple[slice, slice, NDArray[np.float64]]]:
    """Squared distances of all pairs, in blocks.

    Args:
        samples: (n, D).
        reference: (m, D).

    Yields:
        Which samples, which reference images, and their distances, (rows, columns).
    """
    centre = reference.mean(axis=0, dtype=np.float64)  # keeps the norms, and so the rounding, small
    for rows in _slices(len(samples), _ROWS):
        left = samples[rows] - centre
        length = (left * left).sum(axis=1)[:, None]
        for columns in _slices(len(reference), _COLUMNS):
            right = reference[columns] - centre
            scale = length + (right * right).sum(axis=1)
            distances = scale - 2 * (left @ right.T)
            yield rows, columns, np.where(distances > _EQUAL * scale, distances, 0)


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
