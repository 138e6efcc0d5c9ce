import numpy as np
import pytest

from pipeline.evaluation import neighbours
from pipeline.evaluation.neighbours import nearest, nearest_others


def normal(count, dimensions, seed, mean=0.0):
    return (np.random.default_rng(seed).normal(size=(count, dimensions)) + mean).astype(np.float32)


def by_differences(a, b):
    return np.sqrt(((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1))


@pytest.fixture(params=[(8, 7), (1024, 2048)], ids=["small blocks", "one block"])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(neighbours, "_ROWS", request.param[0])
    monkeypatch.setattr(neighbours, "_COLUMNS", request.param[1])


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.usefixtures("_blocks")
def test_neighbours_are_those_by_differences(mean):
    a, b = normal(40, 6, 0, mean), normal(30, 6, 1, mean)
    truth = by_differences(a, b)
    indices, distances = nearest(a, b, 4)
    np.testing.assert_allclose(distances, np.sort(truth, axis=1)[:, :4], rtol=1e-9)
    np.testing.assert_allclose(np.take_along_axis(truth, indices, axis=1), distances, rtol=1e-9)
    truth = by_differences(a, a)
    np.fill_diagonal(truth, np.inf)
    indices, distances = nearest_others(a, 3)
    np.testing.assert_allclose(distances, np.sort(truth, axis=1)[:, :3], rtol=1e-9)
    assert (indices != np.arange(40)[:, None]).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.usefixtures("_blocks")
def test_identical_images_are_at_distance_zero(scale):
    rows = scale * normal(20, 300, 0, 5.0)
    indices, distances = nearest(rows[::-1].copy(), rows, 2)
    assert (distances[:, 0] == 0).all() and (distances[:, 1] > scale).all()
    assert (indices[:, 0] == np.arange(20)[::-1]).all()
    _, distances = nearest_others(np.concatenate((rows, rows[:5])), 1)
    assert np.count_nonzero(distances == 0) == 10


def test_distances_far_below_the_scale_of_the_features_are_exact():
    rows = normal(20, 50, 0)
    moved = rows.copy()
    moved[:, 0] += np.float32(1e-3)
    expected = np.abs(moved[:, 0].astype(np.float64) - rows[:, 0])
    np.testing.assert_allclose(nearest(moved, rows, 1)[1][:, 0], expected, rtol=1e-6)
