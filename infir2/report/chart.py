"""Charts as inline SVG: lines over steps, tokens or time. Colors and fonts come from style.css.

A unit of a viewBox is about one CSS pixel at the size of the chart, so that text stays readable on
a phone. Lines are thinned to a number of points that keeps the minimum and the maximum of every
bucket, and broken where values are NaN. charts.js reads `data-x` (differences of steps), `data-y`
(values) and `data-raw` (values before smoothing) of a line, and redraws it along another axis or
with another smoothing; the table below a chart has the values for readers without scripts.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

from infir2.report.axes import Axis, Clock, linear_ticks, log_ticks, nice_step, time_unit
from infir2.report.text import compact, html_table, percent

LEFT, TOP, BOTTOM, LABEL_GAP, CHARACTER = 46, 10, 34, 13, 7.0
TABLE_ROWS = 12
MARKED_POINTS = 30  # a line with at most this many points shows each as a dot
FLAT = 1e-3  # the range of a flat line, relative to its size
LOG_RATIO = 8  # an auto axis is logarithmic if the maximum is this many times the median


@dataclass(frozen=True)
class Series:
    """One line: integer steps x [n] and values y float64 [n], NaN for a gap.

    `color` is an index into the palette of style.css; `low` and `high` [n] are ends of intervals;
    `raw` [n] are the values before smoothing, of a line that the page may smooth otherwise; `clock`
    is the run's.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int = 0
    style: Literal["line", "dashed", "faint", "points"] = "line"
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    raw: np.ndarray | None = None
    clock: Clock | None = None

    def along(self, axis: str, steps: np.ndarray) -> np.ndarray:
        """Where steps lie on an axis: as they are, by tokens or by seconds."""
        return self.clock.at(axis, steps) if self.clock else steps

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
    are (step, text) of triangles on the x axis. With `short_labels` lines end in their value alone.
    """

    title: str
    series: tuple[Series, ...]
    unit: str = ""
    scale: Literal["linear", "log", "auto"] = "linear"
    percent: bool = False
    from_zero: bool = False
    marks: tuple[tuple[float, str], ...] = ()
    note: str = ""
    axis: str = "step"
    short_labels: bool = False

    @property
    def is_flat(self) -> bool:
        """Whether no line says more than one number: each is constant to three digits."""
        drawn = [series.finite for series in self.series if series.style != "faint"]
        return all(np.ptp(y) <= FLAT * np.abs(y).max() for y in drawn if len(y))

    @property
    def summary(self) -> str:
        """Title and last values. Example: "Groups: all 24, all right 6"."""
        return f"{self.title}: {', '.join(text for _, text in _end_labels(self))}"

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


def bucket_means(x: np.ndarray, y: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The mean of finite y [n] around each x that is kept [m], ascending; NaN for none. [m]"""
    good = np.isfinite(y)
    nearest = np.searchsorted((kept[1:] + kept[:-1]) / 2, x[good])
    counts = np.bincount(nearest, minlength=len(kept))
    sums = np.bincount(nearest, y[good], minlength=len(kept))
    return np.divide(sums, counts, out=np.full(len(kept), np.nan), where=counts > 0)


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _path(series: Series, axis: str, x_axis: Axis, y_axis: Axis, points: int) -> str:
    """A line, the dots of a short one, and the whiskers of its intervals."""
    x, y = thin(series.x, series.y, points)
    good = np.isfinite(y) & ((y > 0) | (not y_axis.log))
    px, py = (
        x_axis.positions(series.along(axis, x)),
        y_axis.positions(np.where(good, y, y_axis.high)),
    )
    dots = "".join(f"M{px[i]:.1f} {py[i]:.1f}h0" for i in np.flatnonzero(good))
    line = dots if series.style == "points" else _line(px, py, good)
    steps = _steps(x[good], series)
    data = f'{steps} data-label="{escape(series.label)}" data-y="{_numbers(y[good])}"'
    if series.raw is not None:
        means = bucket_means(series.x, series.raw, x)[good]
        data += f' data-raw="{_numbers(np.where(np.isfinite(means), means, y[good]))}"'
    svg = f'<path class="{series.style} c{series.color}" d="{line}"{data}/>'
    if series.style in ("line", "dashed") and len(x) <= MARKED_POINTS:
        svg += f'<path class="small points c{series.color}" d="{dots}"{steps}/>'
    return svg + _whiskers(series, px, y_axis)


def _steps(x: np.ndarray, series: Series) -> str:
    """Attributes: differences of the steps of a path's points, and the run."""
    steps = " ".join(f"{step:.0f}" for step in np.diff(x, prepend=0))
    run = f' data-run="{escape(series.clock.name)}"' if series.clock else ""
    return f' data-x="{steps}"{run}'


