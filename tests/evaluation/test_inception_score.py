import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.evaluation import inception_score as module
from pipeline.evaluation.inception_score import inception_score


def logits(count, classes=10, seed=0):
    return 2 * np.random.default_rng(seed).normal(size=(count, classes)).astype(np.float32)


def by_hand(rows):
    p = np.exp(rows.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    return np.exp(np.mean(np.sum(p * np.log(p / p.mean(axis=0)), axis=1)))


def test_sure_samples_of_all_classes_give_the_number_of_classes():
    figure = inception_score(np.tile(200 * np.eye(7, dtype=np.float32), (30, 1)))
    assert figure.value == pytest.approx(7, rel=1e-9) and figure.low > 6.9 and figure.high <= 7 + 1e-9
    assert (figure.n, figure.reference_n) == (210, 0)


@pytest.mark.parametrize("rows", [np.zeros((40, 5), np.float32), np.tile(logits(1), (40, 1))], ids=["uniform", "one"])
def test_samples_with_equal_probabilities_give_one(rows):
    figure = inception_score(rows)
    assert [figure.value, figure.low, figure.high] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("block", [7, 4096])
def test_it_is_the_mean_divergence_from_the_mean(block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    rows = logits(60)
    figure = inception_score(rows)
    assert figure.value == pytest.approx(by_hand(rows), rel=1e-9)
    assert inception_score(rows[::-1] + 5000).value == pytest.approx(figure.value, rel=1e-3)
    left = np.log([by_hand(np.delete(rows, i, 0)) for i in range(60)])
    centre = 60 * np.log(by_hand(rows)) - 59 * left.mean()
    reach = 1.96 * np.sqrt(59 * left.var())
    assert np.log([figure.low, figure.high]) == pytest.approx([centre - reach, centre + reach], rel=1e-4)


def test_intervals_contain_the_score_of_many_samples():
    truth = inception_score(logits(200_000, seed=1)).value
    figures = [inception_score(logits(150, seed=10 + i)) for i in range(100)]
    assert np.mean([figure.value for figure in figures]) < truth - 0.02  # too low with few samples
    assert sum(figure.low <= truth <= figure.high for figure in figures) >= 89


def test_logits_that_are_not_finite_are_refused():
    rows = logits(5)
    rows[2, 1] = np.nan
    with pytest.raises(DataError, match="not finite"):
        inception_score(rows)
