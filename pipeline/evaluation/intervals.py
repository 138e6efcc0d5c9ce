"""95 % intervals of figures: random groups, the grouped jackknife, and the interval of a share. Pure; all float64.

The intervals are over samples and reference images alike: both count as draws, independent of each other, so that the
variance of a figure is the sum of the part that comes from the samples and the part that comes from the reference.

Groups are left out, never drawn with replacement: a bootstrap repeats images, and a repeated image is its own nearest
neighbour at distance 0. Efron 1982, "The jackknife, the bootstrap and other resampling plans", chapters 3 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import keyed_random
from pipeline.keyed_random import Use

Z = 1.959964
"""The normal quantile of a two-sided interval of 95 %."""
_SEED = 0


@dataclass(frozen=True)
class Figure:
    """A figure of sample quality with its 95 % interval over samples and reference."""

    value: float
    low: float
    high: float
    n: int
    """Samples."""
    reference_n: int
    """Reference images; 0 if the figure has no reference."""


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
    """Variance of a figure from its values with each of G equal groups left out: (G - 1)/G Σ (θ_g - mean)².

    Args:
        left_out: (G,). With one group there is nothing to compare, and the variance is 0.
    """
    return float((len(left_out) - 1) * np.var(left_out, dtype=np.float64))


def around(value: float, variance: float, least: float = -np.inf, most: float = np.inf) -> tuple[float, float]:
    """(low, high) of a normal interval, both clipped to what the figure can be."""
    reach = Z * sqrt(variance)
    low, high = np.clip((value - reach, value + reach), least, most)
    return float(low), float(high)


def of_share(share: float, variance: float, count: int) -> tuple[float, float]:
    """(low, high) of a share, within [0, 1]: the score interval of Wilson 1927.

    It has a length also for a share of 0 or 1, whose estimated variance is 0.

    Args:
        share: estimated from `count` images.
        variance: of the estimate. It gives the number of independent images that would be as exact, which takes the
            place of `count` if it is smaller.
        count: number of images.
    """
    spread = share * (1 - share)
    effective = min(spread / variance, count) if variance > 0 else count
    if spread == 0:
        effective = count
    weight = Z * Z / effective
    reach = sqrt(weight * spread + weight * weight / 4)
    low, high = ((share + weight / 2 + side * reach) / (1 + weight) for side in (-1, 1))
    return max(low, 0.0), min(high, 1.0)
