"""Precision, recall, density and coverage: who lies in whose ball of nearest neighbours. Pure; float64.

The ball of an image reaches to its k-th nearest other image of its own set, with its border.

- precision: share of the samples in the ball of some reference image; recall: share of the reference images in the
  ball of some sample; k = 3. Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. (1) to (3).
- density: mean number of reference balls around a sample, over k; coverage: share of the reference images with a
  sample in their ball; k = 5. Naeem et al. 2020, arXiv:2002.09797, eq. (4) and (5).

All four depend on the numbers of images: the intervals are of the figures expected at these numbers.

An interval adds the variance from the samples to that from the reference. A set over which the figure is a mean gives
the variance of the mean. A set that moves balls gives that of the grouped jackknife, with up to 32 groups left out in
turn: the radius without a group follows from a list of nearest neighbours, so that pairs are computed once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.intervals import Figure, around, jackknife_variance, of_share, random_groups
from pipeline.evaluation.neighbours import nearest_others, squared_distances

K_RECALL, K_COVERAGE = 3, 5
_GROUPS = 32
_SPARE = 3
"""Neighbours beyond the k-th that are listed, for those that are left out: rarely are more in one group."""


@dataclass(frozen=True)
class _Balls:
    """Balls of N images, with all images and without each of G groups."""

    group: NDArray[np.int64]
    """(N,)."""
    squared: NDArray[np.float64]
    """(N, G + 1): squared radii without group g; the last column: with all."""
    largest: NDArray[np.float64]
    """(N,): the largest of each row."""

    @staticmethod
    def of(group: NDArray[np.int64], near: NDArray[np.int64], distances: NDArray[np.float64], k: int) -> _Balls:
        """Balls with k neighbours, from lists of more of them; fewer neighbours if there are not so many images."""
        count = int(group.max()) + 1
        columns = [_kth(distances, group[near] != left, k) for left in range(count)]
        squared = np.stack([*columns, distances[:, min(k, distances.shape[1]) - 1]], axis=1) ** 2
        return _Balls(group, squared, squared.max(axis=1))

    def around(self, image: NDArray[np.int64], squared: NDArray[np.float64], left: int) -> NDArray[np.bool_]:
        """Whether the ball of an image is there and reaches so far when group `left` is left out; -1: none is.

        Args:
            image: (P,), the owners of the balls.
            squared: (P,), squared distances from their centres.
            left: the group.
        """
        inside: NDArray[np.bool_] = (squared <= self.squared[image, left]) & (self.group[image] != left)
        return inside


def _kth(distances: NDArray[np.float64], there: NDArray[np.bool_], k: int) -> NDArray[np.float64]:
    """(N,): in each sorted row, the k-th distance that is there; the last of the row if not so many are."""
    enough = there.cumsum(axis=1) >= k
    column = np.where(enough[:, -1], enough.argmax(axis=1), distances.shape[1] - 1)
    found: NDArray[np.float64] = np.take_along_axis(distances, column[:, None], axis=1)[:, 0]
    return found


class _Counts:
    """Sums over the blocks of samples; the last column of each is with all groups."""

    def __init__(self, n: int, m: int, samples: _Balls, tight: _Balls, wide: _Balls) -> None:
        self._samples, self._tight, self._wide = samples, tight, wide
        groups, others = samples.squared.shape[1], tight.squared.shape[1]
        self.precise = np.zeros(others)
        self.balls = np.zeros(others)
        self.balls_of_sample = np.zeros(n)
        self.recalled = np.zeros((m, groups), np.bool_)
        self.covered = np.zeros((m, others), np.bool_)
        self.covered_by = np.zeros((m, groups - 1), np.bool_)
        """By a sample of the group."""

    def add(self, block: slice, distances: NDArray[np.float64]) -> None:
        """Count the pairs of some samples with all reference images; `distances`: squared, (B, m)."""
        reach = self._samples.largest[block][:, None]
        sample, image = np.nonzero(distances <= reach)
        squared, owner = distances[sample, image], sample + block.start
        for left in self._lefts(self.recalled.shape[1]):
            self.recalled[image[self._samples.around(owner, squared, left)], left] = True

        sample, image = np.nonzero(distances <= np.maximum(self._tight.largest, self._wide.largest))
        squared, owner = distances[sample, image], sample + block.start
        for left in self._lefts(self.covered.shape[1]):
            self.precise[left] += len(np.unique(sample[self._tight.around(image, squared, left)]))
            inside = self._wide.around(image, squared, left)
            self.balls[left] += np.count_nonzero(inside)
            self.covered[image[inside], left] = True
        self.balls_of_sample += np.bincount(owner[inside], minlength=len(self.balls_of_sample))
        self.covered_by[image[inside], self._samples.group[owner[inside]]] = True

    @staticmethod
    def _lefts(columns: int) -> list[int]:
        """The groups, and last -1 for none, which is also the column."""
        return [*range(columns - 1), -1]


def precision_recall(samples: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, Figure]:
    """The four figures, each with its interval, under their names.

    Args:
        samples: (n, D), n at least 2.
        reference: (m, D), m at least 2. With no more than k images on a side, its balls have fewer neighbours than k.
    """
    n, m = len(samples), len(reference)
    own, group = _lists(samples), random_groups(n, min(_GROUPS, n))
    others, other_group = _lists(reference), random_groups(m, min(_GROUPS, m))
    tight, wide = (_Balls.of(other_group, *others, k) for k in (K_RECALL, K_COVERAGE))
    counts = _Counts(n, m, _Balls.of(group, *own, K_RECALL), tight, wide)
    for block, distances in squared_distances(samples, reference):
        counts.add(block, distances)

    precision, recall = counts.precise / n, counts.recalled.mean(axis=0)
    density = counts.balls / (n * K_COVERAGE)
    there = other_group[:, None] != np.arange(counts.covered.shape[1])
    coverage = (counts.covered & there).sum(axis=0) / there.sum(axis=0)
    by = counts.covered_by
    without_samples = (by.sum(axis=1, keepdims=True) - by > 0).mean(axis=0)
    return {
        "precision": _share(precision, n, n, m),
        "recall": _share(recall, m, n, m),
        "density": _mean(density, counts.balls_of_sample / K_COVERAGE, m),
        "coverage": _share(coverage, m, n, m, without_samples),
    }


def _lists(rows: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    return nearest_others(rows, min(K_COVERAGE + _SPARE, len(rows) - 1))


def _share(
    left_out: NDArray[np.float64], count: int, n: int, m: int, others: NDArray[np.float64] | None = None
) -> Figure:
    """A share of `count` images.

    Args:
        left_out: its values without each group of a set, and last with all.
        count: images that it is a share of.
        n: samples.
        m: reference images.
        others: its values without each group of the other set, if that moves it, too; otherwise that set is the one
            over which the share is a mean.
    """
    share = float(left_out[-1])
    mean = share * (1 - share) / (count - 1) if others is None else jackknife_variance(others)
    return Figure(share, *of_share(share, jackknife_variance(left_out[:-1]) + mean, count), n, m)


def _mean(left_out: NDArray[np.float64], of_sample: NDArray[np.float64], m: int) -> Figure:
    value, n = float(left_out[-1]), len(of_sample)
    variance = jackknife_variance(left_out[:-1]) + float(of_sample.var(ddof=1)) / n
    return Figure(value, *around(value, variance, least=0), n, m)
