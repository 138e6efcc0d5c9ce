"""Mean and covariance of features, and the Fréchet distance between two sets of features. Pure; all float64.

Moments of parts are merged by Chan's rule (Chan, Golub, LeVeque 1979): features are read once, in batches and order of
any kind, and are not stored. The distance depends on the number of images: compare equal numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError


@dataclass(frozen=True)
class Moments:
    """Count, mean and covariance of a set of features. `a + b` are the moments of both sets together."""

    count: int
    """Number of images."""
    mean: NDArray[np.float64]
    """(D,)."""
    covariance: NDArray[np.float64]
    """(D, D), divided by count - 1; zeros if there is a single image."""

    @staticmethod
    def of(features: NDArray[np.floating]) -> Moments:
        """Moments of the rows of an array.

        Args:
            features: (B, D), B at least 1.

        Raises:
            DataError: some features are not finite.
        """
        bad = np.count_nonzero(~np.isfinite(features).all(axis=1))
        if bad:
            raise DataError(f"the features of {bad} of {len(features)} images are not finite: use other --features")
        mean = features.mean(axis=0, dtype=np.float64)
        centred = features - mean
        return Moments(len(features), mean, centred.T @ centred / max(len(features) - 1, 1))

    @cached_property
    def factor(self) -> NDArray[np.float64]:
        """(D, D) F with F Fᵀ = covariance; eigenvalues below 0, a result of rounding, count as 0."""
        values, vectors = np.linalg.eigh(self.covariance)
        root: NDArray[np.float64] = vectors * np.sqrt(values.clip(min=0))
        return root

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        apart = other.mean - self.mean
        scatter = self.covariance * (self.count - 1) + other.covariance * (other.count - 1)
        scatter += np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), scatter / (count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet (2-Wasserstein) distance between normal distributions with these moments.

    |μ_a - μ_b|² + tr(A + B - 2 (A^½ B A^½)^½), Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500, eq. (6).
    The last trace is the sum of the singular values of A^½ B^½. This needs no matrix square root of a product, so the
    covariances may be singular, as with fewer images than features.

    Args:
        a: moments of the first set.
        b: moments of the second set, with the same D.

    Returns:
        At least 0, and symmetric up to rounding.

    Raises:
        DataError: a set has fewer than two images.
    """
    if min(a.count, b.count) < 2:
        raise DataError(f"a Fréchet distance between {a.count} and {b.count} images: give at least 2 on either side")
    overlap = np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum()
    apart = a.mean - b.mean
    squared = apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return max(float(squared), 0.0)
