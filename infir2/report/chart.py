"""Charts as inline SVG: lines over steps, and points with intervals. Colours and fonts come from style.css.

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

LEFT, TOP, BOTTOM, LABEL_GAP, CHARACTER = 46, 10, 34, 13, 6.3
TABLE_ROWS = 12


@dataclass(frozen=True)
class Series:
    """One line: x (whole steps) and y float64 [n], y NaN where there is a gap; `color` counts in the palette of style.css."""

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int = 0
    style: Literal["line", "faint", "points"] = "line"
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
    """A chart of several lines over one x. `scale` auto takes the logarithm when outliers would flatten the rest."""

    title: str
    series: tuple[Series, ...]
    unit: str = ""
    scale: Literal["linear", "log", "auto"] = "linear"
    percent: bool = False
    from_zero: bool = False
    marks: tuple[tuple[float, str], ...] = ()
    note: str = ""

    def text(self, value: float) -> str:
        return percent(value) if self.percent else compact(value)


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


def compact(value: float) -> str:
    """Up to four digits: 1.234, 12.3 k, 160 B, 2e-5."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    for limit, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if size >= limit:
            return f"{value / (1e3 if suffix == ' k' else limit):.3g}".replace("e+03", "000") + suffix
    if size >= 1000:
        return f"{value:,.0f}"
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %".replace("-", "−") if math.isfinite(value) else "–"


def signed_percent(value: float) -> str:
    return f"{100 * value:+.2f} %".replace("-", "−")


def nice_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 5 x 10^n that divides `span` into at most `count` parts."""
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    step = nice_step(high - low, count)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; with 2 and 5 times them when the range is short."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    every = max(1, math.ceil((last - first) / 6))
    ticks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, shorter at the ends; NaN values count for nothing and stay NaN."""
    good = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    index = np.arange(len(y))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(y))
    result = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(good, result, np.nan)


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
    values = np.concatenate([series.reach for series in chart.series])
    positive = values[values > 0]
    log = chart.scale == "log" or (chart.scale == "auto" and len(positive) == len(values) and values.max() > 30 * np.median(values))
    if log and len(positive):
        low, high = float(positive.min()), float(positive.max())
        if high < 3 * low:
            low, high = low / 2, high * 2
        return Axis(low * 0.85, high * 1.15, bottom, top, log=True), log_ticks(low * 0.85, high * 1.15)
    low, high = float(values.min()), float(values.max())
    if chart.from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-12):
        low, high = low - (abs(low) * 0.1 or 0.5) * (not chart.from_zero or low < 0), high + (abs(high) * 0.1 or 0.5)
    step = nice_step(high - low, 5)
    low, high = math.floor(low / step + 1e-6) * step, math.ceil(high / step - 1e-6) * step
    return Axis(low, high, bottom, top), linear_ticks(low, high, 5)


def _tick_texts(ticks: Sequence[float], chart: Chart, log: bool) -> list[str]:
    if chart.percent:
        digits = 0 if log or len(ticks) < 2 else max(0, min(6, -math.floor(math.log10(100 * (ticks[1] - ticks[0])) + 1e-9)))
        return [percent(tick, max(digits, 0 if not log or tick >= 0.01 else 2)) for tick in ticks]
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
    if y_axis.log:
        y = np.where(y > 0, y, np.nan)
    good = np.isfinite(y)
    px, py = x_axis.place(x), y_axis.place(np.where(good, y, y_axis.low))
    parts = []
    for index in np.flatnonzero(good):
        joined = series.style != "points" and index > 0 and good[index - 1]
        alone = series.style == "points" or (not joined and not (index + 1 < len(good) and good[index + 1]))
        parts.append(f"{'L' if joined else 'M'}{px[index]:.1f} {py[index]:.1f}{'h0' if alone else ''}")
    steps = np.diff(x[good].astype(np.int64), prepend=0)
    whiskers = ""
    if series.half_width is not None and len(x) == len(series.x):
        ends = [y_axis.place(np.clip(y + sign * series.half_width, y_axis.low, y_axis.high)) for sign in (-1, 1)]
        bars = [f"M{at:.1f} {low:.1f}V{high:.1f}" for at, low, high in zip(px, *ends, strict=True) if math.isfinite(low + high)]
        whiskers = f'<path class="whisker c{series.color}" d="{"".join(bars)}"/>'
    return whiskers + (
        f'<path class="{series.style} c{series.color}" d="{"".join(parts)}" data-label="{escape(series.label)}" '
        f'data-x="{" ".join(map(str, steps))}" data-y="{" ".join(f"{value:.4g}" for value in y[good])}"/>'
    )


