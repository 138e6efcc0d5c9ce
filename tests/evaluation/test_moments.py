import numpy as np
import pytest
from scipy.linalg import sqrtm

from pipeline.errors import DataError
from pipeline.evaluation.moments import Moments, frechet_distance


def features(count, dimensions, seed=0, offset=0.0):
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(dimensions, dimensions))
    return (generator.normal(size=(count, dimensions)) @ mixing + offset).astype(np.float32)


def rotation(dimensions, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dimensions, dimensions)))[0]


def moments(mean, covariance, count=1000):
    return Moments(count, np.asarray(mean, np.float64), np.asarray(covariance, np.float64))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("seed", range(4))
def test_moments_do_not_depend_on_batches_and_order(seed, offset):
    whole = features(500, 7, seed, offset)
    generator = np.random.default_rng(seed)
    cuts = np.sort(generator.choice(np.arange(1, 500), size=20, replace=False))
    parts = [Moments.of(part) for part in np.split(whole, [1, *cuts]) if len(part)]
    generator.shuffle(parts)
    while len(parts) > 1:  # merge two at random: neither a chain nor a balanced tree
        a, b = (parts.pop(generator.integers(len(parts))) for _ in range(2))
        parts.append(a + b)
    (merged,) = parts
    exact = whole.astype(np.float64)
    assert merged.count == 500
    np.testing.assert_allclose(merged.mean, exact.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(exact, rowvar=False), rtol=1e-12, atol=1e-12)
    assert np.array_equal(merged.covariance, merged.covariance.T)


def test_one_image_has_no_spread_and_can_be_merged():
    a, b = features(2, 3)
    both = Moments.of(a[None]) + Moments.of(b[None])
    assert not Moments.of(a[None]).covariance.any()
    np.testing.assert_allclose(both.covariance, np.cov(np.stack((a, b)).astype(np.float64), rowvar=False), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_distance_equals_the_formula_with_a_matrix_square_root(seed):
    a, b = Moments.of(features(300, 16, seed)), Moments.of(features(200, 16, seed + 10, offset=0.5))
    root = sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("rank", [0, 3, 12])
def test_the_distance_of_commuting_covariances_is_the_closed_form(rank):
    # Σ (√a - √b)² over common axes, also where most of them have no spread at all.
    generator = np.random.default_rng(rank)
    axes, alive = rotation(12), np.arange(12) < rank
    a, b = generator.uniform(0.1, 5, (2, 12)) * alive
    apart = generator.normal(size=12)
    expected = apart @ apart + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    left, right = moments(np.zeros(12), axes * a @ axes.T), moments(apart, axes * b @ axes.T)
    assert frechet_distance(left, right) == pytest.approx(expected, rel=1e-9)


def test_the_distance_is_exact_where_covariances_are_singular():
    few = features(5, 64)  # rank 4 of 64, where the root of a product is least stable
    a = Moments.of(few)
    assert frechet_distance(a, a) <= 1e-12 * np.trace(a.covariance)
    assert frechet_distance(a, Moments.of(2 * few)) == pytest.approx(a.mean @ a.mean + np.trace(a.covariance), rel=1e-9)


def test_features_that_are_not_finite_are_refused():
    rows = features(4, 3)
    rows[1, 2], rows[3, 0] = np.nan, np.inf
    with pytest.raises(DataError, match="of 2 of 4 images are not finite"):
        Moments.of(rows)


def test_a_distance_needs_two_images_on_either_side():
    with pytest.raises(DataError, match="between 1 and 9 images"):
        frechet_distance(Moments.of(features(1, 3)), Moments.of(features(9, 3)))
