import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.evaluation import figures as module
from pipeline.evaluation.figures import figures, notes


def normal(count, dimensions, seed):
    return np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32)


def test_all_figures_from_files_in_memory_maps(tmp_path):
    arrays = {"samples": normal(300, 6, 0), "reference": normal(280, 6, 1), "logits": normal(300, 4, 2)}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in arrays]
    heard = []
    found = figures(*mapped, report=heard.append)
    assert found.keys() == {
        "frechet_distance", "frechet_distance_infinity", "kernel_distance", "precision", "recall", "density",
        "coverage", "inception_score",
    }  # fmt: skip
    assert found == figures(*arrays.values())
    assert tuple(heard) == module.STEPS
    assert all(figure.n == 300 and figure.reference_n in (280, 0) for figure in found.values())
    assert all(type(value) is float for figure in found.values() for value in (figure.value, figure.low, figure.high))


def test_no_logits_no_inception_score():
    assert "inception_score" not in figures(normal(20, 2, 0), normal(20, 2, 1))


def test_two_images_on_a_side_are_enough_and_one_is_not():
    found = figures(normal(2, 5, 0), normal(2, 5, 1), normal(2, 3, 2))
    assert all(np.isfinite([figure.value, figure.low, figure.high]).all() for figure in found.values())
    with pytest.raises(DataError, match="at least 2"):
        figures(normal(1, 5, 0), normal(9, 5, 1))


def test_features_that_are_not_finite_are_refused():
    rows = normal(20, 2, 0)
    rows[3, 1] = np.inf
    with pytest.raises(DataError, match="not finite"):
        figures(normal(20, 2, 1), rows)


def test_notes_say_what_is_too_little_and_by_how_much():
    assert notes(50_000, 50_000, 2048) == [] == notes(300, 300, 64)
    (line,) = notes(500, 50_000, 2048)
    assert line.startswith("2,048 features need more than 2,048 samples for a covariance of full rank; there are 500")
    (line,) = notes(50_000, 3000, 2048)
    assert "more than 4,096 reference images" in line and "there are 3,000" in line
    assert ["rough" in line for line in notes(300, 100, 8)] == [True]
    assert any("fewer neighbours" in line for line in notes(5, 300, 2))
