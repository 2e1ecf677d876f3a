"""Charts as inline SVG: lines over steps. Colors and fonts come from style.css.

A unit of a viewBox is about one CSS pixel at the size of the chart, so that text stays readable on
a phone. Lines are thinned to a number of points that keeps the minimum and the maximum of every
bucket, and broken where values are NaN. hover.js reads `data-x` (differences of steps) and `data-y`
(values) of a line; the table below a chart has the values for readers without scripts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

from infir2.report.text import compact, html_table, percent

LEFT, TOP, BOTTOM, LABEL_GAP, CHARACTER = 46, 10, 34, 13, 7.0
TABLE_ROWS = 12
MARKED_POINTS = 30  # a line with at most this many points shows each as a dot
LOG_RATIO = 8  # an auto axis is logarithmic if the maximum is this many times the median


@dataclass(frozen=True)
class Series:
    """One line: integer steps x [n] and values y float64 [n], NaN for a gap.

    `color` is an index into the palette of style.css; `low` and `high` [n] are ends of intervals.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int = 0
    style: Literal["line", "dashed", "faint", "points"] = "line"
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    @property
    def finite(self) -> np.ndarray:
        return self.y[np.isfinite(self.y)]

    @property
    def reach(self) -> np.ndarray:
        """Finite values and the ends of their intervals."""
        if self.low is None or self.high is None:
            return self.finite
        ends = np.concatenate([self.y, self.low, self.high])
        return ends[np.isfinite(ends)]


@dataclass(frozen=True)
class Chart:
    """Several lines over the same x.

    `scale="auto"` is logarithmic if the largest values would otherwise flatten the rest. `marks`
    are (step, text) of triangles on the x axis.
    """

    title: str
    series: tuple[Series, ...]
    unit: str = ""
    scale: Literal["linear", "log", "auto"] = "linear"
    percent: bool = False
    from_zero: bool = False
    marks: tuple[tuple[float, str], ...] = ()
    note: str = ""

    @property
    def drawable(self) -> bool:
        return any(len(series.finite) for series in self.series)

    @property
    def reach(self) -> np.ndarray:
        return np.concatenate([series.reach for series in self.series])

    @property
    def is_log(self) -> bool:
        values = self.reach
        if self.scale == "auto":
            return bool((values > 0).all() and values.max() > LOG_RATIO * np.median(values))
        return self.scale == "log" and bool((values > 0).any())

    def text(self, value: float) -> str:
        return percent(value, 2 if abs(value) < 0.01 else 1) if self.percent else compact(value)


