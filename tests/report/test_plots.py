"""Charts: well-formed SVG in which a known point lies where it should."""

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from sage_jax.report import plots

SVG = "{http://www.w3.org/2000/svg}"


def draw(series, **settings):
    text = plots.line_chart(series, title="T", x_label="steps", **settings)
    return ElementTree.fromstring(text)


def ways(svg):
    return [
        [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
        for line in svg.iter(f"{SVG}polyline")
    ]


def texts(svg):
    return [element.text for element in svg.iter(f"{SVG}text")]


def test_equal_distances_in_the_data_are_equal_distances_in_pixels():
    svg = draw([plots.Series("a", [0, 1, 2, 4], [0.0, 0.25, 0.5, 1.0])])
    (way,) = ways(svg)
    x, y = np.array(way).T
    np.testing.assert_allclose(np.diff(x) / (x[1] - x[0]), [1, 1, 2], atol=0.01)
    np.testing.assert_allclose(np.diff(y) / (y[1] - y[0]), [1, 1, 2], atol=0.01)
    assert y[0] > y[-1]  # larger values are higher up
    assert x.min() >= 0
    assert x.max() <= 560
    assert y.min() >= 0
    assert y.max() <= 300


def test_axes_name_title_units_and_lines():
    series = [plots.Series("SAGE <x>", [0, 10], [0.4, 0.6]), plots.Series("b", [0, 5], [0.4, 0.5])]
    found = texts(draw(series, y_label="nats", percent=True))
    assert {"T", "steps", "nats", "SAGE <x>", "b", "40%", "60%", "10"} <= set(found)


def test_one_line_needs_no_legend():
    assert "only" not in texts(draw([plots.Series("only", [0, 1], [0, 1])]))


def test_points_that_are_missing_or_not_finite_are_left_out():
    nan, inf = math.nan, math.inf
    y = [1.0, None, nan, inf, 2.0, 3.0]
    (way,) = ways(draw([plots.Series("a", [0, 1, 2, 3, 4, None], y)]))
    assert len(way) == 2
    assert plots.line_chart([plots.Series("a", [0], [nan])], title="", x_label="") == ""


@pytest.mark.parametrize("value", [0.0, 0.6931, -3e-7, 12345.6])
def test_a_constant_or_a_single_point_has_a_picture(value):
    draw([plots.Series("a", [5], [value])])
    (way,) = ways(draw([plots.Series("a", [5, 6], [value, value])]))
    assert way[0][1] == way[1][1]


def test_a_band_encloses_its_line():
    svg = draw([plots.Series("a", [0, 1], [0.5, 0.6], low=[0.4, 0.5], high=[0.6, 0.75])])
    (polygon,) = svg.iter(f"{SVG}polygon")
    outline = [tuple(map(float, p.split(","))) for p in polygon.get("points").split()]
    (way,) = ways(svg)
    for (x, y), upper, lower in zip(way, outline[:2], outline[:1:-1], strict=True):
        assert upper[0] == lower[0] == x
        assert upper[1] < y < lower[1]


def test_a_long_line_is_thinned_to_group_means():
    y = np.random.default_rng(0).normal(size=20_000)
    (way,) = ways(draw([plots.Series("a", np.arange(20_000), y)]))
    assert len(way) == 400


def test_smoothing_keeps_a_straight_line_and_shows_the_raw_one():
    x = np.arange(101.0)
    raw, smooth = ways(draw([plots.Series("a", x, 3 * x, smooth=21)]))
    np.testing.assert_allclose(raw[10:-10], smooth, atol=0.11)


def test_many_names_wrap_inside_the_picture():
    series = [plots.Series(f"stratum {i} of eight", [0, 1], [0, i]) for i in range(8)]
    svg = draw(series)
    marks = [float(line.get("x1")) for line in svg.iter(f"{SVG}line") if line.get("stroke-width")]
    assert len(marks) == 8
    assert max(marks) < 480


@pytest.mark.parametrize("low", [-1e6, -3.3, 0.0, 1e-9, 0.4999, 7e14])
@pytest.mark.parametrize("span", [1e-6, 0.003, 1.0, 77.0, 4e12])
def test_ticks_are_even_cover_the_range_and_read_differently(low, span):
    values = plots.ticks(low, low + span, 5)
    assert values[0] <= low + 1e-9 * span
    assert values[-1] >= low + span - 1e-9 * span - 1e-12 * abs(low)
    if abs(low) < 1e6 * span:  # else nobody can read the difference
        np.testing.assert_allclose(np.diff(values), values[1] - values[0], rtol=1e-3)
        assert len(set(plots.labels(values))) == len(values)
        assert len(values) <= 8


def test_a_constant_gets_round_ticks():
    assert plots.labels(plots.ticks(-1.2, -1.2, 5)) == ["-2", "-1"]
    assert plots.labels(plots.ticks(0.6931, 0.6931, 5)) == ["0.6", "0.7"]


def test_lines_can_share_a_colour_and_differ_in_dashes():
    one, two = plots.Series("a", [0, 1], [0, 1]), plots.Series("b", [0, 1], [1, 0])
    svg = draw([one, two._replace(colour=0, dash=1)])
    plain, dashed = svg.iter(f"{SVG}polyline")
    assert plain.get("stroke") == dashed.get("stroke") == plots.COLOURS[0]
    assert plain.get("stroke-dasharray") == "none" != dashed.get("stroke-dasharray")