def _end_labels(chart: Chart) -> list[tuple[Series, str]]:
    lines = [series for series in chart.series if series.style != "faint" and len(series.finite)]
    lines = [series for series in lines if series.style == "line"] or lines
    several = len(lines) > 1
    return [(series, (f"{series.label} " if several else "") + chart.text(float(series.finite[-1]))) for series in lines]


def line_svg(chart: Chart, width: int, height: int, points: int) -> str:
    """The SVG of a chart that has at least one finite value; `points` bounds the vertices of one line."""
    labels = _end_labels(chart)
    right = width - 12 - CHARACTER * max((len(text) for _, text in labels), default=0)
    bottom = height - BOTTOM
    y_axis, y_ticks = _y_axis(chart, TOP, bottom)
    x_all = np.concatenate([series.x for series in chart.series])
    low, high = float(x_all.min()), float(x_all.max())
    x_axis = Axis(low, high, LEFT + 4, right) if high > low else Axis(low - 1, high + 1, LEFT + 4, right)
    parts = []
    for tick, text in zip(y_ticks, _tick_texts(y_ticks, chart, y_axis.log), strict=True):
        y = y_axis.at(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right:.1f}"/><text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{text}</text>')
    x_ticks = [tick for tick in linear_ticks(x_axis.low, x_axis.high, max(2, int((right - LEFT) / 62))) if tick == int(tick)]
    for tick in x_ticks or [low]:
        x = x_axis.at(tick)
        parts.append(f'<path class="tick" d="M{x:.1f} {bottom}v4"/><text class="mid" x="{x:.1f}" y="{bottom + 16}">{compact(tick)}</text>')
    parts.append(
        f'<path class="base" d="M{LEFT} {bottom}H{right:.1f}"/><text class="mid" x="{(LEFT + right) / 2:.1f}" y="{height - 4}">step</text>'
    )
    for step, text in chart.marks[:200]:
        parts.append(f'<path class="mark" d="M{x_axis.at(step):.1f} {bottom}l-4 7h8z"><title>{escape(text)}</title></path>')
    drawn = sorted(chart.series, key=lambda series: ("faint", "line", "points").index(series.style))
    parts += [_path(series, x_axis, y_axis, points) for series in drawn if len(series.finite)]
    ends = [y_axis.at(float(series.finite[-1])) if not y_axis.log or series.finite[-1] > 0 else bottom for series, _ in labels]
    for (series, text), y in zip(labels, _spread(ends, TOP, bottom), strict=True):
        parts.append(f'<text class="f{series.color} label" x="{right + 6:.1f}" y="{y + 4:.1f}">{escape(text)}</text>')
    area = f"{LEFT} {TOP} {right:.1f} {bottom}"
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(describe(chart))}" data-area="{area}" '
        f'data-percent="{int(chart.percent)}">{"".join(parts)}</svg>'
    )


def describe(chart: Chart) -> str:
    """The chart in one sentence, for screen readers."""
    parts = []
    for series in chart.series:
        good = np.isfinite(series.y)
        if series.style == "faint" or not good.any():
            continue
        x, y = series.x[good], series.y[good]
        parts.append(
            f"{series.label} from {chart.text(y[0])} at step {x[0]:.0f} to {chart.text(y[-1])} at step {x[-1]:.0f}, "
            f"lowest {chart.text(y.min())}, highest {chart.text(y.max())}"
        )
    return f"{chart.title}{f' in {chart.unit}' if chart.unit else ''}: {'; '.join(parts)}"