@dataclass(frozen=True)
class Axis:
    """Maps values in [low, high] to positions in [start, end], in viewBox units."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def positions(self, values: np.ndarray) -> np.ndarray:
        low, high = self.low, self.high
        if self.log:
            values, low, high = np.log(values), math.log(low), math.log(high)
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def position(self, value: float) -> float:
        return float(self.positions(np.array([value]))[0])


def nice_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 5 x 10^n that divides `span` into at most `count` parts."""
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    step = nice_step(high - low, count)
    return [
        index * step
        for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; also 2 and 5 times a power if the range is below two decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    every = max(1, math.ceil((last - first) / 7))
    ticks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Centered mean over `window` values (odd, at most len(y)), fewer at the ends.

    NaN is left out of the means and stays NaN.
    """
    good = np.isfinite(y)
    sums, counts = (
        np.convolve(values, np.ones(window), "same")
        for values in (np.where(good, y, 0.0), good.astype(float))
    )
    return np.where(good, sums / np.maximum(counts, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """About `points` of the values: both ends, and of each bucket the extremes and one gap."""
    if len(x) <= points:
        return x, y
    keep = {0, len(x) - 1}
    for bucket in np.array_split(np.arange(len(x)), max(1, points // 2)):
        good = bucket[np.isfinite(y[bucket])]
        if len(good):
            keep |= {int(good[np.argmin(y[good])]), int(good[np.argmax(y[good])])}
        if len(good) < len(bucket):
            keep.add(int(bucket[~np.isfinite(y[bucket])][0]))
    index = np.array(sorted(keep))
    return x[index], y[index]


def _y_axis(chart: Chart, top: float, bottom: float) -> tuple[Axis, list[float]]:
    values = chart.reach
    if chart.is_log:
        low, high = float(values[values > 0].min()), float(values.max())
        low, high = (0.85 * low, 1.15 * high) if high > 3 * low else (low / 2, 2 * high)
        return Axis(low, high, bottom, top, log=True), log_ticks(low, high)
    low, high = float(values.min()), float(values.max())
    if chart.from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-12):
        low, high = low - 0.1 * abs(low), high + (0.1 * abs(high) or 1.0)
    step = nice_step(high - low, 5)
    low, high = math.floor(low / step + 1e-6) * step, math.ceil(high / step - 1e-6) * step
    return Axis(low, high, bottom, top), [
        low + index * step for index in range(round((high - low) / step) + 1)
    ]


def _tick_texts(ticks: Sequence[float], chart: Chart) -> list[str]:
    if not chart.percent:
        return [compact(float(f"{tick:.6g}")) for tick in ticks]
    digits = 1
    if len(ticks) > 1:
        digits = max(0, -math.floor(math.log10(100 * (ticks[1] - ticks[0])) + 1e-9))
    return [percent(tick, digits) for tick in ticks]


def _spread(positions: list[float], top: float, bottom: float) -> list[float]:
    """Move label positions, in any order, so that none overlap and all stay in the chart."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    spread = list(positions)
    for previous, index in zip([None, *order], order, strict=False):
        lowest = top if previous is None else spread[previous] + LABEL_GAP
        spread[index] = max(spread[index], lowest)
    limit = bottom
    for index in reversed(order):
        spread[index] = min(spread[index], limit)
        limit = spread[index] - LABEL_GAP
    return spread


def _path(series: Series, x_axis: Axis, y_axis: Axis, points: int) -> str:
    """A line, the dots of a short one, and the whiskers of its intervals."""
    x, y = thin(series.x, series.y, points)
    good = np.isfinite(y) & ((y > 0) | (not y_axis.log))
    px, py = x_axis.positions(x), y_axis.positions(np.where(good, y, y_axis.high))
    dots = "".join(f"M{px[i]:.1f} {py[i]:.1f}h0" for i in np.flatnonzero(good))
    line = dots if series.style == "points" else _line(px, py, good)
    steps = " ".join(f"{step:.0f}" for step in np.diff(x[good], prepend=0))
    values = " ".join(f"{value:.4g}" for value in y[good])
    svg = (
        f'<path class="{series.style} c{series.color}" d="{line}" '
        f'data-label="{escape(series.label)}" data-x="{steps}" data-y="{values}"/>'
    )
    if series.style in ("line", "dashed") and len(x) <= MARKED_POINTS:
        svg += f'<path class="small points c{series.color}" d="{dots}"/>'
    if series.low is not None and series.high is not None and len(x) == len(series.x):
        low, high = (
            y_axis.positions(np.clip(end, y_axis.low, y_axis.high))
            for end in (series.low, series.high)
        )
        bars = "".join(
            f"M{px[i]:.1f} {low[i]:.1f}V{high[i]:.1f}"
            for i in np.flatnonzero(np.isfinite(low + high))
        )
        svg += f'<path class="whisker c{series.color}" d="{bars}"/>'
    return svg


def _line(px: np.ndarray, py: np.ndarray, good: np.ndarray) -> str:
    """Path data of a line with gaps where `good` is false; a point between two gaps is a dot."""
    parts = []
    for i in np.flatnonzero(good):
        is_joined = i > 0 and good[i - 1]
        is_dot = not is_joined and not good[i + 1 : i + 2].any()
        command = "L" if is_joined else "M"
        parts.append(f"{command}{px[i]:.1f} {py[i]:.1f}{'h0' if is_dot else ''}")
    return "".join(parts)


def _end_labels(chart: Chart) -> list[tuple[Series, str]]:
    """The last value of every line, with its label if there are several."""
    lines = [series for series in chart.series if series.style != "faint" and len(series.finite)]
    lines = [series for series in lines if series.style != "points"] or lines
    labels = [f"{series.label} " if len(lines) > 1 else "" for series in lines]
    return [
        (series, label + chart.text(float(series.finite[-1])))
        for series, label in zip(lines, labels, strict=True)
    ]


def line_svg(chart: Chart, width: int, height: int, points: int) -> str:
    """The SVG of a chart that has a finite value; a line has at most about `points` vertices."""
    labels = _end_labels(chart)
    right, bottom = width - 12 - CHARACTER * max(len(text) for _, text in labels), height - BOTTOM
    y_axis, y_ticks = _y_axis(chart, TOP, bottom)
    steps = np.concatenate([series.x for series in chart.series])
    low, high = float(steps.min()), float(steps.max())
    margin = 0 if high > low else 1
    x_axis = Axis(low - margin, high + margin, LEFT + 4, right)
    drawn = sorted(
        chart.series, key=lambda series: ("faint", "line", "dashed", "points").index(series.style)
    )
    parts = [
        _y_ticks(chart, y_axis, y_ticks, right),
        _x_ticks(x_axis, low, high, bottom),
        f'<path class="base" d="M{LEFT} {bottom}H{right:.1f}"/>',
        f'<text class="mid" x="{(LEFT + right) / 2:.1f}" y="{height - 4}">step</text>',
        *(
            f'<path class="mark" d="M{x_axis.position(step):.1f} {bottom}l-4 7h8z">'
            f"<title>{escape(text)}</title></path>"
            for step, text in chart.marks[:200]
        ),
        *(_path(series, x_axis, y_axis, points) for series in drawn if len(series.finite)),
        _label_texts(labels, y_axis, right, bottom),
    ]
    summary = escape(f"{chart.title}: {', '.join(text for _, text in labels)}")
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{summary}" '
        f'data-area="{LEFT} {TOP} {right:.1f} {bottom}" data-percent="{int(chart.percent)}">'
        f"{''.join(parts)}</svg>"
    )


