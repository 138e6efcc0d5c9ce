import numpy as np
import pytest

from pipeline.evaluation.memorisation import memorised_share


def uniform(count, dimensions, seed):
    return np.random.default_rng(seed).uniform(size=(count, dimensions)).astype(np.float32)


def test_copies_give_one_and_others_give_less():
    training = uniform(400, 20, 0)
    assert memorised_share(training[:100].copy(), training).value == 1
    assert memorised_share(training[:100] + np.float32(1e-4), training).value == 1
    twice = np.concatenate((training, training))
    assert memorised_share(training[:100], twice).value == 1
    assert memorised_share(training[:100] + 50, training).value < 0.05


@pytest.mark.parametrize(("dimensions", "share"), [(1, 2 / 3), (3, 0.5926)])
def test_fresh_samples_give_the_share_of_mutual_neighbours(dimensions, share):
    # Clark and Evans: 1/(2 - I), I the part of a ball in one around a point of its border.
    figure = memorised_share(uniform(2000, dimensions, 0), uniform(2000, dimensions, 1))
    assert figure.value == pytest.approx(share, abs=0.035)
    assert figure.low <= share + 0.01 and figure.high >= share - 0.01


@pytest.mark.parametrize(("dimensions", "share"), [(8, 0.42), (64, 0.2)])
def test_fresh_samples_where_images_are_few_give_what_the_docstring_says(dimensions, share):
    samples, training = np.random.default_rng(0).normal(size=(2, 500, dimensions)).astype(np.float32)
    assert memorised_share(samples, training).value == pytest.approx(share, abs=0.08)


def test_by_hand():
    training = np.array([[0], [1], [10], [14]], np.float32)
    samples = np.array([[0.5], [3], [11], [20], [-2]], np.float32)  # nearer than 1, 1, 4, 4, 1?
    figure = memorised_share(samples, training)
    assert figure.value == pytest.approx(2 / 5)
    assert (figure.n, figure.reference_n) == (5, 4)


def test_intervals_contain_the_mean_of_many_repetitions():
    runs = [memorised_share(uniform(300, 4, i), uniform(400, 4, 100 + i)) for i in range(60)]
    truth = np.mean([run.value for run in runs])
    assert sum(run.low <= truth <= run.high for run in runs) >= 52
