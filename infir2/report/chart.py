"""Charts as inline SVG: lines over steps. Colours and fonts come from style.css.

One unit of a viewBox is about one CSS pixel at the size a chart is shown, so that text stays readable on a phone. Drawn
lines are thinned to a number of points that keeps every bucket's smallest and largest value, and broken where values are
NaN. hover.js reads `data-x` (differences of steps) and `data-y` (values) of a line; without scripts the table below a
chart has the values.
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
MARKED_POINTS = 30  # a line with at most so many points shows each as a dot
FLATTENED = 8  # largest value over the median from which an auto axis is logarithmic


@dataclass(frozen=True)
class Series:
    """One line: x (whole steps) and y float64 [n], y NaN where there is a gap; `color` counts in the palette of style.css."""

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int = 0
    style: Literal["line", "dashed", "faint", "points"] = "line"
    half_width: np.ndarray | None = None  # of an interval, [n]

    @property
    def finite(self) -> np.ndarray:
        return self.y[np.isfinite(self.y)]

    @property
    def reach(self) -> np.ndarray:
        """Finite values and the ends of their intervals."""
        if self.half_width is None:
            return self.finite
        ends = np.concatenate([self.y, self.y - self.half_width, self.y + self.half_width])
        return ends[np.isfinite(ends)]


@dataclass(frozen=True)
class Chart:
    """A chart of several lines over one x. `scale` auto takes the logarithm when the largest values would flatten the rest."""

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
            return bool((values > 0).all() and values.max() > FLATTENED * np.median(values))
        return self.scale == "log" and bool((values > 0).any())

    def text(self, value: float) -> str:
        return percent(value, 2 if abs(value) < 0.01 else 1) if self.percent else compact(value)


@dataclass(frozen=True)
class Axis:
    """Maps [low, high] onto [start, end] in viewBox units."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        low, high = self.low, self.high
        if self.log:
            values, low, high = np.log(values), math.log(low), math.log(high)
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def at(self, value: float) -> float:
        return float(self.place(np.array([value]))[0])


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
    """Powers of ten; with 2 and 5 times them when the range is short."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    every = max(1, math.ceil((last - first) / 7))
    ticks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` (odd, at most len(y)) values, fewer at the ends; NaN counts for nothing and stays NaN."""
    good = np.isfinite(y)
    sums, counts = (
        np.convolve(values, np.ones(window), "same")
        for values in (np.where(good, y, 0.0), good.astype(float))
    )
    return np.where(good, sums / np.maximum(counts, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most about `points` of the values: of each bucket the smallest, the largest and one gap; both ends stay."""
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
    if chart.percent:
        digits = (
            max(0, -math.floor(math.log10(100 * (ticks[1] - ticks[0])) + 1e-9))
            if len(ticks) > 1
            else 1
        )
        return [percent(tick, digits) for tick in ticks]
    return [compact(float(f"{tick:.6g}")) for tick in ticks]


def _spread(positions: list[float], top: float, bottom: float) -> list[float]:
    """Move label positions (in any order) apart so that none overlap and all stay inside."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    placed = list(positions)
    for before, index in zip([None, *order], order, strict=False):
        placed[index] = max(placed[index], top if before is None else placed[before] + LABEL_GAP)
    limit = bottom
    for index in reversed(order):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - LABEL_GAP
    return placed


def _path(series: Series, x_axis: Axis, y_axis: Axis, points: int) -> str:
    x, y = thin(series.x, series.y, points)
    good = np.isfinite(y) & ((y > 0) | (not y_axis.log))
    px, py = x_axis.place(x), y_axis.place(np.where(good, y, y_axis.high))
    dots = series.style == "points"
    parts = []
    for index in np.flatnonzero(good):
        joined = not dots and index > 0 and good[index - 1]
        alone = dots or not (joined or good[index + 1 : index + 2].any())
        parts.append(
            f"{'L' if joined else 'M'}{px[index]:.1f} {py[index]:.1f}{'h0' if alone else ''}"
        )
    steps = " ".join(f"{step:.0f}" for step in np.diff(x[good], prepend=0))
    svg = (
        f'<path class="{series.style} c{series.color}" d="{"".join(parts)}" data-label="{escape(series.label)}" '
        f'data-x="{steps}" data-y="{" ".join(f"{value:.4g}" for value in y[good])}"/>'
    )
    if series.style in ("line", "dashed") and len(x) <= MARKED_POINTS:
        svg += f'<path class="small points c{series.color}" d="{"".join(f"M{px[i]:.1f} {py[i]:.1f}h0" for i in np.flatnonzero(good))}"/>'
    if series.half_width is not None and len(x) == len(series.x):
        ends = [
            y_axis.place(np.clip(y + sign * series.half_width, y_axis.low, y_axis.high))
            for sign in (-1, 1)
        ]
        bars = [
            f"M{at:.1f} {low:.1f}V{high:.1f}"
            for at, low, high in zip(px, *ends, strict=True)
            if math.isfinite(low + high)
        ]
        svg += f'<path class="whisker c{series.color}" d="{"".join(bars)}"/>'
    return svg


def _end_labels(chart: Chart) -> list[tuple[Series, str]]:
    """The last value of every line, with its name where there are several."""
    lines = [series for series in chart.series if series.style != "faint" and len(series.finite)]
    lines = [series for series in lines if series.style != "points"] or lines
    return [
        (
            series,
            (f"{series.label} " if len(lines) > 1 else "") + chart.text(float(series.finite[-1])),
        )
        for series in lines
    ]


def line_svg(chart: Chart, width: int, height: int, points: int) -> str:
    """The SVG of a chart that has at least one finite value; `points` bounds the vertices of one line."""
    labels = _end_labels(chart)
    values = ", ".join(text for _, text in labels)  # the table below has them all
    right, bottom = width - 12 - CHARACTER * max(len(text) for _, text in labels), height - BOTTOM
    y_axis, y_ticks = _y_axis(chart, TOP, bottom)
    steps = np.concatenate([series.x for series in chart.series])
    low, high = float(steps.min()), float(steps.max())
    x_axis = (
        Axis(low, high, LEFT + 4, right) if high > low else Axis(low - 1, high + 1, LEFT + 4, right)
    )
    parts = []
    for tick, text in zip(y_ticks, _tick_texts(y_ticks, chart), strict=True):
        y = y_axis.at(tick)
        parts.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}H{right:.1f}"/><text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{text}</text>'
        )
    x_ticks = linear_ticks(x_axis.low, x_axis.high, max(2, int((right - LEFT) / 62)))
    for tick in [tick for tick in x_ticks if low <= tick <= high and tick == int(tick)] or [low]:
        x = x_axis.at(tick)
        parts.append(
            f'<path class="base" d="M{x:.1f} {bottom}v4"/><text class="mid" x="{x:.1f}" y="{bottom + 16}">{compact(tick)}</text>'
        )
    parts.append(f'<path class="base" d="M{LEFT} {bottom}H{right:.1f}"/>')
    parts.append(f'<text class="mid" x="{(LEFT + right) / 2:.1f}" y="{height - 4}">step</text>')
    for step, text in chart.marks[:200]:
        parts.append(
            f'<path class="mark" d="M{x_axis.at(step):.1f} {bottom}l-4 7h8z"><title>{escape(text)}</title></path>'
        )
    drawn = sorted(
        chart.series, key=lambda series: ("faint", "line", "dashed", "points").index(series.style)
    )
    parts += [_path(series, x_axis, y_axis, points) for series in drawn if len(series.finite)]
    ends = [float(series.finite[-1]) for series, _ in labels]
    places = [y_axis.at(end) if end > 0 or not y_axis.log else bottom for end in ends]
    for (series, text), y in zip(labels, _spread(places, TOP, bottom), strict=True):
        parts.append(
            f'<text class="f{series.color} label" x="{right + 6:.1f}" y="{y + 4:.1f}">{escape(text)}</text>'
        )
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(f"{chart.title}: {values}")}" '
        f'data-area="{LEFT} {TOP} {right:.1f} {bottom}" data-percent="{int(chart.percent)}">{"".join(parts)}</svg>'
    )


def figure(chart: Chart, points: int, wide_height: int = 0) -> str:
    """Title, legend, SVG and table of values of a chart that has a finite value.

    A chart with `wide_height` is as wide as the page, and drawn a second time in a phone's proportions, since text shrinks
    with its viewBox.
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
        svg = f'<div class="wide">{svg}</div><div class="narrow">{line_svg(chart, 360, 270, min(points, 200))}</div>'
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return f'<figure class="card"><figcaption>{head}</figcaption>{svg}{note}{_value_table(chart, shown)}</figure>'


def _value_table(chart: Chart, shown: Sequence[Series]) -> str:
    """About a dozen steps with every line's value."""
    steps = np.unique(np.concatenate([series.x[np.isfinite(series.y)] for series in shown]))
    steps = steps[
        np.unique(np.linspace(0, len(steps) - 1, min(TABLE_ROWS, len(steps))).astype(int))
    ]
    values = [dict(zip(series.x, series.y, strict=True)) for series in shown]
    rows = [
        [f"{step:,.0f}", *(chart.text(float(value.get(step, math.nan))) for value in values)]
        for step in steps
    ]
    table = html_table(["step", *(escape(series.label) for series in shown)], rows)
    return f'<details class="values"><summary>Values</summary>{table}</details>'
