"""How often do the 95 % intervals of the figures contain the truth, and what do the figures cost?

    python benchmarks/interval_coverage.py [--cases N ...] [--repetitions R] [--cost N ...]

Samples and reference are drawn from normal distributions, again in each repetition. The truth of the Fréchet and the
kernel distance is the closed form for the populations; that of the inception score is the score of a million samples.
Precision, recall, density, coverage and the memorised share depend on the numbers of images: their truth is their
mean over the repetitions, at these numbers. `length`: of an interval whose estimated deviation is right it is 3.92
deviations of the estimate; `ratio` is the mean length over that. Target of the coverage: 90 to 99 %; with 100
repetitions its own standard error is 2 %. Where the truth is a distance of 0, intervals are longer on purpose.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from turns import Turns

from pipeline.evaluation.figures import figures
from pipeline.evaluation.inception_score import inception_score
from pipeline.evaluation.intervals import Figure
from pipeline.evaluation.memorisation import memorised_share
from pipeline.evaluation.moments import Moments, frechet_distance

CLASSES, DIMENSIONS = 10, 2048


@dataclass(frozen=True)
class Case:
    """Two normal distributions and the numbers of images from each."""

    n: int
    m: int
    dimensions: int
    shift: float
    """Distance of the means."""
    scale: float
    """Of the deviations of the samples, against those of the reference."""

    def deviations(self) -> NDArray[np.float64]:
        """Of the reference, (D,)."""
        return np.linspace(0.5, 1.5, self.dimensions)

    def population(self) -> tuple[Moments, Moments]:
        """Of samples and reference; the count does not matter."""
        mean = np.full(self.dimensions, self.shift / np.sqrt(self.dimensions))
        wide, narrow = (np.diag(np.square(scale * self.deviations())) for scale in (self.scale, 1.0))
        return Moments(2, mean, wide), Moments(2, np.zeros(self.dimensions), narrow)

    def draw(self, generator: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Samples (n, D) and reference (m, D)."""
        samples, reference = (generator.normal(size=(count, self.dimensions)) for count in (self.n, self.m))
        means = [moments.mean for moments in self.population()]
        samples, reference = self.scale * self.deviations() * samples + means[0], self.deviations() * reference
        return samples.astype(np.float32), reference.astype(np.float32)


CASES = (
    Case(500, 500, 8, 0.0, 1.0),
    Case(500, 1000, 8, 0.2, 1.1),
    Case(1000, 1000, 32, 0.5, 0.9),
    Case(500, 500, 64, 0.5, 1.0),
    Case(1000, 2000, 64, 1.0, 1.3),
    Case(2000, 2000, 16, 0.0, 1.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)))
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--cost", type=int, nargs="*", default=[2048, 10_000], help="numbers of images to time")
    options = parser.parse_args()
    for number in options.cases:
        coverage(CASES[number], options.repetitions)
    if options.cost:
        cost(options.cost)


def coverage(case: Case, repetitions: int) -> None:
    print(f"\n{case}, {repetitions} repetitions", flush=True)
    generator = np.random.default_rng(0)
    found: dict[str, list[Figure]] = defaultdict(list)
    for _ in range(repetitions):
        samples, reference = case.draw(generator)
        drawn = figures(samples, reference, _logits(case.n, generator))
        for name, figure in (drawn | {"memorised_share": memorised_share(samples, reference)}).items():
            found[name].append(figure)
    truths = {
        "frechet_distance": frechet_distance(*case.population()),
        "kernel_distance": _kernel_distance(*case.population()),
        "inception_score": inception_score(_logits(1_000_000, generator)).value,
    }
    truths["frechet_distance_infinity"] = truths["frechet_distance"]
    print(f"{'':27}{'truth':>10}{'mean':>10}{'deviation':>11}{'length':>9}{'ratio':>7}{'covered':>9}")
    for name, drawn_figures in found.items():
        values, low, high = np.array([(figure.value, figure.low, figure.high) for figure in drawn_figures]).T
        truth = truths.get(name, values.mean())
        length, covered = (high - low).mean(), np.mean((low <= truth) & (truth <= high))
        ratio = length / (3.92 * max(values.std(), 1e-12))
        print(
            f"{name:27}{truth:10.4f}{values.mean():10.4f}{values.std():11.4f}{length:9.4f}{ratio:7.2f}{covered:9.0%}"
            f"{'' if name in truths else '  (truth: the mean)'}",
            flush=True,
        )


def cost(counts: list[int]) -> None:
    """Seconds of the processor, which do not depend on what else the machine does."""
    generator = np.random.default_rng(0)
    print(f"\nseconds of the processor with {DIMENSIONS} features, {Turns(torch.device('cpu'), 1).where()}")
    for count in counts:
        samples, reference = (generator.normal(size=(count, DIMENSIONS)).astype(np.float32) for _ in range(2))
        marks: list[tuple[str, float]] = []
        mark = partial(_mark, marks)
        figures(samples, reference, _logits(count, generator, 1008), mark)
        mark("memorised share")
        memorised_share(samples, reference)
        mark("")
        parts = ", ".join(f"{name} {end - start:.1f}" for (name, start), (_, end) in pairwise(marks))
        total = marks[-1][1] - marks[0][1]
        print(f"{count:7,} samples and as many of the reference: {total:.1f} s: {parts}", flush=True)


def _mark(marks: list[tuple[str, float]], step: str) -> None:
    marks.append((step, time.process_time()))


def _logits(count: int, generator: np.random.Generator, classes: int = CLASSES) -> NDArray[np.float32]:
    return 2 * generator.normal(size=(count, classes)).astype(np.float32) + np.linspace(-1, 1, classes, dtype="f4")


def _kernel_distance(a: Moments, b: Moments) -> float:
    return _kernel(a, a) + _kernel(b, b) - 2 * _kernel(a, b)


def _kernel(a: Moments, b: Moments) -> float:
    """E (x·y/D + 1)³ of independent normal x and y, from the first three moments of x·y."""
    product, overlap = a.mean @ b.mean, np.trace(a.covariance @ b.covariance)
    spread = a.mean @ b.covariance @ a.mean + b.mean @ a.covariance @ b.mean
    second = overlap + spread + product**2
    third = product**3 + 3 * product * (spread + overlap) + 6 * b.mean @ a.covariance @ b.covariance @ a.mean
    dimensions = len(a.mean)
    return float(1 + 3 * product / dimensions + 3 * second / dimensions**2 + third / dimensions**3)


if __name__ == "__main__":
    main()
