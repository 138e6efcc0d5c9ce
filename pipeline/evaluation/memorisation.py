"""Memorisation: how many samples are copies of training images, judged in feature space. Pure; float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.intervals import Figure, in_subsets, of_share
from pipeline.evaluation.neighbours import nearest, nearest_others


def memorised_share(samples: NDArray[np.float32], reference: NDArray[np.float32]) -> Figure:
    """Share of samples that are at least as near to a training image as its nearest other training image is.

    For each sample: the distance to its nearest training image is compared with the distance from that image to the
    nearest other one of the training set.

    How to read it: copies give 1. New images of the training images' own distribution do not give 0. With very many
    images the share is the probability that a point and its nearest neighbour are nearest to each other (Clark and
    Evans 1955; Pickard 1982), 1/(2 - I), where I is the part of a ball that lies in an equal one around a point of its
    border: 2/3 in one dimension, 0.62 in two, towards 1/2 in many. With fewer images it is lower, because the nearest
    training image lies where they are dense, near others. Measured for normal distributions: 0.42 in 8 dimensions (500
    images of either), 0.32 in 16 (2,000), 0.2 in 64 (500). It also rises without any copy if samples keep to the dense
    part: 0.55 in 32 dimensions with 0.8 times the deviation. So compare with the share of held-out images against the
    same training images, in equal number: only an excess over it can be memorisation, and the sheet of nearest images
    shows whether it is.

    The variance comes from disjoint subsets (`intervals.in_subsets`).

    Args:
        samples: (n, D), n at least 2.
        reference: (m, D), the training images, m at least 2.
    """
    n, m = len(samples), len(reference)
    (share,) = _share(samples, reference)
    (subsets,) = in_subsets(_share, samples, reference)
    return Figure(share, *of_share(share, n, subsets), n, m)


def _share(samples: NDArray[np.float32], reference: NDArray[np.float32]) -> tuple[float]:
    image, distance = nearest(samples, reference, 1)
    apart = nearest_others(reference, 1)[1]
    return (float((distance[:, 0] <= apart[image[:, 0], 0]).mean()),)
