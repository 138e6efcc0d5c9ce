"""All figures of sample quality, from features: samples against reference. Pure.

The memory beside the features is some D x D matrices and some blocks of pairs, whatever the number of images; equal
features give equal figures up to the rounding of matrix products, which may differ between machines and threads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.frechet import frechet_figures
from pipeline.evaluation.inception_score import inception_score
from pipeline.evaluation.intervals import FEWEST, Figure
from pipeline.evaluation.kernel_distance import kernel_distance
from pipeline.evaluation.precision_recall import K_COVERAGE, precision_recall

STEPS = ("Fréchet distance", "kernel distance", "precision and recall", "inception score")
"""The parts of `figures`, as `report` hears them."""


def figures(
    samples: NDArray[np.float32],
    reference: NDArray[np.float32],
    logits: NDArray[np.float32] | None = None,
    report: Callable[[str], None] = lambda step: None,
) -> dict[str, Figure]:
    """The figures by name, each with its 95 % interval over samples and reference.

    Args:
        samples: (n, D), float32, such as a memory-mapped array.
        reference: (m, D), float32.
        logits: (n, classes) of the samples; without them there is no inception score.
        report: is called with the name of each step before it begins.

    Returns:
        frechet_distance, frechet_distance_infinity, kernel_distance, precision, recall, density, coverage and, with
        logits, inception_score.

    Raises:
        DataError: fewer than two images on a side, or features or logits that are not finite.
    """
    report(STEPS[0])
    distance, infinity = frechet_figures(samples, reference)
    found = {"frechet_distance": distance, "frechet_distance_infinity": infinity}
    report(STEPS[1])
    found["kernel_distance"] = kernel_distance(samples, reference)
    report(STEPS[2])
    shares = precision_recall(samples, reference)
    found |= {name: shares[name] for name in ("precision", "recall", "density", "coverage")}
    if logits is not None:
        report(STEPS[3])
        found["inception_score"] = inception_score(logits)
    return found


def notes(n: int, reference_n: int, dimensions: int) -> list[str]:
    """What a reader must know about figures of so few images, a line each; empty if there are enough.

    Args:
        n: samples.
        reference_n: reference images.
        dimensions: D, features of an image.
    """
    lines = []
    for count, of in ((n, "samples"), (reference_n, "reference images")):
        if count <= dimensions:
            lines.append(
                f"{dimensions:,} features need more than {dimensions:,} {of} for a covariance of full rank; there are "
                f"{count:,}: the Fréchet distance is far too large, and its interval is not valid"
            )
        elif count <= 2 * dimensions:
            lines.append(
                f"{dimensions:,} features need more than {2 * dimensions:,} {of} for the interval of the Fréchet "
                f"distance and its value at infinity; there are {count:,}: both may be wrong"
            )
        if count < FEWEST:
            lines.append(
                f"the intervals of precision, recall, density and coverage need {FEWEST} {of} for subsets of 32; there "
                f"are {count}: they are rough"
            )
        if count <= K_COVERAGE:
            lines.append(
                f"density and coverage need more than {K_COVERAGE} {of}; there are {count}: with fewer neighbours, "
                f"they are not those of other sets"
            )
    return lines
