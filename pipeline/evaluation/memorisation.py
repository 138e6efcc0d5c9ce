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

    How to read it: copies give 1. New images of the training images' own distribution do not give 0: the share is the
    probability that a point and its nearest neighbour are nearest to each other (Clark and Evans 1955; Pickard 1982),
    1/(2 - I), where I is the part of a ball that lies in an equal one around a point of its border: 2/3 in one
    dimension, 0.62 in two, 0.53 in ten, towards 1/2 in many. Where images have low intrinsic dimension, expect about
    0.5 to 0.6. Samples unlike all training images give less. To judge a model, compare with the share of held-out
    images against the same training images: only an excess over it is memorisation.

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
