"""Axes: round ticks, positions, and where the steps of a run lie by tokens and by time."""

import math
from dataclasses import dataclass

import numpy as np

AXES = ("step", "tokens", "time")
CLOCK_KNOTS = 64  # of a run, between which the page interpolates


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


@dataclass(frozen=True)
class Clock:
    """Tokens trained and seconds spent in training steps up to each step of the run `name`.

    All arrays are float64 [n], and begin with the step before the first, at 0 tokens and 0 s.
    `axes` are those that the run has numbers for.
    """

    name: str
    steps: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    axes: tuple[str, ...] = AXES

    def at(self, axis: str, steps: np.ndarray) -> np.ndarray:
        """Where these steps lie on the axis: steps, tokens or seconds."""
        if axis == "step" or not len(self.steps):
            return steps
        totals = self.tokens if axis == "tokens" else self.seconds
        return np.interp(steps, self.steps, totals)

    def as_json(self) -> list[list[float]]:
        """[steps, tokens, seconds] at some steps, for the page's script."""
        count = min(CLOCK_KNOTS, len(self.steps))
        knots = np.unique(np.linspace(0, len(self.steps) - 1, count).astype(int))
        rows = (self.steps, self.tokens, self.seconds)
        return [[round(float(value), 1) for value in row[knots]] for row in rows]


def cumulative(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Totals of a quantity of single steps, [n] -> [n + 1], from 0.

    Steps between two lines count like the later line; a value that is not finite as the mean.
    """
    good = np.isfinite(values)
    mean = float(values[good].mean()) if good.any() else 0.0
    spans = np.diff(steps, prepend=steps[:1] - 1)
    return np.concatenate([[0.0], np.cumsum(np.where(good, values, mean) * spans)])


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


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit for a time axis that ends at `seconds`: (name, seconds)."""
    if seconds >= 4 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if seconds >= 240 else ("seconds", 1.0)