def _y_ticks(chart: Chart, axis: Axis, ticks: Sequence[float], right: float) -> str:
    parts = []
    for tick, text in zip(ticks, _tick_texts(ticks, chart), strict=True):
        y = axis.position(tick)
        parts.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}H{right:.1f}"/>'
            f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{text}</text>'
        )
    return "".join(parts)


def _x_ticks(axis: Axis, low: float, high: float, bottom: float) -> str:
    """Ticks at integer steps in [low, high]; at `low` if there is none."""
    ticks = linear_ticks(axis.low, axis.high, max(2, int((axis.end - LEFT) / 62)))
    parts = []
    for tick in [tick for tick in ticks if low <= tick <= high and tick == int(tick)] or [low]:
        x = axis.position(tick)
        parts.append(
            f'<path class="base" d="M{x:.1f} {bottom}v4"/>'
            f'<text class="mid" x="{x:.1f}" y="{bottom + 16}">{compact(tick)}</text>'
        )
    return "".join(parts)


def _label_texts(
    labels: Sequence[tuple[Series, str]], axis: Axis, right: float, bottom: float
) -> str:
    ends = [float(series.finite[-1]) for series, _ in labels]
    positions = [axis.position(end) if end > 0 or not axis.log else bottom for end in ends]
    return "".join(
        f'<text class="f{series.color} label" x="{right + 6:.1f}" y="{y + 4:.1f}">'
        f"{escape(text)}</text>"
        for (series, text), y in zip(labels, _spread(positions, TOP, bottom), strict=True)
    )


def figure(chart: Chart, points: int, wide_height: int = 0) -> str:
    """Title, legend, SVG and table of values of a chart that has a finite value.

    A chart with `wide_height` is as wide as the page. It is drawn a second time in the proportions
    of a phone, because text shrinks with its viewBox.
    """
    shown = [series for series in chart.series if series.style != "faint" and len(series.finite)]
    unit = ", ".join(filter(None, (chart.unit, "log scale" if chart.is_log else "")))
    head = f"<h4>{escape(chart.title)} <small>{escape(unit)}</small></h4>"
    if len(shown) > 1:
        keys = (
            f'<span class="key {series.style} k{series.color}">{escape(series.label)}</span>'
            for series in shown
        )
        head += f'<p class="keys">{"".join(keys)}</p>'
    svg = line_svg(chart, 1080 if wide_height else 360, wide_height or 220, points)
    if wide_height:
        narrow = line_svg(chart, 360, 270, min(points, 200))
        svg = f'<div class="wide">{svg}</div><div class="narrow">{narrow}</div>'
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    caption = f"<figcaption>{head}</figcaption>"
    return f'<figure class="card">{caption}{svg}{note}{_value_table(chart, shown)}</figure>'


def _value_table(chart: Chart, shown: Sequence[Series]) -> str:
    """The value of every line at about a dozen steps."""
    steps = np.unique(np.concatenate([series.x[np.isfinite(series.y)] for series in shown]))
    num_rows = min(TABLE_ROWS, len(steps))
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, num_rows).astype(int))]
    values = [dict(zip(series.x, series.y, strict=True)) for series in shown]
    rows = [
        [f"{step:,.0f}", *(chart.text(float(value.get(step, math.nan))) for value in values)]
        for step in steps
    ]
    table = html_table(["step", *(escape(series.label) for series in shown)], rows)
    return f'<details class="values"><summary>Values</summary>{table}</details>'
