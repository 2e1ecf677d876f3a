"""Charts: thinning keeps what matters, axes are round, gaps stay gaps, labels do not collide."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infir2.evaluate.statistics import Evaluation
from infir2.report.accuracy import interval_plot
from infir2.report.axes import Axis, linear_ticks, log_ticks, nice_step
from infir2.report.chart import (
    Chart,
    Series,
    _spread,
    figure,
    line_svg,
    smooth,
    thin,
)
from infir2.report.text import compact, duration, percent

STEPS = np.arange(1.0, 5001.0)


def paths(svg: str, style: str = "line") -> list[ElementTree.Element]:
    return [
        node
        for node in ElementTree.fromstring(svg).iter("path")
        if node.get("class", "").startswith(f"{style} ")
    ]


def test_thinning_keeps_ends_extremes_and_gaps() -> None:
    y = np.sin(STEPS / 300)
    y[1234], y[2345], y[4000:4100] = 9.0, -9.0, np.nan
    x, thinned = thin(STEPS, y, 300)
    assert len(x) < 330
    assert (x[0], x[-1]) == (1.0, 5000.0)
    assert (np.nanmax(thinned), np.nanmin(thinned)) == (9.0, -9.0)
    assert np.isnan(thinned).any()
    assert not np.isfinite(thinned[(x > 4001) & (x < 4100)]).any()


def test_smoothing_is_a_centred_mean_that_leaves_gaps() -> None:
    y = np.array([1.0, 2.0, np.nan, 4.0, 6.0])
    np.testing.assert_allclose(smooth(y, 3), [1.5, 1.5, np.nan, 5.0, 5.0])
    np.testing.assert_array_equal(smooth(y, 1), y)


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_round_inside_and_not_too_many(low: float, span: float, count: int) -> None:
    step = nice_step(span, count)
    assert round(float(f"{step:e}".split("e")[0]), 9) in (1.0, 2.0, 5.0)
    assert len(linear_ticks(low, low + span, count)) <= count + 1


def test_log_ticks() -> None:
    np.testing.assert_allclose(log_ticks(8e-6, 2.0), [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1])
    np.testing.assert_allclose(log_ticks(0.9, 30), [1, 2, 5, 10, 20])


def test_a_line_is_broken_at_gaps_and_a_lone_value_is_a_dot() -> None:
    y = np.array([1.0, 2.0, np.nan, 3.0, np.nan, 4.0, 5.0] + [1.0] * 40)
    (path,) = paths(line_svg(Chart("t", (Series("s", np.arange(47.0), y),)), 360, 220, 400))
    assert re.sub(r"[^MLh]", "", path.get("d", ""))[:7] == "MLMhMLL"
    assert len(path.get("data-y", "").split()) == 45
    assert np.cumsum([int(step) for step in path.get("data-x", "").split()]).tolist() == [
        0,
        1,
        3,
        *range(5, 47),
    ]


def test_vertices_stay_inside_the_axes() -> None:
    chart = Chart("t", (Series("a", STEPS, np.exp(STEPS / 500)), Series("b", STEPS, -STEPS)))
    svg = line_svg(chart, 360, 220, 200)
    left, top, right, bottom = map(
        float, (ElementTree.fromstring(svg).get("data-area") or "").split()
    )
    for path in paths(svg):
        vertices = np.array(re.findall(r"([\d.-]+) ([\d.-]+)", path.get("d", "")), dtype=float)
        assert ((vertices >= [left, top]) & (vertices <= [right, bottom])).all()


def test_a_log_axis_leaves_out_what_has_no_logarithm() -> None:
    y = np.array([1e-5, 0.0, -1e-9, 1e-3] * 20)
    (path,) = paths(
        line_svg(Chart("t", (Series("s", np.arange(80.0), y),), scale="log"), 360, 220, 400)
    )
    assert len(path.get("data-y", "").split()) == 40


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-12, 1e38])
@pytest.mark.parametrize("scale", ["linear", "log", "auto"])
def test_flat_and_single_values_have_axes(value: float, scale: str) -> None:
    for y in (np.array([value]), np.array([value, value, np.nan])):
        svg = line_svg(
            Chart("t", (Series("s", np.arange(1.0, len(y) + 1), y),), scale=scale), 360, 220, 400
        )  # type: ignore[arg-type]
        assert "nan" not in svg
        assert "inf" not in svg


def test_labels_are_spread_in_order_inside_the_chart() -> None:
    placed = _spread([100.0, 101.0, 99.0, 180.0, 181.0], 10, 186)
    assert sorted(range(5), key=placed.__getitem__) == [2, 0, 1, 3, 4]
    assert min(np.diff(sorted(placed))) >= 13
    assert max(placed) <= 186


def test_an_outlier_turns_an_auto_axis_logarithmic() -> None:
    spike = np.where(STEPS == 10, 5000.0, 0.8)
    texts = [
        node.text
        for node in ElementTree.fromstring(
            line_svg(Chart("t", (Series("s", STEPS, spike),), scale="auto"), 360, 220, 90)
        ).iter("text")
    ]
    assert {"1", "10", "100", "1,000"} <= set(texts)


def test_a_figure_escapes_names_and_has_a_legend_and_a_table() -> None:
    series = (Series("<b>&", STEPS, STEPS), Series("two", STEPS, STEPS, 1))
    html = figure(Chart('a "<i>" chart', series), 100)
    assert "<b>" not in html
    assert "<i>" not in html
    assert html.count('class="key ') == 2
    assert html.count("<tr>") == 1 + 12
    assert 'role="img" aria-label="a &quot;&lt;i&gt;&quot; chart: ' in html


def scores(mean: float, low: float, high: float, best: float) -> Evaluation:
    return Evaluation(mean, low, high, 8, best, mean, 20, 0.0, 0.0, 0.0, 10.0, 20.0, {})


def test_intervals_are_cut_at_the_ends_of_the_scale() -> None:
    html = [
        interval_plot(scores(*values))
        for values in ((0.01, -0.04, 0.06, math.nan), (0.99, 0.94, 1e100, 1.0))
    ]
    bars = [
        tuple(map(float, re.findall(r"[\d.]+(?=%)", bar)))
        for bar in re.findall(r'class="bar" style="([^"]+)"', "".join(html))
    ]
    assert bars == [(0.0, 6.0), (94.0, 6.0)]
    assert [cell.count('class="ring"') for cell in html] == [0, 1]
    unknown = interval_plot(scores(math.nan, math.nan, math.nan, math.nan))
    assert unknown.count("<i") == 0


def test_an_axis_places_its_ends() -> None:
    assert Axis(1.0, 100.0, 0.0, 200.0, log=True).position(10.0) == pytest.approx(100.0)
    assert Axis(0.0, 4.0, 180.0, 20.0).position(1.0) == pytest.approx(140.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.23456, "1.235"),
        (0.123456, "0.123"),
        (-2e-5, "−2e−5"),
        (9999, "9,999"),
        (999_999, "1000 k"),
        (1.6e11, "160 B"),
        (float("nan"), "–"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert compact(value) == text


def test_percentages_and_durations() -> None:
    assert (percent(-0.0123, 2), percent(float("nan"))) == ("−1.23 %", "–")
    assert [duration(seconds) for seconds in (40, 720, 7_500, 5_980, 864_000)] == [
        "40 s",
        "12 min",
        "2 h 05 min",
        "1 h 40 min",
        "10.0 days",
    ]
