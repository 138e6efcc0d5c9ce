import numpy as np
import pytest

from pipeline.evaluation import kernel_distance as module
from pipeline.evaluation.kernel_distance import kernel_distance


def normal(count, dimensions, seed, mean=0.0):
    return (np.random.default_rng(seed).normal(size=(count, dimensions)) + mean).astype(np.float32)


def by_loops(samples, reference):
    kernel = lambda x, y: (float(x.astype(np.float64) @ y) / len(x) + 1) ** 3  # noqa: E731
    within = [
        [kernel(x, y) for j, y in enumerate(rows) if i != j]
        for rows in (samples, reference)
        for i, x in enumerate(rows)
    ]
    n = len(samples)
    between = np.mean([[kernel(x, y) for y in reference] for x in samples])
    return np.mean(within[:n]) + np.mean(within[n:]) - 2 * between


@pytest.mark.parametrize("block", [7, 16, 2048])
def test_it_is_the_double_sum_over_different_images(block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    samples, reference = normal(30, 5, 0, 0.3), normal(23, 5, 1)
    figure = kernel_distance(samples, reference)
    assert figure.value == pytest.approx(by_loops(samples, reference), abs=1e-5)
    assert (figure.n, figure.reference_n) == (30, 23)


@pytest.mark.parametrize("block", [7, 2048])
def test_the_interval_is_that_of_distances_with_an_image_left_out(block, monkeypatch):
    samples, reference = normal(20, 5, 0, 0.3), normal(15, 5, 1)
    left = [[kernel_distance(np.delete(samples, i, 0), reference).value for i in range(20)],
            [kernel_distance(samples, np.delete(reference, i, 0)).value for i in range(15)]]  # fmt: skip
    deviation = np.sqrt(sum((len(values) - 1) * np.var(values) for values in left))
    monkeypatch.setattr(module, "_BLOCK", block)
    figure = kernel_distance(samples, reference)
    assert figure.high - figure.value == pytest.approx(1.96 * deviation, rel=1e-3)
    assert figure.value - figure.low == pytest.approx(1.96 * deviation, rel=1e-3)


def test_order_does_not_matter_and_equal_distributions_give_zero_on_average():
    a, b = normal(300, 8, 0), normal(200, 8, 1, 0.2)
    assert kernel_distance(a[::-1], b).value == pytest.approx(kernel_distance(b, a).value, abs=1e-6)
    values = np.array([kernel_distance(normal(100, 8, i), normal(150, 8, 1000 + i)).value for i in range(100)])
    assert values.min() < 0 < values.max()
    assert abs(values.mean()) < 4 * values.std() / 10


def test_two_images_on_a_side_are_enough():
    figure = kernel_distance(normal(2, 3, 0), normal(2, 3, 1))
    assert np.isfinite([figure.value, figure.low, figure.high]).all()
