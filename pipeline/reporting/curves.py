"""Curves of a run → SVG of at most `MOST` points a line, readable at the width of a phone. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

MOST = 500
"""Points of a line."""
Points = Sequence[tuple[float, float]]
"""(step, value), finite, in ascending order of the step."""
_WIDTH, _HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 10, 28
_LINEAR = 8
"""Largest ratio of values that is drawn on a linear axis."""


@dataclass(frozen=True)
class Chart:
    """Lines over the steps of a run, with an interval around each that has one."""

    title: str
    lines: Mapping[str, Points]
    """Name → points."""
    bands: Mapping[str, tuple[Points, Points]]
    """Name of a line → its lower and upper ends."""
    may_be_log: bool = False
    """Whether the vertical axis is logarithmic if the values span much."""


def thinned(points: Points, most: int = MOST) -> list[tuple[float, float]]:
    """At most `most` points: of equal numbers of neighbours the means of steps and of values."""
    if len(points) <= most:
        return list(points)
    bounds = [round(i * len(points) / most) for i in range(most + 1)]
    parts = [points[start:end] for start, end in pairwise(bounds)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


class _Axes:
    """From values to places in the picture."""

    def __init__(self, points: Points, may_be_log: bool) -> None:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        self.left, self.right = min(xs), max(xs)
        self.is_log = may_be_log and min(ys) > 0 and max(ys) / min(ys) > _LINEAR
        low, high = (math.log10(min(ys)), math.log10(max(ys))) if self.is_log else (min(ys), max(ys))
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        self.low, self.high = low - margin, high + margin
        if not self.is_log and min(ys) >= 0 > self.low:
            self.low = 0.0

    def x(self, step: float) -> float:
        share = (step - self.left) / (self.right - self.left) if self.right > self.left else 0.5
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        place = math.log10(value) if self.is_log else value
        return round(_TOP + (self.high - place) / (self.high - self.low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    def marks(self) -> Iterator[float]:
        """Values at which a line crosses the picture."""
        if not self.is_log:
            yield from _round_values(self.low, self.high, 5)
            return
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for decade in decades:
            for digit in (1, 2, 5) if len(decades) < 5 else (1,):
                if self.low <= math.log10(digit) + decade <= self.high:
                    yield digit * 10.0**decade


def svg(chart: Chart) -> str:
    """The chart as an SVG element; classes `l0`, `l1`, … give the colours of the lines."""
    lines = {name: thinned(points) for name, points in chart.lines.items() if points}
    bands = {name: tuple(map(thinned, ends)) for name, ends in chart.bands.items() if name in lines}
    ends = (point for band in bands.values() for end in band for point in end)
    axes = _Axes([*(point for line in lines.values() for point in line), *ends], chart.may_be_log)
    parts = [*_grid(axes)]
    for i, (name, points) in enumerate(lines.items()):
        if name in bands:
            low, high = bands[name]
            parts.append(f'<polygon class="l{i} band" points="{_path(axes, [*low, *reversed(high)])}"/>')
        if len(points) > 1:
            parts.append(f'<polyline class="l{i}" points="{_path(axes, points)}"/>')
        if len(points) <= 30:
            parts += [f'<circle class="l{i}" cx="{axes.x(x)}" cy="{axes.y(y)}" r="2.5"/>' for x, y in points]
    label = f"{chart.title}: {', '.join(lines)}, over the steps"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'{"".join(parts)}<line class="cursor" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" visibility="hidden"/></svg>'
    )


def data(chart: Chart) -> dict[str, Any]:
    """The points of a chart as JSON values, for the line of text under it that follows the pointer."""
    lines = {name: thinned(points) for name, points in chart.lines.items() if points}
    axes = _Axes([point for line in lines.values() for point in line], chart.may_be_log)
    rounded = {name: [[round(x), float(f"{y:.5g}")] for x, y in line] for name, line in lines.items()}
    ends = {"first": axes.left, "last": axes.right, "from": axes.x(axes.left), "to": axes.x(axes.right)}
    return ends | {"lines": rounded}


def number(value: float) -> str:
    """A number for people: three digits, thousands and millions as 12k and 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1000 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _grid(axes: _Axes) -> Iterator[str]:
    for value in axes.marks():
        y = axes.y(value)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{_LEFT - 5}" y="{y + 4}" text-anchor="end">{number(value)}</text>'
    for step in _round_values(axes.left, axes.right, 6):
        yield f'<text x="{axes.x(step)}" y="{_HEIGHT - 10}" text-anchor="middle">{number(step)}</text>'


def _path(axes: _Axes, points: Points) -> str:
    return " ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in points)


def _round_values(low: float, high: float, most: int) -> Iterator[float]:
    """At most about `most` round numbers in a range: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        yield low
        return
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * most >= high - low)
    for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        yield i * step
