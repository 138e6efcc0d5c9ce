import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.evaluation.frechet import _influences, _variance, frechet_figures
from pipeline.evaluation.moments import Moments, frechet_distance


def normal(count, mean, deviations, seed):
    return (np.random.default_rng(seed).normal(size=(count, len(deviations))) * deviations + mean).astype(np.float32)


def known(mean, deviations):
    return Moments(10**9, np.full(len(deviations), float(mean)), np.diag(np.square(deviations)))


WIDE, NARROW = np.linspace(0.5, 3, 12), np.linspace(2, 1, 12)


def test_the_value_is_that_of_the_moments_and_order_does_not_matter():
    a, b = normal(900, 0, WIDE, 0), normal(700, 0.5, NARROW, 1)
    value, infinity = frechet_figures(a, b)
    assert value.value == pytest.approx(frechet_distance(Moments.of(a), Moments.of(b)), rel=1e-12)
    assert (value.n, value.reference_n) == (900, 700)
    assert frechet_figures(a[::-1], b)[0].value == pytest.approx(value.value, rel=1e-12)
    assert frechet_figures(b, a)[1].value == pytest.approx(infinity.value, rel=1e-9)


def test_the_extrapolation_has_no_bias_where_the_value_has():
    truth = frechet_distance(known(0, WIDE), known(0.1, WIDE))
    pairs = [frechet_figures(normal(150, 0, WIDE, i), normal(200, 0.1, WIDE, 100 + i)) for i in range(60)]
    value, infinity = (np.array([pair[i].value for pair in pairs]) for i in (0, 1))
    error = infinity.std() / np.sqrt(len(pairs))
    assert value.mean() - truth > 20 * error
    assert abs(infinity.mean() - truth) < 4 * error


@pytest.mark.parametrize(
    ("b_mean", "b_deviations"), [(0.0, WIDE), (0.3, WIDE), (0.5, NARROW)], ids=["equal", "near", "far"]
)
def test_intervals_contain_the_distance_of_the_populations(b_mean, b_deviations):
    truth = frechet_distance(known(0, WIDE), known(b_mean, b_deviations))
    hits = 0
    for i in range(60):
        figure, _ = frechet_figures(normal(300, 0, WIDE, i), normal(400, b_mean, b_deviations, 100 + i))
        hits += figure.low <= truth <= figure.high
    assert hits >= 53  # 57 are expected


def test_the_influence_is_the_derivative_of_the_distance():
    # Of the distance to a mixture with a share of a single image, by that share: a difference of two distances.
    a, b = normal(400, 0, WIDE, 0), normal(300, 0.5, NARROW, 1)
    own, other = Moments.of(a), Moments.of(b)
    _, singular, right = np.linalg.svd(own.factor.T @ other.factor)
    influences = _influences(a, own, other, other.factor @ (right.T / np.sqrt(singular)))

    def distance(image, share):
        apart = image - own.mean
        scatter = (1 - share) * own.covariance + share * (1 - share) * np.outer(apart, apart)
        return frechet_distance(Moments(400, own.mean + share * apart, scatter), other)

    slopes = np.array([(distance(image, 1e-5) - distance(image, -1e-5)) / 2e-5 for image in a[:20]])
    np.testing.assert_allclose(slopes - slopes.mean(), influences[:20] - influences[:20].mean(), rtol=1e-4, atol=1e-4)
    expected = influences.var(ddof=1) / 400
    assert expected < _variance(a, b, own, other) < 3 * expected


def test_more_features_than_images_give_finite_figures():
    a, b = normal(9, 0, np.ones(30), 0), normal(8, 1, np.ones(30), 1)
    for figure in frechet_figures(a, b):
        assert np.isfinite([figure.value, figure.low, figure.high]).all() and 0 <= figure.low <= figure.high
    for figure in frechet_figures(a, np.ones_like(b)):  # no spread on a side
        assert np.isfinite([figure.value, figure.low, figure.high]).all()


def test_few_images_have_no_extrapolation_and_one_is_refused():
    a = normal(3, 0, WIDE, 0)
    value, infinity = frechet_figures(a, normal(50, 0, WIDE, 1))
    assert value == infinity
    with pytest.raises(DataError, match="1 samples against 3"):
        frechet_figures(a[:1], a)
