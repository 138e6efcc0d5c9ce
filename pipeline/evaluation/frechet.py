"""Fréchet distance with its interval, and its extrapolation to infinitely many images. Pure; all float64.

`frechet_distance` is what everybody reports at this number of images. It exceeds the distance of the two populations by
about c/N, because the moments of few images err (Chong and Forsyth 2020, arXiv:1911.07023): the distance of two sets
of one population is not 0. Compare it at equal numbers only.

`frechet_distance_infinity` is the intercept of the line through the distances at N and N/2 images against 1/N. Chong
and Forsyth fit such a line for 15 numbers of images, each drawn anew. Here the halves are disjoint and both are used:
to first order their mean is the distance at N, so the extrapolation adds hardly any noise. This is the jackknife of
Quenouille 1956 with two groups. Smaller parts would have fewer images than features, where the line bends.

The interval of both is one of the distance of the populations, so it is around the second, and far below the first
where images are few. Its variance is that of the influence function, the derivative of the distance by a single image
(Efron 1982, chapter 6). The derivative by the covariance A is I - T, with the optimal transport T = B^½ (B^½ A B^½)^-½
B^½ between the normal distributions; by the mean it is 2 (μ_a - μ_b). One pass over the features, O(N D²), against a
new distance for each group of a jackknife, O(D³). At distance 0 the derivative vanishes and what remains is of second
order; like a jackknife, the estimate is then too large by about two. The interval is clipped at 0, and covers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import add

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.evaluation.intervals import Figure, around, random_groups
from pipeline.evaluation.moments import Moments, frechet_distance

_BLOCK = 4096
_SINGULAR = 1e-10
"""Share of the largest singular value below which a direction counts as one in which a set has no spread."""


def frechet_figures(samples: NDArray[np.float32], reference: NDArray[np.float32]) -> tuple[Figure, Figure]:
    """(frechet_distance, frechet_distance_infinity), with the same interval.

    Args:
        samples: (n, D).
        reference: (m, D).

    Returns:
        With fewer than 4 images on a side there are no halves: the second is then the first.

    Raises:
        DataError: a set has fewer than two images, or features that are not finite.
    """
    if min(len(samples), len(reference)) < 2:
        raise DataError(f"figures of {len(samples)} samples against {len(reference)}: give at least 2 on either side")
    sides = _halves(samples), _halves(reference)
    a, b = (left + right for left, right in sides)
    value = infinity = frechet_distance(a, b)
    if min(a.count, b.count) >= 4:
        infinity = 2 * value - sum(frechet_distance(*pair) for pair in zip(*sides)) / 2
    low, high = around(infinity, _variance(samples, reference, a, b), least=0)
    n, m = a.count, b.count
    return Figure(value, low, high, n, m), Figure(max(infinity, 0.0), low, high, n, m)


def _blocks(rows: NDArray[np.float32]) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, len(rows), _BLOCK))


def _halves(rows: NDArray[np.float32]) -> tuple[Moments, Moments]:
    """Moments of two random halves."""
    half = random_groups(len(rows), 2)
    first, second = (reduce(add, _moments(rows, half == i)) for i in (0, 1))
    return first, second


def _moments(rows: NDArray[np.float32], mask: NDArray[np.bool_]) -> Iterator[Moments]:
    for block in _blocks(rows):
        if mask[block].any():
            yield Moments.of(rows[block][mask[block]])


def _variance(samples: NDArray[np.float32], reference: NDArray[np.float32], a: Moments, b: Moments) -> float:
    """Variance of the distance: that of the influence of an image over the number of images, summed over both sets."""
    left, singular, right = np.linalg.svd(a.factor.T @ b.factor)
    kept = singular > _SINGULAR * singular[0]
    # xᵀ T x is |x G|² with G = F V S^-½ of the *other* set's factor F, as F Fᵀ = B and F_aᵀ F_b = U S Vᵀ.
    scale = 1 / np.sqrt(singular[kept])
    maps = b.factor @ (right[kept].T * scale), a.factor @ (left[:, kept] * scale)
    return sum(
        float(_influences(rows, own, other, to_other).var(ddof=1)) / own.count
        for rows, own, other, to_other in ((samples, a, b, maps[0]), (reference, b, a, maps[1]))
    )


def _influences(
    rows: NDArray[np.float32], own: Moments, other: Moments, to_other: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(N,): what each image adds to the distance, up to a constant."""
    influences = np.empty(len(rows))
    for block in _blocks(rows):
        centred = rows[block] - own.mean
        quadratic = (centred * centred).sum(axis=1) - ((centred @ to_other) ** 2).sum(axis=1)
        influences[block] = quadratic + 2 * centred @ (own.mean - other.mean)
    return influences
