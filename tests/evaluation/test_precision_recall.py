import numpy as np
import pytest

from pipeline.evaluation import neighbours
from pipeline.evaluation.precision_recall import _Pairs, precision_recall


def normal(count, dimensions, seed, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=(count, dimensions))).astype(np.float32)


def column(*numbers):
    return np.array(numbers, np.float32)[:, None]


def by_definition(samples, reference):
    def distances(a, b):
        return np.sqrt(((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1))

    between = distances(samples, reference)
    own, others = (np.sort(distances(rows, rows), axis=1) for rows in (samples, reference))  # first: itself
    inside = between <= others[:, 5]
    return {
        "precision": (between <= others[:, 3]).any(axis=1).mean(),
        "recall": (between <= own[:, [3]]).any(axis=0).mean(),
        "density": inside.sum() / (5 * len(samples)),
        "coverage": inside.any(axis=0).mean(),
    }


@pytest.mark.parametrize(("n", "m", "scale"), [(80, 60, 1.0), (50, 90, 1.6), (70, 70, 0.5)])
@pytest.mark.parametrize("block", [9, 2048])
def test_the_figures_are_those_of_the_definitions(n, m, scale, block, monkeypatch):
    monkeypatch.setattr(neighbours, "_ROWS", block)
    monkeypatch.setattr(neighbours, "_COLUMNS", block + 1)
    samples, reference = normal(n, 4, 0, scale), normal(m, 4, 1)
    figures = precision_recall(samples, reference)
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(by_definition(samples, reference))
    assert all((figure.n, figure.reference_n) == (n, m) for figure in figures.values())
    assert all(figure.low <= figure.value <= figure.high for figure in figures.values())
    shuffled = precision_recall(samples[::-1], np.roll(reference, 7, axis=0))
    assert {name: figure.value for name, figure in shuffled.items()} == pytest.approx(
        {name: figure.value for name, figure in figures.items()}
    )


def test_a_set_on_a_line_by_hand():
    # Third and fifth neighbours of 0, 1, 2, 4, 8, 16 are at 4 3 2 4 7 14 and 16 15 14 12 8... with the borders moved
    # off the samples by a half.
    reference = column(0, 1, 2, 4, 8, 16)
    samples = column(-3.5, -4.5, 12.5, 31.5, 200, 300)
    figures = precision_recall(samples, reference)
    # k = 3: radii 4 3 2 4 7 14, balls [-4, 4] [-2, 4] [0, 4] [0, 8] [1, 15] [2, 30]: -3.5 and 12.5.
    assert figures["precision"].value == pytest.approx(2 / 6)
    # k = 5: radii 16 15 14 12 8 16, balls [-16, 16] [-14, 16] [-12, 16] [-8, 16] [0, 16] [0, 32].
    assert figures["density"].value == pytest.approx((4 + 4 + 6 + 1) / (5 * 6))
    assert figures["coverage"].value == 1
    # k = 3 of the samples: 35, 36, 17, 36, 187.5, 287.5: every reference image is in a ball.
    assert figures["recall"].value == 1


def test_equal_sets_sets_apart_and_copies():
    reference = normal(300, 5, 0)
    same = {name: figure.value for name, figure in precision_recall(reference.copy(), reference).items()}
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert same["density"] == pytest.approx(6 / 5)  # itself and five neighbours
    apart = precision_recall(reference + 100, reference)
    assert [figure.value for figure in apart.values()] == [0, 0, 0, 0]
    assert 0 < apart["precision"].high < 0.05
    one = precision_recall(np.repeat(reference[:1], 300, axis=0), reference)  # a collapsed model
    assert one["precision"].value == 1 and one["recall"].value == pytest.approx(1 / 300)


def test_the_density_without_an_image_is_that_of_a_set_without_it():
    samples, reference = normal(40, 3, 0), normal(30, 3, 1)
    left_out = [_Pairs(samples, np.delete(reference, i, 0)).balls_of_sample.sum() for i in range(30)]
    assert _Pairs(samples, reference).inside_without().tolist() == left_out


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 9), (9, 4)])
def test_few_images_give_finite_figures(n, m):
    for figure in precision_recall(normal(n, 3, 0), normal(m, 3, 1)).values():
        assert 0 <= figure.low <= figure.value <= figure.high


@pytest.mark.parametrize(("n", "m", "dimensions", "scale"), [(256, 400, 3, 1.2), (300, 256, 16, 0.9)])
def test_intervals_contain_the_mean_of_many_repetitions(n, m, dimensions, scale):
    runs = [precision_recall(normal(n, dimensions, i, scale), normal(m, dimensions, 100 + i)) for i in range(40)]
    for name in runs[0]:
        truth = np.mean([run[name].value for run in runs])
        hits = sum(run[name].low <= truth <= run[name].high for run in runs)
        assert hits >= 34, name  # 38 are expected
        length = np.mean([run[name].high - run[name].low for run in runs])
        assert length < 2 * 3.92 * np.std([run[name].value for run in runs]), name
