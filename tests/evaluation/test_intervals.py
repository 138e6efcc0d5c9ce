import numpy as np
import pytest
from scipy.stats import t

from pipeline.evaluation import intervals


def test_groups_are_fixed_balanced_and_not_in_order():
    group = intervals.random_groups(1003, 8)
    assert sorted(np.bincount(group)) == [125] * 5 + [126] * 3
    assert np.array_equal(group, intervals.random_groups(1003, 8))
    assert abs(np.corrcoef(group, np.arange(1003))[0, 1]) < 0.1
    assert not np.array_equal(group, np.arange(1003) % 8)


def test_the_jackknife_of_a_mean_is_the_variance_of_a_mean():
    values = np.random.default_rng(0).normal(size=50)
    left_out = (values.sum() - values) / 49
    assert intervals.jackknife_variance(left_out) == pytest.approx(values.var(ddof=1) / 50)


@pytest.mark.parametrize("share", [0.0, 0.004, 0.3, 0.97, 1.0])
def test_intervals_of_a_share_contain_it(share):
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        inside = generator.uniform(size=(16, 32)) < share
        low, high = intervals.of_share(inside.mean(), inside.size, inside.mean(axis=1))
        assert 0 <= low <= inside.mean() <= high <= 1 and low < high
        hits += low <= share <= high
    assert hits >= 0.93 * 400


def test_a_share_of_images_that_depend_on_each_other_has_a_longer_interval():
    inside = np.repeat(np.random.default_rng(0).uniform(size=(16, 8)) < 0.4, 4, axis=1)  # groups of four alike
    low, high = intervals.of_share(inside.mean(), inside.size, inside.mean(axis=1))
    alone = intervals.of_share(inside.mean(), inside.size, np.empty(0))
    assert 1.5 < (high - low) / (alone[1] - alone[0]) < 3


@pytest.mark.parametrize("subsets", [8, 12, 32])
def test_the_quantile_is_students(subsets):
    assert intervals._quantile(subsets) == pytest.approx(t.ppf(0.975, subsets - 1), abs=0.01)


@pytest.mark.parametrize(
    ("n", "m", "subsets"), [(3, 9, 0), (4, 9, 2), (40, 99, 8), (300, 320, 9), (999, 5000, 31), (5000, 5000, 32)]
)
def test_subsets_hold_every_image_once(n, m, subsets):
    a, b = (np.arange(count, dtype=np.float32)[:, None] for count in (n, m))
    seen = []
    found = intervals.in_subsets(lambda x, y: (seen.append((x, y)), float(len(x)), float(len(y)))[1:], a, b)
    assert found.shape == (2, subsets)
    if subsets:
        assert np.array_equal(np.sort(np.concatenate([x for x, _ in seen]), axis=0), a)
        assert np.array_equal(np.sort(np.concatenate([y for _, y in seen]), axis=0), b)
        assert found.sum(axis=1).tolist() == [n, m]
