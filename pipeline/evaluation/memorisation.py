"""Memorisation: how many samples are copies of training images, judged in feature space. Pure; float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.intervals import Figure, jackknife_variance, of_share, random_groups
from pipeline.evaluation.neighbours import nearest, nearest_others

_GROUPS = 32
_LISTED = 4
"""Neighbours that are listed, for those that are left out: rarely are more in one group."""


def memorised_share(samples: NDArray[np.float32], reference: NDArray[np.float32]) -> Figure:
    """Share of samples that are at least as near to a training image as its nearest other training image is.

    For each sample: the distance to its nearest training image is compared with the distance from that image to the
    nearest other one of the training set.

    How to read it: copies give 1. New images of the training images' own distribution do not give 0: the share is the
    probability that a point and its nearest neighbour are nearest to each other (Clark and Evans 1955; Pickard 1982),
    1/(2 - I), where I is the part of a ball that lies in an equal one around a point of its border: 2/3 in one
    dimension, 0.62 in two, 0.53 in ten, towards 1/2 in many. Where images have low intrinsic dimension, expect about
    0.5 to 0.6. Samples unlike all training images give less. To judge a model, compare with the share of held-out
    images against the same training images: only an excess over it is memorisation.

    The interval adds the variance of the mean over the samples to that of the grouped jackknife over the reference.

    Args:
        samples: (n, D), n at least 2.
        reference: (m, D), the training images, m at least 2.
    """
    n, m = len(samples), len(reference)
    near, distance = nearest(samples, reference, min(_LISTED, m))
    others, apart = nearest_others(reference, min(_LISTED, m - 1))
    group = random_groups(m, min(_GROUPS, m))
    columns = []
    for left in range(-1, int(group.max()) + 1):
        first = _first(group[near] != left)
        image = near[np.arange(n), first]
        own = apart[np.arange(m), _first(group[others] != left)]
        columns.append(float((distance[np.arange(n), first] <= own[image]).mean()))
    share, *left_out = columns
    variance = share * (1 - share) / (n - 1) + jackknife_variance(np.array(left_out))
    return Figure(share, *of_share(share, variance, n), n, m)


def _first(there: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(N,): the first column that is there; the last if none is."""
    column: NDArray[np.int64] = np.where(there.any(axis=1), there.argmax(axis=1), there.shape[1] - 1)
    return column