def figure(chart: Chart, points: int, wide: bool = False) -> str:
    """Title, legend, SVG and table of a chart; a note instead of the SVG where there is no finite value.

    A wide chart is drawn a second time in a phone's proportions, since text shrinks with its viewBox.
    """
    shown = [series for series in chart.series if series.style != "faint" and len(series.finite)]
    unit = f" <small>{escape(chart.unit)}</small>" if chart.unit else ""
    head = f"<h4>{escape(chart.title)}{unit}</h4>"
    if not shown:
        return f'<figure class="card">{head}<p class="note">No finite value.</p></figure>'
    if len(shown) > 1:
        keys = "".join(f'<span class="key {series.style} k{series.color}">{escape(series.label)}</span>' for series in shown)
        head += f'<p class="keys">{keys}</p>'
    if wide:
        svg = f'<div class="wide">{line_svg(chart, 1080, 340, points)}</div><div class="narrow">{line_svg(chart, 360, 270, min(points, 200))}</div>'
    else:
        svg = line_svg(chart, 360, 220, points)
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return f'<figure class="card"><figcaption>{head}</figcaption>{svg}{note}{_value_table(chart, shown)}</figure>'


def _value_table(chart: Chart, shown: list[Series]) -> str:
    steps = np.unique(np.concatenate([series.x[np.isfinite(series.y)] for series in shown]))
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, min(TABLE_ROWS, len(steps))).astype(int))]
    head = "".join(f'<th scope="col">{escape(series.label)}</th>' for series in shown)
    body = []
    for step in steps:
        cells = []
        for series in shown:
            at = series.y[series.x == step]
            cells.append(f"<td>{chart.text(float(at[-1])) if len(at) else '–'}</td>")
        body.append(f'<tr><th scope="row">{step:,.0f}</th>{"".join(cells)}</tr>')
    return (
        f'<details class="values"><summary>Values</summary><div class="scroll"><table><thead><tr><th scope="col">step</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></details>"
    )


@dataclass(frozen=True)
class IntervalRow:
    """A point with the half-width of its interval and a second, hollow point; all fractions of 1, NaN where unknown."""

    label: str
    value: float
    half_width: float
    other: float
    color: int = 0


def interval_svg(rows: Sequence[IntervalRow], title: str, other: str, width: int) -> str:
    """Rows of points with intervals on one axis from 0 to 100 %."""
    left = 12 + CHARACTER * max(len(row.label) for row in rows)
    right, pitch = width - 26.0, 34
    bottom = TOP + pitch * len(rows)
    axis = Axis(0.0, 1.0, left, right)
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = axis.at(tick)
        parts.append(
            f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/><text class="mid" x="{x:.1f}" y="{bottom + 16}">{percent(tick, 0)}</text>'
        )
    for index, row in enumerate(rows):
        y = TOP + pitch * (index + 0.5)
        parts.append(f'<text class="end name" x="{left - 10:.1f}" y="{y + 4:.1f}">{escape(row.label)}</text>')
        if math.isfinite(row.other):
            parts.append(
                f'<circle class="hollow s{row.color}" cx="{axis.at(row.other):.1f}" cy="{y:.1f}" r="4.5"><title>{escape(other)} {percent(row.other)}</title></circle>'
            )
        if not math.isfinite(row.value):
            continue
        x = axis.at(row.value)
        if math.isfinite(row.half_width):
            low, high = axis.at(max(row.value - row.half_width, 0)), axis.at(min(row.value + row.half_width, 1))
            parts.append(f'<path class="bar c{row.color}" d="M{low:.1f} {y - 5:.1f}v10m0 -5H{high:.1f}m0 -5v10"/>')
        tip = f"{row.label}: {percent(row.value)} ± {percent(row.half_width)}"
        parts.append(f'<circle class="dot f{row.color}" cx="{x:.1f}" cy="{y:.1f}" r="5.5"><title>{escape(tip)}</title></circle>')
        parts.append(f'<text class="mid label f{row.color}" x="{x:.1f}" y="{y - 10:.1f}">{percent(row.value)}</text>')
    text = f"{title}: " + "; ".join(f"{row.label} {percent(row.value)} ± {percent(row.half_width)}" for row in rows)
    return f'<svg class="dots" viewBox="0 0 {width} {bottom + 24}" role="img" aria-label="{escape(text)}">{"".join(parts)}</svg>'
