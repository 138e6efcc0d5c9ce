"""Charts: few points that keep the shape, round marks, everything within the picture."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pipeline.reporting import curves
from pipeline.reporting.curves import MOST, Chart, number, svg, thinned


@pytest.mark.parametrize("count", [1, MOST, MOST + 1, 7777])
def test_a_long_curve_becomes_means_of_equally_many_neighbours(count: int) -> None:
    points = [(float(10 * i), float(i % 7)) for i in range(count)]
    few = thinned(points)
    assert len(few) == min(count, MOST) and few == sorted(few)
    sizes = np.diff([round(i * count / len(few)) for i in range(len(few) + 1)])
    assert np.average([y for _, y in few], weights=sizes) == pytest.approx(np.mean([y for _, y in points]))
    assert np.average([x for x, _ in few], weights=sizes) == pytest.approx(np.mean([x for x, _ in points]))


@pytest.mark.parametrize(
    "values",
    [[0.0], [5.0, 5.0, 5.0], [-3.0, 4.0], [1e-9, 1e9], [0.0, 1e-30], [1e300, -1e300], [0.02, 1.0, 0.03]],
)
def test_every_point_lies_within_the_picture(values: list[float]) -> None:
    line = [(float(step), value) for step, value in enumerate(values)]
    drawn = svg(Chart("x", {"a": line}, {"a": (line, line)}, may_be_log=True))
    places = [
        tuple(map(float, pair.split(","))) for text in re.findall(r'points="([^"]*)"', drawn) for pair in text.split()
    ]
    places += [(float(x), float(y)) for x, y in re.findall(r'cx="([^"]+)" cy="([^"]+)"', drawn)]
    assert places and all(50 <= x <= 386 and 10 <= y <= 202 for x, y in places)
    assert "nan" not in drawn and "inf" not in drawn


def test_higher_is_drawn_higher_on_both_kinds_of_axis() -> None:
    for values in ([1.0, 2.0, 3.0], [0.001, 0.1, 10.0]):
        drawn = svg(Chart("x", {"a": list(enumerate(values))}, {}, may_be_log=True))
        heights = [float(y) for y in re.findall(r'cy="([^"]+)"', drawn)]
        assert heights == sorted(heights, reverse=True) and len(set(heights)) == 3
        assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)  # evenly, also as logarithms


def test_marks_are_round_and_few() -> None:
    for low, high in ((0.0, 1.0), (3.0, 97.0), (0.0, 450.0), (-2e-5, 7e-5), (0.0, 6e5)):
        marks = list(curves._round_values(low, high, 5))
        assert 2 <= len(marks) <= 7 and low - 1e-12 <= marks[0] and marks[-1] <= high * (1 + 1e-9)
        digits = {f"{np.diff(marks)[0]:.6e}"[0]}
        assert digits <= {"1", "2", "5"}


def test_numbers_are_short() -> None:
    assert [number(value) for value in (0.00012345, 0.5, 123.456, 4567.0, 12345.0, 3e6)] == [
        "0.000123", "0.5", "123", "4567", "12.3k", "3M",
    ]  # fmt: skip