def _whiskers(series: Series, px: np.ndarray, y_axis: Axis) -> str:
    if series.low is None or series.high is None or len(px) != len(series.x):
        return ""
    low, high = (
        y_axis.positions(np.clip(end, y_axis.low, y_axis.high)) for end in (series.low, series.high)
    )
    good = np.isfinite(low + high)
    bars = "".join(f"M{px[i]:.1f} {low[i]:.1f}V{high[i]:.1f}" for i in np.flatnonzero(good))
    return f'<path class="whisker c{series.color}" d="{bars}"{_steps(series.x[good], series)}/>'


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
    named = len(lines) > 1 and not chart.short_labels
    labels = [f"{series.label} " if named else "" for series in lines]
    return [
        (series, label + chart.text(float(series.finite[-1])))
        for series, label in zip(lines, labels, strict=True)
    ]


def line_svg(chart: Chart, width: int, height: int, points: int) -> str:
    """The SVG of a chart that has a finite value; a line has at most about `points` vertices."""
    labels = _end_labels(chart)
    right, bottom = width - 12 - CHARACTER * max(len(text) for _, text in labels), height - BOTTOM
    y_axis, y_ticks = _y_axis(chart, TOP, bottom)
    places = np.concatenate([series.along(chart.axis, series.x) for series in chart.series])
    low, high = float(places.min()), float(places.max())
    margin = 0 if high > low else 1
    x_axis = Axis(low - margin, high + margin, LEFT + 4, right)
    drawn = sorted(
        chart.series, key=lambda series: ("faint", "line", "dashed", "points").index(series.style)
    )
    parts = [
        _y_ticks(chart, y_axis, y_ticks, right),
        f'<g class="x">{_x_ticks(chart.axis, x_axis, (low, high), height)}</g>',
        f'<path class="base" d="M{LEFT} {bottom}H{right:.1f}"/>',
        *_marks(chart, x_axis, bottom),
        *(_path(line, chart.axis, x_axis, y_axis, points) for line in drawn if len(line.finite)),
        _label_texts(labels, y_axis, right, bottom),
    ]
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(chart.summary)}" '
        f'data-area="{LEFT} {TOP} {right:.1f} {bottom}" data-percent="{int(chart.percent)}" '
        f'data-scale="{y_axis.low:.8g} {y_axis.high:.8g} {int(y_axis.log)}">'
        f"{''.join(parts)}</svg>"
    )


def _marks(chart: Chart, axis: Axis, bottom: float) -> Iterator[str]:
    owner = chart.series[0]
    for step, text in chart.marks[:200]:
        at = np.array([step])
        (x,) = axis.positions(owner.along(chart.axis, at))
        yield (
            f'<path class="mark" d="M{x:.1f} {bottom}l-4 7h8z"'
            f"{_steps(at, owner)}><title>{escape(text)}</title></path>"
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


def _x_ticks(kind: str, axis: Axis, ends: tuple[float, float], height: int) -> str:
    """Ticks between the ends, integer steps on a step axis; at the low end if there is none."""
    title, unit = ("step", 1.0) if kind == "step" else ("trained tokens", 1.0)
    if kind == "time":
        title, unit = time_unit(ends[1])
        title = f"training time, {title}"
    low, high, bottom = ends[0] / unit, ends[1] / unit, height - BOTTOM
    count = max(2, int((axis.end - LEFT) / 62))
    ticks = linear_ticks(axis.low / unit, axis.high / unit, count)
    ticks = [tick for tick in ticks if low <= tick <= high and (unit > 1 or tick == int(tick))]
    parts = []
    for tick in ticks or [low]:
        x, text = axis.position(tick * unit), compact(float(f"{tick:.6g}"))
        parts.append(
            f'<path class="base" d="M{x:.1f} {bottom}v4"/>'
            f'<text class="mid" x="{x:.1f}" y="{bottom + 16}">{text}</text>'
        )
    middle = (LEFT + axis.end) / 2
    return f'{"".join(parts)}<text class="mid" x="{middle:.1f}" y="{height - 4}">{title}</text>'


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
    columns = [_values_at(series, steps) for series in shown]
    rows = [
        [f"{step:,.0f}", *(chart.text(float(value)) for value in values)]
        for step, *values in zip(steps, *columns, strict=True)
    ]
    head = ["step", *(escape(series.label) for series in shown)]
    table = html_table(head, rows, stack=len(head) > 5)
    return f'<details class="values"><summary>Values</summary>{table}</details>'


def _values_at(series: Series, steps: np.ndarray) -> np.ndarray:
    """The values at some steps, ascending like the line's; NaN where the line has none."""
    index = np.minimum(np.searchsorted(series.x, steps), len(series.x) - 1)
    return np.where(series.x[index] == steps, series.y[index], np.nan)
