"""Precision, recall, density and coverage: who lies in whose ball of nearest neighbours. Pure; float64.

The ball of an image reaches to its k-th nearest other image of its own set, with its border.

- precision: share of the samples in the ball of some reference image; recall: share of the reference images in the
  ball of some sample; k = 3. Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. (1) to (3).
- density: mean number of reference balls around a sample, over k; coverage: share of the reference images with a
  sample in their ball; k = 5. Naeem et al. 2020, arXiv:2002.09797, eq. (4) and (5).

All four depend on the numbers of images: the intervals are of the figures expected at these numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.intervals import Figure, around, in_subsets, jackknife_variance, of_share
from pipeline.evaluation.neighbours import nearest_others, squared_distances

K_RECALL, K_COVERAGE = 3, 5
_BORDER = 1 + 1e-9
"""The border of a ball is in it, although the same distance is computed twice with different rounding."""


def precision_recall(samples: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, Figure]:
    """The four figures, each with its interval, under their names.

    The variances of the three shares come from disjoint subsets (`intervals.in_subsets`). That of the density is that
    of a mean over the samples plus that of the jackknife over the reference images, which knows that in many dimensions
    a few large balls hold most samples; in few dimensions it is up to twice too large.

    Args:
        samples: (n, D), n at least 2.
        reference: (m, D), m at least 2. With no more than k images on a side, its balls have fewer neighbours than k.
    """
    n, m = len(samples), len(reference)
    pairs = _Pairs(samples, reference)
    precision, recall, coverage = in_subsets(lambda a, b: _Pairs(a, b).shares(), samples, reference)
    shares = pairs.shares()
    found = {
        name: Figure(share, *of_share(share, count, subsets), n, m)
        for name, share, count, subsets in zip(
            ("precision", "recall", "coverage"), shares, (n, m, m), (precision, recall, coverage)
        )
    }
    density = float(pairs.balls_of_sample.mean()) / K_COVERAGE
    variance = float(pairs.balls_of_sample.var(ddof=1)) / (n * K_COVERAGE**2)
    variance += jackknife_variance(pairs.inside_without() / (n * K_COVERAGE))
    found["density"] = Figure(density, *around(density, variance, least=0), n, m)
    return found


class _Pairs:
    """Counts of all pairs of samples and reference images."""

    def __init__(self, samples: NDArray[np.float32], reference: NDArray[np.float32]) -> None:
        n, m = len(samples), len(reference)
        own = _squared_radii(samples)[1]
        self._near, others = _squared_radii(reference)
        self._precise, self._recalled = np.zeros(n, np.bool_), np.zeros(m, np.bool_)
        self.balls_of_sample = np.zeros(n, np.int64)
        """Balls of K_COVERAGE neighbours around each sample, (n,)."""
        self._samples_of_ball = np.zeros((2, m), np.int64)
        """Samples in the balls of K_COVERAGE neighbours and in those of one more, (2, m)."""
        for rows, columns, distances in squared_distances(samples, reference):
            tight, wide, wider = (others[k][columns] for k in (K_RECALL, K_COVERAGE, K_COVERAGE + 1))
            self._precise[rows] |= (distances <= tight).any(axis=1)
            self._recalled[columns] |= (distances <= own[K_RECALL][rows, None]).any(axis=0)
            inside = distances <= wide
            self.balls_of_sample[rows] += inside.sum(axis=1)
            self._samples_of_ball[:, columns] += inside.sum(axis=0), (distances <= wider).sum(axis=0)

    def shares(self) -> tuple[float, float, float]:
        """Precision, recall, coverage."""
        covered = self._samples_of_ball[0] > 0
        return float(self._precise.mean()), float(self._recalled.mean()), float(covered.mean())

    def inside_without(self) -> NDArray[np.float64]:
        """(m,): the number of pairs of a sample and a ball around it, without each of the reference images.

        Its ball is lost, and the balls that ended at or beyond it grow by a neighbour.
        """
        inside, more = self._samples_of_ball
        grown = np.bincount(self._near.ravel(), np.repeat(more - inside, self._near.shape[1]), minlength=len(inside))
        without: NDArray[np.float64] = inside.sum() - inside + grown
        return without


def _squared_radii(rows: NDArray[np.float32]) -> tuple[NDArray[np.int64], dict[int, NDArray[np.float64]]]:
    """The K_COVERAGE nearest others of each image, (N, K_COVERAGE), and its squared radii by number of neighbours."""
    listed = min(K_COVERAGE + 1, len(rows) - 1)
    near, distances = nearest_others(rows, listed)
    radii = {k: distances[:, min(k, listed) - 1] ** 2 * _BORDER for k in (K_RECALL, K_COVERAGE, K_COVERAGE + 1)}
    return near[:, :K_COVERAGE], radii
