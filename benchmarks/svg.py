"""Lines and words of the plots, which are SVG written by hand."""

from __future__ import annotations

import math
from html import escape

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195")
Point = tuple[float, float]
Measured = tuple[float, float, float, float]
"""x, value, and the ends of its interval."""
WIDTH, HEIGHT, LEFT, TOP = 520, 300, 62, 40


def line(points: list[Point], color: str, width: float, more: str = "") -> str:
    """Through the points; `more` are attributes."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" {more}/>'


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    """At a point; `more` are attributes."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>'


def document(width: float, height: float, parts: list[str]) -> str:
    """The file."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#fff"/>', *parts, "</svg>\n"])


def with_intervals(series: dict[str, list[Measured]], across: str, up: str) -> str:
    """Lines from the origin of both axes, their intervals as bars.

    Args:
        series: name → points, in order.
        across: title of the axis of x, whose ticks are 5 apart.
        up: title of the axis of the values.
    """
    points = [point for points_of in series.values() for point in points_of]
    most, longest = max(high for *_, high in points) * 1.05, max(x for x, *_ in points) * 1.03

    def at(x: float, value: float) -> Point:
        return LEFT + x / longest * WIDTH, TOP + (1 - value / most) * HEIGHT

    turned = f'transform="translate(15 {TOP + HEIGHT / 2}) rotate(-90)"'
    parts = [text(0, 0, up, more=turned), text(LEFT + WIDTH / 2, TOP + HEIGHT + 37, across)]
    unit = 10 ** round(math.log10(most) - 0.8)
    for tick in range(int(most / unit) + 1):
        parts.append(line([at(0, tick * unit), at(longest, tick * unit)], "#e4e4e4", 1))
        parts.append(text(LEFT - 7, at(0, tick * unit)[1] + 4, f"{tick * unit:g}", "end"))
    parts += [text(at(x, 0)[0], TOP + HEIGHT + 17, str(x)) for x in range(0, int(longest) + 1, 5)]
    for i, (name, color) in enumerate(zip(series, COLORS)):
        parts.append(line([at(x, value) for x, value, _, _ in series[name]], color, 2))
        parts += [line([at(x, low), at(x, high)], color, 5, 'opacity="0.45"') for x, _, low, high in series[name]]
        left = LEFT + i * 110
        parts += [line([(left, 20), (left + 22, 20)], color, 2), text(left + 28, 24, name, "start")]
    parts.append(f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#555"/>')
    return document(LEFT + WIDTH + 20, TOP + HEIGHT + 50, parts)
