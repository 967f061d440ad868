"""Line charts as inline SVG: no dependency, no script, readable on light and on dark pages.

Text and axes take the colour of the surrounding text (`currentColor`); the colours of the lines
have enough contrast on white and on black.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

COLOURS = ("#2f7ed8", "#e07b39", "#3f9b57", "#b255c4", "#c9485b", "#8a8f2b", "#2aa0a4", "#8d6e63")
DASHES = ("none", "6 3", "1.5 2.5", "8 3 2 3")  # as SVG knows them; the first is a whole line
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 24, 42  # margins round the plotting area, pixels
_LEGEND_ROW = 15  # pixels
_POINTS = 400  # a line of more points is drawn through the means of that many groups
_MARKED = 24  # a line of fewer points shows them


class Series(NamedTuple):
    """One line of a chart. Points whose x or y is None or not finite are left out."""

    name: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None  # ends of a band round the line
    high: Sequence[float | None] | None = None
    smooth: int = 1  # points of a moving mean; the points themselves are then drawn faintly
    colour: int | None = None  # index into COLOURS; by default the place in the chart
    dash: int = 0  # index into DASHES


class Point(NamedTuple):
    """A finite point of a series, or the mean of several."""

    x: float
    y: float
    low: float
    high: float


class Line(NamedTuple):
    """A series that has points, and its colour."""

    name: str
    colour: str
    points: list[Point]
    smooth: int
    dash: str  # as SVG knows it


class Frame(NamedTuple):
    """The plotting area in pixels, and the range of values that it shows."""

    left: float
    right: float
    top: float
    bottom: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        across = (x - self.x_low) / (self.x_high - self.x_low)
        up = (y - self.y_low) / (self.y_high - self.y_low)
        return (
            round(self.left + across * (self.right - self.left), 1),
            round(self.bottom - up * (self.bottom - self.top), 1),
        )


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str = "",
    width: int = 560,
    height: int = 300,
    percent: bool = False,
) -> str:
    """A chart of several lines with axes, ticks, a legend and optional bands.

    Args:
        series: the lines, in the order of their colours; those without a finite point are left out.
        title: what is shown, printed above.
        x_label: name and unit of the horizontal axis.
        y_label: name and unit of the vertical axis.
        width: pixels; the picture scales down with the page.
        height: pixels.
        percent: show shares as per cent.

    Returns:
        An `<svg>` element as text, or "" if no line has a point.

    >>> chart = line_chart([Series("SAGE", [0, 1], [0.4, 0.6])], title="Accuracy", x_label="steps")
    >>> chart.startswith("<svg"), "40%" in chart
    (True, False)
    >>> line_chart([], title="Accuracy", x_label="steps")
    ''
    """
    lines = [
        Line(s.name, _colour(i, s), points, s.smooth, DASHES[s.dash % len(DASHES)])
        for i, s in enumerate(series)
        if (points := _points(s))
    ]
    if not lines:
        return ""
    legend, rows = _legend(lines, width) if len(lines) > 1 else ("", 0)
    every = [point for line in lines for point in line.points]
    x_ticks = ticks(min(p.x for p in every), max(p.x for p in every), 6)
    y_ticks = ticks(min(p.low for p in every), max(p.high for p in every), 5)
    x_low, x_high = min(p.x for p in every), max(p.x for p in every)
    if x_low == x_high:
        x_low, x_high = x_ticks[0], x_ticks[-1]
    frame = Frame(
        _LEFT, width - _RIGHT, _TOP + _LEGEND_ROW * rows, height - _BOTTOM,
        x_low, x_high, y_ticks[0], y_ticks[-1],
    )  # fmt: skip
    return "".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{html.escape(title)}" font-size="11" '
        'font-family="system-ui, sans-serif" fill="currentColor">',
        f'<text x="{_LEFT}" y="14" font-size="13" font-weight="600">{html.escape(title)}</text>',
        legend,
        _axes(frame, x_ticks, y_ticks, percent),
        _text((frame.left + frame.right) / 2, height - 8, x_label, "middle", 0.75),
        _upright(12, (frame.top + frame.bottom) / 2, y_label) if y_label else "",
        *(_line(line, frame, percent) for line in lines),
        "</svg>",
    ])  # fmt: skip


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` of them.

    >>> ticks(0.0, 97.0, 5)
    [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    >>> ticks(3.0, 3.0, 5)
    [2.0, 3.0, 4.0]
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        step = 10.0 ** math.floor(math.log10(abs(low))) if low else 1.0
    else:
        rough = (high - low) / count
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        first, last = first - 1, last + 1
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]  # 0.3, not 0.30000000000004


def labels(values: Sequence[float], percent: bool = False) -> list[str]:
    """Ticks as text, all with the same decimals and the same magnitude.

    >>> labels([0.0, 0.05, 0.1]), labels([0, 5e11, 1e12]), labels([0.4, 0.6], percent=True)
    (['0.00', '0.05', '0.10'], ['0', '500G', '1000G'], ['40%', '60%'])
    """
    largest = max(abs(v) for v in values)
    scale, suffix = (0.01, "%") if percent else (1.0, "")
    if not percent and largest >= 10_000:
        for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
            if largest >= 2 * 10.0**power:
                scale, suffix = 10.0**power, letter
                break
    if not percent and 0 < largest < 1e-3:
        return ["0" if v == 0 else f"{v:.1e}".replace("e-0", "e-") for v in values]
    gap = (values[1] - values[0]) / scale if len(values) > 1 else 1.0
    decimals = next(d for d in range(12) if d == 11 or abs(round(gap, d) - gap) < 1e-3 * gap)
    return ["0" if v == 0 and suffix else f"{v / scale:.{decimals}f}{suffix}" for v in values]


def _points(series: Series) -> list[Point]:
    """The finite points, thinned to a number that can be drawn."""
    low = series.y if series.low is None else series.low
    high = series.y if series.high is None else series.high
    rows = []
    for x, y, bottom, top in zip(series.x, series.y, low, high, strict=True):
        if x is None or y is None or not (math.isfinite(x) and math.isfinite(y)):
            continue
        ends = [y if end is None or not math.isfinite(end) else end for end in (bottom, top)]
        rows.append(Point(x, y, *ends))
    if len(rows) <= _POINTS:
        return rows
    edges = [round(i * len(rows) / _POINTS) for i in range(_POINTS + 1)]
    return [_mean(rows[a:b]) for a, b in itertools.pairwise(edges)]


def _mean(points: Sequence[Point]) -> Point:
    return Point(*(sum(column) / len(points) for column in zip(*points, strict=True)))


def _smoothed(points: list[Point], window: int) -> list[Point]:
    """Moving means over whole windows: shorter at the ends, where fewer points would be noise."""
    window = min(window, len(points))
    return [_mean(points[i : i + window]) for i in range(len(points) - window + 1)]


def _colour(place: int, series: Series) -> str:
    return COLOURS[(place if series.colour is None else series.colour) % len(COLOURS)]


def _line(line: Line, frame: Frame, percent: bool) -> str:
    points = line.points
    upper = [frame.place(p.x, p.high) for p in points]
    lower = [frame.place(p.x, p.low) for p in points]
    drawn = ""
    if upper != lower:
        outline = " ".join(f"{x},{y}" for x, y in upper + lower[::-1])
        drawn += f'<polygon points="{outline}" fill="{line.colour}" fill-opacity="0.15"/>'
    if line.smooth > 1:
        drawn += _way(points, frame, line, 1.0, 0.3)
        return drawn + _way(_smoothed(points, line.smooth), frame, line, 2.0, 1.0)
    drawn += _way(points, frame, line, 1.8, 1.0)
    for point in points if len(points) <= _MARKED else ():
        x, y = frame.place(point.x, point.y)
        shown = f"{100 * point.y:.1f}%" if percent else f"{point.y:.4g}"
        text = html.escape(f"{line.name}: {shown} at {point.x:.6g}")
        drawn += (
            f'<circle cx="{x}" cy="{y}" r="2.6" fill="{line.colour}"><title>{text}</title></circle>'
        )
    return drawn


def _way(points: list[Point], frame: Frame, line: Line, width: float, opacity: float) -> str:
    places = " ".join(f"{x},{y}" for x, y in (frame.place(p.x, p.y) for p in points))
    return (
        f'<polyline points="{places}" fill="none" stroke="{line.colour}" '
        f'stroke-width="{width}" stroke-opacity="{opacity}" stroke-dasharray="{line.dash}" '
        'stroke-linejoin="round"/>'
    )


def _axes(frame: Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], percent: bool) -> str:
    drawn = _rule(frame.left, frame.bottom, frame.right, frame.bottom, 0.6)
    for value, label in zip(y_ticks, labels(y_ticks, percent), strict=True):
        _, y = frame.place(frame.x_low, value)
        drawn += _rule(frame.left, y, frame.right, y, 0.14)
        drawn += _text(frame.left - 6, y + 4, label, "end")
    for value, label in zip(x_ticks, labels(x_ticks), strict=True):
        if frame.x_low <= value <= frame.x_high:
            x, _ = frame.place(value, frame.y_low)
            drawn += _rule(x, frame.bottom, x, frame.bottom + 4, 0.6)
            drawn += _text(x, frame.bottom + 16, label, "middle")
    return drawn


def _rule(x1: float, y1: float, x2: float, y2: float, opacity: float) -> str:
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="currentColor" '
        f'stroke-opacity="{opacity}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, opacity: float = 0.9) -> str:
    return (
        f'<text x="{round(x, 1)}" y="{y}" text-anchor="{anchor}" opacity="{opacity}">'
        f"{html.escape(text)}</text>"
    )


def _upright(x: float, y: float, text: str) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="middle" opacity="0.75" '
        f'transform="rotate(-90 {x} {y})">{html.escape(text)}</text>'
    )


def _legend(lines: Sequence[Line], width: int) -> tuple[str, int]:
    """The names under the title, in as many rows as they need; and how many those are."""
    drawn, left, row = "", float(_LEFT), 1
    for line in lines:
        name = line.name if len(line.name) <= 40 else line.name[:39] + "…"
        wide = 20 + 6.3 * len(name)
        if left > _LEFT and left + wide > width - _RIGHT:
            left, row = float(_LEFT), row + 1
        y = 14 + _LEGEND_ROW * row
        drawn += (
            f'<line x1="{round(left, 1)}" y1="{y - 4}" x2="{round(left + 14, 1)}" y2="{y - 4}" '
            f'stroke="{line.colour}" stroke-width="3" stroke-dasharray="{line.dash}"/>'
        )
        drawn += _text(left + 19, y, name, "start")
        left += wide + 14
    return drawn, row
