"""95 % intervals of figures: the jackknife, subsets, and the interval of a share. Pure; all float64.

The intervals are over samples and reference images alike: both count as draws, independent of each other.

Images are left out or divided into subsets, never drawn with replacement: a bootstrap repeats images, and a repeated
image is its own nearest neighbour at distance 0. For means there is the jackknife (Efron 1982, "The jackknife, the
bootstrap and other resampling plans", chapters 3 and 4). For shares of images that have a neighbour somewhere it
estimates up to four times the variance, because leaving out one image moves the balls of others. There the share is
computed in disjoint subsets of samples and reference, and its variance is inversely proportional to the number of
images: Politis and Romano 1994, "Large sample confidence regions based on subsamples under minimal assumptions".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import keyed_random
from pipeline.keyed_random import Use

FEWEST = 256
"""Images on a side that give subsets enough, and subsets of at least 32 images."""
_SUBSETS, _FEWEST_SUBSETS = 32, 8
_Z = 1.959964
"""The normal quantile of a two-sided interval of 95 %."""
_SEED = 0


@dataclass(frozen=True)
class Figure:
    """A figure of sample quality with its 95 % interval over samples and reference.

    `frechet_distance` and `inception_score` depend on the number of images, and their intervals are those of the limit
    of infinitely many: with few images, `value` lies outside.
    """

    value: float
    low: float
    high: float
    n: int
    """Samples."""
    reference_n: int
    """Reference images; 0 if the figure has no reference."""

    def as_json(self) -> dict[str, float]:
        """The figure as `evaluation.json` has it."""
        return {"value": self.value, "low": self.low, "high": self.high}


def curves(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The names and values of figures in TensorBoard, from name → value, low and high."""
    ends = {"": "value", "/low": "low", "/high": "high"}
    return {f"evaluation/{name}{end}": figure[part] for name, figure in figures.items() for end, part in ends.items()}


def random_groups(count: int, groups: int) -> NDArray[np.int64]:
    """A group for each of `count` rows, drawn without replacement: sizes differ by at most 1.

    The draw is fixed: equal counts give equal groups.

    Returns:
        (count,), numbers from 0 to groups - 1.
    """
    order = torch.argsort(keyed_random.uniforms(_SEED, torch.arange(count), Use.EVALUATION_GROUP), stable=True)
    group = np.empty(count, np.int64)
    group[order.numpy()] = np.arange(count) % groups
    return group


def jackknife_variance(left_out: NDArray[np.floating]) -> float:
    """Variance of a figure from its values with each of N images left out: (N - 1)/N Σ (θ_i - mean)².

    Args:
        left_out: (N,).
    """
    return float((len(left_out) - 1) * np.var(left_out, dtype=np.float64))


def in_subsets(
    figures: Callable[[NDArray[np.float32], NDArray[np.float32]], tuple[float, ...]],
    samples: NDArray[np.float32],
    reference: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Figures of disjoint random subsets: of the samples of each against the reference images of the same.

    Args:
        figures: computes F figures of at least 2 samples and 2 reference images.
        samples: (n, D).
        reference: (m, D).

    Returns:
        (F, G): G is 32, or less if there are fewer than 1,024 images on a side, for subsets of 32; but at least 8, and
        0 with fewer than 4 images.
    """
    fewest = min(len(samples), len(reference))
    subsets = min(max(fewest // 32, _FEWEST_SUBSETS), _SUBSETS, fewest // 2)
    if subsets < 2:
        return np.empty((len(figures(samples, reference)), 0))
    sides = [(rows, random_groups(len(rows), subsets)) for rows in (samples, reference)]
    return np.array([figures(*(rows[group == i] for rows, group in sides)) for i in range(subsets)]).T


def around(value: float, variance: float, least: float = -np.inf, most: float = np.inf) -> tuple[float, float]:
    """(low, high) of a normal interval, both clipped to what the figure can be."""
    reach = _Z * sqrt(variance)
    low, high = np.clip((value - reach, value + reach), least, most)
    return float(low), float(high)


def of_share(share: float, count: int, subsets: NDArray[np.float64]) -> tuple[float, float]:
    """(low, high) of a share, within [0, 1]: the interval of Agresti and Coull 1998 with Student's quantile.

    It has a length also for a share of 0 or 1. Images are not independent, as they share neighbours. The ratio of the
    variance in subsets to that of independent images, the design effect of Kish 1965, divides their number; a ratio
    below 1 counts as 1.

    Args:
        share: estimated from `count` images.
        count: number of images.
        subsets: (G,): the share in each of G subsets.
    """
    weight = _quantile(len(subsets)) ** 2 / count
    mean = float(subsets.mean()) if len(subsets) else 0.0
    if 0 < mean < 1:
        weight *= max(float(subsets.var(ddof=1)) / len(subsets) * count / (mean * (1 - mean)), 1.0)
    centre = (share + weight / 2) / (1 + weight)
    reach = sqrt(weight / (1 + weight) * centre * (1 - centre))
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


def _quantile(subsets: int) -> float:
    """Student's two-sided quantile of 95 % for the variance of so many values, by Fisher's series.

    Its error is below 0.01 from 8 on; with fewer than 2, the normal quantile.
    """
    freedom = subsets - 1
    if freedom < 1:
        return _Z
    return _Z + (_Z**3 + _Z) / (4 * freedom) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * freedom**2)
